"""The training loop, its command line, its optimizer, and what is asked of the model it leaves."""
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import sample
import train
from data.llava import Examples, Records
from helpers import TINY, make_tiny, metrics, same, weights
from nanoaki import NanoAKI
from train import Muon, Objective, answer_all, make_optimizers, other_pictures, schedule, score

STEPS = ["--align-steps", "150", "--steps", "300", "--eval-every", "100", "--lr", "0.01"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train.main(["--data", str(tiny), "--out", str(out), *TINY, *STEPS])
    return out


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
    assert {p.name for p in trained.iterdir()} == {"model.pt", "last.pt", "metrics.jsonl", "samples.png",
                                                   "config.json"}
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [(m["stage"], m["step"]) for m in lines] == [
        ("align", 150), ("instruct", 100), ("instruct", 200), ("instruct", 300), ("test", 300)]
    for line in lines[1:-1]:
        assert {"train_loss", "val_loss", "accuracy", "blind", "samples_per_second", "seconds"} <= set(line)


def test_model_pt_is_the_one_with_the_lowest_held_out_loss(trained, tiny):
    best = min(m["val_loss"] for m in metrics(trained) if m["stage"] == "instruct")
    model = NanoAKI.load(trained / "model.pt")
    val = Examples(Records.read(tiny, "val.json"), model.tokenizer, model.config)
    assert train.held_out_loss(Objective(model, torch.device("cpu"), "auto"), val, list(range(len(val))), "mma",
                                 9) == pytest.approx(best, rel=1e-4)


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_does_not(tiny, tmp_path):
    short = ["--align-steps", "8", "--steps", "12", "--eval-every", "6", "--dropout", "0.1"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main(["--data", str(tiny), "--out", str(tmp_path / name), "--seed", str(seed), *TINY, *short])
    a, b, c = (weights(tmp_path / name / "last.pt") for name in "abc")
    assert same(a, b) and not same(a, c)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


@pytest.mark.parametrize("stop_at", [5, 8, 17, 24])  # in stage 1, at its end, in stage 2, at its end
def test_ctrl_c_saves_exits_130_and_resume_ends_as_if_nothing_happened(tiny, tmp_path, capsys, monkeypatch, stop_at):
    short = ["--align-steps", "8", "--steps", "16", "--eval-every", "6", "--dropout", "0.1"]
    command = ["--data", str(tiny), *TINY, *short, "--out"]
    train.main([*command, str(tmp_path / "whole")])
    real, count = train.Run.update, [0]

    def interrupted(self, stage, parts):
        count[0] += 1
        if count[0] == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, stage, parts)

    monkeypatch.setattr(train.Run, "update", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main([*command, str(tmp_path / "cut")])
    assert stopped.value.code == 130 and "--resume" in capsys.readouterr().out
    picture = str(next((tiny / "images").iterdir()))
    sample.main(["--model", str(tmp_path / "cut/model.pt"), "--image", picture, "--ask", "what color is left?"])
    train.main(["--out", str(tmp_path / "cut"), "--resume"])
    assert same(weights(tmp_path / "cut/last.pt"), weights(tmp_path / "whole/last.pt"))
    assert same(weights(tmp_path / "cut/model.pt"), weights(tmp_path / "whole/model.pt"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def refused(capsys, main, *argv):
    """The one line that a command refuses with."""
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("argv, words", [
    (["--bacth-size", "4"], ["--bacth-size", "did you mean --batch-size?"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--steps", "0"], ["steps", "at least 1"]),
    (["--preset", "huge"], ["huge", "nano, small, base"]),
    (["--mask", "open"], ["open", "causal, mma"]),
    (["--n-embd", "100"], ["n_embd 100", "n_head 6"]),
    (["--block-size", "30"], ["block_size 30", "36"]),
    (["--device", "tpu"], ["tpu", "cpu"]),
    (["--lr", "nan"], ["lr", "nan"]),
    (["--data", "/nowhere"], ["/nowhere/train.json", "No such file"]),
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
    assert before == ((trained / "metrics.jsonl").read_bytes(), (trained / "model.pt").read_bytes())


def test_sample_prints_one_line_per_question_and_nothing_else(capsys, trained, tiny):
    record = json.loads((tiny / "test.json").read_text())
    asked = [r["conversations"][0]["value"].replace("<image>\n", "") for r in record[:2]]
    sample.main(["--model", str(trained / "model.pt"), "--image", str(tiny / record[0]["image"]), "--ask", *asked])
    out = capsys.readouterr().out
    assert out.splitlines() == [r["conversations"][1]["value"] for r in record[:2]]


def test_the_interactive_prompt_streams_what_ask_answers(capsys, trained, tiny, monkeypatch):
    lines = iter(["what color is left?", "<image><image>", "what color is right?"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    picture = tiny / "images/test0.png"
    sample.main(["--model", str(trained / "model.pt"), "--image", str(picture)])
    out = capsys.readouterr().out.splitlines()[1:]
    model, image = NanoAKI.load(trained / "model.pt"), sample.open_picture(str(picture))
    left, right = model.ask(image, ["what color is left?", "what color is right?"])
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
    (["--imge", "x"], ["did you mean --image?"])])
def test_sample_refuses_bad_input_in_one_line(capsys, trained, argv, words):
    argv = argv if "--model" in argv else ["--model", str(trained / "model.pt"), *argv]
    error = refused(capsys, sample.main, *argv)
    assert all(word in error for word in words), error


def test_muon_is_torchs_within_bfloat16_and_not_without_momentum():
    def run(make, steps=4):
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(shape)) for shape in [(48, 16), (16, 48), (48, 16), (16, 16)]]
        optimizer, start = make(ps), [p.detach().clone() for p in ps]
        for _ in range(steps):
            for p in ps:
                p.grad = torch.randn_like(p)
            optimizer.step()
        return torch.cat([(p - s).flatten() for p, s in zip(ps, start)]).detach()

    ours = run(lambda ps: Muon(ps, lr=0.02, weight_decay=0.1))
    theirs = run(lambda ps: torch.optim.Muon(ps, lr=0.02, momentum=0.95, weight_decay=0.1))
    wrong = run(lambda ps: Muon(ps, lr=0.02, momentum=0.0, weight_decay=0.1))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert (wrong - theirs).norm() > 0.1 * theirs.norm()


def test_every_parameter_has_one_optimizer_and_muon_gets_only_matrices_of_blocks_and_projector(trained):
    model = NanoAKI.load(trained / "model.pt")
    muon, adamw = ([p for g in o.param_groups for p in g["params"]] for o in make_optimizers(model, 0.1, 0.1, 0.0))
    assert {id(p) for p in muon + adamw} == {id(p) for p in model.parameters()}
    assert len(muon + adamw) == len(list(model.parameters()))
    assert {id(p) for p in muon} == {id(p) for n, p in model.named_parameters()
                                     if p.dim() == 2 and n.startswith(("vit.blocks", "projector", "decoder.blocks"))}


def test_the_learning_rate_rises_then_falls_to_nothing():
    shares = [schedule(step, 100, 10) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == shares[9] > 0.97
    assert all(a > b for a, b in zip(shares[9:], shares[10:])) and shares[-1] < 0.001


def test_blind_pictures_are_always_of_another_record(tiny, trained):
    model = NanoAKI.load(trained / "model.pt")
    examples = Examples(Records.read(tiny, "test.json"), model.tokenizer, model.config)
    other = other_pictures(examples, list(range(len(examples))))
    assert all(len(other[i]) == 1 and other[i] != examples[i].pictures for i in other)
    assert len({p for some in other.values() for p in some}) == len({examples[i].pictures[0] for i in other})


def test_of_several_pictures_none_is_shown_blind_to_a_record_that_has_it():
    own = [["0a", "0b"], ["1a", "1b"], ["0b", "2a", "2b"], [], ["0a", "0b"]]
    other = other_pictures([SimpleNamespace(pictures=p) for p in own], [0, 1, 2, 3, 4])
    assert all(len(other[i]) == len(own[i]) and not set(other[i]) & set(own[i]) for i in range(5))
    assert other_pictures([SimpleNamespace(pictures=p) for p in own[::4]], [0, 1]) == {}


def test_stopping_after_the_longest_right_answer_changes_no_score(tiny, trained):
    model = NanoAKI.load(trained / "model.pt")
    examples = Examples(Records.read(tiny, "test.json"), model.tokenizer, model.config)
    some, head = list(range(len(examples))), model.decoder.head

    def seldom_ending(x):  # about half of the answers run on
        logits = head(x)
        logits[..., model.tokenizer.eos] -= 100 * ((1000 * x[..., 0]).long() % 2)
        return logits

    model.decoder.head = seldom_ending
    pictures = [sample.open_picture(str(examples[i].pictures[0])) for i in some]
    full = [a.strip() for a in model.ask(pictures, [examples[i].question for i in some])]
    cut = answer_all(model, examples, some)
    assert cut != full and 0 < score(examples, some, full)[0]["all"] < 0.9
    assert score(examples, some, cut) == score(examples, some, full)
