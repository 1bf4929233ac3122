"""
nanoAKI: modality-mutual attention (MMA, arXiv 2503.02597), in a vision-language model to read.

A picture becomes visual tokens, they stand before the question, and one decoder reads both. Where
the mask is causal, as in other decoder-only models, the visual tokens never see the question. MMA
opens that one direction. Part one is the model: roles, masks, block, ViT, projector, decoder, and
generation. Part two is what stands around it: config, tokenizer, sequence, pictures, ask, files.

    python nanoaki.py                                 # two masks, and what they let through

    from nanoaki import NanoAKI
    model = NanoAKI.load("out/shapes/model.pt")
    model.ask("scene.png", "what color is the circle?")
"""
from __future__ import annotations

import codecs
import heapq
import os
import re
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# Part one: the model

# Every position of a sequence has a role. What is given may be mutual; what is generated is causal.
PAD = 0     # padding: sees only itself, and nobody else sees it
IMAGE = 1   # one position per visual token
PROMPT = 2  # text that is given: question, earlier turns with their answers, the <answer> marker
ANSWER = 3  # text that is generated, its <eos> included: the only text with a loss


class Token(NamedTuple):
    """What a mask, a rule about two tokens, may know of one: tensors that broadcast, or numbers."""
    place: Tensor  # 0, 1, 2 ... in the row
    role: Tensor
    run: Tensor    # text tokens up to it: equal for the visual tokens of one unbroken run


def causal(q: Token, k: Token) -> Tensor:
    """A query sees what stands before it, and itself: every decoder-only model."""
    return k.place <= q.place


def mma(q: Token, k: Token) -> Tensor:
    """Modality-mutual attention: causal, and every image row also sees every prompt column.

    Three visual tokens, a question word, the <answer> marker and two answer tokens
    (x seen causally, o unlocked by MMA, . blocked):

        keys     I I I P P A A
        query I  x . . o o . .      The paper (arXiv 2503.02597), S = [V, T_Q], positions from 1:
        query I  x x . o o . .
        query I  x x x o o . .      M'_ij = 0   if j <= i,
        query P  x x x x . . .                  or if 1 <= i <= |V| and
        query P  x x x x x . .                        |V| + 1 <= j <= |V| + |T_Q|;
        query A  x x x x x x .             -inf otherwise.
        query A  x x x x x x x

    Image to image stays causal. Image to answer stays closed: else the answer would flow through
    the image rows into the very rows that have to predict it (`leaky` shows it). A loss on the
    prompt would leak in the same two hops, question word -> image -> earlier question word, so
    only answers have one. Said with roles instead of positions, the rule holds for several images,
    text before them, chats and padding. It adds no parameter; without a prompt it changes nothing.

    For one image followed by text it is two causal attentions: the rows of V over the keys
    [T_Q ; V], the text rows over all keys, each with a causal mask aligned to the lower right.
    (Positions are already in the keys, so the order of keys is free.)
    """
    return causal(q, k) | (q.role == IMAGE) & (k.role == PROMPT)


def prefix(q: Token, k: Token) -> Tensor:
    """Causal, or both are given, none an answer: PaliGemma (arXiv 2407.07726)."""
    return causal(q, k) | (q.role != ANSWER) & (k.role != ANSWER)


def image_run(q: Token, k: Token) -> Tensor:
    """Causal, or both are in one unbroken run of visual tokens: Gemma 3 (arXiv 2503.19786)."""
    return causal(q, k) | (q.role == IMAGE) & (k.role == IMAGE) & (q.run == k.run)


def leaky(q: Token, k: Token) -> Tensor:
    """MMA with the answer open to image rows as well: the control that nobody should train with."""
    return mma(q, k) | (q.role == IMAGE) & (k.role == ANSWER)


MASKS = {"causal": causal, "mma": mma, "prefix": prefix, "image": image_run, "leaky": leaky}


def may_see(name: str, q: Token, k: Token) -> Tensor:
    """Whether a query sees a key of its row; ValueError on no mask of that name."""
    if name not in MASKS:
        raise ValueError(f"mask {name!r} is none of {', '.join(MASKS)}")
    real = (q.role != PAD) & (k.role != PAD)
    return MASKS[name](q, k) & real | (q.place == k.place)  # itself: no softmax row is empty


def make_mask(name: str, roles: Tensor) -> Tensor:
    """The mask of that name, bool (B, T, T), of roles (B, T): True where a query (row) sees a key.

    PAD sees only itself and is seen by nobody else. Raises ValueError on no such name.
    """
    place = torch.arange(roles.shape[1], device=roles.device)[None]
    tokens = Token(place, roles, (roles >= PROMPT).cumsum(1))
    q, k = Token(*(x[:, :, None] for x in tokens)), Token(*(x[:, None, :] for x in tokens))
    return may_see(name, q, k)


def make_block_mask(name: str, roles: Tensor) -> BlockMask:
    """make_mask for flex_attention (arXiv 2412.05496): only blocks that see anything are computed.

    The rules are the same, asked about two places instead of all at once.
    """
    (B, T), run = roles.shape, (roles >= PROMPT).cumsum(1)

    def mask_mod(b, head, q, k):
        q, k = Token(q, roles[b, q], run[b, q]), Token(k, roles[b, k], run[b, k])
        return may_see(name, q, k)

    make = prepared(create_block_mask, roles.device)
    return make(mask_mod, B, None, T, T, roles.device)


@cache
def prepared(function, device: torch.device):
    """A function for flex_attention as a device needs it: compiled on a GPU, else it is slow."""
    return torch.compile(function) if device.type == "cuda" else function


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, p: float) -> Tensor:
    """Attention of queries (B, heads, T, C / heads) under a mask of either kind, with dropout p.

    Raises ValueError on dropout under a BlockMask: flex_attention has none.
    """
    if not isinstance(mask, BlockMask):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)
    if p:
        raise ValueError(f"flex_attention has no dropout: it must be 0, not {p}")
    return prepared(flex_attention, q.device)(q, k, v, block_mask=mask)


class Cache:
    """Keys and values of a block for every position so far, in memory taken once (gpt-fast)."""

    def __init__(self, positions: int):
        self.positions, self.filled, self.store = positions, 0, None

    def extend(self, k: Tensor, v: Tensor) -> Tensor:
        """Append k, v (B, heads, T, C / heads); return (2, B, heads, all so far, C / heads)."""
        if self.store is None:  # only now is the type known, which autocast decides
            self.store = k.new_empty(2, *k.shape[:2], self.positions, k.shape[3])
        start, self.filled = self.filled, self.filled + k.shape[2]
        self.store[:, :, :, start:self.filled] = torch.stack([k, v])
        return self.store[:, :, :, :self.filled]


class Block(nn.Module):
    """GPT-2's block, SigLIP's (arXiv 2303.15343), DINOv2's (2304.07193): the mask parts them."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, eps: float = 1e-5,
                 gelu: str = "tanh"):
        super().__init__()
        self.n_head, self.dropout, self.gelu = n_head, dropout, gelu
        self.norm1 = nn.LayerNorm(n_embd, eps)
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.out = nn.Linear(n_embd, n_embd)
        self.norm2 = nn.LayerNorm(n_embd, eps)
        self.up = nn.Linear(n_embd, 4 * n_embd)
        self.down = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None = None,
                start: int = 0) -> Tensor:
        """x (B, T, C), mask bool (B, 1, T, keys) or None, full attention -> (B, T - start, C).

        With a cache, x holds the positions that follow those in it, and the keys are all so far.
        What stands before start is read, but nothing more is computed of it.
        """
        B, T, C = x.shape
        p = self.dropout if self.training else 0.0
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, heads, T, C / heads)
        if cache is not None:
            k, v = cache.extend(k, v)
        if start:
            x, q = x[:, start:], q[:, :, start:]
            mask = None if mask is None else mask[:, :, start:]
        y = attend(q, k, v, mask, p)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(x.shape)), p)
        y = F.gelu(self.up(self.norm2(x)), approximate=self.gelu)       # (B, T, 4 C)
        return x + F.dropout(self.down(y), p)


class ViT(nn.Module):
    """Vision transformer (arXiv 2010.11929): patches, which may read class tokens of their own."""

    def __init__(self, c: Config):
        super().__init__()
        self.patch = nn.Conv2d(3, c.vit_embd, c.patch_size, stride=c.patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(c.patches, c.vit_embd))
        self.classes = None
        if c.vit_classes:
            self.classes = nn.Parameter(0.02 * torch.randn(c.vit_classes, c.vit_embd))
        self.blocks = nn.ModuleList(
            Block(c.vit_embd, c.vit_head, c.dropout, c.vit_eps, c.vit_gelu)
            for _ in range(c.vit_layer))
        self.norm = nn.LayerNorm(c.vit_embd, c.vit_eps)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> (N, patches, vit_embd), patches row by row."""
        x = images.to(self.position.dtype) / 127.5 - 1                  # -1 to 1
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position    # (N, patches, vit_embd)
        if self.classes is not None:
            x = torch.cat([self.classes.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, mask=None)                                     # all patches see all
        return self.norm(x[:, -len(self.position):])


class Projector(nn.Module):
    """Two-layer MLP from merge x merge neighbouring patches to one visual token."""

    def __init__(self, c: Config):
        super().__init__()
        self.merge = c.merge
        self.up = nn.Linear(c.merge ** 2 * c.vit_embd, c.n_embd)
        self.down = nn.Linear(c.n_embd, c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(N, patches, vit_embd) -> (N, visual tokens, n_embd)."""
        N, patches, C = x.shape
        m, side = self.merge, int(patches ** 0.5) // self.merge
        x = x.view(N, side, m, side, m, C).transpose(2, 3)              # (N, side, side, m, m, C)
        x = x.reshape(N, side * side, m * m * C)
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Resampler(nn.Module):
    """AKI's connector in the projector's place, a Perceiver (arXiv 2103.03206, 2204.14198).

    Learned queries read all patches, and one another, in a few blocks; each is a visual token.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(1, c.queries, c.vit_embd))  # AdamW's
        self.blocks = nn.ModuleList(Block(c.vit_embd, c.vit_head, c.dropout)
                                    for _ in range(c.query_layer))
        self.norm = nn.LayerNorm(c.vit_embd)
        self.up = nn.Linear(c.vit_embd, c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(N, patches, vit_embd) -> (N, queries, n_embd)."""
        queries = self.queries.expand(len(x), -1, -1)
        for block in self.blocks:
            queries = block(torch.cat([x, queries], 1), mask=None, start=x.shape[1])
        return self.up(self.norm(queries))


class Decoder(nn.Module):
    """GPT-2: token and position embeddings, blocks, LayerNorm; but the head is its own matrix.

    Tied to the embedding, it learns late to find in a picture what a question names.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.token = nn.Embedding(c.vocab_size, c.n_embd)
        self.position = nn.Embedding(c.block_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c.n_embd, c.n_head, c.dropout) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)  # of states, not in forward

    def forward(self, x: Tensor, mask: Tensor, caches: list[Cache] | None = None,
                start: int = 0) -> Tensor:
        """Embeddings (B, T, n_embd) -> states from start on; one mask for all layers and heads."""
        caches = caches or [None] * len(self.blocks)
        for block, cache in zip(self.blocks[:-1], caches):
            x = block(x, mask, cache)
        return self.norm(self.blocks[-1](x, mask, caches[-1], start))


class Batch(NamedTuple):
    """What a training step learns from; its flat indices, b * T + t, were found on the CPU."""
    images: Tensor   # uint8 (N, 3, H, W): each picture once; without any, one that is not shown
    shown: Tensor    # int64 (pictures in the sequences,): which of them stand there, in order
    tokens: Tensor   # int64 (B, T)
    roles: Tensor    # int64 (B, T)
    targets: Tensor  # int64 (B, T), -100 outside ANSWER
    visual: Tensor   # int64: flat indices of the visual tokens
    learned: Tensor  # int64: flat indices of what has a target, never the first of a row
    start: int       # the first column whose state predicts one
    ids: list[str]   # of the records, one per row
    problem: str     # what was wrong with the file of records or a picture; "" if nothing
    unread: list[str]  # for each example without a row, what was wrong with a picture


class Model(nn.Module):
    """ViT, projector and decoder under a role mask (arXiv 2503.02597, section 3)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.flex = False  # flex_attention in loss: for long sequences in training, on a GPU
        connector = Resampler if config.queries else Projector
        self.vit, self.projector, self.decoder = ViT(config), connector(config), Decoder(config)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        stacks = [module for module in self.modules() if isinstance(module, nn.ModuleList)]
        for blocks in stacks:  # GPT-2: each block adds twice
            for layer in [layer for block in blocks for layer in (block.out, block.down)]:
                nn.init.normal_(layer.weight, std=0.02 / (2 * len(blocks)) ** 0.5)

    def take(self, weights: dict[str, Tensor]) -> list[str]:
        """Load weights, in which whole parts may be missing; return their names, which stay new.

        Raises RuntimeError, torch's, where the others are not whole or have other shapes.
        """
        new = [name for name, _ in self.named_children()
               if not any(key.startswith(f"{name}.") for key in weights)]
        own = {key: w for key, w in self.state_dict().items() if key.split(".")[0] in new}
        self.load_state_dict(own | weights)
        return new

    def see(self, images: Tensor) -> Tensor:
        """Visual tokens (N, V, n_embd) of images uint8 (N, 3, H, W), or of what the ViT says."""
        if images.dtype == torch.uint8:
            images = self.vit(images)
        return self.projector(images.to(self.projector.up.weight.dtype))

    def embed(self, visual: Tensor, flat: Tensor, tokens: Tensor, roles: Tensor) -> Tensor:
        """Embeddings (B, T, n_embd) of tokens, and of visual (n, V, n_embd) at flat indices."""
        x = self.decoder.token(tokens)
        x = x.flatten(0, 1).index_copy(0, flat, visual.flatten(0, 1).to(x.dtype)).view_as(x)
        x = x + self.decoder.position(positions(roles))
        return F.dropout(x, self.config.dropout, self.decoder.training)

    def loss(self, batch: Batch, mask: str | None = None) -> Tensor:
        """Training's entrance: forward's loss, of a Batch; the host waits for no value of it."""
        visual = self.see(batch.images)[batch.shown]                    # (shown, V, n_embd)
        x = self.embed(visual, batch.visual, batch.tokens, batch.roles)
        T, start, name = batch.tokens.shape[1], batch.start, mask or self.config.mask
        if self.flex:  # whole blocks of 128: few lengths, so that little is compiled anew
            x, start = F.pad(x, (0, 0, 0, -T % 128)), 0
            sees = make_block_mask(name, F.pad(batch.roles, (0, -T % 128)))
        else:
            sees = make_mask(name, batch.roles)[:, None]
        x = self.decoder(x, sees, start=start)                          # (B, T - start, n_embd)
        x = x[batch.learned // T, batch.learned % T - 1 - start]        # t - 1 predicts t
        targets = batch.targets.flatten()[batch.learned]
        loss = F.cross_entropy(self.decoder.head(x).float(), targets, reduction="sum")
        return loss / max(1, len(targets))                              # of nothing it is 0

    def forward(self, images: Tensor | None, tokens: Tensor, roles: Tensor,
                targets: Tensor | None = None, mask: str | None = None):
        """Logits (B, T, vocab_size) and, with targets, their mean cross-entropy in nats, else None.

        images uint8 (images in the batch, 3, H, W) in the order of their tokens, or None, or what
        self.vit says of them, float16 (images, patches, vit_embd); tokens, roles int64 (B, T);
        mask a name in MASKS, None for the one the model was trained with.
        targets int64 (B, T), aligned with tokens, not shifted: the logits at t - 1 predict
        targets[:, t]; -100 is no loss. So, to learn, pad before the prompt or after the answer.
        Raises ValueError if images and roles do not fit, if a sequence is longer than block_size,
        if a target stands outside ANSWER, and if there is none.
        """
        logits = self.decoder.head(self.hidden(images, tokens, roles, mask))
        if targets is None:
            return logits, None
        if ((targets != -100) & (roles != ANSWER)).any():
            raise ValueError("targets outside ANSWER must be -100: nothing given has a loss")
        if not (targets[:, 1:] != -100).any():
            raise ValueError("there is no target to learn: all are -100")
        before = logits[:, :-1].flatten(0, 1).float()                   # t - 1 predicts t
        return logits, F.cross_entropy(before, targets[:, 1:].flatten())

    def hidden(self, images: Tensor | None, tokens: Tensor, roles: Tensor,
               mask: str | None = None) -> Tensor:
        """States after the last LayerNorm, (B, T, n_embd); arguments and errors as in forward."""
        x = self.read(images, tokens, roles)
        return self.decoder(x, make_mask(mask or self.config.mask, roles)[:, None])

    def read(self, images: Tensor | None, tokens: Tensor, roles: Tensor,
             shown: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, n_embd) of what anybody brings, checked; errors as in forward.

        shown int64 says which of the images stand in the sequences, in order; None: each, once.
        """
        c, side = self.config, self.config.image_size
        if images is None:
            images = torch.zeros(0, 3, side, side, dtype=torch.uint8, device=tokens.device)
        pixels, seen = (torch.uint8, (3, side, side)), (torch.float16, (c.patches, c.vit_embd))
        if (images.dtype, images.shape[1:]) not in (pixels, seen):
            raise ValueError(f"images must be uint8 (N, 3, {side}, {side}), or float16 (N, "
                             f"{c.patches}, {c.vit_embd}), what the ViT says of them, not "
                             f"{images.dtype} {tuple(images.shape)}")
        if shown is None:
            shown = torch.arange(len(images), device=tokens.device)
        if shown.dtype != torch.int64 or ((shown < 0) | (shown >= len(images))).any():
            raise ValueError(f"shown must be int64 numbers of the {len(images)} images")
        count, longest = (roles == IMAGE).sum(1), int((roles != PAD).sum(1).max())
        if count.sum() != len(shown) * c.visual_tokens or (count % c.visual_tokens).any():
            raise ValueError(f"{int(count.sum())} IMAGE positions, but {len(shown)} images of "
                             f"{c.visual_tokens} visual tokens, each whole in a row")
        if longest > c.block_size:
            raise ValueError(f"a sequence of {longest} tokens is longer than the model's "
                             f"{c.block_size} positions")
        flat = (roles == IMAGE).flatten().nonzero()[:, 0]
        return self.embed(self.see(images)[shown], flat, tokens, roles)

    @torch.no_grad()
    def stream(self, images: Tensor | None, tokens: Tensor, roles: Tensor, max_new_tokens: int,
               temperature: float = 0.0, top_k: int | None = None, mask: str | None = None,
               shown: Tensor | None = None):
        """Yield, for every step, the B new ids (None for rows that have ended); see generate."""
        c, (B, T) = self.config, tokens.shape
        if not (temperature >= 0 and max_new_tokens >= 0 and (top_k is None or top_k >= 1)):
            raise ValueError(f"temperature {temperature} and max_new_tokens {max_new_tokens} must "
                             f"be at least 0, top_k {top_k} at least 1")
        room = [c.block_size - n for n in (roles != PAD).sum(1).tolist()]
        if min(room) < 1:
            raise ValueError(f"a prompt of {c.block_size - min(room)} tokens leaves no room for an "
                             f"answer in the model's {c.block_size} positions")
        steps, going = min(max_new_tokens, max(room)), [True] * B
        last = (torch.arange(T, device=roles.device) * (roles != PAD)).argmax(1)  # of what is given
        x = self.read(images, tokens, roles, shown)                     # (B, T, n_embd)
        roles = F.pad(roles, (0, steps), value=ANSWER)                  # answers from column T on
        position = positions(roles).clamp(max=c.block_size - 1)         # ended rows run on, unread
        sees = make_mask(mask or c.mask, roles)[:, None]                # (B, 1, all, all)
        caches = [Cache(T + steps) for _ in self.decoder.blocks]
        # Prefill: all that is given, once. Under the causal mask the picture's part of the cache
        # would serve the next question, too; under MMA its keys have read this one: look anew.
        start = int(last.min())
        x = self.decoder(x, sees[:, :, :T, :T], caches, start)          # (B, T - start, n_embd)
        x = x[torch.arange(B, device=x.device), last - start]           # (B, n_embd)
        for t in range(T, T + steps):
            new = choose(self.decoder.head(x).float(), temperature, top_k)          # (B,)
            ids = new.tolist()
            going = [going[i] and t - T < room[i] and ids[i] != Tokenizer.eos for i in range(B)]
            if not any(going):
                return
            yield [ids[i] if going[i] else None for i in range(B)]
            if t + 1 < T + steps:
                # Decode: a mask row. Only under leaky is it read by what the cache already holds.
                x = (self.decoder.token(new) + self.decoder.position(position[:, t]))[:, None]
                x = self.decoder(x, sees[:, :, t:t + 1, :t + 1], caches)[:, 0]

    def generate(self, images: Tensor | None, tokens: Tensor, roles: Tensor, max_new_tokens: int,
                 temperature: float = 0.0, top_k: int | None = None, mask: str | None = None,
                 shown: Tensor | None = None) -> list[list[int]]:
        """New ids of each row, without <eos>: the likeliest, or sampled at a temperature above 0.

        Arguments as in forward and read, padded anywhere; top_k keeps that many of the likeliest. A
        row ends with <eos>, max_new_tokens or its last position; a prompt without room is a
        ValueError.
        """
        training, rows = self.training, [[] for _ in tokens]
        self.eval()
        try:
            for step in self.stream(images, tokens, roles, max_new_tokens, temperature, top_k,
                                    mask, shown):
                for row, new in zip(rows, step):
                    if new is not None:
                        row.append(new)
        finally:
            self.train(training)
        return rows


def positions(roles: Tensor) -> Tensor:
    """How many tokens that are not padding stand before each token: int64 (B, T)."""
    return ((roles != PAD).cumsum(1) - 1).clamp(min=0)


def choose(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """The likeliest id of each row of logits (B, vocab_size), or a draw: int64 (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]


# Part two: what stands around it


def knob(default, help: str, least: float | None = None, choices: list[str] | None = None):
    """A dataclass field that explains and bounds itself: train.py makes a flag of it."""
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


def check_knobs(settings) -> None:
    """Raise ValueError that names a field out of its bounds, its value, and what would be right."""
    for f in fields(settings):
        value, least = getattr(settings, f.name), f.metadata["least"]
        choices = f.metadata["choices"]
        if type(f.default) is int and type(value) is not int:
            raise ValueError(f"{f.name} must be a whole number, not {value!r}")
        if least is not None and not value >= least:
            raise ValueError(f"{f.name} must be at least {least}, not {value}")
        if choices and value not in choices:
            raise ValueError(f"{f.name} {value!r} is none of {', '.join(choices)}")


@dataclass
class Config:
    """The shape of a model; raises ValueError, naming both values, where two do not fit."""
    vocab_size: int = knob(512, "tokens, at most: more of them make sequences shorter", 1)
    block_size: int = knob(128, "positions: the longest sequence, visual tokens included", 1)
    n_layer: int = knob(4, "decoder blocks: relations need depth, time grows in proportion", 1)
    n_head: int = knob(3, "decoder attention heads; divides n_embd: many are slow on a CPU", 1)
    n_embd: int = knob(96, "decoder width: time grows with its square", 1)
    image_size: int = knob(96, "pixels: side of the square that pictures are fitted into", 1)
    patch_size: int = knob(16, "pixels: side of a ViT patch; divides image_size", 1)
    merge: int = knob(1, "merge x merge patches make a visual token: 2 makes a quarter of them", 1)
    vit_layer: int = knob(2, "ViT blocks", 1)
    vit_head: int = knob(3, "ViT attention heads; divides vit_embd", 1)
    vit_embd: int = knob(96, "ViT width", 1)
    vit_classes: int = knob(0, "class tokens of a published ViT: a new one needs none", 0)
    vit_eps: float = knob(1e-5, "of the ViT's LayerNorms: published ones differ", 0)
    vit_gelu: str = knob("tanh", "the ViT's GELU: by tanh, or exact ('none')",
                         choices=["tanh", "none"])
    queries: int = knob(0, "learned queries of a Perceiver resampler, AKI's connector: that many "
                           "visual tokens; 0: an MLP", 0)
    query_layer: int = knob(2, "blocks of the resampler: AKI has 6", 1)
    dropout: float = knob(0.0, "share of activations dropped in training: helps if data are few", 0)
    mask: str = knob("mma", "attention mask: " + ", ".join(MASKS), choices=list(MASKS))
    order: str = knob("data", "pictures where the data have them, or before ('image') or after "
                              "('text') the text of their turn", choices=["data", "image", "text"])

    def __post_init__(self):
        check_knobs(self)
        for name, part in (("n_embd", "n_head"), ("vit_embd", "vit_head"),
                           ("image_size", "patch_size")):
            if getattr(self, name) % getattr(self, part):
                raise ValueError(f"{name} {getattr(self, name)} must be a multiple of "
                                 f"{part} {getattr(self, part)}")
        side = self.image_size // self.patch_size
        if side % self.merge:
            raise ValueError(f"merge {self.merge} must divide the {side} patches of a side")
        if self.queries and self.merge > 1:
            raise ValueError(f"queries {self.queries} read all patches: merge must be 1, not "
                             f"{self.merge}")
        if self.block_size <= self.visual_tokens:
            raise ValueError(f"block_size {self.block_size} must be more than the "
                             f"{self.visual_tokens} visual tokens of one image")
        if self.dropout >= 1:
            raise ValueError(f"dropout must be below 1, not {self.dropout}")

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image."""
        return self.queries or self.patches // self.merge ** 2


PRESETS = {
    # 0.9 M parameters: two CPU cores, minutes
    "nano": Config(),
    # 29 M: a consumer GPU, minutes
    "small": Config(vocab_size=4096, block_size=512, n_layer=8, n_head=6, n_embd=384,
                    image_size=192, vit_layer=6, vit_head=6, vit_embd=384),
    # GPT-2 124M, its head untied, and ViT-B/16
    "base": Config(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768,
                   image_size=224, vit_layer=12, vit_head=12, vit_embd=768),
}


def _merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    merged, i = [], 0
    while i < len(ids):
        hit = tuple(ids[i:i + 2]) == pair
        merged.append(new if hit else ids[i])
        i += 2 if hit else 1
    return merged


# Characters as GPT-2 sorts them. To Python, ½ and Ⅷ are of a word, and U+001C to U+001F spaces.
FRACTIONS = "".join(c for c in map(chr, range(sys.maxunicode + 1))
                    if c.isnumeric() and not c.isdecimal() and not c.isalpha())
LETTER, NUMBER = rf"[^\W\d_{FRACTIONS}]", rf"[\d{FRACTIONS}]"
SPACE, OTHER = r"[^\S\x1c-\x1f]", r"(?:[^\w\s]|[_\x1c-\x1f])"


class Tokenizer:
    """Byte-level BPE (arXiv 1508.07909; GPT-2): 256 bytes, four special tokens, then merges.

    Text becomes bytes and merges of bytes, so no text can become a special token, and every string
    that UTF-8 can encode round-trips. No merge crosses the words that GPT-2 splits a text into.
    """
    image, answer, eos, pad = 256, 257, 258, 259
    words = re.compile(rf"'(?:[sdmt]|ll|ve|re)| ?{LETTER}+| ?{NUMBER}+| ?{OTHER}+"
                       rf"|{SPACE}+(?={SPACE}|\Z)|{SPACE}+")

    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.ids = {pair: 260 + i for i, pair in enumerate(self.merges)}
        self.bytes = [bytes([i]) for i in range(256)] + [b""] * 4
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.known = {}  # word -> ids: text repeats its words

    def __len__(self) -> int:
        return len(self.bytes)

    @classmethod
    def train(cls, texts, vocab_size: int = 512) -> "Tokenizer":
        """Merge the most frequent pair (of equals, the first seen) up to vocab_size tokens.

        It ends earlier where no pair occurs twice; raises ValueError if vocab_size is below 260.
        """
        if vocab_size < 260:
            raise ValueError(f"vocab_size {vocab_size} must be at least 260: bytes and specials")
        counts = Counter(word[i:i + 32] for text in texts for word in cls.words.findall(text)
                         for i in range(0, len(word), 32))  # a word may be as long as a text
        words = [(list(word.encode()), n) for word, n in counts.items()]
        pairs, words_with, merges = Counter(), defaultdict(dict), []

        def count(i, sign):
            ids, n = words[i]
            for pair in zip(ids, ids[1:]):
                pairs[pair] += sign * n
                words_with[pair][i] = True

        for i in range(len(words)):
            count(i, 1)
        while pairs and 260 + len(merges) < vocab_size:
            best = max(pairs, key=pairs.get)
            if pairs[best] < 2:
                break
            for i in list(words_with[best]):
                count(i, -1)
                words[i][0][:] = _merge(words[i][0], best, 260 + len(merges))
                count(i, 1)
            del pairs[best], words_with[best]
            merges.append(best)
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; raises ValueError on lone surrogates, which UTF-8 cannot encode."""
        ids = []
        for word in self.words.findall(text):
            if word not in self.known:
                self.known[word] = self.encode_word(word)
            ids += self.known[word]
        return ids

    def encode_word(self, word: str) -> list[int]:
        """Of all pairs that can be merged, the one learned first is, in n log n of a word's bytes.

        A merged token stands where its first part stood, and None where its second did.
        """
        ids = list(word.encode())
        n = len(ids)
        before, after = list(range(-1, n)), list(range(1, n + 1))  # the places of its neighbours
        waiting = [(self.ids[pair], i) for i, pair in enumerate(zip(ids, ids[1:]))
                   if pair in self.ids]
        heapq.heapify(waiting)
        while waiting:
            new, i = heapq.heappop(waiting)
            j = after[i]
            if ids[i] is None or j == n or self.ids.get((ids[i], ids[j])) != new:
                continue  # one of the two is part of another by now
            ids[i], ids[j] = new, None
            after[i] = after[j]
            before[after[j]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if left >= 0 and right < n and (ids[left], ids[right]) in self.ids:
                    heapq.heappush(waiting, (self.ids[ids[left], ids[right]], left))
        return [i for i in ids if i is not None]

    def decode(self, ids) -> str:
        """Text of ids: special tokens have none, nor has a character that is cut off at the end.

        What is not UTF-8 becomes U+FFFD.
        """
        text = b"".join(self.bytes[i] for i in ids if i < len(self))
        return codecs.getincrementaldecoder("utf-8")("replace").decode(text)


def place_pictures(turns: list[tuple[str, str]], pictures: int,
                   order: str = "data") -> list[tuple[str, list[str]]]:
    """Turns with their text in pieces, between which pictures stand: the one reader of <image>.

    turns are (speaker, text), speaker "system", "human" or "gpt". Where human text has as many
    <image> as there are pictures, they stand where they are written; where it has none, all stand
    before the first turn. Under order "image" those at an edge of a human turn's text, or not
    written, come before it, under "text" after it. Line breaks around human text and around its
    pictures are dropped; \\r\\n is \\n. Raises ValueError on any other count of <image>.
    """
    written = sum(text.count("<image>") for speaker, text in turns if speaker == "human")
    if written not in (0, pictures):
        raise ValueError(f"{written} <image> in the text for {pictures} pictures: "
                         f"write one for each, or none")
    placed, unwritten = [], [""] * (pictures - written)
    for speaker, text in turns:
        text = text.replace("\r\n", "\n")
        pieces = [text]
        if speaker == "human":
            pieces = [piece.strip("\n") for piece in text.split("<image>")]
        if order == "data" or speaker == "human":  # the first turn that may have them
            pieces, unwritten = unwritten + pieces, []
        if order != "data" and speaker == "human":
            pieces = to_edge(pieces, order)
        placed.append((speaker, pieces))
    return placed


def to_edge(pieces: list[str], order: str) -> list[str]:
    """Pieces of a text whose pictures at an edge all stand before it ("image"), or after it."""
    inner = pieces
    while len(inner) > 1 and not inner[0].strip():
        inner = inner[1:]
    while len(inner) > 1 and not inner[-1].strip():
        inner = inner[:-1]
    edge = [""] * (len(pieces) - len(inner))
    return edge + inner if order == "image" else inner + edge


def build_sequence(tokenizer: Tokenizer, config: Config, turns: list[tuple[str, list[str]]],
                   answer: str | None = None) -> tuple[list[int], list[int]]:
    """(tokens, roles) of all that is given, then of the answer to learn, if there is one.

    turns are place_pictures', the last one human. Of more than the config's block_size, the text of
    the oldest turns is left out. Raises ValueError where the last turn does not fit.
    """
    image, parts = [tokenizer.image] * config.visual_tokens, []
    ends = {"system": tokenizer.encode("\n"), "human": [tokenizer.answer], "gpt": [tokenizer.eos]}
    for speaker, pieces in turns:
        part = tokenizer.encode(pieces[0])
        for piece in pieces[1:]:
            part += image + tokenizer.encode(piece)
        parts.append(part + ends[speaker])
    generated = [] if answer is None else tokenizer.encode(answer) + [tokenizer.eos]
    room = config.block_size - max(len(generated), 1)
    history = range(1 if turns[0][0] == "system" else 0, len(parts) - 1, 2)
    for i in history:  # a question and its answer
        if sum(map(len, parts)) > room:
            parts[i], parts[i + 1] = [t for t in parts[i] if t == tokenizer.image], []
    prompt = sum(parts, [])
    if len(prompt) > room:
        raise ValueError(f"{len(prompt)} tokens of pictures and text and "
                         f"{config.block_size - room} of an answer are more than the model's "
                         f"{config.block_size} positions (--block-size, when it is trained)")
    roles = [IMAGE if token == tokenizer.image else PROMPT for token in prompt]
    return prompt + generated, roles + [ANSWER] * len(generated)


def pad_batch(sequences: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, roles and targets, int64 (B, T), of some (tokens, roles), padded on the right."""
    T = max(len(tokens) for tokens, _ in sequences)
    tokens = torch.tensor([t + [Tokenizer.pad] * (T - len(t)) for t, _ in sequences])
    roles = torch.tensor([r + [PAD] * (T - len(r)) for _, r in sequences])
    return tokens, roles, torch.where(roles == ANSWER, tokens, -100)


# Pillow's 1 MiB would refuse good pictures with long metadata.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28


def fit_picture(picture, size: int) -> Tensor:
    """A picture as uint8 (3, size, size): upright, on white, letterboxed on grey, never cropped.

    It is a path, a PIL image of any mode and depth, or a uint8 array (H, W, 3). What is deeper than
    eight bits is read in the smallest usual range that holds it, 0 to 1 for floats, 0 to 255, 4,095
    or 65,535, else from its least to its greatest value. Of an animated file it is the first frame.
    Raises ValueError if it is something else, broken or empty, or has values that are not finite.
    """
    if isinstance(picture, (str, Path)):
        try:
            with Image.open(picture) as image:
                image.draft(None, (2 * size, 2 * size))  # a JPEG's decoder can skip what is finer
                return fit_picture(image, size)
        except Exception as e:  # Pillow raises whatever the bytes make it raise
            reason = getattr(e, "strerror", None) or f"not a picture that can be read ({e})"
            raise ValueError(f"{picture}: {reason}") from e
    image = picture
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3:
        if picture.shape[2] == 3 and picture.size:
            image = Image.fromarray(picture)
    if not isinstance(image, Image.Image) or 0 in image.size:
        what = f"{getattr(picture, 'dtype', '')} {getattr(picture, 'shape', '')}"
        raise ValueError(f"a picture must be a path, a PIL image or a uint8 array (H, W, 3), not "
                         f"empty; this is {type(picture).__name__} {what}")
    deep = ";16" in str(getattr(image, "tile", ""))
    try:
        image.load()  # here, since what is broken must not be hidden below
    except (OSError, SyntaxError) as e:
        raise ValueError(f"the picture cannot be decoded: {e}") from e
    if deep and image.mode[:3] == "RGB" and max(top for _, top in image.getextrema()[:3]) < 16:
        raise ValueError("16 bits a colour hold 12 or fewer, and Pillow reads the upper 8")
    with suppress(Exception):  # broken metadata around good pixels
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = to_eight_bits(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        scale = size / max(image.size)
        sides = [max(1, round(side * scale)) for side in image.size]
        square = Image.new("RGB", (size, size), (128, 128, 128))
        square.paste(image.resize(sides, Image.Resampling.BICUBIC),
                     [(size - side) // 2 for side in sides])
        image = square
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Deep greys (modes I and F) in eight bits, in the range that fit_picture's docstring tells."""
    values = np.asarray(image, np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("it has values that are not finite numbers")
    usual = [1, 255, 4095, 65535] if image.mode[0] == "F" else [255, 4095, 65535]
    fitting = [top for top in usual if 0 <= low and high <= top]
    if fitting:
        low, high = 0, fitting[0]
    return Image.fromarray(np.interp(values, (low, high), (0, 255)).round().astype(np.uint8))


class NanoAKI(Model):
    """A Model that is asked about pictures in words, saved and loaded.

    Raises ValueError if the tokenizer has more tokens than the config's vocab_size.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None):
        if tokenizer is not None and len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, more than the config's "
                             f"vocab_size {config.vocab_size}")
        super().__init__(config)
        self.tokenizer = tokenizer

    def prompt(self, images: list, questions: list[str], history=(), system: str = ""):
        """images, tokens, roles of questions, each with its picture, list of them, or None."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: NanoAKI(config, tokenizer)")
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} pictures (or lists) for {len(questions)} questions")
        before = [("system", system)] if system else []
        for question, answer in history:
            before += [("human", question), ("gpt", answer)]
        rows, squares = [], []
        for pictures, question in zip(images, questions):
            if pictures is None:
                pictures = []
            elif not isinstance(pictures, (list, tuple)):
                pictures = [pictures]
            turns = before + [("human", question)]
            placed = place_pictures(turns, len(pictures), self.config.order)
            rows.append(build_sequence(self.tokenizer, self.config, placed))
            squares += [fit_picture(picture, self.config.image_size) for picture in pictures]
        tokens, roles, _ = (t.to(self.decoder.token.weight.device) for t in pad_batch(rows))
        return torch.stack(squares).to(tokens.device) if squares else None, tokens, roles

    def ask(self, images, questions: str | list[str], max_new_tokens: int | None = None,
            history=(), system: str = "", **sampling) -> str | list[str]:
        """The answer to a question about a picture (see fit_picture), a list of them, or None.

        With a list of questions, a list of answers: images then is a list of as many of those, or
        one picture for all. history, (question, answer) pairs, and system text come before each
        question. max_new_tokens (None: what fits) and sampling (temperature, top_k, mask) are
        generate's. Raises ValueError where a question and its pictures do not fit the model.
        """
        one = isinstance(questions, str)
        questions = [questions] if one else questions
        if one or not isinstance(images, (list, tuple)):
            images = [images] * len(questions)
        if not questions:
            return []
        limit = self.config.block_size if max_new_tokens is None else max_new_tokens
        prompt = self.prompt(images, questions, history, system)
        answers = [self.tokenizer.decode(ids) for ids in self.generate(*prompt, limit, **sampling)]
        return answers[0] if one else answers

    def save(self, path) -> None:
        """Write config, tokenizer and weights to one file, whole or not at all."""
        save_file({"config": asdict(self.config), "model": self.state_dict(),
                   "merges": None if self.tokenizer is None else self.tokenizer.merges}, path)

    @classmethod
    def load(cls, path, new_parts: bool = False) -> "NanoAKI":
        """The model saved at path, on the CPU, in eval mode; raises ValueError if there is none.

        With new_parts, those are new that a file of published weights lacks; else they are missed.
        """
        state = load_file(path)
        try:
            tokenizer = None if state["merges"] is None else Tokenizer(state["merges"])
            model = cls(Config(**state["config"]), tokenizer)
            new = model.take(state["model"])
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError) as e:
            reason = " ".join(str(e).split())[:200]
            raise ValueError(f"{path}: config, tokenizer and weights do not fit: {reason}") from e
        if new and not new_parts:
            raise ValueError(f"{path} has no {' and no '.join(new)} yet: train.py --init {path}")
        return model.eval()


VERSION = 3  # of checkpoints: until the second, text was split into words otherwise


def save_file(state: dict, path) -> None:
    """Write a checkpoint whole or not at all: beside path, flushed, renamed; raises OSError."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            torch.save({"nanoaki": VERSION} | state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as e:
        Path(part).unlink(missing_ok=True)
        if isinstance(e, (OSError, RuntimeError)):  # torch.save raises the latter on a full disk
            reason = e if isinstance(e, OSError) else e.__context__ or e  # the system's word
            raise OSError(f"{path} cannot be written, what it held is whole: {reason}") from e
        raise


def load_file(path) -> dict:
    """What save_file wrote, tensors on the CPU; raises ValueError if path holds anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; train a model first: python train.py") from None
    except Exception as e:  # torch.load raises whatever the bytes make it raise
        raise ValueError(f"{path}: not a nanoAKI checkpoint ({type(e).__name__})") from e
    version = state.get("nanoaki") if isinstance(state, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path}: a checkpoint, but not one of nanoAKI")
    if version != VERSION:
        raise ValueError(f"{path}: a checkpoint of version {version}, and this nanoAKI reads those "
                         f"of {VERSION}: the nanoAKI that wrote it is needed, or a new training")
    return state


def main() -> None:
    """Print the causal and the MMA mask of a small sequence, and what each lets through."""
    torch.manual_seed(0)
    config = Config(image_size=32, n_embd=32, n_head=2, vit_embd=32, vit_head=2)
    model, V = Model(config).eval(), config.visual_tokens
    rows = [build_sequence(Tokenizer([]), config, place_pictures([("human", question)], 1), "no")
            for question in ("hm?", "he?")]
    tokens, roles, _ = pad_batch(rows)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(2, -1, -1, -1)
    moved = {}
    for name in ("causal", "mma"):
        print(f"{name}: rows see columns (I image, P prompt, A answer)")
        for role, row in zip(roles[0].tolist(), make_mask(name, roles)[0].tolist()):
            print("  " + "-IPA"[role], *("x" if sees else "." for sees in row))
        states = model.hidden(images, tokens, roles, name)
        moved[name] = float((states[0, :V] - states[1, :V]).detach().abs().max())
    print(f"under causal another question moves visual tokens' states by {moved['causal']:.3g}\n"
          f"under mma it moves them by {moved['mma']:.3g}: there they have read it")


if __name__ == "__main__":
    main()
