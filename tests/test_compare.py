"""Comparisons: equal terms, dual order, intervals, and going on with half a comparison."""
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import compare
from compare import Job, interval, prompt_first, table, work
from data.llava import Batch
from draw import chart
from helpers import ROOT, TINY, held, make_tiny, same, weights
from nanoaki import IMAGE, PROMPT, Config, NanoAKI, Tokenizer, build_sequence, pad_batch, save_file
from train import Run, Settings

FLAGS = [*TINY, "--align-steps", "10", "--steps", "60", "--eval-every", "20", "--save-every", "0", "--lr", "0.01"]


class Silent:
    """Somebody to report to."""

    def send(self, said):
        pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two seeds of some entries, trained in this process: results, first weights and batches of each."""
    out, seen, found = tmp_path_factory.mktemp("out"), {}, {}
    results = {"lr": None, "seeds": [0, 1], "entries": ["causal", "mma", "dot", "mma@eval"], "runs": {}, "settings":
               asdict(Settings(data=str(tiny), out=str(out), device="cpu", workers=0, batch_size=32, align_steps=10,
                               steps=60, eval_every=20, lr=0.01)),
               "config": asdict(Config(image_size=16, patch_size=8, n_embd=32, n_head=2, n_layer=2, vit_embd=32,
                                       vit_head=2, vit_layer=1, block_size=64))}
    plain = Run.gradient

    def watched(run, parts, mask):
        first = {name: p.clone() for name, p in run.model.state_dict().items()}
        seen.setdefault(run.settings.out, [first, []])[1].append((parts[0], mask))
        return plain(run, parts, mask)

    patch = pytest.MonkeyPatch()
    patch.setattr(Run, "gradient", watched)
    for seed in (0, 1):
        for entry in ("align", "causal", "mma", "dot"):
            job = Job(entry, seed, 0.01)
            (out / job.name).mkdir(parents=True)
            result = work(Silent(), job, results)
            if entry != "align":
                found[entry, seed] = result, *seen[str(out / job.name)], out / job.name / "last.pt"
    patch.undo()
    return found


def alike(a: tuple, b: tuple) -> bool:
    """Whether two runs began with the same weights and saw the same examples in the same order."""
    return same(a[1], b[1]) and [batch.ids for batch, _ in a[2]] == [batch.ids for batch, _ in b[2]]


def test_all_entries_of_a_seed_begin_with_the_same_weights_and_see_the_same_data_in_the_same_order(runs):
    for seed in (0, 1):
        for entry in ("mma", "dot"):
            assert alike(runs["causal", seed], runs[entry, seed])
    assert not alike(runs["causal", 0], runs["causal", 1])  # the control: another seed
    assert not same(runs["causal", 0][1], runs["causal", 1][1])
    assert {len(found[2]) for found in runs.values()} == {60}


def test_stage_2_begins_with_the_weights_of_stage_1(runs):
    for (_, seed), found in runs.items():
        assert same(found[1], weights(found[3].parent.parent / "align/last.pt"))
        assert not same(found[1], weights(found[3]))  # the control


def test_entries_are_trained_under_their_masks(runs):
    masks = {"causal": "causal", "mma": "mma", "dot": "causal"}
    for (entry, _), found in runs.items():
        assert {mask for _, mask in found[2]} == {masks[entry]}


def test_results_are_those_of_the_last_weights_under_the_mask_of_the_test(runs, tiny):
    result, *_, last = runs["causal", 0]
    assert list(result["tests"]) == ["causal", "mma@eval"] and "val" in result
    assert [line["step"] for line in result["curve"]] == [20, 40, 60]
    model = NanoAKI.load(last)

    def accuracy(split, mask):
        records = json.loads((tiny / f"{split}.json").read_text())
        pictures = [Image.open(tiny / record["image"]) for record in records]
        questions = [record["conversations"][0]["value"].replace("<image>\n", "") for record in records]
        right = [record["conversations"][1]["value"] for record in records]
        answers = model.ask(pictures, questions, mask=mask)
        return sum(map(str.__eq__, answers, right)) / len(right)

    causal, mma = result["tests"]["causal"], result["tests"]["mma@eval"]
    assert causal["accuracy"]["all"] == accuracy("test", "causal") and causal["blind"]
    assert mma["accuracy"]["all"] == accuracy("test", "mma") != accuracy("test", "causal")
    assert result["val"] == accuracy("val", "causal") != accuracy("test", "causal")  # what a learning rate is chosen by


def test_what_was_trained_and_is_gone_is_not_trained_anew(tmp_path):
    results = made_up() | {"config": {}}
    results["settings"] |= {"out": str(tmp_path)}
    with pytest.raises(ValueError, match="last.pt: what was trained is gone"):
        work(Silent(), Job("causal", 0, 0.01), results)
    assert not list(tmp_path.iterdir())


# Dual order --------------------------------------------------------------------------------------


def image_positions(batch: Batch) -> list[str]:
    """For each row whether its pictures stand first, or after the text and before <answer>."""
    found = []
    for roles in batch.roles.tolist():
        images = [i for i, role in enumerate(roles) if role == IMAGE]
        prompt = [i for i, role in enumerate(roles) if role == PROMPT]
        found.append("first" if images[0] == 0 else
                     "after" if images == list(range(prompt[-2] + 1, prompt[-1])) else "elsewhere")
    return found


def test_dot_puts_the_prompt_first_in_every_other_batch_and_changes_nothing_else(runs):
    for n, ((batch, _), (plain, _)) in enumerate(zip(runs["dot", 0][2], runs["causal", 0][2], strict=True)):
        assert set(image_positions(plain)) == {"first"}  # the control
        assert set(image_positions(batch)) == {"after" if n % 2 else "first"}
        assert torch.equal(batch.tokens.sort().values, plain.tokens.sort().values)
        assert torch.equal(batch.images, plain.images)


def test_prompt_first_is_what_the_sequence_builder_makes_of_pictures_written_after_the_text():
    tokenizer, config, rng = Tokenizer([]), Config(image_size=16, patch_size=8, block_size=400), random.Random(0)
    chats = [], []  # pictures before the text of each turn, and after it
    for _ in range(40):
        turns, some = ([("system", "be brief")], [("system", "be brief")]), 0
        for _ in range(rng.randint(1, 3)):
            text, images = "word" * rng.randint(1, 5), "<image>" * rng.randint(0, 2)
            turns[0].extend([("human", images + text), ("gpt", "yes")])
            turns[1].extend([("human", text + images), ("gpt", "yes")])
            some += len(images) // 7
        for side, talk in zip(chats, turns, strict=True):
            side.append(build_sequence(tokenizer, config, talk[:-1], some, "a" * len(talk)))
    before, after = (pad_batch(side) for side in chats)
    got = prompt_first(Batch(None, torch.tensor([]), *before, []))
    assert not torch.equal(before[0], after[0])  # the control
    assert all(map(torch.equal, (got.tokens, got.roles, got.targets), after))


# Figures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, t", [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (11, 2.2281), (31, 2.0423)])
def test_intervals_are_students_as_in_the_printed_tables(n, t):
    values = [float(i) for i in range(n)]
    mean, half = interval(values)
    deviation = (n * (n + 1) / 12) ** 0.5  # of 0 to n - 1
    assert mean == (n - 1) / 2
    assert half == pytest.approx(t * deviation / n ** 0.5, rel=1e-4)
    assert half != pytest.approx(1.96 * deviation / n ** 0.5, rel=1e-2)  # the control: a normal's


def test_f1_and_yes_rate():
    said = [(True, True)] * 3 + [(True, False)] + [(False, True)] * 2 + [(False, False)] * 4
    assert compare.yes_no(said) == {"f1": pytest.approx(2 * 3 / (2 * 3 + 2 + 1)), "yes": 0.5}
    assert compare.yes_no([(True, False)]) == {"f1": 0.0, "yes": 0.0}
    assert compare.yes_no([(False, False)]) == {}  # nothing that could be found


def test_f1_is_of_the_task_exist_alone(monkeypatch):
    examples = [SimpleNamespace(task=task, answer=answer)
                for task, answer in (("exist", "yes"), ("exist", "no"), ("sum", "yes"))]
    monkeypatch.setattr(compare, "examine", lambda *_, **how: (["yes", "no", "no"], {"blind": {}}))
    run = SimpleNamespace(model=torch.nn.Module(), how={})
    assert compare.ask_all(run, examples, "mma") == {"blind": {}, "f1": 1.0, "yes": 0.5}


def made_up(**changes) -> dict:
    """Results of two entries with three seeds: mma is better by 10, 11 and 12 points."""
    results = {"given": {"lr": 0.01, "out": "out/compare-shapes", "jobs": 1}, "jobs": 2, "threads": 3,
               "settings": {"lr": 0.01, "steps": 20, "out": "out", "eval_sample": 9}, "lr": 0.01,
               "seconds": 90.0, "machine": "a machine", "entries": ["causal", "mma"],
               "seeds": [0, 1, 2], "runs": {}}
    for seed in range(3):
        for entry, more in (("causal", 0.0), ("mma", 0.1 + 0.01 * seed)):
            value = 0.2 + 0.3 * seed + more  # seeds differ far more than entries do
            test = {"accuracy": {"all": value, "hop": value, "mine": 1.0, "at": 0.5, "attr": 0.9}, "f1": 0.7,
                    "questions": {"all": 24, "hop": 10, "mine": 10, "at": 3, "attr": 1}, "yes": 0.4,
                    "blind": {"all": 0.1}}
            line = {"accuracy": test["accuracy"], "questions": test["questions"],
                    "samples_per_second": 100.0 if more else 110.0}
            curve = [{"step": step, "train_loss": 0.5 - step / 100} | line for step in (10, 20)]
            results["runs"][Job(entry, seed, 0.01).name] = {"tests": {entry: test}, "curve": curve, "parameters": 7}
    for name, change in changes.items():
        results["runs"][name] |= change
    return results


def test_differences_to_causal_are_taken_seed_by_seed():
    head, _, causal, mma = ([part.strip() for part in line.split("|")[1:-1]]
                            for line in table(made_up()).splitlines())
    row, base = dict(zip(head, mma, strict=True)), dict(zip(head, causal, strict=True))
    assert row["over causal"] == "+11.0 ± 2.5" and base["over causal"] == "-"
    assert base["over mma"] == "-11.0 ± 2.5" and row["over mma"] == "-"
    assert row["**all**"] == "61.0 ± 77.0"  # the control: unpaired, nothing can be said
    assert row["time"] == "1.10 ± 0.00" and row["parameters"] == "7" and row["`mine`"] == "100.0 ± 0.0"
    assert compare.table_by_task(made_up()).splitlines()[2:] == [
        "| `causal` | 50.0 ± 0.0 | 90.0 ± 0.0 | 50.0 ± 74.5 | 100.0 ± 0.0 |",
        "| `mma` | +0.0 ± 0.0 | +0.0 ± 0.0 | +11.0 ± 2.5 | +0.0 ± 0.0 |"]


def test_every_column_holds_its_own_figure_and_groups_weigh_questions_not_tasks():
    head, _, causal, _ = ([part.strip() for part in line.split("|")[1:-1]] for line in table(made_up()).splitlines())
    row = {title: figure.removesuffix(" ± 0.0").removesuffix(" ± 0.000")
           for title, figure in zip(head, causal, strict=True)}
    assert row["perception (at, attr)"] == "60.0"  # three of 50%, one of 90%; 70 would be the mean of the tasks
    assert row["two steps (hop)"] == "50.0 ± 74.5" and row["blind"] == "10.0"
    assert (row["exist: F1"], row["exist: yes"], row["training loss"]) == ("70.0", "40.0", "0.300")


def test_accuracy_by_step_is_the_mean_over_seeds_of_each_training_and_of_ten_steps_at_most():
    results = made_up() | {"entries": ["causal", "mma", "mma@eval"]}
    for seed in range(3):
        curve = results["runs"][f"seed{seed}/mma-0.01"]["curve"]
        curve[0] = curve[0] | {"accuracy": {"all": 0.1 * seed}}
        for entry in ("causal", "mma"):
            results["runs"][f"seed{seed}/{entry}-0.01"]["tests"]["mma@eval"] = {}
    assert compare.table_by_step(results).splitlines() == [
        "| steps | 10 | 20 |", "| --- | ---: | ---: |", "| `causal` | 50.0 | 50.0 |", "| `mma` | 10.0 | 61.0 |"]
    for run in results["runs"].values():
        run["curve"] = [run["curve"][0] | {"step": step} for step in range(1, 27)]
    head = compare.table_by_step(results).splitlines()[0]
    assert head == "| steps | 2 | 5 | 8 | 11 | 14 | 17 | 20 | 23 | 26 |"


def test_tasks_may_be_called_as_columns_are_and_hold_what_markdown_does():
    results = json.loads(json.dumps(made_up()).replace('"hop"', '"blind"').replace('"mine"', '"a|b"'))
    for text in (table(results), compare.table_by_task(results)):
        head, _, causal, mma = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                                for line in text.splitlines())
        assert len(head) == len(causal) == len(mma)
        own = dict(zip(head, causal))
        assert own["`a\\|b`"] == "100.0 ± 0.0" and own["`blind`"] == "50.0 ± 74.5"
    assert "| blind |" in table(results)


def test_an_entry_that_diverges_is_shown_as_such_and_all_others_as_ever(tmp_path):
    results, whole = made_up(), table(made_up()).splitlines()
    results["runs"]["seed1/mma-0.01"] = {"tests": {}, "diverged": "loss nan"}
    lines = table(results).splitlines()
    assert lines[3].startswith("| `mma` | diverged | - |") and "| 50.0 ± 74.5 |" in lines[2]
    assert len(lines) == len(whole) and {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "`mma`" not in compare.table_by_task(results)
    results["settings"] |= {"out": str(tmp_path), "eval_every": 10}
    results["runs"] |= {"seed0/align": {"tests": {}, "split": "val"}}
    for run in results["runs"].values():
        run |= {"seed": 1, "split": "val"}
    said = compare.report(results)
    assert "`mma` diverged (seed 1)" in said
    assert said.startswith("`python compare.py --masks causal,mma --seeds 3 --lr 0.01 --jobs 1`: 2 min on a machine, "
                           "runs at once: 2, CPU threads of each: 3. Seeds: 0, 1, 2.")
    results["runs"]["seed0/causal-0.01"] |= {"tests": {}, "diverged": "loss nan", "seed": 0}
    said = compare.report(results)  # nothing is left to show
    assert "`causal` diverged (seed 0)" in said and "By task" not in said and "| `causal` | diverged |" in said


def test_the_report_says_which_learning_rate_causal_chose_and_of_how_many_steps_the_loss_is(tmp_path):
    results = made_up() | {"lr": None}
    results["settings"] |= {"out": str(tmp_path), "eval_every": 8}
    results["runs"] |= {name.replace("0.01", "0.02"): dict(run) for name, run in results["runs"].items()}
    results["runs"]["seed0/causal-0.005"] = {"tests": {}}
    for lr, val in ((0.005, 0.5), (0.01, 0.7), (0.02, 0.6)):
        results["runs"][f"seed0/causal-{lr:g}"] |= {"lr": lr, "val": val}
    for run in results["runs"].values():
        run["split"] = "test"
    said = compare.report(results)
    assert "for all: 0.01; it is the best" in said and "0.005: 50.0%, 0.01: 70.0%, 0.02: 60.0%" in said
    assert "the last 4 steps" in said  # 17 to 20
    results["runs"]["seed0/causal-0.02"]["val"] = 0.9
    assert "for all: 0.02, at the edge of what was tried; it is" in compare.report(results)


def test_runs_of_different_size_are_not_compared():
    with pytest.raises(ValueError, match="number of parameters"):
        table(made_up(**{"seed1/mma-0.01": {"parameters": 8}}))


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
    assert chart("title", {"mma": {}}, compare.COLORS, 100).tobytes() == empty.tobytes()  # a task val does not ask
    assert chart("title", {"mma": {50: [50.0]}}, compare.COLORS, 100).tobytes() != empty.tobytes()  # one evaluation


def test_causal_chooses_the_learning_rate_before_anything_else_is_trained():
    results = made_up() | {"lr": None, "runs": {}}
    results["settings"] |= {"align_steps": 5, "init": ""}
    assert [job.name for job in compare.startable(results)] == [f"seed{n}/align" for n in range(3)]
    for seed in range(3):
        results["runs"][f"seed{seed}/align"] = {"tests": {}}
    tries = compare.startable(results)
    assert [(job.entry, job.seed) for job in tries] == [("causal", 0)] * 3
    assert compare.steps_of(results, *compare.all_jobs(results)) == 3 * 5 + (2 + 6) * 20
    for job, accuracy in zip(tries[:2], (0.5, 0.7), strict=True):
        results["runs"][job.name] = {"tests": {"causal": {}}, "val": accuracy, "lr": job.lr}
    assert compare.chosen_lr(results) is None and compare.startable(results) == tries[2:]
    for accuracy, best in ((0.6, tries[1]), (0.8, tries[2])):
        results["runs"][tries[2].name] = {"tests": {"causal": {}}, "val": accuracy, "lr": tries[2].lr}
        assert compare.chosen_lr(results) == best.lr == compare.startable(results)[0].lr
        assert len(compare.startable(results)) == 5  # causal with seed 0 is one of the tries
    results["entries"] = ["causal", "mma@eval"]  # tries that have lost are not tested again
    assert [job.name for job in compare.startable(results)] == [
        best.name, *(f"seed{seed}/causal-{best.lr:g}" for seed in (1, 2))]


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_run_is_made_once_also_those_that_diverge(jobs, tmp_path, monkeypatch, capsys):
    results = made_up() | {"lr": None, "runs": {}, "jobs": jobs, "threads": 1}
    results["settings"] |= {"align_steps": 5, "init": "", "out": str(tmp_path)}
    tries, started, most = compare.trials(results), [], []
    lost = tries[1], Job("mma", 1, tries[2].lr)  # the default rate, and a run at the best one

    def launch(job, results):
        started.append(job)
        assert len(started) < 20
        most.append(len(started) - len(results["runs"]))
        found = job._asdict() | {"tests": {entry: {} for entry in compare.tested_as(results, job)}}
        if job in lost:
            found |= {"diverged": "loss nan", "tests": {}}
        elif job in tries:
            found["val"] = 0.1 * job.lr
        ours, theirs = multiprocessing.Pipe()
        theirs.send(3)  # steps
        theirs.send(found)
        return ours, SimpleNamespace(join=lambda: None, terminate=lambda: None)

    monkeypatch.setattr(compare, "launch", launch)
    compare.train_all(results)
    assert "100%|" in (bar := capsys.readouterr().err) and "| 175/175 [" in bar  # 3 times 5, 8 times 20
    best = tries[2]
    wanted = [*(compare.aligned(seed) for seed in range(3)), *tries, best,  # the best is tested once it is chosen
              *(Job(entry, seed, best.lr) for seed in range(3) for entry in ("causal", "mma"))]
    wanted.remove(best)
    assert sorted(started) == sorted(wanted) and max(most) == jobs + 1  # the best was finished before
    assert started.index(best) < min(started.index(job) for job in started if job.entry == "mma")
    assert not compare.startable(results) and json.loads((tmp_path / "results.json").read_text()) == results
    monkeypatch.setattr(compare, "launch", None)
    compare.train_all(results)  # the control: nothing is left
    assert "| 175/175 [" in capsys.readouterr().err


def test_the_time_that_is_left_is_told_of_what_is_left_to_do(tiny, tmp_path, monkeypatch):
    given = {"data": str(tiny), "steps": 60, "align_steps": 10, "eval_every": 30, "lr": 0.01, "device": "cpu",
             "workers": 0, "out": str(tmp_path), "masks": "causal,mma", "seeds": 2, "jobs": 1, "eval_sample": 50}
    results, now = compare.settled(given, False) | {"threads": torch.get_num_threads()}, [0.0]

    def takes(seconds):
        return lambda *args, **how: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(compare.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(compare, "good", takes(0.25))  # to read a batch, which takes a core as well
    monkeypatch.setattr(Run, "update", takes(0.75))
    monkeypatch.setattr(compare, "answer_all", takes(8.0))  # for 80 examples
    trained = 60 + 2 * 0.1 * (2 * 50 + 80)  # two evaluations and the test, each with its blind half
    assert compare.predict(results) == pytest.approx(2 * 10 + 4 * trained)
    assert compare.predict(results | {"jobs": 2}) == pytest.approx(10 + 2 * trained)
    assert compare.predict(results | {"jobs": 9}) == pytest.approx(10 + trained)  # the longest of each phase
    results["runs"] = {"seed0/align": {"tests": {}}, "seed1/align": {"tests": {}},
                       "seed0/causal-0.01": {"tests": {"causal": {}}}, "seed0/mma-0.01": {"tests": {}}}
    assert compare.predict(results) == pytest.approx(2 * trained + 2 * 0.1 * 80)  # one lacks only its test
    for step, stage, saved in ((29, 0, 29), (40, 0, 40 + 2 * 0.1 * 50), (0, 1, 60 + 2 * 0.1 * 2 * 50)):
        (tmp_path / "seed1/mma-0.01").mkdir(parents=True, exist_ok=True)
        save_file({"step": step, "stage": stage}, tmp_path / "seed1/mma-0.01/last.pt")  # half-trained
        assert compare.predict(results) == pytest.approx(2 * trained + 2 * 0.1 * 80 - saved)
    monkeypatch.setitem(results, "lr", None)  # without a rate: two trials more, on val alone
    results["runs"] = {}
    (tmp_path / "seed1/mma-0.01/last.pt").unlink()
    assert compare.predict(results) == pytest.approx(2 * 10 + 4 * trained + 2 * (trained - 2 * 0.1 * 80) + 3 * 0.1 * 80)


# The command -------------------------------------------------------------------------------------


def launch(*argv) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "compare.py"), *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            start_new_session=True)


def test_half_a_comparison_is_gone_on_with_and_ends_as_one_that_was_never_stopped(
        tiny, tmp_path, runs, capsys):
    out = tmp_path / "out"
    process = launch("--data", tiny, *FLAGS, "--masks", "causal", "--seeds", "1", "--jobs", "1", "--out", out)
    done = out / "seed0/causal-0.01/metrics.jsonl"
    while process.poll() is None and not (done.exists() and done.read_text()):
        time.sleep(0.02)  # until an entry is trained by a third
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: all processes get it
    said, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in error and "Traceback" not in error, error
    assert "minutes" in said  # predicted before it began
    assert list(json.loads((out / "results.json").read_text())["runs"]) == ["seed0/align"]
    assert 0 < torch.load(done.with_name("last.pt"), weights_only=True)["step"] < 60
    before = (out / "seed0/align/last.pt").stat().st_mtime_ns
    compare.main(["--resume", "--out", str(out), "--masks", "causal,mma@eval"])
    said = capsys.readouterr().out
    assert (out / "seed0/align/last.pt").stat().st_mtime_ns == before, "what was finished ran again"
    run, wanted = json.loads((out / "results.json").read_text())["runs"]["seed0/causal-0.01"], runs["causal", 0][0]
    assert run["tests"] == wanted["tests"]
    assert [line["val_loss"] for line in run["curve"]] == [line["val_loss"] for line in wanted["curve"]]
    assert "| `mma@eval` |" in said and (out / "results.md").read_text().strip() == said.strip()[-len(
        (out / "results.md").read_text().strip()):] and (out / "curves.png").exists()
    compare.main(["--resume", "--out", str(out), "--masks", "causal"])  # nothing to train: chosen of what there is
    assert json.loads((out / "results.json").read_text())["entries"] == ["causal"]
    with held(out) as is_held, pytest.raises(SystemExit):
        compare.main(["--resume", "--out", str(out), "--masks", "mma@eval"])
    assert is_held and "another process is at work" in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text())["entries"] == ["causal"]


def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "leave_group", lambda: None)
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    results, said = {"threads": torch.get_num_threads(), "settings": {"out": str(tmp_path)}}, []
    for entry, error in (("mma", FloatingPointError("loss nan")), ("mma", ValueError("no picture")),
                         ("align", FloatingPointError("loss nan"))):
        def work(*_, error=error):
            raise error

        monkeypatch.setattr(compare, "work", work)
        ours, theirs = multiprocessing.Pipe()
        compare.child(theirs, Job(entry, 0, 0.01), results)
        said.append(ours.recv())
    assert said == [{"entry": "mma", "seed": 0, "lr": 0.01, "tests": {}, "diverged": "loss nan"},
                    "seed0/mma-0.01: no picture", "seed0/align: loss nan"]
    with pytest.raises(SystemExit):  # SIGTERM leaves time to clean up
        handlers[signal.SIGTERM](signal.SIGTERM, None)


def test_a_run_that_fails_ends_the_comparison_with_its_reason_in_one_line(tiny, tmp_path, capsys):
    given = {"data": str(tmp_path / "none"), "out": str(tmp_path / "out"), "lr": 0.01, "device": "cpu"}
    results = compare.settled(given, False)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="seed0/align.*none/train.json: .*log.txt"):
        compare.train_all(results | {"threads": 1, "jobs": 1})
    assert "Traceback" in (tmp_path / "out/seed0/align/log.txt").read_text()


@pytest.mark.parametrize("flags, wanted", [
    (["--masks", "causal,mmm"], "'mmm' is none of"),
    (["--seeds", "0"], "--seeds must be at least 1"),
    (["--jobs", "0"], "--jobs must be at least 1"),
    (["--mask", "mma"], "--masks"),
    (["--mask-s", "mma"], "did you mean"),
    (["--steps", "0"], "steps must be at least 1"),
    (["--resume"], "to go on with"),
    (["--data", "no/such/folder"], "no/such/folder"),
])
def test_bad_input_gets_one_line_and_leaves_nothing(flags, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        compare.main([*flags, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and wanted in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_gone_on_with_only_under_its_own_flags(tmp_path, capsys):
    new = compare.settled({"out": str(tmp_path), "steps": 20, "jobs": 1, "device": "auto"}, False)
    assert new["settings"]["eval_every"] == 2  # ten points of a curve
    (tmp_path / "results.json").write_text(json.dumps(new))
    assert compare.settled({"out": str(tmp_path), "steps": 20, "device": "auto"}, True) == new  # the same once more
    again = compare.settled({"out": str(tmp_path), "jobs": 2}, True)
    assert again == new | {"jobs": 2, "given": new["given"] | {"jobs": 2}}  # as many threads: they change last digits
    for flags, wanted in ((["--resume", "--steps", "30"], "--steps was 20"), (["--resume", "--lr", "1"], "was 'tried'"),
                          ([], "already holds")):
        with pytest.raises(SystemExit):
            compare.main([*flags, "--out", str(tmp_path)])
        assert wanted in capsys.readouterr().err
    for other in ({name: new[name] for name in new if name != "seeds"}, new | {"settings": {"lr": 1}}, [], "no"):
        (tmp_path / "results.json").write_text(json.dumps(other))
        with pytest.raises(SystemExit) as ended:
            compare.main(["--resume", "--out", str(tmp_path)])
        assert ended.value.code == 2 and "no comparison to go on with" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        compare.main(["--resume", "--out", str(tmp_path / "empty")])
    assert not list((tmp_path / "empty").iterdir())


def test_a_comparison_that_another_process_began_meanwhile_is_not_touched(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    flags = ["--data", str(make_tiny(tmp_path / "tiny", 12)), "--out", str(out)]

    def begun(results):
        out.mkdir()
        (out / "results.json").write_text("another's")
        return 0.0

    monkeypatch.setattr(compare, "train_all", lambda results: None)
    monkeypatch.setattr(compare, "report", lambda results: "done")
    monkeypatch.setattr(compare, "predict", begun)
    with pytest.raises(SystemExit):
        compare.main(flags)
    assert "already holds" in capsys.readouterr().err and (out / "results.json").read_text() == "another's"
    shutil.rmtree(out)

    def tries(results):
        with held(out) as is_held:
            assert not is_held

    monkeypatch.setattr(compare, "predict", lambda results: 0.0)
    monkeypatch.setattr(compare, "train_all", tries)
    compare.main(flags)
    assert "done" in capsys.readouterr().out
    with held(out) as is_held:
        assert is_held  # the control: given back
    assert not list(out.iterdir())
