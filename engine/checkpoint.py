"""Checkpoints: what a run begins with, from flags or files, and what it leaves to go on with."""
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from engine.flags import as_command, flag, pick, quoted
from engine.folder import refuse_used
from engine.processes import rank_and_world
from nanoaki import PRESETS, Config, NanoAKI, load_file, save_file

RESUMED = ("out", "device", "workers", "save_every", "features", "vocab_size")  # free on --resume
THERE = ("data", "skip_bad")  # free too: the folder may have moved, a picture may have broken
INIT = ("mask", "dropout", "order")  # fields of Config free with --init
STAGE_1 = ("align_steps", "align_lr", "preset")  # settings of no use where stage 1 is over


@dataclass
class Progress:
    """How far a run has come; with weights and optimizers, all that it takes to go on."""
    stage: int = 0          # index of the stage
    step: int = 0           # in it
    best: float = math.inf  # lowest held-out loss of stage 2: that of model.pt
    losses: list = field(default_factory=list)  # of each step since the last evaluation
    metrics: int = 0        # bytes of metrics.jsonl
    seconds: float = 0.0
    world: int = 1          # processes
    left_out: int = 0       # examples of batches whose pictures could not be read, with skip_bad
    data: dict = field(default_factory=dict)  # name -> digest of each file of records


def save_run(path: Path, settings, model: NanoAKI, optimizers: list[torch.optim.Optimizer],
             progress: Progress) -> None:
    """Write last.pt, whole or not at all; raises OSError."""
    save_file({"settings": asdict(settings), "config": asdict(model.config),
               "merges": model.tokenizer.merges, "model": model.state_dict(),
               "optimizers": [o.state_dict() for o in optimizers], **asdict(progress)}, path)


def saved_progress(state: dict) -> Progress:
    return Progress(**{f.name: state[f.name] for f in fields(Progress)})


def settle(cls, flags: dict, resume: bool) -> tuple:
    """Settings (of a class), Config, and the path of the checkpoint to start from, or None.

    Raises ValueError where flags, folder and checkpoint do not go together.
    """
    settings = None if resume else cls(**pick(cls, flags))  # where a run goes on, most are its own
    out = Path(flags.get("out") or Path("out") / Path(flags.get("data", cls.data)).name)
    if resume:
        start = out / "last.pt"
        state = load_file(start)
        if (not {"optimizers", *(f.name for f in fields(Progress))} <= state.keys()
                or set(state["settings"]) != {f.name for f in fields(cls)}):
            raise ValueError(f"{start}: not a run of this version that can be resumed; "
                             f"--init takes its model")
        same_flags(flags, state["config"], cls(**state["settings"]), out)
        settings, config = cls(**state["settings"] | pick(cls, flags)), Config(**state["config"])
    elif settings.init:
        refuse_used(out)
        start, state = settings.init, load_file(settings.init)
        config = NanoAKI.load(start, new_parts=True).config
        parts = {name.split(".")[0] for name in state["model"]}
        if "decoder" in parts and state["merges"] is None:
            raise ValueError(f"--init: {start} was saved without a tokenizer")
        free = INIT if "decoder" in parts else (*INIT, "block_size")  # a new one's data choose it
        for name in flags:
            if name == "preset" or name in state["config"] and name not in free:
                raise ValueError(f"--init brings its own config: leave out {flag(name)}")
        for part in filter(None, settings.freeze.split(",")):
            if part not in parts:
                raise ValueError(f"--freeze: {start} has no {part}, so it is new: train it")
        config, steps = replace(config, **config_flags(flags)), settings.align_steps
        if "projector" in parts:  # it is trained: stage 1 is repeated where that is asked for
            steps = flags.get("align_steps", 0)
        if not steps and "align_lr" in flags:
            raise ValueError("--align-lr is of stage 1, which --init skips: give --align-steps too")
        settings = replace(settings, align_steps=steps, order=flags.get("order", config.order))
    else:
        refuse_used(out)
        start, config = None, replace(PRESETS[settings.preset], **config_flags(flags))
    settings.out = str(out)
    parts = rank_and_world()[1] * settings.grad_accum
    if settings.batch_size < parts:
        raise ValueError(f"batch_size {settings.batch_size} is less than the processes times "
                         f"grad_accum, {parts}")
    return settings, config, start


def config_flags(flags: dict) -> dict:
    """The flags that are fields of Config: a model trained in dual order is asked image-first."""
    found = pick(Config, flags)
    if found.get("order") == "dual":
        found["order"] = "image"
    return found


def same_flags(flags: dict, config: dict, settings, out: Path) -> None:
    """Raise ValueError for a flag that was another when the run began, and say what does it."""
    saved = config | asdict(settings)
    changed = [name for name in flags if name not in RESUMED + THERE and flags[name] != saved[name]]
    fixed = [name for name in changed if name in STAGE_1 or name in config and name not in INIT]
    for name in fixed or changed:
        advice = "leave it out, or choose another --out"
        if not fixed:
            advice = f"to train its model on: {train_on(out, settings, flags)}"
        raise ValueError(f"--resume: {flag(name)} was {saved[name]!r} when it began, not "
                         f"{flags[name]!r}; {advice}")


def same_data(saved: dict, found: dict, settings, flags: dict) -> None:
    """Raise ValueError if files of records are not those that a run began with (Progress.data)."""
    for name in sorted(saved.keys() | found.keys()):
        if saved.get(name) != found.get(name):
            raise ValueError(f"--resume: {Path(settings.data) / name} is not as it was when the "
                             f"run began: put it back; or, to train its model on: "
                             f"{train_on(Path(settings.out), settings, flags)}")


def train_on(out: Path, settings, flags: dict) -> str:
    """The command of another run that begins with a run's model: its settings, but for flags."""
    left_out = ("out", "init", *STAGE_1)
    kept = {f.name: getattr(settings, f.name) for f in fields(settings)
            if f.name not in left_out and getattr(settings, f.name) != f.default}
    brought = [f.name for f in fields(Config) if f.name not in INIT]
    new = {name: value for name, value in flags.items() if name not in (*left_out, *brought)}
    begin = {"init": out / "model.pt", "out": f"{out}-on"}
    return quoted(as_command("train.py", begin | kept | new))
