"""Ready for a GPU, as far as a CPU can show it: a step waits for no value, precision is chosen."""
import os
from contextlib import nullcontext

import pytest
import torch
import torch._inductor.config
from torch._subclasses.fake_tensor import (DataDependentOutputException,
                                           DynamicOutputShapeException, FakeTensorMode)
from torch.utils.data import DataLoader, TensorDataset

import engine.device
import engine.processes
import train
from conftest import tiny_model
from data.batches import Batches, Order
from data.llava import Examples, Records
from engine.checkpoint import Progress
from engine.device import choose_device, in_bfloat16
from engine.flags import one_line
from engine.optimizer import make_optimizers
from helpers import TINY, make_tiny, refused
from nanoaki import Batch, Config, Model, NanoAKI, Tokenizer

CONFIG = Config(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=32, image_size=16,
                patch_size=8, vit_embd=32, vit_head=2, dropout=0.1)
LOOKED = (DataDependentOutputException, DynamicOutputShapeException)
WHERE = [("cpu", "float32"), ("cpu", "bfloat16"),
         pytest.param("cuda:0", "auto", marks=pytest.mark.skipif(
             not torch.cuda.is_available(), reason="autograd needs a build and a GPU for it"))]


# A step on fake tensors, which have no values: whoever looks at one gets an error ----------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    data = make_tiny(tmp_path_factory.mktemp("tiny") / "data", n=12)
    made = []
    for number, (name, file, mask) in enumerate([("align", "captions", "causal"),
                                                 ("instruct", "train", "mma")]):
        examples = Examples(Records.read(data, f"{file}.json"), Tokenizer([]), CONFIG)
        made.append(train.Stage(name, number, examples, examples, mask, 4, 0.01, 4, 4))
    return made


class FakeRun:
    """A Run whose tensors are all fake, on a device, and its next step."""

    def __init__(self, stage: train.Stage, out, device: str, dtype: str, monkeypatch):
        self.mode, self.reads = FakeTensorMode(), []
        settings = train.Settings(out=str(out), batch_size=6, grad_accum=2, dtype=dtype, workers=0)
        self.stage, model = stage, NanoAKI(CONFIG, Tokenizer([]))
        real = train.Run(settings, model, [stage], torch.device("cpu"), Progress())
        parts = next(real.load(stage))
        self.targets = sum(len(part.learned) for part in parts)
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        with self.mode:
            model.load_state_dict({name: torch.empty(shape, device=device)
                                   for name, shape in shapes.items()}, assign=True)
            self.run = train.Run(settings, model, [stage], torch.device(device), Progress())
            self.run.make_optimizers()
        self.parts = tuple(Batch(*(self.mode.from_tensor(value) if torch.is_tensor(value) else value
                                   for value in part)) for part in parts)
        monkeypatch.setattr(train, "read", self.read)

    def read(self, *numbers):
        self.reads.append([(type(n).__name__, n.device.type, n.shape) for n in numbers])
        return [1.0] * len(numbers)

    def step(self) -> float:
        with self.mode:
            return self.run.step(self.stage, self.parts, self.targets)


@pytest.mark.parametrize("device, dtype", WHERE)
@pytest.mark.parametrize("number", [0, 1], ids=["align", "instruct"])
def test_a_step_waits_for_no_value_but_loss_and_norm_in_one_read(stages, tmp_path, monkeypatch,
                                                                 number, device, dtype):
    fake = FakeRun(stages[number], tmp_path, device, dtype, monkeypatch)
    for steps in (1, 2):  # the first also makes the optimizers' states
        assert fake.step() == 1.0
        kind = torch.device(device).type
        assert fake.reads == [[("FakeTensor", kind, ())] * 2] * steps
    for optimizer in fake.run.optimizers:  # to the last parameter of the last one
        for group in optimizer.param_groups:
            assert all(optimizer.state[p] for p in group["params"])
    assert all(p.grad is None for p in fake.run.model.parameters())


LOOKS = {
    "item": lambda loss, batch: loss * (loss.item() > 0),
    "if": lambda loss, batch: loss if loss > 0 else -loss,
    "tolist": lambda loss, batch: loss + len(batch.tokens.tolist()),
    "boolean index": lambda loss, batch: loss + 0 * batch.targets[batch.targets != -100].sum(),
    "nonzero": lambda loss, batch: loss + len(batch.roles.nonzero())}


@pytest.mark.parametrize("look", LOOKS)
def test_a_step_that_looks_at_a_value_fails_on_fake_tensors(stages, tmp_path, monkeypatch, look):
    real = Model.loss
    monkeypatch.setattr(Model, "loss", lambda self, batch, mask: LOOKS[look](
        real(self, batch, mask), batch))
    fake = FakeRun(stages[1], tmp_path, "cpu", "float32", monkeypatch)
    with pytest.raises(LOOKED):
        fake.step()


def test_the_entrance_that_checks_what_it_gets_is_not_trainings(stages, tmp_path, monkeypatch):
    """Model.forward looks at roles and targets: the same step through it fails."""
    monkeypatch.setattr(Model, "loss", lambda self, batch, mask: self(
        batch.images[batch.shown], batch.tokens, batch.roles, batch.targets, mask)[1])
    fake = FakeRun(stages[1], tmp_path, "cpu", "float32", monkeypatch)
    with pytest.raises(LOOKED):
        fake.step()


def test_a_step_without_its_one_read_fails_on_fake_tensors(stages, tmp_path, monkeypatch):
    read = train.read
    fake = FakeRun(stages[1], tmp_path, "cpu", "float32", monkeypatch)
    monkeypatch.setattr(train, "read", read)
    with pytest.raises(LOOKED):
        fake.step()


# Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, capability, dtype, expected", [
    ("cuda", (7, 5), "auto", False),      # it would only emulate it
    ("cuda", (8, 0), "auto", True),
    ("cuda", (12, 0), "auto", True),
    ("cuda", (7, 5), "bfloat16", True),   # what is asked for
    ("cuda", (8, 0), "float32", False),
    ("cpu", (8, 0), "auto", False),
    ("mps", (8, 0), "auto", False),
    ("cpu", (8, 0), "bfloat16", True)])
def test_bfloat16_is_chosen_where_it_is_fast_or_asked_for(monkeypatch, device, capability, dtype,
                                                          expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert in_bfloat16(device, dtype) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: device == "mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for name in ("auto", device):
        found, line = choose_device(name, dtype)
        assert found.type == device and f"device: {device}, " in line
        assert ("bfloat16" in line, "float32" in line) == (expected, not expected)


@pytest.mark.parametrize("device, bfloat16, expected", [
    ("meta", True, torch.bfloat16), ("meta", False, torch.float32),
    ("cpu", True, torch.float32), ("cpu", False, torch.float32)])  # a CPU is slow in bfloat16
def test_muon_computes_in_the_runs_precision_but_on_a_cpu(monkeypatch, tmp_path, device, bfloat16,
                                                          expected):
    model = tiny_model(torch.float32).to(device)
    assert make_optimizers(model, 0.1, 0.1, 0.0, bfloat16)[0].dtype == expected
    asked = []
    monkeypatch.setattr(train, "in_bfloat16", lambda *how: asked.append(how) or bfloat16)
    settings = train.Settings(out=str(tmp_path), dtype="bfloat16")
    stage = train.Stage("instruct", 1, None, None, "mma", 4, 0.01, 4, 4)
    run = train.Run(settings, model, [stage], torch.device(device), Progress())
    run.make_optimizers()
    assert run.optimizers[0].dtype == expected and asked == [(device, "bfloat16")]


# The way to the device ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind, waits", [("cuda", False), ("cpu", True), ("mps", True)])
def test_a_batch_is_copied_without_waiting_on_cuda_alone(stages, monkeypatch, kind, waits):
    seen, examples = [], stages[1].examples

    class Loss(torch.nn.Module):
        def loss(self, batch, mask):
            return batch, mask

    def to(self, device, non_blocking):
        seen.append((device.type, non_blocking))
        return self

    batch = Batches(examples, Order(examples.lengths, examples.replies.group, 4, 1, [0]))[0]
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(engine.device, "autocast", lambda *how: nullcontext())
    objective = engine.device.Objective(Loss(), torch.device(kind), "auto")
    moved, mask = objective(batch, "mma")
    assert mask == "mma" and moved.ids == batch.ids and seen == [(kind, not waits)] * 7


@pytest.mark.parametrize("kind, pinned, workers", [("cuda", True, 4), ("cpu", False, 1),
                                                   ("mps", False, 1)])
def test_memory_is_pinned_and_workers_are_chosen_by_the_runs_device(monkeypatch, kind, pinned,
                                                                    workers):
    """Not by what the machine has: here, as it seems, a GPU."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine.processes, "DataLoader",
                        lambda parts, **how: asked.append(how) or [])
    for chosen in (-1, 0, 3):
        engine.processes.load([[0] * 4], 0, chosen, torch.device(kind))
    assert [how["num_workers"] for how in asked] == [workers, 0, 3]
    assert {how["pin_memory"] for how in asked} == {pinned}


# What torch raises because of a flag -------------------------------------------------------------


def loaded_in_vain():
    data = TensorDataset(torch.zeros(4))
    for _ in DataLoader(data, num_workers=1, worker_init_fn=lambda worker: os._exit(1)):
        pass


def not_there():  # what an Apple GPU says
    raise NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device.")


@pytest.mark.parametrize("act, words", [
    (lambda: torch.empty(10 ** 16), "not enough memory"),
    (lambda: torch.zeros(2).add_(torch.ones(2), alpha=1e300), "a number is too large"),
    (loaded_in_vain, "--workers"),
    (not_there, "--device")])
def test_what_torch_raises_because_of_a_flag_is_one_line(act, words, capsys):
    with pytest.raises(RuntimeError) as raised:
        act()
    with pytest.raises(SystemExit) as e, one_line():
        raise raised.value
    error = capsys.readouterr().err
    assert e.value.code == 2 and words in error and error.count("\n") == 1


def test_other_errors_of_torch_keep_their_traceback():
    with pytest.raises(RuntimeError, match="must match"), one_line():
        torch.zeros(2) + torch.zeros(3)


def test_compile_without_a_compiler_is_one_line_and_so_is_a_model_too_large(tmp_path, capsys):
    data = make_tiny(tmp_path / "data", n=12)
    command = ["--data", data, "--out", tmp_path / "out", *TINY, "--steps", "2"]
    said = []
    for flags in (["--n-embd", 10 ** 15], ["--compile"]):
        with (torch._inductor.config.patch({"cpp.cxx": (None, "/no/compiler")}),
              pytest.raises(SystemExit) as e):
            train.main([str(word) for word in [*command, *flags]])
        said.append(capsys.readouterr().err.replace("\r", "\n").splitlines()[-1])
        assert e.value.code == 2
    assert "not enough memory" in said[0]
    assert "--compile or --attention flex does not work here" in said[1] and "compiler" in said[1]


@pytest.mark.parametrize("flags, words", [
    (["--attention", "flex"], "attention flex needs a CUDA GPU: it has no backward on cpu"),
    (["--attention", "flex", "--compile"], "attention flex compiles itself")])
def test_flex_attention_where_it_cannot_train_is_one_line(tmp_path, capsys, flags, words):
    command = ["--data", make_tiny(tmp_path / "data", n=12), "--out", tmp_path / "out", *TINY,
               "--steps", "2", "--device", "cpu"]
    assert words in refused(capsys, train.main, *command, *flags)
    assert not (tmp_path / "out").exists()
    train.main([str(word) for word in [*command, "--attention", "dense"]])
    assert (tmp_path / "out").exists()
