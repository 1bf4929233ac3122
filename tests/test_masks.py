"""Masks: the table and the five properties of the design, on random layouts."""
import re

import pytest
import torch
import torch.nn.functional as F

import nanoaki
from conftest import LENGTH, SAFE, WHERE, alone, fill, random_roles, tiny_model
from nanoaki import ANSWER, IMAGE, MASKS, PAD, PROMPT, positions

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
    mask = MASKS[name](roles)
    assert mask.dtype == torch.bool and torch.equal(mask, torch.tensor(naive))
    others = [torch.equal(mask, MASKS[other](roles)) for other in MASKS if other != name]
    assert not any(others), "the layouts must tell the masks apart"


def test_random_layouts_hold_every_case(roles):
    rows = ["".join("_IPA"[r] for r in row) for row in roles.tolist()]
    for case in ("P.*I", "I_*P.*I", "^[_PA]*$", "^_.*I", "_$", "I_+P", "I_+I", "A_*$"):
        assert sum(bool(re.search(case, row)) for row in rows) >= 10, case


def test_without_prompt_mma_is_causal_bit_for_bit(roles):
    for stand_in in (PAD, ANSWER):  # taken out, or text that is not given
        bare = torch.where(roles == PROMPT, stand_in, roles)
        assert torch.equal(MASKS["mma"](bare), MASKS["causal"](bare))
    assert not torch.equal(MASKS["mma"](roles), MASKS["causal"](roles))  # the control: with prompt


def test_causal_within_mma_within_prefix_and_no_row_is_empty(roles):
    causal, mma, prefix = (MASKS[name](roles) for name in ("causal", "mma", "prefix"))
    assert not (causal & ~mma).any() and not (mma & ~prefix).any()
    assert (mma & ~causal).any() and (prefix & ~mma).any()
    for mask in MASKS.values():
        assert mask(roles).any(-1).all()


def test_padding_sees_only_itself_and_nobody_sees_it(roles):
    pad, eye = roles == PAD, torch.eye(LENGTH, dtype=torch.bool).expand(len(roles), -1, -1)
    for mask in MASKS.values():
        seen = mask(roles)
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
                assert torch.equal(MASKS["mma"](row)[0], M == 0)
                assert not torch.equal(MASKS["causal"](row)[0], M == 0)


def test_mask_drawn_in_the_docstring_is_the_mask():
    doc = nanoaki.mma_mask.__doc__
    cells = r"((?:\S ){6}\S)"
    keys = re.search(r"keys +" + cells, doc)[1].split()
    queries, drawn = zip(*re.findall(r"query (\w) +" + cells, doc))
    assert keys == list(queries) and len(keys) == 7
    row = torch.tensor([[" IPA".index(key) for key in keys]])
    causal, mma = MASKS["causal"](row)[0], MASKS["mma"](row)[0]
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
    one = F.scaled_dot_product_attention(q, k, v, MASKS["mma"](row)[:, None])
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


def cached_and_plain(model, given, roles, mask):
    images, tokens = fill(roles)
    B, T = roles.shape
    c, start = model.config, given.shape[1]
    x, seen = model.embed(images, tokens, roles), MASKS[mask](roles)[:, None]
    cache = x.new_zeros(c.n_layer, 2, B, c.n_head, T, c.n_embd // c.n_head)
    states = [model.decoder(x[:, :start], {"mask": seen[:, :, :start, :start]}, cache)]
    for t in range(start, T):
        rows = {"mask": seen[:, :, t:t + 1, :t + 1]}
        states.append(model.decoder(x[:, t:t + 1], rows, cache, t))
    real = roles != PAD
    cached = model.decoder.head(torch.cat(states, 1))
    return cached[real], model(images, tokens, roles, mask=mask)[0][real]


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
    head = model.decoder.head
    monkeypatch.setattr(model.decoder, "head", lambda x: read.append(head(x)) or read[-1])
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


def spy_on_attention(monkeypatch):
    calls, attend = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        calls.append((attn_mask, is_causal))
        return attend(q, k, v, attn_mask, dropout_p, is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def spy_on_masks(monkeypatch):
    built = []
    for name, mask in list(MASKS.items()):
        monkeypatch.setitem(MASKS, name, lambda roles, n=name, m=mask: built.append(n) or m(roles))
    return built


def test_causal_without_padding_passes_is_causal_and_no_mask(model, monkeypatch):
    calls, built = spy_on_attention(monkeypatch), spy_on_masks(monkeypatch)
    tokens = torch.zeros(2, 6, dtype=torch.long)
    model(None, tokens, torch.full((2, 6), PROMPT), mask="causal")
    assert calls == [(None, True)] * 2 and not built
    calls.clear()
    model(None, tokens, torch.tensor([[PROMPT] * 6, [PROMPT] * 5 + [PAD]]), mask="causal")
    assert built == ["causal"] and all(m is not None and not causal for m, causal in calls)


@pytest.mark.parametrize("mask", ["mma", "prefix", "image", "leaky"])
def test_mask_is_built_once_per_batch_and_shared_by_layers_and_heads(model, monkeypatch, mask):
    calls, built = spy_on_attention(monkeypatch), spy_on_masks(monkeypatch)
    roles = torch.tensor([[PROMPT] * 6, [PROMPT] * 5 + [PAD]])
    model(None, torch.zeros(2, 6, dtype=torch.long), roles, mask=mask)
    assert built == [mask] and len(calls) == 2
    assert len({m.data_ptr() for m, _ in calls}) == 1 and calls[0][0].shape == (2, 1, 6, 6)
    built.clear()
    model.generate(None, torch.zeros(2, 6, dtype=torch.long), roles, 4, mask=mask)
    assert built == [mask]
