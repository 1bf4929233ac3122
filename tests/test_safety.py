"""Own data of every shape, and nothing lost: bad data, kills, full disks, numbers that are none."""
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import train
from data.llava import Examples, Records
from helpers import ROOT, TINY, held, kill_and_resume, make_tiny, metrics, start, weights
from nanoaki import NanoAKI
from test_train import refused

SHORT = ["--align-steps", "8", "--steps", "16", "--eval-every", "6"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data", n=60)


def test_the_readmes_three_records_train_and_say_what_is_missing(tmp_path, capsys):
    text = (ROOT / "data/README.md").read_text()
    (tmp_path / "images").mkdir()
    for i, color in ((1, "red"), (2, "blue")):
        Image.new("RGB", (30, 20), color).save(tmp_path / f"images/{i}.png")
    three = text.split("```json\n")[1].split("```")[0]
    (tmp_path / "train.json").write_text(three)
    (tmp_path / "val.json").write_text(three)
    train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), *TINY, "--block-size", "160", "--batch-size", "4",
                "--steps", "150", "--eval-every", "75", "--lr", "0.01"])
    said = capsys.readouterr().out
    assert "no captions.json" in said and "no test.json: the report is on val" in said and "val split" in said
    assert metrics(tmp_path / "out")[-1]["accuracy"]["all"] == 1.0  # learned by heart, all four replies
    model, red = NanoAKI.load(tmp_path / "out/model.pt"), Image.open(tmp_path / "images/1.png")
    assert model.ask(red, "what color is the circle?") == "red"
    assert model.ask(None, "what is two and two?") == "four"


def test_without_val_json_a_share_is_held_out_by_picture(tiny, tmp_path, capsys):
    os.symlink(tiny / "images", tmp_path / "images")  # a link below the folder is followed
    (tmp_path / "train.json").write_text((tiny / "train.json").read_text())
    train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), *TINY, *SHORT])
    assert "no val.json: 6 records are held out, by picture" in capsys.readouterr().out
    (tmp_path / "captions.json").write_text((tiny / "captions.json").read_text())
    _, records = train.read_data(train.Settings(data=str(tmp_path)))
    assert "and 3 captions of their pictures left out" in capsys.readouterr().out
    shown = {name: {picture for record in some for picture in record["image"]} for name, some in records.items()}
    assert len(shown["val"]) == 3 and not shown["captions"] & shown["val"] and not shown["train"] & shown["val"]
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
    command = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), *TINY, *SHORT]
    with pytest.raises(SystemExit) as e:
        train.main(command)
    error = capsys.readouterr().err
    assert e.value.code == 2 and "12 of 120 are bad" in error and "record 3 (id 'train-1-right')" in error
    assert error.count("an answer is empty") == 10 and not (tmp_path / "out").exists()
    train.main([*command, "--skip-bad"])
    error = capsys.readouterr().err
    assert "12 of 120 are bad" in error and "record 20 " in error and "64 positions" in error
    assert all(line["skipped"] == 13 for line in metrics(tmp_path / "out"))


def break_pictures(monkeypatch, folder, split):
    """Cut the files of a split's pictures, anywhere below folder, at step 2 of stage 2."""
    real = train.Run.update

    def update(self, stage, parts):
        if self.stage == 1 and self.step == 2:
            for path in folder.glob(f"*/images/{split}*"):
                path.write_bytes(path.read_bytes()[:40])
        return real(self, stage, parts)

    monkeypatch.setattr(train.Run, "update", update)


def test_a_held_out_picture_that_breaks_before_an_evaluation_costs_no_more_than_a_step(tmp_path, capsys, monkeypatch):
    data = make_tiny(tmp_path / "data", n=20)
    break_pictures(monkeypatch, tmp_path, "val")
    with pytest.raises(SystemExit) as e:
        train.main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY, *SHORT])
    assert e.value.code == 2 and "images/val" in capsys.readouterr().err.splitlines()[-1]
    state = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert (state["stage"], state["step"]) == (1, 5)  # evaluated every 6 steps


def test_a_second_signal_of_either_kind_ends_at_once(tiny, tmp_path):
    run = train.Run.__new__(train.Run)
    with run.signals():
        signal.raise_signal(signal.SIGINT)
        assert run.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_while_processes_agree_waits_for_the_next_time_since_only_one_may_have_had_it(monkeypatch):
    run = train.Run.__new__(train.Run)
    run.signal, run.device = 0, None

    def total(*numbers, device):
        run.signal = signal.SIGTERM  # after this process has said that it had none
        return numbers

    monkeypatch.setattr(train, "total", total)
    run.agree()
    assert run.stop == 0
    run.agree()
    assert run.stop == signal.SIGTERM


def test_two_runs_that_begin_together_do_not_share_a_folder(tiny, tmp_path, capsys, monkeypatch):
    command = ["--data", str(tiny), "--out", str(tmp_path / "out"), *TINY, *SHORT]
    prepare = train.prepare

    def slow(*given):
        monkeypatch.setattr(train, "prepare", prepare)
        train.main(command)  # the other, which is faster
        return prepare(*given)

    monkeypatch.setattr(train, "prepare", slow)
    with pytest.raises(SystemExit):
        train.main(command)
    assert "already holds something" in capsys.readouterr().err
    assert [line["stage"] for line in metrics(tmp_path / "out")].count("test") == 1


def test_a_run_is_resumed_by_one_process_at_a_time_and_by_another_as_soon_as_that_is_killed(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    run = start("--data", tiny, *TINY, "--steps", "100000", "--workers", "1", "--save-every", "0", "--out", out)
    deadline = time.time() + 60
    while not (out / "last.pt").exists():
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.05)
    with pytest.raises(SystemExit) as ended:
        train.main(["--resume", "--out", str(out)])
    assert ended.value.code == 2 and "another process is at work there" in capsys.readouterr().err
    run.kill()
    run.communicate()
    with held(out) as is_held:  # although its loader may live a little longer
        assert is_held


def test_evaluation_takes_no_more_at_once_than_training_has_room_for(tiny, tmp_path, monkeypatch):
    sizes, generate, loss = {"train": set(), "held out": set(), "answer": set()}, train.NanoAKI.generate, train.NanoAKI.loss

    def generates(self, images, tokens, *given, **how):
        sizes["answer"].add(len(tokens))
        return generate(self, images, tokens, *given, **how)

    def losses(self, x, *given):
        sizes["train" if torch.is_grad_enabled() else "held out"].add(len(x))
        return loss(self, x, *given)

    monkeypatch.setattr(train.NanoAKI, "generate", generates)
    monkeypatch.setattr(train.NanoAKI, "loss", losses)
    train.main(["--data", str(tiny), "--out", str(tmp_path / "out"), *TINY, *SHORT, "--grad-accum", "16"])
    assert max(sizes["train"]) == 2 and max(sizes["held out"]) == max(sizes["answer"]) == 8


def test_a_folder_of_a_run_killed_before_its_first_checkpoint_can_be_used_again(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").touch()
    (tmp_path / "out/last.pt.part").write_text("half")
    train.main(["--data", str(tiny), "--out", str(tmp_path / "out"), *TINY, *SHORT])
    assert NanoAKI.load(tmp_path / "out/model.pt")


def test_a_folder_that_cannot_be_written_is_one_line(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    error = refused(capsys, train.main, "--data", tiny, "--out", tmp_path / "file/out", *TINY, *SHORT)
    assert str(tmp_path / "file") in error


def test_a_picture_that_breaks_in_training_is_one_line_after_a_checkpoint(tiny, tmp_path, capsys, monkeypatch):
    data = make_tiny(tmp_path / "data", n=20)
    break_pictures(monkeypatch, tmp_path, "train")
    for workers in ("0", "1"):
        out = tmp_path / f"out{workers}"
        with pytest.raises(SystemExit) as e:
            train.main(["--data", str(data), "--out", str(out), *TINY, *SHORT, "--steps", "60", "--workers", workers])
        error = capsys.readouterr().err.splitlines()[-1]
        assert e.value.code == 2 and "images/train" in error and "cannot be read" in error
        state = torch.load(out / "last.pt", weights_only=True)
        assert state["stage"] == 1 and state["step"] >= 3
        data = make_tiny(tmp_path / f"data{workers}", n=20)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size, content", [("zero-byte", b""), ("truncated", None), ("100-megapixel", "large")])
def test_pictures_that_are_none_are_found_before_the_first_step(tmp_path, size, content):
    path = tmp_path / "p.png"
    Image.new("1", (12000, 9000) if content == "large" else (50, 50)).save(path)
    if content != "large":
        path.write_bytes(path.read_bytes()[:60] if content is None else content)
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "z", "image": "p.png", "conversations": talk}]))
    with pytest.raises(ValueError, match="record 0 .id 'z'.: p.png: "):
        Records.read(tmp_path, "train.json")


def test_killed_at_ten_random_moments_a_run_ends_as_if_never_killed(tiny, tmp_path):
    kill_and_resume(tiny, tmp_path, 10)


def test_sigterm_to_the_whole_group_saves_and_exits_143(tiny, tmp_path):
    run = start("--data", tiny, *TINY, "--steps", "100000", "--workers", "1", "--out", tmp_path / "out",
                start_new_session=True)
    deadline = time.time() + 60
    while not (tmp_path / "out/metrics.jsonl").exists() or not (tmp_path / "out/metrics.jsonl").read_text():
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    out, error = run.communicate(timeout=60)
    assert run.returncode == 143 and "--resume" in out and "Traceback" not in error, error


@pytest.mark.parametrize("blocked", [True, False], ids=["blocked", "the control: not blocked"])
def test_a_signal_to_the_group_does_not_end_a_worker_that_has_just_been_started(tiny, tmp_path, blocked):
    code = """
import os, signal, sys; sys.path.insert(0, sys.argv.pop(1))
from contextlib import nullcontext
from data import llava
import train
leave = llava.leave_group
llava.leave_group = lambda worker: (os.killpg(0, signal.SIGTERM), leave())
if sys.argv.pop(1) == "False":
    train.signals_blocked = nullcontext
train.main()
"""
    run = subprocess.run([sys.executable, "-c", code, str(ROOT), str(blocked), "--data", str(tiny), *TINY, "--workers", "1",
                          "--out", str(tmp_path / "out")], timeout=60, capture_output=True, text=True, start_new_session=True)
    assert (run.returncode == 143) == ("Traceback" not in run.stderr) == blocked, run.stderr


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "the control: not watched"])
def test_a_worker_whose_program_was_killed_while_it_started_ends(tiny, tmp_path, watched):
    code = """
import os, signal, sys, time; sys.path.insert(0, sys.argv.pop(1))
from data import llava
import train
leave, pid = llava.leave_group, os.getpid()
if sys.argv.pop(1) == "False":
    leave = lambda: None
llava.leave_group = lambda worker: (os.kill(pid, signal.SIGKILL), time.sleep(0.5), leave())
train.main()
"""
    run = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(watched), "--data", str(tiny), *TINY, "--workers", "1",
                            "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, start_new_session=True)
    assert run.wait(timeout=60) == -signal.SIGKILL
    try:
        run.communicate(timeout=8)  # until the worker has closed it as well; torch looks every 5 seconds
        assert watched
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        assert not watched


def test_a_program_that_ends_while_workers_read_for_it_does_not_hang(tiny):
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from data.llava import Examples, Records, loader
from nanoaki import Config, Tokenizer
examples = Examples(Records.read(sys.argv[2], "train.json"), Tokenizer([]), Config(block_size=200))
batches = iter(loader(examples, 4, [0], 1000, workers=1))
next(batches)
sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tiny)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_whole(tiny, tmp_path, monkeypatch):
    real = train.Run.update

    def stop(self, stage, parts):
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return real(self, stage, parts)

    monkeypatch.setattr(train.Run, "update", stop)
    with pytest.raises(SystemExit):
        train.main(["--data", str(tiny), *TINY, *SHORT, "--out", str(tmp_path / "out")])
    before = (tmp_path / "out/last.pt").read_bytes()
    limit = len(before) // 2
    run = start("--resume", "--out", tmp_path / "out",
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, error = run.communicate(timeout=60)
    lines = [line for line in error.splitlines() if line]
    assert run.returncode == 2 and "last.pt" in lines[-1] and "Traceback" not in error, error
    assert (tmp_path / "out/last.pt").read_bytes() == before and not list((tmp_path / "out").glob("*.part"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_stops_before_the_step_and_keeps_the_checkpoint(tiny, tmp_path, capsys, monkeypatch,
                                                                                      value):
    real, kept = train.Run.gradient, {}

    def poisoned(self, parts, mask):
        loss = real(self, parts, mask)
        if self.stage == 1 and self.step == 5:
            self.model.decoder.norm.weight.grad[0] = value
            kept.update(self.model.state_dict(), last=(tmp_path / "out/last.pt").read_bytes())
            kept["decoder.token.weight"] = kept["decoder.token.weight"].clone()
        return loss

    monkeypatch.setattr(train.Run, "gradient", poisoned)
    with pytest.raises(SystemExit) as e:
        train.main(["--data", str(tiny), "--out", str(tmp_path / "out"), *TINY, *SHORT, "--save-every", "0"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and "instruct step 5" in error and "learning rate" in error and "train-" in error
    assert (tmp_path / "out/last.pt").read_bytes() == kept["last"]
    state = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert state["step"] == 5 and torch.equal(state["model"]["decoder.token.weight"], kept["decoder.token.weight"])


def test_init_takes_weights_tokenizer_and_config_and_freeze_keeps_what_it_names(tiny, tmp_path, capsys):
    train.main(["--data", str(tiny), "--out", str(tmp_path / "a"), *TINY, *SHORT])
    init = ["--data", str(tiny), "--init", str(tmp_path / "a/model.pt"), "--steps", "5", "--batch-size", "8",
            "--workers", "0"]
    train.main([*init, "--out", str(tmp_path / "b"), "--freeze", "vit"])
    a, b = (weights(tmp_path / name / "last.pt") for name in "ab")
    a = NanoAKI.load(tmp_path / "a/model.pt").state_dict()
    changed = {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"projector", "decoder"}
    capsys.readouterr()
    for extra, word in ((["--n-embd", "64"], "--n-embd"), (["--align-steps", "3"], "--align-steps")):
        assert word in refused(capsys, train.main, *init, "--out", tmp_path / "c", *extra)
    assert "freeze needs init" in refused(capsys, train.main, "--freeze", "vit", "--out", tmp_path / "c")


def test_a_long_history_is_shortened_the_same_way_in_training_and_evaluation(tmp_path):
    turns = [("human", "long " * 12), ("gpt", "old"), ("human", "now?"), ("gpt", "the answer to learn")]
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "conversations": [
        {"from": who, "value": text} for who, text in turns]}]))
    data = make_tiny(tmp_path / "data", n=20)
    train.main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY, *SHORT])
    model = NanoAKI.load(tmp_path / "out/model.pt")
    e = Examples(Records.read(tmp_path, "train.json"), model.tokenizer, model.config)[1]
    assert len(e.whole[0]) <= 64 and e.whole[0][:len(e.prompt[0])] == e.prompt[0]
    assert model.tokenizer.decode(e.whole[0][len(e.prompt[0]):]) == "the answer to learn"


def test_bfloat16_is_autocast_and_trains_about_as_float32_does(tiny, tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        train.main(["--data", str(tiny), "--out", str(out), *TINY, *SHORT, "--steps", "60", "--dtype", dtype])
        assert all(t.dtype == torch.float32 for t in weights(out / "last.pt").values())
        losses.append(metrics(out)[-2]["train_loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
