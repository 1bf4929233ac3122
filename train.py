"""
Train a vision-language model with modality-mutual attention: on captions, then on questions.

    python train.py                                     # shapes: ten minutes on two CPU cores
    python train.py --mask causal --out out/causal      # the same under another mask
    python train.py --resume                            # go on after Ctrl-C
    torchrun --nproc_per_node=2 train.py                # on two processes or GPUs
"""
import argparse
import ctypes
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import shapes
from data.llava import Batch, Examples, Records, loader, pictures_of, signals_blocked
from draw import draw_samples
from nanoaki import PRESETS, Config, NanoAKI, Tokenizer, knob, load_file, pad_batch, save_file
from sample import Parser, autocast, choose_device, fail


@dataclass
class Settings:
    """What a run is, beside the shape of its model (Config): every field is a flag."""
    data: str = knob("shapes", "'shapes', or a folder in LLaVA's format (data/README.md)")
    out: str = knob("", "folder of the run; '' is out/ and the name of the data")
    preset: str = knob("nano", f"{', '.join(PRESETS)}: size of the model, refined by its flags")
    seed: int = knob(0, "draws weights and order of the data: same seed and threads, same run")
    align_steps: int = knob(320, "steps of stage 1: captions, under the causal mask")
    steps: int = knob(2500, "steps of stage 2: questions and answers, under --mask")
    init: str = knob("", "checkpoint to begin stage 2 from, with its tokenizer and config")
    freeze: str = knob("", "vit, decoder or both, with a comma: keep them as --init has them")
    batch_size: int = knob(64, "examples a step, over all processes: more are slower, steadier")
    grad_accum: int = knob(1, "parts that a process splits its share of a batch into: less memory")
    align_lr: float = knob(0.02, "Muon's peak learning rate in stage 1")
    lr: float = knob(0.0035, "Muon's peak in stage 2; 0.01 destroys what stage 1 has learned")
    adamw_lr: float = knob(0.002, "AdamW's peak in both stages: embeddings, norms and biases")
    weight_decay: float = knob(0.0, "pull of matrices towards 0, times learning rate: for few data")
    warmup: int = knob(50, "steps in which the learning rate rises, under a cosine that ends at 0")
    eval_every: int = knob(500, "steps of stage 2 between evaluations")
    eval_sample: int = knob(500, "held-out questions in each of them; the final test takes all")
    save_every: float = knob(60.0, "seconds between checkpoints: what a crash can cost")
    share: int = knob(7, "questions about a picture that stand together: a batch encodes it once")
    workers: int = knob(1, "processes that read and decode pictures; 0: the training process")
    augment: bool = knob(False, "vary pictures in ways that keep answers true: for few pictures")
    skip_bad: bool = knob(False, "leave bad records out, counted, where the run would be refused")
    compile: bool = knob(False, "torch.compile: a slow start, then faster steps on a GPU")
    dtype: str = knob("auto", "float32 or bfloat16 (autocast); auto is bfloat16 on CUDA alone")
    device: str = knob("auto", "auto, cpu, cuda or mps")

    def __post_init__(self):
        least = {"steps": 1, "batch_size": 1, "warmup": 1, "eval_every": 1, "eval_sample": 1,
                 "share": 1, "grad_accum": 1,
                 "align_steps": 0, "workers": 0, "seed": 0, "weight_decay": 0, "save_every": 0}
        if self.seed >= 10 ** 9:
            raise ValueError(f"seed must be below 10^9, not {self.seed}")
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name} must be at least {bound}, not {getattr(self, name)}")
        for name in ("align_lr", "lr", "adamw_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name, names in (("preset", list(PRESETS)), ("dtype", ["auto", "float32", "bfloat16"])):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(names)}")
        for part in filter(None, self.freeze.split(",")):
            if part not in ("vit", "decoder"):
                raise ValueError(f"freeze {self.freeze!r} must be vit, decoder or vit,decoder")
        if self.freeze and not self.init:
            raise ValueError("freeze needs init: a part that was never trained knows nothing")


# Command line ------------------------------------------------------------------------------------


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def make_parser(about: str, **helps: str) -> Parser:
    """A parser of --resume and a flag for every setting, for a script with that docstring.

    helps replaces the help of flags that mean another thing there.
    """
    parser = Parser(description=about.strip().splitlines()[0])
    for title, cls in (("training", Settings), ("model; defaults of preset nano", Config)):
        group = parser.add_argument_group(title)
        for f in fields(cls):
            how = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
            group.add_argument(flag(f.name), **how, default=argparse.SUPPRESS,
                               help=helps.get(f.name,
                                              f"{f.metadata['help']} (default {f.default!r})"))
    parser.add_argument("--resume", action="store_true",
                        help=helps.get("resume", "go on with the run in --out"))
    return parser


def pick(cls, given: dict) -> dict:
    """What is given of the fields of a dataclass."""
    return {f.name: given[f.name] for f in fields(cls) if f.name in given}


# Optimizer ---------------------------------------------------------------------------------------


def orthogonalize(g: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrices, (n, rows, columns)."""
    x = g.bfloat16() if g.is_cuda else g  # bfloat16 is ten times slower than float32 on most CPUs
    tall = g.shape[1] > g.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (kellerjordan.github.io/posts/muon): for 2-D matrices.

    The rule of torch.optim.Muon, which takes matrices one by one and in bfloat16 everywhere; here
    those of one shape are stacked, and a CPU stays in float32.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, stacks = group["lr"], group["momentum"], defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    stacks[p.shape].append(p)
            for (rows, columns), ps in stacks.items():
                grads = [p.grad for p in ps]
                for p in ps:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in ps]
                torch._foreach_lerp_(momenta, grads, 1 - momentum)
                nesterov = torch.stack(torch._foreach_lerp(grads, momenta, momentum))
                updates = orthogonalize(nesterov).unbind()
                torch._foreach_mul_(ps, 1 - lr * group["weight_decay"])
                torch._foreach_add_(ps, updates, alpha=-lr * max(1, rows / columns) ** 0.5)


def make_optimizers(model: NanoAKI, lr: float, adamw_lr: float,
                    weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and projector, AdamW for everything else."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inside = p.dim() == 2 and ("blocks" in name or "projector" in name)
        (matrices if inside else rest).extend([p] * p.requires_grad)
    fused = rest[0].device.type in ("cpu", "cuda")
    return [Muon(matrices, lr, weight_decay=weight_decay),
            torch.optim.AdamW(rest, adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine to 0."""
    return min((step + 1) / warmup, 1) * (1 + math.cos(math.pi * step / steps)) / 2


# Device and processes ----------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(*numbers: float, device: torch.device) -> list[float]:
    """Each number, summed over all processes."""
    if not dist.is_initialized():
        return list(numbers)
    summed = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def keep_freed_memory() -> None:
    """Let glibc keep large blocks: to return and fault them in anew costs a tenth of a CPU step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


class Objective(torch.nn.Module):
    """The training loss of a batch as a module, which DDP and torch.compile can wrap."""

    def __init__(self, model: NanoAKI, device: torch.device, dtype: str):
        super().__init__()
        self.model, self.device, self.dtype = model, device, dtype

    def forward(self, batch: Batch, mask: str) -> Tensor:
        """Mean over the targets of a batch, whose every picture is encoded once."""
        gpu = self.device.type == "cuda"  # on MPS, a copy that does not block may read freed memory
        images, index, tokens, roles, targets = (
            None if t is None else t.to(self.device, non_blocking=gpu) for t in batch[:5])
        with autocast(self.device, self.dtype):
            visual = None if images is None else self.model.see(images)[index]
            x = self.model.hidden(visual, tokens, roles, mask)
            loss = self.model.loss(x, roles, targets)
        if images is None:  # the gradient of what sees is then 0: DDP waits for one from everybody
            loss = loss + 0 * sum(p.sum() for part in (self.model.vit, self.model.projector)
                                  for p in part.parameters())
        return loss


# Evaluation: generate the answers, greedily, and compare -----------------------------------------


def other_pictures(examples: Examples, indices: list[int]) -> dict[int, list[Path]]:
    """As many pictures as each example has, of another that shares none; {} where there is none.

    Always the same: those that come next in the order of their paths.
    """
    own = {i: tuple(examples[i].pictures) for i in indices}
    some = sorted({pictures for pictures in own.values() if pictures})
    place, found = {pictures: n for n, pictures in enumerate(some)}, {}
    for i, mine in own.items():
        turns = (some[(place[mine] + k) % len(some)] for k in range(1, len(some))) if mine else [()]
        other = next((p for p in turns if not set(p) & set(mine)), None)
        if other is None:
            return {}
        found[i] = [other[k % len(other)] for k in range(len(mine))]
    return found


def answer_all(model: NanoAKI, examples: Examples, indices: list[int], mask: str | None = None,
               pictures: dict[int, list[Path]] | None = None, dtype: str = "auto",
               batch_size: int = 250) -> list[str]:
    """The model's greedy answers to some examples, about their own pictures or those given.

    Generation stops a token after the longest right answer of its batch: what is longer is wrong.
    Every process answers its share and gets all answers.
    """
    device, found, (rank, world) = next(model.parameters()).device, {}, rank_and_world()
    mine = sorted(indices, key=lambda i: float(examples.lengths[i]))[rank::world]
    for at in range(0, len(mine), batch_size):
        part = mine[at:at + batch_size]
        some = [examples[i] for i in part]
        shown = [examples.picture(path) for i, e in zip(part, some)
                 for path in (pictures[i] if pictures else e.pictures)]
        tokens, roles, _ = pad_batch([e.prompt for e in some])
        longest = max(len(e.whole[0]) - len(e.prompt[0]) for e in some)
        with autocast(device, dtype):
            rows = model.generate(torch.stack(shown).to(device) if shown else None,
                                  tokens.to(device), roles.to(device), longest, mask=mask)
        found |= {i: model.tokenizer.decode(ids).strip() for i, ids in zip(part, rows)}
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, found)
        found = {i: answer for share in shares for i, answer in share.items()}
    return [found[i] for i in indices]


def score(examples: Examples, indices: list[int], given: list[str]) -> tuple[dict, dict]:
    """Share of exact matches, outer white space aside, and their number: by task and of "all"."""
    hits = defaultdict(list)
    for i, answer in zip(indices, given):
        example = examples[i]
        for task in {"all", example.task or "all"}:
            hits[task].append(answer == example.answer.strip())
    return ({task: sum(hit) / len(hit) for task, hit in sorted(hits.items())},
            {task: len(hit) for task, hit in sorted(hits.items())})


def examine(model: NanoAKI, examples: Examples, indices: list[int], mask: str | None = None,
            blind: bool = True, **how) -> tuple[list[str], dict]:
    """The answers to some examples, and by task accuracy, number of questions and accuracy blind.

    Blind is with another record's pictures, and empty where there is no other picture.
    """
    given = answer_all(model, examples, indices, mask, **how)
    scores = dict(zip(("accuracy", "questions"), score(examples, indices, given)))
    if blind:
        other = other_pictures(examples, indices)
        scores["blind"] = score(examples, indices, answer_all(
            model, examples, indices, mask, other, **how))[0] if any(other.values()) else {}
    return given, scores


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


@torch.no_grad()
def held_out_loss(objective: Objective, examples: Examples, indices: list[int], mask: str,
                  batch_size: int) -> float:
    """Mean loss over the answer tokens of some examples, in nats; every process takes a share."""
    rank, world = rank_and_world()
    loss = count = 0
    for at in range(0, len(indices), batch_size):
        if part := indices[at:at + batch_size][rank::world]:
            batch = good(examples.__getitems__(part))
            n = int((batch.targets != -100).sum())
            loss += n * objective(batch, mask).item()
            count += n
    loss, count = total(loss, count, device=objective.device)
    return loss / count


def good(batch: Batch | ValueError) -> Batch:
    """A batch that was read; raises what a loader's process found wrong with it."""
    if isinstance(batch, ValueError):
        raise batch
    return batch


# What a run shows --------------------------------------------------------------------------------


def results_table(accuracy: dict, questions: dict, blind: dict) -> str:
    """What examine has found, one line per task."""
    lines = [f"{'task':<12}{'accuracy':>10}{'blind':>10}{'questions':>11}"]
    for task in sorted(questions, key=lambda task: (task == "all", task)):
        lines.append(f"{task:<12}{percent(accuracy[task]):>10}{percent(blind.get(task)):>10}"
                     f"{questions[task]:>11,}")
    return "\n".join(lines)


# The run -----------------------------------------------------------------------------------------


@dataclass
class Stage:
    name: str           # "align": captions, causal mask; "instruct": answers, the run's mask
    examples: Examples  # to train on
    held_out: Examples
    mask: str
    steps: int
    lr: float


class Run:
    """A model in training; last.pt holds what it takes to go on exactly as if never stopped."""

    def __init__(self, settings: Settings, model: NanoAKI, stages: list[Stage],
                 device: torch.device, state: dict | None = None):
        self.settings, self.model, self.stages = settings, model.to(device), stages
        self.device, self.out = device, Path(settings.out)
        self.rank, self.world = rank_and_world()
        for part in filter(None, settings.freeze.split(",")):
            getattr(model, part).requires_grad_(False)
        self.objective = self.parallel = Objective(model, device, settings.dtype)
        if settings.compile:
            self.parallel = torch.compile(self.parallel)
        if self.world > 1:
            self.parallel = DistributedDataParallel(self.parallel)
        parts = self.world * settings.grad_accum  # evaluation fits where training does
        self.how = {"dtype": settings.dtype,
                    "batch_size": min(250, max(1, 4 * settings.batch_size // parts))}
        self.stage = self.step = 0
        self.best = math.inf    # lowest held-out loss of stage 2: that of model.pt
        self.losses = []        # of each step since the last evaluation
        self.signal = 0         # that asked this process to stop
        self.stop = 0           # the same, once all processes agree on the step
        self.waited = self.trained = self.evaluated = 0.0  # seconds of this process
        self.goes_on = f"python train.py --out {shlex.quote(settings.out)} --resume"
        self.metrics = open(self.out / "metrics.jsonl" if self.rank == 0 else os.devnull, "a")
        seconds = 0.0
        if state:
            self.stage, self.step, self.best = state["stage"], state["step"], state["best"]
            self.losses, seconds = state["losses"], state["seconds"]
            model.load_state_dict(state["model"])
            if self.rank == 0:
                size = (self.out / "metrics.jsonl").stat().st_size
                self.metrics.truncate(min(state["metrics"], size))
            if state["world"] != self.world:
                print(f"this run began with {state['world']} processes and goes on with "
                      f"{self.world}: sums round differently, so it is no longer bit-identical")
        self.saved = time.perf_counter()
        self.began = self.saved - seconds
        self.make_optimizers()
        for optimizer, saved in zip(self.optimizers, state["optimizers"] if state else []):
            optimizer.load_state_dict(saved)
        if not state:
            self.save()

    def make_optimizers(self) -> None:
        """New ones for each stage; none after the last."""
        self.optimizers = []
        if self.stage < len(self.stages):
            lr, s = self.stages[self.stage].lr, self.settings
            self.optimizers = make_optimizers(self.model, lr, s.adamw_lr, s.weight_decay)

    def save(self) -> None:
        """Write last.pt, and model.pt as long as no held-out loss has chosen one."""
        self.saved = time.perf_counter()
        if self.rank:
            return
        os.fsync(self.metrics.fileno())
        self.metrics.seek(0, os.SEEK_END)
        save_file({"settings": asdict(self.settings), "config": asdict(self.model.config),
                   "merges": self.model.tokenizer.merges, "model": self.model.state_dict(),
                   "optimizers": [o.state_dict() for o in self.optimizers], "stage": self.stage,
                   "step": self.step, "best": self.best, "losses": self.losses,
                   "world": self.world, "metrics": self.metrics.tell(),
                   "seconds": time.perf_counter() - self.began}, self.out / "last.pt")
        if self.best == math.inf:
            self.model.save(self.out / "model.pt")

    def log(self, **line) -> None:
        line["seconds"] = round(time.perf_counter() - self.began, 1)
        if self.settings.skip_bad:
            line["skipped"] = sum(stage.examples.skipped + stage.held_out.skipped
                                  for stage in self.stages)
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()

    @contextmanager
    def signals(self):
        """Within, SIGINT and SIGTERM ask for a stop after the step; a second one stops at once."""
        def ask(number, frame):
            self.signal = number
            for again in before:
                signal.signal(again, signal.SIG_DFL)
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def train(self) -> None:
        """All stages to their end; where a signal asks for a stop, save and leave with its code."""
        with self.signals():
            while self.stage < len(self.stages) and not self.stop:
                self.train_stage(self.stages[self.stage])
            self.agree()
            if self.stop:
                self.save()
        if self.stop:
            print(f"stopped; {self.out / 'model.pt'} can be asked; to go on:\n"
                  f"  {self.goes_on}", flush=True)
            raise SystemExit(128 + self.stop)

    def agree(self, number: float = 0, problem: Exception | None = None) -> float:
        """A number summed over processes, which learn here whether one was asked to stop.

        Raises the problem of this process after a checkpoint, and SystemExit in the others.
        """
        mine = self.signal  # read once: a later signal is for the next time that all agree
        summed, signals, problems = total(number, mine, float(problem is not None),
                                          device=self.device)
        self.stop = mine or (signal.SIGTERM if signals else 0)
        if problems:
            self.save()
            raise problem or SystemExit(2)
        return summed

    def train_stage(self, stage: Stage) -> None:
        """Steps of a stage up to its end, or to a signal."""
        s, clock = self.settings, time.perf_counter
        batches = loader(stage.examples, s.batch_size, [s.seed, self.stage], stage.steps,
                         self.step, s.share, range(self.rank * s.grad_accum,
                                                   (self.rank + 1) * s.grad_accum),
                         self.world * s.grad_accum, workers=s.workers)
        with signals_blocked():
            batches = iter(batches)
        examples, seconds = 0, 0.0
        with tqdm(total=stage.steps, initial=self.step, desc=stage.name, unit="step",
                  dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 30,
                  disable=self.rank > 0) as bar:
            while self.step < stage.steps and not self.stop:
                last = self.step + 1 == stage.steps
                due = last or stage.name == "instruct" and (self.step + 1) % s.eval_every == 0
                if due or clock() - self.saved > s.save_every:
                    self.save()  # also before an evaluation, which may find a broken picture
                start = clock()
                try:
                    parts = [good(next(batches)) for _ in range(s.grad_accum)]
                except ValueError as e:  # a picture that has broken since it was checked
                    self.agree(problem=e)
                self.waited += clock() - start
                self.losses.append(self.update(stage, parts))
                seconds += clock() - start
                self.trained += clock() - start
                examples += s.batch_size
                self.step += 1
                bar.update()
                bar.set_postfix_str(f"loss {np.mean(self.losses[-50:]):.3f}, "
                                    f"{examples / seconds:.0f} samples/s", refresh=False)
                if due:
                    self.evaluate(stage, float(np.mean(self.losses)), examples / seconds)
                    self.losses, examples, seconds = [], 0, 0.0
        if self.step == stage.steps:
            self.stage, self.step = self.stage + 1, 0
            self.make_optimizers()
            self.save()

    def gradient(self, parts: list[Batch], mask: str) -> float:
        """Accumulate the gradient of a batch, all processes' parts of it, and return its loss.

        Parts are weighted by their targets: a mean of means would favour short answers.
        """
        sizes = [int((part.targets != -100).sum()) for part in parts]
        targets, loss = self.agree(sum(sizes)), 0.0
        for part, size in zip(parts, sizes):
            last = part is parts[-1]
            with nullcontext() if last or self.world == 1 else self.parallel.no_sync():
                mean = self.parallel(part, mask)
                (mean * (size / targets * self.world)).backward()  # DDP takes the mean of processes
            loss += mean.item() * size / targets
        return total(loss, device=self.device)[0]

    def update(self, stage: Stage, parts: list[Batch]) -> float:
        """One step of the optimizers; returns the loss, or raises FloatingPointError."""
        s = self.settings
        seed = s.seed * 10 ** 9 + self.stage * 10 ** 8 + self.step
        torch.manual_seed((seed * self.world + self.rank) % 2 ** 63)  # dropout: as ever, on resume
        loss = self.gradient(parts, stage.mask)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        share = schedule(self.step, stage.steps, s.warmup)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"{stage.name} step {self.step}: loss {loss}, gradient norm {norm}, at learning "
                f"rate {stage.lr * share:.2g}; {self.out / 'last.pt'} is of before; the batch: "
                + " ".join(id for part in parts for id in part.ids))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * share
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def evaluate(self, stage: Stage, train_loss: float, speed: float) -> None:
        """Score held-out examples, always the same; in stage 2 the lowest loss makes model.pt."""
        start, instruct = time.perf_counter(), stage.name == "instruct"
        examples, s = stage.held_out, self.settings
        indices = np.random.default_rng(0).permutation(len(examples)).tolist()
        indices = indices[:s.eval_sample if instruct else 50]  # captions are long, and only watched
        self.model.eval()
        loss = held_out_loss(self.objective, examples, indices, stage.mask,
                             self.how["batch_size"])
        given, scores = examine(self.model, examples, indices, stage.mask, instruct, **self.how)
        note = f"exact match {scores['accuracy']['all']:.1%}"
        if instruct:
            note += f" (blind {percent(scores['blind'].get('all'))})"
        self.model.train()
        self.log(stage=stage.name, step=self.step, train_loss=train_loss, val_loss=loss, **scores,
                 samples_per_second=round(speed, 1))
        n = self.step // s.eval_every % len(indices)
        example = examples[indices[n]]
        tqdm.write(f"{stage.name} step {self.step}: train loss {train_loss:.3f}, held-out loss "
                   f"{loss:.3f}, {note}, {speed:.0f} samples/s\n    {example.question or 'caption'}"
                   f"   right: {example.answer}   model: {given[n]}")
        if instruct and loss < self.best:
            self.best = loss
            if self.rank == 0:
                self.model.save(self.out / "model.pt")
        self.evaluated += time.perf_counter() - start


def test(run: Run, examples: Examples, split: str) -> None:
    """Ask model.pt everything in a split: table, samples.png, a line of metrics."""
    start = time.perf_counter()
    if run.world > 1:
        dist.barrier()  # until model.pt is written
    model = NanoAKI.load(run.out / "model.pt").to(run.device)
    indices = list(range(len(examples)))
    given, scores = examine(model, examples, indices, **run.how)
    run.log(stage=split, step=run.settings.steps, **scores)
    shown = np.random.default_rng(0).permutation(len(indices))[:12].tolist()
    if run.rank == 0:
        draw_samples(examples, shown, [given[i] for i in shown]).save(run.out / "samples.png")
    run.evaluated += time.perf_counter() - start
    print(f"\n{split} split, exact match of generated answers:\n"
          f"{results_table(**scores)}\n"
          f"some of them, with pictures: {run.out / 'samples.png'}")


def read_data(settings: Settings) -> tuple[Path, dict[str, Records]]:
    """The folder and its records by split, the built-in data made if need be."""
    folder, (rank, world) = Path(settings.data), rank_and_world()
    if settings.data == "shapes":
        folder = Path(shapes.__file__).parent / "shapes-seed0"
        if not folder.exists() and rank == 0:
            shapes.make(folder, 0)
        if world > 1:
            dist.barrier()
    names = [n for n in ("train", "captions", "val", "test")
             if n == "train" or (folder / f"{n}.json").exists()]
    records = {n: Records.read(folder, f"{n}.json", settings.skip_bad) for n in names}
    if "val" not in records:
        records["train"], records["val"] = records["train"].split(0.05, 0)
        print(f"no val.json: {len(records['val']):,} records are held out, by picture")
        if "captions" in records:  # else stage 1 would teach what is held out
            before = len(records["captions"])
            records["captions"] = records["captions"].without(
                {picture for record in records["val"] for picture in pictures_of(record)})
            print(f"and {before - len(records['captions']):,} captions of their pictures left out")
    return folder, records


def prepare(settings: Settings, config: Config, start: dict | None):
    """(model, stages, test examples, their split); start is the checkpoint to take the model from.

    Raises ValueError on bad data.
    """
    s, skip = settings, settings.skip_bad
    folder, records = read_data(s)
    if start:
        tokenizer = Tokenizer(start["merges"])
    else:
        texts = [text for name in ("train", "captions") if name in records
                 for text in records[name].texts(5_000_000)]
        tokenizer = Tokenizer.train(texts, config.vocab_size)
        config = replace(config, vocab_size=len(tokenizer))
    torch.manual_seed(s.seed)
    model = NanoAKI(config, tokenizer)
    if start:
        model.load_state_dict(start["model"])
    split = "test" if "test" in records else "val"
    train, val, test = (Examples(records[n], tokenizer, config, skip_bad=skip)
                        for n in ("train", "val", split))
    stages = [Stage("instruct", train, val, config.mask, s.steps, s.lr)]
    train.augment_seed = [s.seed, 1] if s.augment else None
    if s.init:
        print(f"stage 1 is skipped: the weights are those of {s.init}")
    elif "captions" not in records or not s.align_steps:
        print("stage 1 is skipped: no captions.json" if s.align_steps else "stage 1 is skipped")
    else:
        captions = [Examples(part, tokenizer, config, captions=True, skip_bad=skip)
                    for part in records["captions"].split(0.02, s.seed)]
        captions[0].augment_seed = [s.seed, 0] if s.augment else None
        stages.insert(0, Stage("align", *captions, "causal", s.align_steps, s.align_lr))
    print(f"data: {folder}: " + ", ".join(f"{len(stage.examples):,} to {stage.name}"
                                          for stage in stages)
          + f", {len(val):,} to validate, " + (f"{len(test):,} to test" if split == "test" else
                                               "no test.json: the report is on val") + "\n"
          f"model: {s.preset}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{config.visual_tokens} visual tokens a picture, {len(tokenizer)} tokens in the "
          f"vocabulary")
    return model, stages, test, split


def same_flags(given: dict, saved: dict, free: tuple[str, ...]) -> None:
    """Raise ValueError for a flag that was another when it began; the free are not compared."""
    for name, value in given.items():
        if name not in free and value != saved[name]:
            raise ValueError(f"--resume: {flag(name)} was {saved[name]!r} when it began, not "
                             f"{value!r}; leave it out, or choose another --out")


def refuse_used(folder: Path) -> None:
    """Raise ValueError if a folder for a new run holds more than one killed at its very start."""
    if folder.exists() and (not folder.is_dir() or any(
            f.stat().st_size and f.suffix != ".part" for f in folder.iterdir())):
        raise ValueError(f"{folder} already holds something: go on with --resume if it is a run, "
                         f"or choose another --out")


@contextmanager
def hold(folder: Path):
    """Keep other processes out of a folder; raises ValueError if one is at work there."""
    lock = open(folder / "lock", "w")
    with suppress(ImportError):  # Windows has none
        import fcntl
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would outlive it in loaders
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another process is at work there") from None
    try:
        yield
    finally:
        with lock, suppress(OSError):
            os.remove(lock.name)


def settle(given: dict, resume: bool) -> tuple[Settings, Config, dict | None]:
    """Settings and config of the flags given, and the checkpoint to start from, if any."""
    settings = Settings(**pick(Settings, given))
    out = Path(settings.out or Path("out") / Path(settings.data).name)
    if not resume:
        refuse_used(out)
    if resume:
        start = load_file(out / "last.pt")
        known = {f.name for f in fields(Settings)}
        if "optimizers" not in start or set(start["settings"]) != known:
            raise ValueError(f"{out / 'last.pt'}: not a run of this version that can be resumed")
        same_flags(given, start["settings"] | start["config"],
                   free=("out", "device", "workers", "save_every", "vocab_size"))
        settings = Settings(**start["settings"] | pick(Settings, given))
        config = Config(**start["config"])
    elif settings.init:
        start, own = load_file(settings.init), ("mask", "dropout")
        if NanoAKI.load(settings.init).tokenizer is None:
            raise ValueError(f"--init: {settings.init} was saved without a tokenizer")
        for name in given:
            if name in ("align_steps", "align_lr", "preset") or (
                    name in start["config"] and name not in own):
                raise ValueError(f"--init brings its own config and skips stage 1: leave out "
                                 f"{flag(name)}")
        config = Config(**start["config"] | {n: given[n] for n in own if n in given})
    else:
        start, config = None, replace(PRESETS[settings.preset], **pick(Config, given))
    settings.out = str(out)
    world = rank_and_world()[1]
    if settings.batch_size < world * settings.grad_accum:
        raise ValueError(f"batch_size {settings.batch_size} is less than {world} processes times "
                         f"grad_accum {settings.grad_accum}")
    return settings, config, start


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    given = vars(make_parser(__doc__).parse_args(argv))
    resume = given.pop("resume")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():  # set by torchrun
        gpu = torch.cuda.is_available() and given.get("device", "auto") in ("auto", "cuda")
        dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = rank_and_world()
    try:
        with (redirect_stdout(open(os.devnull, "w")) if rank else nullcontext(),
              ExitStack() as stack):
            settings, config, state = settle(given, resume)
            device, reason = choose_device(settings.device, settings.dtype)
            print(reason + (f", {world} processes" if world > 1 else ""))
            print(f"mask: {config.mask}")
            model, stages, examples, split = prepare(settings, config, state)
            keep_freed_memory()  # from here on: what reading took is given back
            out = Path(settings.out)
            out.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                stack.enter_context(hold(out))
                if not resume:
                    refuse_used(out)  # again: another run may have come and gone meanwhile
            run = Run(settings, model, stages, device, state if resume else None)
            if rank == 0:
                about = {"settings": asdict(settings), "config": asdict(model.config)}
                (out / "config.json").write_text(json.dumps(about, indent=1))
            run.train()
            test(run, examples, split)
            spent, example = time.perf_counter() - start, examples[0]
            command = ["python", "sample.py", "--model", str(out / "model.pt"),
                       *(["--image", *map(str, example.pictures)] if example.pictures else []),
                       "--ask", example.question]
            print(f"{spent:.0f} s in all: {run.trained:.0f} s of training, "
                  f"{run.waited / max(run.trained, 1e-9):.1%} of it waiting for data; "
                  f"{run.evaluated:.0f} s of evaluation, {run.evaluated / spent:.1%} of all\n"
                  f"ask it yourself:\n  {shlex.join(command)}")
    except (ValueError, OSError, FloatingPointError) as e:
        fail(e)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; what was saved is whole", file=sys.stderr)
        raise SystemExit(130)
