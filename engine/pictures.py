"""Text and charts, for all that draws: all are PIL pictures, and join makes a sheet of them."""
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Layout, in pixels.
FONT, LINE, GAP = 11, 13, 14    # size of text, distance of lines, space of parts
SAMPLE = 192                    # side of a picture with an answer to it
FINE = 3                        # a chart is drawn so much larger, then made smaller
RIGHT, WRONG = (0, 96, 0), (192, 0, 0)  # colours of answers


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


def draw_curve(draw: ImageDraw.ImageDraw, middle: list, lowest: list, highest: list, color) -> None:
    """A line with a mark at each of its points, in a band from the lowest to the highest."""
    if len(middle) > 1:
        draw.polygon(highest + lowest[::-1], (*color, 50))
        draw.line(middle, color, 2 * FINE, "curve")
    for point in middle:
        draw.circle(point, 2 * FINE, color)


def chart(title: str, curves: dict[str, dict[int, list[float]]], colors: dict[str, tuple],
          last: int) -> Image.Image:
    """Percent over steps, one curve per name: the mean of its values, and a band of all of them."""
    wide, high, left, under, above, beside = 330, 220, 32, 18, 18, 12  # its size and its margins

    def at(step: float, percent: float) -> tuple[float, float]:
        return (left + step / last * (wide - left - beside),
                high - under - percent / 100 * (high - under - above))

    def finely(step: float, percent: float) -> tuple[float, float]:
        x, y = at(step, percent)
        return FINE * x, FINE * y

    image = Image.new("RGB", (FINE * wide, FINE * high), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    for percent in range(0, 101, 25):
        draw.line([finely(0, percent), finely(last, percent)], (225, 225, 225), FINE)
    for name, points in curves.items():
        middle = [finely(step, np.mean(values)) for step, values in points.items()]
        lowest = [finely(step, min(values)) for step, values in points.items()]
        highest = [finely(step, max(values)) for step, values in points.items()]
        draw_curve(draw, middle, lowest, highest, colors[name])
    image = image.resize((wide, high), Image.Resampling.LANCZOS)
    image.paste(text(title), (left, 0))
    for percent in range(0, 101, 25):
        label, (_, y) = text(str(percent), "gray"), at(0, percent)
        image.paste(label, (left - 4 - label.width, round(y - label.height / 2)))
    for step in (0, last // 2, last):
        label, (x, _) = text(f"{step:,}", "gray"), at(step, 0)
        x = min(wide - label.width, round(x - label.width / 2))
        image.paste(label, (x, high - label.height))
    return image


def draw_card(picture: Image.Image | None, question: str, right: str, answer: str) -> Image.Image:
    """A question with its picture and both answers; the picture is framed if they differ."""
    wrong = answer != right.strip()
    square = Image.new("RGB", (SAMPLE, SAMPLE), "white")
    if picture is not None:
        square = picture.resize(square.size, Image.Resampling.NEAREST)
    if wrong:
        ImageDraw.Draw(square).rectangle((0, 0, SAMPLE - 1, SAMPLE - 1), None, WRONG, 4)
    first, second = (textwrap.wrap(question, 34) + ["", ""])[:2]
    lines = [text(line, limit=SAMPLE) for line in (first, second, f"right: {right}")]
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
