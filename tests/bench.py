"""
What is measured rather than tested: speed of a training step, memory of a large dataset, many kills.

    python tests/bench.py                               # a step under each mask, against matrix products
    ONEDNN_MAX_CPU_ISA=AVX2 python tests/bench.py
    python tests/bench.py --preset small --device cuda
    python tests/bench.py --records 665000              # Linux: 1 GB of records, as LLaVA-1.5 has
    python tests/bench.py --kills 200                   # train.py is killed and resumed
    python tests/bench.py --reads out/shapes/model.pt   # which words of a question its visual tokens read
"""
import argparse
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.llava import Records  # noqa: E402
from data.shapes import PLACES  # noqa: E402
from draw import attention_maps  # noqa: E402
from helpers import ROOT, kill_and_resume, make_tiny  # noqa: E402
from nanoaki import ANSWER, IMAGE, MASKS, PRESETS, PROMPT, NanoAKI  # noqa: E402
from sample import autocast, choose_device  # noqa: E402
from train import Muon, Settings, keep_freed_memory, make_optimizers, read_data  # noqa: E402


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matmul_rate(device: torch.device, rows: int, width: int) -> float:
    """FLOP/s of matrix products, the better of large squares and the model's own shape.

    In float32, on CUDA in bfloat16: what the model computes in.
    """
    dtype, rates = torch.bfloat16 if device.type == "cuda" else torch.float32, []
    for m, k, n in ((2048, 2048, 2048), (rows, width, 4 * width)):
        a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((m, k), (k, n)))
        repeat = max(1, int(2e10 / (2 * m * k * n)))
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeat):
                a @ b
            synchronize(device)
            rates.append(repeat * 2 * m * k * n / (time.perf_counter() - start))
    return max(rates)


def step_flops(model: NanoAKI, muon: Muon, batch: int, pictures: int, T: int) -> float:
    """FLOP in the matrix products of a step: forward, backward (twice that) and Muon's."""
    c = model.config
    patches = (c.image_size // c.patch_size) ** 2
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}

    def layers(prefix, tokens, width, depth):  # products with weights, then attention's two
        weights = sum(size for name, size in sizes.items() if name.startswith(prefix))
        return 2 * tokens * weights + 4 * tokens ** 2 * width * depth

    vit = layers("vit.blocks", patches, c.vit_embd, c.vit_layer)
    patch = 2 * patches * sizes["vit.patch.weight"]  # pixels need no gradient: backward once
    seen = 3 * (vit + layers("projector", c.visual_tokens, 0, 0)) + 2 * patch
    newton_schulz = 0
    for p in muon.param_groups[0]["params"]:
        short, long = sorted(p.shape)
        newton_schulz += 5 * (4 * short * short * long + 2 * short ** 3)
    decoder = 3 * layers("decoder.blocks", T, c.n_embd, c.n_layer)
    return pictures * seen + batch * decoder + newton_schulz


def bench_steps(args) -> None:
    device, reason = choose_device(args.device)
    print(reason)
    batch, config = args.batch_size, replace(PRESETS[args.preset], vocab_size=393)
    model = NanoAKI(config).to(device)
    optimizers = make_optimizers(model, 0.001, 0.001, 0.0)
    question, answer = 11, 4  # about as in shapes
    T, pictures = config.visual_tokens + question + answer, -(-batch // args.share)
    row = [IMAGE] * config.visual_tokens + [PROMPT] * question + [ANSWER] * answer
    roles, tokens = torch.tensor([row] * batch), torch.randint(0, 256, (batch, T))
    targets = torch.where(roles == ANSWER, tokens, -100)
    images = torch.randint(0, 256, (pictures, 3, config.image_size, config.image_size),
                           dtype=torch.uint8)
    index = torch.arange(batch) // args.share
    images, index, tokens, roles, targets = (t.to(device) for t in
                                             (images, index, tokens, roles, targets))

    def step(mask):
        with autocast(device):
            x = model.hidden(model.see(images)[index], tokens, roles, mask)
            loss = model.loss(x, roles, targets)
        loss.backward()
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
    rate = statistics.median(rates)
    flops = step_flops(model, optimizers[0], batch, pictures, T)
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; a step of {batch} examples about {pictures} "
          f"pictures, {T} positions: {flops / 1e9:.1f} GFLOP")
    for mask, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{mask:<8}{1e3 * median:>8.1f} ms a step{batch / median:>8.0f} samples/s"
              f"{flops / median / rate:>8.0%} of the matrix-product rate")


def synthesise(folder: Path, records: int) -> None:
    """As LLaVA-1.5's mixture: 1.5 kB and 5 questions a record; a thousand pictures."""
    rng = random.Random(0)
    (folder / "images").mkdir()
    for i in range(1000):
        Image.new("RGB", (24, 24), tuple(rng.choices(range(256), k=3))).save(folder / f"images/{i}.png")
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]
    questions, answers = ([" ".join(rng.choices(words, k=rng.randint(*size))) for _ in range(5000)]
                          for size in ((5, 12), (1, 50)))
    with open(folder / "train.json", "w") as f:
        for i in range(records):
            talk = [{"from": who, "value": rng.choice(texts)} for _ in range(rng.randint(1, 9))
                    for who, texts in (("human", questions), ("gpt", answers))]
            record = {"id": f"{i:012}", "image": f"images/{i % 1000}.png", "conversations": talk}
            f.write(("," if i else "[") + json.dumps(record) + "\n")
        f.write("]")


def memory(pid: int) -> tuple[int, int]:
    """(bytes, processes) of a process and all below it; shared pages count once (PSS)."""
    try:
        pss = int(re.search(r"Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1]) * 1024
        below = [memory(int(child)) for task in Path(f"/proc/{pid}/task").iterdir()
                 for child in (task / "children").read_text().split()]
    except (OSError, TypeError):  # it has just ended
        return 0, 0
    return pss + sum(b for b, _ in below), 1 + sum(n for _, n in below)


def bench_records(records: int) -> None:
    """What train.py's processes hold, four workers among them, under each way to start processes."""
    code = ("import sys, torch.multiprocessing as m; m.set_start_method(sys.argv[1]); "
            "import train; train.main(sys.argv[2:])")
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        synthesise(folder, records)
        began = time.perf_counter()
        Records.read(folder, "train.json")
        print(f"{records:,} records, {(folder / 'train.json').stat().st_size / 1e9:.2f} GB: read and "
              f"checked in {time.perf_counter() - began:.0f} s", flush=True)
        for method in ("fork", "spawn", "forkserver"):
            out, began, peak, steps = folder / method, time.perf_counter(), 0, 0
            log = folder / f"{method}.log"  # not a pipe: a full one would stop the run
            run = subprocess.Popen(
                [sys.executable, "-c", code, method, "--data", str(folder), "--out", str(out), "--workers", "4",
                 "--block-size", "1024", "--batch-size", "8", "--eval-every", "10", "--eval-sample", "8"],
                cwd=ROOT, stdout=subprocess.DEVNULL, stderr=open(log, "w"))
            started = None
            while run.poll() is None and steps < 1:
                time.sleep(0.5)
                held, processes = memory(run.pid)
                peak = max(peak, held)
                if started is None and (out / "last.pt").exists():
                    started = time.perf_counter() - began
                steps = (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("step")
            if run.poll() is not None:
                sys.exit(log.read_text())
            held, processes = memory(run.pid)
            run.send_signal(signal.SIGTERM)
            run.wait()
            print(f"{method:<12}{started:>6.0f} s to the first step; after ten: {held / 2**30:.2f} GiB in "
                  f"{processes} processes (at most, while reading: {peak / 2**30:.2f})", flush=True)


def bench_kills(kills: int) -> None:
    with TemporaryDirectory() as folder:
        kill_and_resume(make_tiny(Path(folder) / "data", n=60), Path(folder), kills)
    print(f"{kills} kills: every run ended with the tensors and metrics of one that was never killed")


def bench_reads(path: str, questions: int = 150) -> None:
    """Attention of visual tokens to the words of `rel` questions: on the object named, and elsewhere."""
    model, found = NanoAKI.load(path), {}
    folder, _ = read_data(Settings())
    names = {caption["image"]: caption["conversations"][1]["value"]
             for caption in json.loads((folder / "captions.json").read_text())}
    records = [r for r in json.loads((folder / "train.json").read_text()) if r["task"] == "rel"][:questions]
    side = round(model.config.visual_tokens ** 0.5)
    for record in records:
        question, caption = record["conversations"][0]["value"][len("<image>\n"):], names[record["image"]]
        direction, color, shape = re.match(r"what is (\w+).* (\w+) (\w+)\?", question).groups()
        place = next(p for p in PLACES if f"{p} {color} {shape}" in caption.split(", "))
        on = torch.zeros(3, 3, dtype=torch.bool)
        on.view(-1)[PLACES.index(place)] = True
        on = on.repeat_interleave(side // 3, 0).repeat_interleave(side // 3, 1).flatten()
        maps = attention_maps(model, [Image.open(folder / record["image"])], question)
        kinds = {direction: "direction", color: "color", shape: "shape"}
        for i, word in enumerate(maps.words):
            weights = maps.reads[:, :, i].mean(1)  # (layers, visual tokens)
            found.setdefault(kinds.get(word.strip("?"), word), []).append(
                torch.stack([weights.mean(-1), weights[:, on].mean(-1), weights[:, ~on].mean(-1)]))
    print(f"{len(records)} questions as 'what is left of the red circle?': share of a visual token's attention, by "
          f"layer\n{'word':<12}{'all tokens':<28}{'on the object named':<28}elsewhere")
    for word, values in found.items():
        print(f"{word:<12}" + "".join("".join(f"{share:>6.1%}" for share in row).ljust(28)
                                      for row in torch.stack(values).mean(0).tolist()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=Settings().batch_size)
    parser.add_argument("--share", type=int, default=Settings().share)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--records", type=int, help="memory with that many records, instead")
    parser.add_argument("--kills", type=int, help="kill that often, instead")
    parser.add_argument("--reads", metavar="FILE", help="what visual tokens of that model read, instead")
    args = parser.parse_args()
    if args.records:
        bench_records(args.records)
    elif args.reads:
        bench_reads(args.reads)
    elif args.kills:
        bench_kills(args.kills)
    else:
        keep_freed_memory()
        bench_steps(args)
