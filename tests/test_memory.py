"""The memory of training is estimated from shapes as real tensors take it."""
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from conftest import tiny_config, tiny_model
from engine import memory
from engine.memory import estimate
from helpers import refused
from nanoaki import Model, Tokenizer, load_file, save_file

CONFIG = tiny_config(block_size=200, image_size=32)


@pytest.mark.parametrize("freeze", [[], ["vit"], ["vit", "decoder"]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"queries": 5, "vit_classes": 1}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fake_tensors_hold_what_real_ones_do(monkeypatch, freeze, changes, dtype):
    config = replace(CONFIG, **changes)
    found = estimate(config, 3, 10, freeze, dtype)
    monkeypatch.setattr(memory, "FakeTensorMode", nullcontext)
    assert estimate(config, 3, 10, freeze, dtype) == found


def test_weights_gradients_and_states_are_those_of_the_parameters():
    sizes = {name: 4 * p.numel() for name, p in Model(CONFIG).named_parameters()}
    for freeze in ([], ["vit"], ["vit", "decoder"]):
        weights, gradients, states, kept, most = estimate(CONFIG, 2, 9, freeze, "float32").values()
        trained = {name: n for name, n in sizes.items() if name.split(".")[0] not in freeze}
        muon = sum(n for name, n in trained.items() if name.endswith(".weight")
                   and ("blocks" in name or "projector" in name) and "norm" not in name)
        assert weights == sum(sizes.values()) and gradients == sum(trained.values())
        assert states == pytest.approx(muon + 2 * (sum(trained.values()) - muon), abs=999)  # steps
        assert max(kept, gradients) < most - weights - states < kept + gradients + 10 ** 6


def test_what_is_kept_grows_with_the_batch_and_falls_with_what_is_frozen_and_halved():
    kept = "kept of the forward pass for the backward one"
    one, two = (estimate(CONFIG, n, 20, [], "float32")[kept] for n in (8, 16))
    assert two == pytest.approx(2 * one, rel=0.1)
    assert estimate(CONFIG, 8, 40, [], "float32")[kept] > 1.1 * one
    assert estimate(CONFIG, 8, 20, ["vit"], "float32")[kept] < 0.8 * one
    assert 0.5 * one < estimate(CONFIG, 8, 20, [], "bfloat16")[kept] < one


def test_the_command_prints_what_it_estimates_and_refuses_in_a_line(tmp_path, capsys):
    path = tmp_path / "model.pt"
    tiny_model(torch.float32, Tokenizer([])).save(path)
    memory.main([str(path), "--freeze", "vit", "--batch-size", "2", "--tokens", "20"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "steps of 2 examples, 4 visual tokens and 20 of text each, in bfloat16:"
    assert [line.split("GB  ")[1] for line in lines] == [*estimate(CONFIG, 1, 1, [], "float32")]
    for flags, wanted in ((["--tokens", "61"], "61 and 4 visual tokens are more than the"),
                          (["--freeze", "eyes"], "must be vit, decoder or vit,decoder"),
                          (["--batch-size", "0"], "--batch-size must be at least 1")):
        assert wanted in refused(capsys, memory.main, path, *flags)
    assert "no such file" in refused(capsys, memory.main, tmp_path / "none.pt")
    state = load_file(path)  # of a new decoder the data choose the positions
    vit = {name: w for name, w in state["model"].items() if name.startswith("vit.")}
    save_file(state | {"model": vit}, path)
    memory.main([str(path), "--tokens", "61"])
