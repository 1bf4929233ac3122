"""
What is measured rather than tested: speed on this machine.

    python tests/bench.py                        # a training step under each mask, against matmul
    ONEDNN_MAX_CPU_ISA=AVX2 python tests/bench.py
    python tests/bench.py --preset small --device cuda
"""
import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from nanoaki import ANSWER, IMAGE, MASKS, PRESETS, PROMPT, NanoAKI  # noqa: E402
from train import (Settings, autocast, choose_device, keep_freed_memory,  # noqa: E402
                   make_optimizers)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matmul_rate(device: torch.device, rows: int, width: int) -> float:
    """FLOP/s of float32 matrix products (bfloat16 on CUDA): large square ones, or the model's own."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = []
    for m, k, n in ((2048, 2048, 2048), (rows, width, 4 * width)):
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        repeat = max(1, int(2e10 / (2 * m * k * n)))
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeat):
                a @ b
            synchronize(device)
            rates.append(repeat * 2 * m * k * n / (time.perf_counter() - start))
    return max(rates)


def step_flops(model: NanoAKI, batch: int, T: int) -> float:
    """Matrix products of a training step, forward and backward (twice the forward), attention included."""
    c = model.config
    patches = (c.image_size // c.patch_size) ** 2
    size = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}
    vit = 2 * patches * sum(v for n, v in size.items() if n.startswith("vit.blocks"))
    vit += 4 * patches ** 2 * c.vit_embd * c.vit_layer
    patch = 2 * patches * size["vit.patch.weight"]  # has no gradient to pass on: once forward, once back
    rest = 2 * c.visual_tokens * sum(v for n, v in size.items() if n.startswith("projector"))
    rest += 2 * T * sum(v for n, v in size.items() if n.startswith("decoder.blocks"))
    rest += 4 * T ** 2 * c.n_embd * c.n_layer
    return batch * (3 * (vit + rest) + 2 * patch)


def bench_steps(args) -> None:
    device, reason = choose_device(args.device)
    print(reason)
    config = replace(PRESETS[args.preset], vocab_size=393)
    settings, batch = Settings(), args.batch_size
    model = NanoAKI(config).to(device)
    optimizers = make_optimizers(model, settings.lr, settings.adamw_lr, 0.0)
    question, answer = 11, 4  # as in shapes
    T = config.visual_tokens + question + answer
    roles = torch.tensor([[IMAGE] * config.visual_tokens + [PROMPT] * question + [ANSWER] * answer] * batch)
    tokens = torch.randint(0, 256, (batch, T))
    targets = torch.where(roles == ANSWER, tokens, -100)
    images = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), dtype=torch.uint8)
    images, tokens, roles, targets = (t.to(device) for t in (images, tokens, roles, targets))

    def step(mask):
        with autocast(device):
            model.loss(images, tokens, roles, targets, mask).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    times, rates = {mask: [] for mask in MASKS}, []
    for mask in MASKS:
        step(mask)
    for _ in range(args.rounds):  # in turn, so that a slow moment of the machine hits all alike
        rates.append(matmul_rate(device, batch * T, config.n_embd))
        for mask in MASKS:
            synchronize(device)
            start = time.perf_counter()
            step(mask)
            synchronize(device)
            times[mask].append(time.perf_counter() - start)
    rate, flops = statistics.median(rates), step_flops(model, batch, T)
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; a step of {batch} examples, {T} positions: "
          f"{flops / 1e9:.1f} GFLOP without the optimizer's")
    for mask, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{mask:<8}{1e3 * median:>8.1f} ms a step{batch / median:>8.0f} samples/s"
              f"{flops / median / rate:>8.0%} of the matrix-product rate")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=Settings().batch_size)
    parser.add_argument("--rounds", type=int, default=30)
    keep_freed_memory()
    bench_steps(parser.parse_args())
