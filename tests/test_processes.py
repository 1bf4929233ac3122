"""Several processes: the same gradient, the same run, and an end together."""
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import engine.processes
import train
from data.llava import Examples, Records
from engine.checkpoint import Progress
from engine.processes import (StopSignal, first_does, in_parallel, joined_processes,
                              rank_and_world, total)
from helpers import ROOT, TINY, held, make_tiny, metrics, refused, started
from nanoaki import Config, NanoAKI, Tokenizer


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(script, *argv, timeout=110):
    """A script in two processes of torchrun's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               f"--master_port={free_port()}", script, *argv]
    return subprocess.run([str(a) for a in command], capture_output=True, text=True,
                          timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})


def in_processes(logs: Path, world: int, work, *args) -> list[tuple[int, str]]:
    """Exit code and output of work(*args) in each of some processes: torchrun without torchrun."""
    port, running = free_port(), []
    with ExitStack() as stack:
        for rank in range(world):
            where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            running.append(stack.enter_context(
                started(logs / f"log{rank}", work, *args, **where)))
        for process in running:
            process.join(60)
        return [(process.exitcode, (logs / f"log{rank}").read_text())
                for rank, process in enumerate(running)]


@pytest.fixture
def alone(monkeypatch):
    """torchrun's variables for one process."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)


# One gradient ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Twelve records, answers of 1 to 60 bytes, the second half without pictures."""
    folder = tmp_path_factory.mktemp("mixed")
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    records = [{"id": i, **({"image": "a.png"} if i < 6 else {}), "conversations": [
        {"from": "human", "value": "say"}, {"from": "gpt", "value": "a" * (1 + 5 * i)}]}
        for i in range(12)]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def leave_gradients(folder: Path, out: Path, hows: list[str]) -> None:
    """The gradient of a step of all records: "2" is in two parts a process, "1 wrong" is wrong."""
    out.mkdir(exist_ok=True)
    config = Config(image_size=16, patch_size=8, vit_embd=32, n_embd=32, n_head=2, vit_head=2,
                    block_size=96)
    clip = torch.nn.utils.clip_grad_norm_
    with joined_processes():
        for how in hows:
            torch.manual_seed(0)
            model, found = NanoAKI(config, Tokenizer([])), []
            examples = Examples(Records.read(folder, "train.json"), model.tokenizer, config)
            stage = train.Stage("instruct", 1, examples, examples, "mma", 1, 0.01, 1, 1)
            settings = train.Settings(out=str(out), batch_size=12, grad_accum=int(how[0]),
                                      workers=0, share=1)
            run = train.Run(settings, model, [stage], torch.device("cpu"), Progress())
            run.make_optimizers()
            run.signal = StopSignal()

            def kept(parameters, *more):
                found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
                return clip(list(parameters), *more)

            torch.nn.utils.clip_grad_norm_ = kept
            parts = next(run.load(stage))
            mine = sum(len(part.learned) for part in parts)
            targets, _, _, _ = run.agree(mine, "")
            if "wrong" in how:  # every process the same weight, whatever it has to learn
                targets = run.world * mine
            loss = run.step(stage, parts, targets)
            torch.nn.utils.clip_grad_norm_ = clip
            shown, = total(any(len(part.shown) for part in parts))
            if run.rank == 0:
                torch.save({"gradient": found[0], "loss": loss, "processes with pictures": shown,
                            "backend": dist.get_backend() if run.world > 1 else None},
                           out / f"{how}.pt")


def test_the_gradient_is_one_whether_whole_split_or_on_two_processes_and_not_with_a_mean_each(
        mixed, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    leave_gradients(mixed, one, ["1", "3"])
    for code, log in in_processes(tmp_path, 2, leave_gradients, mixed, two, ["1", "2", "1 wrong"]):
        assert code == 0, log
    whole, split, halves, quarters, wrong = (torch.load(path) for path in (
        one / "1.pt", one / "3.pt", two / "1.pt", two / "2.pt", two / "1 wrong.pt"))
    assert halves["processes with pictures"] == 1  # the other one has none
    assert halves["backend"] == "gloo"
    for other in (split, halves, quarters):
        assert (other["gradient"] - whole["gradient"]).norm() < 1e-5 * whole["gradient"].norm()
        assert other["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert (wrong["gradient"] - whole["gradient"]).norm() > 0.01 * whole["gradient"].norm()


# One run -----------------------------------------------------------------------------------------

WATCHED = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import data.llava
check = data.llava.check_picture
def checked(folder, picture):
    with open({log!r}, "a") as file:
        print(os.environ["RANK"], picture, file=file)
    check(folder, picture)
data.llava.check_picture = checked
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def test_two_processes_have_the_losses_and_scores_of_one_and_one_can_go_on_for_them(tmp_path,
                                                                                    capsys):
    data, checked = make_tiny(tmp_path / "data", n=60), tmp_path / "checked"
    records = json.loads((data / "train.json").read_text())
    records[7]["conversations"][1]["value"] = " "
    (data / "train.json").write_text(json.dumps(records))
    short = ["--data", str(data), *TINY, "--align-steps", "10", "--steps", "40", "--eval-every",
             "20", "--skip-bad", "--out"]
    train.main([*short, str(tmp_path / "one")])
    capsys.readouterr()
    (tmp_path / "watched.py").write_text(WATCHED.format(root=str(ROOT), log=str(checked)))
    done = launch(tmp_path / "watched.py", *short, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and a["stage"] == b["stage"] and a["skipped"] == 1
        assert a["questions"] == b["questions"]
        if "train_loss" in a:
            assert b["train_loss"] == pytest.approx(a["train_loss"], rel=0.01)
            assert b["val_loss"] == pytest.approx(a["val_loss"], rel=0.01)
    # the first process alone speaks, and checks each picture once, whichever files show it
    for words in ("test split", "2 processes", "mask: mma", "\ndata: ", "ask it yourself"):
        assert done.stdout.count(words) == 1
    assert done.stderr.count("skipping: ") == 1 and "1 of 120 are bad" in done.stderr
    lines = checked.read_text().splitlines()
    assert {line.split()[0] for line in lines} == {"0"}
    assert len(lines) == len(set(lines)) == 60 + 10 + 10  # train with captions, val, test
    train.main(["--resume", "--out", str(tmp_path / "two")])
    assert "no longer bit-identical" in capsys.readouterr().out


def test_processes_talk_on_the_cpu_and_only_gradients_on_the_device(tmp_path, monkeypatch, alone):
    """Whatever a run was begun on, here a CPU run that is resumed where there seems to be a GPU."""
    data, out = make_tiny(tmp_path / "data", n=12), tmp_path / "out"
    with monkeypatch.context() as outside:
        outside.delenv("WORLD_SIZE")
        train.main(["--data", str(data), *TINY, "--align-steps", "1", "--steps", "1",
                    "--test-sample", "0", "--out", str(out)])
    real, seen = train.Run.train, []

    def trains(self):
        seen.append((dist.get_backend(), dist.get_backend(self.parallel.process_group), self.world,
                     self.device.type))
        real(self)

    monkeypatch.setattr(train.Run, "train", trains)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train.main(["--resume", "--out", str(out)])
    assert seen == [("gloo", "gloo", 1, "cpu")]
    assert not dist.is_initialized()  # it is left when the run ends
    monkeypatch.setattr(engine.processes, "DistributedDataParallel", lambda _, process_group:
                        process_group)
    monkeypatch.setattr(dist, "new_group", lambda backend: backend)
    module = torch.nn.Linear(1, 1)
    with joined_processes():
        assert in_parallel(module, torch.device("cuda")) == "nccl"
        assert in_parallel(module, torch.device("cpu")) is dist.group.WORLD
        with pytest.raises(ValueError, match="several processes need --device cpu, or CUDA"):
            in_parallel(module, torch.device("mps"))
    assert in_parallel(module, torch.device("cuda")) is module


def test_agreement_is_exact_and_on_the_cpu(alone, monkeypatch):
    """Counts of tokens, in float64 where MPS has none, and no tensor of a device."""
    real, seen = dist.all_reduce, []

    def reduces(tensor):
        seen.append((tensor.dtype, tensor.device.type))
        real(tensor)

    monkeypatch.setattr(dist, "all_reduce", reduces)
    with joined_processes():
        assert total(2 ** 40 + 1, 15, 0.0) == [2 ** 40 + 1, 15, 0]
    assert seen == [(torch.float64, "cpu")]


# An end together ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT",
                                     "RANK, MASTER_ADDR, MASTER_PORT"])
def test_world_size_without_torchruns_other_variables_is_one_line(tmp_path, capsys, monkeypatch,
                                                                  alone, missing):
    for name in missing.split(", "):
        monkeypatch.delenv(name)
    error = refused(capsys, train.main, "--data", tmp_path, "--out", tmp_path / "out")
    assert f"WORLD_SIZE is set, but not {missing}: " in error and "torchrun" in error
    assert not (tmp_path / "out").exists() and not dist.is_initialized()


@pytest.mark.parametrize("argv, words", [
    ([], "train.json: No such file"), (["--bacth-size", "4"], "did you mean --batch-size?")])
def test_a_bad_flag_ends_all_processes_with_its_reason(tmp_path, argv, words):
    argv = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu", *argv]
    (first, said), (second, silent) = in_processes(tmp_path, 2, train.main, argv)
    assert (first, second) == (2, 2) and "Traceback" not in said
    assert said.count(words) == 1 and silent == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, value", [("RANK", "one"), ("MASTER_PORT", "none"),
                                         ("WORLD_SIZE", "many")])
def test_torchruns_variables_that_do_not_work_are_one_line(tmp_path, capsys, monkeypatch, alone,
                                                          name, value):
    monkeypatch.setenv(name, value)
    error = refused(capsys, train.main, "--data", tmp_path, "--out", tmp_path / "out")
    assert "torchrun's variables do not work" in error and value in error
    assert not dist.is_initialized()


def test_a_folder_in_use_ends_all_processes_each_in_a_line(tmp_path):
    data, out = make_tiny(tmp_path / "data", n=12), tmp_path / "out"
    out.mkdir()
    argv = ["--data", str(data), *TINY, "--steps", "2", "--align-steps", "0", "--out", str(out)]
    with held(out):
        (first, said), (second, other) = in_processes(tmp_path, 2, train.main, argv)
    assert (first, second) == (2, 2) and "Traceback" not in said + other
    assert said.count("another process is at work there") == 1
    assert other.count("\n") == 1 and "another process has ended" in other


def train_and_diverge(argv) -> None:
    """train.py, where what the second process learns from is no number in its step 2."""
    step = train.Run.step

    def diverges(self, stage, parts, targets):
        if self.rank == 1 and self.progress.step == 2:
            self.model.decoder.norm.weight.data[0] = float("nan")
        return step(self, stage, parts, targets)

    train.Run.step = diverges
    train.main(argv)


def test_a_loss_that_is_no_number_in_one_process_ends_all_before_the_step(tmp_path):
    data, out = make_tiny(tmp_path / "data", n=12), tmp_path / "out"
    argv = ["--data", str(data), *TINY, "--steps", "9", "--align-steps", "0", "--save-every", "0",
            "--out", str(out)]
    (first, said), (second, silent) = in_processes(tmp_path, 2, train_and_diverge, argv)
    assert (first, second) == (2, 2) and "Traceback" not in said + silent
    assert said.count("instruct step 2: loss nan") == 1 and silent == ""
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["model"].values())


def test_an_error_that_is_no_process_is_raised_as_it_is(alone):
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        with joined_processes():
            raise RuntimeError("shapes do not fit")
    assert not dist.is_initialized()


def do_once(out: Path, fails: bool) -> None:
    def work():
        with open(out, "a") as file:
            print(rank_and_world(), file=file)
        if fails:
            raise OSError("the disk is full")
        return {"found": [1, 2]}

    with joined_processes():
        assert first_does(work) == {"found": [1, 2]}


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_first_process_does_all_have_or_all_end(tmp_path, fails):
    ended = in_processes(tmp_path, 3, do_once, tmp_path / "done", fails)
    assert (tmp_path / "done").read_text() == "(0, 3)\n"
    assert [code for code, _ in ended] == ([1, 2, 2] if fails else [0, 0, 0])
    assert ("the disk is full" in ended[0][1]) == fails


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
step = train.Run.step
def broken(*_):
    raise ValueError("images/x.png: the picture cannot be read")
def dying(self, stage, parts, targets):
    if self.rank == 1 and self.progress.step == 3:
        {how}
    return step(self, stage, parts, targets)
train.Run.step = dying
train.main()
"""


@pytest.mark.parametrize("how, words", [
    ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
    ("stage.examples.picture = broken", "images/x.png: the picture cannot be read")])
def test_a_process_that_dies_ends_the_job_with_its_reason_and_none_hangs(tmp_path, how, words):
    (tmp_path / "dying.py").write_text(DYING.format(root=str(ROOT), how=how))
    data = make_tiny(tmp_path / "data", n=20)
    done = launch(tmp_path / "dying.py", "--data", data, *TINY, "--out", tmp_path / "out",
                  timeout=60)
    assert done.returncode != 0 and words in done.stderr, done.stderr[-3000:]
    if "picture" in words:  # all processes stopped together, after a checkpoint
        assert torch.load(tmp_path / "out/last.pt", weights_only=True)["step"] == 4
        assert "Traceback" not in done.stderr.split("torch/distributed")[0], done.stderr[-3000:]
