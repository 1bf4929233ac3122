"""Published weights: what transformers computes with those of tests/pretrained, and bad folders."""
import json
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch

import train
from engine import pretrained
from engine.pretrained import read_merges
from engine.families import read_decoder, read_vit
from engine.features import Features
from engine.published import read_tensors
from helpers import make_tiny, metrics, refused, same, spoil, weights
from nanoaki import Config, Decoder, NanoAKI, Tokenizer, ViT, load_file

FOLDERS = Path(__file__).parent / "pretrained"
VITS = ("siglip", "dinov2")


def expected(name: str) -> dict:
    return read_tensors(FOLDERS / name / "expected.safetensors")


def published_vit(name: str, image_size: int | None = None, layers: int | None = None):
    about, found = read_vit(FOLDERS / name, image_size, layers)
    vit = ViT(Config(**about))
    vit.load_state_dict(found)
    return vit


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, of the last positions of theirs: its class token stands before."""
    return float((ours - theirs[:, -ours.shape[1]:]).detach().abs().max())


# The same numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VITS)
def test_a_published_vit_gives_the_states_that_transformers_has(name):
    vit, e = published_vit(name), expected(name)
    assert far(vit(e["own.pictures"]), e["own.states"]) < 1e-5
    for weight in (vit.blocks[0].out.weight, vit.blocks[1].qkv.weight[:16]):  # controls
        kept = weight.detach().clone()
        weight.data.copy_(kept.T)
        assert far(vit(e["own.pictures"]), e["own.states"]) > 1e-2
        weight.data.copy_(kept)


@pytest.mark.parametrize("name", VITS)
def test_positions_are_resized_as_transformers_does(name):
    vit, e = published_vit(name, 42), expected(name)
    assert far(vit(e["other.pictures"]), e["other.states"]) < 1e-5
    grid = vit.position.data.view(6, 6, -1)
    grid.copy_(grid.transpose(0, 1).clone())
    assert far(vit(e["other.pictures"]), e["other.states"]) > 1e-2


@pytest.mark.parametrize("name", VITS)
def test_the_first_blocks_alone_end_with_a_new_layer_norm(name, capsys):
    vit, e = published_vit(name, layers=1), expected(name)
    assert "first 1 of 2 blocks; the LayerNorm after them is a new one" in capsys.readouterr().out
    first = torch.nn.functional.layer_norm(e["own.first"], [16], eps=1e-6)
    assert far(vit(e["own.pictures"]), first) < 1e-5
    assert far(published_vit(name)(e["own.pictures"]), first) > 1e-2


def test_a_published_decoder_gives_the_states_and_logits_that_transformers_has():
    about, found = read_decoder(FOLDERS / "gpt2", read_merges(FOLDERS / "gpt2")[1], None)
    decoder, e = Decoder(Config(**about, image_size=16)), expected("gpt2")
    decoder.load_state_dict(found)
    ours = {theirs: i for i, theirs in enumerate(read_merges(FOLDERS / "gpt2")[1]) if i < 259}
    ours |= {theirs: theirs + 3 for theirs in range(257, 400)}
    tokens = torch.tensor([[ours[i] for i in row] for row in e["tokens"].tolist()])
    causal = torch.ones(2 * tokens.shape[1:], dtype=torch.bool).tril()

    def compute():
        states = decoder(decoder.token(tokens) + decoder.position.weight[:tokens.shape[1]], causal)
        return states, decoder.head(states)[..., [ours[i] for i in range(400)]]

    states, logits = compute()
    assert far(states, e["states"]) < 1e-5 and far(logits, e["logits"]) < 1e-5
    decoder.blocks[0].out.weight.data.copy_(decoder.blocks[0].out.weight.data.T.clone())
    assert far(compute()[0], e["states"]) > 1e-2


def test_200_strings_have_the_ids_of_gpt2_but_for_one_renumbering(monkeypatch):
    merges, rows = read_merges(FOLDERS / "gpt2")
    vocabulary = json.loads((FOLDERS / "gpt2/vocab.json").read_text())
    strings = json.loads((FOLDERS / "gpt2/strings.json").read_text())
    assert len(strings) == 200 and rows[Tokenizer.eos] == vocabulary["<|endoftext|>"]

    def differing() -> int:
        tokenizer = Tokenizer(merges)
        return sum([rows[i] for i in tokenizer.encode(text)] != ids for text, ids in strings)

    assert differing() == 0
    monkeypatch.setattr(Tokenizer, "words", re.compile(r"\s*\S+|\s+"))  # the control
    assert differing() > 20
