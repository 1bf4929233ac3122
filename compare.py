"""
Train every mask on equal terms: the same weights to begin with, data, order and steps.

    python compare.py --masks causal,text,dot,image,prefix,mma --seeds 3
    python compare.py --masks causal,mma --seeds 1 --steps 1000 --lr 0.0035 --out out/first

For every seed train.py trains stage 1, and from its weights stage 2 for each entry; sample.py asks
the last ones. What is kept is in their folders: stopped or killed, the same command goes on, and
with another list of --masks or another number of --seeds it reuses what is trained.
"""
import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from tqdm import tqdm

from data.llava import file_of
from data.shapes import find
from engine.checkpoint import INIT, RESUMED, settle
from engine.children import failure, start, stop, wait_for_others
from engine.device import choose_device
from engine.flags import Parser, as_command, flag, leave, one_line, pick, quoted, run_script
from engine.folder import hold, refuse_used, write_whole
from engine.results import Result, Results, draw_curves, table, table_by_task
from engine.scores import Answered, scores
from nanoaki import MASKS, Config, load_file
from train import Settings


class Entry(NamedTuple):
    weights: str  # the entry that they are trained as, and that names their folder
    mask: str     # of their stage 2
    order: str    # of pictures and text, in both stages
    asked: str    # the mask that they are asked under


ENTRIES = {name: Entry(name, name, "data", name) for name in MASKS}
ENTRIES |= {"text": Entry("text", "causal", "text", "causal"),
            "dot": Entry("dot", "causal", "dual", "causal"),
            "mma@eval": Entry("causal", "causal", "data", "mma")}
NOTES = {
    "text": "causal, with pictures after the text in both stages and when asked (the paper's T&I)",
    "dot": "causal, with pictures before and after the text by turns, a step each, in both stages, "
           "and asked with pictures first (the paper's DOT, which takes twice the steps)",
    "mma@eval": "the weights of causal, asked under MMA (arXiv 2505.18605)",
    "leaky": "a lesson: image rows see the answer, so the loss falls and nothing is learned"}
COLORS = {"causal": (0, 114, 178), "text": (230, 159, 0), "dot": (86, 180, 233),
          "image": (0, 158, 115), "prefix": (204, 121, 167), "mma": (213, 94, 0),
          "leaky": (130, 130, 130)}
TRIED = [Settings.lr * times for times in (0.25, 0.5, 1)]  # causal chooses; MMA bears the default
FREE = ("device", "workers", "save_every", "features")  # flags that may change in going on
ASKED = ("device", "dtype", "skip_bad")                 # flags that sample.py has as well
SCRIPTS = Path(__file__).parent


class Run(NamedTuple):
    """A run of train.py and what sample.py asks it; its folder tells how far both are."""
    folder: Path
    flags: dict      # of train.py
    split: str = ""  # that it is asked in the end; "" for nothing
    mask: str = ""   # that it is asked under

    @property
    def answers(self) -> Path:
        return self.folder / f"answers-{self.split}-{self.mask}.jsonl"

    @property
    def steps(self) -> int:
        return self.flags["steps"] or self.flags["align_steps"]

    def lines(self) -> list[dict]:
        """Its metrics.jsonl; a line that is half-written is none yet."""
        path = self.folder / "metrics.jsonl"
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in whole]

    def steps_made(self) -> int:
        lines = self.lines()
        return lines[-1]["step"] if lines else 0

    def diverged(self) -> bool:
        """Whether stage 2 did, which is a result: it is not trained again."""
        return any(line["stage"] == "instruct" and "diverged" in line for line in self.lines())

    def trained(self) -> bool:
        """Whether it has diverged, or last.pt is of after its last step."""
        return self.diverged() or (self.steps_made() == self.steps
                                   and load_file(self.folder / "last.pt")["stage"] == 1)

    def finished(self) -> bool:
        return self.trained() and (not self.split or self.diverged() or self.answers.exists())

    def scores(self) -> dict:
        lines = self.answers.read_text(encoding="utf-8").splitlines()
        return scores([Answered(**json.loads(line)) for line in lines])


@dataclass
class Comparison:
    """What is wanted; how far it is stands in the folders."""
    out: Path
    entries: list[str]
    seeds: list[int]
    flags: dict         # of train.py, for all runs
    settings: Settings  # that they make
    config: Config      # of all runs, but for mask and order
    lr: float | None    # of stage 2; None: causal chooses
    aligns: bool        # whether there is a stage 1
    split: str          # that is reported on
    jobs: int           # processes at once
    threads: int        # of each
    machine: str

    def stage_1(self, seed: int, order: str) -> Run:
        flags = self.flags | {"align_steps": self.settings.align_steps, "steps": 0, "order": order,
                              "seed": seed, "test_sample": 0}
        del flags["eval_every"]
        return Run(self.out / f"seed{seed}/align-{order}", flags)

    def stage_2(self, entry: str, seed: int, lr: float) -> Run:
        """The training of an entry's weights, and what they are asked as that entry."""
        how, flags = ENTRIES[entry], dict(self.flags)
        if self.aligns:
            brought = {"align_lr", "preset", *asdict(self.config)} - set(INIT)
            flags = {name: value for name, value in flags.items() if name not in brought}
            flags["init"] = str(self.stage_1(seed, how.order).folder / "last.pt")
        flags |= {"align_steps": 0, "mask": how.mask, "order": how.order, "seed": seed, "lr": lr,
                  "test_sample": 0}
        folder = self.out / f"seed{seed}/{how.weights}-{lr:g}"
        return Run(folder, flags, self.split, how.asked)

    def phases(self, lr: float) -> tuple[list[Run], list[Run], list[Run]]:
        """Stage 1; the trials of causal that choose the learning rate; stage 2 at that rate."""
        trials = [self.stage_2("causal", self.seeds[0], rate) for rate in TRIED if not self.lr]
        second = [self.stage_2(entry, seed, lr) for seed in self.seeds for entry in self.entries]
        begun = [(run.flags["seed"], run.flags["order"]) for run in trials + second]
        first = [self.stage_1(*one) for one in dict.fromkeys(begun) if self.aligns]
        return first, [run._replace(split="val") for run in trials], second

    def best_lr(self) -> float:
        """The rate given, or the one best for causal; raises ValueError if all have diverged."""
        if self.lr:
            return self.lr
        runs = [run for run in self.phases(Settings.lr)[1] if not run.diverged()]
        if not runs:
            raise ValueError("causal diverges at every learning rate that was tried: begin anew, "
                             "with a lower --lr and another --out")
        return max(runs, key=lambda run: run.scores()["accuracy"]["all"]).flags["lr"]

    def next_command(self, run: Run) -> list[str]:
        """What trains a run, goes on with it, or asks it."""
        script, names, last = "train.py", FREE, run.folder / "last.pt"
        if run.trained():
            script, names = "sample.py", ASKED
            flags = {"model": last, "data": self.settings.data, "split": run.split,
                     "mask": run.mask, "out": run.answers}
        elif last.exists():
            flags = {"out": run.folder, "resume": True}
        else:
            flags = run.flags | {"out": run.folder}
        flags |= {name: self.flags[name] for name in names if name in self.flags}
        return [sys.executable, *as_command(str(SCRIPTS / script), flags)[1:]]

    def refuse_other_flags(self, run: Run) -> None:
        """Raise ValueError that names a flag which was another when a run's folder was begun."""
        path = run.folder / "config.json"
        if path.exists():
            saved = json.loads(path.read_text())
            saved = saved["config"] | saved["settings"]
            wanted = asdict(self.config) | pick(Config, run.flags)
            wanted |= asdict(Settings(**pick(Settings, run.flags)))
            if self.aligns and run.flags["steps"]:  # the comparison's folder may have been renamed
                for known in saved, wanted:
                    known["init"] = Path(known["init"]).parent.name
            free = RESUMED
            if "block_size" not in self.flags:  # then the data may have chosen it
                free = (*RESUMED, "block_size")
            for name, value in wanted.items():
                if name not in free and saved.get(name) != value:
                    raise ValueError(f"{run.folder}: {flag(name)} was {saved.get(name)!r} there, "
                                     f"not {value!r}: choose another --out")


def steps_made(runs: list[Run]) -> int:
    return sum({run.folder: run.steps_made() for run in runs}.values())


def do(comparison: Comparison, runs: list[Run], bar: tqdm, at_work: TextIO) -> None:
    """Train and ask some runs; where one fails, the others save and ValueError is raised."""
    waiting = [run for run in runs if not run.finished()]
    running = {}  # folder -> run and its process
    others = bar.n - steps_made(runs)
    try:
        while waiting or running:
            for run in list(waiting):
                if len(running) < comparison.jobs and run.folder not in running:
                    waiting.remove(run)
                    command = comparison.next_command(run)
                    process = start(command, run.folder, comparison.threads, at_work)
                    running[run.folder] = run, process
            time.sleep(0.2)
            bar.update(others + steps_made(runs) - bar.n)
            for run, process in list(running.values()):
                if process.poll() is not None:
                    del running[run.folder]
                    if process.returncode and not run.diverged():
                        raise failure(run.folder, process.returncode)
                    if not run.finished():  # but trained: it is to be asked
                        waiting.insert(0, run)
    finally:
        stop([process for _, process in running.values()])


def do_all(comparison: Comparison, at_work: TextIO) -> float:
    """Stage 1, the choice of the learning rate, which is returned, and stage 2."""
    first, trials, second = comparison.phases(Settings.lr)
    if all(run.finished() for run in trials):  # the rate is known, and what is trained at it
        second = comparison.phases(comparison.best_lr())[2]
    total = sum({run.folder: run.steps for run in first + trials + second}.values())
    with tqdm(total=total, initial=steps_made(first + trials + second), smoothing=0, miniters=0,
              mininterval=0.2 if sys.stderr.isatty() else 60,
              bar_format="{l_bar}{bar:20}| {n} of {total} steps, about {remaining} left") as bar:
        do(comparison, first, bar, at_work)
        do(comparison, trials, bar, at_work)
        lr = comparison.best_lr()
        do(comparison, comparison.phases(lr)[2], bar, at_work)
    return lr


def all_results(comparison: Comparison, lr: float) -> Results:
    """What came of each entry, by seed; without those that have diverged with a seed."""
    found = {}
    for entry in comparison.entries:
        runs = [comparison.stage_2(entry, seed, lr) for seed in comparison.seeds]
        if not any(run.diverged() for run in runs):
            found[entry] = [Result(run.scores(), run.lines()) for run in runs]
    return found


def about_lr(comparison: Comparison, lr: float) -> str:
    """How the learning rate was chosen."""
    tried, edge = [], ", at the edge of what was tried" if lr in (TRIED[0], TRIED[-1]) else ""
    for run in comparison.phases(lr)[1]:
        found = "diverged" if run.diverged() else f"{run.scores()['accuracy']['all']:.1%}"
        tried.append(f"{run.flags['lr']:g}: {found}")
    return (f"Learning rate of stage 2, for all: {lr:g}{edge}; it is the best for `causal` on the "
            f"validation split, seed {comparison.seeds[0]} ({', '.join(tried)}).")


def report(comparison: Comparison, lr: float, command: str) -> str:
    """Write results.md and curves.png into the comparison's folder; returns the former."""
    c, s, results = comparison, comparison.settings, all_results(comparison, lr)
    curves = {entry: some for entry, some in results.items()
              if ENTRIES[entry].mask == ENTRIES[entry].asked}
    runs = {run.folder: run for some in c.phases(lr) for run in some}
    minutes = sum(run.lines()[-1]["seconds"] for run in runs.values()) / 60
    sample = f"on at most {s.eval_sample} questions of the validation split"
    parts = [
        f"`{command}`: {minutes:.0f} min of training on {c.machine}, runs at once: {c.jobs}, CPU "
        f"threads of each: {c.threads}. Seeds: {', '.join(map(str, c.seeds))}.",
        f"Accuracy in percent on the {c.split} split, with the last weights: means over the seeds "
        f"± 95% interval (Student's t), differences seed by seed. Training loss: mean of the last "
        f"{(s.steps - 1) % s.eval_every + 1} steps. Time: of a step, causal's is 1. Steps to 80%: "
        f"to the first evaluation, {sample}, with so many right.",
        table(c.entries, results, curves)]
    if "causal" in results:
        parts += ["By task, accuracy of `causal`, and the differences to it:",
                  table_by_task(results)]
    if not c.lr:
        parts.append(about_lr(c, lr))
    for entry in c.entries:
        if entry not in results:
            seeds = [str(n) for n in c.seeds if c.stage_2(entry, n, lr).diverged()]
            parts.append(f"`{entry}` diverged (seed {', '.join(seeds)}): it has no figures, and no "
                         f"entry has a difference to it.")
        if entry in NOTES:
            parts.append(f"`{entry}`: {NOTES[entry]}.")
    write_whole(c.out / "results.md", "\n\n".join(parts) + "\n")
    note = f"accuracy (%) over steps of stage 2, {sample}: mean of the seeds, and least to greatest"
    draw_curves(curves, COLORS, s.steps, note).save(c.out / "curves.png")
    return "\n\n".join(parts)


def plan(masks: str, seeds: int, jobs: int | None, flags: dict) -> Comparison:
    """The comparison that is asked for; raises ValueError where it makes no sense."""
    if "WORLD_SIZE" in os.environ:
        raise ValueError("start it without torchrun: it runs processes of its own, --jobs")
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    entries = list(dict.fromkeys(masks.split(",")))
    for entry in entries:
        if entry not in ENTRIES:
            raise ValueError(f"--masks: {entry!r} is none of {', '.join(ENTRIES)}")
    out = Path(flags.get("out") or f"out/compare-{Path(flags.get('data', Settings.data)).name}")
    flags.setdefault("steps", Settings.steps)
    flags.setdefault("eval_every", max(1, flags["steps"] // 10))  # points of a curve
    settings, config, _ = settle(Settings, flags | {"out": str(out / "new")}, resume=False)
    replace(settings, seed=settings.seed + seeds - 1)  # raises ValueError as well
    if not settings.steps:
        raise ValueError("steps must be at least 1, not 0: it is stage 2 that is compared")
    device, reason = choose_device(settings.device, settings.dtype)
    cores, folder = torch.get_num_threads(), find(settings.data)
    jobs = jobs or (min(cores, 4) if device.type == "cpu" else 1)
    if not file_of(folder, "train"):
        raise ValueError(f"there is no {folder / 'train.json'}")
    if settings.looks_once:  # one ViT, one look, for all runs
        flags.setdefault("features", str(out))
    aligns = settings.align_steps > 0 and (folder / "captions.json").exists()
    return Comparison(
        out, entries, list(range(settings.seed, settings.seed + seeds)),
        {name: value for name, value in flags.items() if name not in ("out", "seed", "lr")},
        settings, config, flags.get("lr"), aligns,
        "test" if (folder / "test.json").exists() else "val", jobs, max(1, cores // jobs),
        f"{reason.removeprefix('device: ')}, torch {torch.__version__}")


def make_parser() -> Parser:
    parser, no = Parser(__doc__), argparse.SUPPRESS
    parser.add_argument("--masks", default="causal,dot,image,prefix,mma", metavar="NAMES",
                        help=f"of {', '.join(ENTRIES)} (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on (default 3)")
    parser.add_argument("--jobs", type=int, help="runs at once (default: one a CPU core, at most "
                        "4; on a GPU 1); the threads of each change the last digits")
    parser.add_fields(
        "training", Settings, order=no, test_sample=no,
        out="directory for it (default out/compare- and the name of the data)",
        lr=f"Muon's peak learning rate in stage 2 (default: causal chooses of {TRIED})",
        eval_every="steps between evaluations (default: a tenth of --steps)")
    parser.add_fields("model; defaults of preset nano", Config, mask=no, order=no)
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    command = quoted(["python", "compare.py", *argv])
    flags = vars(make_parser().parse_args(argv))
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's & ignores the former
        signal.signal(number, lambda _, frame: leave(signal.SIGINT, frame))  # as Ctrl-C, both
    try:
        with one_line():
            c = plan(flags.pop("masks"), flags.pop("seeds"), flags.pop("jobs"), flags)
            if c.out.exists() and not any(c.out.glob("seed*")):
                refuse_used(c.out)
            c.out.mkdir(parents=True, exist_ok=True)
            with hold(c.out):
                with wait_for_others(c.out) as at_work:
                    for lr in [c.lr] if c.lr else TRIED:
                        for run in sum(c.phases(lr), []):
                            c.refuse_other_flags(run)
                    lr = do_all(c, at_work)
                print(report(c, lr, command))
    except KeyboardInterrupt:
        print(f"stopped; what was trained is kept; the same command goes on:\n  {command}",
              file=sys.stderr)
        raise SystemExit(130)


if __name__ == "__main__":
    run_script(main)
