"""
Train every mask on equal terms: the same weights to begin with, data, order and steps.

    python compare.py --masks causal,dot,image,prefix,mma --seeds 3
    python compare.py --masks causal,mma --seeds 1 --steps 600 --lr 0.0035    # a first look
    python compare.py --resume                                                # go on after Ctrl-C

For every seed stage 1 is trained once, then stage 2 from its weights for each entry: a mask, or
dot, the paper's dual-order baseline, or mma@eval, the weights of causal tested under MMA.
"""
import argparse
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from data.llava import Batch, Examples, leave_group, loader
from draw import frame, join, legend, text
from nanoaki import IMAGE, MASKS, Config, Tokenizer, load_file
from train import (Run, Settings, answer_all, blind_score, choose_device, fail, flag, good,
                   in_bfloat16, keep_freed_memory, make_parser, prepare, score, settle)

# An entry: the mask that it is trained with, and the one that it is tested with.
ENTRIES = {name: (name, name) for name in MASKS}
ENTRIES |= {"dot": ("causal", "causal"), "mma@eval": ("causal", "mma")}
NOTES = {
    "dot": "causal, with the prompt before the picture in every other batch, tested with the "
           "picture first; stage 1 is shared, where the paper's doubles both stages",
    "mma@eval": "the weights of causal, tested under MMA (arXiv 2505.18605)",
    "leaky": "a lesson, no method: pictures see the answer, so its loss falls and teaches nothing"}
COLORS = {"causal": (0, 114, 178), "dot": (86, 180, 233), "image": (0, 158, 115),
          "prefix": (204, 121, 167), "mma": (213, 94, 0), "leaky": (130, 130, 130)}
GROUPS = {"perception": ["at", "attr"], "existence": ["exist"],  # as the paper's MME, POPE,
          "spatial": ["count", "where", "rel"],                  # CV-Bench 2D
          "two steps": ["hop", "max", "sum"]}
TRIED = (0.5, 1, 2)  # times the default learning rate: causal chooses
FREE = ("out", "workers", "save_every")  # may change on resume: they change no number


class Job(NamedTuple):
    entry: str  # that is trained; "align" is stage 1
    seed: int
    lr: float   # of stage 2

    @property
    def name(self) -> str:
        """Its folder in the comparison's, and its key in results.json."""
        return f"seed{self.seed}/{self.entry}" + f"-{self.lr:g}" * (self.entry != "align")


def aligned(seed: int) -> Job:
    return Job("align", seed, 0.0)


# What is to be done: functions of the results so far, which results.json holds --------------------


def weights_of(entry: str) -> str:
    """The entry whose training makes the weights of one."""
    return "causal" if entry == "mma@eval" else entry


def trials(results: dict) -> list[Job]:
    """The runs in which causal chooses the learning rate; none where it was given."""
    return [] if results["lr"] else [
        Job("causal", results["seeds"][0], results["settings"]["lr"] * times) for times in TRIED]


def chosen_lr(results: dict, least: int = len(TRIED)) -> float | None:
    """The learning rate given, or causal's best on val; None before that many trials are over.

    Raises ValueError if causal has diverged in all of them.
    """
    over = [results["runs"][job.name] for job in trials(results) if job.name in results["runs"]]
    scores = {run["lr"]: run["val"] for run in over if run["val"] is not None}
    if len(over) == len(TRIED) and not scores:
        raise ValueError("causal diverges at every learning rate that was tried: give a lower --lr")
    return results["lr"] or (max(scores, key=scores.get) if scores and len(over) >= least else None)


def tested_as(results: dict, job: Job) -> list[str]:
    """The entries that a job's weights are tested as."""
    lost = job in trials(results) and chosen_lr(results) not in (None, job.lr)
    return [] if lost else [entry for entry in dict.fromkeys([job.entry, *results["entries"]])
                            if weights_of(entry) == job.entry and job.entry != "align"]


def finished(results: dict, job: Job) -> bool:
    run = results["runs"].get(job.name)
    return run is not None and set(tested_as(results, job)) <= set(run["tests"])


def all_jobs(results: dict, lr: float | None = None) -> list[Job]:
    """Everything to run, in order; at the default learning rate if there is none yet."""
    lr, jobs = lr or chosen_lr(results) or results["settings"]["lr"], []
    for seed in results["seeds"]:
        jobs += [aligned(seed)] + trials(results) * (seed == results["seeds"][0])
        jobs += [Job(weights_of(entry), seed, lr) for entry in results["entries"]]
    return list(dict.fromkeys(jobs))


def startable(results: dict) -> list[Job]:
    """The jobs that are not finished and wait for no other.

    While the last trial runs, others begin at the rate that is best so far, lest a core be idle.
    """
    lr = chosen_lr(results, len(TRIED) - 1)
    return [job for job in all_jobs(results, lr) if not finished(results, job)
            and (job.entry == "align" or finished(results, aligned(job.seed)))
            and (job.entry == "align" or lr or job in trials(results))]


def steps_of(results: dict, *jobs: Job) -> int:
    s = results["settings"]
    return sum((0 if s["init"] else s["align_steps"]) if job.entry == "align" else s["steps"]
               for job in jobs)


# One run, in a process of its own ----------------------------------------------------------------


def prompt_first(batch: Batch) -> Batch:
    """The same batch with the pictures of every turn after its text, before <answer>."""
    marker = (batch.tokens == Tokenizer.answer).long()
    turn = marker.cumsum(1) - marker
    order = (3 * turn + 2 * marker + (batch.roles == IMAGE)).argsort(dim=1, stable=True)
    return batch._replace(**{name: getattr(batch, name).gather(1, order)
                             for name in ("tokens", "roles", "targets")})


class Reporting(Run):
    """A run that reports its steps; in dual order, every other batch has its prompt first."""

    def __init__(self, pipe: Connection, dual: bool, *run):
        super().__init__(*run)
        self.pipe, self.dual = pipe, dual
        pipe.send(sum(stage.steps for stage in self.stages[:self.stage]) + self.step)

    def update(self, stage, parts: list[Batch]) -> float:
        if self.dual and self.step % 2:
            parts = [prompt_first(part) for part in parts]
        loss = super().update(stage, parts)
        try:
            self.pipe.send(1)
        except OSError:  # nobody is left to report to
            self.signal = signal.SIGTERM
        return loss


def work(pipe: Connection, job: Job, results: dict) -> dict:
    """Train a job's run to its end, or go on with it, and test its last weights."""
    s, config = Settings(**results["settings"]), Config(**results["config"])
    out = Path(s.out) / job.name
    s, mask = replace(s, seed=job.seed, out=str(out), lr=job.lr or s.lr), config.mask
    if job.entry != "align":
        s = replace(s, init=str(Path(results["settings"]["out"]) / aligned(job.seed).name
                                / "last.pt"))
        mask = ENTRIES[job.entry][0]
    state = load_file(out / "last.pt") if (out / "last.pt").exists() else None
    start = state or (load_file(s.init) if s.init else None)
    config = replace(Config(**start["config"]) if start else config,
                     mask=mask, dropout=config.dropout)
    model, stages, examples, split = prepare(s, config, start)
    device, reason = choose_device(s.device, s.dtype)
    print(reason)
    keep_freed_memory()
    stages = stages[:-1] if job.entry == "align" else stages
    run = Reporting(pipe, job.entry == "dot", s, model, stages, device, state)
    run.train()
    found = results["runs"].get(job.name, {"tests": {}}) | job._asdict()
    found |= {"split": split, "parameters": sum(p.numel() for p in model.parameters())}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    found["curve"] = [json.loads(line) for line in lines]
    if job in trials(results) and "val" not in found:
        found["val"] = ask_all(run, stages[-1].held_out, mask)["accuracy"]["all"]
    for entry in tested_as(results, job):
        if entry not in found["tests"]:
            found["tests"][entry] = ask_all(run, examples, ENTRIES[entry][1])
    return found


def ask_all(run: Run, examples: Examples, mask: str) -> dict:
    """A run's last weights on all examples: accuracies, blind, F1 and yes-rate of exist."""
    run.model.eval()
    indices = list(range(len(examples)))
    given = answer_all(run.model, examples, indices, mask, **run.how)
    right, counts = score(examples, indices, given)
    said = [(examples[i].answer.strip() == "yes", answer == "yes")
            for i, answer in zip(indices, given) if examples[i].task == "exist"]
    return {"accuracy": right, "questions": counts, **yes_no(said),
            "blind": blind_score(run.model, examples, indices, mask=mask, **run.how)}


def yes_no(said: list[tuple[bool, bool]]) -> dict:
    """F1 of "yes" and its share of the answers, as POPE's, of (yes is right, yes was said)."""
    hits = sum(right and yes for right, yes in said)
    rights, yeses = sum(right for right, _ in said), sum(yes for _, yes in said)
    return {"f1": 2 * hits / (rights + yeses), "yes": yeses / len(said)} if rights else {}


def child(pipe: Connection, job: Job, results: dict) -> None:
    """work in a process of its own, its output in log.txt; sends results, or what went wrong."""
    leave_group()  # Ctrl-C is for the parent, which ends this process
    torch.set_num_threads(results["threads"])
    folder = Path(results["settings"]["out"]) / job.name
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "log.txt", "a", buffering=1, encoding="utf-8") as log,
          redirect_stdout(log), redirect_stderr(log)):
        try:
            said = work(pipe, job, results)
        except Exception as e:
            traceback.print_exc()
            said = f"{job.name}: {str(e) or type(e).__name__}"
            if isinstance(e, FloatingPointError) and job in trials(results):
                said = job._asdict() | {"tests": {}, "val": None}  # this learning rate has lost
        with suppress(OSError):  # nobody may be left to report to
            pipe.send(said)


# All runs ----------------------------------------------------------------------------------------


def predict(results: dict, at_once: int) -> float:
    """Seconds that all unfinished jobs will take, by a few steps and answers; checks all data."""
    s, clock, took = Settings(**results["settings"]), time.perf_counter, {"align": 0.0}
    start = clock()
    model, stages, examples, _ = prepare(s, Config(**results["config"]),
                                         load_file(s.init) if s.init else None)
    beginning = (clock() - start) / at_once
    with TemporaryDirectory(ignore_cleanup_errors=True) as out:
        run = Run(replace(s, out=out, compile=False), model, stages,
                  choose_device(s.device, s.dtype)[0])
        for run.stage, stage in enumerate(stages):
            run.make_optimizers()
            parts = [good(part) for part in loader(
                stage.examples, s.batch_size, [s.seed], 1, 0, s.share, range(s.grad_accum),
                s.grad_accum, workers=0)]
            run.update(stage, parts)  # the first is slower
            start = clock()
            for _ in range(3):
                run.update(stage, parts)
            took[stage.name] = (clock() - start) / 3
        run.metrics.close()
        some, start = list(range(min(250, len(examples)))), clock()
        answer_all(model.eval(), examples, some, **run.how)
        answer, seconds = (clock() - start) / len(some), 0.0
    for job in all_jobs(results):
        if not finished(results, job):
            stage = "align" if job.entry == "align" else "instruct"
            asked = len(examples) * (len(tested_as(results, job)) + (job in trials(results)))
            asked += s.eval_sample * (s.steps // s.eval_every) * (stage == "instruct")
            seconds += beginning + steps_of(results, job) * took[stage]
            seconds += 2 * asked * answer  # their own pictures, then blind
    return seconds


def save(results: dict) -> None:
    """Write results.json, whole or not at all."""
    path = Path(results["settings"]["out"]) / "results.json"
    part = path.with_suffix(".part")
    with open(part, "w") as f:
        json.dump(results, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def launch(job: Job, results: dict) -> tuple[Connection, multiprocessing.Process]:
    """Start a job in a process of its own, and where to hear from it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, job, results))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is not for it
    process.start()
    signal.signal(signal.SIGINT, handler)
    theirs.close()
    return ours, process


def train_all(results: dict, at_once: int) -> None:
    """Run what is left, some jobs at once; raises ValueError where one fails."""
    began, running, jobs = time.time() - results["seconds"], {}, all_jobs(results)
    save(results)
    bar = tqdm(total=steps_of(results, *jobs), unit="step", dynamic_ncols=True,
               initial=steps_of(results, *(job for job in jobs if finished(results, job))),
               mininterval=0.2 if sys.stderr.isatty() else 60)
    try:
        while True:
            for job in startable(results):
                if len(running) < at_once and job not in [job for job, _, _ in running.values()]:
                    pipe, process = launch(job, results)
                    running[pipe] = job, process, steps_of(results, job)
            bar.set_postfix_str(", ".join(job.name for job, _, _ in running.values()), False)
            if not running:
                return
            for pipe in wait(list(running)):
                job, process, left = running[pipe]
                try:
                    said = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    said = f"{job.name}: ended with exit code {process.exitcode}"
                if isinstance(said, str):
                    log = f"{results['settings']['out']}/{job.name}/log.txt"
                    raise ValueError(f"{said} (all that it said: {log})")
                if isinstance(said, int):  # steps
                    running[pipe] = job, process, left - said
                    bar.update(said)
                    continue
                bar.update(left)  # a stage without data has none
                process.join()
                del running[pipe]
                results["runs"][job.name] = said
                results["seconds"] = time.time() - began
                save(results)
    finally:  # each saves what it has
        bar.close()
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join()
        results["seconds"] = time.time() - began
        save(results)


# What came out -----------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval by Student's t; the latter is 0 of a single value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), 0.0
    # t = sqrt(df) tan(a) has the density cos(a)^(df - 1) in a: its 97.5% point, by quadrature.
    angles = (np.arange(200_000) + 0.5) / 200_000 * math.pi - math.pi / 2
    weights = np.cos(angles) ** (n - 2)
    below = np.cumsum(weights) - weights / 2
    t = math.sqrt(n - 1) * math.tan(np.interp(0.975 * weights.sum(), below, angles))
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n))


def runs_of(results: dict, entry: str) -> list[dict]:
    """The runs of an entry, a seed each."""
    return [results["runs"][Job(weights_of(entry), seed, chosen_lr(results)).name]
            for seed in results["seeds"]]


def grouped(results: dict) -> dict[str, list[str]]:
    """Columns of tasks: title -> the tasks of the data in it."""
    tasks = {task for run in results["runs"].values() for test in run["tests"].values()
             for task in test["questions"]} - {"all"}
    known = {title: [task for task in some if task in tasks] for title, some in GROUPS.items()}
    rest = sorted(tasks - {task for some in GROUPS.values() for task in some})
    known = {f"{title} ({', '.join(some)})": some for title, some in known.items() if some}
    return known | {task: [task] for task in rest}


def accuracy_of(accuracy: dict, questions: dict, tasks: list[str]) -> float:
    """Accuracy in percent over the questions of some tasks; nan where none was asked."""
    tasks = [task for task in tasks if task in accuracy]
    asked = sum(questions[task] for task in tasks)
    return 100 * sum(accuracy[task] * questions[task] for task in tasks) / (asked or math.nan)


def figures(results: dict, entry: str, run: dict) -> dict[str, float]:
    """Column -> figure, of a run's weights tested as an entry; nan is none."""
    test, known = run["tests"][entry], grouped(results)
    found = {title: accuracy_of(test["accuracy"], test["questions"], known[title])
             for title in known}
    return found | {
        "**all**": 100 * test["accuracy"]["all"], "over causal": math.nan,
        "blind": 100 * test["blind"].get("all", math.nan),
        "exist: F1": 100 * test.get("f1", math.nan), "exist: yes": 100 * test.get("yes", math.nan),
        "training loss": run["curve"][-1]["train_loss"], "parameters": run["parameters"],
        "time": float(np.median([1 / line["samples_per_second"] for line in run["curve"]]))}


def cell(values: list[float], title: str) -> str:
    mean, half = interval(values)
    digits = {"training loss": 3, "time": 2, "parameters": 0}.get(title, 1)
    sign = "+" if title == "over causal" else ""
    interval_text = f" ± {half:.{digits}f}" if half else ""
    return "-" if math.isnan(mean) else f"{mean:{sign},.{digits}f}{interval_text}"


def table(results: dict) -> str:
    """Markdown: a row an entry, means over seeds ± 95% intervals, differences seed by seed.

    Raises ValueError if runs differ in their number of parameters: the terms would not be equal.
    """
    rows = {entry: [figures(results, entry, run) for run in runs_of(results, entry)]
            for entry in results["entries"]}
    sizes = {own["parameters"] for row in rows.values() for own in row}
    if len(sizes) > 1:
        raise ValueError(f"these runs differ in their number of parameters: {sizes}")
    base = [(own["**all**"], own["time"]) for own in rows.get("causal", ())]
    for entry, row in rows.items():
        for own, (accuracy, seconds) in zip(row, base or [(math.nan, math.nan)] * len(row)):
            own["over causal"] = math.nan if entry == "causal" else own["**all**"] - accuracy
            own["time"] /= seconds
    cells = {entry: {title: cell([own[title] for own in row], title) for title in row[0]}
             for entry, row in rows.items()}
    kept = [title for title in cells[results["entries"][0]]
            if any(row[title] != "-" for row in cells.values())]
    lines = [["entry", *kept], ["---", *["---:"] * len(kept)]]
    lines += [[f"`{entry}`", *(row[title] for title in kept)] for entry, row in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def panel(title: str, curves: dict[str, dict[int, list[float]]], last: int) -> Image.Image:
    """Accuracy in percent over steps: entry -> step -> one value a seed; mean, and band of all."""
    wide, high, left, under, fine = 330, 220, 32, 18, 3  # drawn finer, then made smaller
    image = Image.new("RGB", (fine * wide, fine * high), "white")
    draw = ImageDraw.Draw(image, "RGBA")

    def at(step: float, value: float) -> tuple[float, float]:
        return (fine * (left + step / last * (wide - left - 12)),
                fine * (high - under - value / 100 * (high - under - 18)))

    for value in range(0, 101, 25):
        draw.line([at(0, value), at(last, value)], (225, 225, 225), fine)
    for entry, points in curves.items():
        color = COLORS.get(entry, (0, 0, 0))
        band = [at(step, max(v)) for step, v in points.items()]
        band += [at(step, min(v)) for step, v in reversed(points.items())]
        if len(points) > 1:
            draw.polygon(band, (*color, 50))
        draw.line([at(step, np.mean(v)) for step, v in points.items()], color, 2 * fine, "curve")
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


def draw_curves(results: dict) -> Image.Image:
    """Learning curves on the validation split, a panel for all tasks and one for each group."""
    entries = list(dict.fromkeys(map(weights_of, results["entries"])))
    panels, seeds = [], len(results["seeds"])
    for title, tasks in ({"all": ["all"]} | grouped(results)).items():
        curves = {entry: {} for entry in entries}
        for entry in entries:
            for run in runs_of(results, entry):
                questions = next(iter(run["tests"].values()))["questions"]
                for line in run["curve"]:
                    value = accuracy_of(line["accuracy"], questions, tasks)
                    if not math.isnan(value):
                        curves[entry].setdefault(line["step"], []).append(value)
        panels.append(panel(title, curves, results["settings"]["steps"]))
    rows = [join(panels[n:n + 3], gap=14) for n in range(0, len(panels), 3)]
    note = (f"accuracy (%) over steps of stage 2, on at most {results['settings']['eval_sample']} "
            f"questions of the validation split: "
            + (f"mean of {seeds} seeds, and from the least to the greatest" if seeds > 1
               else "one seed"))
    names = legend([(entry, COLORS.get(entry, (0, 0, 0))) for entry in entries], rows[0].width)
    return frame(join([names, *rows, text(note, "gray")], down=True, gap=10))


def report(results: dict) -> str:
    """Write results.md and curves.png into the comparison's folder; returns the former."""
    out, tried, seeds = Path(results["settings"]["out"]), trials(results), results["seeds"]
    given = {"masks": ",".join(results["entries"]), "seeds": len(seeds)} | results["given"]
    command = shlex.join(["python", "compare.py"] + [
        part for name, value in given.items() if (name, value) != ("out", default_out(given))
        for part in ([flag(name)] if value is True else [flag(name), str(value)])])
    split, spread = runs_of(results, results["entries"][0])[0]["split"], ""
    if len(seeds) > 1:
        spread = ": means over the seeds ± 95% interval (Student's t), differences seed by seed"
    parts = [
        f"`{command}`, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: "
        f"{results['seconds'] / 60:.0f} minutes on {results['machine']}.",
        f"Accuracy in percent on the {split} split, with the last weights{spread}. Training loss: "
        f"of the steps since the last evaluation but one. Time: of a training step, causal's "
        f"being 1.", table(results)]
    if tried:
        lr = chosen_lr(results)
        edge = {tried[0].lr: ", the least of them", tried[-1].lr: ", the greatest of them"}
        runs = [results["runs"][job.name] for job in tried]
        scores = ", ".join(f"{run['lr']:g}: " + ("diverged" if run["val"] is None else
                                                 f"{run['val']:.1%}") for run in runs)
        parts.append(f"Learning rate of stage 2, for all: {lr:g}{edge.get(lr, '')}; it is the best "
                     f"for `causal` on the validation split, seed {seeds[0]} ({scores}).")
    parts += [f"`{entry}`: {NOTES[entry]}." for entry in results["entries"] if entry in NOTES]
    (out / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw_curves(results).save(out / "curves.png")
    return "\n\n".join(parts)


# Command line ------------------------------------------------------------------------------------


def default_out(given: dict) -> str:
    return f"out/compare-{Path(given.get('data', Settings.data)).name}"


def settled(given: dict, resume: bool) -> dict:
    """Results to begin with, of flags: none yet, or those that --resume goes on with."""
    if "mask" in given:
        raise ValueError("--mask is for one run: choose with --masks")
    masks, n = given.pop("masks", None), given.pop("seeds", None)
    given.setdefault("out", default_out(given))
    path = Path(given["out"]) / "results.json"
    if resume:
        try:
            results = json.loads(path.read_text())
            Settings(**results["settings"]), Config(**results["config"])
            saved = results["settings"] | results["config"] | {"lr": results["lr"] or "tried"}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}: no comparison of this version to go on with ({e})") from None
        for name, value in given.items():
            if name not in FREE and value != saved[name]:
                raise ValueError(f"--resume: {flag(name)} was {saved[name]} when the comparison "
                                 f"began, not {value}; leave it out, or choose another --out")
        results["settings"] |= {name: given[name] for name in FREE if name in given}
    else:
        settings, config, _ = settle(given, False)
        if "eval_every" not in given:
            settings.eval_every = max(1, settings.steps // 10)  # points of a curve
        device = choose_device(settings.device, settings.dtype)[0].type
        settings.device = device  # on resume as well: what it is changes the last digits
        settings.dtype = "bfloat16" if in_bfloat16(device, settings.dtype) else "float32"
        results = {"given": given, "settings": asdict(settings), "config": asdict(config),
                   "lr": given.get("lr"), "seconds": 0.0, "runs": {}}
    first = results["settings"]["seed"]
    if masks is not None or not resume:
        masks = "causal,dot,image,prefix,mma" if masks is None else masks
        results["entries"] = list(dict.fromkeys(masks.split(",")))
    if n is not None or not resume:
        results["seeds"] = list(range(first, first + (3 if n is None else n)))
    if not results["seeds"]:
        raise ValueError(f"--seeds must be at least 1, not {n}")
    Settings(seed=results["seeds"][-1])
    for entry in results["entries"]:
        if entry not in ENTRIES:
            raise ValueError(f"--masks: {entry!r} is none of {', '.join(ENTRIES)}")
    return results


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--masks", default=argparse.SUPPRESS, metavar="NAMES",
                        help=f"of {', '.join(ENTRIES)} (default causal,dot,image,prefix,mma)")
    parser.add_argument("--seeds", type=int, default=argparse.SUPPRESS,
                        help="how many, from --seed on (default 3)")
    parser.add_argument("--jobs", type=int, help="runs at once (default: one a CPU core, at most "
                        "4; on a GPU 1)")
    given = vars(parser.parse_args(argv))
    resume, at_once = given.pop("resume"), given.pop("jobs")
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's & ignores the former
        signal.signal(number, signal.default_int_handler)
    try:
        if "WORLD_SIZE" in os.environ:
            raise ValueError("start it without torchrun: it runs processes of its own, --jobs")
        if at_once is not None and at_once < 1:
            raise ValueError(f"--jobs must be at least 1, not {at_once}")
        results, cores = settled(given, resume), torch.get_num_threads()
        on_cpu = results["settings"]["device"] == "cpu"
        at_once = at_once or (min(cores, 4) if on_cpu else 1)
        results.setdefault("threads", max(1, cores // at_once))  # kept on resume, as the device
        what = f"{cores} thread{'s' * (cores > 1)}" if on_cpu else results["settings"]["device"]
        runs = "a run" if at_once == 1 else f"{at_once} runs"
        results.setdefault("machine", f"{what}, {runs} at once, torch {torch.__version__}")
        if left := sum(not finished(results, job) for job in all_jobs(results)):
            minutes = predict(results, at_once) / 60
            if not on_cpu and torch.cuda.is_available():
                torch.cuda.empty_cache()  # for the runs
            print(f"{left} runs, {at_once} at once with {results['threads']} threads each: about "
                  f"{minutes:.0f} minutes", flush=True)
            Path(results["settings"]["out"]).mkdir(parents=True, exist_ok=True)
            train_all(results, at_once)
        save(results)  # also if only other entries or seeds were chosen, of what there is
        print(report(results))
    except KeyboardInterrupt:
        whole = (Path(given["out"]) / "results.json").exists()
        print("stopped" + whole * f"; what was trained is kept, and this goes on:\n  python "
              f"compare.py --out {shlex.quote(given['out'])} --resume", file=sys.stderr)
        raise SystemExit(130)
    except (ValueError, OSError, FloatingPointError) as e:
        fail(e)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    main()
