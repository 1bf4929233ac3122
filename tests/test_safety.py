"""Own data of every shape, and nothing lost: bad data, kills, full disks, numbers that are none."""
import errno
import fcntl
import gc
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import weakref
import zlib
from contextlib import ExitStack, nullcontext

import pytest
import torch
from PIL import Image
from torch.utils.data._utils import worker as torchs_worker

import engine.folder
import engine.processes
import compare
import train
from data.batches import Batches, Order
from data.llava import Examples, Records, read_splits
from engine.processes import StopSignal, leave_group, load
from helpers import (ROOT, TINY, held, kill_and_resume, make_tiny, metrics, refused, same, spoil,
                     started, wait_for, weights)
from nanoaki import Config, NanoAKI, Tokenizer

SHORT = ["--align-steps", "8", "--steps", "16", "--eval-every", "6"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data", n=60)


def ends(*argv) -> int:
    """The exit code that train.py ends with."""
    with pytest.raises(SystemExit) as e:
        train.main([str(a) for a in argv])
    error = e.value
    while error is not None:  # as garbage, a loader would wait five seconds for its worker
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    return e.value.code


def saved(out) -> dict:
    return torch.load(out / "last.pt", weights_only=True)


def at_step(monkeypatch, step: int, act) -> None:
    """Call act(run) before that step of stage 2."""
    real = train.Run.step

    def acts(self, stage, parts, targets):
        if (self.progress.stage, self.progress.step) == (1, step):
            act(self)
        return real(self, stage, parts, targets)

    monkeypatch.setattr(train.Run, "step", acts)


# Data --------------------------------------------------------------------------------------------


def test_the_readmes_three_records_train_and_say_what_is_missing(tmp_path, capsys):
    text = (ROOT / "data/README.md").read_text()
    (tmp_path / "images").mkdir()
    for i, color in ((1, "red"), (2, "blue")):
        Image.new("RGB", (30, 20), color).save(tmp_path / f"images/{i}.png")
    three = text.split("```json\n")[1].split("```")[0]
    (tmp_path / "train.json").write_text(three)
    (tmp_path / "val.json").write_text(three)
    train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), *TINY, "--block-size",
                "160", "--batch-size", "4", "--steps", "150", "--eval-every", "75", "--lr", "0.01"])
    said = capsys.readouterr().out
    assert "no captions.json" in said and "no test.json: the report is on val" in said
    assert "val split" in said
    assert metrics(tmp_path / "out")[-1]["accuracy"]["all"] == 1.0  # all four, learned by heart
    model, red = NanoAKI.load(tmp_path / "out/model.pt"), Image.open(tmp_path / "images/1.png")
    assert model.ask(red, "what color is the circle?") == "red"
    assert model.ask(None, "what is two and two?") == "four"


def test_without_val_json_a_share_is_held_out_by_picture(tiny, tmp_path, capsys):
    os.symlink(tiny / "images", tmp_path / "images")  # a link below the folder is followed
    (tmp_path / "train.json").write_text((tiny / "train.json").read_text())
    train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), *TINY, *SHORT])
    assert "no val.json: 6 records are held out, by picture" in capsys.readouterr().out
    (tmp_path / "captions.json").write_text((tiny / "captions.json").read_text())
    records = read_splits(tmp_path)
    assert "and 3 captions of their pictures left out" in capsys.readouterr().out
    shown = {name: {picture for record in some for picture in record.pictures}
             for name, some in records.items()}
    assert len(shown["val"]) == 3 and not shown["captions"] & shown["val"]
    assert not shown["train"] & shown["val"]
    assert shown["captions"] == shown["train"]  # the control: nothing else is left out


def test_bad_records_are_counted_and_shown_or_skipped_and_counted(tiny, tmp_path, capsys):
    os.symlink(tiny / "images", tmp_path / "images")
    for name in ("val", "test"):
        (tmp_path / f"{name}.json").write_text((tiny / f"{name}.json").read_text())
    records = json.loads((tiny / "train.json").read_text())
    for i in range(3, 15):
        records[i]["conversations"][1]["value"] = " "
    records[20]["conversations"][1]["value"] = "word " * 60
    (tmp_path / "train.json").write_text(json.dumps(records))
    command = ["--data", tmp_path, "--out", tmp_path / "out", *TINY, *SHORT]
    assert ends(*command) == 2
    error = capsys.readouterr().err
    assert "12 of 120 are bad" in error and "record 3 (id 'train-1-right')" in error
    assert error.count("an answer is empty") == 10 and not (tmp_path / "out").exists()
    train.main([str(a) for a in (*command, "--skip-bad")])
    error = capsys.readouterr().err
    assert "12 of 120 are bad" in error and "record 20 " in error and "64 positions" in error
    assert all(line["skipped"] == 13 for line in metrics(tmp_path / "out"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size, content", [
    ("zero-byte", b""), ("truncated", None), ("100-megapixel", "large")])
def test_pictures_that_are_none_are_found_before_the_first_step(tmp_path, size, content):
    path = tmp_path / "p.png"
    Image.new("1", (12000, 9000) if content == "large" else (50, 50)).save(path)
    if content != "large":
        path.write_bytes(path.read_bytes()[:60] if content is None else content)
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "z", "image": "p.png",
                                                      "conversations": talk}]))
    with pytest.raises(ValueError, match="record 0 .id 'z'.: p.png: "):
        Records.read(tmp_path, "train.json")


def break_pictures(data, split: str) -> None:
    for path in (data / "images").glob(f"{split}*"):
        path.write_bytes(path.read_bytes()[:40])


def test_a_held_out_picture_that_breaks_before_an_evaluation_costs_no_more_than_a_step(
        tmp_path, capsys, monkeypatch):
    data, out = make_tiny(tmp_path / "data", n=20), tmp_path / "out"
    at_step(monkeypatch, 2, lambda run: break_pictures(data, "val"))
    assert ends("--data", data, "--out", out, *TINY, *SHORT) == 2
    assert "images/val" in capsys.readouterr().err.splitlines()[-1]
    assert (saved(out)["stage"], saved(out)["step"]) == (1, 5)  # evaluated every 6 steps


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_in_training_is_one_line_after_a_checkpoint(tmp_path, capsys,
                                                                          monkeypatch, workers):
    data, out = make_tiny(tmp_path / "data", n=20), tmp_path / "out"
    at_step(monkeypatch, 2, lambda run: break_pictures(data, "train"))
    command = ["--data", data, "--out", out, *TINY, *SHORT, "--steps", 60, "--workers", workers]
    assert ends(*command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "images/train" in error and "not a picture" in error
    assert saved(out)["stage"] == 1 and saved(out)["step"] >= 3


@pytest.mark.parametrize("workers", [0, 1])
def test_with_skip_bad_a_run_goes_on_past_broken_pictures_counts_them_and_resumes_exactly(
        tmp_path, capsys, monkeypatch, workers):
    data, command = make_tiny(tmp_path / "data", n=24), []
    for name in ("train3", "train7", "val0", "test1"):
        spoil(data / f"images/{name}.png")
    command = ["--data", data, *TINY, *SHORT, "--batch-size", 16, "--workers", workers]
    assert ends(*command, "--out", tmp_path / "refused") == 2  # the control
    assert "train" in capsys.readouterr().err.splitlines()[-1]
    command += ["--skip-bad"]
    train.main([str(a) for a in command] + ["--out", str(tmp_path / "whole")])
    said = capsys.readouterr()
    for name in ("train3", "train7", "val0", "test1"):
        assert said.err.count(f"left out: {data / 'images' / name}.png: not a picture") == 1
    lines = metrics(tmp_path / "whole")
    counts = [line["left_out"] for line in lines]
    assert counts == sorted(counts) and counts[0] > 0 and counts[-1] > counts[1]
    assert lines[-1]["questions"]["all"] == 6  # of 8, two about each of four pictures
    at_step(monkeypatch, 9, lambda run: os.kill(os.getpid(), signal.SIGINT))
    assert ends(*command, "--out", tmp_path / "cut") == 130
    monkeypatch.undo()
    train.main(["--out", str(tmp_path / "cut"), "--resume"])
    assert metrics(tmp_path / "cut") == lines
    assert same(weights(tmp_path / "cut/last.pt"), weights(tmp_path / "whole/last.pt"))


@pytest.mark.parametrize("split, left", [("val", "nothing to evaluate"), ("test", "no report")])
def test_with_skip_bad_a_split_of_which_no_picture_can_be_read_does_not_cost_the_run(
        tmp_path, capsys, split, left):
    data, out = make_tiny(tmp_path / "data", n=12), tmp_path / "out"
    for path in (data / "images").glob(f"{split}*"):
        spoil(path)
    command = [str(word) for word in ("--data", data, *TINY, *SHORT, "--skip-bad", "--out", out)]
    if split == "val":
        train.main(command)
    else:
        assert ends(*command) == 2  # the report is what was asked for
    said = capsys.readouterr()
    assert left in said.out + said.err and saved(out)["stage"] == 2
    assert NanoAKI.load(out / "model.pt")


def test_with_skip_bad_a_stopped_run_goes_on_past_the_picture_that_stopped_it(tmp_path, capsys):
    data, out = make_tiny(tmp_path / "data", n=12), tmp_path / "out"
    spoil(data / "images/train3.png")
    assert ends("--data", data, *TINY, *SHORT, "--out", out) == 2
    assert "--skip-bad, also with --resume" in capsys.readouterr().err
    assert ends("--out", out, "--resume") == 2
    train.main(["--out", str(out), "--resume", "--skip-bad"])
    assert saved(out)["stage"] == 2 and saved(out)["left_out"] > 0


def test_with_skip_bad_steps_with_nothing_to_learn_add_nothing(tmp_path, capsys, monkeypatch):
    data, found = make_tiny(tmp_path / "data", n=12), []
    at_step(monkeypatch, 3, lambda run: found.append(
        [spoil(path) for path in (data / "images").glob("train*")]))
    train.main(["--data", str(data), *TINY, *SHORT, "--skip-bad", "--out", str(tmp_path / "out")])
    state = saved(tmp_path / "out")
    assert found and state["stage"] == 2 and state["left_out"] == 32 * 12
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    losses = [line["train_loss"] for line in metrics(tmp_path / "out") if "train_loss" in line]
    assert losses[1] > 0.3 and losses[2] == 0


@pytest.mark.parametrize("name, workers, change", [
    ("train", 0, "append"), ("train", 1, "touch"), ("train", 0, "replace"), ("train", 0, "remove"),
    ("val", 0, "append")])
def test_a_data_file_that_changes_under_a_run_ends_it_in_one_line_after_a_checkpoint(
        tmp_path, capsys, monkeypatch, name, workers, change):
    data, out = make_tiny(tmp_path / "data", n=20), tmp_path / "out"
    path = data / f"{name}.json"

    def act(run):
        if change == "append":
            path.write_bytes(path.read_bytes() + b"\n")
        elif change == "touch":
            os.utime(path)
        elif change == "replace":
            (data / "new").write_text(path.read_text().replace("color", "shade"))
            os.replace(data / "new", path)
        else:
            path.unlink()

    at_step(monkeypatch, 2, act)
    command = ["--data", data, "--out", out, *TINY, *SHORT, "--steps", 60, "--workers", workers]
    assert ends(*command) == 2
    error = capsys.readouterr().err
    line = error.splitlines()[-1]
    reason = "No such file" if change == "remove" else "changed since it was read"
    assert "Traceback" not in error and str(path) in line and reason in line
    if name == "val":
        assert (saved(out)["stage"], saved(out)["step"]) == (1, 5)
    else:
        assert saved(out)["stage"] == 1 and saved(out)["step"] >= 3


def test_a_long_history_is_shortened_the_same_way_in_training_and_evaluation(tmp_path):
    turns = [("human", "long " * 12), ("gpt", "old"), ("human", "now?"),
             ("gpt", "the answer to learn")]
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "conversations": [
        {"from": who, "value": text} for who, text in turns]}]))
    data = make_tiny(tmp_path / "data", n=20)
    train.main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY, *SHORT])
    model = NanoAKI.load(tmp_path / "out/model.pt")
    e = Examples(Records.read(tmp_path, "train.json"), model.tokenizer, model.config)[1]
    assert len(e.whole[0]) <= 64 and e.whole[0][:len(e.prompt[0])] == e.prompt[0]
    assert model.tokenizer.decode(e.whole[0][len(e.prompt[0]):]) == "the answer to learn"


# Signals and kills -------------------------------------------------------------------------------


def test_a_second_signal_of_either_kind_ends_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        for number in (signal.SIGINT, signal.SIGTERM):
            assert signal.getsignal(number) == signal.SIG_DFL
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_while_processes_agree_waits_for_the_next_time_since_only_one_may_have_had_it(
        monkeypatch):
    run = train.Run.__new__(train.Run)
    run.signal = StopSignal()

    def total(*numbers):
        run.signal.number = signal.SIGTERM  # after this process has said that it had none
        return numbers

    monkeypatch.setattr(train, "total", total)
    assert run.agree(7, "") == (7, 0, False, 0)
    assert run.agree(7, "") == (7, signal.SIGTERM, False, 0)


def test_killed_at_ten_random_moments_a_run_ends_as_if_never_killed(tiny, tmp_path):
    kill_and_resume(tiny, tmp_path, 10)


def test_sigterm_to_the_whole_group_saves_and_exits_143(tiny, tmp_path):
    run = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--data", tiny, *TINY, "--align-steps", "5", "--steps",
         "100000", "--workers", "1", "--out", tmp_path / "out"], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    deadline, lines = time.time() + 60, tmp_path / "out/metrics.jsonl"
    while not lines.exists() or not lines.read_text():
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    out, error = run.communicate(timeout=60)
    assert run.returncode == 143 and "--resume" in out and "Traceback" not in error, error


def train_and_signal_the_group(argv, blocked: bool) -> None:
    """train.py, whose first worker signals its group before it has left it."""
    engine.processes.leave_group = lambda worker: (os.killpg(0, signal.SIGTERM), leave_group())
    if not blocked:
        engine.processes.signals_blocked = nullcontext
    train.main(argv)


@pytest.mark.parametrize("blocked", [True, False], ids=["blocked", "the control: not blocked"])
def test_a_signal_to_the_group_does_not_end_a_worker_that_has_just_been_started(tiny, tmp_path,
                                                                                blocked):
    argv = ["--data", str(tiny), *TINY, "--workers", "1", "--out", str(tmp_path / "out")]
    with started(tmp_path / "log", train_and_signal_the_group, argv, blocked) as run:
        run.join(60)
        error = (tmp_path / "log").read_text()
        assert run.exitcode == (143 if blocked else 2), error
        assert ("DataLoader worker" in error) != blocked, error


def train_and_die(argv, alive, watched: bool) -> None:
    """train.py, killed while its first worker starts; alive is open as long as either lives."""
    pid = os.getpid()

    def leave(worker):
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        if watched:
            leave_group()

    engine.processes.leave_group = leave
    torchs_worker.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds between its own looks, from then on
    train.main(argv)


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "the control: not watched"])
def test_a_worker_whose_program_was_killed_while_it_started_ends(tiny, tmp_path, watched):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    argv = ["--data", str(tiny), *TINY, "--workers", "1", "--out", str(tmp_path / "out")]
    with started(tmp_path / "log", train_and_die, argv, theirs, watched) as run:
        theirs.close()
        run.join(60)
        assert run.exitcode == -signal.SIGKILL
        ended = ours.poll(60 if watched else 2)  # true once no process has the other end any more
        if not ended:
            os.killpg(run.pid, signal.SIGKILL)
        assert ended == watched


def read_and_leave(folder, method: str) -> None:
    multiprocessing.set_start_method(method, force=True)
    examples = Examples(Records.read(folder, "train.json"), Tokenizer([]), Config(block_size=200))
    order = Order(examples.lengths, examples.replies.group, 4, 1000, [0])
    next(load([Batches(examples, order)], 0, 1, torch.device("cpu")))
    sys.exit(7)


@pytest.mark.parametrize("method", ["fork", "forkserver"])  # Linux's, before and since Python 3.14
def test_a_program_that_ends_while_workers_read_for_it_does_not_hang(tiny, tmp_path, method):
    with started(tmp_path / "log", read_and_leave, tiny, method) as run:
        run.join(60)
        assert run.exitcode == 7, (tmp_path / "log").read_text()


# A run's folder ----------------------------------------------------------------------------------


def test_two_runs_that_begin_together_do_not_share_a_folder(tiny, tmp_path, capsys, monkeypatch):
    command = ["--data", str(tiny), "--out", str(tmp_path / "out"), *TINY, *SHORT]
    prepare = train.prepare

    def slow(*some):
        monkeypatch.setattr(train, "prepare", prepare)
        train.main(command)  # the other, which is faster
        return prepare(*some)

    monkeypatch.setattr(train, "prepare", slow)
    assert ends(*command) == 2
    assert "already holds something" in capsys.readouterr().err
    assert [line["stage"] for line in metrics(tmp_path / "out")].count("test") == 1


def test_a_run_is_resumed_by_one_process_at_a_time_and_by_another_as_soon_as_that_is_killed(
        tiny, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--data", str(tiny), *TINY, "--steps", "100000", "--workers", "1", "--save-every", "0",
            "--out", str(out)]
    with started(tmp_path / "log", train.main, argv) as run:
        wait_for(run, (out / "last.pt").exists)
        error = refused(capsys, train.main, "--resume", "--out", out)
        assert "another process is at work there" in error
        run.kill()
        run.join()
        with held(out) as is_held:  # although its loader may live a little longer
            assert is_held


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "the control: not checked"])
def test_a_lock_that_was_removed_while_another_opened_it_does_not_let_two_in(
        tmp_path, monkeypatch, checked):
    locked = engine.folder.locked
    with ExitStack() as stack:

        def late(path):
            """Locks a file that its holder, who was just leaving, removes; and a third comes."""
            monkeypatch.setattr(engine.folder, "locked", locked)
            lock = locked(path)
            os.remove(path)
            assert stack.enter_context(held(tmp_path))
            return lock

        monkeypatch.setattr(engine.folder, "locked", late)
        if checked:
            with pytest.raises(ValueError, match="another process is at work there"):
                stack.enter_context(engine.folder.hold(tmp_path))
        else:
            monkeypatch.setattr(engine.folder, "is_at", lambda *_: True)
            stack.enter_context(engine.folder.hold(tmp_path))  # so there are two
    with held(tmp_path) as is_held:
        assert is_held  # both have left
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, trains", [
    (errno.ENOLCK, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_without_locks_trains_and_says_so(tiny, tmp_path, capsys, monkeypatch,
                                                        number, trains):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fails)
    command = ["--data", tiny, "--out", tmp_path / "out", *TINY, *SHORT, "--align-steps", 0,
               "--steps", 1, "--test-sample", 0]
    if trains:
        train.main([str(a) for a in command])
        assert f"{tmp_path / 'out'}: this file system has no locks" in capsys.readouterr().out
        assert NanoAKI.load(tmp_path / "out/model.pt") and not (tmp_path / "out/lock").exists()
    else:
        error = refused(capsys, train.main, *command)
        assert os.strerror(number) in error
        assert not (tmp_path / "out/last.pt").exists()


def test_a_folder_of_a_run_killed_before_its_first_checkpoint_can_be_used_again(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").touch()
    (tmp_path / "out/last.pt.part").write_text("half")
    (tmp_path / "out/config.json").write_text("{}")
    train.main(["--data", str(tiny), "--out", str(tmp_path / "out"), *TINY, *SHORT])
    assert NanoAKI.load(tmp_path / "out/model.pt")


@pytest.mark.parametrize("main", [train.main, compare.main])
def test_a_folder_that_cannot_be_made_is_one_line_before_data_is_read(
        main, tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(train, "prepare", None)
    for out in ("file", "file/out/deeper"):
        error = refused(capsys, main, "--data", tiny, "--out", tmp_path / out)
        assert f"--out: {tmp_path / 'file'} is no folder" in error
    monkeypatch.setattr(os, "access", lambda path, how: False)
    assert f"written into {tmp_path}" in refused(capsys, main, "--data", tiny, "--out",
                                                 tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


HOSTILE = "a\x1b[31m\nb\x07\x9b"


def test_no_control_character_of_data_reaches_the_terminal(tiny, tmp_path, capsys):
    data, family = tmp_path / "data", "\u0633\u200c\U0001f468\u200d\U0001f469"
    shutil.copytree(tiny, data)
    for name in ("train", "val", "test"):
        records = json.loads((data / f"{name}.json").read_text())
        records.append(dict(records[0], image=f"{HOSTILE}.png"))  # it is skipped, and named
        for record in records:
            record["task"] = HOSTILE + family
            for turn in record["conversations"]:
                turn["value"] += HOSTILE + family
        (data / f"{name}.json").write_text(json.dumps(records))
    train.main(["--data", str(data), "--out", str(tmp_path / "out"), "--skip-bad", *TINY, *SHORT])
    said, skipped = capsys.readouterr()
    assert "a\\x1b[31m" in skipped
    said += skipped
    assert not {"\x1b", "\x07", "\x9b"} & set(said)
    assert said.count("a\\x1b[31m\\nb\\x07\\x9b" + family) >= 3  # question, answer, the table's task




def resume_on_a_full_disk(out, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train.main(["--resume", "--out", str(out)])


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_whole(tiny, tmp_path, monkeypatch):
    out, log = tmp_path / "out", tmp_path / "log"
    at_step(monkeypatch, 3, lambda run: signal.raise_signal(signal.SIGINT))
    assert ends("--data", tiny, *TINY, *SHORT, "--out", out) == 130
    before = (out / "last.pt").read_bytes()
    with started(log, resume_on_a_full_disk, out, len(before) // 2) as run:
        run.join(60)
        assert run.exitcode == 2, log.read_text()
    error = log.read_text()
    assert "last.pt" in error.splitlines()[-1] and "Traceback" not in error, error
    assert "File too large" in error.splitlines()[-1]  # the system's reason, not torch's
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.part"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_stops_before_the_step_and_keeps_the_checkpoint(
        tiny, tmp_path, capsys, monkeypatch, value):
    out, real, runs, kept = tmp_path / "out", torch.nn.utils.clip_grad_norm_, [], {}

    def poisoned(parameters, *more):
        for run in runs:
            run.model.decoder.norm.weight.grad[0] = value
            kept.update(last=(out / "last.pt").read_bytes(),
                        token=run.model.decoder.token.weight.detach().clone())
        return real(parameters, *more)

    at_step(monkeypatch, 5, runs.append)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    assert ends("--data", tiny, "--out", out, *TINY, *SHORT, "--save-every", 0) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "instruct step 5" in error and "learning rate" in error and "train-" in error
    assert (out / "last.pt").read_bytes() == kept["last"]
    token = "decoder.token.weight"
    assert saved(out)["step"] == 5 and torch.equal(saved(out)["model"][token], kept["token"])
    assert torch.equal(runs[0].model.state_dict()[token], kept["token"])
    assert (metrics(out)[-1]["step"], "diverged" in metrics(out)[-1]) == (5, True)


# What a run begins with --------------------------------------------------------------------------


def test_init_takes_weights_tokenizer_and_config_and_freeze_keeps_what_it_names(tiny, tmp_path,
                                                                                capsys):
    train.main(["--data", str(tiny), "--out", str(tmp_path / "a"), *TINY, *SHORT])
    init = ["--data", str(tiny), "--init", str(tmp_path / "a/model.pt"), "--steps", "5",
            "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    train.main([*init, "--out", str(tmp_path / "b"), "--freeze", "vit"])
    a, b = NanoAKI.load(tmp_path / "a/model.pt"), weights(tmp_path / "b/last.pt")
    assert NanoAKI.load(tmp_path / "b/model.pt").tokenizer.merges == a.tokenizer.merges
    a = a.state_dict()
    changed = {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"projector", "decoder"}
    capsys.readouterr()
    for extra, wanted in ((["--n-embd", "64"], "leave out --n-embd"),
                          (["--preset", "nano"], "leave out --preset"),
                          (["--align-lr", "0.01"], "give --align-steps too"),
                          (["--steps", "0"], "nothing to train: steps is 0")):
        assert wanted in refused(capsys, train.main, *init, "--out", tmp_path / "c", *extra)
    assert "freeze needs init" in refused(capsys, train.main, "--freeze", "vit", "--out",
                                          tmp_path / "c")


@pytest.mark.parametrize("begins", ["--resume", "--init"])
@pytest.mark.parametrize("kept", [False, True], ids=["freed", "the control: kept"])
def test_a_checkpoint_is_freed_before_the_first_step(tiny, tmp_path, monkeypatch, begins, kept):
    out, real, trained, seen, keep = tmp_path / "out", train.load_file, train.Run.train, [], []
    command = ["--data", str(tiny), *TINY, *SHORT, "--out", str(out)]
    at_step(monkeypatch, 3, lambda run: signal.raise_signal(signal.SIGINT))
    assert ends(*command) == 130

    def load(path):
        state = real(path)
        seen.extend(weakref.ref(weight) for weight in state["model"].values())
        if kept:
            keep.append(state)
        return state

    def trains(self):
        gc.collect()
        assert len(seen) == len(self.model.state_dict())
        assert {ref() is not None for ref in seen} == {kept}
        seen.append("looked")
        trained(self)

    monkeypatch.setattr(train, "load_file", load)
    monkeypatch.setattr(train.Run, "train", trains)
    if begins == "--resume":
        train.main(["--resume", "--out", str(out)])
    else:
        train.main(["--init", str(out / "model.pt"), "--data", str(tiny), "--steps", "1",
                    "--out", str(tmp_path / "second"), "--workers", "0", "--device", "cpu"])
    assert seen[-1] == "looked"


# Precision and memory ----------------------------------------------------------------------------


def test_evaluation_takes_no_more_at_once_than_training_has_room_for(tiny, tmp_path, monkeypatch):
    sizes = {"train": set(), "held out": set(), "answer": set()}
    generate, loss = NanoAKI.generate, NanoAKI.loss

    def generates(self, images, tokens, *more, **how):
        sizes["answer"].add(len(tokens))
        return generate(self, images, tokens, *more, **how)

    def losses(self, batch, *more):
        sizes["train" if torch.is_grad_enabled() else "held out"].add(len(batch.tokens))
        return loss(self, batch, *more)

    monkeypatch.setattr(NanoAKI, "generate", generates)
    monkeypatch.setattr(NanoAKI, "loss", losses)
    train.main(["--data", str(tiny), "--out", str(tmp_path / "out"), *TINY, *SHORT,
                "--grad-accum", "16"])
    assert max(sizes["train"]) == 2 and max(sizes["held out"]) == max(sizes["answer"]) == 8


def test_bfloat16_is_autocast_and_trains_about_as_float32_does(tiny, tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        train.main(["--data", str(tiny), "--out", str(out), *TINY, *SHORT, "--steps", "60",
                    "--dtype", dtype])
        assert all(t.dtype == torch.float32 for t in weights(out / "last.pt").values())
        losses.append(metrics(out)[-2]["train_loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipe")
@pytest.mark.parametrize("words", [3, 300])  # it is full at the end of the script, and before
def test_who_reads_no_more_ends_a_script_quietly(words):
    run = subprocess.Popen([sys.executable, "draw.py", "--ask", "a " * words, "--out", "-"],
                           cwd=ROOT, env=os.environ | {"COLUMNS": "2000"},
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 1
