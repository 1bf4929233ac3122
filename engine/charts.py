"""Charts: curves over steps, those of one run (curves.png), and the panel that all are made of."""
import math

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from engine.pictures import GAP, frame, join, legend, text

FINE = 3                        # a chart is drawn so much larger, then made smaller
STAGES = ("align", "instruct")
PERCENT = (0, 25, 50, 75, 100)
LIGHTNESS = (33, 51, 69)        # of tasks' colours in turn: 20 hues alone are too much alike
GRAY, RED, BLUE, ORANGE = (150, 150, 150), (230, 0, 0), (0, 114, 178), (213, 94, 0)


def draw_curve(draw: ImageDraw.ImageDraw, middle: list, lowest: list, highest: list, color) -> None:
    """A line with a mark at each of its points, in a band from the lowest to the highest."""
    if len(middle) > 1:
        draw.polygon(highest + lowest[::-1], (*color, 50))
        draw.line(middle, color, 2 * FINE, "curve")
    for point in middle:
        draw.circle(point, 2 * FINE, color)


def chart(title: str, curves: dict[str, dict[int, list[float]]], colors: dict[str, tuple],
          last: int, ticks: tuple = PERCENT, marks: dict[int, tuple] | None = None) -> Image.Image:
    """Values over steps, one curve per name: the mean of its values, and a band of all of them.

    Values reach from 0 to the last of ticks; marks are steps with a vertical line of a colour.
    """
    labels = [text(f"{tick:g}", "gray") for tick in ticks]
    left = max(32, *(label.width + 5 for label in labels))
    wide, high, under, above, beside = 330, 220, 18, 18, 12  # its size and its other margins

    def at(step: float, value: float) -> tuple[float, float]:
        return (left + step / last * (wide - left - beside),
                high - under - value / ticks[-1] * (high - under - above))

    def finely(step: float, value: float) -> tuple[float, float]:
        x, y = at(step, value)
        return FINE * x, FINE * y

    image = Image.new("RGB", (FINE * wide, FINE * high), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    for tick in ticks:
        draw.line([finely(0, tick), finely(last, tick)], (225, 225, 225), FINE)
    for step, color in (marks or {}).items():
        draw.line([finely(step, 0), finely(step, ticks[-1])], color, FINE)
    for name, points in curves.items():
        middle = [finely(step, np.mean(values)) for step, values in points.items()]
        lowest = [finely(step, min(values)) for step, values in points.items()]
        highest = [finely(step, max(values)) for step, values in points.items()]
        draw_curve(draw, middle, lowest, highest, colors[name])
    image = image.resize((wide, high), Image.Resampling.LANCZOS)
    image.paste(text(title), (left, 0))
    for tick, label in zip(ticks, labels):
        _, y = at(0, tick)
        image.paste(label, (left - 4 - label.width, round(y - label.height / 2)))
    for step in (0, last // 2, last):
        label, (x, _) = text(f"{step:,}", "gray"), at(step, 0)
        x = min(wide - label.width, round(x - label.width / 2))
        image.paste(label, (x, high - label.height))
    return image


def scale(values: list[float]) -> tuple:
    """Five ticks, from 0 to the greatest of the values or a little more."""
    greatest = max(values, default=0) or 1
    power = 10.0 ** math.floor(math.log10(greatest))
    for part in (0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 2.5):
        if 4 * part * power >= greatest:
            break
    return tuple(n * part * power for n in range(5))


def values_of(lines: list[dict], start: int, kind: str, task: str) -> dict[int, list[float]]:
    """Step -> value, of lines of a stage that begins at a step; finite numbers only."""
    found = {}
    for line in lines:
        value = line.get(kind, math.nan)  # a line of a divergence has none
        if isinstance(value, dict):
            value = 100 * value.get(task, math.nan)
        if math.isfinite(value):
            found[start + line["step"]] = [value]
    return found


def draw_panel(title: str, series: dict[str, tuple], lines: list[dict], steps: dict[str, int],
               ticks: tuple = ()) -> Image.Image:
    """A chart of a run with its legend; series are by name: kind of value, its task, its colour."""
    curves, colors, marks, start = {}, {}, {}, 0
    for stage, count in steps.items():
        own = [line for line in lines if line["stage"] == stage]
        marks[start] = GRAY
        marks |= {start + line["step"]: RED for line in own if "diverged" in line}
        for name, (kind, task, color) in series.items():
            curve = f"{stage} {name}"  # stages have other data: no line joins them
            curves[curve], colors[curve] = values_of(own, start, kind, task), color
        start += count
    if not ticks:
        ticks = scale([value for points in curves.values() for (value,) in points.values()])
    image = chart(title, curves, colors, max(1, start), ticks, marks)
    key = [(name[:40], color) for name, (_, _, color) in series.items()
           if any(curves[f"{stage} {name}"] for stage in steps)]
    return join([image, legend(key, image.width)], down=True, gap=8)


def draw_run(lines: list[dict], steps: dict[str, int] | None = None) -> Image.Image:
    """A run's losses and its accuracies by task, its stages one after the other.

    lines are those of its metrics.jsonl; steps is how many each stage is to have, by name and in
    order (None: as many as they have had). The final report, which is no stage, is left out.
    """
    if steps is None:
        steps = {line["stage"]: line["step"] for line in lines if line["stage"] in STAGES}
    lines = [line for line in lines if line["stage"] in steps]
    losses = {"training": ("train_loss", "", BLUE), "held-out": ("val_loss", "", ORANGE)}
    tasks = sorted({task for line in lines for task in line.get("accuracy", {})} - {"all"})
    shares = {}
    for n, task in enumerate(tasks):
        hue, lightness = 360 * n / len(tasks), LIGHTNESS[n % len(LIGHTNESS)]
        shares[task] = "accuracy", task, ImageColor.getrgb(f"hsl({hue:.0f}, 70%, {lightness}%)")
    shares |= {"all, blind": ("blind", "all", GRAY), "all": ("accuracy", "all", (0, 0, 0))}
    panels = [draw_panel("loss (nats)", losses, lines, steps),
              draw_panel("accuracy (%)", shares, lines, steps, PERCENT)]
    note = ", then ".join(f"{stage} ({count:,})" for stage, count in steps.items())
    if any("diverged" in line for line in lines):
        note += "; red: diverged"
    note = text(f"over steps: {note}", "gray")
    return frame(join([join(panels, gap=2 * GAP), note], down=True, gap=10))
