"""
Train a vision-language model with modality-mutual attention: on captions, then on questions.

    python train.py                                     # shapes: six minutes on two CPU cores
    python train.py --mask causal --out out/causal      # the same under another mask
    python train.py --resume                            # go on after Ctrl-C
    torchrun --nproc_per_node=2 train.py                # on two processes or GPUs
"""
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import shapes
from data.batches import Batches, Order
from data.llava import Examples, fit_tokens, read_splits, say_once
from engine.charts import draw_run
from engine.checkpoint import Progress, same_data, save_run, saved_progress, settle
from engine.command import ask_command, example_to_ask
from engine.device import Objective, choose_device, in_bfloat16, keep_freed_memory
from engine.evaluation import draw_answered, examine, report
from engine.features import Features
from engine.flags import Parser, escaped, one_line, quoted, run_script
from engine.folder import Metrics, hold, refuse_used, save_picture, write_whole
from engine.optimizer import make_optimizers, schedule
from engine.processes import (StopSignal, first_does, in_parallel, joined_processes, load,
                              rank_and_world, total)
from engine.scores import percent, scores
from nanoaki import PRESETS, Batch, Config, NanoAKI, Tokenizer, check_knobs, knob, load_file


@dataclass
class Settings:
    """What a run is, beside the shape of its model (Config): every field is a flag."""
    data: str = knob("shapes", "'shapes', or a folder in LLaVA's format (data/README.md)")
    out: str = knob("", "folder of the run; '' is out/ and the name of the data")
    preset: str = knob("nano", f"{', '.join(PRESETS)}: size of the model, refined by its flags",
                       choices=list(PRESETS))
    seed: int = knob(0, "draws weights and order of the data: same seed and threads, same run", 0)
    align_steps: int = knob(400, "steps of stage 1: captions, under the causal mask; 0: none", 0)
    steps: int = knob(3400, "steps of stage 2: questions and answers, under --mask; 0: none", 0)
    order: str = knob("data", "pictures where the data have them, before the text ('image') or "
                              "after it ('text') of their turn, or each in turn ('dual')",
                      choices=["data", "image", "text", "dual"])
    init: str = knob("", "checkpoint to begin from, with its tokenizer and config: a trained one, "
                         "in stage 2 but for --align-steps, or engine/pretrained.py's, in stage 1")
    freeze: str = knob("", "vit, decoder or both, with a comma: keep them as --init has them")
    features: str = knob("", "folder for what a frozen ViT says of each picture, which runs on the "
                             "same data can share; '' is --out")
    batch_size: int = knob(32, "examples a step, over all processes: more are slower, steadier", 1)
    grad_accum: int = knob(1, "parts that a process splits its share of a batch into: less memory",
                           1)
    align_lr: float = knob(0.02, "Muon's peak learning rate in stage 1")
    lr: float = knob(0.004, "Muon's peak in stage 2; 0.01 destroys what stage 1 has learned")
    adamw_lr: float = knob(0.002, "AdamW's peak in both stages: embeddings, head, norms, biases")
    weight_decay: float = knob(0.0, "pull of matrices towards 0, times learning rate: for few data",
                               0)
    warmup: int = knob(50, "steps in which the learning rate rises; over the last 35% it falls", 1)
    eval_every: int = knob(680, "steps of stage 2 between evaluations", 1)
    eval_sample: int = knob(500, "held-out questions in each of them; the final test takes all", 1)
    test_sample: int = knob(5000, "questions of the final report where there is no test.json, at "
                                  "most; 0: no report, with or without", 0)
    save_every: float = knob(60.0, "seconds between checkpoints: what a crash can cost", 0)
    share: int = knob(7, "questions about a picture that stand together: encoded once a batch", 1)
    workers: int = knob(-1, "processes that read and decode pictures; 0: the training process; "
                            "-1: one, on a GPU four", -1)
    augment: bool = knob(False, "vary pictures in ways that keep answers true: for few pictures")
    skip_bad: bool = knob(False, "leave bad records out, counted, where the run would be refused")
    compile: bool = knob(False, "torch.compile: a slow start, then faster steps on a GPU")
    attention: str = knob("dense", "dense masks, or flex: torch's flex_attention, on a CUDA GPU, "
                                   "for sequences of thousands of tokens",
                          choices=["dense", "flex"])
    dtype: str = knob("auto", "float32 or bfloat16 (autocast); auto is bfloat16 on recent GPUs",
                      choices=["auto", "float32", "bfloat16"])
    device: str = knob("auto", "auto, cpu, cuda or mps")

    def __post_init__(self):
        check_knobs(self)
        if self.seed >= 10 ** 9:
            raise ValueError(f"seed must be below 10^9, not {self.seed}")
        for name in ("align_lr", "lr", "adamw_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for part in filter(None, self.freeze.split(",")):
            if part not in ("vit", "decoder"):
                raise ValueError(f"freeze {self.freeze!r} must be vit, decoder or vit,decoder")
        if self.features and not self.looks_once:
            raise ValueError("features are of a frozen ViT (--freeze vit) without --augment")
        if self.freeze and not self.init:
            raise ValueError("freeze needs init: a part that was never trained knows nothing")
        if self.attention == "flex" and self.compile:
            raise ValueError("attention flex compiles itself: it needs compile off")
        if not self.steps and not self.align_steps:
            raise ValueError("there is nothing to train: steps is 0, and there is no stage 1")

    @property
    def looks_once(self) -> bool:
        """Whether the ViT says the same of a picture in every step."""
        return "vit" in self.freeze and not self.augment


@dataclass
class Stage:
    name: str           # "align": captions, causal mask; "instruct": answers, the run's mask
    number: int         # 0 or 1: its seed, whether the other is trained or not
    examples: Examples  # to train on
    held_out: Examples
    mask: str
    steps: int
    lr: float
    eval_every: int     # steps
    eval_sample: int    # held-out examples


class Run:
    """A model in training, in its folder."""

    def __init__(self, settings: Settings, model: NanoAKI, stages: list[Stage],
                 device: torch.device, progress: Progress):
        self.settings, self.model, self.stages = settings, model, stages
        self.device, self.progress, self.out = device, progress, Path(settings.out)
        self.rank, self.world = rank_and_world()
        self.metrics = Metrics(os.devnull if self.rank else self.out / "metrics.jsonl")
        self.objective = Objective(model, device, settings.dtype)
        wrapped = torch.compile(self.objective) if settings.compile else self.objective
        self.parallel = in_parallel(wrapped, device)
        self.optimizers = []
        room = 4 * settings.batch_size // (self.world * settings.grad_accum)  # where training fits
        self.how = {"dtype": settings.dtype, "batch_size": min(250, max(1, room))}
        self.began = self.saved = time.perf_counter()
        self.waited = self.trained = self.evaluated = 0.0  # seconds of this process
        self.said = set()  # why examples were left out
        self.learn()

    def learn(self) -> None:
        """Into training mode, with which dropout comes, but for frozen parts."""
        self.model.train()
        for part in self.model.children():
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()

    def step(self, stage: Stage, parts: tuple[Batch, ...], targets: int) -> float:
        """Batch, loss, gradient, optimizers; returns the loss.

        parts are this process's; targets is how many the step's whole batch has. Raises
        FloatingPointError, before weights are touched.
        """
        s, loss = self.settings, torch.zeros((), device=self.device)
        seed = s.seed * 10 ** 9 + stage.number * 10 ** 8 + self.progress.step
        torch.manual_seed((seed * self.world + self.rank) % 2 ** 63)  # dropout: as ever, on resume
        for n, part in enumerate(parts):
            last = n + 1 == len(parts)  # with which DDP takes its mean over processes
            weight = len(part.learned) / max(1, targets)  # a mean of means favours short answers
            with nullcontext() if last or self.world == 1 else self.parallel.no_sync():
                mean = self.parallel(part, stage.mask)
                (mean * (weight * self.world)).backward()
            loss = loss + mean.detach() * weight
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        loss, norm = read(loss, norm)
        loss, rate = total(loss)[0], schedule(self.progress.step, stage.steps, s.warmup)
        if not math.isfinite(loss + norm):
            ids = " ".join(id for part in parts for id in part.ids)
            what = (f"loss {loss}, gradient norm {norm}, at learning rate {stage.lr * rate:.2g}; "
                    f"the batch, or this process's part of it: {ids}")
            self.log(stage=stage.name, step=self.progress.step, diverged=what)
            if self.rank > 0:
                raise SystemExit(2)  # the first process says it
            raise FloatingPointError(f"{stage.name} step {self.progress.step}: {what}; "
                                     f"{self.out / 'last.pt'} is of before")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * rate
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def train(self) -> None:
        """All stages to their end; where a signal asks for a stop, save and leave with its code."""
        with StopSignal() as self.signal:
            stop = 0
            while self.progress.stage < len(self.stages) and not stop:
                stop = self.train_stage(self.stages[self.progress.stage])
            stop = stop or self.agree(0, "")[1]  # it may have come with the last step
            if stop:
                self.save()
                command = quoted(["python", "train.py", "--out", str(self.out), "--resume"])
                print(f"stopped; {self.out / 'model.pt'} can be asked; to go on:\n  {command}",
                      flush=True)
                raise SystemExit(128 + stop)

    def train_stage(self, stage: Stage) -> int:
        """Steps of a stage up to its end, or to a signal, which is returned."""
        s, now, clock = self.settings, self.progress, time.perf_counter
        batches, examples, seconds, stop = self.load(stage), 0, 0.0, 0
        with tqdm(total=stage.steps, initial=now.step, desc=stage.name, unit="step",
                  dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 30,
                  disable=self.rank > 0) as bar:
            while now.step < stage.steps and not stop:
                due = now.step + 1 == stage.steps or (now.step + 1) % stage.eval_every == 0
                if due or clock() - self.saved > s.save_every:
                    self.save()  # also before an evaluation, which may find a broken picture
                start = clock()
                parts = next(batches)
                self.waited += clock() - start
                problem = " ".join(part.problem for part in parts).strip()
                unread = [reason for part in parts for reason in part.unread]
                for reason in unread:
                    say_once(f"left out: {reason}", self.said)
                targets, stop, broken, left_out = self.agree(
                    sum(len(part.learned) for part in parts), problem, len(unread))
                if broken:
                    self.save()
                    if problem:
                        raise ValueError(problem)
                    raise SystemExit(2)  # another process says it
                now.left_out += left_out
                now.losses.append(self.step(stage, parts, targets))
                now.step += 1
                seconds += clock() - start
                examples += s.batch_size
                bar.update()
                bar.set_postfix_str(f"loss {np.mean(now.losses[-50:]):.3f}, "
                                    f"{examples / seconds:.0f} samples/s", refresh=False)
                if due:
                    self.trained += seconds
                    self.evaluate(stage, examples / seconds)
                    now.losses, examples, seconds = [], 0, 0.0
        self.trained += seconds
        if now.step == stage.steps:
            now.stage, now.step = now.stage + 1, 0
            self.make_optimizers()
            self.save()
        return stop

    def agree(self, targets: int, problem: str, left_out: int = 0) -> tuple[int, int, bool, int]:
        """Over all processes: targets of a step, signal to stop, any problem, examples left out.

        On the CPU: what processes agree on before a step is known there.
        """
        mine = self.signal.number  # read once: a later signal is for the next time that all agree
        targets, signals, problems, left_out = total(targets, mine, float(problem != ""), left_out)
        stop = mine
        if signals and not mine:
            stop = signal.SIGTERM
        return int(targets), stop, problems > 0, int(left_out)

    def load(self, stage: Stage):
        """For each step that is left of a stage, this process's parts of its batch."""
        s, accum, orders = self.settings, self.settings.grad_accum, (self.model.config.order,)
        if s.order == "dual":
            orders = ("image", "text")
        order = Order(stage.examples.lengths, stage.examples.replies.group, s.batch_size,
                      stage.steps, [s.seed, stage.number], s.share)
        order.prepare(self.progress.step)  # for all workers, which are begun below
        augment_seed = [s.seed, stage.number] if s.augment else None
        parts = [Batches(stage.examples, order, self.rank * accum + n, self.world * accum, orders,
                         augment_seed) for n in range(accum)]
        return load(parts, self.progress.step, s.workers, self.device)

    def make_optimizers(self) -> None:
        """New ones for each stage; none after the last."""
        self.optimizers, s = [], self.settings
        if self.progress.stage < len(self.stages):
            lr = self.stages[self.progress.stage].lr
            self.optimizers = make_optimizers(self.model, lr, s.adamw_lr, s.weight_decay,
                                              in_bfloat16(self.device.type, s.dtype))

    def evaluate(self, stage: Stage, speed: float) -> None:
        """Score held-out examples, always the same; in stage 2 the lowest loss makes model.pt."""
        start, instruct, now = time.perf_counter(), stage.name == "instruct", self.progress
        self.model.eval()
        loss, answered = examine(self.objective, stage.held_out, stage.eval_sample, stage.mask,
                                 instruct, **self.how)
        self.learn()
        if not answered:
            print("no held-out picture can be read: there is nothing to evaluate")
            return
        found, train_loss = scores(answered), float(np.mean(now.losses))
        self.log(stage=stage.name, step=now.step, train_loss=train_loss, val_loss=loss, **found,
                 samples_per_second=round(speed, 1))
        shown = answered[now.step // stage.eval_every % len(answered)]
        tqdm.write(f"{stage.name} step {now.step}: train loss {train_loss:.3f}, held-out loss "
                   f"{loss:.3f}, exact match {percent(found['accuracy']['all'])} (blind "
                   f"{percent(found['blind'].get('all'))}), {speed:.0f} samples/s\n"
                   f"    {escaped(shown.question)}   right: {escaped(shown.right)}   "
                   f"model: {escaped(shown.answer)}")
        if instruct and loss < now.best:
            now.best = loss
            if self.rank == 0:
                self.model.save(self.out / "model.pt")
        self.evaluated += time.perf_counter() - start

    def log(self, **line) -> None:
        line["seconds"] = round(self.progress.seconds + time.perf_counter() - self.began, 1)
        if self.settings.skip_bad:
            line["skipped"] = sum(stage.examples.skipped + stage.held_out.skipped
                                  for stage in self.stages)
            line["left_out"] = self.progress.left_out
        self.metrics.write(line)
        if self.rank == 0:
            steps = {stage.name: stage.steps for stage in self.stages}
            save_picture(draw_run(self.metrics.lines(), steps), self.out / "curves.png")

    def save(self) -> None:
        """Write last.pt, and model.pt as long as no held-out loss has chosen one."""
        self.saved = time.perf_counter()
        if self.rank == 0:
            seconds = self.progress.seconds + self.saved - self.began
            now = replace(self.progress, metrics=self.metrics.size(), seconds=seconds,
                          world=self.world)
            save_run(self.out / "last.pt", self.settings, self.model, self.optimizers, now)
            if now.best == math.inf:
                self.model.save(self.out / "model.pt")

    def restore(self, state: dict) -> None:
        """Take optimizers and metrics as they were where last.pt was written."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if self.rank == 0:
            self.metrics.cut(self.progress.metrics)
        if self.progress.world != self.world:
            print(f"this run began with {self.progress.world} processes and goes on with "
                  f"{self.world}: sums round differently, so it is no longer bit-identical")


def read(*numbers: Tensor) -> list[float]:
    """Numbers of the device: the one place of a step where the host waits for it."""
    return torch.stack(numbers).tolist()


def prepare(s: Settings, config: Config, state: dict | None, longer: bool):
    """(tokenizer, config, stages, examples of the report, records by split); ValueError.

    state is a checkpoint whose tokenizer is taken; longer lets the data choose block_size.
    """
    folder, stages = shapes.find(s.data), []
    records = read_splits(folder, s.skip_bad, captions=s.align_steps > 0)
    if state and state["merges"] is not None:
        tokenizer = Tokenizer(state["merges"])
    else:
        tokenizer, config = fit_tokens(records, config, longer)
    made = {name: Examples(records[name], tokenizer, config, s.skip_bad)
            for name in ("train", "val", "test") if name in records}
    if s.init and not s.align_steps:
        print(f"stage 1 is skipped: the weights are those of {s.init}")
    elif "captions" not in records:
        print("stage 1 is skipped: no captions.json" if s.align_steps else "stage 1 is skipped")
    else:
        captions = [Examples(some, tokenizer, config, s.skip_bad)
                    for some in records["captions"].split(0.02, s.seed)]
        stages.append(Stage("align", 0, *captions, "causal", s.align_steps, s.align_lr,
                            eval_every=s.align_steps, eval_sample=50))  # they are long
    if s.steps:
        stages.append(Stage("instruct", 1, made["train"], made["val"], config.mask, s.steps, s.lr,
                            s.eval_every, s.eval_sample))
    if not stages:
        raise ValueError(f"{folder}: no captions.json, and steps is 0: there is nothing to train")
    split = "test" if "test" in made else "val"
    said = [f"{len(stage.examples):,} to {stage.name}" for stage in stages]
    said.append(f"{len(made['val']):,} to validate")
    said.append(f"{len(made['test']):,} to test" if split == "test" else
                "no test.json: the report is on val")
    print(f"data: {folder}: {', '.join(said)}")
    return tokenizer, config, stages, made[split], records


def test(run: Run, examples: Examples) -> None:
    """Ask model.pt everything in a split: table, samples.png, a line of metrics."""
    start = time.perf_counter()
    if run.world > 1:
        dist.barrier()  # until model.pt is written
    model = NanoAKI.load(run.out / "model.pt").to(run.device)
    indices = np.random.default_rng(0).permutation(len(examples)).tolist()
    split = "test" if examples.records.path.stem == "test" else "val"
    if split == "val" and len(indices) > run.settings.test_sample:
        indices = indices[:run.settings.test_sample]
        print(f"the report is on {len(indices):,} of {len(examples):,} questions (--test-sample)")
    indices = examples.readable(indices)
    if not indices:
        raise ValueError(f"{examples.records.path}: no picture can be read: there is no report")
    answered = report(model, examples, split, indices, **run.how)
    run.log(stage=split, step=run.settings.steps, **scores(answered))
    if run.rank == 0:
        save_picture(draw_answered(examples, indices[:12], answered), run.out / "samples.png")
    command = ask_command(run.out / "model.pt", example_to_ask(examples), model.config.order)
    print(f"some of them, with pictures: {run.out / 'samples.png'}\nask it yourself:\n ",
          escaped(command, keep="\n\t"))
    run.evaluated += time.perf_counter() - start


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_fields("training", Settings)
    parser.add_fields("model; defaults of preset nano", Config)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return parser


def train(argv: list[str] | None) -> None:
    start = time.perf_counter()
    flags = first_does(lambda: vars(make_parser().parse_args(argv)))
    resume = flags.pop("resume")
    s, config, path = first_does(lambda: settle(Settings, flags, resume))
    (rank, world), out = rank_and_world(), Path(s.out)
    device, reason = choose_device(s.device, s.dtype)
    print(reason + (f", {world} processes" if world > 1 else "") + f"\nmask: {config.mask}")
    if s.attention == "flex" and device.type != "cuda":
        raise ValueError(f"attention flex needs a CUDA GPU: it has no backward on {device.type}")
    if s.attention == "flex" and config.dropout:
        raise ValueError(f"attention flex has no dropout: it must be 0, not {config.dropout}")
    state = load_file(path) if path else None
    longer = "block_size" not in flags and not (state and "decoder.norm.weight" in state["model"])
    tokenizer, config, stages, examples, records = first_does(
        lambda: prepare(s, config, state, longer))
    digests = {some.path.name: some.digest for some in records.values()}
    progress = saved_progress(state) if resume else Progress(data=digests)
    first_does(lambda: same_data(progress.data, digests, s, flags))
    torch.manual_seed(s.seed)
    model = NanoAKI(config, tokenizer).to(device)
    print(f"model: {s.init or s.preset}, {sum(p.numel() for p in model.parameters()):,} "
          f"parameters, {config.visual_tokens} visual tokens a picture, {len(tokenizer)} tokens "
          f"in the vocabulary")
    model.flex = s.attention == "flex"
    for part in filter(None, s.freeze.split(",")):
        getattr(model, part).requires_grad_(False)
    if state:
        model.take(state["model"])
    features, shown = None, [some for stage in stages for some in (stage.examples, stage.held_out)]
    if s.steps and s.test_sample:
        shown.append(examples)
    if s.looks_once:
        files = {some.records.path for some in shown}
        others = [some for some in records.values() if some.path not in files]
        features = Features(Path(s.features or out), [some.records for some in shown], others,
                            model, in_bfloat16(device.type, s.dtype))
        first_does(features.check_room)
    keep_freed_memory()  # from here on: what reading took is given back
    out.mkdir(parents=True, exist_ok=True)
    with hold(out) if rank == 0 else nullcontext():
        if rank == 0 and not resume:
            refuse_used(out)  # again: another run may have come and gone meanwhile
        run = Run(s, model, stages, device, progress)
        run.make_optimizers()
        if rank == 0:
            about = {"settings": asdict(s), "config": asdict(config)}
            write_whole(out / "config.json", json.dumps(about, indent=1))
        if resume:
            run.restore(state)
        else:
            run.save()
        state = None  # as large as the model and its optimizers
        if features:
            features.fill(model, s.dtype, s.skip_bad)
            for some in shown:
                some.features = features
        run.train()
        if s.steps and s.test_sample:
            test(run, examples)
    spent = time.perf_counter() - start
    print(f"{spent:.0f} s in all: {run.trained:.0f} s of training, "
          f"{run.waited / max(run.trained, 1e-9):.1%} of it waiting for data; "
          f"{run.evaluated:.0f} s of evaluation, {run.evaluated / spent:.1%} of all")


def main(argv: list[str] | None = None) -> None:
    with joined_processes(), one_line():  # in this order: what is said is said before they part
        train(argv)


if __name__ == "__main__":
    run_script(main)
