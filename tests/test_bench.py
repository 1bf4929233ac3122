"""What bench.py measures of a model, and the pages quote, is what it says it is."""
import json

import pytest
import torch
from PIL import Image

from bench import COLORS, answer_in_turn, draw_growth, find_named
from conftest import tiny_model


def scenes(questions: int = 300, tokens: int = 9):
    """(there, named, test) of scenes with things in half of their places, one of them named."""
    generator = torch.Generator().manual_seed(0)
    there = torch.rand(questions, tokens, generator=generator) < 0.5
    there[:, 0] = True
    chosen = torch.multinomial(there.float(), 1, generator=generator)
    named = torch.zeros_like(there).scatter(1, chosen, True)
    return there, named, torch.arange(questions) % 3 == 0


def test_the_probe_finds_what_states_mark_and_nothing_where_they_do_not():
    there, named, test = scenes()
    x = torch.randn(*there.shape, 400, generator=torch.Generator().manual_seed(1))  # by heart: 1.0
    chance = (1 / there.sum(1))[test].mean().item()
    assert find_named(x, named, there, test) == pytest.approx(chance, abs=0.1)  # the control
    x[..., 3] += 8.0 * named
    assert find_named(x, named, there, test) == 1.0


@pytest.mark.parametrize("mask, same", [("causal", True), ("image", True), ("mma", False),
                                        ("prefix", False)])
def test_keys_of_a_picture_can_be_kept_where_it_has_not_read_the_question(mask, same):
    model = tiny_model()
    side = model.config.image_size
    image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    questions = torch.randint(0, 256, (3, 5))
    how = model, image, questions, 2, mask
    anew, tokens_kept, keys_kept = (answer_in_turn(*how, keep)[0]
                                    for keep in ("nothing", "visual tokens", "keys"))
    assert torch.allclose(tokens_kept, anew, atol=1e-5)
    assert torch.allclose(keys_kept, anew, atol=1e-5) == same


def test_growth_is_of_the_runs_at_the_rate_and_of_the_mask_that_are_named(tmp_path, capsys):
    for run, mask, right in (("0/causal-0.002", "causal", 1), ("0/mma-0.002", "mma", 3),
                             ("0/mma-0.004", "mma", 0), ("1/causal-0.002", "causal", 2),
                             ("1/mma-0.002", "mma", 3)):
        lines = [{"id": "1", "task": "at", "question": "?", "right": "owl", "blind": None,
                  "answer": "owl" if n < right else "duck"} for n in range(4)]
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / f"answers-test-{mask}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines))
    one, other = tmp_path / "0", tmp_path / "1"
    image = draw_growth([["things", f"12={one}", f"54={other}"]], 0.002)
    assert capsys.readouterr().out == (
        f"12 things, {one}: causal 25.0%\n12 things, {one}: mma 75.0%\n"
        f"54 things, {other}: causal 50.0%\n54 things, {other}: mma 75.0%\n")
    used = {color for _, color in image.getcolors(2 ** 24)}
    assert COLORS["causal"] in used and COLORS["mma"] in used and COLORS["prefix"] not in used


def test_growth_of_two_seeds_is_their_mean_and_a_band(monkeypatch):
    drawn = []
    monkeypatch.setattr("bench.chart", lambda title, curves, *_, **__: drawn.append(curves)
                        or Image.new("RGB", (300, 9)))
    monkeypatch.setattr("bench.Compared.scores", lambda run: {"accuracy": {
        "all": len(run.mask) / 10 + 0.1 * (run.folder.parent.name == "b")}})
    draw_growth([["things", "12=a", "12=b", "54=a"]], 0.002)
    rounded = {entry: {n: [round(value) for value in found] for n, found in curve.items()}
               for entry, curve in drawn[0].items()}
    assert rounded == {"causal": {12: [60, 70], 54: [60]}, "mma": {12: [30, 40], 54: [30]}}


@pytest.mark.parametrize("points", [[], ["12"], ["=out"], ["many=out"], ["12="]])
def test_growth_refuses_what_is_no_number_and_folder(points):
    with pytest.raises(ValueError, match="--growth 'things': a title and number=folder"):
        draw_growth([["things", *points]], 0.002)
