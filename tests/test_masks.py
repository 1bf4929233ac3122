"""Masks: the table and the five properties of the design, on random layouts."""
import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import nanoaki
from conftest import LENGTH, SAFE, WHERE, alone, fill, make_batch, random_roles, tiny_model
from engine.device import Objective
from nanoaki import (ANSWER, IMAGE, MASKS, PAD, PROMPT, Cache, Token, attend, make_block_mask,
                     make_mask, positions)

PRECISE = [(torch.float64, 1e-10), (torch.float32, 1e-4)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def roles():
    return random_roles()


def may_see(name: str, row: list[int], q: int, k: int) -> bool:
    """The design's table, one pair at a time."""
    given = (IMAGE, PROMPT)
    if PAD in (row[q], row[k]):
        return q == k
    if k <= q or name == "causal":
        return k <= q
    if name == "mma":
        return row[q] == IMAGE and row[k] == PROMPT
    if name == "prefix":
        return row[q] in given and row[k] in given
    if name == "image":  # padding does not break a run: it must not change what is seen
        return all(role in (IMAGE, PAD) for role in row[q:k + 1])
    return row[q] == IMAGE and row[k] in (PROMPT, ANSWER)


@pytest.mark.parametrize("name", MASKS)
def test_mask_equals_its_definition_pair_by_pair(name, roles):
    naive = [[[may_see(name, row, q, k) for k in range(LENGTH)] for q in range(LENGTH)]
             for row in roles.tolist()]
    mask = make_mask(name, roles)
    assert mask.dtype == torch.bool and torch.equal(mask, torch.tensor(naive))
    others = [torch.equal(mask, make_mask(other, roles)) for other in MASKS if other != name]
    assert not any(others), "the layouts must tell the masks apart"


def seen_by_rule(name, place_q, place_k, role, run):
    """The rule on two single positions, closed to PAD and open to itself as make_mask does it."""
    q, k = (Token(place, role[place], run[place]) for place in (place_q, place_k))
    return MASKS[name](q, k) & (q.role != PAD) & (k.role != PAD) | (q.place == k.place)


@pytest.mark.parametrize("kind, rows", [("numbers", 60), ("tensors", 2)])
def test_rule_of_two_single_positions_equals_the_mask(roles, kind, rows):
    places, told_apart = range(LENGTH), set()
    for row in roles[:rows]:
        role, dense = row.tolist(), {name: make_mask(name, row[None])[0] for name in MASKS}
        run = [sum(r in (PROMPT, ANSWER) for r in role[:place]) for place in places]
        if kind == "tensors":
            places, role, run = torch.arange(LENGTH), row, torch.tensor(run)
        for name in MASKS:
            seen = torch.tensor([[bool(seen_by_rule(name, q, k, role, run)) for k in places]
                                 for q in places])
            assert torch.equal(seen, dense[name])
            told_apart |= {(name, other) for other in MASKS if not torch.equal(seen, dense[other])}
    assert len(told_apart) == len(MASKS) * (len(MASKS) - 1)  # each from each other, on these rows


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("stretch", [1, 12])  # within a block of 128 tokens, and over several
@pytest.mark.parametrize("name", MASKS)
def test_block_mask_of_flex_attention_has_the_same_rules(roles, name, stretch):
    roles = roles[((roles == IMAGE).sum(1) >= 4) & (roles == PROMPT).any(1)][:4]
    roles, g = roles.repeat_interleave(stretch, 1), torch.Generator().manual_seed(0)
    q, k, v = 2 * torch.rand(3, 4, 2, stretch * LENGTH, 16, generator=g) - 1
    found = attend(q, k, v, make_block_mask(name, roles), 0.0)
    for other in MASKS:
        dense = attend(q, k, v, make_mask(other, roles)[:, None], 0.0)
        difference = (found - dense).abs().max()
        assert difference < 5e-7 if other == name else difference > 1e-2


def batch_to_learn():
    roles = random_roles()
    roles = roles[((roles == IMAGE).sum(1) >= 4) & (roles[:, 0] != ANSWER)]
    return make_batch(*fill(roles), roles, torch.where(roles == ANSWER, fill(roles)[1], -100))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", MASKS)
def test_loss_by_flex_attention_is_the_dense_loss(name):
    model, batch = tiny_model(), batch_to_learn()
    with torch.no_grad():
        losses = {other: model.loss(batch, other).item() for other in MASKS}
        model.flex = True
        found = model.loss(batch, name).item()
    for other, loss in losses.items():
        assert abs(found - loss) < 1e-5 if other == name else abs(found - loss) > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention learns on CUDA GPUs alone")
@pytest.mark.parametrize("dtype, near", [("float32", 1e-3), ("bfloat16", 0.2)])
def test_gradients_by_flex_attention_are_those_of_the_dense_mask(dtype, near):
    device, batch, gradients = torch.device("cuda"), batch_to_learn(), {}
    model = tiny_model(torch.float32, n_embd=64).to(device)
    for name in MASKS:
        for kind, by in (("exact", "float32"), ("flex", dtype)):
            model.zero_grad()
            model.flex = kind == "flex"
            Objective(model, device, by)(batch, name).backward()
            gradients[name, kind] = torch.cat([p.grad.flatten() for p in model.parameters()])
    for name in MASKS:
        for other in MASKS:
            exact = gradients[other, "exact"]
            apart = (gradients[name, "flex"] - exact).norm() / exact.norm()
            assert apart < near if other == name else apart > 2 * near, (name, other, apart)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_dropout_under_a_block_mask_is_refused_and_not_left_out(roles):
    q = torch.zeros(2, 2, LENGTH, 16)
    assert attend(q, q, q, make_mask("mma", roles[:2])[:, None], 0.5).shape == q.shape
    for p in (0.0, 0.5):
        with pytest.raises(ValueError, match="no dropout") if p else nullcontext():
            attend(q, q, q, make_block_mask("mma", roles[:2]), p)


def test_random_layouts_hold_every_case(roles):
    rows = ["".join("_IPA"[r] for r in row) for row in roles.tolist()]
    for case in ("P.*I", "I_*P.*I", "^[_PA]*$", "^_.*I", "_$", "I_+P", "I_+I", "A_*$"):
        assert sum(bool(re.search(case, row)) for row in rows) >= 10, case


def test_without_prompt_mma_is_causal_bit_for_bit(roles):
    for stand_in in (PAD, ANSWER):  # taken out, or text that is not given
        bare = torch.where(roles == PROMPT, stand_in, roles)
        assert torch.equal(make_mask("mma", bare), make_mask("causal", bare))
    with_prompt = [make_mask(name, roles) for name in ("mma", "causal")]  # the control
    assert not torch.equal(*with_prompt)


def test_causal_within_mma_within_prefix_and_no_row_is_empty(roles):
    causal, mma, prefix = (make_mask(name, roles) for name in ("causal", "mma", "prefix"))
    assert not (causal & ~mma).any() and not (mma & ~prefix).any()
    assert (mma & ~causal).any() and (prefix & ~mma).any()
    for name in MASKS:
        assert make_mask(name, roles).any(-1).all()


def test_padding_sees_only_itself_and_nobody_sees_it(roles):
    pad, eye = roles == PAD, torch.eye(LENGTH, dtype=torch.bool).expand(len(roles), -1, -1)
    for name in MASKS:
        seen = make_mask(name, roles)
        assert torch.equal(seen[pad], eye[pad])                                       # rows
        assert torch.equal(seen.transpose(1, 2)[pad], eye[pad])                       # columns


def test_mma_equals_the_papers_formula():
    for V in (1, 2, 3, 5, 9):
        for TQ in (1, 2, 4, 7):
            for TA in (0, 1, 3, 6):
                n = V + TQ + TA
                M = torch.full((n, n), float("-inf"))
                for i in range(1, n + 1):
                    for j in range(1, n + 1):
                        if j <= i or (1 <= i <= V and V + 1 <= j <= V + TQ):
                            M[i - 1, j - 1] = 0
                row = torch.tensor([[IMAGE] * V + [PROMPT] * TQ + [ANSWER] * TA])
                assert torch.equal(make_mask("mma", row)[0], M == 0)
                assert not torch.equal(make_mask("causal", row)[0], M == 0)


def test_mask_drawn_in_the_docstring_is_the_mask():
    doc = nanoaki.mma.__doc__
    cells = r"((?:\S ){6}\S)"
    keys = re.search(r"keys +" + cells, doc)[1].split()
    queries, drawn = zip(*re.findall(r"query (\w) +" + cells, doc))
    assert keys == list(queries) and len(keys) == 7
    row = torch.tensor([[" IPA".index(key) for key in keys]])
    causal, mma = make_mask("causal", row)[0], make_mask("mma", row)[0]
    symbols = [["x" if c else "o" if m else "." for c, m in zip(*both)]
               for both in zip(causal.tolist(), mma.tolist())]
    assert [line.split() for line in drawn] == symbols


@pytest.mark.parametrize("V, TQ, TA", [(1, 1, 1), (3, 2, 2), (9, 5, 4), (36, 12, 7), (4, 1, 0)])
def test_mma_is_two_causal_attentions(V, TQ, TA):
    def lower_right(queries, keys):
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    torch.manual_seed(V)
    q, k, v = torch.randn(3, 2, 4, V + TQ + TA, 8).unbind()
    row = torch.tensor([[IMAGE] * V + [PROMPT] * TQ + [ANSWER] * TA])
    one = F.scaled_dot_product_attention(q, k, v, make_mask("mma", row)[:, None])
    order = [*range(V, V + TQ), *range(V)]                                            # [T_Q ; V]
    visual = F.scaled_dot_product_attention(q[:, :, :V], k[:, :, order], v[:, :, order],
                                            lower_right(V, V + TQ))
    text = F.scaled_dot_product_attention(q[:, :, V:], k, v, lower_right(TQ + TA, V + TQ + TA))
    assert (one - torch.cat([visual, text], 2)).abs().max() < 1e-5
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (one - causal).abs().max() > 1e-2


def change_one(roles, tokens, allowed, last=False):
    """Tokens with one of the allowed columns of each row changed, and the columns, (B, 1)."""
    g = torch.Generator().manual_seed(3)
    weight = torch.rand(roles.shape, generator=g) + (torch.arange(LENGTH) if last else 0)
    column = weight.masked_fill(~allowed, -1).argmax(1, keepdim=True)
    return tokens.scatter(1, column, (tokens.gather(1, column) + 7) % 256), column


def movement(model, images, before, after, roles, mask):
    """By how much hidden states and logits move when tokens change, (B, T) each."""
    with torch.no_grad():
        a, b = (model.hidden(images, tokens, roles, mask) for tokens in (before, after))
        head = model.decoder.head
        return (a - b).abs().amax(-1), (head(a) - head(b)).abs().amax(-1)


def answer_moves(model, roles, mask):
    """Movement of given states, logits before the change and logits from it on, (B,) each."""
    images, tokens = fill(roles)
    changed, column = change_one(roles, tokens, roles == ANSWER)
    hidden, logits = movement(model, images, tokens, changed, roles, mask)
    given, early = (roles == IMAGE) | (roles == PROMPT), torch.arange(LENGTH) < column
    return [(x * where).amax(1) for x, where in
            ((hidden, given), (logits, early), (logits, ~early & (roles != PAD)))]


@pytest.mark.parametrize("mask", SAFE)
def test_answer_tokens_never_reach_what_is_given_or_earlier_logits(model, roles, mask):
    given, early, later = answer_moves(model, roles, mask)
    assert given.max() < 1e-12 and early.max() < 1e-12
    assert later.min() > 1e-3  # the change is one that is seen where it may be


def test_answer_tokens_do_reach_them_under_leaky(model, roles):
    given, early, _ = answer_moves(model, roles, "leaky")
    pictured = (roles == IMAGE).any(1)
    assert given[pictured].min() > 1e-6 and early[pictured].min() > 1e-6
    assert given[~pictured].max() < 1e-12


@pytest.mark.parametrize("mask, moves", [("causal", False), ("image", False), ("mma", True),
                                         ("prefix", True)])
def test_prompt_reaches_the_image_before_it_only_if_the_mask_is_mutual(model, roles, mask, moves):
    order = torch.arange(LENGTH)
    first = torch.where(roles == IMAGE, order, LENGTH).amin(1, keepdim=True)
    roles = roles[((roles == PROMPT) & (order > first)).any(1)]
    images, tokens = fill(roles)
    changed, column = change_one(roles, tokens, roles == PROMPT, last=True)
    hidden, _ = movement(model, images, tokens, changed, roles, mask)
    before = hidden[(roles == IMAGE) & (order < column)]
    assert len(roles) > 100 and (before.min() > 1e-6 if moves else before.max() < 1e-12)


@pytest.mark.parametrize("mask, moves", [("causal", False), ("mma", True)])
def test_prompt_reaches_earlier_prompt_in_two_hops_so_a_loss_there_would_leak(model, mask, moves):
    roles = torch.tensor([[IMAGE] * 4 + [PROMPT] * 5])
    images, tokens = fill(roles)
    changed = tokens.clone()
    changed[0, -1] += 1
    _, logits = movement(model, images, tokens, changed, roles, mask)
    assert logits[0, 4:-1].min() > 1e-6 if moves else logits[0, :-1].max() == 0


@pytest.mark.parametrize("dtype, tolerance", PRECISE)
@pytest.mark.parametrize("mask", MASKS)
def test_padding_anywhere_changes_no_logit(mask, dtype, tolerance):
    model = tiny_model(dtype)
    for where in WHERE:
        roles = random_roles(60, seed=WHERE.index(where), where=where)
        images, tokens = fill(roles)
        with torch.no_grad():
            batch = model(images, tokens, roles, mask=mask)[0][roles != PAD]
            rows = alone(images, tokens, roles)
            single = torch.cat([model(*row, mask=mask)[0][0] for row in rows])
            control = model(images, tokens, roles.where(roles != PAD, PROMPT), mask=mask)[0]
        assert (batch - single).abs().max() < tolerance
        if where != "right":  # unmasked padding would show; on the right only to a mutual mask
            assert (control[roles != PAD] - single).abs().max() > 0.1


def test_position_is_the_number_of_tokens_before_that_are_not_padding(roles):
    for row, found in zip(roles.tolist(), positions(roles).tolist()):
        for t, role in enumerate(row):
            assert role == PAD or found[t] == sum(r != PAD for r in row[:t])


def split(n: int, seed: int):
    """Given parts padded anywhere to one length, then five columns of answer or padding."""
    given = random_roles(n, seed, marker=True, answers=(0, 0))
    kept = torch.arange(5) < 1 + torch.arange(n)[:, None] % 5
    return given, torch.cat([given, torch.where(kept, ANSWER, PAD)], 1)


def cached_and_plain(model, given, roles, name):
    images, tokens = fill(roles)
    T, start = roles.shape[1], given.shape[1]
    x, mask = model.read(images, tokens, roles), make_mask(name, roles)[:, None]
    caches = [Cache(T) for _ in model.decoder.blocks]
    states = [model.decoder(x[:, :start], mask[:, :, :start, :start], caches)]
    for t in range(start, T):
        states.append(model.decoder(x[:, t:t + 1], mask[:, :, t:t + 1, :t + 1], caches))
    real = roles != PAD
    cached = model.decoder.head(torch.cat(states, 1))
    return cached[real], model(images, tokens, roles, mask=name)[0][real]


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", PRECISE)
@pytest.mark.parametrize("mask", SAFE)
def test_prefill_and_steps_with_the_cache_equal_the_plain_forward(mask, dtype, tolerance):
    cached, plain = cached_and_plain(tiny_model(dtype), *split(200, 11), mask)
    assert (cached - plain).abs().max() < tolerance


@torch.no_grad()
def test_cache_would_not_equal_the_plain_forward_if_the_given_saw_the_answer(model):
    cached, plain = cached_and_plain(model, *split(200, 11), "leaky")
    assert (cached - plain).abs().max() > 0.1


@pytest.mark.parametrize("mask, equal", [*((name, True) for name in SAFE), ("leaky", False)])
def test_stream_reads_the_logits_of_the_plain_forward(mask, equal, monkeypatch):
    model = tiny_model()
    given = random_roles(100, 12, marker=True, answers=(0, 0))
    roles = torch.cat([given, torch.full((100, 5), ANSWER)], 1)
    images, tokens = fill(roles)
    read, forced = [], iter(tokens[:, LENGTH:].T)
    model.decoder.head.register_forward_hook(lambda head, states, logits: read.append(logits))
    monkeypatch.setattr(nanoaki, "choose", lambda *_: next(forced))
    steps = list(model.stream(images, tokens[:, :LENGTH], given, 5, mask=mask))
    assert steps == tokens[:, LENGTH:].T.tolist()
    logits = torch.stack(read, 1)                                                     # (B, 5, V)
    with torch.no_grad():
        plain = model(images, tokens, roles, mask=mask)[0]
    last = (torch.arange(LENGTH) * (given != PAD)).argmax(1)
    plain = torch.cat([plain[torch.arange(100), last][:, None], plain[:, LENGTH:-1]], 1)
    difference = (logits - plain).abs().max()
    assert difference < 1e-10 if equal else difference > 0.1


@torch.no_grad()
@pytest.mark.parametrize("dtype, autocast, stored", [
    (torch.float64, False, torch.float64), (torch.float32, False, torch.float32),
    (torch.float32, True, torch.bfloat16)])
def test_cache_holds_what_attention_computes_in_memory_taken_once(dtype, autocast, stored,
                                                                  monkeypatch):
    extended, extend = {}, Cache.extend

    def spy(cache, k, v):
        both = extend(cache, k, v)
        before = extended.setdefault(cache, [])
        before.append(torch.stack([k, v]))
        assert torch.equal(both, torch.cat(before, 3)) and both.dtype == k.dtype == stored
        assert cache.store.dtype == stored and cache.store.shape[3] == cache.positions == 6 + 4
        assert both.data_ptr() == cache.store.data_ptr() and cache.filled == both.shape[3]
        memory.add(cache.store.data_ptr())
        return both

    memory, model = set(), tiny_model(dtype)
    monkeypatch.setattr(Cache, "extend", spy)
    monkeypatch.setattr(nanoaki, "choose", lambda *_: torch.zeros(2, dtype=torch.long))  # no <eos>
    roles = torch.tensor([[PAD, PROMPT] + [IMAGE] * 4, [PROMPT] * 6])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.generate(*fill(roles), roles, 4)
    assert [[x.shape[3] for x in parts] for parts in extended.values()] == [[6, 1, 1, 1]] * 2
    assert len(memory) == 2  # one a block


def spy_on_attention(monkeypatch):
    calls, attend = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        calls.append((attn_mask, is_causal))
        return attend(q, k, v, attn_mask, dropout_p, is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def spy_on_masks(monkeypatch):
    built = []
    for name, rule in list(MASKS.items()):
        monkeypatch.setitem(MASKS, name, lambda q, k, n=name, r=rule: built.append(n) or r(q, k))
    return built


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_mask_is_built_once_per_batch_and_shared_by_layers_and_heads(model, monkeypatch, name, pad):
    roles = torch.tensor([[IMAGE] * 4 + [PROMPT, ANSWER], [PROMPT] * 5 + [PAD if pad else ANSWER]])
    images, tokens = fill(roles)
    batch = make_batch(images, tokens, roles, torch.where(roles == ANSWER, tokens, -100))
    mask = make_mask(name, roles)[:, None]
    calls, built = spy_on_attention(monkeypatch), spy_on_masks(monkeypatch)
    for start, call in [(0, lambda: model(images, tokens, roles, mask=name)),
                        (batch.start, lambda: model.loss(batch, name))]:
        call()
        *vit, (first, *_), (second, *_) = calls
        assert vit == [(None, False)] * 2 and built == [name]
        assert torch.equal(first, mask) and torch.equal(second, mask[:, :, start:])
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        assert not any(is_causal for _, is_causal in calls)
        calls.clear(), built.clear()


@pytest.mark.parametrize("name", MASKS)
def test_mask_is_built_once_per_generate_and_shared_by_layers_and_steps(model, monkeypatch, name):
    roles = torch.tensor([[IMAGE] * 4 + [PROMPT] * 2, [PROMPT] * 5 + [PAD]])
    images, tokens = fill(roles)
    mask = make_mask(name, F.pad(roles, (0, 4), value=ANSWER))[:, None]
    calls, built = spy_on_attention(monkeypatch), spy_on_masks(monkeypatch)
    monkeypatch.setattr(nanoaki, "choose", lambda *_: torch.zeros(2, dtype=torch.long))
    assert model.generate(images, tokens, roles, 4, mask=name) == [[0] * 4] * 2
    rows = [slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 9)]  # prefill, then a row a step
    assert built == [name] and calls[:2] == [(None, False)] * 2 and len(calls) == 2 + 2 * len(rows)
    for step, row in enumerate(rows):
        first, second = calls[2 + 2 * step:4 + 2 * step]
        last = slice(4, 6) if step == 0 else row  # of the prefill, rows from which one goes on
        assert torch.equal(first[0], mask[:, :, row, :row.stop])
        assert torch.equal(second[0], mask[:, :, last, :row.stop])
        assert (first[1], second[1]) == (False, False)
    assert len({m.untyped_storage().data_ptr() for m, _ in calls[2:]}) == 1
