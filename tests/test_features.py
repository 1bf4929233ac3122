"""What a frozen ViT says of each picture is computed once, kept, and worth as much as anew."""
import json
import os
import pickle
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data.llava import Examples
from engine import features, pretrained
from engine.folder import try_to_lock
from helpers import make_tiny, metrics, refused, refused_at_last, same, spoil, weights
from nanoaki import NanoAKI, ViT

FOLDERS = Path(__file__).parent / "pretrained"
RUN = ["--align-steps", "4", "--steps", "6", "--eval-every", "3", "--eval-sample", "12",
       "--batch-size", "8", "--workers", "0", "--device", "cpu", "--freeze", "vit"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """40 pictures: 30 to train on, and to caption, five to validate and five to test."""
    return make_tiny(tmp_path_factory.mktemp("data") / "tiny", n=30)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    out = tmp_path_factory.mktemp("start") / "start.pt"
    pretrained.main(["--vit", str(FOLDERS / "dinov2"), "--decoder", str(FOLDERS / "gpt2"),
                     "--merge", "2", "--out", str(out)])
    return out


@pytest.fixture
def looks(monkeypatch):
    """How many pictures the ViT is given, call by call."""
    seen, forward = [], ViT.forward

    def counted(self, images):
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(ViT, "forward", counted)
    return seen


def command(data: Path, start: Path, out: Path, *more) -> list[str]:
    return [str(word) for word in ("--data", data, "--init", start, "--out", out, *RUN, *more)]


def kept(folder: Path) -> Path | None:
    """The file of what the ViT said there; no more than one is expected."""
    (path,) = [*folder.glob("features-*.f16")] or [None]
    return path


def losses(out: Path) -> list[float]:
    return [line[key] for line in metrics(out) for key in ("train_loss", "val_loss") if key in line]


def loud(start: Path, path: Path, **factors: float) -> Path:
    """A start whose visual tokens are large, so that losses follow what the ViT says."""
    torch.manual_seed(0)
    model = NanoAKI.load(start, new_parts=True)
    with torch.no_grad():
        for part in (model.projector.up, model.projector.down):
            part.weight *= 20
        model.vit.patch.weight *= factors.get("patch", 1)
    model.save(path)
    return path


def test_a_frozen_vit_looks_once_and_losses_are_those_of_looking_anew(tiny, start, tmp_path, looks,
                                                                     monkeypatch, capsys):
    first, second = loud(start, tmp_path / "a.pt"), loud(start, tmp_path / "b.pt", patch=1.5)
    train.main(command(tiny, first, tmp_path / "once"))
    assert sum(looks) == 40
    assert "40 of 40 are left" in capsys.readouterr().out
    assert kept(tmp_path / "once").stat().st_size == 40 * (32 + 2 * 16 * 16)
    with monkeypatch.context() as patch:
        patch.setattr(Examples, "look", Examples.picture)
        train.main(command(tiny, first, tmp_path / "anew"))
    assert sum(looks) > 120
    train.main(command(tiny, second, tmp_path / "other"))  # the control: other weights
    once, anew, other = (losses(tmp_path / name) for name in ("once", "anew", "other"))
    assert len(once) == 6 and once == pytest.approx(anew, rel=2e-5) and once != anew
    assert other != pytest.approx(anew, rel=2e-4)


def test_runs_share_a_file_whatever_stage_and_data_they_need(tiny, start, tmp_path, looks):
    shared, model = ["--features", tmp_path / "new/f"], tmp_path / "first/model.pt"
    train.main(command(tiny, start, tmp_path / "first", *shared, "--steps", 0))
    after_stage_1 = sum(looks)
    assert 0 < after_stage_1 < 40  # what is asked in stage 2 alone is not looked at
    train.main(command(tiny, model, tmp_path / "second", *shared, "--align-steps", 0))
    assert sum(looks) == 40 and not kept(tmp_path / "second")
    train.main(command(tiny, model, tmp_path / "third", *shared, "--align-steps", 0))
    assert sum(looks) == 40
    train.main(command(tiny, model, tmp_path / "alone", "--align-steps", 0))  # the control
    assert sum(looks) > 40
    assert losses(tmp_path / "second") == losses(tmp_path / "third") == losses(tmp_path / "alone")


def test_data_vits_and_types_that_differ_have_files_of_their_own(tiny, start, some, tmp_path):
    found, model = some
    records = list(train.read_splits(tiny).values())

    def file(*shown, others=(), **more):
        return features.Features(tmp_path, list(shown), list(others), model, **more).file

    captions = [part for part in records if part.path.stem == "captions"]
    asked = [part for part in records if part.path.stem != "captions"]
    assert file(*records) == file(*captions, others=asked) == file(*asked) == found.file
    assert file(*asked[1:]) != found.file != file(*records, bfloat16=True)
    with torch.no_grad():
        model.vit.norm.bias += 1
    assert file(*records) != found.file


def test_pictures_of_captions_alone_do_not_move_the_others(tiny, start, tmp_path, looks):
    data = shutil.copytree(tiny, tmp_path / "data")
    shutil.copy(data / "images/train1.png", data / "images/alone.png")
    captions = json.loads((data / "captions.json").read_text())
    captions[0]["image"] = "images/alone.png"
    (data / "captions.json").write_text(json.dumps(captions))
    shared = ["--features", tmp_path / "kept"]
    train.main(command(data, start, tmp_path / "first", *shared))
    assert sum(looks) == 41
    (data / "captions.json").write_text("[broken")  # of which stage 2 alone knows nothing
    train.main(command(data, tmp_path / "first/model.pt", tmp_path / "second", *shared,
                       "--align-steps", 0))
    assert sum(looks) == 41


def test_a_run_waits_while_another_looks(some, looks):
    found, model = some
    found.file.touch()
    with open(found.file, "r+b") as other:
        assert try_to_lock(other)
        waiting = threading.Thread(target=found.fill, args=[model, "float32", False])
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive() and not looks
    waiting.join(60)
    assert not waiting.is_alive() and sum(looks) == 40


def test_a_stopped_run_goes_on_with_what_other_runs_share(tiny, start, tmp_path, looks,
                                                         monkeypatch):
    shared = ["--features", str(tmp_path / "kept")]

    def stop():
        raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 1, 2, stop)
        train.main(command(tiny, start, tmp_path / "out", *shared))
    train.main(["--resume", "--out", str(tmp_path / "out"), *shared])
    assert sum(looks) == 40 and metrics(tmp_path / "out")[-1]["stage"] == "test"


def test_features_that_cannot_be_used_are_refused_in_one_line(tiny, start, tmp_path, capsys):
    flags = [*command(tiny, start, tmp_path / "a", "--features", tmp_path / "f"), "--augment"]
    assert "without --augment" in refused(capsys, train.main, *flags)
    taken = command(tiny, start, tmp_path / "b", "--features", tiny / "train.json")
    assert "train.json is no folder" in refused(capsys, train.main, *taken)
    assert not (tmp_path / "b").exists()


def test_a_vit_that_varies_or_learns_looks_anew(tiny, start, tmp_path, looks):
    for name, flags in (("augmented", ["--augment"]), ("free", ["--freeze", "decoder"])):
        looks.clear()
        train.main(command(tiny, start, tmp_path / name, *flags))
        assert sum(looks) > 80 and not kept(tmp_path / name)


def test_loader_workers_share_what_the_vit_said(tiny, start, tmp_path):
    train.main(command(tiny, start, tmp_path / "none"))
    train.main(command(tiny, start, tmp_path / "one", "--workers", 1))
    assert metrics(tmp_path / "none") == metrics(tmp_path / "one")
    assert same(weights(tmp_path / "none/last.pt"), weights(tmp_path / "one/last.pt"))


def test_a_killed_run_goes_on_where_it_was_and_ends_as_one_that_was_not(
        tiny, start, tmp_path, looks, monkeypatch):
    monkeypatch.setattr(features, "AT_ONCE", 8)
    out, forward = tmp_path / "out", ViT.forward

    def dies(self, images):
        if len(looks) == 3:
            raise SystemExit(9)
        return forward(self, images)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(ViT, "forward", dies)
        train.main(command(tiny, start, out))
    assert e.value.code == 9 and looks == [8] * 3
    looks.clear()
    train.main(["--resume", "--out", str(out)])
    assert sum(looks) == 16
    train.main(command(tiny, start, tmp_path / "uncut"))
    assert metrics(out) == metrics(tmp_path / "uncut")
    assert same(weights(out / "last.pt"), weights(tmp_path / "uncut/last.pt"))
    looks.clear()
    train.main(["--resume", "--out", str(out)])  # all is done
    assert not looks


def stop_at(monkeypatch, stage: int, step: int, act) -> None:
    """Call act() before that step."""
    real = train.Run.step

    def acts(self, *how):
        if (self.progress.stage, self.progress.step) == (stage, step):
            act()
        return real(self, *how)

    monkeypatch.setattr(train.Run, "step", acts)


def test_a_run_that_is_resumed_in_a_stage_ends_as_one_that_was_not_stopped(tiny, start, tmp_path,
                                                                          monkeypatch):
    out = tmp_path / "out"

    def stop():
        raise SystemExit(9)

    for stage, step in ((0, 2), (1, 4)):
        argv = ["--resume", "--out", str(out)] if stage else command(tiny, start, out)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, stage, step, stop)
            train.main([*argv, "--save-every", "0"])
    train.main(["--resume", "--out", str(out)])
    train.main(command(tiny, start, tmp_path / "uncut"))
    assert metrics(out) == metrics(tmp_path / "uncut")
    assert same(weights(out / "last.pt"), weights(tmp_path / "uncut/last.pt"))


def test_a_picture_that_changes_under_a_run_is_one_line_and_is_looked_at_again_on_resume(
        tiny, start, tmp_path, monkeypatch, capsys, looks):
    data, out = shutil.copytree(tiny, tmp_path / "data"), tmp_path / "out"
    picture = data / "images/train7.png"

    def change():
        shutil.copy(data / "images/train8.png", picture)

    with monkeypatch.context() as patch:
        stop_at(patch, 0, 1, change)
        said = refused_at_last(capsys, train.main, *command(data, start, out))
    assert f"{picture}: changed since the ViT looked at it" in said and "--skip-bad" in said
    looks.clear()
    train.main(["--resume", "--out", str(out)])
    assert sum(looks) == 1


def test_a_broken_picture_ends_a_run_in_a_line_and_skip_bad_leaves_it_out(tiny, start, tmp_path,
                                                                         capsys):
    data, out = shutil.copytree(tiny, tmp_path / "data"), tmp_path / "out"
    spoil(data / "images/train7.png")
    said = refused_at_last(capsys, train.main, *command(data, start, out))
    assert "train7.png" in said and "--skip-bad, also with --resume, leaves it out" in said
    train.main(["--resume", "--out", str(out), "--skip-bad"])
    assert "left out: " in capsys.readouterr().err
    assert metrics(out)[-1]["stage"] == "test" and metrics(out)[-1]["left_out"] > 0


def test_a_disk_without_room_is_refused_before_a_run_begins(tiny, start, tmp_path, capsys,
                                                            monkeypatch):
    needed = 40 * (32 + 2 * 16 * 16)
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        if free < needed:
            said = refused(capsys, train.main, *command(tiny, start, tmp_path / "out"))
            assert ".f16: its disk has" in said and not (tmp_path / "out").exists()
        else:
            train.main(command(tiny, start, tmp_path / "out"))


@pytest.fixture
def some(tiny, start, tmp_path):
    model = NanoAKI.load(start, new_parts=True)
    records = train.read_splits(tiny)
    examples = [Examples(records[name], model.tokenizer, model.config) for name in records]
    return features.Features(tmp_path, list(records.values()), [], model), model


@pytest.mark.parametrize("turn", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_the_work_in_whatever_order_they_begin(some, looks, monkeypatch, turn):
    found, model = some
    for rank in turn:  # the later ones find what the earlier have written
        monkeypatch.setattr(features, "rank_and_world", lambda: (rank, 3))
        found.fill(model, "float32", False)
    assert sum(looks) == 40 and max(looks) <= 14 and not found.missing()


def test_states_are_the_vits_own_in_half_precision_and_survive_pickling(some):
    found, model = some
    assert len(found.missing()) == 40
    found.fill(model, "float32", False)
    path = list(found.rows)[3]
    picture = Examples.picture(SimpleNamespace(config=model.config), path)
    states = model.vit(picture[None])[0].half()
    assert torch.equal(found[path], states) and not torch.equal(found[list(found.rows)[4]], states)
    assert torch.equal(pickle.loads(pickle.dumps(found))[path], states)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    assert found.missing() == [path]  # it may be another by now
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not found.missing()
    with torch.no_grad():
        model.vit.norm.bias += 1
    found.weights = "others"
    assert len(found.missing()) == 40  # of other weights none is there


def test_a_model_is_given_pixels_or_states_of_its_own_shape(start):
    model = NanoAKI.load(start, new_parts=True)
    tokens = torch.full((1, 5), model.tokenizer.image)
    roles = torch.tensor([[1, 1, 1, 1, 2]])
    pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    states = model.vit(pixels).detach()
    seen = model(pixels, tokens, roles)[0]
    assert torch.allclose(model(states.half(), tokens, roles)[0], seen, atol=1e-2)
    assert not torch.allclose(model(-states.half(), tokens, roles)[0], seen, atol=1e-2)
    for bad in (states, states[:, :-1].half(), states[..., :-1].half(), pixels[..., :-1]):
        with pytest.raises(ValueError, match="images must be uint8"):
            model(bad, tokens, roles)
