"""What several runs came to: means over seeds with their intervals, tables, learning curves."""
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.charts import chart
from engine.pictures import GAP, frame, join, legend, text

BASES = ("causal", "mma")  # the entries that differences are shown to
GROUPS = {"perception": ["at", "attr"], "existence": ["exist"],  # as the paper's MME, POPE,
          "spatial": ["count", "where", "rel"],                  # CV-Bench 2D
          "two steps": ["hop", "max", "sum"]}


class Result(NamedTuple):
    """What came of a seed's run."""
    scores: dict             # of its answers, as engine.evaluation's
    evaluations: list[dict]  # in training: lines of metrics.jsonl


Results = dict[str, list[Result]]  # entry -> one for each seed


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval by Student's t; the latter is nan of a single value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    # t = sqrt(df) tan(a) has the density cos(a)^(df - 1) in a: its 97.5% point, by quadrature.
    angles = (np.arange(200_000) + 0.5) / 200_000 * math.pi - math.pi / 2
    weights = np.cos(angles) ** (n - 2)
    below = np.cumsum(weights) - weights / 2
    t = math.sqrt(n - 1) * math.tan(np.interp(0.975 * weights.sum(), below, angles))
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n))


def cell(values: list[float], form: str = ".1f") -> str:
    """Mean ± half of its interval; "-" where a value is nan."""
    mean, half = interval(values)
    spread = "" if math.isnan(half) else f" ± {half:{form.lstrip('+')}}"
    return "-" if math.isnan(mean) else f"{mean:{form}}{spread}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |"
                     for line in lines)


def accuracies(some: list[Result], task: str, kind: str = "accuracy") -> list[float]:
    """In percent, nan where there is none; kind may be "blind"."""
    return [100 * result.scores[kind].get(task, math.nan) for result in some]


def difference(results: Results, entry: str, base: str, task: str) -> str:
    """Of an entry's accuracies to those of a base, seed by seed."""
    if entry == base or base not in results:
        return "-"
    own, other = accuracies(results[entry], task), accuracies(results[base], task)
    return cell(np.subtract(own, other), "+.1f")


def speeds(some: list[Result]) -> list[float]:
    """Samples per second in training."""
    return [np.median([max(line["samples_per_second"], 0.05) for line in result.evaluations])
            for result in some]


def steps_to_80(some: list[Result]) -> str:
    """Steps up to the first evaluation with 80% of the validation questions right."""
    steps = []
    for result in some:
        enough = [line["step"] for line in result.evaluations if line["accuracy"]["all"] >= 0.8]
        if not enough:
            return f">{result.evaluations[-1]['step']:,}"
        steps.append(enough[0])
    return cell(steps, ",.0f")


def table(entries: list[str], results: Results, curves: Results) -> str:
    """Markdown: a row an entry, means ± 95% intervals, differences seed by seed.

    Entries without results have diverged; curves are the results whose evaluations are theirs.
    """
    head = ["entry", "all", *(f"over {base}" for base in BASES), "blind", "training loss", "time",
            "steps to 80%"]
    rows, unit = [], speeds(results["causal"]) if "causal" in results else math.nan
    for entry in entries:
        row = ["diverged", *["-"] * (len(head) - 2)]
        if entry in results:
            own = results[entry]
            row = [cell(accuracies(own, "all")),
                   *(difference(results, entry, base, "all") for base in BASES),
                   cell(accuracies(own, "all", "blind")),
                   cell([result.evaluations[-1]["train_loss"] for result in own], ".3f"),
                   cell(np.divide(unit, speeds(own)), ".2f"),
                   steps_to_80(own) if entry in curves else "-"]
        rows.append([f"`{entry}`", *row])
    return markdown(head, rows)


def in_order(tasks) -> list[str]:
    """Tasks: those of the groups first."""
    known = [task for some in GROUPS.values() for task in some if task in tasks]
    return known + sorted(set(tasks) - {*known, "all"})


def table_by_task(results: Results) -> str:
    """Markdown: a column a task, causal's accuracy, and of other entries the differences to it."""
    tasks = in_order(results["causal"][0].scores["accuracy"])
    rows = []
    for entry in results:
        row = [difference(results, entry, "causal", task) for task in tasks]
        if entry == "causal":
            row = [cell(accuracies(results[entry], task)) for task in tasks]
        rows.append([f"`{entry}`", *row])
    return markdown(["entry", *(f"`{task}`" for task in tasks)], rows)


def learning_curve(some: list[Result], tasks: list[str]) -> dict[int, list[float]]:
    """Step -> accuracy in percent on validation questions of some tasks, by seed."""
    curve = {}
    for line in [line for result in some for line in result.evaluations]:
        asked = {task: line["questions"][task] for task in tasks if task in line["questions"]}
        if asked:
            right = sum(line["accuracy"][task] * n for task, n in asked.items())
            curve.setdefault(line["step"], []).append(100 * right / sum(asked.values()))
    return curve


def draw_curves(curves: Results, colors: dict[str, tuple], steps: int, note: str) -> Image.Image:
    """Learning curves on the validation split, a panel for all tasks and one for each group."""
    lines = [line for some in curves.values() for result in some for line in result.evaluations]
    tasks = in_order({task for line in lines for task in line["questions"]})
    groups = [("all", ["all"])]
    for title, some in GROUPS.items():
        known = [task for task in some if task in tasks]
        if known:
            groups.append((f"{title} ({', '.join(known)})", known))
    grouped = [task for _, some in groups for task in some]
    groups += [(task, [task]) for task in tasks if task not in grouped]
    panels = []
    for title, some in groups:
        found = {entry: learning_curve(of, some) for entry, of in curves.items()}
        panels.append(chart(title, found, colors, steps))
    rows = [join(panels[n:n + 3], gap=GAP) for n in range(0, len(panels), 3)]
    key = legend([(entry, colors[entry]) for entry in curves], rows[0].width)
    return frame(join([key, *rows, text(note, "gray")], down=True, gap=10))
