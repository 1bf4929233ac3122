"""
See attention masks, and what a trained model does with them.

    python draw.py --ask "what color is the circle?" --answer red --out mask.png
    python draw.py --ask "<image> or <image>?" --masks causal,mma --out -      # in the terminal
    python draw.py --ask "what color is it?" "where?" --out batch.png          # a padded batch
    python draw.py --model out/shapes/model.pt --image scene.png \\
                   --ask "what is left of the red circle?" --out attention.png

The first three need no model: a token is a word. With two --ask, the last one also shows how far
each visual token's state moves from one question to the other.
"""
import os
import shutil
import sys
import textwrap
import unicodedata
from itertools import chain
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanoaki import (ANSWER, IMAGE, MASKS, PAD, PROMPT, NanoAKI, Tokenizer, build_sequence,
                     fit_picture, make_mask, pad_batch)
from sample import Parser, fail, open_picture

# What a cell of a mask can be: colours differ in lightness too (in L*: 98, 82, 70, 54, 24).
BLOCKED, PADDING, SEEN, UNLOCKED, DIAGONAL = range(5)
STATES = {  # name, colour, ASCII, a block and its ANSI colour
    BLOCKED: ("blocked", (249, 249, 249), ".", "· ", "90"),
    PADDING: ("padding", (203, 203, 203), "-", "░░", "90"),
    SEEN: ("seen causally", (86, 180, 233), "x", "▒▒", "36"),
    UNLOCKED: ("unlocked by the mask", (213, 94, 0), "o", "██", "33"),
    DIAGONAL: ("itself", (0, 56, 104), "*", "▓▓", "34")}
SEGMENTS = {PAD: ("padding", (203, 203, 203)), IMAGE: ("image", (0, 158, 115)),
            PROMPT: ("prompt", (204, 121, 167)), ANSWER: ("answer", (230, 200, 30))}

# Layout, in pixels.
FONT, LINE = 11, 13         # size of text, distance of two lines
SIDE, CELL = 560, (2, 22)   # a mask's side where the cells' least and largest side allow it
BAND, GAP = 6, 14           # thickness of the segments' colours, space between parts
LABEL = 100                 # longest label
THUMB = 120                 # side of a picture under a heat map
HOT = (255, 214, 40)        # the largest weight; at 0 the picture is dark and of little contrast
MOST = 12                   # heat maps in a row
SAMPLE = 192                # side of a picture with an answer to it
RIGHT, WRONG = (0, 96, 0), (192, 0, 0)


def cell_states(roles: Tensor, mask: Tensor) -> Tensor:
    """Which of the five states each cell has: uint8 (T, T), of roles (T,) and mask bool (T, T)."""
    T = len(roles)
    past = torch.ones(T, T, dtype=torch.bool).tril()
    states = torch.full((T, T), BLOCKED, dtype=torch.uint8)
    states[mask & past] = SEEN
    states[mask & ~past] = UNLOCKED
    states[torch.eye(T, dtype=torch.bool)] = DIAGONAL
    states[(roles == PAD)[:, None] | (roles == PAD)] = PADDING
    return states


def runs(roles: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of equal roles."""
    cuts = [0] + [i for i in range(1, len(roles)) if roles[i] != roles[i - 1]] + [len(roles)]
    return list(zip(cuts, cuts[1:]))


# Pieces of a picture -----------------------------------------------------------------------------


def text(string: str, color="black", limit: int | None = None) -> Image.Image:
    """A line of text, cut to a number of pixels."""
    font = ImageFont.load_default(FONT)
    string = " ".join(string[:1000].split())  # longer ones would take minutes to measure
    string = string[:limit]                    # no character is narrower than a pixel
    if limit and font.getlength(string) > limit:
        while string and font.getlength(string + "...") > limit:
            string = string[:-1]
        string += "..."
    image = Image.new("RGB", (max(1, int(font.getlength(string) + 1)), LINE), "white")
    ImageDraw.Draw(image).text((0, 0), string, color, font)
    return image


def join(parts: list[Image.Image], down: bool = False, gap: int = 0, end: bool = False):
    """Pictures side by side, or one below the other; aligned at their start, or at their end."""
    across = 0 if down else 1
    room = max((p.size[across] for p in parts), default=1)
    length = sum(p.size[1 - across] for p in parts) + gap * max(0, len(parts) - 1)
    sheet = Image.new("RGB", (room, length) if down else (length, room), "white")
    at = 0
    for p in parts:
        shift = room - p.size[across] if end else 0
        sheet.paste(p, (shift, at) if down else (at, shift))
        at += p.size[1 - across] + gap
    return sheet


def padded(image: Image.Image, size: tuple[int, int], at: tuple[int, int] = (0, 0)) -> Image.Image:
    """A picture on white of a given size."""
    sheet = Image.new("RGB", size, "white")
    sheet.paste(image, at)
    return sheet


def frame(image: Image.Image) -> Image.Image:
    return padded(image, (image.width + 2 * GAP, image.height + 2 * GAP), (GAP, GAP))


def swatch(color) -> Image.Image:
    sheet = Image.new("RGB", (LINE, LINE), "white")
    ImageDraw.Draw(sheet).rectangle((0, 1, LINE - 4, LINE - 3), color, "gray")
    return sheet


def legend(entries: list[tuple[str, tuple]], room: int) -> Image.Image:
    """Swatches with their names, in as many lines as they need."""
    lines = [[]]
    for name, color in entries:
        entry = join([swatch(color), text(name)])
        if lines[-1] and sum(e.width + GAP for e in lines[-1]) + entry.width > room:
            lines.append([])
        lines[-1].append(entry)
    return join([join(line, gap=GAP) for line in lines], down=True, gap=2)


def chart(title: str, curves: dict[str, dict[int, list[float]]], colors: dict[str, tuple],
          last: int) -> Image.Image:
    """Percent over steps, one curve per name: the mean of its values, and a band of all of them."""
    wide, high, left, under, fine = 330, 220, 32, 18, 3  # drawn finer, then made smaller
    image = Image.new("RGB", (fine * wide, fine * high), "white")
    draw = ImageDraw.Draw(image, "RGBA")

    def at(step: float, value: float) -> tuple[float, float]:
        return (fine * (left + step / last * (wide - left - 12)),
                fine * (high - under - value / 100 * (high - under - 18)))

    for value in range(0, 101, 25):
        draw.line([at(0, value), at(last, value)], (225, 225, 225), fine)
    for name, points in curves.items():
        band = [at(step, max(v)) for step, v in points.items()]
        band += [at(step, min(v)) for step, v in reversed(points.items())]
        mean = [at(step, np.mean(v)) for step, v in points.items()]
        if len(points) > 1:
            draw.polygon(band, (*colors[name], 50))
            draw.line(mean, colors[name], 2 * fine, "curve")
        for point in mean:
            draw.circle(point, 2 * fine, colors[name])
    image = image.resize((wide, high), Image.Resampling.LANCZOS)
    image.paste(text(title), (left, 0))
    for value in range(0, 101, 25):
        label, y = text(str(value), "gray"), at(0, value)[1] / fine
        image.paste(label, (left - 4 - label.width, round(y - label.height / 2)))
    for step in (0, last // 2, last):
        label = text(f"{step:,}", "gray")
        x = min(wide - label.width, round(at(step, 0)[0] / fine - label.width / 2))
        image.paste(label, (x, high - label.height))
    return image


def draw_samples(examples, indices: list[int], given: list[str]) -> Image.Image:
    """Pictures of some Examples with question, right answer and the model's; wrong are framed."""
    cards = []
    for i, answer in zip(indices, given):
        example = examples[i]
        wrong, picture = answer != example.answer.strip(), padded(text(""), (SAMPLE, SAMPLE))
        if example.pictures:
            pixels = examples.picture(example.pictures[0]).permute(1, 2, 0).numpy()
            picture = Image.fromarray(pixels).resize(picture.size, Image.Resampling.NEAREST)
        if wrong:
            ImageDraw.Draw(picture).rectangle((0, 0, SAMPLE - 1, SAMPLE - 1), None, WRONG, 4)
        first, second = (textwrap.wrap(example.question, 34) + ["", ""])[:2]
        lines = [text(line, limit=SAMPLE) for line in (first, second, f"right: {example.answer}")]
        lines.append(text(f"model: {answer}", WRONG if wrong else RIGHT, SAMPLE))
        cards.append(join([picture, *lines], down=True, gap=2))
    rows = [join(cards[n:n + 4], gap=GAP) for n in range(0, len(cards), 4)]
    return frame(join(rows, down=True, gap=GAP))


# Masks -------------------------------------------------------------------------------------------


def cell_side(T: int) -> int:
    return min(CELL[1], max(CELL[0], SIDE // T))


def placed(labels: list[str], roles: list[int], cell: int) -> list[tuple[int, str]]:
    """(y, label) down the rows: a run of image or padding once, others where there is room."""
    wanted, found, free = [], [], 0
    for start, stop in runs(roles):
        if roles[start] in (IMAGE, PAD) and stop - start > 1:
            wanted.append(((start + stop) / 2, f"{labels[start]} x {stop - start}"))
        else:
            wanted += [(i + 0.5, labels[i]) for i in range(start, stop)]
    for middle, label in wanted:
        y = max(0, min(round(middle * cell - LINE / 2), len(roles) * cell - LINE))
        if y >= free:
            found.append((y, label))
            free = y + LINE
    return found


def label_strip(labels: list[str], roles: list[int], cell: int, end: bool) -> Image.Image:
    """The labels beside the rows of a mask, aligned at their end or start."""
    words = [(y, text(label, limit=LABEL)) for y, label in placed(labels, roles, cell)]
    wide = LABEL if end else max(word.width for _, word in words)  # rows of a batch stand in line
    strip = Image.new("RGB", (wide, len(roles) * cell), "white")
    for y, word in words:
        strip.paste(word, (wide - word.width if end else 0, y))
    return strip


def mask_grid(roles: Tensor, mask: Tensor, cell: int) -> Image.Image:
    """The cells of a mask, cell x cell pixels each, parted by a line where there is room for it."""
    colors = torch.tensor([STATES[state][1] for state in range(5)], dtype=torch.uint8)
    grid = colors[cell_states(roles, mask).long()].numpy().repeat(cell, 0).repeat(cell, 1)
    if cell > 5:
        grid[::cell] = grid[:, ::cell] = 225
    return Image.fromarray(grid)


def draw_mask(roles: Tensor, labels: list, masks: list[str]) -> Image.Image:
    """Attention masks as grids of query rows and key columns, side by side on one scale.

    roles int64 (T,), or (B, T) for a batch whose rows stand one below the other; labels: T strings,
    or B lists of them; masks: names in MASKS. Raises ValueError on other names and lengths.
    """
    if roles.dim() == 1:
        roles, labels = roles[None], [labels]
    if [len(row) for row in labels] != [roles.shape[1]] * len(roles):
        raise ValueError(f"labels must be {len(roles)} lists of {roles.shape[1]}")
    cell, made = cell_side(roles.shape[1]), {name: make_mask(name, roles) for name in masks}
    sheet = []
    for b, row in enumerate(roles):
        kinds = row.tolist()
        rows, columns = (label_strip(labels[b], kinds, cell, end) for end in (True, False))
        band = np.array([SEGMENTS[kind][1] for kind in kinds], np.uint8).repeat(cell, 0)[:, None]
        band = Image.fromarray(band.repeat(BAND, 1))
        panels = [join([rows, band], gap=2)]
        for name in masks:
            unlocked = int((cell_states(row, made[name][b]) == UNLOCKED).sum())
            panels.append(join([text(f"{name}: {unlocked:,} pairs unlocked"),
                                columns.transpose(Image.Transpose.ROTATE_90),
                                band.transpose(Image.Transpose.TRANSPOSE),
                                mask_grid(row, made[name][b], cell)], down=True, gap=2))
        sheet.append(join(panels, gap=GAP, end=True))
    room = max(part.width for part in sheet)
    states = [STATES[state][:2] for state in STATES if state != PADDING or (roles == PAD).any()]
    parts = [SEGMENTS[kind] for kind in SEGMENTS if (roles == kind).any() and kind != PAD]
    notes = [text("rows: queries; columns: keys", "gray"),
             legend(states, room), legend(parts, room)]
    return frame(join([*sheet, join(notes, down=True, gap=2)], down=True, gap=GAP))


def columns_of(string: str) -> int:
    """The columns of a terminal that a string takes: East Asian characters and emoji take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in string)


def mask_text(roles: Tensor, labels: list[str], masks: list[str], width: int, fancy: bool) -> str:
    """draw_mask for a terminal, of roles (T,): ASCII, or blocks and colours.

    Long runs are cut, before their last token, to what fits in width columns: the images' first.
    Raises ValueError where nothing fits.
    """
    kinds, side, edge, T = roles.tolist(), 2 if fancy else 1, 18, len(roles)

    def kept(image: int, other: int) -> list[int]:
        return [i for start, stop in runs(kinds) for i in range(start, stop) if i == stop - 1
                or i - start < (image if kinds[start] == IMAGE else other) - 1]

    tries = chain(((n, T) for n in range(T, 0, -1)), ((1, n) for n in range(T, 0, -1)))
    shown = next((some for n in tries if edge + side * len(some := kept(*n)) <= width), None)
    if shown is None:
        raise ValueError(f"{width} columns are too few for a mask of {T} tokens: choose a file")
    cells = [f"\033[{ansi}m{block}\033[0m" if fancy else plain
             for _, _, plain, block, ansi in STATES.values()]
    lines = [f"{cells[state]} {STATES[state][0]}" for state in STATES
             if state != PADDING or PAD in kinds]
    letters = {PAD: "-", IMAGE: "I", PROMPT: "P", ANSWER: "A"}
    cut = {b for a, b in zip(shown, shown[1:]) if b > a + 1}
    if cut:
        lines.append("~ some left out before")
    for name in masks:
        states = cell_states(roles, make_mask(name, roles[None])[0])
        lines += ["", f"{name}: {int((states == UNLOCKED).sum()):,} pairs unlocked",
                  " " * edge + "".join(("~" if k in cut else letters[kinds[k]]).ljust(side)
                                       for k in shown)]
        for q in shown:
            label = ("~ " if q in cut else "") + " ".join(labels[q].split())
            while columns_of(label) > edge - 2:
                label = label[:-1]
            lines.append(" " * (edge - 1 - columns_of(label)) + label + " "
                         + "".join(cells[int(states[q, k])] for k in shown))
    return "\n".join(lines)


def word_batch(questions: list[str], answers: list[str | None], visual_tokens: int):
    """roles (B, T) and labels of questions, a word a token; pictures stand at <image>, or first."""
    words: list[str] = []

    def encode(string: str) -> list[int]:
        parts = string.split()
        words.extend(parts)
        return list(range(1000 + len(words) - len(parts), 1000 + len(words)))

    tokenizer = SimpleNamespace(image=Tokenizer.image, answer=Tokenizer.answer, eos=Tokenizer.eos,
                                encode=encode)
    config = SimpleNamespace(visual_tokens=visual_tokens, block_size=1 << 30)
    rows = [build_sequence(tokenizer, config, [("human", question)],
                           max(1, question.count("<image>")), answer)
            for question, answer in zip(questions, answers)]
    tokens, roles, _ = pad_batch(rows)
    names = {Tokenizer.image: "image", Tokenizer.answer: "<answer>", Tokenizer.eos: "<eos>",
             Tokenizer.pad: "padding"}
    return roles, [[names.get(t) or words[t - 1000] for t in row] for row in tokens.tolist()]


# Attention ---------------------------------------------------------------------------------------


class Recorder(TorchFunctionMode):
    """Within, masked attention is computed openly, and its weights are kept, call by call.

    torch hands every call of a function of its own to this mode, so that the model need not know.
    """

    def __init__(self):
        super().__init__()
        self.weights = []  # of each call (B, heads, queries, keys), float32

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        q, k, v, mask = args
        if kwargs.get("is_causal"):
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.float().softmax(-1)
        if mask is not None:  # the ViT has none
            self.weights.append(weights)
        return weights.to(v.dtype) @ v


class Attention(NamedTuple):
    answer: str
    words: list[str]  # of the question, <answer> last
    tokens: list[str]  # of the answer, and <eos> where the model has ended
    looks: Tensor     # (layers, heads, answer tokens, visual tokens): what each was predicted from
    reads: Tensor     # (layers, heads, words, visual tokens): how much each visual token reads it
    weights: Tensor   # (layers, heads, T, T), all of them: rows are queries, columns keys
    roles: Tensor     # (T,)


def attention_maps(model: NanoAKI, pictures: list[Image.Image], question: str,
                   mask: str | None = None, max_new_tokens: int | None = None) -> Attention:
    """The attention weights of the very forward that answers a question about pictures.

    They come with the greedy answer's generation: one pass over all that is given, then one row a
    token. The last generated token is never attended from. Raises ValueError as NanoAKI.ask does.
    """
    limit = model.config.block_size if max_new_tokens is None else max_new_tokens
    if limit < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {limit}")
    training, (images, tokens, roles) = model.training, model.prompt([pictures], [question])
    model.eval()
    with Recorder() as recorder, torch.no_grad():
        ids = [new for (new,) in model.stream(images, tokens, roles, limit, mask=mask)]
    model.train(training)
    n, (_, given) = len(model.decoder.blocks), tokens.shape
    passes = [torch.cat(recorder.weights[at:at + n]) for at in range(0, len(recorder.weights), n)]
    T = given + len(passes) - 1
    weights = torch.cat([F.pad(w, (0, T - w.shape[-1])) for w in passes], 2).cpu()
    roles = F.pad(roles[0], (0, T - given), value=ANSWER).cpu()
    seen = (roles == IMAGE).nonzero()[:, 0]
    given_ids, columns, cut = tokens[0].tolist(), [], True
    for i in range(given):  # a word goes on where a token has no space in front
        piece = model.tokenizer.decode([given_ids[i]])
        if roles[i] == PROMPT:
            if cut or given_ids[i] == Tokenizer.answer or piece[:1].isspace():
                columns.append([])
            columns[-1].append(i)
        cut = roles[i] != PROMPT
    words = ["<answer>" if given_ids[some[0]] == Tokenizer.answer else
             model.tokenizer.decode([given_ids[i] for i in some]).strip() for some in columns]
    reads = torch.stack([weights[..., seen, :][..., some].sum(-1) for some in columns], 2)
    ends = ["<eos>"] * (len(passes) - len(ids))
    return Attention(model.tokenizer.decode(ids), words,
                     [model.tokenizer.decode([i]).strip() for i in ids] + ends,
                     weights[:, :, given - 1:][..., seen], reads, weights, roles)


@torch.no_grad()
def movement(model: NanoAKI, pictures: list[Image.Image], questions: list[str],
             mask: str | None = None) -> Tensor:
    """How far each visual token's last state moves from one of two questions to the other.

    float32 (visual tokens of all pictures,): the distance of the two states in a padded batch, as a
    share of their mean length. Raises ValueError as NanoAKI.ask does.
    """
    training, (images, tokens, roles) = model.training, model.prompt([pictures] * 2, questions)
    x = model.eval().hidden(images, tokens, roles, mask).float()
    model.train(training)
    a, b = (x[i, roles[i] == IMAGE] for i in (0, 1))
    return ((a - b).norm(dim=-1) / ((a.norm(dim=-1) + b.norm(dim=-1)) / 2)).cpu()


def heat_maps(picture: Image.Image, maps: Tensor, top: float) -> list[Image.Image]:
    """The picture, darkened, under each of maps (n, visual tokens), from 0 to top."""
    side = int(maps.shape[-1] ** 0.5)
    dark = np.asarray(picture.convert("L").resize((THUMB, THUMB)), np.float32)[..., None] * 0.2 + 25
    sheet = []
    for values in maps.reshape(-1, side, side):
        share = Image.fromarray((values / (top or 1)).clamp(0, 1).numpy().astype(np.float32))
        share = np.asarray(share.resize((THUMB, THUMB), Image.Resampling.NEAREST))[..., None]
        sheet.append(Image.fromarray((dark * (1 - share) + np.array(HOT) * share).astype(np.uint8)))
    return sheet


def map_rows(title: str, picture: Image.Image, names: list[str], rows: dict[str, Tensor]):
    """Rows of heat maps, one column per name, each row with the scale that it is drawn on."""
    share = np.linspace(0, 1, LABEL - GAP)[None, :, None].repeat(LINE // 2, 0)
    ramp = 50 * (1 - share) + share * np.array(HOT)
    columns = [padded(text(name, limit=THUMB), (THUMB, LINE)) for name in names[:MOST]]
    more = f" (the first {MOST} of {len(names)})" if len(names) > MOST else ""
    lines = [text(title + more), join([padded(text(""), (LABEL, LINE)), *columns], gap=4)]
    for name, maps in rows.items():
        top = float(maps.max())
        scale = join([text(name), Image.fromarray(ramp.astype(np.uint8)),
                      text(f"0 to {top:.3g}", "gray")], down=True, gap=3)
        label = padded(scale, (LABEL, THUMB), (0, THUMB // 2 - scale.height // 2))
        lines.append(join([label, *heat_maps(picture, maps[:MOST], top)], gap=4))
    return join(lines, down=True, gap=4)


def draw_attention(model: NanoAKI, pictures: list[Image.Image], questions: list[str],
                   mask: str | None = None, layer: int | None = None, head: int | None = None):
    """Heat maps over the pictures of one question, or of two and what moves between them.

    layer and head count from 1; None is all layers and their mean, and the mean of all heads.
    Raises ValueError where the model has no such layer or head, and as NanoAKI.ask does.
    """
    c, sheet, V = model.config, [], model.config.visual_tokens
    for name, value, most in (("layer", layer, c.n_layer), ("head", head, c.n_head)):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, as the model has, not {value}")
    squares = [Image.fromarray(fit_picture(p, c.image_size).permute(1, 2, 0).numpy())
               for p in pictures]

    def rows(weights: Tensor) -> dict[str, Tensor]:  # (layers, heads, names, visual tokens)
        w = weights.mean(1) if head is None else weights[:, head - 1]
        if layer is not None:
            return {f"layer {layer}": w[layer - 1]}
        return {"mean of layers": w.mean(0)} | {f"layer {i + 1}": w[i] for i in range(len(w))}

    for question in questions:
        found = attention_maps(model, pictures, question, mask)
        for n, square in enumerate(squares):
            shown = square.resize((THUMB, THUMB), Image.Resampling.NEAREST)
            sheet.append(join([shown, join([text(question), text(found.answer)], down=True)],
                              gap=GAP))
            here = slice(n * V, n * V + V)
            sheet += [map_rows(title, square, names, rows(weights[..., here]))
                      for title, names, weights in (
                          ("where each token of the answer looks", found.tokens, found.looks),
                          ("which visual tokens read each word of the question",
                           found.words, found.reads))]
    if len(questions) == 2:
        moved = movement(model, pictures, questions, mask)
        for n, square in enumerate(squares):
            part = moved[None, n * V:n * V + V]
            sheet.append(map_rows("how far visual tokens move from one question to the other, in "
                                  "lengths of their state", square, [""], {"last state": part}))
        if any("<image>" in q and not q.startswith("<image>") for q in questions):
            sheet.append(text("text stands before a picture here: that alone moves its tokens"))
    heads = "mean of all heads" if head is None else f"head {head}"
    sheet.append(text(f"attention weights under mask {mask or c.mask}, {heads}: what is read, not "
                      f"an explanation of the answer", "gray"))
    return frame(join(sheet, down=True, gap=GAP))


def can_color() -> bool:
    """Whether standard output is a terminal that shows blocks and colours, and nobody minds."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    try:
        "".join(block for *_, block, _ in STATES.values()).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return sys.stdout.isatty() and not plain


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--ask", nargs="+", required=True, metavar="QUESTION",
                        help="questions; <image> stands for a picture, without it one comes first")
    parser.add_argument("--answer", nargs="+", metavar="TEXT",
                        help="an answer to draw after each question (default: none)")
    parser.add_argument("--visual-tokens", type=int, help="of a picture (default 16)")
    parser.add_argument("--masks", default=None, metavar="NAMES", help=f"of {', '.join(MASKS)}, "
                        "with commas (default: all but leaky); with --model one (default: its own)")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture; - is the terminal")
    parser.add_argument("--model", metavar="FILE", help="checkpoint whose attention to draw")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="the pictures that it is asked")
    parser.add_argument("--layer", type=int, help="from 1 (default: all, and their mean)")
    parser.add_argument("--head", type=int, help="from 1 (default: the mean)")
    args = parser.parse_args(argv)
    try:
        masks = ("causal,mma,prefix,image" if args.masks is None else args.masks).split(",")
        visual = 16 if args.visual_tokens is None else args.visual_tokens
        for name in masks:
            if name not in MASKS:
                raise ValueError(f"--masks: {name!r} is none of {', '.join(MASKS)}")
        if any(not question.strip() for question in args.ask):
            raise ValueError("--ask: a question is empty")
        if args.model is not None:
            several = args.masks is not None and len(masks) > 1
            useless = args.answer or args.visual_tokens is not None or several
            if not args.image or useless or len(args.ask) > 2 or args.out == "-":
                raise ValueError("--model needs --image, one or two questions to --ask, at most "
                                 "one of --masks, a file as --out; no --answer, --visual-tokens")
            model = NanoAKI.load(args.model)
            pictures = [open_picture(path) for path in args.image]
            sheet = draw_attention(model, pictures, args.ask, args.masks, args.layer, args.head)
        else:
            for name in ("image", "layer", "head"):
                if getattr(args, name) is not None:
                    raise ValueError(f"--{name} needs --model: the weights are those of a model")
            if not 1 <= visual <= 4096:
                raise ValueError(f"--visual-tokens must be 1 to 4096, not {visual}")
            answers = args.answer or [None]
            if len(answers) not in (1, len(args.ask)):
                raise ValueError(f"{len(answers)} answers for {len(args.ask)} questions: "
                                 f"give one, or one for each")
            answers *= len(args.ask) if len(answers) == 1 else 1
            roles, labels = word_batch(args.ask, answers, visual)
            if args.out == "-":
                width = shutil.get_terminal_size((100, 24)).columns
                print("\n\n".join(mask_text(row, names, masks, width, can_color())
                                  for row, names in zip(roles, labels)))
                return
            sheet = draw_mask(roles, labels, masks)
        sheet.save(args.out)
        print(f"{args.out}: {sheet.width} x {sheet.height} pixels")
    except (ValueError, OSError) as e:
        fail(e if isinstance(e, ValueError) else f"{args.out} cannot be written: {e.strerror or e}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    main()
