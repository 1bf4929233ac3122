"""Config, model, loss, generation, ask, checkpoints, and the file itself."""
import io
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import nanoaki
from conftest import (VISUAL, alone, fill, make_batch, padded, random_roles, tiny_config,
                      tiny_model)
from nanoaki import (ANSWER, IMAGE, PAD, PRESETS, PROMPT, Block, NanoAKI, Projector,
                     Tokenizer, build_sequence, fit_picture, make_mask, pad_batch,
                     place_pictures)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def text(*roles_and_lengths):
    return torch.tensor([[role for role, n in roles_and_lengths for _ in range(n)]])


@pytest.mark.parametrize("bad, named", [
    (dict(n_embd=32, n_head=3), ("n_embd 32", "n_head 3")),
    (dict(vit_embd=32, vit_head=5), ("vit_embd 32", "vit_head 5")),
    (dict(image_size=10), ("image_size 10", "patch_size 4")),
    (dict(image_size=4, patch_size=8), ("image_size 4", "patch_size 8")),
    (dict(image_size=12, merge=2), ("merge 2", "3 patches")),
    (dict(block_size=4), ("block_size 4", "4 visual tokens")),
    (dict(vocab_size=0), ("vocab_size", "0")), (dict(n_layer=-1), ("n_layer", "-1")),
    (dict(n_embd=32.0), ("n_embd", "32.0")), (dict(merge="2"), ("merge", "'2'")),
    (dict(dropout=1.0), ("dropout", "1.0")), (dict(dropout=-0.5), ("dropout", "-0.5")),
    (dict(n_layer=True), ("n_layer", "True")),
    (dict(mask="mna"), ("'mna'", "mma")), (dict(order="first"), ("'first'", "data, image, text")),
])
def test_bad_config_is_a_value_error_that_names_both_values(bad, named):
    with pytest.raises(ValueError) as e:
        tiny_config(**bad)
    assert all(name in str(e.value) for name in named) and "\n" not in str(e.value)


@pytest.mark.parametrize("name, low, high", [("nano", 0.7e6, 0.9e6), ("small", 10e6, 30e6),
                                             ("base", 245e6, 255e6)])
def test_presets_have_the_promised_number_of_parameters(name, low, high):
    with torch.device("meta"):
        model = NanoAKI(PRESETS[name])
    parts = {part: sum(p.numel() for p in getattr(model, part).parameters())
             for part in ("vit", "projector", "decoder")}
    assert low <= sum(parts.values()) <= high
    if name == "base":  # GPT-2 124M with a second matrix for its head, and ViT-B/16 86M
        assert parts["decoder"] == pytest.approx(124.4e6 + 50257 * 768, rel=0.01)
        assert parts["vit"] == pytest.approx(86e6, rel=0.02)


@pytest.mark.parametrize("image_size, merge, count", [(8, 1, 4), (16, 1, 16), (16, 2, 4),
                                                      (24, 3, 4), (16, 4, 1), (24, 2, 9)])
def test_visual_tokens_counts_what_the_projector_makes(image_size, merge, count):
    config = tiny_config(image_size=image_size, merge=merge)
    model = NanoAKI(config)
    images = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    visual = model.projector(model.vit(images))
    assert config.visual_tokens == count and visual.shape == (2, count, 32)


@pytest.mark.parametrize("side, merge", [(2, 1), (4, 2), (6, 2), (6, 3)])
def test_merge_concatenates_exactly_the_neighbouring_patches(side, merge):
    projector = Projector(tiny_config(image_size=4 * side, merge=merge))
    seen = []
    projector.up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, side * side, 32)
    projector(x)
    grid = x.view(2, side, side, 32)
    blocks = [torch.cat([grid[:, r + i, c + j] for i in range(merge) for j in range(merge)], -1)
              for r in range(0, side, merge) for c in range(0, side, merge)]
    assert torch.equal(seen[0], torch.stack(blocks, 1))


@pytest.mark.parametrize("merge", [1, 2])
def test_a_block_of_pixels_reaches_exactly_its_visual_token(merge):
    model = tiny_model(image_size=16, merge=merge)
    full, local = tiny_model(image_size=16, merge=merge).vit, model.vit
    local.blocks = torch.nn.ModuleList()  # without attention a patch stays where it is
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 16, 16), generator=g, dtype=torch.uint8)
    for row in range(4):
        for column in range(4):
            other = image.clone()
            other[..., 4 * row:4 * row + 4, 4 * column:4 * column + 4] += 99
            moved = (model.projector(local(image)) != model.projector(local(other))).any(-1)[0]
            assert moved.nonzero().tolist() == [[row // merge * (4 // merge) + column // merge]]
    assert (model.projector(full(image)) != model.projector(full(other))).any(-1).all()


def test_one_block_class_serves_encoder_and_decoder(model):
    shapes = [{name: p.shape for name, p in block.named_parameters()}
              for block in (*model.vit.blocks, *model.decoder.blocks)]
    assert all(type(b) is Block for b in (*model.vit.blocks, *model.decoder.blocks))
    assert all(shape == shapes[0] for shape in shapes)
    block, x = model.decoder.blocks[0], torch.randn(2, 5, 32, dtype=torch.float64)
    all_open = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    assert torch.allclose(block(x, None), block(x, all_open))
    causal = block(x, all_open.tril())  # only the mask tells them apart
    assert not torch.allclose(block(x, None), causal)


def test_head_is_a_matrix_of_its_own_that_reads_the_states_of_hidden(model):
    head, token = model.decoder.head.weight, model.decoder.token.weight
    assert [p is head or p is token for p in model.parameters() if 300 in p.shape] == [True] * 2
    roles = text((PROMPT, 6))
    _, tokens = fill(roles)
    logits = model(None, tokens, roles)[0]
    assert torch.allclose(logits, model.hidden(None, tokens, roles) @ head.T)
    assert not torch.allclose(logits, model.hidden(None, tokens, roles) @ token.T)
    trained, read = torch.autograd.grad(logits.square().sum(), (head, token))
    assert trained[260:].any(1).all() and not read[260:].any()  # ids that no token has


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_states_from_a_column_on_are_those_of_all_columns(model, start):
    roles = random_roles(20, 5)
    images, tokens = fill(roles)
    x, sees = model.read(images, tokens, roles), make_mask("mma", roles)[:, None]
    whole, rest = model.decoder(x, sees), model.decoder(x, sees, start=start)
    assert torch.allclose(rest, whole[:, start:], atol=1e-12)
    late = model.decoder(x[:, start:], sees[:, :, start:, start:])  # a control that reads less
    assert torch.allclose(late, rest, atol=1e-12) == (start == 0)


def test_the_last_block_computes_no_row_before_the_first_that_predicts():
    model, rows = tiny_model(), []
    roles = text((IMAGE, 4), (PROMPT, 3), (ANSWER, 3)).expand(2, -1)
    images, tokens = fill(roles)
    for block in model.decoder.blocks:
        block.up.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    model.loss(make_batch(images, tokens, roles, torch.where(roles == ANSWER, tokens, -100)))
    assert len(rows) > 1 and rows == [10] * (len(rows) - 1) + [4]
    rows.clear()
    model.generate(images, tokens[:, :7], roles[:, :7], 1)
    assert rows == [7] * (len(rows) - 1) + [1]


def test_each_image_goes_to_its_own_tokens_in_their_order(model):
    roles = torch.cat([text((IMAGE, 4), (PROMPT, 2), (IMAGE, 4)), text((PROMPT, 6), (IMAGE, 4))])
    images, tokens = fill(roles)
    x = model.read(images, tokens, roles)
    position = model.decoder.position.weight
    visual = model.projector(model.vit(images))
    assert torch.equal(model.see(images), visual) and visual.shape == (3, VISUAL, 32)
    for image, (row, start) in enumerate([(0, 0), (0, 6), (1, 6)]):
        there = x[row, start:start + 4] - position[start:start + 4]
        assert torch.allclose(there, visual[image])
        assert not torch.allclose(there, visual[image - 1])
    words = model.decoder.token(tokens) + position[:10]
    assert torch.allclose(x[roles == PROMPT], words[roles == PROMPT])


def loss_batch(dtype=torch.float64):
    roles = random_roles(12, seed=5)
    images, tokens = fill(roles)
    targets = torch.where(roles == ANSWER, tokens, -100)
    targets[::3, -3:] = -100  # not every answer token needs a loss
    return tiny_model(dtype), (images, tokens, roles, targets)


def loss_by_hand(logits, targets, shift=1):
    terms = [-logits[b, t - shift].log_softmax(-1)[targets[b, t]] for b in range(len(targets))
             for t in range(1, targets.shape[1]) if targets[b, t] != -100]
    return sum(terms) / len(terms)


def test_loss_is_the_mean_over_targets_that_are_aligned_not_shifted():
    model, batch = loss_batch()
    logits, loss = model(*batch)
    assert loss.item() == pytest.approx(loss_by_hand(logits, batch[3]).item(), rel=1e-5)
    assert loss.item() != pytest.approx(loss_by_hand(logits, batch[3], shift=0).item(), rel=1e-2)
    assert model(*batch[:3])[1] is None


def shared_pictures():
    """A model, forward's arguments, padded anywhere, with 5 pictures that recur, and the Batch."""
    model, _ = loss_batch()
    roles = random_roles(40, seed=5)
    images, tokens = fill(roles)
    recurring = torch.randint(0, 5, (len(images),), generator=torch.Generator().manual_seed(0))
    targets = torch.where(roles == ANSWER, tokens, -100)
    targets[::3, -3:] = -100
    given = images[recurring], tokens, roles, targets
    batch, count = make_batch(*given), (roles == IMAGE).sum(1)
    assert len(batch.images) == 5 < len(batch.shown) == len(images)
    assert (count == 0).any() and (count == VISUAL).any() and (count > VISUAL).any()
    return model, given, batch


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


@pytest.fixture
def float64_loss(monkeypatch):
    """Losses are float32 whatever the model is: here they keep its type, to be compared closely."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)


@pytest.mark.parametrize("mask", [None, "causal"])
def test_loss_of_a_batch_equals_forwards_loss_and_gradients(mask, float64_loss):
    model, given, batch = shared_pictures()
    logits, loss = model(*given, mask=mask)
    short = model.loss(batch, mask)
    wrong = model.loss(batch._replace(shown=batch.shown.roll(1)), mask)
    assert short.dtype == torch.float64 and (loss - short).abs() < 1e-12
    assert (loss - wrong).abs() > 1e-3 and (loss - model.loss(batch, "prefix")).abs() > 1e-3
    by_hand = loss_by_hand(logits, given[3])
    assert (loss - by_hand).abs() < 1e-12
    for ours, full, hand, others in zip(*(gradients(model, x) for x in
                                          (short, loss, by_hand, wrong)), strict=True):
        assert (ours - full).abs().max() < 1e-12 and (ours - hand).abs().max() < 1e-12
        assert hand.abs().max() > 1e-4  # every parameter takes part
        assert (ours - others).abs().max() > 1e-6


def test_loss_of_a_batch_looks_once_at_each_picture_and_reads_only_what_has_a_target():
    model, given, batch = shared_pictures()
    seen, read = [], []
    model.vit.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model.decoder.head.register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
    model.loss(batch)
    model(*given)
    learned = int((given[3][:, 1:] != -100).sum())
    assert seen == [5, len(given[0])] and read == [(learned, 32), (*given[1].shape, 32)]


def test_loss_of_a_batch_waits_for_no_value():
    model, given, batch = shared_pictures()
    model.to("meta")  # shapes without values: whatever asks for one fails
    given, batch = [x.to("meta") for x in given], batch._replace(
        **{name: x.to("meta") for name, x in batch._asdict().items() if torch.is_tensor(x)})
    model.loss(batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises((RuntimeError, NotImplementedError), match="[Mm]eta"):
        model(*given)


def test_loss_of_a_batch_without_any_picture_gives_the_vit_a_gradient_of_zero(float64_loss):
    model, roles = tiny_model(), text((PAD, 1), (PROMPT, 4), (ANSWER, 3)).expand(2, -1)
    _, tokens = fill(roles)
    targets = torch.where(roles == ANSWER, tokens, -100)
    batch = make_batch(None, tokens, roles, targets)
    assert len(batch.images) == 1 and len(batch.shown) == len(batch.visual) == 0
    loss = model.loss(batch)
    assert (loss - model(None, tokens, roles, targets)[1]).abs() < 1e-12
    other = batch._replace(images=255 - batch.images)
    assert model.loss(other) == loss  # the picture is not shown
    loss.backward()
    for part, moves in ((model.vit, False), (model.projector, False), (model.decoder, True)):
        for p in part.parameters():  # zero, not None: processes agree on which have one
            assert p.grad is not None and bool(p.grad.any()) == moves
    model.loss(shared_pictures()[2]).backward()  # the control
    assert all(p.grad.any() for p in model.vit.parameters())


def test_loss_is_float32_whatever_the_model_computes_in():
    _, given, batch = shared_pictures()
    for model, autocast in ((tiny_model(), False), (tiny_model(torch.float32), True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, loss = model(*given)
            assert logits.dtype == (torch.bfloat16 if autocast else torch.float64)
            short = model.loss(batch)
        assert loss.dtype == short.dtype == torch.float32
        by_hand = loss_by_hand(logits.double(), given[3]).item()
        assert loss.item() == pytest.approx(by_hand, rel=1e-6)
        assert short.item() == pytest.approx(by_hand, rel=1e-2 if autocast else 1e-6)


@pytest.mark.parametrize("role", [PAD, IMAGE, PROMPT])
def test_targets_outside_answer_are_refused(model, role):
    roles = text((IMAGE, 4), (PROMPT, 3), (ANSWER, 2), (PAD, 1))
    images, tokens = fill(roles)
    targets = torch.where(roles == ANSWER, tokens, -100)
    model(images, tokens, roles, targets)
    targets[0, (roles[0] == role).nonzero()[-1]] = 0
    with pytest.raises(ValueError, match="ANSWER"):
        model(images, tokens, roles, targets)


def test_examples_without_picture_stand_beside_those_with_one(model):
    roles = torch.cat([text((PROMPT, 6), (ANSWER, 3)), text((IMAGE, 4), (PROMPT, 2), (ANSWER, 3)),
                       text((PROMPT, 6), (ANSWER, 3))])
    images, tokens = fill(roles)
    logits = model(images, tokens, roles)[0]
    for row, single in enumerate(alone(images, tokens, roles)):
        assert torch.allclose(logits[row], model(*single)[0][0])
    assert not torch.allclose(logits[1], model(255 - images, tokens, roles)[0][1])


def test_a_batch_without_any_picture_works_and_trains(model):
    roles = text((PROMPT, 4), (ANSWER, 3)).expand(2, -1)
    _, tokens = fill(roles)
    none = model(None, tokens, roles)[0]
    assert torch.equal(none, model(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), tokens, roles)[0])
    trained = tiny_model()
    trained(None, tokens, roles, torch.where(roles == ANSWER, tokens, -100))[1].backward()
    assert trained.decoder.token.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [None, 1, 3])
def test_a_wrong_number_of_images_is_refused_with_both_numbers(model, count):
    roles = text((IMAGE, 8), (PROMPT, 2))
    images, tokens = fill(roles)
    model(images, tokens, roles)
    wrong = None if count is None else torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"8 IMAGE.* {count or 0} images"):
        model(wrong, tokens, roles)


def test_a_picture_that_is_cut_between_rows_is_refused(model):
    whole, cut = ([text((IMAGE, n), (PROMPT, 8 - n)) for n in row] for row in ((4, 4), (3, 5)))
    images, tokens = fill(torch.cat(whole))
    model(images, tokens, torch.cat(whole))
    with pytest.raises(ValueError, match="8 IMAGE positions, but 2 images of 4 visual tokens"):
        model(images, tokens, torch.cat(cut))


def test_images_that_are_not_uint8_of_the_models_size_are_refused(model):
    roles = text((IMAGE, 4), (PROMPT, 2))
    images, tokens = fill(roles)
    for wrong, found in ((images / 255, "float32"), (images[..., :4], "(1, 3, 8, 4)"),
                         (model.see(images), "float64 (1, 4, 32)")):
        for call in (model, model.hidden, lambda *args: model.generate(*args, 1)):
            with pytest.raises(ValueError, match=rf"uint8 \(N, 3, 8, 8\).*{re.escape(found)}"):
                call(wrong, tokens, roles)


def test_a_sequence_longer_than_block_size_is_refused_with_both_numbers(model):
    roles = torch.cat([text((PROMPT, 64), (PAD, 9)), text((PAD, 70), (PROMPT, 3))])
    _, tokens = fill(roles)
    assert model(None, tokens, roles)[0].shape == (2, 73, 300)  # padding does not count
    roles[0, 64] = ANSWER
    with pytest.raises(ValueError, match=r"\b65\b.*\b64\b"):
        model(None, tokens, roles)


def test_mask_none_is_the_configs_and_an_unknown_mask_is_refused():
    model, roles = tiny_model(mask="prefix"), text((IMAGE, 4), (PROMPT, 4))
    images, tokens = fill(roles)
    logits = {mask: model(images, tokens, roles, mask=mask)[0] for mask in (None, "prefix", "mma")}
    assert torch.equal(logits[None], logits["prefix"])
    assert not torch.allclose(logits[None], logits["mma"])
    for call in (model, lambda *args, mask: model.generate(*args, 1, mask=mask)):
        with pytest.raises(ValueError, match="mna"):
            call(images, tokens, roles, mask="mna")


PROMPTS = [text((PROMPT, 3)), text((IMAGE, 4), (PROMPT, 7)),
           text((IMAGE, 4), (PROMPT, 2), (IMAGE, 4)), text((IMAGE, 8), (PROMPT, 1)),
           text((PROMPT, 2), (IMAGE, 4), (PROMPT, 3))]


def prompts(where="mixed", length=12):
    rng = random.Random(1)
    sides = ["left", "right", "middle", "any", "left"] if where == "mixed" else [where] * 5
    roles = torch.tensor([padded(r[0].tolist(), length, side, rng)
                          for r, side in zip(PROMPTS, sides)])
    images, tokens = fill(roles)
    return images, tokens, roles


def test_pictures_that_are_shown_again_are_encoded_once_and_answered_alike(model):
    images, tokens, roles = prompts()
    two, seen = images[:2], []
    shown = torch.arange(len(images)) % 2
    given = tokens, roles, 8
    answers = model.generate(two[shown], *given)
    hook = model.vit.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    assert model.generate(two, *given, shown=shown) == answers and seen == [2]
    assert model.generate(two, *given, shown=1 - shown) != answers
    hook.remove()
    with pytest.raises(ValueError, match="IMAGE positions, but 2 images"):
        model.generate(two, *given)
    for wrong in (shown + 1, shown - 1, shown.float()):
        with pytest.raises(ValueError, match="int64 numbers of the 2 images"):
            model.generate(two, *given, shown=wrong)


@pytest.mark.parametrize("mask", ["causal", "mma", "prefix", "image"])
@pytest.mark.parametrize("where", ["left", "right", "mixed"])
def test_generate_of_a_padded_batch_equals_one_by_one(model, where, mask):
    batch = prompts(where)
    rows = model.generate(*batch, 8, mask=mask)
    assert rows == [model.generate(*single, 8, mask=mask)[0] for single in alone(*batch)]
    images, tokens, roles = batch
    assert len({tuple(row) for row in rows}) > 3 and max(len(set(row)) for row in rows) > 3
    assert rows != model.generate(images.flip(0), tokens, roles, 8, mask=mask)
    assert rows != model.generate(images, tokens, roles.where(roles != PAD, PROMPT), 8, mask=mask)


def greedy_without_cache(model, images, tokens, roles, n):
    new = []
    for _ in range(n):
        new.append(model(images, tokens, roles)[0][0, -1].argmax().item())
        tokens = torch.cat([tokens, torch.tensor([new[-1:]])], 1)
        roles = F.pad(roles, (0, 1), value=ANSWER)
    return new


@pytest.mark.parametrize("mask", ["causal", "mma", "prefix", "image"])
def test_generate_equals_greedy_decoding_without_cache_under_the_configs_mask(model, mask):
    masked = tiny_model(mask=mask)
    rows = [masked.generate(*single, 8)[0] for single in alone(*prompts())]
    assert rows == [greedy_without_cache(masked, *single, 8) for single in alone(*prompts())]
    assert (rows == model.generate(*prompts(), 8)) == (mask == "mma")


def schedule_eos(model, monkeypatch, steps):
    """Make row i's <eos> the likeliest at step steps[i] and impossible at any other."""
    head, count = model.decoder.head.forward, iter(range(1000))

    def scheduled(x):
        logits, step = head(x), next(count)
        logits[:, Tokenizer.eos] = torch.tensor([1e9 if step == s else -1e9 for s in steps]).to(x)
        return logits

    monkeypatch.setattr(model.decoder.head, "forward", scheduled)


def test_a_row_stops_at_eos_which_is_not_returned_while_others_go_on(model, monkeypatch):
    with monkeypatch.context() as m:
        schedule_eos(model, m, [None] * 5)
        free = model.generate(*prompts(), 6)
    assert [len(row) for row in free] == [6] * 5
    stops = [0, 2, 5, None, 3]
    with monkeypatch.context() as m:
        schedule_eos(model, m, stops)
        assert model.generate(*prompts(), 6) == [row[:stop] for row, stop in zip(free, stops)]


def test_stream_yields_none_for_a_row_that_has_ended_and_stops_when_all_have(model, monkeypatch):
    schedule_eos(model, monkeypatch, [0, 2, 1, 3, 2])
    steps = list(model.stream(*prompts(), 50))
    ended = [[new is None for new in step] for step in steps]
    assert ended == [[step >= stop for stop in (0, 2, 1, 3, 2)] for step in range(3)]


def test_generate_stops_at_eos_that_the_weights_prefer():
    model = tiny_model()
    with torch.no_grad():
        model.decoder.norm.bias.fill_(9.0)
        model.decoder.head.weight[Tokenizer.eos] = 9.0
    assert model.generate(*prompts(), 6) == [[]] * 5


@pytest.mark.parametrize("most", [0, 1, 5])
def test_generate_makes_at_most_max_new_tokens(model, monkeypatch, most):
    schedule_eos(model, monkeypatch, [None] * 5)
    assert [len(row) for row in model.generate(*prompts(), most)] == [most] * 5


def test_generate_ends_at_each_rows_last_position(model, monkeypatch):
    schedule_eos(model, monkeypatch, [None] * 5)
    rows = model.generate(*prompts(length=30), 1000)
    assert [len(row) for row in rows] == [64 - r.shape[1] for r in PROMPTS]


def test_generate_refuses_a_prompt_that_leaves_no_room(model):
    roles = text((PROMPT, 64))
    _, tokens = fill(roles)
    with pytest.raises(ValueError, match="64 tokens.*64 positions"):
        model.generate(None, tokens, roles, 5)
    assert len(model.generate(None, tokens[:, 1:], roles[:, 1:], 5)[0]) <= 1


def test_temperature_and_top_k_draw_from_the_softmax():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=g)
    torch.manual_seed(0)
    for temperature, top_k in [(1.0, None), (0.5, None), (2.0, 4), (1.0, 100)]:
        kept = logits.topk(min(top_k or 12, 12)).indices
        expected = torch.zeros(12)
        expected[kept] = (logits[kept] / temperature).softmax(0)
        drawn = nanoaki.choose(logits.expand(20000, -1), temperature, top_k)
        counts = drawn.bincount(minlength=12) / 20000
        assert (counts - expected).abs().max() < 0.02 and not counts[expected == 0].any()
    assert (expected - (logits / 3).softmax(0)).abs().max() > 0.04  # another temperature would show


def test_top_k_of_one_is_greedy_and_sampling_repeats_with_the_seed(model):
    def sample(seed, **how):
        torch.manual_seed(seed)
        return model.generate(*prompts(), 8, **how)

    assert sample(0, temperature=3.0, top_k=1) == sample(1)
    assert sample(0, temperature=1.0) == sample(0, temperature=1.0) != sample(1, temperature=1.0)


@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_the_mode_as_it_was_even_if_it_raises(training):
    model, too_long = tiny_model().train(training), text((PROMPT, 64))
    model.generate(*prompts(), 2)
    assert all(module.training is training for module in model.modules())
    with pytest.raises(ValueError):
        model.generate(None, torch.zeros_like(too_long), too_long, 2)
    assert all(module.training is training for module in model.modules())


def test_generate_drops_nothing_in_train_mode():
    model = tiny_model(dropout=0.5)
    calm = model.generate(*prompts(), 8)
    model.train()
    assert not torch.equal(model(*prompts())[0], model(*prompts())[0])  # dropout is on
    assert model.generate(*prompts(), 8) == model.generate(*prompts(), 8) == calm


QUESTIONS = ["what?", "what color is the circle?", "is it left of <image>?"]


@pytest.fixture(scope="module")
def speaker():
    return tiny_model(tokenizer=Tokenizer.train(QUESTIONS * 9, 300), block_size=48)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
            for h, w in ((8, 8), (30, 11), (7, 20))]


def test_ask_gives_one_answer_for_one_question_and_a_list_for_a_list(speaker, pictures):
    a, b, _ = pictures
    one = speaker.ask(a, "what?")
    assert isinstance(one, str) and speaker.ask([a], "what?") == one
    assert speaker.ask([a], ["what?"]) == speaker.ask(a, ["what?"]) == [one]
    assert speaker.ask([[a]], ["what?"]) == [one]
    two = speaker.ask([a, b], "what?")  # one question about two pictures
    assert speaker.ask([[a, b]], ["what?"]) == [two]
    blind = speaker.ask(None, "what?")
    assert speaker.ask([], "what?") == blind
    assert speaker.ask(None, ["what?"]) == speaker.ask([None], ["what?"]) == [blind]
    swapped = speaker.ask([b, a], "what?")
    assert len({one, two, swapped, blind, speaker.ask(b, "what?")}) == 5


def test_ask_answers_a_batch_as_one_by_one(speaker, pictures):
    a, b, c = pictures
    images = [a, [b, c], None, [c], [], b, [a, a]]
    questions = [q.replace("<image>", "it") for q in QUESTIONS * 2 + QUESTIONS[:1]]
    answers = speaker.ask(images, questions)
    assert answers == [speaker.ask(i, q) for i, q in zip(images, questions)]
    assert answers != speaker.ask(images[::-1], questions) and len(set(answers)) > 5
    assert speaker.ask(a, questions) == [speaker.ask(a, q) for q in questions]
    assert speaker.ask(None, questions) == [speaker.ask(None, q) for q in questions]


def test_ask_puts_the_picture_where_image_is_written(speaker, pictures):
    written = speaker.ask(pictures[0], "is it left of <image>?")
    assert written != speaker.ask(pictures[0], "is it left of ?")
    assert speaker.ask(pictures[0], "<image>\nwhat?") == speaker.ask(pictures[0], "what?")
    with pytest.raises(ValueError, match="1 <image>.*2 pictures"):
        speaker.ask(pictures[:2], "is it left of <image>?")


def test_ask_takes_a_path_like_the_picture_in_it(speaker, pictures, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for picture, path in zip(pictures, paths):
        picture.save(path)
    (a, b, _), (A, B, _) = pictures, paths
    one = speaker.ask(a, "what?")
    for path in (A, str(A), [A], [str(A)]):
        assert speaker.ask(path, "what?") == one != speaker.ask(B, "what?")
    for path in (A, str(A)):  # one for all questions
        assert speaker.ask(path, ["what?", "is it?"]) == speaker.ask(a, ["what?", "is it?"])
    mixed = speaker.ask([A, [a, str(B)], None, b], ["what?"] * 4)
    assert mixed == speaker.ask([a, [a, b], None, B], ["what?"] * 4) and len(set(mixed)) == 4
    assert all((x == y).all() for x, y in zip(speaker.prompt([[A, str(B)]], ["what?"]),
                                              speaker.prompt([[a, b]], ["what?"]), strict=True))


def test_ask_refuses_a_path_without_a_picture_by_its_name(speaker, tmp_path):
    text_file, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text_file.write_text("not a picture")
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:-1000])
    for path in (tmp_path / "missing.png", tmp_path, text_file, cut):
        for call in (lambda path: fit_picture(path, 8), lambda path: speaker.ask(str(path), "what?")):
            with pytest.raises(ValueError) as e:
                call(path)
            assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("wrong, words", [
    (np.zeros((8, 8), np.uint8), "ndarray uint8 (8, 8)"),
    (np.zeros((8, 8, 3), np.float32), "ndarray float32 (8, 8, 3)"),
    (np.zeros((2, 8, 8, 3), np.uint8), "(2, 8, 8, 3)"), (np.zeros((0, 8, 3), np.uint8), "(0, 8, 3)"),
    (np.zeros((8, 8, 3, 1), np.uint8), "(8, 8, 3, 1)"), (np.uint8(3), "uint8 ()"),
    (torch.zeros(8, 8, 3, dtype=torch.uint8), "Tensor"), (7, "int"), (b"png", "bytes"),
    ({"path": "a.png"}, "dict"), (Image.new("RGB", (0, 4)), "empty")])
def test_what_is_no_picture_is_refused_in_one_line_and_an_array_is_one(speaker, wrong, words):
    for call in (lambda p: fit_picture(p, 8), lambda p: speaker.ask(p, "what?"),
                 lambda p: speaker.ask([[p]], ["what?"])):
        with pytest.raises(ValueError) as e:
            call(wrong)
        assert words in str(e.value) and "\n" not in str(e.value)
    square = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(square)
    for question in ("what?", ["what?", "is it?"]):
        assert speaker.ask(square, question) == speaker.ask(image, question)
    assert speaker.ask([square, [square, image]], ["what?"] * 2) == speaker.ask(
        [image, [image, square]], ["what?"] * 2)
    assert speaker.ask(square, "what?") != speaker.ask(255 - square, "what?")


HISTORY = [("what color is <image>?", "red"), ("and?", "<image>")]


def prompt_by_hand(model, picture, turns):
    placed = place_pictures(turns, 1, model.config.order)
    row = build_sequence(model.tokenizer, model.config, placed)
    return fit_picture(picture, model.config.image_size)[None], *pad_batch([row])[:2]


@pytest.mark.parametrize("history", [(), HISTORY, HISTORY[1:]])
@pytest.mark.parametrize("system", ["", "in a word"])
def test_ask_takes_a_history_and_system_text(pictures, history, system):
    model = tiny_model(tokenizer=Tokenizer.train(QUESTIONS * 9, 300), block_size=100)
    turns = [("system", system)] * bool(system)
    for question, answer in history:
        turns += [("human", question), ("gpt", answer)]
    by_hand = [prompt_by_hand(model, pictures[0], [*turns, ("human", q)]) for q in QUESTIONS[:2]]
    made = model.prompt(pictures[:1], QUESTIONS[:1], history, system)
    assert all(torch.equal(x, y) for x, y in zip(made, by_hand[0], strict=True))
    assert made[2].max() == PROMPT  # answers in a history are given
    answers = [model.tokenizer.decode(model.generate(*prompt, 9)[0]) for prompt in by_hand]
    asked = model.ask(pictures[0], QUESTIONS[:2], 9, history, system)
    assert asked == answers and model.ask(pictures[0], QUESTIONS[0], 9, history, system) == asked[0]
    without = model.ask(pictures[0], QUESTIONS[:2], 9)
    assert (asked == without) == (not history and not system)


@pytest.mark.parametrize("question", ["what?", "<image>\nwhat?", "what?\n<image>"])
def test_ask_builds_the_prompt_in_the_models_order(pictures, question):
    tokenizer, answers = Tokenizer([]), {}
    V, text = [tokenizer.image] * VISUAL, list(b"what?")
    for order in ("data", "image", "text"):
        model = tiny_model(tokenizer=tokenizer, order=order)
        text_first = {"data": question.endswith("<image>"), "image": False, "text": True}[order]
        expected = (text + V if text_first else V + text) + [tokenizer.answer]
        images, tokens, roles = model.prompt(pictures[:1], [question])
        assert tokens.tolist() == [expected]
        assert roles.tolist() == [[IMAGE if t == tokenizer.image else PROMPT for t in expected]]
        ids = model.generate(images, torch.tensor([expected]), roles, 9)[0]
        answers[order] = model.ask(pictures[0], question, 9)
        assert answers[order] == tokenizer.decode(ids)
    assert answers["image"] != answers["text"]
    assert answers["data"] == answers["text" if question.endswith("<image>") else "image"]


def test_ask_passes_limits_sampling_and_mask_on(speaker, pictures):
    everything = speaker.ask(pictures[0], "what?")
    first = speaker.ask(pictures[0], "what?", max_new_tokens=2)
    assert len(first) < len(everything) and speaker.ask(None, "what?", max_new_tokens=0) == ""
    assert speaker.ask(pictures[0], "what?", mask="causal") != everything
    assert speaker.ask(pictures[0], "what?", temperature=2.0, top_k=1) == everything
    assert speaker.ask(pictures[0], "what?", temperature=2.0) != everything


def test_ask_refuses_what_does_not_fit(model, speaker, pictures):
    with pytest.raises(ValueError, match="tokenizer"):
        model.ask(None, "what?")
    with pytest.raises(ValueError, match="2 .*3 questions"):
        speaker.ask(pictures[:2], QUESTIONS)
    with pytest.raises(ValueError, match=r"\b48\b"):
        speaker.ask(None, "0123456789" * 5)


def test_model_refuses_a_tokenizer_with_more_tokens_than_its_vocabulary():
    tokenizer = Tokenizer.train(["ab ab ab abc abc"], 262)
    NanoAKI(tiny_config(vocab_size=262), tokenizer)
    with pytest.raises(ValueError, match="262.*261"):
        NanoAKI(tiny_config(vocab_size=261), tokenizer)


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(torch.float32, Tokenizer.train(QUESTIONS, 280), mask="prefix", dropout=0.1)
    model.save(tmp_path / "model.pt")
    return model, tmp_path / "model.pt"


def test_a_saved_model_returns_bit_for_bit_with_config_and_tokenizer(saved):
    model, path = saved
    loaded = NanoAKI.load(path)
    assert not loaded.training and loaded.config == model.config
    assert loaded.tokenizer.merges == model.tokenizer.merges and len(loaded.tokenizer) > 260
    assert loaded.tokenizer.encode(QUESTIONS[1]) == model.tokenizer.encode(QUESTIONS[1])
    assert torch.equal(loaded(*prompts())[0], model(*prompts())[0])
    assert not torch.equal(NanoAKI(model.config).eval()(*prompts())[0], model(*prompts())[0])


def test_a_model_without_tokenizer_is_saved_and_loaded_by_string_path(tmp_path):
    model, path = tiny_model(torch.float32), str(tmp_path / "model.pt")
    model.save(path)
    loaded = NanoAKI.load(path)
    assert loaded.tokenizer is None and torch.equal(loaded(*prompts())[0], model(*prompts())[0])


def change(**changes):
    def write(path):
        state = torch.load(path, weights_only=True)
        state["config"] |= changes.get("config", {})
        torch.save(state | {k: v for k, v in changes.items() if k != "config"}, path)
    return write


@pytest.mark.parametrize("spoil", [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(bytes(range(256)) * 40),
    lambda path: path.write_text("{}\n"),
    lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    lambda path: path.write_bytes(path.read_bytes()[:1000]),
    lambda path: torch.save([1, 2], path),
    lambda path: torch.save({"model": {}}, path),
    lambda path: torch.save(torch.nn.Linear(2, 2), path),
    lambda path: (path.unlink(), path.mkdir()),
    change(config=dict(vocab_size=299)),
    change(config=dict(vocab_size=261)),
    change(config=dict(n_head=3)),
    change(config=dict(n_heads=2)),
    change(merges=[[97, 98]] * 100),
    change(model={}),
    change(nanoaki=nanoaki.VERSION + 1),
    change(nanoaki=nanoaki.VERSION - 1),
    change(nanoaki=torch.zeros(2)),
], ids=["missing", "empty", "garbage", "text", "no end", "no middle", "a list", "a foreign dict",
        "a pickled module", "a folder", "weights of another vocabulary",
        "vocabulary under tokenizer", "bad config", "unknown field", "too many merges",
        "no weights", "a newer version", "an older version", "no version"])
def test_load_names_the_file_in_one_line_whatever_it_holds(saved, spoil):
    _, path = saved
    spoil(path)
    with pytest.raises(ValueError) as e:
        NanoAKI.load(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("stop", [OSError("disk full"), KeyboardInterrupt()])
def test_save_writes_whole_or_not_at_all(saved, monkeypatch, stop):
    model, path = saved
    before = path.read_bytes()

    def half(state, file, *args, **kwargs):
        file.write(b"half of a checkpoint")
        raise stop

    with monkeypatch.context() as m:
        m.setattr(torch, "save", half)
        with pytest.raises(type(stop)):
            model.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["model.pt"]
    with torch.no_grad():
        model.decoder.token.weight += 1
    model.save(path)  # the control: without the failure the file is another, and alone
    assert path.read_bytes() != before and [p.name for p in path.parent.iterdir()] == ["model.pt"]


def test_the_file_runs_alone_and_shows_both_masks_and_what_they_let_through(tmp_path):
    shutil.copy(nanoaki.__file__, tmp_path / "nanoaki.py")  # imports nothing of ours
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "nanoaki.py"], cwd=tmp_path, text=True, env=env,
                         capture_output=True)
    assert run.returncode == 0 and run.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["nanoaki.py"]  # it leaves nothing
    drawn = {}
    for name, rows in re.findall(r"^(\w+): rows see columns.*\n((?:  [IPA](?: [x.])+\n)+)",
                                 run.stdout, re.MULTILINE):
        letters, *columns = zip(*(row.split() for row in rows.splitlines()))
        roles = torch.tensor([[" IPA".index(letter) for letter in letters]])
        assert {IMAGE, PROMPT, ANSWER} == set(roles[0].tolist())
        seen = torch.tensor([[cell == "x" for cell in column] for column in columns]).T
        assert torch.equal(seen, make_mask(name, roles)[0])
        drawn[name] = seen
    assert list(drawn) == ["causal", "mma"]
    assert not drawn["causal"].triu(1).any() and drawn["mma"].triu(1).any()
    number = r"([\d.]+(?:e-?\d+)?)"
    moved = [float(re.search(rf"under {name}\b.* by {number}\b", run.stdout)[1])
             for name in ("causal", "mma")]
    assert moved[0] == 0 and moved[1] > 0.01
