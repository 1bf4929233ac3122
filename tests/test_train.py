"""The training loop, its command line, its optimizer, and what is asked of the model it leaves."""
import json
import os
import shlex
import signal
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import sample
import train
from data.llava import Examples, Records, read_splits
from engine.device import Objective
from engine.evaluation import answer_all, ask_all, held_out_loss, other_pictures
from engine.optimizer import Muon, make_optimizers, schedule
from engine.scores import Answered, scores, table, yes_no
from helpers import TINY, make_tiny, metrics, refused, same, weights
from nanoaki import IMAGE, MASKS, NanoAKI

STEPS = ["--align-steps", "120", "--steps", "240", "--eval-every", "80", "--lr", "0.01"]
SHORT = ["--align-steps", "8", "--steps", "16", "--eval-every", "6", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train.main(["--data", str(tiny), "--out", str(out), *TINY, *STEPS])
    return out


@pytest.fixture(scope="module")
def asked(tiny, trained):
    """The trained model, and examples of the test split in its tokens."""
    model = NanoAKI.load(trained / "model.pt")
    return model, Examples(Records.read(tiny, "test.json"), model.tokenizer, model.config)


# A run and its files -----------------------------------------------------------------------------


def test_a_tiny_task_is_learned_from_pictures(trained):
    last = metrics(trained)[-1]
    assert last["stage"] == "test" and last["accuracy"]["all"] >= 0.9
    assert last["accuracy"]["all"] - last["blind"]["all"] >= 0.4
    assert last["questions"] == {"all": 80, "left": 40, "right": 40}


def test_nothing_is_learned_when_pictures_are_shuffled_against_questions(tmp_path):
    data = make_tiny(tmp_path / "data", shuffled=True)
    train.main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY, *STEPS])
    assert metrics(tmp_path / "out")[-1]["accuracy"]["all"] < 0.5


def test_a_run_leaves_all_its_files_and_a_line_per_evaluation(trained):
    assert {p.name for p in trained.iterdir()} == {"model.pt", "last.pt", "metrics.jsonl",
                                                   "samples.png", "curves.png", "config.json"}
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [(m["stage"], m["step"]) for m in lines] == [
        ("align", 120), ("instruct", 80), ("instruct", 160), ("instruct", 240), ("test", 240)]
    for line in lines[1:-1]:
        assert {"train_loss", "val_loss", "accuracy", "blind", "samples_per_second",
                "seconds"} <= set(line)
    about = json.loads((trained / "config.json").read_text())
    state = torch.load(trained / "last.pt", weights_only=True)
    assert about == {"settings": state["settings"], "config": state["config"]}


def test_model_pt_is_the_one_with_the_lowest_held_out_loss(trained, tiny):
    best = min(m["val_loss"] for m in metrics(trained) if m["stage"] == "instruct")
    model = NanoAKI.load(trained / "model.pt")
    val = Examples(Records.read(tiny, "val.json"), model.tokenizer, model.config)
    objective, every = Objective(model, torch.device("cpu"), "auto"), list(range(len(val)))
    assert held_out_loss(objective, val, every, "mma", 9) == pytest.approx(best, rel=1e-4)


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_does_not(tiny, tmp_path):
    short = ["--align-steps", "8", "--steps", "12", "--eval-every", "6", "--dropout", "0.1"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main(["--data", str(tiny), "--out", str(tmp_path / name), "--seed", str(seed), *TINY,
                    *short])
    a, b, c = (weights(tmp_path / name / "last.pt") for name in "abc")
    assert same(a, b) and not same(a, c)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Runs that nothing interrupts, by order: made when first asked for."""
    made = {}

    def run(order):
        if order not in made:
            made[order] = tmp_path_factory.mktemp("whole") / order
            train.main(["--data", str(tiny), *TINY, *SHORT, "--order", order, "--out",
                        str(made[order])])
        return made[order]

    return run


@pytest.mark.parametrize("stop_at, order", [
    (5, "data"), (7, "data"), (8, "data"),      # in stage 1, in time for its end, in its last step
    (17, "data"), (23, "data"), (24, "data"),   # the same of stage 2
    (4, "dual"), (16, "dual")])                 # after an odd number of steps of a stage
def test_ctrl_c_saves_exits_130_and_resume_ends_as_if_nothing_happened(
        tiny, whole, tmp_path, capsys, monkeypatch, stop_at, order):
    uncut, out, real, count = whole(order), tmp_path / "cut", train.Run.step, [0]

    def interrupted(self, stage, parts, targets):
        count[0] += 1
        if count[0] == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, stage, parts, targets)

    monkeypatch.setattr(train.Run, "step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data", str(tiny), *TINY, *SHORT, "--order", order, "--out", str(out)])
    assert stopped.value.code == 130 and "--resume" in capsys.readouterr().out
    assert count[0] <= stop_at + 1
    picture = str(next((tiny / "images").iterdir()))
    sample.main(["--model", str(out / "model.pt"), "--image", picture, "--ask",
                 "what color is left?"])
    train.main(["--out", str(out), "--resume"])
    assert count[0] == 24
    assert same(weights(out / "last.pt"), weights(uncut / "last.pt"))
    assert same(weights(out / "model.pt"), weights(uncut / "model.pt"))
    assert metrics(out) == metrics(uncut)


@pytest.mark.parametrize("argv, words", [
    (["--bacth-size", "4"], ["--bacth-size", "did you mean --batch-size?"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--steps", "-1"], ["steps", "at least 0"]),
    (["--warmup", "0"], ["warmup", "at least 1"]),
    (["--steps", "0", "--align-steps", "0"], ["nothing to train", "steps is 0"]),
    (["--preset", "huge"], ["huge", "nano, small, base"]),
    (["--mask", "open"], ["open", "causal, mma"]),
    (["--order", "random"], ["random", "data, image, text, dual"]),
    (["--dtype", "int8"], ["int8", "float32, bfloat16"]),
    (["--n-embd", "100"], ["n_embd 100", "n_head 3"]),
    (["--block-size", "30"], ["block_size 30", "36"]),
    (["--device", "tpu"], ["tpu", "cpu"]),
    (["--lr", "nan"], ["lr", "nan"]),
    (["--data", "/nowhere"], ["/nowhere/train.json", "No such file"]),
    (["--init", "/nowhere/model.pt"], ["/nowhere/model.pt", "no such file"]),
    (["--resume"], ["last.pt", "no such file"])])
def test_a_bad_flag_is_one_clear_line(capsys, tmp_path, argv, words):
    error = refused(capsys, train.main, "--out", tmp_path / "out", *argv)
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_a_run_is_never_overwritten_and_resume_refuses_a_changed_flag(capsys, trained, tiny):
    before = (trained / "metrics.jsonl").read_bytes(), (trained / "model.pt").read_bytes()
    assert "--resume" in refused(capsys, train.main, "--data", tiny, "--out", trained, *TINY)
    error = refused(capsys, train.main, "--out", trained, "--resume", "--lr", "0.02")
    assert "--lr" in error and "0.01" in error and "0.02" in error
    assert "other --out" in refused(capsys, train.main, "--out", trained, "--resume", "--n-head", "4")
    assert before == ((trained / "metrics.jsonl").read_bytes(),
                      (trained / "model.pt").read_bytes())


@pytest.mark.parametrize("flags", [["--steps", "250"], ["--lr", "0.001", "--warmup", "5"],
                                   ["--data", "OTHER"], ["--mask", "causal"],
                                   ["--steps", "250", "--n-embd", "32", "--block-size", "64"]])
def test_what_resume_refuses_is_done_by_the_command_that_it_names(
        capsys, trained, tmp_path, monkeypatch, flags):
    other = make_tiny(tmp_path / "other folder", n=30)
    flags = [str(other) if word == "OTHER" else word for word in flags]
    error = refused(capsys, train.main, "--out", trained, "--resume", *flags)
    if str(other) in flags:
        assert f"{other / 'captions.json'} is not as it was" in error
    words = shlex.split(error.split("to train its model on: ")[1])
    assert words[:2] == ["python", "train.py"]
    words[words.index("--out") + 1] = str(tmp_path / "on")
    if "--steps" not in flags:
        words[words.index("--steps") + 1] = "3"
    monkeypatch.setattr(train.Run, "evaluate", lambda *_: None)
    monkeypatch.setattr(train, "test", lambda *_: None)
    train.main(words[2:])
    about = json.loads((tmp_path / "on/config.json").read_text())
    known = about["config"] | about["settings"]
    began = json.loads((trained / "config.json").read_text())["settings"]
    changed = dict(zip((word[2:] for word in flags[::2]), flags[1::2]))
    assert all(str(known[name.replace("-", "_")]) == value for name, value in changed.items())
    for name in ("batch_size", "eval_every", "workers", "seed"):
        assert known[name] == began[name]
    assert known["init"] == str(trained / "model.pt")


def test_a_folder_that_was_moved_is_resumed_and_one_whose_records_changed_is_refused_by_name(
        capsys, tmp_path):
    data, moved, out = make_tiny(tmp_path / "data", n=30), tmp_path / "moved", tmp_path / "out"
    short = [*TINY, "--align-steps", "2", "--steps", "3"]
    train.main(["--data", str(data), *short, "--out", str(out)])
    data.rename(moved)
    capsys.readouterr()
    assert "train.json: No such file" in refused(capsys, train.main, "--out", out, "--resume")
    train.main(["--data", str(moved), "--out", str(out), "--resume"])
    train.main(["--out", str(out), "--data", str(moved), "--resume"])  # it is not remembered
    capsys.readouterr()
    for name in ("val.json", "captions.json", "test.json"):
        path = moved / name
        text = path.read_text()
        path.write_text(text + "\n")
        said = refused(capsys, train.main, "--data", moved, "--out", out, "--resume")
        assert f"{path} is not as it was" in said and "--init" in said
        path.unlink()
        if name != "val.json":
            said = refused(capsys, train.main, "--data", moved, "--out", out, "--resume")
            assert f"{path} is not as it was" in said
        path.write_text(text)
    train.main(["--data", str(moved), "--out", str(out), "--resume"])


# A stage alone, and what is left out -------------------------------------------------------------


@pytest.mark.parametrize("order", ["data", "dual"])
def test_steps_0_is_stage_1_alone_and_init_from_it_is_the_second_stage_bit_for_bit(
        tiny, tmp_path, capsys, order):
    """What compare.py builds on: stage 1 once, then a stage 2 for each mask."""
    uncut, first = tmp_path / "uncut", tmp_path / "first"
    command = ["--data", str(tiny), *TINY, *SHORT, "--order", order]
    train.main([*command, "--mask", "causal", "--out", str(uncut)])
    capsys.readouterr()
    train.main([*command, "--steps", "0", "--out", str(first)])
    said = capsys.readouterr().out
    assert "split" not in said and "sample.py" not in said
    assert {p.name for p in first.iterdir()} == {"model.pt", "last.pt", "metrics.jsonl",
                                                 "curves.png", "config.json"}
    assert metrics(first) == metrics(uncut)[:1]
    assert same(weights(first / "model.pt"), weights(first / "last.pt"))
    train.main(["--out", str(first), "--resume"])  # there is nothing left to do
    assert metrics(first) == metrics(uncut)[:1]
    for name, seed in (("second", "0"), ("another", "1")):
        train.main(["--data", str(tiny), "--init", str(first / "model.pt"), "--mask", "causal",
                    "--order", order, "--steps", "16", "--eval-every", "6", "--batch-size", "32",
                    "--workers", "0", "--device", "cpu", "--seed", seed, "--out",
                    str(tmp_path / name)])
    second, another = tmp_path / "second", tmp_path / "another"
    assert metrics(second) == metrics(uncut)[1:] != metrics(another)
    for name in ("last.pt", "model.pt"):
        assert same(weights(second / name), weights(uncut / name))
        assert not same(weights(another / name), weights(uncut / name))


def test_without_captions_steps_0_leaves_nothing_to_train(tmp_path, capsys):
    data = make_tiny(tmp_path / "data", n=12)
    (data / "captions.json").unlink()
    with pytest.raises(SystemExit) as e:
        train.main(["--data", str(data), *TINY, "--steps", "0", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and "no captions.json" in error
    assert "nothing to train" in error and not (tmp_path / "out").exists()


def test_test_sample_bounds_the_report_on_val_and_0_leaves_any_report_out(tmp_path, capsys):
    data = make_tiny(tmp_path / "data", n=24)  # 8 questions to validate, and 8 to test
    command = ["--data", str(data), *TINY, *SHORT, "--out"]

    def report(name, *argv):
        train.main([*command, str(tmp_path / name), *argv])
        return metrics(tmp_path / name)[-1], capsys.readouterr().out

    line, said = report("all", "--test-sample", "6")
    assert line["stage"] == "test" and line["questions"]["all"] == 8 and "test-sample" not in said
    line, said = report("none", "--test-sample", "0")
    assert (line["stage"], line["step"]) == ("instruct", 16) and "exact match of" not in said
    assert not (tmp_path / "none/samples.png").exists() and (tmp_path / "none/model.pt").exists()
    (data / "test.json").unlink()
    line, said = report("some", "--test-sample", "6")
    assert line["stage"] == "val" and line["questions"]["all"] == 6 and "6 of 8 questions" in said
    assert (tmp_path / "some/samples.png").exists()
    line, said = report("val", "--test-sample", "8")
    assert line["questions"]["all"] == 8 and "--test-sample" not in said


# The order of pictures and text ------------------------------------------------------------------


def first_of(roles) -> str:
    """What all rows of a batch begin with."""
    starts = {"image" if role == IMAGE else "text" for role in roles[:, 0].tolist()}
    return starts.pop() if len(starts) == 1 else "mixed"


@pytest.mark.parametrize("order, align, instruct, asks", [
    ("data", ["text"], ["image"], "image"),  # as written, the control of all others
    ("image", ["image"], ["image"], "image"),
    ("text", ["text"], ["text"], "text"),
    ("dual", ["image", "text"], ["image", "text"], "image")])  # in turns
def test_order_is_kept_in_both_stages_in_evaluation_and_by_the_model(
        tmp_path, monkeypatch, order, align, instruct, asks):
    data, out = make_tiny(tmp_path / "data", n=24), tmp_path / "out"
    text = (data / "captions.json").read_text()
    (data / "captions.json").write_text(text.replace('"<image>"', '"name both\\n<image>"'))
    trains, asked, real = defaultdict(list), defaultdict(set), train.Run.step
    generate, loss, now = NanoAKI.generate, NanoAKI.loss, []

    def steps(self, stage, parts, targets):
        now[:] = [stage.name]
        trains[stage.name].append(first_of(parts[0].roles))
        return real(self, stage, parts, targets)

    def generates(self, images, tokens, roles, *more, **how):
        asked[now[0]].add(first_of(roles))
        return generate(self, images, tokens, roles, *more, **how)

    def losses(self, batch, *more):
        if not torch.is_grad_enabled():
            asked[now[0]].add(first_of(batch.roles))
        return loss(self, batch, *more)

    monkeypatch.setattr(train.Run, "step", steps)
    monkeypatch.setattr(NanoAKI, "generate", generates)
    monkeypatch.setattr(NanoAKI, "loss", losses)
    train.main(["--data", str(data), *TINY, "--align-steps", "4", "--steps", "6", "--eval-every",
                "3", "--order", order, "--out", str(out)])
    assert trains["align"] == (align * 4)[:4] and trains["instruct"] == (instruct * 6)[:6]
    assert asked["align"] == ({"text"} if order == "data" else {asks})
    assert asked["instruct"] == {asks}
    assert NanoAKI.load(out / "model.pt").config.order == ("image" if order == "dual" else order)
    now[:] = ["sample"]
    sample.main(["--model", str(out / "model.pt"), "--data", str(data)])
    assert asked["sample"] == {asks}


# sample.py ---------------------------------------------------------------------------------------


def test_sample_prints_one_line_per_question_and_nothing_else(capsys, trained, tiny):
    record = json.loads((tiny / "test.json").read_text())
    asked = [r["conversations"][0]["value"].replace("<image>\n", "") for r in record[:2]]
    sample.main(["--model", str(trained / "model.pt"), "--image", str(tiny / record[0]["image"]),
                 "--ask", *asked])
    out = capsys.readouterr().out
    assert out.splitlines() == [r["conversations"][1]["value"] for r in record[:2]]


def test_the_interactive_prompt_streams_what_ask_answers(capsys, trained, tiny, monkeypatch):
    lines = iter(["what color is left?", "<image><image>", "what color is right?"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    picture = tiny / "images/test0.png"
    sample.main(["--model", str(trained / "model.pt"), "--image", str(picture)])
    out = capsys.readouterr().out.splitlines()[1:]
    model = NanoAKI.load(trained / "model.pt")
    left, right = model.ask(picture, ["what color is left?", "what color is right?"])
    assert out[0] == left and "2 <image>" in out[1] and out[2] == right


@pytest.mark.parametrize("argv, words", [
    (["--model", "none.pt", "--ask", "x"], ["none.pt", "no such file"]),
    (["--model", __file__, "--ask", "x"], ["test_train.py", "not a nanoAKI checkpoint"]),
    (["--ask", " "], ["empty"]),
    (["--ask", "x", "--image", "gone.png"], ["gone.png", "No such file"]),
    (["--ask", "x", "--image", __file__], ["test_train.py", "not a picture"]),
    (["--ask", "word " * 500], ["64 positions"]),
    (["--ask", "x", "--temperature", "-1"], ["temperature"]),
    (["--ask", "x", "--mask", "open"], ["open"]),
    (["--ask", "<image> x"], ["1 <image>", "0 pictures"]),
    (["--imge", "x"], ["did you mean --image?"]),
    (["--data", "/nowhere"], ["/nowhere/test.json", "No such file"]),
    (["--data", "DATA", "--split", "tests"], ["tests.json", "No such file"]),
    (["--data", "DATA", "--out", __file__], ["test_train.py", "exists already"]),
    (["--data", "DATA", "--out", "/nowhere/answers.jsonl"], ["no folder /nowhere"]),
    (["--data", "DATA", "--out", ""], ["--out: . exists already"]),
    (["--data", ""], ["test.json", "No such file"]),
    (["--ask", "x", "--split", "val"], ["--split needs --data"]),
    (["--ask", "x", "--out", "answers.jsonl"], ["--out needs --data"]),
    *[(["--data", "DATA", flag, "1"], [f"{flag} does not go with --data"]) for flag in (
        "--ask", "--image", "--temperature", "--top-k", "--max-new-tokens", "--seed")]])
def test_sample_refuses_bad_input_in_one_line(capsys, trained, tiny, argv, words):
    argv = [str(tiny) if word == "DATA" else word for word in argv]
    argv = argv if "--model" in argv else ["--model", str(trained / "model.pt"), *argv]
    error = refused(capsys, sample.main, *argv)
    assert all(word in error for word in words), error


def test_sample_asks_a_whole_split_as_train_did_at_its_end_and_leaves_a_line_per_question(
        capsys, trained, tiny, tmp_path, monkeypatch):
    def ask(name, *argv):
        sample.main(["--model", str(trained / "model.pt"), "--data", str(tiny), "--out",
                     str(tmp_path / name), *argv])
        lines = (tmp_path / name).read_text().splitlines()
        return [Answered(**json.loads(line)) for line in lines], capsys.readouterr()

    found, said = ask("test")
    assert {"stage": "test", "step": 240, **scores(found)} == metrics(trained)[-1]
    assert "\ntest split, exact match of generated answers:\n" + table(found) in said.out
    assert "0/80" in said.err  # a progress bar
    records = json.loads((tiny / "test.json").read_text())
    assert [(r["id"], r["task"], r["conversations"][0]["value"].replace("<image>\n", ""),
             r["conversations"][1]["value"]) for r in records] == [a[:4] for a in found]
    assert all(a.answer and a.blind for a in found)
    val, _ = ask("val", "--split", "val")
    assert val[0].id == "val-0-left" and len(val) == 80
    monkeypatch.setitem(MASKS, "prefix", lambda q, k: q.place == k.place)  # none sees a picture
    masked, _ = ask("masked", "--mask", "prefix")
    assert [a[:4] for a in masked] == [a[:4] for a in found]
    assert scores(masked)["accuracy"]["all"] < 0.5
    own, _ = ask("own", "--mask", "mma")
    assert own == found  # the control: the mask that it was trained with
    before = (tmp_path / "test").read_bytes()
    assert "exists already" in refused(capsys, sample.main, "--model", trained / "model.pt",
                                       "--data", tiny, "--out", tmp_path / "test")
    assert (tmp_path / "test").read_bytes() == before


def test_sample_holds_out_what_train_does_where_there_is_no_val_json(capsys, trained, tmp_path):
    data = make_tiny(tmp_path / "data", n=40)
    (data / "val.json").unlink()
    records = json.loads((data / "train.json").read_text())
    records[3]["conversations"][1]["value"] = " "
    (data / "train.json").write_text(json.dumps(records))
    ids = {}
    for split in ("train", "val"):
        command = ["--model", str(trained / "model.pt"), "--data", str(data), "--split", split]
        with pytest.raises(SystemExit):
            sample.main(command)
        assert "1 of 80 are bad" in capsys.readouterr().err
        sample.main([*command, "--skip-bad", "--out", str(tmp_path / split)])
        lines = (tmp_path / split).read_text().splitlines()
        ids[split] = [json.loads(line)["id"] for line in lines]
    parts = read_splits(data, skip_bad=True)
    assert ids == {split: [record.id for record in parts[split]] for split in ids}
    assert len(ids["val"]) == 4 and len(ids["train"] + ids["val"]) == 79


def test_answers_without_pictures_are_not_asked_blind(tmp_path, asked):
    (tmp_path / "test.json").write_text(json.dumps([{"conversations": [
        {"from": "human", "value": "what color is left?"}, {"from": "gpt", "value": " red\n"}]}]))
    model, _ = asked
    examples = Examples(Records.read(tmp_path, "test.json"), model.tokenizer, model.config)
    (found,) = ask_all(model, examples, [0])
    assert found[:4] == ("0", "", "what color is left?", "red") and found.blind is None
    assert scores([found])["blind"] == {} and table([found]).splitlines()[1].split()[2] == "-"


# Scores ------------------------------------------------------------------------------------------


def test_f1_and_share_of_yes_are_those_of_pope_and_only_of_tasks_with_answers_yes_and_no():
    def answered(task, rights, answers):
        return [Answered("", task, "", right, answer, None)
                for right, answer in zip(rights.split(), answers.split())]

    some = answered("exist", "yes yes yes no no no no no", "yes yes no yes no no no maybe")
    some += answered("all yes", "yes yes", "yes no") + answered("count", "1 2", "1 yes")
    some += answered("never", "yes no no", "no no no")
    precision = recall = 2 / 3  # of three said to be, two are; of three that are, two were found
    assert yes_no(some) == {"exist": (pytest.approx(2 * precision * recall / (precision + recall)),
                                      3 / 8), "never": (0, 0)}
    lines = {line.split("  ")[0]: line.split()[-5:] for line in table(some).splitlines()[1:]}
    assert lines["exist"] == ["62.5%", "-", "8", "66.7%", "37.5%"]
    assert lines["never"] == ["66.7%", "-", "3", "0.0%", "0.0%"]
    assert lines["count"] == ["count", "50.0%", "-", "2"] and lines["all"][0] == "all"
    assert "F1" not in table(answered("count", "1 2", "1 2"))


# Optimizers --------------------------------------------------------------------------------------


def test_muon_is_torchs_within_bfloat16_and_not_without_momentum():
    def run(make, steps=4):
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(shape))
              for shape in [(48, 16), (16, 48), (48, 16), (16, 16)]]
        optimizer, start = make(ps), [p.detach().clone() for p in ps]
        for _ in range(steps):
            for p in ps:
                p.grad = torch.randn_like(p)
            optimizer.step()
        return torch.cat([(p - s).flatten() for p, s in zip(ps, start)]).detach()

    ours = run(lambda ps: Muon(ps, lr=0.02, weight_decay=0.1))
    half = run(lambda ps: Muon(ps, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16))
    theirs = run(lambda ps: torch.optim.Muon(ps, lr=0.02, momentum=0.95, weight_decay=0.1))
    wrong = run(lambda ps: Muon(ps, lr=0.02, momentum=0.0, weight_decay=0.1))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert 0 < (half - ours).norm() < 0.02 * ours.norm() and half.dtype == torch.float32
    assert (wrong - theirs).norm() > 0.1 * theirs.norm()


def test_muon_takes_queries_keys_and_values_as_three_matrices():
    def run(parts, *shape):
        p = torch.nn.Parameter(torch.zeros(shape))
        optimizer = Muon([{"params": [p], "parts": parts}], lr=1.0)
        p.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(0)).view(shape)
        p.grad.view(3, 16, 16)[2] *= 100  # values' gradients are larger
        optimizer.step()
        return p.detach().view(3, 16, 16)

    def alone(i):
        p = torch.nn.Parameter(torch.zeros(16, 16))
        p.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(0)).view(3, 16, 16)[i]
        Muon([p], lr=1.0).step()
        return p.detach()

    three, one = run(3, 48, 16), run(1, 48, 16)
    for i in range(3):
        assert (three[i] - alone(i)).abs().max() < 1e-3
    assert one[0].norm() < 0.3 * three[0].norm() and one[2].norm() > 0.9 * three[2].norm()


def test_every_parameter_has_one_optimizer_and_muon_gets_only_matrices_of_blocks_and_projector(
        asked):
    model, _ = asked
    muon, adamw = ([p for g in o.param_groups for p in g["params"]]
                   for o in make_optimizers(model, 0.1, 0.1, 0.0))
    assert {id(p) for p in muon + adamw} == {id(p) for p in model.parameters()}
    assert len(muon + adamw) == len(list(model.parameters()))
    parts = ("vit.blocks", "projector", "decoder.blocks")
    assert {id(p) for p in muon} == {id(p) for n, p in model.named_parameters()
                                     if p.dim() == 2 and n.startswith(parts)}


def test_the_learning_rate_rises_stays_and_falls_to_nothing():
    shares = [schedule(step, 100, 10) for step in range(100)]
    assert all(a < b for a, b in zip(shares[:9], shares[1:10])) and shares[0] == pytest.approx(0.1)
    assert shares[9:66] == [1] * 57
    assert all(a > b for a, b in zip(shares[65:], shares[66:])) and shares[-1] < 0.03
    for steps, warmup in ((1, 50), (30, 50), (3, 1)):  # too few to reach it
        assert all(0 < schedule(step, steps, warmup) <= 1 for step in range(steps))


# Evaluation --------------------------------------------------------------------------------------


def test_blind_pictures_are_always_of_another_record(asked):
    _, examples = asked
    other = other_pictures(examples, list(range(len(examples))))
    assert all(len(other[i]) == 1 and other[i] != examples[i].pictures for i in other)
    assert (len({p for some in other.values() for p in some})
            == len({examples[i].pictures[0] for i in other}))


def test_of_several_pictures_none_is_shown_blind_to_a_record_that_has_it():
    own = [["0a", "0b"], ["1a", "1b"], ["0b", "2a", "2b"], [], ["0a", "0b"]]
    examples = SimpleNamespace(config=SimpleNamespace(order="data"), some=lambda indices, order: [
        SimpleNamespace(pictures=own[i]) for i in indices])
    other = other_pictures(examples, [0, 1, 2, 3, 4])
    assert all(len(other[i]) == len(own[i]) and not set(other[i]) & set(own[i]) for i in range(5))
    assert other_pictures(examples, [0, 4]) == {}


def test_a_picture_with_several_questions_is_read_once(asked, monkeypatch):
    model, examples = asked
    some, read, encoded = list(range(len(examples))), [], []
    monkeypatch.setattr(examples, "picture", lambda path: read.append(path)
                        or Examples.picture(examples, path))
    hook = model.vit.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    answers = answer_all(model, examples, some)
    pictures = {path for i in some for path in examples[i].pictures}
    assert len(read) == len(pictures) == sum(encoded) < len(some)
    read.clear()
    assert answer_all(model, examples, some, batch_size=1) == answers  # the control reads each
    hook.remove()
    assert len(read) == len(some)


def test_stopping_after_the_longest_right_answer_changes_no_score(asked, monkeypatch):
    model, examples = asked
    some, head = list(range(len(examples))), model.decoder.head.forward

    def seldom_ending(x):  # about half of the answers run on
        logits = head(x)
        logits[..., model.tokenizer.eos] -= 100 * ((1000 * x[..., 0]).long() % 2)
        return logits

    def accuracy(answers):
        return scores([Answered("", e.task, "", e.answer, answer, None)
                       for e, answer in zip(map(examples.__getitem__, some), answers)])["accuracy"]

    monkeypatch.setattr(model.decoder.head, "forward", seldom_ending)
    pictures = [examples[i].pictures[0] for i in some]
    full = [a.strip() for a in model.ask(pictures, [examples[i].question for i in some])]
    cut = answer_all(model, examples, some)
    assert cut != full and 0 < accuracy(full)["all"] < 0.9
    assert accuracy(cut) == accuracy(full)
