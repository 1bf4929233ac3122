"""Comparisons: equal terms, what is started when, going on with half a comparison, and tables."""
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import compare
import engine.results
import nanoaki
import train
from engine.charts import chart
from engine.results import Result, interval, learning_curve, steps_to_80, table, table_by_task
from helpers import TINY, held, make_tiny, metrics, refused, same, started, wait_for, weights
from nanoaki import NanoAKI, save_file

# Without stage 1, since each process takes seconds to start; in 80 steps, most answers are right.
SHORT = ["--align-steps", "0", "--steps", "80", "--eval-every", "20", "--save-every", "0",
         "--warmup", "10", "--lr", "0.01", "--adamw-lr", "0.01", "--seeds", "1"]


@pytest.fixture(autouse=True)
def signals():
    """compare.main leaves its own handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("data") / "tiny")
    captions = (folder / "captions.json").read_text()  # with text, so that there is an order
    (folder / "captions.json").write_text(captions.replace("<image>", "<image>\\nwhat is it?"))
    return folder


def plan(*argv) -> compare.Comparison:
    flags = vars(compare.make_parser().parse_args([str(word) for word in argv]))
    return compare.plan(flags.pop("masks"), flags.pop("seeds"), flags.pop("jobs"), flags)


# Equal terms: what compare.py starts, in this process --------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Of some entries with two seeds: weights and batch of each step of their training."""
    out, found, seen = tmp_path_factory.mktemp("out"), {}, []
    plain = nanoaki.Model.loss

    def watched(model, batch, mask=None):
        if model.training:
            first = {name: p.clone() for name, p in model.state_dict().items()}
            seen.append(SimpleNamespace(weights=first, ids=batch.ids, roles=batch.roles, mask=mask))
        return plain(model, batch, mask)

    c = plan("--data", tiny, *TINY, "--align-steps", 4, "--steps", 5, "--eval-every", 5, "--lr",
             0.01, "--seeds", 2, "--masks", "causal,mma,dot", "--out", out)
    patch = pytest.MonkeyPatch()
    patch.setattr(nanoaki.Model, "loss", watched)
    first, _, second = c.phases(c.lr)
    for run in first + second:
        seen.clear()
        train.main(c.next_command(run)[2:])
        found[run.folder.parent.name, run.folder.name] = SimpleNamespace(
            folder=run.folder, batches=list(seen), run=run)
    patch.undo()
    return found


def alike(a, b) -> bool:
    """Whether two runs began with the same weights and saw the same examples in the same order."""
    return same(a.batches[0].weights, b.batches[0].weights) and (
        [batch.ids for batch in a.batches] == [batch.ids for batch in b.batches])


def test_entries_of_a_seed_begin_with_the_same_weights_and_see_the_same_data_in_order(runs):
    for seed in ("seed0", "seed1"):
        assert alike(runs[seed, "causal-0.01"], runs[seed, "mma-0.01"])
    ours, other = runs["seed0", "causal-0.01"], runs["seed1", "causal-0.01"]
    assert not same(ours.batches[0].weights, other.batches[0].weights)  # the control: another seed
    assert [batch.ids for batch in ours.batches] != [batch.ids for batch in other.batches]
    dot, aligned = runs["seed0", "dot-0.01"], runs["seed0", "align-dual"]
    assert [batch.ids for batch in dot.batches] == [batch.ids for batch in ours.batches]
    data = runs["seed0", "align-data"]
    assert alike(aligned, data)  # of stage 1 as well, whose orders differ
    assert not same(weights(aligned.folder / "last.pt"), weights(data.folder / "last.pt"))
    assert {len(found.batches) for (_, name), found in runs.items() if "align" not in name} == {5}


def test_stage_2_begins_with_the_weights_of_stage_1_in_its_order(runs):
    orders = {"causal-0.01": "data", "mma-0.01": "data", "dot-0.01": "dual"}
    for (seed, name), found in runs.items():
        if name in orders:
            aligned = found.folder.parent / f"align-{orders[name]}/last.pt"
            assert same(found.batches[0].weights, weights(aligned))
            assert not same(found.batches[0].weights, found.batches[1].weights)  # the control


def test_entries_are_trained_under_their_masks_and_in_their_orders(runs):
    masks = {"causal-0.01": "causal", "mma-0.01": "mma", "dot-0.01": "causal"}
    for (seed, name), found in runs.items():
        assert {batch.mask for batch in found.batches} == {masks.get(name, "causal")}
        plain = {"dot-0.01": "causal-0.01", "align-dual": "align-data"}.get(name, name)
        for n, (batch, other) in enumerate(zip(found.batches, runs[seed, plain].batches)):
            turned = name != plain and n % 2 == 1
            assert torch.equal(batch.roles, other.roles) != turned
            assert torch.equal(batch.roles.sort().values, other.roles.sort().values)


def test_runs_of_a_seed_differ_in_mask_order_and_folder_alone(runs):
    for seed in ("seed0", "seed1"):
        saved = {}
        for name in ("causal-0.01", "mma-0.01", "dot-0.01"):
            both = json.loads((runs[seed, name].folder / "config.json").read_text())
            saved[name] = both["config"] | both["settings"]
        for name, free in (("mma-0.01", {"mask", "out"}), ("dot-0.01", {"order", "out", "init"})):
            assert {key for key, value in saved[name].items()
                    if value != saved["causal-0.01"][key]} == free


def test_flags_go_to_the_stage_that_takes_them(tiny, tmp_path):
    flags = ["--data", tiny, "--out", tmp_path / "out", "--seeds", 1,
             "--masks", "mma,text,mma@eval"]
    more = ["--n-embd", 48, "--dropout", 0.1, "--align-lr", 0.03, "--align-steps", 7, "--steps", 30,
            "--lr", 0.5, "--adamw-lr", 0.001, "--preset", "nano", "--compile"]
    (one, two), trials, (mma, text, evaluated) = plan(*flags, *more).phases(0.5)
    both = {"data": str(tiny), "dropout": 0.1, "adamw_lr": 0.001, "compile": True, "seed": 0,
            "test_sample": 0}
    assert not trials and [run.folder for run in (one, two)] == [
        tmp_path / "out/seed0/align-data", tmp_path / "out/seed0/align-text"]
    assert one.flags == both | {"n_embd": 48, "align_lr": 0.03, "align_steps": 7, "preset": "nano",
                                "steps": 0, "order": "data"}
    assert two.flags == one.flags | {"order": "text"}
    assert mma.flags == both | {"steps": 30, "eval_every": 3, "lr": 0.5, "mask": "mma",
                                "order": "data", "init": str(one.folder / "last.pt"),
                                "align_steps": 0}
    assert text.flags == mma.flags | {"mask": "causal", "order": "text",
                                      "init": str(two.folder / "last.pt")}
    assert evaluated.flags == mma.flags | {"mask": "causal"}
    assert evaluated.folder.name == "causal-0.5"
    assert [(run.split, run.mask) for run in (one, mma, text, evaluated)] == [
        ("", ""), ("test", "mma"), ("test", "causal"), ("test", "mma")]
    for run in (one, two, mma, text):  # all that train.py has to say
        train.make_parser().parse_args(plan(*flags, *more).next_command(run)[2:])


def test_where_there_is_no_stage_1_stage_2_takes_all_flags(tiny, tmp_path):
    flags = ["--data", tmp_path, "--masks", "mma", "--seeds", 1, "--lr", 0.5, "--preset", "nano"]
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_text("[]")
    first, _, (run,) = plan(*flags, "--n-embd", 48).phases(0.5)  # no captions
    assert not first and "init" not in run.flags and run.split == "val"
    assert (run.flags["align_steps"], run.flags["preset"], run.flags["n_embd"]) == (0, "nano", 48)
    (tmp_path / "captions.json").write_text("[]")
    assert plan(*flags).phases(0.5)[0]  # the control
    first, _, (run,) = plan(*flags, "--align-steps", 0).phases(0.5)
    assert not first and run.flags["align_steps"] == 0
    NanoAKI(nanoaki.Config(), nanoaki.Tokenizer([])).save(tmp_path / "own.pt")
    own = [*flags[:-2], "--init", tmp_path / "own.pt", "--freeze", "vit"]
    first, _, (run,) = plan(*own).phases(0.5)
    assert not first and run.flags["init"] == str(tmp_path / "own.pt")
    assert run.flags["align_steps"] == 0 and run.flags["freeze"] == "vit"
    assert run.flags["features"] == str(plan(*own).out)  # one look for all runs
    assert "features" not in plan(*own, "--augment").phases(0.5)[2][0].flags
    (one,), _, (run,) = plan(*own, "--align-steps", 7).phases(0.5)  # where it is asked for
    assert one.flags["init"] == str(tmp_path / "own.pt") and one.flags["align_steps"] == 7
    assert run.flags["init"] == str(one.folder / "last.pt") and run.flags["align_steps"] == 0


# The command, with the real train.py and sample.py -----------------------------------------------


@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory):
    """A comparison that was stopped while its entry was trained, and gone on with."""
    folder = tmp_path_factory.mktemp("real")
    flags = ["--data", str(tiny), *TINY, *SHORT, "--masks", "mma@eval",
             "--out", str(folder / "out")]
    log, done = folder / "log", folder / "out/seed0/causal-0.01/metrics.jsonl"
    with started(log, compare.main, flags) as process:
        wait_for(process, lambda: done.exists() and done.read_text())
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        process.join()
    step = torch.load(done.with_name("last.pt"), weights_only=True)["step"]
    stopped = SimpleNamespace(code=process.exitcode, said=log.read_text(), step=step)
    with started(log, compare.main, flags) as process:
        process.join()
    assert process.exitcode == 0, log.read_text()
    return SimpleNamespace(out=folder / "out", flags=flags, stopped=stopped, said=log.read_text())


def test_ctrl_c_stops_a_comparison_and_all_runs_save(real):
    assert real.stopped.code == 130 and "Traceback" not in real.stopped.said
    assert "the same command goes on:\n  python compare.py --data" in real.stopped.said
    assert 0 < real.stopped.step < 80


def test_what_was_stopped_and_gone_on_with_ends_as_what_was_never_stopped(real, tmp_path):
    ours = real.out / "seed0/causal-0.01"
    assert "--resume" in (ours / "log.txt").read_text()
    run = plan(*real.flags).phases(0.01)[2][0]._replace(folder=tmp_path / "whole")
    train.main(plan(*real.flags).next_command(run)[2:])
    assert same(weights(run.folder / "last.pt"), weights(ours / "last.pt"))
    assert metrics(run.folder) == metrics(ours)


def test_the_report_is_printed_and_written_with_its_picture(real):
    assert (real.out / "results.md").read_text() in real.said
    assert "`mma@eval`" in real.said and Image.open(real.out / "curves.png").width > 300
    first, *_, last = re.findall(r"\| (\d+) of 80 steps, about (\S+) left", real.said)
    assert first[0] in ("20", "40", "60") and last == ("80", "00:00")


def test_results_are_those_of_the_last_weights_under_the_mask_of_the_test(real, tiny):
    records = json.loads((tiny / "test.json").read_text())
    pictures = [Image.open(tiny / record["image"]) for record in records]
    questions = [record["conversations"][0]["value"].replace("<image>\n", "") for record in records]
    right = [record["conversations"][1]["value"] for record in records]
    run, = plan(*real.flags).phases(0.01)[2]
    model = NanoAKI.load(run.folder / "last.pt")
    answers = model.ask(pictures, questions, mask="mma")
    assert answers != model.ask(pictures, questions)  # the control: masks change answers
    said = [json.loads(line) for line in run.answers.read_text().splitlines()]
    assert [line["answer"] for line in said] == answers
    hits = [a == b for a, b in zip(answers, right, strict=True)]
    assert run.scores()["accuracy"]["all"] == sum(hits) / len(hits)
    assert 0 < run.scores()["blind"]["all"] < run.scores()["accuracy"]["all"]


def test_a_comparison_is_gone_on_with_only_under_its_own_flags(runs, tiny, tmp_path, capsys,
                                                                monkeypatch):
    monkeypatch.setattr(compare, "start", None)  # nothing may be started
    out = runs["seed0", "causal-0.01"].folder.parents[1]
    flags = ["--data", tiny, "--lr", 0.01, "--seeds", 2, "--masks", "causal,mma,dot", "--out", out,
             "--device", "cpu", "--batch-size", 32, "--steps", 5]
    own, before = [*flags, *TINY, "--align-steps", 4, "--eval-every", 5], contents(out)
    model = runs["seed0", "mma-0.01"].folder / "last.pt"
    for other, wanted in ((["--n-embd", 48], "seed0/align-data: --n-embd was 32 there, not 48"),
                          (["--align-steps", 9], "seed0/align-data: --align-steps was 4 there"),
                          (["--dropout", 0.1], "seed0/align-data: --dropout was 0.0"),
                          (["--steps", 6], "seed0/causal-0.01: --steps was 5"),
                          (["--eval-every", 4], "seed0/causal-0.01: --eval-every was 5"),
                          (["--batch-size", 9], "seed0/align-data: --batch-size was 32"),
                          (["--augment"], "seed0/align-data: --augment was False there, not True")):
        assert wanted in refused(capsys, compare.main, *own, *other)
    said = refused(capsys, compare.main, *own, "--align-steps", 0)
    assert "seed0/causal-0.01: --init was" in said
    for other, wanted in ((["--init", model], "seed0/causal-0.01: --init was"),
                          (["--init", model, "--n-embd", 32], "leave out --n-embd")):
        assert wanted in refused(capsys, compare.main, *flags, "--eval-every", 5, *other)
    assert contents(out) == before
    shutil.copytree(out, tmp_path / "moved")
    c = plan(*own, "--out", tmp_path / "moved", "--workers", 2, "--save-every", 9)
    for run in sum(c.phases(c.lr), []):
        c.refuse_other_flags(run)  # the control: none is


def test_a_comparison_whose_data_chose_the_positions_can_be_gone_on_with(tiny, tmp_path):
    long = shutil.copytree(tiny, tmp_path / "long")
    records = json.loads((long / "train.json").read_text())
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=400)
    records[0]["conversations"][0]["value"] = "<image>\n" + "".join(letters)
    (long / "train.json").write_text(json.dumps(records))
    without = TINY.index("--block-size")
    flags = ["--data", long, *TINY[:without], *TINY[without + 2:], "--align-steps", 1, "--steps", 1,
             "--lr", 0.01, "--seeds", 1, "--masks", "mma", "--out", tmp_path / "out"]
    c = plan(*flags)
    runs = sum(c.phases(0.01), [])
    for run in runs:
        train.main(c.next_command(run)[2:])
        c.refuse_other_flags(run)
    assert nanoaki.load_file(run.folder / "last.pt")["config"]["block_size"] > c.config.block_size
    with pytest.raises(ValueError, match="align-data: --block-size was"):  # the control
        plan(*flags, "--block-size", 999).refuse_other_flags(runs[0])


def contents(folder: Path) -> dict:
    """What changes if a file does."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}


def test_what_is_finished_is_only_reported_wherever_it_lies(real, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "start", None)
    shutil.copytree(real.out, tmp_path / "moved")
    flags = [*real.flags, "--save-every", "9", "--jobs", "1", "--out", str(tmp_path / "moved")]
    compare.main(flags)
    said = capsys.readouterr().out
    assert said.split("\n\n")[1:] == (real.out / "results.md").read_text().split("\n\n")[1:]


def test_two_comparisons_are_not_at_work_in_one_folder(real, capsys, monkeypatch):
    monkeypatch.setattr(compare, "start", None)
    with held(real.out) as is_held:
        assert is_held
        assert "another process is at work" in refused(capsys, compare.main, *real.flags)
    seen = []

    def tries(c, at_work):
        with held(real.out) as is_held:
            seen.append(is_held)
        raise ValueError("enough")

    monkeypatch.setattr(compare, "do_all", tries)
    assert "enough" in refused(capsys, compare.main, *real.flags) and seen == [False]
    with held(real.out) as is_held:
        assert is_held  # the control: given back


# What is started when, with scripts that only leave what train.py and sample.py leave -----------

TRAIN = r"""
import json, os, shutil, signal, sys, time
from pathlib import Path

here, words = Path(__file__).parent, sys.argv[1:]
flags = {word: value for word, value in zip(words, words[1:] + [""]) if word.startswith("--")}
out = Path(flags["--out"])
name = f"{out.parent.name}/{out.name}"

def note(*what):
    with open(here / "calls", "a") as file:
        file.write(json.dumps([time.time(), *what]) + "\n")

def log(**line):
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line | {"seconds": 60.0}) + "\n")

def stop(number, _):
    with open(out / "saved", "a") as file:
        file.write(str(int(number)))
    sys.exit(128 + number)

note("train" + " again" * ("--resume" in flags), name)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
fate = json.loads((here / "fates").read_text()).get(name, "")
steps = out / "steps"
if "--resume" not in flags:
    shutil.copy(here / "begun.pt", out / "last.pt")
    steps.write_text(max(flags["--steps"], flags.get("--align-steps", "0"), key=int))
(out / "ready").touch()
if fate.startswith("after "):
    _, other, *rest = fate.split()
    fate = " ".join(rest)
    while not (out.parents[1] / other / "ready").exists():
        time.sleep(0.01)
if fate == "wait":
    while not (here / "go").exists():
        time.sleep(0.01)
if fate == "slow":
    time.sleep(0.3)
if fate == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "fails":
    sys.exit("train.py: no such picture")
stage = "align" if "align" in name else "instruct"
if fate == "diverges":
    log(stage=stage, step=3, diverged="loss nan")
    sys.exit(f"train.py: {stage} step 3: loss nan")
log(stage=stage, step=int(steps.read_text()), train_loss=1.0, samples_per_second=9.0,
    accuracy={"all": 0.5}, questions={"all": 9}, blind={})
shutil.copy(here / "end.pt", out / "last.pt")
note("end", name)
"""

SAMPLE = r"""
import json, sys, time
from pathlib import Path

here, words = Path(__file__).parent, sys.argv[1:]
flags = dict(zip(words[::2], words[1::2]))
model = Path(flags["--model"]).parent
name = f"{model.parent.name}/{model.name}"
right = json.loads((here / "fates").read_text()).get(f"{name} {flags['--split']}", 5)
with open(here / "calls", "a") as file:
    file.write(json.dumps([time.time(), f"ask {flags['--split']} {flags['--mask']}", name]) + "\n")
line = {"id": "1", "task": "a", "question": "?", "right": "yes", "blind": "no"}
lines = [json.dumps(line | {"answer": "yes" if n < right else "no"}) + "\n" for n in range(10)]
Path(flags["--out"]).write_text("".join(lines))
"""


class Stage:
    """A folder of those scripts, and what they were started for."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, folder / "out"
        for name, text in (("train.py", TRAIN), ("sample.py", SAMPLE), ("train.json", "[]"),
                           ("captions.json", "[]"), ("test.json", "[]")):
            (folder / name).write_text(text)
        save_file({"stage": 0}, folder / "begun.pt")
        save_file({"stage": 1}, folder / "end.pt")
        self.flags = ["--data", str(folder), "--out", str(self.out), "--align-steps", "5",
                      "--steps", "20", "--device", "cpu"]
        self.fates({})

    def fates(self, fates: dict) -> None:
        """Folder -> what becomes of its training; folder and split -> right answers of ten."""
        (self.folder / "fates").write_text(json.dumps(fates))

    def calls(self) -> list[str]:
        """What was started, in order, with its folder."""
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        return [f"{name}: {what}" for _, what, name in lines if what != "end"]


def run_on(folder: Path, argv: list[str]) -> None:
    compare.SCRIPTS = folder
    compare.main(argv)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "SCRIPTS", tmp_path)
    monkeypatch.setattr(compare, "TRIED", [0.0025, 0.005, 0.01])  # whatever train.py's default is
    monkeypatch.setattr(compare, "time", SimpleNamespace(sleep=lambda _: time.sleep(0.02)))
    return Stage(tmp_path)


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_run_is_made_once_also_those_that_diverge(stage, jobs, capsys):
    fates = {"seed0/causal-0.005": "diverges", "seed1/mma-0.01": "diverges",
             "seed0/causal-0.0025 val": 2, "seed0/causal-0.01 val": 3}
    fates |= {"seed0/align-data": "slow", "seed1/align-data": "slow"}
    if jobs == 2:
        fates |= {"seed0/align-data": "after seed1/align-data",  # which has to be there
                  "seed1/align-data": "after seed0/align-data"}
    stage.fates(fates)
    argv = [*stage.flags, "--masks", "causal,mma@eval,mma", "--seeds", "2", "--jobs", str(jobs)]
    compare.main(argv)
    said, calls = capsys.readouterr().out, stage.calls()
    first = ["seed0/align-data: train", "seed1/align-data: train"]
    trials = ["seed0/causal-0.0025: train", "seed0/causal-0.005: train",
              "seed0/causal-0.01: train", "seed0/causal-0.0025: ask val causal",
              "seed0/causal-0.01: ask val causal"]
    second = ["seed0/causal-0.01: ask test causal", "seed0/causal-0.01: ask test mma",
              "seed0/mma-0.01: train", "seed0/mma-0.01: ask test mma",
              "seed1/causal-0.01: train", "seed1/causal-0.01: ask test causal",
              "seed1/causal-0.01: ask test mma", "seed1/mma-0.01: train"]
    assert sorted(calls[:2]) == first  # then causal chooses, before anything else is trained
    assert sorted(calls[2:7]) == sorted(trials) and sorted(calls[7:]) == sorted(second)
    assert "`mma` diverged (seed 1)" in said and "| `mma@eval` | 50.0 ± 0.0 |" in said
    assert "for all: 0.01, at the edge of what was tried; it is the best" in said
    assert "0.0025: 20.0%, 0.005: diverged, 0.01: 30.0%" in said
    lines = [json.loads(line) for line in (stage.folder / "calls").read_text().splitlines()]
    (_, end), (start, _) = [[at for at, _, name in lines if name == f"seed{n}/align-data"]
                            for n in (0, 1)]
    assert (end < start) == (jobs == 1)
    compare.main(argv)
    assert capsys.readouterr().out == said and stage.calls() == calls  # nothing is left to do


def test_causal_chooses_the_learning_rate_and_says_where_there_is_none(stage, capsys):
    argv = [*stage.flags, "--masks", "mma", "--seeds", "1", "--jobs", "2"]
    stage.fates({"seed0/causal-0.005 val": 9})
    compare.main(argv)
    assert "for all: 0.005; it is the best" in capsys.readouterr().out
    assert stage.calls()[-1] == "seed0/mma-0.005: ask test mma"
    lost = {f"seed0/causal-{lr:g}": "diverges" for lr in compare.TRIED}
    stage.fates(lost)
    argv[argv.index(str(stage.out))] = str(stage.folder / "other")
    error = refused_last(capsys, argv)
    assert "causal diverges at every learning rate" in error


def refused_last(capsys, argv) -> str:
    """The last line of a comparison that ends with an error, after its progress."""
    with pytest.raises(SystemExit) as ended:
        compare.main(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_is_left_is_known_from_the_start_at_the_rate_that_causal_chose(stage, capsys):
    stage.fates({"seed0/causal-0.005 val": 8})
    flags = [*stage.flags, "--masks", "causal,mma", "--jobs", "1"]
    compare.main([*flags, "--seeds", "1"])
    assert " 0%|" in capsys.readouterr().err
    compare.main([*flags, "--seeds", "2"])  # of 5 + 3 * 20 + 20, and for the second 5 + 2 * 20
    assert "| 85 of 130 steps" in capsys.readouterr().err.split("\r")[1]


def test_other_masks_and_more_seeds_train_only_what_is_missing(stage, capsys):
    flags = [*stage.flags, "--lr", "0.01", "--jobs", "2"]
    compare.main([*flags, "--masks", "causal", "--seeds", "1"])
    before = stage.calls()
    assert before == ["seed0/align-data: train", "seed0/causal-0.01: train",
                      "seed0/causal-0.01: ask test causal"]
    stage.fates({"seed1/causal-0.01": "slow"})  # none is to be at work in one folder with another
    compare.main([*flags, "--masks", "causal,mma@eval,text", "--seeds", "2"])
    assert sorted(stage.calls()[3:]) == [
        "seed0/align-text: train", "seed0/causal-0.01: ask test mma",
        "seed0/text-0.01: ask test causal", "seed0/text-0.01: train",
        "seed1/align-data: train", "seed1/align-text: train",
        "seed1/causal-0.01: ask test causal", "seed1/causal-0.01: ask test mma",
        "seed1/causal-0.01: train", "seed1/text-0.01: ask test causal", "seed1/text-0.01: train"]
    calls, _ = stage.calls(), capsys.readouterr()
    compare.main([*flags, "--masks", "text", "--seeds", "1"])  # chosen of what there is
    said = capsys.readouterr().out
    assert "| `text` |" in said and "causal` |" not in said and stage.calls() == calls


def test_children_of_a_killed_comparison_are_waited_for_and_not_doubled(stage):
    stage.fates({"seed0/causal-0.01": "wait"})
    argv = [*stage.flags, "--masks", "causal,mma", "--seeds", "1", "--lr", "0.01", "--jobs", "1"]
    log, calls = stage.folder / "log", ["seed0/align-data: train", "seed0/causal-0.01: train"]
    with started(log, run_on, stage.folder, argv) as process:
        wait_for(process, lambda: stage.calls() == calls)
    assert process.exitcode == -signal.SIGKILL
    with started(log, run_on, stage.folder, argv) as process:
        wait_for(process, lambda: "waiting for what was started before" in log.read_text())
        time.sleep(0.5)
        assert stage.calls() == calls and process.is_alive()
        (stage.folder / "go").touch()
        process.join()
    assert process.exitcode == 0 and stage.calls() == [
        *calls, "seed0/causal-0.01: ask test causal", "seed0/mma-0.01: train",
        "seed0/mma-0.01: ask test mma"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_stops_a_comparison_which_stops_its_children(stage, number):
    stage.fates({"seed0/causal-0.01": "wait"})
    argv = [*stage.flags, "--masks", "causal", "--seeds", "1", "--lr", "0.01"]
    with started(stage.folder / "log", run_on, stage.folder, argv) as process:
        wait_for(process, (stage.out / "seed0/causal-0.01/ready").exists)
        os.killpg(process.pid, number)
        process.join()
    assert process.exitcode == 130
    assert (stage.out / "seed0/causal-0.01/saved").read_text() == "15"  # once, and as it should be
    (stage.folder / "go").touch()
    compare.main(argv)
    assert stage.calls()[2:] == ["seed0/causal-0.01: train again",
                                 "seed0/causal-0.01: ask test causal"]


def test_a_run_that_fails_ends_the_comparison_with_its_reason_after_the_others_saved(stage, capsys):
    stage.fates({
        "seed0/causal-0.01": "wait", "seed0/mma-0.01": "after seed0/causal-0.01 fails"})
    argv = [*stage.flags, "--masks", "causal,mma", "--seeds", "1", "--lr", "0.01", "--jobs", "2"]
    error, log = refused_last(capsys, argv), stage.out / "seed0/mma-0.01/log.txt"
    assert f"seed0/mma-0.01: train.py: no such picture (all that it said: {log})" in error
    assert "no such picture" in log.read_text() and (stage.out / "seed0/causal-0.01/saved").exists()
    stage.fates({"seed0/align-data": "diverges"})
    argv[argv.index(str(stage.out))] = str(stage.folder / "other")
    assert "seed0/align-data: train.py: align step 3: loss nan" in refused_last(capsys, argv)


def test_a_run_that_was_killed_is_gone_on_with(stage, capsys):
    stage.fates({"seed0/causal-0.01": "killed"})
    argv = [*stage.flags, "--masks", "causal", "--seeds", "1", "--lr", "0.01", "--jobs", "2"]
    assert "seed0/causal-0.01: exit code -9 (all that it said" in refused_last(capsys, argv)
    stage.fates({})
    compare.main(argv)
    assert stage.calls()[2:] == ["seed0/causal-0.01: train again",
                                 "seed0/causal-0.01: ask test causal"]


def test_what_was_trained_and_is_gone_is_not_trained_anew(stage, capsys):
    argv = [*stage.flags, "--masks", "causal", "--seeds", "1", "--lr", "0.01"]
    compare.main(argv)
    (stage.out / "seed0/causal-0.01/last.pt").unlink()
    calls = stage.calls()
    assert "causal-0.01/last.pt: no such file" in refused_last(capsys, argv)
    assert stage.calls() == calls


def test_a_folder_tells_how_far_its_run_is(tmp_path):
    run = compare.Run(tmp_path, {"steps": 20}, "test", "mma")
    line = json.dumps({"stage": "instruct", "step": 20}) + "\n"

    def state() -> tuple:
        return run.steps_made(), run.trained(), run.finished(), run.diverged()

    assert state() == (0, False, False, False)
    (tmp_path / "metrics.jsonl").write_text(line.replace("20", "10") + line[:-1])
    assert state() == (10, False, False, False)  # the second line is not yet whole
    (tmp_path / "metrics.jsonl").write_text(line)
    save_file({"stage": 0}, tmp_path / "last.pt")
    assert state() == (20, False, False, False)  # killed after the last evaluation
    save_file({"stage": 1}, tmp_path / "last.pt")
    assert state() == (20, True, False, False)
    run.answers.write_text("")
    assert state() == (20, True, True, False)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "instruct", "step": 7, "diverged": "nan"}\n')
    assert state() == (7, True, True, True)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "align", "step": 7, "diverged": "nan"}\n')
    assert state() == (7, False, False, False)


@pytest.mark.parametrize("flags, wanted", [
    (["--masks", "causal,mmm"], "'mmm' is none of"),
    (["--seeds", "0"], "--seeds must be at least 1"),
    (["--seed", "999999999"], "seed must be below"),
    (["--jobs", "0"], "--jobs must be at least 1"),
    (["--mask", "mma"], "--masks"),
    (["--order", "text"], "no such flag"),
    (["--mask-s", "mma"], "did you mean"),
    (["--resume"], "no such flag"),
    (["--steps", "0"], "steps must be at least 1"),
    (["--lr", "nan"], "lr must be above 0"),
    (["--n-embd", "100"], "n_embd 100 must be a multiple of n_head 3"),
    (["--init", "no/such/model.pt"], "no/such/model.pt: no such file"),
    (["--data", "no/such/folder"], "no/such/folder"),
])
def test_bad_input_gets_one_line_and_leaves_nothing(flags, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "find", Path)
    assert wanted in refused(capsys, compare.main, *flags, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_refused(stage, capsys):
    stage.out.mkdir()
    (stage.out / "results.md").write_text("mine")
    assert "already holds something" in refused(capsys, compare.main, *stage.flags)
    assert [path.name for path in stage.out.iterdir()] == ["results.md"] and not stage.calls()


def test_it_is_not_for_torchrun(stage, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refused(capsys, compare.main, *stage.flags)


def test_runs_at_once_and_their_threads_share_the_cores(stage, monkeypatch):
    for cores, flags, wanted in ((1, [], (1, 1)), (2, [], (2, 1)), (16, [], (4, 4)),
                                 (6, ["--jobs", 1], (1, 6)), (2, ["--jobs", 8], (8, 1))):
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        c = plan(*stage.flags, *flags)
        assert (c.jobs, c.threads) == wanted
    monkeypatch.setattr(compare, "choose_device", lambda *_: (torch.device("cuda"), "a GPU"))
    assert plan(*stage.flags).jobs == 1


# Figures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, t", [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (11, 2.2281),
                                  (31, 2.0423)])
def test_intervals_are_students_as_in_the_printed_tables(n, t):
    values = [float(i) for i in range(n)]
    mean, half = interval(values)
    deviation = (n * (n + 1) / 12) ** 0.5  # of 0 to n - 1
    assert mean == (n - 1) / 2
    assert half == pytest.approx(t * deviation / n ** 0.5, rel=1e-4)
    assert half != pytest.approx(1.96 * deviation / n ** 0.5, rel=1e-2)  # the control: a normal's


def made_up() -> dict[str, list[Result]]:
    """Results of two entries with three seeds: mma is better by 10, 11 and 12 points."""
    found = {"causal": [], "mma": []}
    for seed in range(3):
        for entry, more in (("causal", 0.0), ("mma", 0.1 + 0.01 * seed)):
            value = 0.2 + 0.3 * seed + more  # seeds differ far more than entries do
            accuracy = {"all": value, "hop": value, "mine": 1.0, "at": 0.5, "attr": 0.9}
            questions = {"all": 24, "hop": 10, "mine": 10, "at": 3, "attr": 1}
            lines = [{"step": step, "train_loss": 0.5 - step / 100, "accuracy": accuracy,
                      "questions": questions, "samples_per_second": 100.0 if more else 110.0}
                     for step in (10, 20)]
            found[entry].append(Result({"accuracy": accuracy, "questions": questions,
                                        "blind": {"all": 0.1}}, lines))
    return found


def cells_of(text: str) -> list[dict[str, str]]:
    """The rows of a table in Markdown: column -> cell."""
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
             for line in text.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_differences_are_taken_seed_by_seed():
    causal, mma = cells_of(table(["causal", "mma"], made_up(), made_up()))
    assert mma["over causal"] == "+11.0 ± 2.5" and causal["over causal"] == "-"
    assert causal["over mma"] == "-11.0 ± 2.5" and mma["over mma"] == "-"
    assert mma["all"] == "61.0 ± 77.0"  # the control: unpaired, nothing can be said
    assert table_by_task(made_up()).splitlines()[2:] == [
        "| `causal` | 50.0 ± 0.0 | 90.0 ± 0.0 | 50.0 ± 74.5 | 100.0 ± 0.0 |",
        "| `mma` | +0.0 ± 0.0 | +0.0 ± 0.0 | +11.0 ± 2.5 | +0.0 ± 0.0 |"]


def test_every_column_holds_its_own_figure():
    results = made_up() | {"mma@eval": made_up()["causal"]}
    causal, mma, evaluated = cells_of(table(list(results), results, made_up()))
    assert causal == {"entry": "`causal`", "all": "50.0 ± 74.5", "over causal": "-",
                      "over mma": "-11.0 ± 2.5", "blind": "10.0 ± 0.0",
                      "training loss": "0.300 ± 0.000", "time": "1.00 ± 0.00",
                      "steps to 80%": ">20"}
    assert mma["time"] == "1.10 ± 0.00"
    assert evaluated == causal | {"entry": "`mma@eval`", "over causal": "+0.0 ± 0.0",
                                  "steps to 80%": "-"}  # its evaluations were causal's
    alone = {"mma": [made_up()["mma"][0]._replace(scores={
        "accuracy": {"all": 1.0}, "questions": {"all": 1}, "blind": {}})]}
    assert cells_of(table(["mma"], alone, alone)) == [{
        "entry": "`mma`", "all": "100.0", "over causal": "-", "over mma": "-", "blind": "-",
        "training loss": "0.300", "time": "-", "steps to 80%": ">20"}]


def test_steps_to_80_are_the_mean_of_first_evaluations_at_or_above_it_or_more_than_all():
    def seed(*accuracies) -> Result:
        return Result({}, [{"step": 500 * n, "accuracy": {"all": value}}
                           for n, value in enumerate(accuracies, 1)])

    assert steps_to_80([seed(0.1, 0.7999, 0.8, 0.7)]) == "1,500"
    assert steps_to_80([seed(0.1, 0.9, 0.9), seed(0.9, 0.1, 0.1)]) == "750 ± 3,177"
    assert steps_to_80([seed(0.1, 0.9, 0.9), seed(0.1, 0.1, 0.79)]) == ">1,500"


def test_tasks_may_be_called_as_columns_are_and_hold_what_markdown_does():
    text = json.dumps(made_up()).replace('"hop"', '"blind"').replace('"mine"', '"a|b"')
    results = {entry: [Result(*one) for one in seeds] for entry, seeds in json.loads(text).items()}
    causal, mma = cells_of(table_by_task(results))
    assert causal["`a\\|b`"] == "100.0 ± 0.0" and causal["`blind`"] == "50.0 ± 74.5"
    assert mma["`blind`"] == "+11.0 ± 2.5"
    assert cells_of(table(["causal"], results, results))[0]["blind"] == "10.0 ± 0.0"


def test_curves_of_groups_weigh_questions_not_tasks():
    causal = made_up()["causal"]
    assert learning_curve(causal, ["at", "attr"]) == {10: [pytest.approx(60)] * 3,
                                                      20: [pytest.approx(60)] * 3}  # 70: of tasks
    assert learning_curve(causal, ["all"])[20] == [pytest.approx(v) for v in (20, 50, 80)]
    assert learning_curve(causal, ["exist"]) == {}  # val does not ask it


def test_each_group_of_tasks_and_each_other_task_has_its_panel(monkeypatch):
    titles = []

    def panel(title, curves, colors, last):
        titles.append(title)
        assert list(curves) == ["causal", "mma"] and last == 20
        return chart(title, curves, colors, last)

    monkeypatch.setattr(engine.results, "chart", panel)
    engine.results.draw_curves(made_up(), compare.COLORS, 20, "note")
    assert titles == ["all", "perception (at, attr)", "two steps (hop)", "mine"]
    titles.clear()
    monkeypatch.undo()
    engine.results.draw_curves({}, compare.COLORS, 20, "all have diverged")


def test_curves_are_drawn_at_their_values():
    points = {0: [50.0, 50.0], 100: [50.0, 100.0]}  # the mean is 75 at the end, the band 50 to 100
    image = chart("title", {"mma": points}, compare.COLORS, 100)
    color, end = compare.COLORS["mma"], image.width - 12 - 1
    column = [image.getpixel((end - 3, y)) for y in range(image.height)]
    line = [y for y, pixel in enumerate(column) if math.dist(pixel, color) < 60]
    band = [y for y, (red, _, blue) in enumerate(column) if red > blue + 20]
    assert line and all(18 + 0.2 * 184 < y < 18 + 0.3 * 184 for y in line)
    assert min(band) < 18 + 0.1 * 184 and 18 + 0.45 * 184 < max(band) < 18 + 0.55 * 184
    empty = chart("title", {}, {}, 100)  # the control
    assert not any(math.dist(empty.getpixel((end - 3, y)), color) < 60 for y in range(empty.height))
    none = chart("title", {"mma": {}}, compare.COLORS, 100)  # a task that val does not ask
    assert none.tobytes() == empty.tobytes()
    one = chart("title", {"mma": {50: [50.0]}}, compare.COLORS, 100)  # one evaluation
    assert one.tobytes() != empty.tobytes()


# The report, of folders that were made up --------------------------------------------------------


def leave(run: compare.Run, right: int) -> None:
    """A finished run: right of its ten answers, in a folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    line = {"stage": "instruct", "step": run.steps, "train_loss": 0.5, "seconds": 60.0,
            "accuracy": {"all": 0.5}, "questions": {"all": 9}, "samples_per_second": 9.0}
    (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    answer = {"id": "1", "task": "at", "question": "?", "right": "yes", "blind": None}
    lines = [json.dumps(answer | {"answer": "yes" if n < right else "no"}) for n in range(10)]
    run.answers.write_text("\n".join(lines) + "\n")


def test_the_report_says_what_was_done_and_what_diverged(stage):
    c = plan(*stage.flags, "--masks", "causal,mma,dot", "--seeds", 2, "--lr", 0.01, "--jobs", 2,
             "--eval-every", 8)
    runs = sum(c.phases(c.lr), [])
    for run in runs:
        leave(run, 5)
    said = compare.report(c, c.lr, "python compare.py --x")
    assert (stage.out / "results.md").read_text() == said + "\n"
    assert said.startswith("`python compare.py --x`: 10 min of training on cpu, 1 threads, float32")
    assert "runs at once: 2, CPU threads of each: 1. Seeds: 0, 1." in said
    assert "on the test split" in said and "the last 4 steps" in said  # 17 to 20
    assert "`dot`: causal, with pictures before and after" in said and "Learning rate" not in said
    assert "By task" in said and "diverged" not in said
    lost = c.stage_2("mma", 1, c.lr).folder / "metrics.jsonl"
    line = '{"stage": "instruct", "step": 3, "diverged": "loss nan", "seconds": 1.0}\n'
    lost.write_text(line)
    said = compare.report(c, c.lr, "python compare.py --x")
    causal, mma, dot, *_ = cells_of(said.split("\n\n")[2])
    assert set(mma.values()) == {"`mma`", "diverged", "-"} and dot["over causal"] == "+0.0 ± 0.0"
    assert causal["all"] == "50.0 ± 0.0" and causal["over mma"] == "-"  # all others as ever
    assert "`mma` diverged (seed 1)" in said and "| `mma` | +" not in said
    (c.stage_2("causal", 0, c.lr).folder / "metrics.jsonl").write_text(line)
    said = compare.report(c, c.lr, "python compare.py --x")
    assert "`causal` diverged (seed 0)" in said and "By task" not in said
    (c.stage_2("dot", 0, c.lr).folder / "metrics.jsonl").write_text(line)
    assert "`dot` diverged" in compare.report(c, c.lr, "python compare.py --x")  # nothing is left
