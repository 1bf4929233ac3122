"""
Train every mask on equal terms: the same weights to begin with, data, order and steps.

    python compare.py --masks causal,dot,image,prefix,mma --seeds 3
    python compare.py --resume      # go on after Ctrl-C
    python compare.py --masks causal,mma --seeds 1 --steps 1000 --lr 0.0035 --out out/first

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
from collections import defaultdict
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.llava import Batch, Examples, leave_group, loader
from draw import chart, frame, join, legend, text
from nanoaki import IMAGE, MASKS, Config, Tokenizer, load_file, write_whole
from sample import choose_device, fail, in_bfloat16
from train import (Run, Settings, answer_all, examine, flag, good, hold, keep_freed_memory,
                   make_parser, prepare, refuse_used, same_flags, settle)

# An entry: the mask that it is trained with, and the one that it is tested with.
ENTRIES = {name: (name, name) for name in MASKS}
ENTRIES |= {"dot": ("causal", "causal"), "mma@eval": ("causal", "mma")}
NOTES = {
    "dot": "causal, with the prompt before the picture in every other batch, tested with the "
           "picture first; stage 1 is shared, where the paper's doubles both stages",
    "mma@eval": "the weights of causal, tested under MMA (arXiv 2505.18605)",
    "leaky": "a lesson, not a method: image rows see the answer, so the loss falls although "
             "nothing is learned"}
COLORS = {"causal": (0, 114, 178), "dot": (86, 180, 233), "image": (0, 158, 115),
          "prefix": (204, 121, 167), "mma": (213, 94, 0), "leaky": (130, 130, 130)}
GROUPS = {"perception": ["at", "attr"], "existence": ["exist"],  # as the paper's MME, POPE,
          "spatial": ["count", "where", "rel"],                  # CV-Bench 2D
          "two steps": ["hop", "max", "sum"]}
BASES = ("causal", "mma")  # every entry's difference to them is shown
TRIED = (0.5, 1, 2)  # times the default learning rate: causal chooses
FREE = ("out", "workers", "save_every")  # may change on resume: they change no number
# results.json: what is asked for, where it is run, and what came of it.
KEYS = {"given", "settings", "config", "lr", "entries", "seeds", "jobs", "threads", "machine",
        "runs", "seconds"}


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


def chosen_lr(results: dict) -> float | None:
    """The learning rate given, or causal's best on val; None before all trials are over.

    Raises ValueError if causal has diverged in all of them.
    """
    runs = [results["runs"].get(job.name) for job in trials(results)]
    if None in runs:
        return None
    scores = {run["lr"]: run["val"] for run in runs if "val" in run}
    if runs and not scores:
        raise ValueError("causal diverges at every learning rate that was tried: begin anew, "
                         "with a lower --lr and another --out")
    return max(scores, key=scores.get, default=results["lr"])


def stage_2_lr(results: dict) -> float:
    """The rate of stage 2: chosen_lr, or the default as long as nothing is chosen."""
    return chosen_lr(results) or results["settings"]["lr"]


def tested_as(results: dict, job: Job) -> list[str]:
    """The entries that a job's weights are tested as."""
    return [entry for entry in results["entries"]
            if weights_of(entry) == job.entry and job.lr == stage_2_lr(results)]


def finished(results: dict, job: Job) -> bool:
    run = results["runs"].get(job.name)
    return run is not None and ("diverged" in run
                                or set(tested_as(results, job)) <= set(run["tests"]))


def all_jobs(results: dict) -> list[Job]:
    """Everything to run, in order."""
    jobs = []
    for seed in results["seeds"]:
        jobs += [aligned(seed)] + trials(results) * (seed == results["seeds"][0])
        jobs += [Job(weights_of(entry), seed, stage_2_lr(results)) for entry in results["entries"]]
    return list(dict.fromkeys(jobs))


def startable(results: dict) -> list[Job]:
    """The jobs that are not finished and wait for no other."""
    return [job for job in all_jobs(results) if not finished(results, job)
            and (job.entry == "align" or finished(results, aligned(job.seed))
                 and (chosen_lr(results) or job in trials(results)))]


def steps_of(results: dict, *jobs: Job) -> int:
    s = results["settings"]
    return sum((0 if s["init"] else s["align_steps"]) if job.entry == "align" else s["steps"]
               for job in jobs)


def steps_done(results: dict, job: Job) -> int:
    """The steps that a job has behind it, by its results or its checkpoint."""
    last = Path(results["settings"]["out"]) / job.name / "last.pt"
    if job.name not in results["runs"] and not last.exists():
        return 0
    state = {"stage": 1} if job.name in results["runs"] else load_file(last)
    return steps_of(results, job) if state["stage"] else state["step"]


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
        whole = shlex.quote(str(self.out.parents[1]))
        self.goes_on = f"python compare.py --out {whole} --resume"

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
    if not state and job.name in results["runs"]:
        raise ValueError(f"{out / 'last.pt'}: what was trained is gone and cannot be tested under "
                         f"another mask: put it back, or begin anew with another --out")
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
        held_out = stages[-1].held_out
        found["val"] = examine(run.model.eval(), held_out, list(range(len(held_out))), mask,
                               blind=False, **run.how)[1]["accuracy"]["all"]
    for entry in tested_as(results, job):
        if entry not in found["tests"]:
            found["tests"][entry] = ask_all(run, examples, ENTRIES[entry][1])
    return found


def ask_all(run: Run, examples: Examples, mask: str) -> dict:
    """A run's last weights on all examples: accuracies, blind, F1 and yes-rate of exist."""
    run.model.eval()
    indices = list(range(len(examples)))
    given, scores = examine(run.model, examples, indices, mask, **run.how)
    said = [(examples[i].answer.strip() == "yes", answer == "yes")
            for i, answer in zip(indices, given) if examples[i].task == "exist"]
    return scores | yes_no(said)


def yes_no(said: list[tuple[bool, bool]]) -> dict:
    """F1 of "yes" and its share of the answers, as POPE's, of (yes is right, yes was said)."""
    hits = sum(right and yes for right, yes in said)
    rights, yeses = sum(right for right, _ in said), sum(yes for _, yes in said)
    return {"f1": 2 * hits / (rights + yeses), "yes": yeses / len(said)} if rights else {}


def child(pipe: Connection, job: Job, results: dict) -> None:
    """work in a process of its own, its output in log.txt; sends results, or what went wrong."""
    leave_group()  # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not at once: loaders clean up
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
            if isinstance(e, FloatingPointError) and job.entry != "align":  # a result as well
                said = job._asdict() | {"tests": {}, "diverged": str(e)}
        with suppress(OSError):  # nobody may be left to report to
            pipe.send(said)


# All runs ----------------------------------------------------------------------------------------


def predict(results: dict) -> float:
    """Seconds that all unfinished jobs will take, by a few steps and answers; checks all data.

    Stage 1, trials of the learning rate and the rest are taken to follow each other.
    """
    s, clock, took = Settings(**results["settings"]), time.perf_counter, {"align": 0.0}
    start = clock()
    model, stages, examples, _ = prepare(s, Config(**results["config"]),
                                         load_file(s.init) if s.init else None)
    beginning = clock() - start
    torch.set_num_threads(results["threads"])  # as the runs
    with TemporaryDirectory(ignore_cleanup_errors=True) as out:
        run = Run(replace(s, out=out, compile=False), model, stages,
                  choose_device(s.device, s.dtype)[0])
        for run.stage, stage in enumerate(stages):
            run.make_optimizers()
            batches = iter(loader(stage.examples, s.batch_size, [s.seed], 4, 0, s.share,
                                  range(s.grad_accum), s.grad_accum, workers=0))
            read = trained = 0.0
            for run.step in range(4):
                start = clock()
                parts = [good(next(batches)) for _ in range(s.grad_accum)]
                middle = clock()
                run.update(stage, parts)
                if run.step:  # the first is slower
                    read, trained = read + (middle - start) / 3, trained + (clock() - middle) / 3
            took[stage.name] = read + trained if s.device == "cpu" else max(read, trained)
        run.metrics.close()
        some, start = list(range(min(250, len(examples)))), clock()
        answer_all(model.eval(), examples, some, **run.how)
        answer, phases = (clock() - start) / len(some), defaultdict(list)
    for job in all_jobs(results):
        if not finished(results, job):
            stage = "align" if job.entry == "align" else "instruct"
            asked = 2 * len(examples) * len(tested_as(results, job))  # the second time blind
            done, held_out = steps_done(results, job), stages[-1].held_out
            if stage == "instruct" and job.name not in results["runs"]:  # not only to be tested
                times = math.ceil(s.steps / s.eval_every) - done // s.eval_every
                asked += 2 * times * min(s.eval_sample, len(held_out))
                asked += len(held_out) * (job in trials(results))
            phases[stage, job in trials(results)].append(
                beginning + (steps_of(results, job) - done) * took[stage] + asked * answer)
    at_once = results["jobs"] if s.device == "cpu" else 1  # a GPU is shared by its runs
    return sum(max(max(times), sum(times) / at_once) for times in phases.values())


def save(results: dict) -> None:
    """Write results.json, whole or not at all."""
    text = json.dumps(results, indent=1).encode()
    write_whole(Path(results["settings"]["out"]) / "results.json", lambda f: f.write(text))


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


def train_all(results: dict) -> None:
    """Run what is left, some jobs at once; raises ValueError where one fails."""
    began, running, jobs = time.time() - results["seconds"], {}, all_jobs(results)
    save(results)
    bar = tqdm(total=steps_of(results, *jobs), unit="step", dynamic_ncols=True,
               initial=sum(steps_done(results, job) for job in jobs),
               mininterval=0.2 if sys.stderr.isatty() else 60)
    try:
        while True:
            for job in startable(results):
                started = [job for job, _, _ in running.values()]
                if len(started) < results["jobs"] and job not in started:
                    pipe, process = launch(job, results)
                    left = steps_of(results, job) - steps_done(results, job)
                    running[pipe] = job, process, left
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
                if isinstance(said, int):  # steps
                    running[pipe] = job, process, left - said
                    bar.update(said)
                    continue
                del running[pipe]
                process.join()
                if isinstance(said, str):
                    log = f"{results['settings']['out']}/{job.name}/log.txt"
                    raise ValueError(f"{said} (all that it said: {log})")
                bar.update(left)  # a stage without data has none
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


def runs_of(results: dict, entry: str) -> list[dict]:
    """The runs of an entry, one per seed."""
    return [results["runs"][Job(weights_of(entry), seed, stage_2_lr(results)).name]
            for seed in results["seeds"]]


def tasks_of(results: dict) -> list[str]:
    """The tasks of the data, those of the groups first."""
    found = {task for run in results["runs"].values() for test in run["tests"].values()
             for task in test["questions"]} - {"all"}
    known = [task for some in GROUPS.values() for task in some if task in found]
    return known + sorted(found - set(known))


def grouped(results: dict) -> dict[str, list[str]]:
    """Columns of tasks: title -> the tasks of the data in it."""
    tasks = tasks_of(results)
    known = {title: [task for task in some if task in tasks] for title, some in GROUPS.items()}
    known = {f"{title} ({', '.join(some)})": some for title, some in known.items() if some}
    rest = [task for task in tasks if task not in sum(known.values(), [])]
    return known | {f"`{task}`": [task] for task in rest}


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
        "**all**": 100 * test["accuracy"]["all"],
        **{f"over {name}": math.nan for name in BASES},
        "blind": 100 * test["blind"].get("all", math.nan),
        "exist: F1": 100 * test.get("f1", math.nan), "exist: yes": 100 * test.get("yes", math.nan),
        "training loss": run["curve"][-1]["train_loss"], "parameters": run["parameters"],
        "time": 1 / np.median([max(line["samples_per_second"], 0.05) for line in run["curve"]])}


def cell(values: list[float], form: str = ".1f") -> str:
    mean, half = interval(values)
    return "-" if math.isnan(mean) else f"{mean:{form}}" + (
        "" if math.isnan(half) else f" ± {half:{form.lstrip('+')}}")


def markdown(head: list[str], rows: dict[str, list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)],
             *([f"`{entry}`", *row] for entry, row in rows.items())]
    return "\n".join("| " + " | ".join(part.replace("|", "\\|") for part in line) + " |"
                     for line in lines)


def tested(results: dict) -> dict[str, list[dict]]:
    """Entry -> its runs, one per seed; without entries of which a run has diverged."""
    found = {entry: runs_of(results, entry) for entry in results["entries"]}
    return {entry: runs for entry, runs in found.items()
            if not any("diverged" in run for run in runs)}


def table(results: dict) -> str:
    """Markdown: one row per entry, means over seeds ± 95% intervals, differences seed by seed.

    Raises ValueError if runs differ in their number of parameters: the terms would not be equal.
    """
    rows = {entry: [figures(results, entry, run) for run in runs]
            for entry, runs in tested(results).items()}
    sizes = {own["parameters"] for row in rows.values() for own in row}
    if len(sizes) > 1:
        raise ValueError(f"these runs differ in their number of parameters: {sizes}")
    for name in BASES:
        for entry, row in rows.items():
            for own, base in zip(row, rows.get(name, ())) if entry != name else ():
                own[f"over {name}"] = own["**all**"] - base["**all**"]
    seconds = [own["time"] for own in rows.get("causal", ())]
    for row in rows.values():
        for own, base in zip(row, seconds or [math.nan] * len(row)):
            own["time"] /= base
    forms = {"training loss": ".3f", "parameters": ",.0f", "time": ".2f"}
    forms |= {f"over {name}": "+.1f" for name in BASES}
    cells = {entry: {title: cell([own[title] for own in row][:1 if title == "parameters" else None],
                                 forms.get(title, ".1f")) for title in row[0]}
             for entry, row in rows.items()}
    kept = [title for title in next(iter(cells.values()), {})
            if any(row[title] != "-" for row in cells.values())] or ["**all**"]
    return markdown(["entry", *kept], {
        entry: [cells[entry][title] for title in kept] if entry in cells
        else ["diverged", *["-"] * (len(kept) - 1)] for entry in results["entries"]})


def table_by_task(results: dict) -> str:
    """Markdown: one column per task, causal's accuracy, and of other entries the differences."""
    tasks = tasks_of(results)
    own = {entry: [[100 * run["tests"][entry]["accuracy"][task] for run in runs] for task in tasks]
           for entry, runs in tested(results).items()}
    rows = {entry: [cell(column) if entry == "causal" else cell(np.subtract(column, base), "+.1f")
                    for column, base in zip(columns, own["causal"])]
            for entry, columns in own.items()}
    return markdown(["entry", *(f"`{task}`" for task in tasks)], rows)


def learning_curves(results: dict, tasks: list[str]) -> dict[str, dict[int, list[float]]]:
    """Entry -> step -> accuracy in percent on validation questions of some tasks, by seed."""
    curves = {}
    for entry, runs in tested(results).items():
        curve = curves[weights_of(entry)] = {}
        for line in (line for run in runs for line in run["curve"]):
            value = accuracy_of(line["accuracy"], line["questions"], tasks)
            if not math.isnan(value):
                curve.setdefault(line["step"], []).append(value)
    return curves


def table_by_step(results: dict) -> str:
    """Markdown: one column per evaluation, ten at most: accuracy on all of its questions."""
    curves = learning_curves(results, ["all"])
    steps = sorted(next(iter(curves.values()), []))
    shown = steps[::-1][::math.ceil(len(steps) / 10) or 1][::-1]
    return markdown(["steps", *(f"{step:,}" for step in shown)], {
        entry: [f"{np.mean(curve[step]):.1f}" for step in shown]
        for entry, curve in curves.items()})


def draw_curves(results: dict) -> Image.Image:
    """Learning curves on the validation split, a panel for all tasks and one for each group."""
    names = dict.fromkeys(weights_of(entry) for entry in tested(results))
    colors = {name: COLORS.get(name, (0, 0, 0)) for name in names}
    panels = [chart(title.strip("`"), learning_curves(results, tasks), colors,
                    results["settings"]["steps"])
              for title, tasks in ({"all": ["all"]} | grouped(results)).items()]
    rows = [join(panels[n:n + 3], gap=14) for n in range(0, len(panels), 3)]
    note = (f"accuracy (%) over steps of stage 2, {sample_of(results)}: "
            + ("mean of the seeds, and from the least to the greatest"
               if len(results["seeds"]) > 1 else "one seed"))
    key = legend(list(colors.items()), rows[0].width)
    return frame(join([key, *rows, text(note, "gray")], down=True, gap=10))


def sample_of(results: dict) -> str:
    return f"on at most {results['settings']['eval_sample']} questions of the validation split"


def report(results: dict) -> str:
    """Write results.md and curves.png into the comparison's folder; returns the former."""
    out, tried, seeds = Path(results["settings"]["out"]), trials(results), results["seeds"]
    given = {"masks": ",".join(results["entries"]), "seeds": len(seeds)} | results["given"]
    command = shlex.join(["python", "compare.py"] + [
        part for name, value in given.items() if (name, value) != ("out", default_out(given))
        for part in ([flag(name)] if value is True else [flag(name), str(value)])])
    s, split = Settings(**results["settings"]), next(iter(results["runs"].values()))["split"]
    spread = ": means over the seeds ± 95% interval (Student's t), differences seed by seed"
    parts = [
        f"`{command}`: {results['seconds'] / 60:.0f} min on {results['machine']}, runs at once: "
        f"{results['jobs']}, CPU threads of each: {results['threads']}. Seeds: "
        f"{', '.join(map(str, seeds))}.",
        f"Accuracy in percent on the {split} split, with the last weights"
        f"{spread * (len(seeds) > 1)}. Training loss: mean of the last "
        f"{(s.steps - 1) % s.eval_every + 1} steps.", table(results)]
    if "causal" in tested(results):
        parts[1] += (" Time: of one training step" + ", other runs going on beside it"
                     * (results["jobs"] > 1) + "; causal's is 1.")
        parts += ["By task, accuracy of `causal`, and the differences to it:",
                  table_by_task(results)]
    if tested(results):
        parts += [f"By steps of stage 2, accuracy {sample_of(results)}"
                  + ", means over the seeds" * (len(seeds) > 1) + ":", table_by_step(results)]
    if tried:
        lr = chosen_lr(results)
        edge = ", at the edge of what was tried" * (lr in (tried[0].lr, tried[-1].lr))
        runs = [results["runs"][job.name] for job in tried]
        scores = ", ".join(f"{run['lr']:g}: {run['val']:.1%}" if "val" in run else
                           f"{run['lr']:g}: diverged" for run in runs)
        parts.append(f"Learning rate of stage 2, for all: {lr:g}{edge}; it is the best for "
                     f"`causal` on the validation split, seed {seeds[0]} ({scores}).")
    for entry in results["entries"]:
        if lost := [str(run["seed"]) for run in runs_of(results, entry) if "diverged" in run]:
            parts.append(f"`{entry}` diverged (seed {', '.join(lost)}): it has no figures"
                         + ", nor has any other a difference to it" * (entry == "causal") + ".")
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
    if "WORLD_SIZE" in os.environ:
        raise ValueError("start it without torchrun: it runs processes of its own, --jobs")
    masks, n, jobs = given.pop("masks", None), given.pop("seeds", None), given.get("jobs")
    for name, value in (("jobs", jobs), ("seeds", n)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    path = Path(given["out"]) / "results.json"
    if resume:
        try:
            results = json.loads(path.read_text())
            if set(results) != KEYS or set(results["settings"]) != set(asdict(Settings())):
                raise ValueError("it holds other things than this version writes")
            Settings(**results["settings"]), Config(**results["config"])
            saved = results["settings"] | results["config"] | {"lr": results["lr"] or "tried"}
        except (OSError, ValueError, TypeError) as e:
            raise ValueError(f"{path}: no comparison to go on with ({e})") from None
        same_flags({name: value for name, value in given.items()
                    if value != results["given"].get(name)}, saved, (*FREE, "jobs"))
        results["settings"] |= {name: given[name] for name in FREE if name in given}
    else:
        settings, config, _ = settle(given, False)
        if "eval_every" not in given:
            settings.eval_every = max(1, settings.steps // 10)  # points of a curve
        device, reason = choose_device(settings.device, settings.dtype)
        settings.device = device.type  # on resume as well: what it is changes the last digits
        settings.dtype = "bfloat16" if in_bfloat16(device.type, settings.dtype) else "float32"
        cores = torch.get_num_threads()
        results = {"given": given, "settings": asdict(settings), "config": asdict(config),
                   "lr": given.get("lr"), "seconds": 0.0, "runs": {},
                   "jobs": jobs or (min(cores, 4) if device.type == "cpu" else 1),
                   "machine": f"{reason.removeprefix('device: ')}, torch {torch.__version__}"}
        results["threads"] = max(1, cores // results["jobs"])  # also kept, as the device
    if jobs:
        results["jobs"] = results["given"]["jobs"] = jobs
    first = results["settings"]["seed"]
    if masks is not None or not resume:
        masks = "causal,dot,image,prefix,mma" if masks is None else masks
        results["entries"] = list(dict.fromkeys(masks.split(",")))
    if n is not None or not resume:
        Settings(seed=first + (n or 3) - 1)
        results["seeds"] = list(range(first, first + (n or 3)))
    for entry in results["entries"]:
        if entry not in ENTRIES:
            raise ValueError(f"--masks: {entry!r} is none of {', '.join(ENTRIES)}")
    return results


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(
        __doc__, mask=argparse.SUPPRESS, resume="go on with the comparison in --out",
        out="directory for it (default out/compare- and the name of the data)",
        lr="Muon's peak in stage 2 (default: causal chooses of "
           + ", ".join(f"{Settings.lr * times:g}" for times in TRIED) + ")",
        eval_every="steps between evaluations (default: a tenth of --steps)")
    parser.add_argument("--masks", default=argparse.SUPPRESS, metavar="NAMES",
                        help=f"of {', '.join(ENTRIES)} (default causal,dot,image,prefix,mma); "
                             "with --resume the whole list anew: what is trained is kept")
    parser.add_argument("--seeds", type=int, default=argparse.SUPPRESS,
                        help="how many in all, from --seed on (default 3)")
    parser.add_argument("--jobs", type=int, default=argparse.SUPPRESS,
                        help="runs at once (default: one a CPU core, at most 4; on a GPU 1)")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's & ignores the former
        signal.signal(number, signal.default_int_handler)
    given["out"] = given.get("out") or default_out(given)
    out, stack = Path(given["out"]), ExitStack()
    try:
        if resume and (out / "results.json").exists():  # before it is read: who holds it may write
            stack.enter_context(hold(out))
        results = settled(given, resume)
        if left := sum(not finished(results, job) for job in all_jobs(results)):
            minutes = math.ceil(predict(results) / 60)
            if results["settings"]["device"] == "cuda":
                torch.cuda.empty_cache()  # for the runs
            print(f"runs: {left}, at once: {results['jobs']}, CPU threads of each: "
                  f"{results['threads']}, minutes: about {minutes}", flush=True)
        if not resume:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(out))
            refuse_used(out)  # again: another may have come and gone while this one predicted
        train_all(results)
        print(report(results))
    except KeyboardInterrupt:
        if (out / "results.json").exists():
            argv = argv if resume else ["--out", given["out"], "--resume"]
            print(f"stopped; what was trained is kept; to go on:\n  "
                  f"{shlex.join(['python', 'compare.py', *argv])}", file=sys.stderr)
        raise SystemExit(130)
    except (ValueError, OSError, FloatingPointError) as e:
        fail(e)
    finally:
        stack.close()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    main()
