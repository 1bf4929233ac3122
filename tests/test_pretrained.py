"""Published weights: the same states, logits and ids as transformers, which made tests/pretrained."""
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch

from engine import pretrained
from engine.families import read_decoder, read_vit
from engine.published import read_tensors
from helpers import ROOT
from nanoaki import Config, Decoder, NanoAKI, Tokenizer, ViT, load_file

FOLDERS = Path(__file__).parent / "pretrained"


def expected(name: str) -> dict:
    return read_tensors(FOLDERS / name / "expected.safetensors")


@pytest.mark.parametrize("name", ["siglip", "dinov2"])
def test_a_published_vit_gives_the_states_of_transformers(name):
    about, weights = read_vit(FOLDERS / name, None, None)
    vit, e = ViT(Config(**about)), expected(name)
    vit.load_state_dict(weights)
    states = vit(e["pictures"])
    theirs = e["states"][:, -states.shape[1]:]
    print((states - theirs).abs().max(), theirs.abs().max())
    assert (states - theirs).abs().max() < 1e-5


def test_gpt2():
    about, weights, merges = read_decoder(FOLDERS / "gpt2", None)
    d, e = Decoder(Config(**about, image_size=16)), expected("gpt2")
    d.load_state_dict(weights)
    rows = None
    tk = Tokenizer(merges)
    v = json.loads((FOLDERS / "gpt2/vocab.json").read_text())
    from engine.families import read_merges
    merges, rows = read_merges(FOLDERS / "gpt2", 400)
    ours = {theirs: i for i, theirs in enumerate(rows)}
    bad = 0
    for text, ids in json.loads((FOLDERS / "gpt2/strings.json").read_text()):
        if tk.encode(text) != [ours[i] for i in ids]:
            bad += 1
            print(repr(text), tk.encode(text), [ours[i] for i in ids])
    assert not bad
    tokens = torch.tensor([[ours[i] for i in row] for row in e["tokens"].tolist()])
    x = d.token(tokens) + d.position.weight[:12]
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    states = d(x, mask)
    print((states - e["states"]).abs().max(), e["states"].abs().max())
    logits = d.head(states)[..., [ours[i] for i in range(400)]]
    print((logits - e["logits"]).abs().max(), e["logits"].abs().max())
    assert (logits - e["logits"]).abs().max() < 1e-5
