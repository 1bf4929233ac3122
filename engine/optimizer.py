"""Muon for the matrices inside blocks and projector, AdamW for everything else, and their rate."""
from collections import defaultdict

import torch
from torch import Tensor


def orthogonalize(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrices, (n, rows, columns)."""
    tall = g.shape[1] > g.shape[2]
    x = g.to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (kellerjordan.github.io/posts/muon): for 2-D matrices.

    The rule of torch.optim.Muon, which takes matrices one by one and in bfloat16 everywhere, slow
    on a CPU; here those of one shape are stacked, and computed in dtype. A group's parts says of
    how many matrices, one above the other, each of its own consists.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 dtype: torch.dtype = torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "parts": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, stacks = group["lr"], group["momentum"], defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    stacks[p.shape].append(p)
            for (rows, columns), ps in stacks.items():
                rows //= group["parts"]
                grads = [p.grad for p in ps]
                for p in ps:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in ps]
                torch._foreach_lerp_(momenta, grads, 1 - momentum)
                nesterov = torch.stack(torch._foreach_lerp(grads, momenta, momentum))
                updates = orthogonalize(nesterov.view(-1, rows, columns), self.dtype)
                torch._foreach_mul_(ps, 1 - lr * group["weight_decay"])
                torch._foreach_add_(ps, updates.view_as(nesterov).unbind(),
                                    alpha=-lr * max(1, rows / columns) ** 0.5)


def make_optimizers(model, lr: float, adamw_lr: float, weight_decay: float,
                    bfloat16: bool = False) -> list[torch.optim.Optimizer]:
    """Muon and AdamW for what is trained of a model; Muon in bfloat16 where asked, on no CPU."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = [name for name, p in trained.items()
              if p.dim() == 2 and ("blocks" in name or "projector" in name)]
    # In a new model values' gradients are 100 times queries' and keys': as one, these hardly move.
    groups = [{"params": [trained[name] for name in inside if "qkv" not in name]},
              {"params": [trained[name] for name in inside if "qkv" in name], "parts": 3}]
    rest = [p for name, p in trained.items() if name not in inside]
    device = rest[0].device.type
    dtype = torch.bfloat16 if bfloat16 and device != "cpu" else torch.float32
    return [Muon(groups, lr, weight_decay=weight_decay, dtype=dtype),
            torch.optim.AdamW(rest, adamw_lr, betas=(0.9, 0.95), weight_decay=0.0,
                              fused=device in ("cpu", "cuda"))]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: it rises, stays, and over the last 35% falls to 0."""
    return min((step + 1) / warmup, 1, (1 - step / steps) / 0.35)
