"""
See attention masks, and what a trained model does with them.

    python draw.py --ask "what color is the circle?" --answer red --out mask.png
    python draw.py --ask "<image> or <image>?" --masks causal,mma --out -      # in the terminal
    python draw.py --ask "what color is it?" "where?" --out batch.png          # a padded batch
    python draw.py --model out/shapes/model.pt --image scene.png \\
                   --ask "what is left of the red circle?" --out attention.png
    python draw.py --model out/shapes/model.pt --image scene.png \\
                   --ask "what is left of the red circle?" --out page.html     # to explore

The first three need no model: a token is a word. --out page.html works for each of them. With two
--ask, a model's also show how far each visual token's state moves from one question to the other.
"""
import os
import shutil
import sys
import unicodedata
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.attention import (CHARACTER, WORD, attention_maps, movement, split_tokens,
                              token_labels)
from engine.cells import PADDING, SEGMENTS, STATES, mask_states, runs
from engine.flags import Parser, check_asked, one_line, run_script
from engine.folder import write_whole
from engine.fonts import LINE, text
from engine.page import make_page
from engine.pictures import (GAP, THUMB, frame, join, legend, lit, lit_cells, lit_places,
                             padded)
from engine.views import View, short
from nanoaki import (ANSWER, IMAGE, MASKS, PAD, PROMPT, NanoAKI, build_sequence, fit_picture,
                     place_pictures)

# Layout, in pixels; in a terminal, in columns.
SIDE, CELL = 560, (2, 22)   # a mask's side where the cells' least and largest side allow it
BAND = 6                    # thickness of the segments' colours
LABEL = 100                 # longest label
MOST = 6                    # pictures in a row
EDGE = 18                   # columns before a mask's rows

TEXT_BEFORE = "text stands before a picture here: that alone moves its tokens"
QUERIES = "{} learned queries read a picture and have no place in it: each cell is one of them"
PARTS = "A letter outside the vocabulary is several tokens: 1/2 is the first of two."


def word_batch(questions: list[str], answers: list[str | None], visual_tokens: int,
               history=(), system: str = ""):
    """roles (B, T) and labels of questions, a WORD a token; pictures stand at <image>, or first."""
    # A word is its own id. None ends with a space, so none is taken for a visual token.
    words = SimpleNamespace(image="image ", answer="<answer>", eos="<eos>", encode=WORD.findall)
    config = SimpleNamespace(visual_tokens=visual_tokens, block_size=1 << 30)
    before, rows = [("system", system)] if system else [], []
    for given in history:
        before += zip(("human", "gpt"), given)
    for question, answer in zip(questions, cycle(answers)):  # one for each, or one for all
        turns = [*before, ("human", question)]
        written = sum(text.count("<image>") for speaker, text in turns if speaker == "human")
        turns = place_pictures(turns, max(1, written))
        rows.append(build_sequence(words, config, turns, answer))
    T = max(len(roles) for _, roles in rows)
    labels = [[word.strip() for word in row] + ["padding"] * (T - len(row)) for row, _ in rows]
    return torch.tensor([roles + [PAD] * (T - len(roles)) for _, roles in rows]), labels


def cell_side(T: int) -> int:
    return min(CELL[1], max(CELL[0], SIDE // T))


def list_labels(labels: list[str], roles: list[int]) -> list[tuple[float, str]]:
    """(middle, label) down the rows: a run of image or padding once."""
    wanted = []
    for start, stop in runs(roles):
        if roles[start] in (IMAGE, PAD) and stop - start > 1:
            wanted.append(((start + stop) / 2, f"{labels[start]} x {stop - start}"))
        else:
            wanted += [(i + 0.5, labels[i]) for i in range(start, stop)]
    return wanted


def place_labels(labels: list[str], roles: list[int], cell: int) -> list[tuple[int, str]]:
    """(y, label) of those of list_labels for which there is room."""
    fitting, free = [], 0
    for middle, label in list_labels(labels, roles):
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
    left_out = sum(len(list_labels(row, kinds)) - len(place_labels(row, kinds, cell_side(T)))
                   for row, kinds in zip(labels, roles.tolist()))
    if left_out:
        notes.append(text(f"no room for {left_out} of the labels", "gray"))
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


def map_rows(title: str, thumb: np.ndarray | None, names: list[str], rows: dict[str, Tensor],
             alone: bool = False):
    """Rows of a picture (or of cells) under light, a column a name, a scale a row, or each alone.

    thumb is the picture (THUMB, THUMB, 3), None where visual tokens have no place in it.
    """
    columns = [padded(text(name, limit=THUMB), (THUMB, LINE)) for name in names]
    lines = [text(title), join([padded(text(""), (LABEL, LINE)), *columns], gap=4)]
    shares = np.linspace(0, 1, LABEL - GAP)[None, :, None].repeat(LINE // 2, 0)
    ramp = lit(np.full((*shares.shape[:2], 3), 128.0), shares)
    for name, values in rows.items():  # (names, visual tokens)
        tops = values.amax(-1)
        scale = "each to its largest" if alone else f"0 to {float(tops.max()):.2g}"
        label = join([text(name), ramp, text(scale, "gray")], down=True, gap=3)
        line = [padded(label, (LABEL, THUMB), (0, THUMB // 2 - label.height // 2))]
        for weights, top in zip(values, tops):
            shares = weights / (top if alone else tops.max()).clamp(min=1e-30)
            shown = lit_cells(shares) if thumb is None else lit_places(thumb, shares)
            line.append(join([shown, text(f"to {top:.2g}", "gray")], down=True, gap=1))
        lines.append(join(line, gap=4))
    return join(lines, down=True, gap=4)


def fit_squares(pictures: list, config) -> list[Image.Image]:
    """Pictures as a model sees them."""
    return [Image.fromarray(fit_picture(picture, config.image_size).permute(1, 2, 0).numpy())
            for picture in pictures]


def has_text_before(roles: Tensor) -> bool:
    kinds = roles.tolist()
    return (PROMPT, IMAGE) in zip(kinds, kinds[1:])


def check_parts(config, layers: list[int] | None, head: int | None) -> None:
    """Raise ValueError where a model of that config has no such layer or head."""
    asked = [("layer", layer, config.n_layer) for layer in layers or []]
    if head is not None:
        asked.append(("head", head, config.n_head))
    for name, value, most in asked:
        if not 1 <= value <= most:
            raise ValueError(f"--{name} must be 1 to {most}, as the model has, not {value}")


def most_read(title: str, names: list[str], rows: dict[str, Tensor]):
    """title, names and rows, each (names, visual tokens), of the MOST names with most weight."""
    if len(names) <= MOST:
        return title, names, rows
    some = torch.stack(list(rows.values())).mean((0, 2)).topk(MOST).indices.sort().values
    return (f"{title} (the {MOST} of {len(names)} with the most)", [names[i] for i in some],
            {row: weights[some] for row, weights in rows.items()})


def draw_attention(model: NanoAKI, pictures: list, questions: list[str], mask: str | None = None,
                   layers: list[int] | None = None, head: int | None = None,
                   history=(), system: str = "") -> Image.Image:
    """Light on the pictures of one question, or of two and what moves between them.

    layers and head count from 1; None is the mean of all. Raises ValueError where the model has no
    such layer or head, and as NanoAKI.ask does.
    """
    c, V = model.config, model.config.visual_tokens
    check_parts(c, layers, head)

    def rows(weights: Tensor) -> dict[str, Tensor]:  # (layers, heads, names, visual tokens)
        w = weights.mean(1) if head is None else weights[:, head - 1]
        if layers is None:
            return {"mean of layers": w.mean(0)}
        return {f"layer {layer}": w[layer - 1] for layer in layers}

    sheet, text_before = [], False
    squares = [square.resize((THUMB, THUMB), Image.Resampling.BICUBIC)
               for square in fit_squares(pictures, c)]
    thumbs = [None if c.queries else np.asarray(square, np.float32) for square in squares]
    for question in questions:
        maps = attention_maps(model, pictures, question, mask, None, history, system)
        text_before = text_before or has_text_before(maps.roles)
        for square, thumb, looks, reads in zip(squares, thumbs, maps.looks.split(V, -1),
                                               maps.reads.split(V, -1)):
            sheet.append(join([square, join([text(question), text(maps.answer)], down=True)],
                              gap=GAP))
            for title, names, weights, alone in (
                    ("where each token of the answer looks", maps.tokens, looks, True),
                    ("which visual tokens read each word of the question", maps.words, reads,
                     False)):
                if not weights.any():
                    sheet.append(text("no visual token reads a word of the question"))
                    continue
                shown = most_read(title, names, rows(weights))
                sheet.append(map_rows(shown[0], thumb, *shown[1:], alone))
    if len(questions) == 2:
        moved = movement(model, pictures, questions, mask, history, system)[-1:].split(V, -1)
        sheet += [map_rows("how far each visual token's state, a vector, moves when the question "
                           "changes, in its lengths", thumb, [""], {"last layer": part})
                  for thumb, part in zip(thumbs, moved)]
        if text_before:
            sheet.append(text(TEXT_BEFORE))
    if c.queries:
        sheet.append(text(QUERIES.format(c.queries)))
    heads = "mean of all heads" if head is None else f"head {head}"
    sheet.append(text(f"attention weights under mask {mask or c.mask}, {heads}: what is read, not "
                      f"an explanation of the answer", "gray"))
    if mask not in (None, c.mask):
        sheet.append(text(f"the model was trained under {c.mask}, not under {mask}", "gray"))
    return frame(join(sheet, down=True, gap=GAP))


def page_of_model(args, masks: list[str], model: NanoAKI, history: list, system: str) -> str:
    """The page of what a model does with one question or two under each mask."""
    c, tokenizer, views, text_before, has_parts = model.config, model.tokenizer, [], False, False
    check_parts(c, args.layer, args.head)
    for question in args.ask:
        views.append([])
        for mask in masks:
            maps = attention_maps(model, args.image, question, mask, None, history, system)
            most, likeliest = maps.logits.softmax(-1).topk(min(5, c.vocab_size)), []
            for chances, ids in zip(most.values.tolist(), most.indices.tolist()):
                names = [token_labels(tokenizer, [i])[0] for i in ids]
                likeliest.append(list(zip(names, map(short, chances))))
            ids = maps.ids[:len(maps.roles)]
            views[-1].append(View(mask, maps.roles, token_labels(tokenizer, ids), maps.weights,
                                  likeliest, mask == c.mask))
            text_before = text_before or has_text_before(maps.roles)
            has_parts = has_parts or any(len(some) > 1 for some, _ in
                                         split_tokens(tokenizer, ids, CHARACTER))
    moved, notes = [], ["Attention weights are what is read, not an explanation of the answer."]
    if has_parts:
        notes.append(PARTS)
    if c.queries:
        notes.append(QUERIES.format(c.queries) + ".")
    if len(args.ask) == 2:
        moved = [movement(model, args.image, args.ask, mask, history, system)
                 for mask in masks]
        if text_before:
            notes.append(f"{TEXT_BEFORE.capitalize()}.")
    if masks != [c.mask]:
        notes.append(f"The model was trained under {c.mask}; what it does under another mask it "
                     "has not learned.")
    return make_page(args.out, views, args.ask, c.visual_tokens, c.mask,
                     f"{args.model}: {c.n_layer} layers, {c.n_head} heads, trained under {c.mask}",
                     fit_squares(args.image, c), moved, notes, args.layer, args.head,
                     placed=not c.queries)


def page_of_masks(args, masks: list[str], roles: Tensor, labels: list[list[str]]) -> str:
    """The page of masks without a model, a WORD a token; the rows of a batch in turn."""
    views = [[View(mask, row, [f" {word}" for word in words]) for mask in masks]
             for row, words in zip(roles, labels)]
    return make_page(args.out, views, args.ask, args.visual_tokens or 16, "mma",
                     "Attention masks: a word is a token.")


def pairs(texts: list[str] | None) -> list[tuple[str, str]]:
    """Questions and answers in turn, as pairs."""
    texts = texts or []
    return list(zip(texts[::2], texts[1::2]))


def check(args) -> None:
    """Raise ValueError where flags do not fit."""
    check_asked(args.ask)
    answers, questions, visual = len(args.answer or [None]), len(args.ask), args.visual_tokens
    masks = [] if args.masks is None else args.masks.split(",")
    for name in masks:
        if name not in MASKS:
            raise ValueError(f"--masks: {name!r} is none of {', '.join(MASKS)}")
    for name, values in (("masks", masks), ("layer", args.layer or [])):
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} names one twice: {', '.join(map(str, values))}")
    ending = Path(args.out).suffix.lower()
    if not (args.out == "-" or is_page(args.out)
            or Image.registered_extensions().get(ending) in Image.SAVE):
        raise ValueError(f"--out {args.out!r}: unknown file extension {ending!r}; .png is a "
                         f"picture, .html a page, - the terminal")
    if len(args.history or []) % 2:
        raise ValueError(f"--history: {len(args.history)} texts, not pairs of question and answer")
    if args.model is not None:
        several = len(masks) > 1 and not is_page(args.out)
        for is_wrong, message in (
                (args.answer, "--answer: a model gives its own"),
                (visual is not None, "--visual-tokens: a model has its own number"),
                (not args.image, "--model needs --image: what it is asked about"),
                (questions > 2, f"--ask: a model takes one or two questions, not {questions}"),
                (args.out == "-", "--out -: with --model it must be a file, .png or .html"),
                (several, f"--masks: a picture shows one of a model, not {len(masks)}; a page "
                          f"(.html) shows all")):
            if is_wrong:
                raise ValueError(message)
        return
    for name in ("image", "layer", "head"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} needs --model: the weights are those of a model")
    if visual is not None and not 1 <= visual <= 4096:
        raise ValueError(f"--visual-tokens must be 1 to 4096, not {visual}")
    if answers not in (1, questions):
        raise ValueError(f"{answers} answers for {questions} questions: give one, or one for each")


def save(path: str, what: str | Image.Image) -> None:
    """Write a page, or a picture; raises ValueError where that cannot be done."""
    try:
        if is_page(path):
            write_whole(path, what)
        else:
            what.save(path)
    except OSError as e:
        raise ValueError(f"{path} cannot be written: {e.strerror or e}") from None


def is_page(path: str) -> bool:
    return Path(path).suffix.lower() in (".html", ".htm")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ask", nargs="+", action="extend", required=True, metavar="QUESTION",
        help="questions, with --model one or two; <image> stands for a picture, without it one "
             "comes first")
    add("--answer", nargs="+", action="extend", metavar="TEXT",
        help="what stands after the question: one for all, or one for each (default: nothing; a "
             "model gives its own)")
    add("--system", metavar="TEXT", help="text that stands before all questions")
    add("--history", nargs="+", action="extend", metavar="TEXT",
        help="what was said before, questions and answers in turn: Q A [Q A ...]")
    add("--visual-tokens", type=int, help="of a picture (default 16; a model has its own)")
    add("--masks", metavar="NAMES", help=f"of {', '.join(MASKS)}, with commas (default: all but "
        "leaky; with --model its own, and on a page causal or mma beside it)")
    add("--out", required=True, metavar="FILE",
        help="picture, or page (.html); - is the terminal, without --model")
    add("--model", metavar="FILE", help="checkpoint whose attention to draw")
    add("--image", nargs="+", action="extend", metavar="FILE",
        help="the pictures that it is asked about")
    add("--layer", type=int, nargs="+", action="extend", metavar="N",
        help="only these layers, the first is 1 (default: the mean of all; on a page each, too)")
    add("--head", type=int, metavar="N",
        help="only this head, the first is 1 (default: the mean of all; on a page each, too)")
    return parser


def choose_masks(args, model: NanoAKI | None) -> list[str]:
    """The names in --masks, or which are shown without it."""
    if args.masks is not None:
        return args.masks.split(",")
    if model is None:
        return ["causal", "mma", "prefix", "image"]
    own = model.config.mask
    if is_page(args.out):
        return ["causal", "mma" if own == "causal" else own]
    return [own]


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with one_line():
        check(args)
        model = NanoAKI.load(args.model) if args.model is not None else None
        masks = choose_masks(args, model)
        history, system = pairs(args.history), args.system or ""
        if model is None:
            roles, labels = word_batch(args.ask, args.answer or [None], args.visual_tokens or 16,
                                       history, system)
        if is_page(args.out):
            if model is None:
                page = page_of_masks(args, masks, roles, labels)
            else:
                page = page_of_model(args, masks, model, history, system)
            save(args.out, page)
            print(f"{args.out}: {len(page) / 1e6:.2f} MB")
            return
        if args.out == "-":
            width = shutil.get_terminal_size((100, 24)).columns
            print("\n\n".join(mask_text(row, names, masks, width, can_color())
                              for row, names in zip(roles, labels)))
            return
        if model is None:
            sheet = draw_mask(roles, labels, masks)
        else:
            sheet = draw_attention(model, args.image, args.ask, masks[0], args.layer, args.head,
                                   history, system)
        save(args.out, sheet)
        print(f"{args.out}: {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    run_script(main)
