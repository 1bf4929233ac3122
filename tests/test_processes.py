"""Several processes: the same gradient, the same run, and an end together."""
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from helpers import ROOT, TINY, make_tiny, metrics

WORKER = '''
import sys, json, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch.distributed as dist
if "WORLD_SIZE" in __import__("os").environ: dist.init_process_group("gloo")
import train
from data.llava import Examples, Records, loader
from nanoaki import Config, NanoAKI, Tokenizer
from train import Run, Settings, Stage, rank_and_world
folder, out = sys.argv[1:3]
config = Config(image_size=16, patch_size=8, vit_embd=32, n_embd=32, n_head=2, vit_head=2, block_size=96)
rank, world = rank_and_world()
import pathlib; pathlib.Path(out).mkdir(exist_ok=True)
for how in sys.argv[3:]:
    torch.manual_seed(0)
    model, accum = NanoAKI(config, Tokenizer([])), int(how[0])
    examples = Examples(Records.read(folder, "train.json"), model.tokenizer, config)
    run = Run(Settings(out=out, batch_size=12, grad_accum=accum), model,
              [Stage("instruct", examples, examples, "mma", 1, 0.01)], torch.device("cpu"))
    if "wrong" in how:  # every process the same weight, whatever it has to learn
        run.agree = lambda number: world * number
    parts = list(loader(examples, 12, [0], 1, 0, 1, range(rank * accum, (rank + 1) * accum), world * accum, workers=0))
    run.gradient(parts, "mma")
    seen = torch.tensor([float(any(part.images is not None for part in parts))])
    if world > 1: dist.all_reduce(seen)
    if rank == 0:
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.save({{"gradient": grads, "ranks with pictures": int(seen)}}, f"{{out}}/{{how}}.pt")
'''


def launch(processes, *argv, timeout=110, **kwargs):
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                f"--master_port={29500 + os.getpid() % 1000}"]
    command = (torchrun if processes > 1 else [sys.executable]) + [str(a) for a in argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Twelve records, answers of 1 to 60 bytes, the second half without pictures."""
    folder = tmp_path_factory.mktemp("mixed")
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    records = [{"id": i, **({"image": "a.png"} if i < 6 else {}), "conversations": [
        {"from": "human", "value": "say"}, {"from": "gpt", "value": "a" * (1 + 5 * i)}]} for i in range(12)]
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    return folder


def test_the_gradient_is_one_whether_whole_split_or_on_two_processes_and_not_with_a_mean_each(mixed):
    found = {}
    for processes, hows in ((1, ["1", "3"]), (2, ["1", "2", "1 wrong"])):
        out = mixed / str(processes)
        done = launch(processes, mixed / "worker.py", mixed, out, *hows)
        assert done.returncode == 0, done.stderr[-3000:]
        found |= {(processes, how): torch.load(out / f"{how}.pt") for how in hows}
    assert found[2, "1"]["ranks with pictures"] == 1  # the other one has none
    found = {key: value["gradient"] for key, value in found.items()}
    whole = found[1, "1"]
    for key in ((1, "3"), (2, "1"), (2, "2")):
        assert (found[key] - whole).norm() < 1e-5 * whole.norm(), key
    assert (found[2, "1 wrong"] - whole).norm() > 0.01 * whole.norm()


def test_two_processes_have_the_losses_and_scores_of_one_and_one_can_go_on_for_them(tmp_path):
    data = make_tiny(tmp_path / "data", n=60)
    short = ["--data", data, *TINY, "--align-steps", "10", "--steps", "40", "--eval-every", "20"]
    for processes, out in ((1, "one"), (2, "two")):
        done = launch(processes, ROOT / "train.py", *short, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test split") == 1
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        assert one.keys() == two.keys() and one["stage"] == two["stage"]
        if "train_loss" in one:
            assert two["train_loss"] == pytest.approx(one["train_loss"], rel=0.01)
            assert two["val_loss"] == pytest.approx(one["val_loss"], rel=0.01)
    done = launch(1, ROOT / "train.py", "--resume", "--out", tmp_path / "two")
    assert done.returncode == 0 and "no longer bit-identical" in done.stdout


def test_a_bad_flag_ends_all_processes_with_its_reason(tmp_path):
    done = launch(2, ROOT / "train.py", "--data", tmp_path, "--out", tmp_path / "out", "--device", "cpu")
    assert done.returncode != 0 and "train.json: No such file" in done.stderr


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
update = train.Run.update
def broken(*_):
    raise ValueError("images/x.png: the picture cannot be read")
def dying(self, stage, parts):
    if self.rank == 1 and self.step == 3:
        {how}
    return update(self, stage, parts)
train.Run.update = dying
train.main()
"""


@pytest.mark.parametrize("how, words", [
    ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
    ("stage.examples.picture = broken", "images/x.png: the picture cannot be read")])
def test_a_process_that_dies_ends_the_job_with_its_reason_and_none_hangs(tmp_path, how, words):
    (tmp_path / "dying.py").write_text(DYING.format(root=str(ROOT), how=how))
    data = make_tiny(tmp_path / "data", n=20)
    done = launch(2, tmp_path / "dying.py", "--data", data, *TINY, "--out", tmp_path / "out", timeout=60)
    assert done.returncode != 0 and words in done.stderr, done.stderr[-3000:]
    if "picture" in words:  # all processes stopped together, after a checkpoint
        assert torch.load(tmp_path / "out/last.pt", weights_only=True)["step"] == 4
