"""
Train a vision-language model with modality-mutual attention, in two stages: captions, then questions and answers.

    python train.py                                              # shapes, ten minutes on two CPU cores
    python train.py --mask causal --out out/causal               # the same under another mask
    python train.py --resume                                     # go on after Ctrl-C
"""
import argparse
import ctypes
import difflib
import json
import math
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import shapes
from data.llava import Examples, Records, loader
from nanoaki import MASKS, PRESETS, Config, NanoAKI, Tokenizer, knob, load_file, pad_batch, save_file


@dataclass
class Settings:
    data: str = knob("shapes", "'shapes', or a folder in LLaVA's format (data/README.md)")
    out: str = knob("", "folder of the run; default out/ and the name of the data")
    preset: str = knob("nano", "size of the model: " + ", ".join(PRESETS) + "; the flags of the model override it")
    seed: int = knob(0, "weights and order of the data; same seed, machine and thread count: same run")
    align_steps: int = knob(500, "steps of stage 1, captions under the causal mask; more pay off with many kinds of things")
    steps: int = knob(3000, "steps of stage 2, questions and answers under --mask; time grows in proportion")
    batch_size: int = knob(64, "examples a step: more make steps slower and steadier")
    align_lr: float = knob(0.02, "Muon's peak learning rate in stage 1; AdamW's is a twentieth of Muon's")
    lr: float = knob(0.008, "the same in stage 2; 0.02 there destroys what stage 1 learned")
    weight_decay: float = knob(0.0, "decay of the matrices, relative to the learning rate: helps when data are few")
    warmup: int = knob(50, "steps in which the learning rate rises, before a cosine takes it to 0")
    eval_every: int = knob(500, "steps between evaluations in stage 2; stage 1 has one, at its end")
    eval_sample: int = knob(500, "questions in each of them; the test at the end takes all")
    save_every: float = knob(60.0, "seconds between checkpoints: what a crash can cost")
    workers: int = knob(1, "processes that read and decode pictures; 0 reads in the training process")
    device: str = knob("auto", "auto, cpu, cuda or mps")


def fail(message) -> None:
    """One clear line, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """An error is one line, and an unknown flag suggests the nearest one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(f"{message} (--help lists the flags)")

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
            fail(f"no such flag: {unknown[0]}" + (f"; did you mean {near[0]}?" if near else " (--help lists the flags)"))
        return known


def parse(argv: list[str] | None) -> tuple[dict, bool]:
    """The flags that were given, by field name, and whether to resume."""
    parser = Parser(description=__doc__.strip().splitlines()[0])
    for group, cls in [("training", Settings), ("model (defaults: those of the preset nano)", Config)]:
        group = parser.add_argument_group(group)
        for f in fields(cls):
            group.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=argparse.SUPPRESS,
                               metavar=f.name.upper(), help=f"{f.metadata['help']} (default {f.default!r})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out where it stopped")
    given = vars(parser.parse_args(argv))
    return given, given.pop("resume")


def pick(cls, given: dict) -> dict:
    return {f.name: given[f.name] for f in fields(cls) if f.name in given}


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrices: (n, rows, columns) -> the same."""
    x = g.bfloat16() if g.is_cuda else g  # without AVX512-BF16, bfloat16 is ten times slower than float32 on a CPU
    x = x.mT if g.shape[1] > g.shape[2] else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if g.shape[1] > g.shape[2] else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (kellerjordan.github.io/posts/muon), matrices of one shape stacked.

    The update rule of torch.optim.Muon, which takes matrices one by one and in bfloat16 everywhere.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    stacks[p.shape].append(p)
            for (rows, columns), ps in stacks.items():
                grads = [p.grad for p in ps]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in ps]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))
                updates = orthogonalize(nesterov).unbind()
                torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(ps, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(model: NanoAKI, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and projector, AdamW for everything else."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        (matrices if p.dim() == 2 and ("blocks" in name or "projector" in name) else rest).append(p)
    return [Muon(matrices, lr, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr / 20, betas=(0.9, 0.95), weight_decay=0.0, fused=rest[0].device.type != "mps")]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine to 0."""
    return min((step + 1) / warmup, 1) * (1 + math.cos(math.pi * step / steps)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Device


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device asked for, or the best there is, and a line that says why; raises ValueError."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name != "auto" and not has.get(name):
        raise ValueError(f"--device {name}: must be auto or one that torch {torch.__version__} finds here: "
                         f"{', '.join(d for d in has if has[d])}")
    device = name if name != "auto" else next(d for d in has if has[d])
    reason = {"cuda": "an NVIDIA or AMD GPU was found", "mps": "an Apple GPU was found", "cpu": "no GPU was found"}
    what = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return torch.device(device), (f"device: {device}, {what} ({reason[device] if name == 'auto' else 'asked for'}), "
                                  f"{'bfloat16' if device == 'cuda' else 'float32'}")


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def keep_freed_memory() -> None:
    """Make glibc keep large blocks: handing them back each step, to be faulted in anew, costs a tenth of a CPU step."""
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):
            return  # another C library
        mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: generate the answers, greedily, and compare


def derangement(examples: Examples, indices: list[int]) -> dict[Path, Path]:
    """Every picture of some examples -> another of them, the same one each time: what a blind model is shown."""
    pictures = sorted({path for i in indices for path in examples[i].pictures})
    return dict(zip(pictures, pictures[1:] + pictures[:1]))


@torch.no_grad()
def answers(model: NanoAKI, examples: Examples, indices: list[int], mask: str | None = None, blind: bool = False,
            batch_size: int = 256) -> list[str]:
    """The model's answers to some examples; blind: with the picture of another of them.

    Generation stops a token after the longest right answer of the batch: what is longer is wrong.
    """
    device = next(model.parameters()).device
    other = derangement(examples, indices) if blind else {}
    found = {}
    by_length = sorted(indices, key=lambda i: int(examples.lengths[i]))
    for at in range(0, len(indices), batch_size):
        part = [examples[i] for i in by_length[at:at + batch_size]]
        pictures = [examples.picture(other.get(path, path)) for e in part for path in e.pictures]
        tokens, roles, _ = pad_batch([e.prompt for e in part])
        longest = max(len(e.whole[0]) - len(e.prompt[0]) for e in part)
        with autocast(device):
            ids = model.generate(torch.stack(pictures).to(device) if pictures else None, tokens.to(device),
                                 roles.to(device), longest, mask=mask)
        found.update(zip(by_length[at:at + batch_size], (model.tokenizer.decode(row).strip() for row in ids)))
    return [found[i] for i in indices]


def accuracy(examples: Examples, indices: list[int], given: list[str]) -> dict[str, float]:
    """Share of exact matches, white space around them aside: by task, and "all"."""
    hits = defaultdict(list)
    for i, answer in zip(indices, given):
        example = examples[i]
        hits["all"].append(answer == example.answer.strip())
        if example.task:
            hits[example.task].append(hits["all"][-1])
    return {task: sum(hit) / len(hit) for task, hit in sorted(hits.items())}


@torch.no_grad()
def validation_loss(model: NanoAKI, examples: Examples, indices: list[int], mask: str, batch_size: int = 256) -> float:
    """Mean loss over the answer tokens of some examples, in nats."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    model.eval()
    for at in range(0, len(indices), batch_size):
        batch = examples.__getitems__(indices[at:at + batch_size])
        n = int((batch.targets != -100).sum())
        with autocast(device):
            total += n * float(model.loss(*to(device, batch), mask=mask))
        count += n
    model.train()
    return total / count


def to(device: torch.device, batch) -> list:
    """images, tokens, roles, targets of a batch on a device."""
    return [None if t is None else t.to(device, non_blocking=True) for t in batch[:4]]


# ---------------------------------------------------------------------------------------------------------------------
# What the run shows


def results_table(right: dict, blind: dict, counts: dict) -> str:
    """Task, accuracy, blind accuracy (the same questions about the picture of another record), questions."""
    lines = [f"{'task':<12}{'accuracy':>10}{'blind':>10}{'questions':>11}"]
    for task in sorted(counts, key=lambda task: (task == "all", task)):
        lines.append(f"{task:<12}{right[task]:>10.1%}{blind[task]:>10.1%}{counts[task]:>11,}")
    return "\n".join(lines)


def samples_picture(examples: Examples, indices: list[int], given: list[str], columns: int = 4) -> Image.Image:
    """A grid of pictures, each with its question, the right answer and the model's; wrong ones are marked."""
    side, line, gap = 192, 18, 12
    wide, high = side + gap, side + 4 * line + gap
    font = ImageFont.load_default(13)
    rows = -(-len(indices) // columns)
    sheet = Image.new("RGB", (columns * wide + gap, rows * high + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (i, answer) in enumerate(zip(indices, given)):
        example, x, y = examples[i], gap + n % columns * wide, gap + n // columns * high
        if example.pictures:
            picture = Image.fromarray(examples.picture(example.pictures[0]).permute(1, 2, 0).numpy())
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        right = answer == example.answer.strip()
        words, text = example.question.split(), [""]
        for word in words:  # two lines of question, cut if it is longer
            fits = draw.textlength(f"{text[-1]} {word}", font) < side
            text = text[:-1] + [f"{text[-1]} {word}".strip()] if fits else text + [word]
        text = text[:2] + [""] * (2 - len(text)) + [f"right: {example.answer}", f"model: {answer}"]
        for k, words in enumerate(text):
            while words and draw.textlength(words, font) > side:
                words = words[:-1]
            color = "black" if k < 3 else "#006000" if right else "#c00000"
            draw.text((x, y + side + 2 + k * line), words.replace("\n", " "), color, font)
        if not right:
            draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline="#c00000", width=3)
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class Stage:
    name: str          # "align": captions under the causal mask; "instruct": answers under the run's mask
    train: Examples
    held_out: Examples
    mask: str
    steps: int
    lr: float


class Run:
    """A model in training: its stages, optimizers, metrics and checkpoints; what it needs to go on is in last.pt."""

    def __init__(self, settings: Settings, model: NanoAKI, stages: list[Stage], device: torch.device):
        self.settings, self.model, self.stages, self.device = settings, model.to(device), stages, device
        self.out = Path(settings.out)
        self.stage, self.step, self.best, self.seconds = 0, 0, math.inf, 0.0
        self.waited = self.evaluated = self.trained = 0.0  # seconds, of this process
        self.stop = None  # the signal that asked for it
        self.metrics = open(self.out / "metrics.jsonl", "a")
        self.start_stage()

    def start_stage(self) -> None:
        if self.stage < len(self.stages):
            self.optimizers = make_optimizers(self.model, self.stages[self.stage].lr, self.settings.weight_decay)

    def save(self) -> None:
        """last.pt: what it takes to go on, and model.pt if no validation has chosen one yet."""
        self.metrics.flush()
        save_file({"settings": asdict(self.settings), "config": asdict(self.model.config),
                   "merges": self.model.tokenizer.merges, "model": self.model.state_dict(),
                   "optimizers": [o.state_dict() for o in self.optimizers], "stage": self.stage, "step": self.step,
                   "best": self.best, "seconds": self.seconds, "metrics": self.metrics.tell()}, self.out / "last.pt")
        if self.best == math.inf:
            self.model.save(self.out / "model.pt")

    def restore(self, state: dict) -> None:
        self.stage, self.step, self.best, self.seconds = (state[k] for k in ("stage", "step", "best", "seconds"))
        self.model.load_state_dict(state["model"])
        self.start_stage()
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.metrics.truncate(state["metrics"])

    def log(self, **line) -> None:
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()

    @contextmanager
    def signals(self):
        """Within, a first SIGINT or SIGTERM only asks for a stop at the next step; a second ends the process."""
        def ask(number, frame):
            self.stop = number
            signal.signal(number, signal.SIG_DFL)
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def train(self) -> None:
        """Run all stages to their end, or save and leave with the usual code when a signal asks for it."""
        with self.signals():
            while self.stage < len(self.stages) and not self.stop:
                self.train_stage(self.stages[self.stage])
            self.save()
        if self.stop:
            stage = self.stages[min(self.stage, len(self.stages) - 1)]
            print(f"stopped in stage {stage.name} at step {self.step}; {self.out / 'model.pt'} can be asked; to go on:\n"
                  f"  python train.py --out {self.out} --resume", flush=True)
            raise SystemExit(128 + self.stop)

    def train_stage(self, stage: Stage) -> None:
        s, model = self.settings, self.model.train()
        batches = iter(loader(stage.train, s.batch_size, [s.seed, self.stage], stage.steps, self.step, s.workers))
        bar = tqdm(total=stage.steps, initial=self.step, desc=stage.name, unit="step", dynamic_ncols=True,
                   mininterval=0.2 if sys.stderr.isatty() else 30)
        losses, seen, saved = [], 0, time.perf_counter()
        mark = began = saved
        while self.step < stage.steps and not self.stop:
            now = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - now
            losses.append(self.update(stage, batch))
            seen += len(batch.tokens)
            self.step += 1
            bar.update()
            if self.step % 10 == 0:
                bar.set_postfix_str(f"loss {np.mean(losses[-50:]):.3f}, {seen / (time.perf_counter() - mark):.0f} samples/s")
            last = self.step == stage.steps
            if last or self.stage and self.step % s.eval_every == 0:
                now = time.perf_counter()
                self.seconds += now - began
                self.trained += now - began
                self.evaluate(stage, float(np.mean(losses)), seen / (now - mark))
                losses, seen = [], 0
                mark = began = time.perf_counter()
                self.evaluated += began - now
            if time.perf_counter() - saved > s.save_every and not last:
                self.save()
                saved = time.perf_counter()
        self.seconds += time.perf_counter() - began
        self.trained += time.perf_counter() - began
        bar.close()
        if self.step == stage.steps:
            self.stage, self.step = self.stage + 1, 0
            self.start_stage()

    def update(self, stage: Stage, batch) -> float:
        """One optimizer step; returns the loss."""
        s = self.settings
        torch.manual_seed(hash((s.seed, self.stage, self.step)))  # dropout, too, is a function of seed and step
        with autocast(self.device):
            loss = self.model.loss(*to(self.device, batch), mask=stage.mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        share = schedule(self.step, stage.steps, s.warmup)
        for optimizer, peak in zip(self.optimizers, (stage.lr, stage.lr / 20)):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def evaluate(self, stage: Stage, train_loss: float, speed: float) -> None:
        """Loss and accuracy on a fixed sample of held-out examples; in stage 2, the lowest loss makes model.pt."""
        n = self.settings.eval_sample if self.stage else 64  # captions are long and only watched
        examples, rng = stage.held_out, np.random.default_rng(0)
        indices = rng.permutation(len(examples))[:n].tolist()
        loss = validation_loss(self.model, examples, indices, stage.mask)
        given = answers(self.model, examples, indices, stage.mask)
        right = accuracy(examples, indices, given)
        line = {"stage": stage.name, "step": self.step, "train_loss": train_loss, "val_loss": loss, "accuracy": right}
        if self.stage:
            line["blind"] = accuracy(examples, indices, answers(self.model, examples, indices, stage.mask, blind=True))
        self.log(**line, samples_per_second=round(speed, 1), seconds=round(self.seconds, 1))
        shown = self.step // self.settings.eval_every % len(indices)
        example = examples[indices[shown]]
        blind = f" (blind {line['blind']['all']:.1%})" if "blind" in line else ""
        tqdm.write(f"{stage.name} step {self.step}: train loss {train_loss:.3f}, held-out loss {loss:.3f}, "
                   f"exact match {right['all']:.1%}{blind}, {speed:.0f} samples/s\n"
                   f"    {example.question or 'caption'}   right: {example.answer}   model: {given[shown]}")
        if self.stage and loss < self.best:
            self.best = loss
            self.model.save(self.out / "model.pt")


def test(run: Run, examples: Examples, split: str) -> None:
    """Evaluate model.pt on all examples of a split: table, samples.png, a line of metrics."""
    began = time.perf_counter()
    model = NanoAKI.load(run.out / "model.pt").to(run.device)
    indices = list(range(len(examples)))
    given = answers(model, examples, indices)
    right = accuracy(examples, indices, given)
    blind = accuracy(examples, indices, answers(model, examples, indices, blind=True))
    counts = {task: sum(task in ("all", examples[i].task) for i in indices) for task in right}
    shown = np.random.default_rng(0).permutation(len(indices))[:12].tolist()
    samples_picture(examples, shown, [given[i] for i in shown]).save(run.out / "samples.png")
    run.evaluated += time.perf_counter() - began
    run.log(stage=split, step=run.stages[-1].steps, accuracy=right, blind=blind, questions=counts,
            seconds=round(run.seconds, 1))
    print(f"\n{split} split, exact match of generated answers:\n{results_table(right, blind, counts)}")


def main(argv: list[str] | None = None) -> None:
    began = time.perf_counter()
    given, resume = parse(argv)
    keep_freed_memory()
    settings = Settings(**pick(Settings, given))
    settings.out = settings.out or str(Path("out") / Path(settings.data).name)
    out = Path(settings.out)
    state = None
    if resume:
        if not (out / "last.pt").exists():
            fail(f"--resume: {out / 'last.pt'} does not exist; start the run without --resume")
        state = load_file(out / "last.pt")
        saved = state["settings"] | state["config"]
        for name, value in given.items():
            if value != saved[name] and name not in ("out", "device", "workers", "save_every"):
                fail(f"--resume: --{name.replace('_', '-')} was {saved[name]!r} when the run started, not {value!r}; "
                     f"leave it out, or start another run in another --out")
        settings = Settings(**state["settings"] | pick(Settings, given) | {"out": str(out)})
    elif out.exists() and any(out.iterdir()):
        fail(f"{out} already holds a run: go on with --resume, or choose another folder with --out")
    try:
        if settings.preset not in PRESETS:
            raise ValueError(f"--preset {settings.preset}: must be one of {', '.join(PRESETS)}")
        for name in ("steps", "batch_size", "warmup", "eval_every", "eval_sample"):
            if getattr(settings, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(settings, name)}")
        config = Config(**state["config"]) if state else replace(PRESETS[settings.preset], **pick(Config, given))
        device, reason = choose_device(settings.device)
        print(reason)
        torch.manual_seed(settings.seed)
        folder = Path(settings.data)
        if settings.data == "shapes":
            folder = Path(shapes.__file__).parent / "shapes-seed0"
            if not folder.exists():
                shapes.make(folder, 0)
        records = {name: Records.read(folder, f"{name}.json") for name in ("captions", "train", "val", "test")}
        if state:
            tokenizer = Tokenizer(state["merges"])
        else:
            texts = [text for name in ("train", "captions") for text in records[name].texts(5_000_000)]
            tokenizer = Tokenizer.train(texts, config.vocab_size)
            config = replace(config, vocab_size=len(tokenizer))
        model = NanoAKI(config, tokenizer)
        captions = Examples(records["captions"], tokenizer, config, captions=True)
        train, val, test_split = (Examples(records[n], tokenizer, config) for n in ("train", "val", "test"))
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e:
        fail(e)
    print(f"data: {folder}, {len(captions):,} captions, {len(train):,} questions to train on, {len(val):,} to validate, "
          f"{len(test_split):,} to test\n"
          f"model: {settings.preset}, {sum(p.numel() for p in model.parameters()):,} parameters, {config.visual_tokens} "
          f"visual tokens, {len(tokenizer)} in the vocabulary, mask {config.mask}")
    run = Run(settings, model, [Stage("align", captions, captions, "causal", settings.align_steps, settings.align_lr),
                                Stage("instruct", train, val, config.mask, settings.steps, settings.lr)], device)
    if state:
        run.restore(state)
    else:
        (out / "config.json").write_text(json.dumps({"settings": asdict(settings), "config": asdict(config)}, indent=1))
    run.train()
    test(run, test_split, "test")
    total = time.perf_counter() - began
    print(f"{total:.0f} s in all: {run.trained:.0f} s of training steps, {run.waited / max(run.trained, 1e-9):.1%} of it "
          f"waiting for data; {run.evaluated:.0f} s of evaluation, {run.evaluated / total:.1%} of all\n"
          f"ask it yourself:\n  python sample.py --model {out / 'model.pt'} "
          f"--image {test_split[0].pictures[0]} --ask \"{test_split[0].question}\"")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped before the run began; nothing was lost", file=sys.stderr)
        raise SystemExit(130)
