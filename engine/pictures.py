"""Parts of pictures, for all that draws: all are PIL pictures, and join makes a sheet of them."""
import math
import textwrap
from unicodedata import east_asian_width

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from engine.fonts import LINE, text

# Layout, in pixels.
GAP = 14                        # space of parts
SAMPLE = 192                    # side of a picture with an answer to it
THUMB = 132                     # side of a picture under a light
SHADE = np.array((8, 10, 14)), 0.6      # over what has no weight: a colour, how much it covers
GLOW = np.array((255, 220, 120)), 0.25  # over what has most
RIGHT, WRONG = (0, 96, 0), (192, 0, 0)  # colours of answers


def join(parts: list[Image.Image], down: bool = False, gap: int = 0,
         end: bool = False) -> Image.Image:
    """Pictures side by side, or one below the other; aligned at their start, or at their end."""
    along, across = (1, 0) if down else (0, 1)
    size = [0, 0]
    size[along] = sum(part.size[along] for part in parts) + gap * max(0, len(parts) - 1)
    size[across] = max((part.size[across] for part in parts), default=1)
    sheet = Image.new("RGB", tuple(size), "white")
    at = [0, 0]
    for part in parts:
        if end:
            at[across] = size[across] - part.size[across]
        sheet.paste(part, tuple(at))
        at[along] += part.size[along] + gap
    return sheet


def padded(image: Image.Image, size: tuple[int, int], at: tuple[int, int] = (0, 0)) -> Image.Image:
    """A picture on white of a given size."""
    sheet = Image.new("RGB", size, "white")
    sheet.paste(image, at)
    return sheet


def frame(image: Image.Image) -> Image.Image:
    """A picture with a white margin."""
    return padded(image, (image.width + 2 * GAP, image.height + 2 * GAP), (GAP, GAP))


def swatch(color) -> Image.Image:
    """A small square of a colour."""
    sheet = Image.new("RGB", (LINE, LINE), "white")
    ImageDraw.Draw(sheet).rectangle((0, 1, LINE - 4, LINE - 3), color, "gray")
    return sheet


def legend(entries: list[tuple[str, tuple]], room: int) -> Image.Image:
    """Swatches with their names, in as many lines as they need."""
    lines, used = [[]], 0
    for name, color in entries:
        entry = join([swatch(color), text(name)])
        if lines[-1] and used + entry.width > room:
            lines.append([])
            used = 0
        lines[-1].append(entry)
        used += entry.width + GAP
    return join([join(line, gap=GAP) for line in lines], down=True, gap=2)


def lit(square: np.ndarray, share: np.ndarray) -> Image.Image:
    """A picture (H, W, 3) under a light: shares (H, W, 1) of the largest weight, from 0 to 1."""
    dim, bright = (square * (1 - cover) + color * cover for color, cover in (SHADE, GLOW))
    return Image.fromarray((dim * (1 - share) + bright * share).astype(np.uint8))


def lit_cells(shares: Tensor) -> Image.Image:
    """Cells under a light, in rows, of visual tokens that have no place in a picture."""
    columns = math.isqrt(len(shares) - 1) + 1
    side, sheet = max(2, THUMB // columns), Image.new("RGB", (THUMB, THUMB), "white")
    for n, share in enumerate(shares.tolist()):
        row, column = divmod(n, columns)
        sheet.paste(lit(np.full((side - 1, side - 1, 3), 128.0), np.array(share)),
                    (column * side, row * side))
    return sheet


def lit_places(thumb: np.ndarray, shares: Tensor) -> Image.Image:
    """A picture under a light at the places of its visual tokens."""
    side = int(len(shares) ** 0.5)
    light = Image.fromarray(shares.view(side, side).numpy())
    light = light.resize((THUMB, THUMB), Image.Resampling.NEAREST)
    return lit(thumb, np.asarray(light)[..., None])


def draw_card(picture: Image.Image | None, question: str, right: str, answer: str) -> Image.Image:
    """A question with its picture and both answers; the picture is framed if they differ."""
    wrong = answer != right.strip()
    square = Image.new("RGB", (SAMPLE, SAMPLE), "white")
    if picture is not None:
        square = picture.resize(square.size, Image.Resampling.NEAREST)
    if wrong:
        ImageDraw.Draw(square).rectangle((0, 0, SAMPLE - 1, SAMPLE - 1), None, WRONG, 4)
    columns = [c + "\0" if east_asian_width(c) in "WF" else c for c in question]  # these have two
    first, second = (textwrap.wrap("".join(columns), 34) + ["", ""])[:2]
    lines = [text(line.replace("\0", ""), limit=SAMPLE)
             for line in (first, second, f"right: {right}")]
    lines.append(text(f"model: {answer}", WRONG if wrong else RIGHT, SAMPLE))
    return join([square, *lines], down=True, gap=2)


def draw_samples(asked: list[tuple[Image.Image | None, str, str, str]]) -> Image.Image:
    """Answered questions with their pictures, four in a row; what is wrong is framed.

    Each is (square picture or None, question, right answer, model's answer), so that whoever has
    these can draw them, whatever they were read from.
    """
    cards = [draw_card(*one) for one in asked]
    rows = [join(cards[n:n + 4], gap=GAP) for n in range(0, len(cards), 4)]
    return frame(join(rows, down=True, gap=GAP))
