"""Tiny random models and random layouts, shared by the tests."""
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoaki import ANSWER, IMAGE, PAD, PROMPT, Batch, Config, NanoAKI  # noqa: E402

torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other

VISUAL, LENGTH = 4, 28  # visual tokens of one image in tiny_config; random_layout's longest is 27
WHERE = ("left", "right", "middle", "any")
SAFE = ("causal", "mma", "prefix", "image")  # all masks but leaky


def tiny_config(**changes) -> Config:
    tiny = dict(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=32, image_size=8,
                patch_size=4, vit_layer=2, vit_head=2, vit_embd=32)
    return Config(**tiny | changes)


def tiny_model(dtype=torch.float64, tokenizer=None, **changes) -> NanoAKI:
    """Weights so large that a leak is seen, and that greedy decoding does not just repeat."""
    torch.manual_seed(0)
    model = NanoAKI(tiny_config(**changes), tokenizer).to(dtype).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
            p.copy_(0.3 * noise) if p.dim() > 1 else p.add_(0.1 * noise)
    return model


def random_layout(rng: random.Random, marker: bool = False, answers=(1, 5)) -> list[int]:
    """Roles of images and prompt in any order, the <answer> marker if asked, then an answer."""
    given = []
    for _ in range(rng.randint(0, 4)):
        given += [IMAGE] * VISUAL if rng.random() < 0.5 else [PROMPT] * rng.randint(1, 4)
    tail = [PROMPT] * rng.randint(int(marker), 3)
    return given + tail + [ANSWER] * rng.randint(*answers)


def layouts(n: int, seed: int, **how) -> list[list[int]]:
    rng = random.Random(seed)
    return [random_layout(rng, **how) for _ in range(n)]


def padded(roles: list[int], length: int, where: str, rng: random.Random) -> list[int]:
    """roles with PAD inserted on the left, on the right, in the middle or anywhere."""
    out = list(roles)
    while len(out) < length:
        at = {"left": 0, "right": len(out), "middle": len(roles) // 2}
        out.insert(at[where] if where in at else rng.randint(0, len(out)), PAD)
    return out


def random_roles(n: int = 240, seed: int = 0, where: str | None = None, **how) -> torch.Tensor:
    """(n, LENGTH) roles of random layouts, padded as `where` says, or each row in its own way."""
    rng = random.Random(seed)
    return torch.tensor([padded(roles, LENGTH, where or rng.choice(WHERE), rng)
                         for roles in layouts(n, seed, **how)])


def fill(roles: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Random images and tokens for roles: ordinary ids everywhere, under PAD and IMAGE as well."""
    g = torch.Generator().manual_seed(seed)
    n = int((roles == IMAGE).sum()) // VISUAL
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=g, dtype=torch.uint8) if n else None
    return images, torch.randint(0, 256, roles.shape, generator=g)


def make_batch(images, tokens, roles, targets) -> Batch:
    """forward's arguments as a Batch: equal pictures become one, and stand in another order."""
    each, shown = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
    if images is not None:
        each, shown = images.unique(dim=0, return_inverse=True)
    visual = (roles == IMAGE).flatten().nonzero()[:, 0]
    learned = F.pad(targets[:, 1:] != -100, (1, 0))  # no logits stand before a row
    start = int(learned.any(0).nonzero()[0]) - 1
    return Batch(each, shown, tokens, roles, targets, visual, learned.flatten().nonzero()[:, 0],
                 start, [f"row {row}" for row in range(len(roles))], "", [])


def alone(images, tokens, roles):
    """The rows of a batch one by one and without padding: [(images, tokens, roles)]."""
    taken, rows = 0, []
    for t, r in zip(tokens, roles):
        n = int((r == IMAGE).sum()) // VISUAL
        rows.append((images[taken:taken + n] if n else None, t[r != PAD][None], r[r != PAD][None]))
        taken += n
    return rows
