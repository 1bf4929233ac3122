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
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from data.llava import Batch, leave_group, loader
from draw import frame, join, legend, text
from nanoaki import IMAGE, MASKS, Config, Tokenizer, load_file
from train import (Run, Settings, answer_all, blind_score, choose_device, fail, flag,
                   keep_freed_memory, make_parser, prepare, score, settle)

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
FREE = ("out", "device", "workers", "save_every")  # may change on resume: they change no number


class Job(NamedTuple):
    entry: str  # that is trained; "align" is stage 1
    seed: int
    lr: float   # of stage 2

    @property
    def name(self) -> str:
        """Its folder in the comparison's, and its key in results.json."""
        return f"seed{self.seed}/{self.entry}" + f"-{self.lr:g}" * (self.entry != "align")


# One run, in a process of its own ----------------------------------------------------------------


def prompt_first(batch: Batch) -> Batch:
    """The same batch with the pictures of every turn after its text, before <answer>."""
    marker = (batch.tokens == Tokenizer.answer).long()
    turn = marker.cumsum(1) - marker
    order = (3 * turn + 2 * marker + (batch.roles == IMAGE)).argsort(dim=1, stable=True)
    return batch._replace(**{name: getattr(batch, name).gather(1, order)
                             for name in ("tokens", "roles", "targets")})


class Entry(Run):
    """A run that reports its steps; in dual order, every other batch has its prompt first."""

    def __init__(self, report: Connection, dual: bool, *run):
        super().__init__(*run)
        self.report, self.dual = report, dual
        report.send(sum(stage.steps for stage in self.stages[:self.stage]) + self.step)

    def update(self, stage, parts: list[Batch]) -> float:
        if self.dual and self.step % 2:
            parts = [prompt_first(part) for part in parts]
        loss = super().update(stage, parts)
        try:
            self.report.send(1)
        except OSError:  # nobody is left to report to
            self.signal = signal.SIGTERM
        return loss


def work(report: Connection, job: Job, settings: Settings, config: Config, tests: list[str],
         validate: bool) -> dict:
    """Train a run to its end, or go on with it, and test its last weights as some entries."""
    out, align = Path(settings.out) / job.name, Path(settings.out) / f"seed{job.seed}" / "align"
    settings = replace(settings, seed=job.seed, out=str(out), lr=job.lr or settings.lr)
    mask = config.mask
    if job.entry != "align":
        settings, mask = replace(settings, init=str(align / "last.pt")), ENTRIES[job.entry][0]
    state = load_file(out / "last.pt") if (out / "last.pt").exists() else None
    start = state or (load_file(settings.init) if settings.init else None)
    own = {"mask": mask, "dropout": config.dropout}
    config = replace(Config(**start["config"]) if start else config, **own)
    model, stages, examples, _ = prepare(settings, config, start)
    device, reason = choose_device(settings.device, settings.dtype)
    print(reason)
    keep_freed_memory()
    stages = stages[:-1] if job.entry == "align" else stages
    run = Entry(report, job.entry == "dot", settings, model, stages, device, state)
    run.train()
    found = job._asdict() | {"parameters": sum(p.numel() for p in model.parameters()),
                             "tests": {entry: ask_all(run, examples, ENTRIES[entry][1])
                                       for entry in tests}}
    if validate:
        found["val"] = ask_all(run, stages[-1].held_out, mask)["accuracy"]["all"]
    found["curve"] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return found


def ask_all(run: Run, examples, mask: str) -> dict:
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
    return {"f1": 2 * hits / max(1, rights + yeses), "yes": yeses / len(said)} if said else {}


def child(report: Connection, threads: int, job: Job, settings: Settings, *rest) -> None:
    """work in a process of its own, its output in log.txt; reports results, or what went wrong."""
    leave_group()  # Ctrl-C is for the parent, which ends this process
    torch.set_num_threads(threads)
    folder = Path(settings.out) / job.name
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "log.txt", "a", buffering=1) as log,
          redirect_stdout(log), redirect_stderr(log)):
        try:
            report.send(work(report, job, settings, *rest))
        except (ValueError, OSError, FloatingPointError) as e:
            report.send(f"{job.name}: {e}")


# All runs ----------------------------------------------------------------------------------------


def tests(results: dict, entry: str) -> list[str]:
    """The entries that the weights of one are tested as."""
    also = ["mma@eval"] * (entry == "causal" and "mma@eval" in results["entries"])
    return [] if entry == "align" else [entry, *also]


def trained(results: dict) -> list[str]:
    return list(dict.fromkeys("causal" if entry == "mma@eval" else entry
                              for entry in results["entries"]))


def trials(results: dict) -> list[Job]:
    """The runs in which causal chooses the learning rate; none where it was given."""
    default = results["settings"]["lr"]
    return [] if results["lr"] else [Job("causal", results["seeds"][0], default * times)
                                     for times in TRIED]


def chosen_lr(results: dict) -> float | None:
    """The learning rate given, or the best for causal on val; None as long as that is open."""
    scores = {job.lr: results["runs"][job.name]["val"] for job in trials(results)
              if job.name in results["runs"]}
    if not results["lr"] and len(scores) == len(TRIED):
        return max(scores, key=scores.get)
    return results["lr"]


def finished(results: dict, job: Job) -> bool:
    run = results["runs"].get(job.name)
    return run is not None and set(tests(results, job.entry)) <= set(run["tests"])


def all_jobs(results: dict) -> list[Job]:
    """Everything to run, in order; at learning rate nan as long as causal has not chosen one."""
    lr, first, jobs = chosen_lr(results) or math.nan, results["seeds"][0], []
    for seed in results["seeds"]:
        jobs += [Job("align", seed, 0.0)] + (trials(results) if seed == first else [])
        jobs += [Job(entry, seed, lr) for entry in trained(results)]
    return [job for job in dict.fromkeys(jobs)  # one of the trials is a run of causal
            if not (math.isnan(job.lr) and job[:2] == ("causal", first))]


def startable(results: dict) -> list[Job]:
    """The jobs that are not finished and wait for no other."""
    return [job for job in all_jobs(results)
            if not finished(results, job) and not math.isnan(job.lr)
            and (job.entry == "align" or finished(results, Job("align", job.seed, 0.0)))]


def steps_of(results: dict, *jobs: Job) -> int:
    s = results["settings"]
    align = 0 if s["init"] else s["align_steps"]
    return sum(align if job.entry == "align" else s["steps"] for job in jobs)


def predict(results: dict) -> float:
    """Seconds that all unfinished jobs will take, by a few steps and answers; checks all data."""
    s, clock, took = Settings(**results["settings"]), time.perf_counter, {"align": 0.0}
    model, stages, examples, _ = prepare(s, Config(**results["config"]),
                                         load_file(s.init) if s.init else None)
    with TemporaryDirectory() as out:
        run = Run(replace(s, out=out, compile=False), model, stages,
                  choose_device(s.device, s.dtype)[0])
        for run.stage, stage in enumerate(stages):
            run.make_optimizers()
            parts = list(loader(stage.examples, s.batch_size, [s.seed], 1, 0, s.share,
                                range(s.grad_accum), s.grad_accum, workers=0))
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
            instruct = job.entry != "align"
            questions = len(examples) * len(tests(results, job.entry))
            questions += s.steps // s.eval_every * s.eval_sample * instruct
            seconds += steps_of(results, job) * took["instruct" if instruct else "align"]
            seconds += 2 * questions * answer  # their own pictures, then blind
    return seconds


def save(results: dict) -> None:
    """Write results.json, whole or not at all."""
    path = Path(results["settings"]["out"]) / "results.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    os.replace(part, path)


def launch(results: dict, job: Job, threads: int) -> tuple[Connection, multiprocessing.Process]:
    """Start a job in a process of its own, and where to hear from it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(
        theirs, threads, job, Settings(**results["settings"]), Config(**results["config"]),
        tests(results, job.entry), job in trials(results)))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is not for it
    process.start()
    signal.signal(signal.SIGINT, handler)
    theirs.close()
    return ours, process


def train_all(results: dict, at_once: int, threads: int) -> None:
    """Run what is left, some jobs at once; raises ValueError where one fails."""
    before, running, jobs = results["seconds"] - time.time(), {}, all_jobs(results)
    bar = tqdm(total=steps_of(results, *jobs), unit="step", dynamic_ncols=True,
               initial=steps_of(results, *(job for job in jobs if finished(results, job))),
               mininterval=0.2 if sys.stderr.isatty() else 60)
    try:
        while True:
            for job in startable(results):
                if len(running) < at_once and job not in [job for job, _, _ in running.values()]:
                    report, process = launch(results, job, threads)
                    running[report] = job, process, steps_of(results, job)
            bar.set_postfix_str(", ".join(job.name for job, _, _ in running.values()))
            if not running:
                return
            for report in wait(list(running)):
                job, process, left = running[report]
                try:
                    said = report.recv()
                except EOFError:
                    process.join()
                    said = f"{job.name} ended with exit code {process.exitcode}"
                if isinstance(said, str):
                    raise ValueError(f"{said} (see {results['settings']['out']}/{job.name}/log.txt)")
                if isinstance(said, int):  # steps
                    running[report] = job, process, left - said
                    bar.update(said)
                    continue
                bar.update(left)  # of a stage that has no data there were none
                process.join()
                del running[report]
                results["runs"][job.name] = said
                results["seconds"] = before + time.time()
                save(results)
    finally:  # each saves what it has
        bar.close()
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join()


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


def grouped(results: dict) -> dict[str, list[str]]:
    """The columns of tasks: title -> the tasks of the data in it."""
    tasks = {task for run in results["runs"].values() for test in run["tests"].values()
             for task in test["questions"]} - {"all"}
    named = {title: [task for task in some if task in tasks] for title, some in GROUPS.items()}
    rest = sorted(tasks - {task for some in GROUPS.values() for task in some})
    return {title: some for title, some in (named | {t: [t] for t in rest}).items() if some}


def runs_of(results: dict, entry: str) -> list[dict]:
    """The runs of an entry, a seed each."""
    name = "causal" if entry == "mma@eval" else entry
    return [results["runs"][Job(name, seed, chosen_lr(results)).name] for seed in results["seeds"]]


def share(accuracy: dict, questions: dict, tasks: list[str]) -> float:
    """Accuracy in percent over the questions of some tasks; nan where none was asked."""
    tasks = [task for task in tasks if task in accuracy]
    asked = sum(questions[task] for task in tasks)
    return 100 * sum(accuracy[task] * questions[task] for task in tasks) / (asked or math.nan)


def seconds_a_step(run: dict) -> float:
    return float(np.mean([1 / line["samples_per_second"] for line in run["curve"]]))


def cell(values: list[float], digits: int, sign: bool) -> str:
    mean, half = interval(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:{'+' if sign else ''},.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


def table(results: dict) -> str:
    """Markdown: a row an entry, means over seeds ± 95% intervals, differences seed by seed.

    Raises ValueError if runs differ in their number of parameters: the terms would not be equal.
    """
    entries, columns = results["entries"], []  # (title, value of a run and test, digits, against)
    sizes = {run["parameters"] for entry in entries for run in runs_of(results, entry)}
    if len(sizes) > 1:
        raise ValueError(f"these runs differ in their number of parameters: {sizes}")
    for title, tasks in grouped(results).items():
        name = title if tasks == [title] else f"{title} ({', '.join(tasks)})"
        columns.append((name, lambda run, test, tasks=tasks:
                        share(test["accuracy"], test["questions"], tasks), 1, None))
    columns += [
        ("**all**", lambda run, test: 100 * test["accuracy"]["all"], 1, None),
        ("over causal", lambda run, test: 100 * test["accuracy"]["all"], 1, np.subtract),
        ("blind", lambda run, test: 100 * test["blind"].get("all", math.nan), 1, None),
        ("exist: F1", lambda run, test: 100 * test.get("f1", math.nan), 1, None),
        ("exist: yes", lambda run, test: 100 * test.get("yes", math.nan), 1, None),
        ("training loss", lambda run, test: run["curve"][-1]["train_loss"], 3, None),
        ("parameters", lambda run, test: run["parameters"], 0, None),
        ("time of a step", lambda run, test: seconds_a_step(run), 2, np.divide)]
    rows = {entry: [] for entry in entries}
    for entry, row in rows.items():
        for _, value, digits, against in columns:
            values = [value(run, run["tests"][entry]) for run in runs_of(results, entry)]
            if against and (entry == "causal" or "causal" not in entries):
                values = [math.nan]
            elif against:
                values = against(values, [value(run, run["tests"]["causal"])
                                          for run in runs_of(results, "causal")])
            row.append(cell(values, digits, against is np.subtract))
    kept = [n for n in range(len(columns)) if any(row[n] != "-" for row in rows.values())]
    lines = [["entry", *(columns[n][0] for n in kept)], ["---", *["---:"] * len(kept)]]
    lines += [[f"`{entry}`", *(row[n] for n in kept)] for entry, row in rows.items()]
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
        color = COLORS[entry]
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
    entries, panels = trained(results), []
    for title, tasks in ({"all": ["all"]} | grouped(results)).items():
        curves = {}
        for entry in entries:
            points = curves[entry] = {}
            for run in runs_of(results, entry):
                for line in run["curve"]:
                    value = share(line["accuracy"], run["tests"][entry]["questions"], tasks)
                    if not math.isnan(value):
                        points.setdefault(line["step"], []).append(value)
        name = title if tasks in (["all"], [title]) else f"{title}: {', '.join(tasks)}"
        panels.append(panel(name, curves, results["settings"]["steps"]))
    rows = [join(panels[n:n + 3], gap=14) for n in range(0, len(panels), 3)]
    note = (f"accuracy (%) on {results['settings']['eval_sample']} questions of the validation "
            f"split over steps of stage 2: mean of {len(results['seeds'])} seeds, and from the "
            f"least to the greatest")
    return frame(join([legend([(entry, COLORS[entry]) for entry in entries], rows[0].width), *rows,
                       text(note, "gray")], down=True, gap=10))


def report(results: dict) -> str:
    """Write results.md and curves.png into the comparison's folder; returns the former."""
    out, tried, seeds = Path(results["settings"]["out"]), trials(results), results["seeds"]
    given = {"masks": ",".join(results["entries"]), "seeds": len(seeds)} | results["given"]
    command = shlex.join(["python", "compare.py"] + [
        part for name, value in given.items() if (name, value) != ("out", default_out(given))
        for part in ([flag(name)] if value is True else [flag(name), str(value)])])
    parts = [f"`{command}`: seeds {seeds[0]} to {seeds[-1]}, {results['seconds'] / 60:.0f} minutes "
             f"on {results['machine']}. Accuracy in percent on the test split, with the last "
             f"weights: mean over the seeds ± 95% interval (Student's t), differences seed by seed.",
             table(results)]
    if tried:
        scores = ", ".join(f"{job.lr:g}: {results['runs'][job.name]['val']:.1%}" for job in tried)
        parts.append(f"Learning rate of stage 2, for all: {chosen_lr(results):g}, the best for "
                     f"`causal` on the validation split with seed {seeds[0]} ({scores}).")
    parts += [f"`{entry}`: {NOTES[entry]}." for entry in results["entries"] if entry in NOTES]
    (out / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw_curves(results).save(out / "curves.png")
    return "\n\n".join(parts)


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
        except (OSError, ValueError) as e:
            raise ValueError(f"{path}: no comparison to go on with ({e})") from None
        for name, value in given.items():
            before = results["given"].get(name, "not given")
            if name not in FREE and value != before:
                raise ValueError(f"--resume: {flag(name)} was {before} when the comparison began, "
                                 f"not {value}; leave it out, or choose another --out")
        results["settings"] |= {name: given[name] for name in FREE if name in given}
    else:
        settings, config, _ = settle(given, False)
        if "eval_every" not in given:
            settings.eval_every = max(1, settings.steps // 10)  # points of a curve
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
    try:
        if "WORLD_SIZE" in os.environ:
            raise ValueError("start it without torchrun: it runs processes of its own, --jobs")
        if at_once is not None and at_once < 1:
            raise ValueError(f"--jobs must be at least 1, not {at_once}")
        results = settled(given, resume)
        settings = Settings(**results["settings"])
        device, cores = choose_device(settings.device, settings.dtype)[0], torch.get_num_threads()
        at_once = at_once or (min(cores, 4) if device.type == "cpu" else 1)
        threads = max(1, cores // at_once)
        what = torch.cuda.get_device_name() if device.type == "cuda" else f"{cores} CPU cores"
        if left := sum(not finished(results, job) for job in all_jobs(results)):
            minutes = predict(results) / 60
            print(f"{left} runs, {at_once} at once with {threads} threads each: about "
                  f"{minutes:.0f} minutes", flush=True)
            Path(settings.out).mkdir(parents=True, exist_ok=True)
            save(results)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            results["machine"] = f"{what}, {at_once} runs at once, torch {torch.__version__}"
            train_all(results, at_once, threads)
        print(report(results))
    except KeyboardInterrupt:
        print(f"stopped; what was trained is kept, and this goes on:\n  python compare.py --out "
              f"{shlex.quote(given['out'])} --resume", file=sys.stderr)
        raise SystemExit(130)
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    main()
