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
import re
import shutil
import sys
import unicodedata
from collections import namedtuple
from itertools import cycle
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.flags import Parser, fail, run_script
from engine.fonts import LINE, text
from engine.pictures import GAP, frame, join, legend, padded
from nanoaki import (ANSWER, IMAGE, MASKS, PAD, PROMPT, NanoAKI, Tokenizer, build_sequence,
                     fit_picture, make_mask, place_pictures)

# What a cell of a mask can be: colours differ in lightness too (in L*: 98, 82, 70, 54, 24).
BLOCKED, PADDING, SEEN, UNLOCKED, DIAGONAL = range(5)
State = namedtuple("State", "name color sign block ansi")  # in ASCII, or a block and its colour
STATES = {
    BLOCKED: State("blocked", (249, 249, 249), ".", "· ", "90"),
    PADDING: State("padding", (203, 203, 203), "-", "░░", "90"),
    SEEN: State("seen causally", (86, 180, 233), "x", "▒▒", "36"),
    UNLOCKED: State("unlocked by the mask", (213, 94, 0), "o", "██", "33"),
    DIAGONAL: State("itself", (0, 56, 104), "*", "▓▓", "34")}
SEGMENTS = {PAD: ("padding", (203, 203, 203)), IMAGE: ("image", (0, 158, 115)),
            PROMPT: ("prompt", (204, 121, 167)), ANSWER: ("answer", (230, 200, 30))}

# Layout, in pixels; in a terminal, in columns.
SIDE, CELL = 560, (2, 22)   # a mask's side where the cells' least and largest side allow it
BAND = 6                    # thickness of the segments' colours
LABEL, THUMB = 100, 120     # longest label, side of a picture under a heat map
HOT = (255, 214, 40)        # the largest weight; at 0 the picture is dark and of little contrast
MOST = 12                   # heat maps in a row
EDGE = 18                   # columns before a mask's rows

# Chinese and Japanese have no spaces: a character, with the marks that follow it, is a word.
CJK = r"\u3001-\u312f\u31a0-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff"
WORD = re.compile(rf"\s*(?:[{CJK}][\u3099\u309a\ufe00-\ufe0f]*|[^\s{CJK}]+)")


def mask_states(name: str, roles: Tensor) -> tuple[Tensor, str]:
    """Which state each cell of a mask has, int64 (T, T), for roles (T,); and the mask's title."""
    mask = make_mask(name, roles[None])[0]
    past = torch.ones_like(mask).tril()
    states = torch.where(mask, torch.where(past, SEEN, UNLOCKED), BLOCKED).fill_diagonal_(DIAGONAL)
    states = states.masked_fill((roles == PAD)[:, None] | (roles == PAD), PADDING)
    return states, f"{name}: {int((states == UNLOCKED).sum()):,} pairs unlocked"


def runs(roles: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of equal roles."""
    cuts = [0] + [i for i in range(1, len(roles)) if roles[i] != roles[i - 1]] + [len(roles)]
    return list(zip(cuts, cuts[1:]))


def word_batch(questions: list[str], answers: list[str | None], visual_tokens: int):
    """roles (B, T) and labels of questions, a WORD a token; pictures stand at <image>, or first."""
    # A word is its own id. None ends with a space, so none is taken for a visual token.
    words = SimpleNamespace(image="image ", answer="<answer>", eos="<eos>", encode=WORD.findall)
    config = SimpleNamespace(visual_tokens=visual_tokens, block_size=1 << 30)
    rows = []
    for question, answer in zip(questions, cycle(answers)):  # one for each, or one for all
        turns = place_pictures([("human", question)], max(1, question.count("<image>")))
        rows.append(build_sequence(words, config, turns, answer))
    T = max(len(roles) for _, roles in rows)
    labels = [[word.strip() for word in row] + ["padding"] * (T - len(row)) for row, _ in rows]
    return torch.tensor([roles + [PAD] * (T - len(roles)) for _, roles in rows]), labels


def cell_side(T: int) -> int:
    return min(CELL[1], max(CELL[0], SIDE // T))


def place_labels(labels: list[str], roles: list[int], cell: int) -> list[tuple[int, str]]:
    """(y, label) down the rows: a run of image or padding once, others where there is room."""
    wanted, fitting, free = [], [], 0
    for start, stop in runs(roles):
        if roles[start] in (IMAGE, PAD) and stop - start > 1:
            wanted.append(((start + stop) / 2, f"{labels[start]} x {stop - start}"))
        else:
            wanted += [(i + 0.5, labels[i]) for i in range(start, stop)]
    for middle, label in wanted:
        y = max(0, min(round(middle * cell - LINE / 2), len(roles) * cell - LINE))
        if y >= free:
            fitting.append((y, label))
            free = y + LINE
    return fitting


def label_strip(labels: list[str], roles: list[int], cell: int, end: bool) -> Image.Image:
    """The labels beside the rows of a mask, aligned at their end or start."""
    words = [(y, text(label, limit=LABEL)) for y, label in place_labels(labels, roles, cell)]
    wide = LABEL if end else max(word.width for _, word in words)  # rows of a batch stand in line
    strip = Image.new("RGB", (wide, len(roles) * cell), "white")
    for y, word in words:
        strip.paste(word, (wide - word.width if end else 0, y))
    return strip


def mask_grid(states: Tensor, cell: int) -> Image.Image:
    """The cells of a mask, cell x cell pixels each, parted by a line where there is room for it."""
    colors = np.array([STATES[state].color for state in range(5)], np.uint8)
    grid = colors[states.numpy()].repeat(cell, 0).repeat(cell, 1)
    if cell > 5:
        grid[::cell] = grid[:, ::cell] = 225
    return Image.fromarray(grid)


def draw_sequence(roles: Tensor, labels: list[str], masks: list[str], cell: int) -> Image.Image:
    """The masks of one sequence side by side: labels before the first, and above each."""
    kinds = roles.tolist()
    rows = label_strip(labels, kinds, cell, end=True)
    columns = label_strip(labels, kinds, cell, end=False).transpose(Image.Transpose.ROTATE_90)
    band = np.array([SEGMENTS[kind][1] for kind in kinds], np.uint8).repeat(cell, 0)[:, None]
    band = Image.fromarray(band.repeat(BAND, 1))
    panels = [join([rows, band], gap=2)]
    for name in masks:
        states, title = mask_states(name, roles)
        panels.append(join([text(title), columns, band.transpose(Image.Transpose.TRANSPOSE),
                            mask_grid(states, cell)], down=True, gap=2))
    return join(panels, gap=GAP, end=True)


def draw_mask(roles: Tensor, labels: list, masks: list[str]) -> Image.Image:
    """Attention masks as grids of query rows and key columns, side by side on one scale.

    roles int64 (T,), or (B, T) for a batch whose rows stand one below the other; labels: T strings,
    or B lists of them; masks: names in MASKS. Raises ValueError on other names and lengths.
    """
    if roles.dim() == 1:
        roles, labels = roles[None], [labels]
    B, T = roles.shape
    if [len(row) for row in labels] != [T] * B:
        raise ValueError(f"labels must be {B} lists of {T}")
    sheet = [draw_sequence(roles[b], labels[b], masks, cell_side(T)) for b in range(B)]
    room = max(part.width for part in sheet)
    states = [STATES[state][:2] for state in STATES if state != PADDING or (roles == PAD).any()]
    segments = [SEGMENTS[kind] for kind in (IMAGE, PROMPT, ANSWER) if (roles == kind).any()]
    notes = [text("rows: queries; columns: keys", "gray"),
             legend(states, room), legend(segments, room)]
    return frame(join([*sheet, join(notes, down=True, gap=2)], down=True, gap=GAP))


def choose_shown(roles: list[int], most: int) -> list[int]:
    """At most so many positions, if so few will do: long runs are cut, the images' first."""
    T = len(roles)
    for image, other in [(n, T) for n in range(T, 0, -1)] + [(1, n) for n in range(T, 0, -1)]:
        shown = []
        for start, stop in runs(roles):
            longest = image if roles[start] == IMAGE else other
            shown += [*range(start, min(start + longest, stop) - 1), stop - 1]
        if len(shown) <= most:
            break
    return shown


def columns_of(string: str) -> int:
    """The columns of a terminal that a string takes: East Asian and emoji two, marks none."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in string
               if unicodedata.category(c) not in ("Mn", "Me", "Cf"))


def mask_text(roles: Tensor, labels: list[str], masks: list[str], width: int, fancy: bool) -> str:
    """draw_mask for a terminal, of roles (T,): ASCII, or blocks and colours.

    Long runs are cut, before their last token, to what fits in width columns: the images' first.
    Raises ValueError where nothing fits.
    """
    cells, side = [state.sign for state in STATES.values()], 1
    if fancy:
        cells, side = [f"\033[{s.ansi}m{s.block}\033[0m" for s in STATES.values()], 2
    T, kinds, most = len(roles), roles.tolist(), (width - EDGE) // side
    shown = choose_shown(kinds, most)
    if len(shown) > most:
        raise ValueError(f"{width} columns are too few for a mask of {T} tokens: choose a file")
    lines = [f"{cells[state]} {STATES[state].name}" for state in STATES
             if state != PADDING or PAD in kinds]
    cut = {b for a, b in zip(shown, shown[1:]) if b > a + 1}
    if cut:
        lines.append("~ some left out before")
    letters = ["~" if k in cut else "-IPA"[kinds[k]] for k in shown]
    for name in masks:
        states, title = mask_states(name, roles)
        lines += ["", title, " " * EDGE + "".join(letter.ljust(side) for letter in letters)]
        for q in shown:
            label = ("~ " if q in cut else "") + " ".join(labels[q].split())
            while columns_of(label) > EDGE - 2:
                label = label[:-1]
            lines.append(" " * (EDGE - 1 - columns_of(label)) + label + " "
                         + "".join(cells[state] for state in states[q, shown].tolist()))
    return "\n".join(lines)


def can_color() -> bool:
    """Whether standard output is a terminal that shows blocks and colours, and nobody minds."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and sys.stdout.encoding.lower().startswith("utf") and not plain


class Recorder(TorchFunctionMode):
    """Within, masked attention is computed openly, and its weights are kept, call by call.

    torch hands every call of a function of its own to this mode, so that the model need not know.
    """

    def __init__(self):
        super().__init__()
        self.weights = []  # of each call (B, heads, queries, keys), float32

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention or args[3] is None:  # the ViT has no mask
            return function(*args, **(kwargs or {}))
        q, k, v, mask = args
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
        self.weights.append(scores.float().softmax(-1))
        return self.weights[-1].to(v.dtype) @ v


class Attention(NamedTuple):
    answer: str
    words: list[str]  # of the question, <answer> last
    tokens: list[str]  # of the answer, joined to characters; <eos> where the model has ended
    looks: Tensor     # (layers, heads, tokens, visual tokens): what each was predicted from; mean
    reads: Tensor     # (layers, heads, words, visual tokens): how much each visual token reads it
    weights: Tensor   # (layers, heads, T, T), all of them: rows are queries, columns keys
    roles: Tensor     # (T,)


def split_tokens(tokenizer: Tokenizer, ids: list[int], pattern, start: int = 0):
    """(positions, text) of tokens: parts, each from where a find of the pattern begins a token."""
    pieces = [tokenizer.bytes[i] if i < len(tokenizer) else b"" for i in ids]
    whole = b"".join(pieces).decode("utf-8", "surrogateescape")
    begins = {len(whole[:found.start()].encode("utf-8", "surrogateescape"))
              for found in re.finditer(pattern, whole)}
    parts, at = [], 0
    for i, piece in enumerate(pieces, start):
        if at in begins or not parts:
            parts.append(([], b""))
        parts[-1] = parts[-1][0] + [i], parts[-1][1] + piece
        at += len(piece)
    return [(some, part.decode("utf-8", "backslashreplace").strip()) for some, part in parts]


def prompt_words(tokenizer: Tokenizer, ids: list[int], roles: list[int]):
    """(positions, text) of each WORD of a prompt; a picture parts words, and <answer> is one."""
    words = [word for start, stop in runs(roles[:-1]) if roles[start] == PROMPT
             for word in split_tokens(tokenizer, ids[start:stop], WORD, start)]
    return words + [([len(ids) - 1], "<answer>")]


def attention_maps(model: NanoAKI, pictures: list, question: str,
                   mask: str | None = None, max_new_tokens: int | None = None) -> Attention:
    """The attention weights of a forward over a question about pictures and its greedy answer.

    Generation has the same, but computes of the last block only what it needs. The last generated
    token is never attended from. Raises ValueError as NanoAKI.ask does.
    """
    limit = model.config.block_size if max_new_tokens is None else max_new_tokens
    if limit < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {limit}")
    training, (images, tokens, roles) = model.training, model.prompt([pictures], [question])
    (ids,), start = model.generate(images, tokens, roles, limit, mask=mask), tokens.shape[1]
    ended = len(ids) < min(limit, model.config.block_size - start)
    read = torch.tensor([ids if ended else ids[:-1]], dtype=torch.int64, device=tokens.device)
    roles = F.pad(roles, (0, read.shape[1]), value=ANSWER)  # the answer begins at start
    model.eval()
    with Recorder() as recorder, torch.no_grad():
        model.hidden(images, torch.cat([tokens, read], 1), roles, mask)
    model.train(training)
    weights, roles = torch.cat(recorder.weights).cpu(), roles[0].cpu()
    visual = roles == IMAGE
    words = prompt_words(model.tokenizer, tokens[0].tolist(), roles.tolist()[:start])
    reads = torch.stack([weights[..., visual, :][..., some].sum(-1) for some, _ in words], 2)
    pieces = split_tokens(model.tokenizer, ids, r"(?s).|\Z")  # by characters; the end has no text
    if ended:
        pieces.append(([len(ids)], "<eos>"))
    looks = weights[:, :, start - 1:][..., visual]          # the row before a token predicts it
    looks = torch.stack([looks[:, :, some].mean(2) for some, _ in pieces], 2)
    return Attention(model.tokenizer.decode(ids), [word for _, word in words],
                     [piece for _, piece in pieces], looks, reads, weights, roles)


@torch.no_grad()
def movement(model: NanoAKI, pictures: list, questions: list[str],
             mask: str | None = None) -> Tensor:
    """How far each visual token's last state moves from one of two questions to the other.

    float32 (visual tokens of all pictures,): the distance of the two states in a padded batch, as a
    share of their mean length. Raises ValueError as NanoAKI.ask does.
    """
    training, (images, tokens, roles) = model.training, model.prompt([pictures] * 2, questions)
    x = model.eval().hidden(images, tokens, roles, mask).float()
    model.train(training)
    a, b = x[0, roles[0] == IMAGE], x[1, roles[1] == IMAGE]
    return ((a - b).norm(dim=-1) / ((a.norm(dim=-1) + b.norm(dim=-1)) / 2)).cpu()


def heat(dark, share: np.ndarray) -> Image.Image:
    """Between dark, a grey, and HOT: shares (H, W, 1) of the largest weight, from 0 to 1."""
    return Image.fromarray((dark * (1 - share) + share * np.array(HOT)).astype(np.uint8))


def map_rows(title: str, square: Image.Image, names: list[str], rows: dict[str, Tensor]):
    """Rows of heat maps over a picture, one column per name, each row with a scale of its own."""
    if len(names) > MOST:
        title += f" (the first {MOST} of {len(names)})"
    columns = [padded(text(name, limit=THUMB), (THUMB, LINE)) for name in names[:MOST]]
    lines = [text(title), join([padded(text(""), (LABEL, LINE)), *columns], gap=4)]
    dark = np.asarray(square.convert("L").resize((THUMB, THUMB)), np.float32)[..., None] * 0.2 + 25
    ramp = heat(50, np.linspace(0, 1, LABEL - GAP)[None, :, None].repeat(LINE // 2, 0))
    for name, values in rows.items():  # (names, visual tokens)
        top, side = float(values.max()), int(values.shape[-1] ** 0.5)
        scale = join([text(name), ramp, text(f"0 to {top:.3g}", "gray")], down=True, gap=3)
        line = [padded(scale, (LABEL, THUMB), (0, THUMB // 2 - scale.height // 2))]
        for shares in (values[:MOST] / (top or 1)).reshape(-1, side, side).numpy():
            share = Image.fromarray(shares).resize((THUMB, THUMB), Image.Resampling.NEAREST)
            line.append(heat(dark, np.asarray(share)[..., None]))
        lines.append(join(line, gap=4))
    return join(lines, down=True, gap=4)


def draw_attention(model: NanoAKI, pictures: list, questions: list[str],
                   mask: str | None = None, layer: int | None = None, head: int | None = None):
    """Heat maps over the pictures of one question, or of two and what moves between them.

    layer and head count from 1; None is all layers and their mean, and the mean of all heads.
    Raises ValueError where the model has no such layer or head, and as NanoAKI.ask does.
    """
    c, V = model.config, model.config.visual_tokens
    for name, value, most in (("layer", layer, c.n_layer), ("head", head, c.n_head)):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, as the model has, not {value}")

    def rows(weights: Tensor) -> dict[str, Tensor]:  # (layers, heads, names, visual tokens)
        w = weights.mean(1) if head is None else weights[:, head - 1]
        every = {"mean of layers": w.mean(0)} | {f"layer {i + 1}": w[i] for i in range(len(w))}
        return every if layer is None else {f"layer {layer}": w[layer - 1]}

    squares = [Image.fromarray(fit_picture(p, c.image_size).permute(1, 2, 0).numpy())
               for p in pictures]
    sheet, text_before = [], False
    for question in questions:
        maps = attention_maps(model, pictures, question, mask)
        kinds = maps.roles.tolist()
        text_before = text_before or (PROMPT, IMAGE) in zip(kinds, kinds[1:])
        for square, looks, reads in zip(squares, maps.looks.split(V, -1), maps.reads.split(V, -1)):
            thumb = square.resize((THUMB, THUMB), Image.Resampling.NEAREST)
            sheet += [join([thumb, join([text(question), text(maps.answer)], down=True)], gap=GAP),
                      map_rows("where each token of the answer looks", square, maps.tokens,
                               rows(looks)),
                      map_rows("which visual tokens read each word of the question", square,
                               maps.words, rows(reads))]
    if len(questions) == 2:
        moved = movement(model, pictures, questions, mask)[None].split(V, -1)
        sheet += [map_rows("how far visual tokens move from one question to the other, in lengths "
                           "of their state", square, [""], {"last state": part})
                  for square, part in zip(squares, moved)]
        if text_before:
            sheet.append(text("text stands before a picture here: that alone moves its tokens"))
    heads = "mean of all heads" if head is None else f"head {head}"
    sheet.append(text(f"attention weights under mask {mask or c.mask}, {heads}: what is read, not "
                      f"an explanation of the answer", "gray"))
    return frame(join(sheet, down=True, gap=GAP))


def check(args, masks: list[str]) -> None:
    """Raise ValueError where flags do not fit."""
    answers, questions, visual = len(args.answer or [None]), len(args.ask), args.visual_tokens
    for name in masks:
        if name not in MASKS:
            raise ValueError(f"--masks: {name!r} is none of {', '.join(MASKS)}")
    if args.model is not None:
        useless = args.answer or visual is not None or args.masks and len(masks) > 1
        if not args.image or useless or questions > 2 or args.out == "-":
            raise ValueError("--model needs --image, one or two questions to --ask, at most one of "
                             "--masks, a file as --out; no --answer, --visual-tokens")
        return
    for name in ("image", "layer", "head"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} needs --model: the weights are those of a model")
    if visual is not None and not 1 <= visual <= 4096:
        raise ValueError(f"--visual-tokens must be 1 to 4096, not {visual}")
    if answers not in (1, questions):
        raise ValueError(f"{answers} answers for {questions} questions: give one, or one for each")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ask", nargs="+", required=True, metavar="QUESTION",
        help="questions; <image> stands for a picture, without it one comes first")
    add("--answer", nargs="+", metavar="TEXT", help="an answer after each question (default: none)")
    add("--visual-tokens", type=int, help="of a picture (default 16)")
    add("--masks", metavar="NAMES", help=f"of {', '.join(MASKS)}, with commas (default: all but "
        "leaky); with --model one (default: its own)")
    add("--out", required=True, metavar="FILE", help="picture; - is the terminal")
    add("--model", metavar="FILE", help="checkpoint whose attention to draw")
    add("--image", nargs="+", metavar="FILE", help="the pictures that it is asked")
    add("--layer", type=int, help="from 1 (default: all, and their mean)")
    add("--head", type=int, help="from 1 (default: the mean)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    masks = ("causal,mma,prefix,image" if args.masks is None else args.masks).split(",")
    try:
        check(args, masks)
        if args.model is not None:
            sheet = draw_attention(NanoAKI.load(args.model), args.image, args.ask, args.masks,
                                   args.layer, args.head)
        else:
            roles, labels = word_batch(args.ask, args.answer or [None], args.visual_tokens or 16)
            if args.out == "-":
                width = shutil.get_terminal_size((100, 24)).columns
                print("\n\n".join(mask_text(row, names, masks, width, can_color())
                                  for row, names in zip(roles, labels)))
                return
            sheet = draw_mask(roles, labels, masks)
        sheet.save(args.out)
        print(f"{args.out}: {sheet.width} x {sheet.height} pixels")
    except ValueError as e:
        fail(e)
    except OSError as e:
        fail(f"{args.out} cannot be written: {e.strerror or e}")


if __name__ == "__main__":
    run_script(main)
