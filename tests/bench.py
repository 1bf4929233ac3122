"""
What is measured rather than tested: time of a step, memory of a large dataset, many kills.

    python tests/bench.py                               # a step under each mask
    ONEDNN_MAX_CPU_ISA=AVX2 python tests/bench.py
    python tests/bench.py --preset small --device cuda
    python tests/bench.py --tokens 4096 --device cuda   # attention at length: dense, flex, causal
    python tests/bench.py --questions 10                # about a picture, in turn: what can be kept
    python tests/bench.py --records 665000              # Linux: 1 GB of records, as LLaVA-1.5 has
    python tests/bench.py --kills 200                   # train.py is killed and resumed
    python tests/bench.py --reads out/shapes/model.pt   # which words visual tokens attend to
    python tests/bench.py --probe out/shapes/model.pt   # what visual tokens' states tell, by layer
    python tests/bench.py --page docs/page.html         # a redraw of a page in Chromium
    python tests/bench.py --growth things 12=DIR 54=DIR --lr 0.002  # compare.py's: DIR is a seed's
"""
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
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from compare import COLORS  # noqa: E402
from compare import Run as Compared  # noqa: E402
from data import shapes  # noqa: E402
from data.llava import Records  # noqa: E402
from data.scenes import PLACES  # noqa: E402
from engine.attention import attention_maps  # noqa: E402
from engine.charts import chart  # noqa: E402
from engine.checkpoint import Progress  # noqa: E402
from engine.device import choose_device, keep_freed_memory  # noqa: E402
from engine.flags import Parser, one_line, run_script  # noqa: E402
from engine.optimizer import Muon  # noqa: E402
from engine.pictures import GAP, frame, join, legend  # noqa: E402
from helpers import ROOT, kill_and_resume, make_tiny  # noqa: E402
from nanoaki import (ANSWER, IMAGE, MASKS, PAD, PRESETS, PROMPT, Batch, Cache, Model,  # noqa: E402
                     NanoAKI, attend, make_block_mask, make_mask, positions)
from train import Run, Settings, Stage  # noqa: E402


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


def step_flops(model: NanoAKI, muon: Muon, batch: int, pictures: int, T: int, start: int) -> float:
    """FLOP in the matrix products of a step: forward, backward (twice that) and Muon's.

    Of T columns, the last decoder block computes those from start on, but keys and values of all.
    """
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
    for group in muon.param_groups:
        for p in group["params"]:
            short, long = sorted((p.shape[0] // group["parts"], p.shape[1]))
            newton_schulz += group["parts"] * 5 * (4 * short * short * long + 2 * short ** 3)
    whole, last = (layers("decoder.blocks", tokens, c.n_embd, c.n_layer) / c.n_layer
                   for tokens in (T, T - start))
    last += 6 * start * c.n_embd ** 2 + 4 * (T - start) * start * c.n_embd  # their keys and values
    decoder = 3 * ((c.n_layer - 1) * whole + last)
    return pictures * seen + batch * decoder + newton_schulz


def random_batch(config, batch_size: int, pictures: int, question: int, answer: int,
                 order: str = "image") -> Batch:
    """Examples of one length, each about one of some pictures, before or after its question."""
    row = [IMAGE] * config.visual_tokens + [PROMPT] * question
    if order == "text":  # but for the <answer> marker
        row = row[1 - question:] + row[:1 - question]
    row += [ANSWER] * answer
    roles = torch.tensor([row] * batch_size)
    tokens = torch.randint(0, 256, roles.shape)
    side = config.image_size
    images = torch.randint(0, 256, (pictures, 3, side, side), dtype=torch.uint8)
    return Batch(images, torch.arange(batch_size) * pictures // batch_size, tokens, roles,
                 targets=torch.where(roles == ANSWER, tokens, -100),
                 visual=(roles == IMAGE).flatten().nonzero()[:, 0],
                 learned=(roles == ANSWER).flatten().nonzero()[:, 0],
                 start=config.visual_tokens + question - 1, ids=[], problem="", unread=[])


def bench_steps(args) -> None:
    """A step of train.py under each mask, on a random batch, against matrix products.

    And under `text`: causal, with the picture after the question.
    """
    device, reason = choose_device(args.device)
    print(reason)
    size, pictures = args.batch_size, -(-args.batch_size // args.share)
    config = replace(PRESETS[args.preset], vocab_size=393)
    batch, other = (random_batch(config, size, pictures, 11, 4, order)  # about as in shapes
                    for order in ("image", "text"))
    entries = {name: (Stage("instruct", 1, None, None, mask, 2500, 0.001, 500, 500), some)
               for name, mask, some in [*((mask, mask, batch) for mask in MASKS),
                                        ("text", "causal", other)]}
    times, rates, T = {name: [] for name in entries}, [], batch.tokens.shape[1]
    with TemporaryDirectory() as folder:
        stages = [stage for stage, _ in entries.values()]
        run = Run(Settings(out=folder), NanoAKI(config).to(device), stages, device, Progress())
        run.make_optimizers()
        for stage, some in entries.values():
            run.step(stage, (some,), len(some.learned))
        for _ in range(args.rounds):  # in turn, so that a slow moment hits all masks alike
            rates.append(matmul_rate(device, size * T, config.n_embd))
            for name, (stage, some) in entries.items():
                synchronize(device)
                start = time.perf_counter()
                run.step(stage, (some,), len(some.learned))
                synchronize(device)
                times[name].append(time.perf_counter() - start)
        flops = step_flops(run.model, run.optimizers[0], size, pictures, T, batch.start)
    rate = statistics.median(rates)
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; a step of {size} examples about {pictures} "
          f"pictures, {T} positions: {flops / 1e9:.1f} GFLOP")
    causal = statistics.median(times["causal"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:<8}{1e3 * median:>8.1f} ms a step{median / causal:>6.2f} of causal's"
              f"{size / median:>8.0f} samples/s{flops / median / rate:>8.0%} of the "
              f"matrix-product rate")


@torch.no_grad()
def answer_in_turn(model: Model, image, questions, answer: int, mask: str, keep: str):
    """(logits of the answers, seconds) of questions (n, tokens) about a picture, one by one.

    What is kept of the picture for the next question: "nothing", its "visual tokens", or their
    "keys" and values, which are right where no visual token sees a question.
    """
    (n, asked), V, device = questions.shape, model.config.visual_tokens, questions.device
    T, caches, logits, seconds = V + asked, None, [], []
    roles = torch.tensor([[IMAGE] * V + [PROMPT] * asked + [ANSWER] * answer], device=device)
    sees, at = make_mask(mask, roles)[:, None], positions(roles)
    for question in questions:
        synchronize(device)
        start = time.perf_counter()
        if keep == "nothing" or not logits:
            visual = model.see(image)
        known = V if keep == "keys" and logits else 0
        if not known:
            caches = [Cache(T + answer) for _ in model.decoder.blocks]
        for cache in caches:
            cache.filled = known
        tokens = F.pad(question, (V, 0))[None]
        x = model.embed(visual, torch.arange(V, device=device), tokens, roles[:, :T])[:, known:]
        x = model.decoder(x, sees[:, :, known:T, :T], caches, T - known - 1)
        for t in range(T, T + answer):
            logits.append(model.decoder.head(x[:, -1]))
            new = logits[-1].argmax(-1)
            if t + 1 < T + answer:
                x = (model.decoder.token(new) + model.decoder.position(at[:, t]))[:, None]
                x = model.decoder(x, sees[:, :, t:t + 1, :t + 1], caches)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return torch.cat(logits), seconds


def bench_questions(args) -> None:
    """The first question about a picture, and all of them in turn: 11 tokens, answers of 4."""
    if args.questions < 1:
        raise ValueError(f"--questions must be at least 1, not {args.questions}")
    device, reason = choose_device(args.device)
    print(reason)
    config = replace(PRESETS[args.preset], vocab_size=393)
    model = Model(config).to(device).eval()
    image = torch.randint(0, 256, (1, 3, config.image_size, config.image_size), dtype=torch.uint8)
    questions = torch.randint(0, 256, (args.questions, 11), device=device)
    kinds = [("causal", "nothing"), ("mma", "nothing"), ("prefix", "nothing"),
             ("causal", "visual tokens"), ("mma", "visual tokens"), ("causal", "keys")]
    times, answers = {kind: [] for kind in kinds}, {}
    for n in range(args.rounds + 1):  # in turn; the first warms up
        for kind in kinds:
            answers[kind], seconds = answer_in_turn(model, image.to(device), questions, 4, *kind)
            times[kind].append(seconds)
    print(f"{args.preset}, {config.visual_tokens} visual tokens, {args.questions} questions about "
          f"one picture, one after another; ms, medians of {args.rounds} rounds")
    for mask, keep in kinds:
        rounds = times[mask, keep][1:]
        first, whole = (1e3 * statistics.median(some) for some in zip(
            *((seconds[0], sum(seconds)) for seconds in rounds)))
        apart = (answers[mask, keep] - answers[mask, "nothing"]).abs().max()
        print(f"{mask:<8}{keep + ' kept':<20}{first:>9.1f} the first{whole:>9.1f} all; logits "
              f"within {apart:.0e} of those with nothing kept")


def bench_length(args) -> None:
    """Attention of 12 blocks at a length: flash under causal, flex and dense under MMA.

    Half of a row is visual tokens, a quarter the question, the rest the answer. A CPU has no
    backward of flex_attention: there it is the forward.
    """
    device, reason = choose_device(args.device)
    print(reason)
    T, gpu = args.tokens, device.type == "cuda"
    roles = torch.full((args.batch_size, T), ANSWER, device=device)
    roles[:, :3 * T // 4] = PROMPT
    roles[:, :T // 2] = IMAGE
    shape, dtype = (args.batch_size, 12, T, 64), torch.bfloat16 if gpu else torch.float32
    q, k, v, g = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_(gpu)
    kinds = {"causal, flash": lambda: None,
             "mma, dense": lambda: make_mask("mma", roles)[:, None],
             "mma, flex": lambda: make_block_mask("mma", roles),
             "causal, flex": lambda: make_block_mask("causal", roles)}
    times, memory, first = {kind: [] for kind in kinds}, {}, {}
    for n in range(args.rounds + 1):  # in turn; the first compiles
        for kind, make in kinds.items():
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            synchronize(device)
            start, mask = time.perf_counter(), make()  # once for all blocks
            for _ in range(12):
                q.grad = k.grad = v.grad = None
                if mask is None:
                    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                else:
                    y = attend(q, k, v, mask, 0.0)
                if gpu:
                    y.backward(g)
            synchronize(device)
            times[kind].append(time.perf_counter() - start)
            if gpu:
                memory[kind] = torch.cuda.max_memory_allocated() / 2 ** 20
            if n == 0:
                first[kind] = [y.detach()] + [x.grad for x in (q, k, v) if gpu]
    apart = [(a - b).abs().max().item() for a, b in zip(first["mma, dense"], first["mma, flex"])]
    what = "forward and backward" if gpu else "forward alone"
    print(f"{args.batch_size} rows of {T} tokens, 12 heads of 64, {what}; under MMA, flex and dense "
          f"differ by at most {max(apart):.1e}")
    flash = statistics.median(times["causal, flash"][1:])
    for kind, seconds in times.items():
        median = statistics.median(seconds[1:])
        print(f"{kind:<16}{1e3 * median:>10.1f} ms{median / flash:>8.2f} of flash"
              + (f"{memory[kind]:>10.0f} MiB at most" if gpu else ""))


def synthesise(folder: Path, records: int) -> None:
    """As LLaVA-1.5's mixture: 1.5 kB and 5 questions a record; a thousand pictures."""
    rng = random.Random(0)
    (folder / "images").mkdir()
    for i in range(1000):
        color = tuple(rng.choices(range(256), k=3))
        Image.new("RGB", (24, 24), color).save(folder / f"images/{i}.png")
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
             for _ in range(2000)]
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
        pss = re.search(r"Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1]
        below = [memory(int(child)) for task in Path(f"/proc/{pid}/task").iterdir()
                 for child in (task / "children").read_text().split()]
    except (OSError, TypeError):  # it has just ended
        return 0, 0
    return 1024 * int(pss) + sum(b for b, _ in below), 1 + sum(n for _, n in below)


def bench_records(records: int) -> None:
    """What train.py's processes hold, four workers among them, however processes are started."""
    code = ("import sys, torch.multiprocessing as m; m.set_start_method(sys.argv[1]); "
            "import train; train.main(sys.argv[2:])")
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        synthesise(folder, records)
        began = time.perf_counter()
        Records.read(folder, "train.json")
        print(f"{records:,} records, {(folder / 'train.json').stat().st_size / 1e9:.2f} GB: read "
              f"and checked in {time.perf_counter() - began:.0f} s", flush=True)
        for method in ("fork", "spawn", "forkserver"):
            out, began, peak, steps = folder / method, time.perf_counter(), 0, 0
            log = folder / f"{method}.log"  # not a pipe: a full one would stop the run
            run = subprocess.Popen(
                [sys.executable, "-c", code, method, "--data", str(folder), "--out", str(out),
                 "--workers", "4", "--block-size", "1024", "--batch-size", "8", "--eval-every",
                 "10", "--eval-sample", "8"],
                cwd=ROOT, stdout=subprocess.DEVNULL, stderr=open(log, "w"))
            started = None
            while run.poll() is None and steps < 1:
                time.sleep(0.5)
                held, _ = memory(run.pid)
                peak = max(peak, held)
                if started is None and (out / "last.pt").exists():
                    started = time.perf_counter() - began
                if (out / "metrics.jsonl").exists():
                    steps = (out / "metrics.jsonl").read_text().count("step")
            if run.poll() is not None:
                sys.exit(log.read_text())
            held, processes = memory(run.pid)
            run.send_signal(signal.SIGTERM)
            run.wait()
            print(f"{method:<12}{started:>6.0f} s to the first step; after ten: "
                  f"{held / 2**30:.2f} GiB in {processes} processes (at most, while reading: "
                  f"{peak / 2**30:.2f})", flush=True)


def bench_kills(kills: int) -> None:
    with TemporaryDirectory() as folder:
        kill_and_resume(make_tiny(Path(folder) / "data", n=60), Path(folder), kills)
    print(f"{kills} kills: every run ended as one that was never killed, in tensors and metrics")


def bench_reads(path: str, questions: int = 150) -> None:
    """Attention of visual tokens to words of `rel` questions: on the object named, elsewhere."""
    model, found, folder = NanoAKI.load(path), {}, shapes.find("shapes")
    talks = {caption["image"]: [turn["value"] for turn in caption["conversations"]]
             for caption in json.loads((folder / "captions.json").read_text())}
    names = {image: said for image, (asked, said) in talks.items() if "the picture" in asked}
    records = [record for record in json.loads((folder / "train.json").read_text())
               if record["task"] == "rel" and record["image"] in names][:questions]
    side = round(model.config.visual_tokens ** 0.5)
    for record in records:
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        direction, color, shape = re.match(r"what is (\w+).* (\w+) (\w+)\?", question).groups()
        objects = names[record["image"]].split(", ")
        place = next(p for p in PLACES if f"{p} {color} {shape}" in objects)
        on = torch.zeros(3, 3, dtype=torch.bool)
        on.view(-1)[PLACES.index(place)] = True
        on = on.repeat_interleave(side // 3, 0).repeat_interleave(side // 3, 1).flatten()
        maps = attention_maps(model, [Image.open(folder / record["image"])], question)
        kinds = {direction: "direction", color: "color", shape: "shape"}
        for i, word in enumerate(maps.words):
            weights = maps.reads[:, :, i].mean(1)  # (layers, visual tokens)
            found.setdefault(kinds.get(word.strip("?"), word), []).append(torch.stack(
                [weights.mean(-1), weights[:, on].mean(-1), weights[:, ~on].mean(-1)]))
    print(f"{len(records)} questions as 'what is left of the red circle?': share of a visual "
          f"token's attention, by layer\n"
          f"{'word':<12}{'all tokens':<28}{'on the object named':<28}elsewhere")
    for word, values in found.items():
        print(f"{word:<12}" + "".join("".join(f"{share:>6.1%}" for share in row).ljust(28)
                                      for row in torch.stack(values).mean(0).tolist()))


def named_things(folder: Path, questions: int) -> list[tuple]:
    """(picture, question, the thing it names, thing at each place that has one) of train.json.

    What stands where is what the picture's caption says, where that says it.
    """
    talks = {caption["image"]: [turn["value"] for turn in caption["conversations"]]
             for caption in json.loads((folder / "captions.json").read_text())}
    captions = {image: said for image, (asked, said) in talks.items() if "the picture" in asked}
    found = []
    for record in json.loads((folder / "train.json").read_text()):
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        named = re.fullmatch(r"(?:where is|what is (?:left of|right of|above|below)) the (.+)\?",
                             question)
        if named and record["image"] in captions:
            things = {}
            for part in captions[record["image"]].split(", "):
                place = max((place for place in PLACES if part.startswith(place + " ")), key=len)
                things[PLACES.index(place)] = part.removeprefix(place + " ")
            if list(things.values()).count(named[1]) == 1:  # not by a trait, as "the circle"
                found.append((folder / record["image"], question, named[1], things))
    if len(found) < 3:
        raise ValueError(f"{folder}: no questions of scenes that name a thing of their picture")
    return found[:questions]


def classify(x: torch.Tensor, labels: torch.Tensor, learn: torch.Tensor) -> torch.Tensor:
    """Scores (n, classes) of states x (n, C) by the ridge regression of those to learn from."""
    x, one_hot = F.pad(x, (0, 1), value=1.0), F.one_hot(labels).float()
    a = x[learn].T @ x[learn] + 1e-3 * int(learn.sum()) * torch.eye(x.shape[1])
    return x @ torch.linalg.solve(a, x[learn].T @ one_hot[learn])


def find_named(x: torch.Tensor, named: torch.Tensor, there: torch.Tensor,
               test: torch.Tensor) -> float:
    """How often, of a picture's tokens with a thing, the likeliest is of the one that is named.

    x (questions, V, features), named and there bool (questions, V), test bool (questions,).
    """
    learn = (there & ~test[:, None]).flatten()
    score = classify(x.flatten(0, 1), named.flatten().long(), learn)[:, 1].view(named.shape)
    best = score.masked_fill(~there, -torch.inf).argmax(1, keepdim=True)
    return named.gather(1, best)[test].float().mean().item()


def bench_probe(path: str, data: str, questions: int = 3000) -> None:
    """What linear probes read from states after each block; every third picture tests them.

    From a visual token's: which thing stands in its place, in which place it stands, whether it is
    the one that the question names. From the <answer> marker's: in which place that one stands.
    By chance: the probe for the one named, given thing and place, and nothing of the question.
    """
    model, rows = NanoAKI.load(path), named_things(shapes.find(data), questions)
    V, found = model.config.visual_tokens, []
    for at in range(0, len(rows), 250):
        some, states = rows[at:at + 250], []
        hooks = [part.register_forward_pre_hook(lambda part, given: states.append(given[0]))
                 for part in (*model.decoder.blocks, model.decoder.norm)]
        images, tokens, roles = model.prompt([row[0] for row in some], [row[1] for row in some])
        with torch.no_grad():
            model.hidden(images, tokens, roles)
        for hook in hooks:
            hook.remove()
        last = (roles != PAD).sum(1) - 1
        found.append((torch.stack([x[roles == IMAGE].view(len(some), V, -1) for x in states]),
                      torch.stack([x[torch.arange(len(some)), last] for x in states])))
    visual, marker = (torch.cat(part, 1) for part in zip(*found))  # (layers, questions, ...)
    side = round(V ** 0.5)
    grid = torch.arange(side) * 3 // side
    place = (3 * grid[:, None] + grid).flatten().expand(len(rows), V)
    names = sorted({thing for row in rows for thing in row[3].values()})
    things = torch.tensor([[names.index(row[3][p]) if p in row[3] else -1 for p in range(9)]
                           for row in rows])
    asked = torch.tensor([names.index(row[2]) for row in rows])
    thing = things.gather(1, place)                                # (questions, V); -1: nothing
    there, named = thing >= 0, thing == asked[:, None]
    pictures = sorted({row[0] for row in rows})
    test = torch.tensor([row[0] in set(pictures[::3]) for row in rows])
    learn, ask = (there & ~test[:, None]).flatten(), (there & test[:, None]).flatten()
    known = torch.cat([F.one_hot(thing.clamp(min=0)), F.one_hot(place)], 2).float()
    print(f"{path}, {model.config.mask}: {len(rows)} questions about {len(pictures)} pictures, "
          f"{int(test.sum())} of them to test on, {len(names)} things\n"
          f"{'after':<12}{'thing':>8}{'place':>8}{'named':>8}{'its place, from <answer>':>28}\n"
          f"{'by chance':<28}{find_named(known, named, there, test):>8.1%}")
    for n, (x, y) in enumerate(zip(visual, marker)):
        right = []
        for labels in (thing.clamp(min=0).flatten(), place.flatten()):
            scores = classify(x.flatten(0, 1), labels, learn)
            right.append((scores.argmax(1) == labels)[ask].float().mean().item())
        where = (things == asked[:, None]).long().argmax(1)
        its_place = (classify(y, where, ~test).argmax(1) == where)[test].float().mean().item()
        print(f"{f'block {n}' if n else 'projector':<12}{right[0]:>8.1%}{right[1]:>8.1%}"
              f"{find_named(x, named, there, test):>8.1%}{its_place:>28.1%}")


def draw_growth(panels: list[list[str]], lr: float) -> Image.Image:
    """Test accuracy of causal and MMA over what differs between comparisons, a panel each.

    A panel is its title, then number=folder of a seed in compare.py's folder, at that rate; of more
    seeds than one the mean is drawn, and a band of all. Raises ValueError on anything else,
    FileNotFoundError where a run has no answers.
    """
    charts = []
    for title, *points in panels:
        if not points or not all(re.fullmatch(r"[0-9]+=.+", point) for point in points):
            raise ValueError(f"--growth {title!r}: a title and number=folder, not {points}")
        curves = {"causal": {}, "mma": {}}
        for point in points:
            number, _, folder = point.partition("=")
            for entry, curve in curves.items():
                run = Compared(Path(folder, f"{entry}-{lr:g}"), {}, "test", entry)
                found = 100 * run.scores()["accuracy"]["all"]
                curve.setdefault(int(number), []).append(found)
                print(f"{number} {title}, {folder}: {entry} {found:.1f}%")
        measured = {number: (225, 225, 225) for number in curves["mma"]}
        charts.append(chart(f"accuracy (%) over {title}", curves, COLORS, max(measured),
                            marks=measured))
    key = legend([(entry, COLORS[entry]) for entry in curves], charts[0].width)
    return frame(join([key, join(charts, gap=GAP)], down=True, gap=10))


def bench_page(path: Path) -> None:
    """From a key to the page's new style, layout and grid, with one mask and with all of them."""
    from browser import Browser, find_chromium
    if not path.is_file():
        sys.exit(f"{path}: no such file")
    browser = Browser(find_chromium() or sys.exit("there is no Chromium here"))
    browser.open(path)
    if browser.run("document.querySelector('button.token') === null"):
        browser.close()
        sys.exit(f"{path}: no tokens in it: give a page of draw.py")
    redraw = """[...Array(210).keys()].map(i => {
      const start = performance.now(), key = ["l", "r", "ArrowRight"][i % 3];
      document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      document.body.getBoundingClientRect();
      document.querySelectorAll(".panel:not([hidden]) canvas").forEach(grid =>
        grid.getContext("2d").getImageData(0, 0, 1, 1));
      return performance.now() - start;
    }).slice(10)"""
    for name, key in (("one mask", ""), ("all masks", "b")):
        if key:
            browser.key(key)
        times = sorted(browser.run(redraw))
        print(f"{name}: {statistics.median(times):.1f} ms a redraw, 95% within {times[189]:.1f} ms")
    browser.close()


def make_parser() -> Parser:
    parser, defaults = Parser(__doc__), Settings()
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--share", type=int, default=defaults.share)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, help="attention at that length, instead")
    parser.add_argument("--questions", type=int, help="so many about a picture in turn, instead")
    parser.add_argument("--records", type=int, help="memory with that many records, instead")
    parser.add_argument("--kills", type=int, help="kill that often, instead")
    parser.add_argument("--reads", metavar="FILE", help="what visual tokens of a model attend to, "
                                                        "instead")
    parser.add_argument("--probe", metavar="FILE", help="what visual tokens of a model tell, "
                                                        "instead, of the pictures in --data")
    parser.add_argument("--data", default=defaults.data)
    parser.add_argument("--page", metavar="FILE", type=Path,
                        help="a redraw of a page of draw.py, instead")
    parser.add_argument("--growth", metavar="ARGUMENT", nargs="+", action="append",
                        help="draw growth.png, instead: a title and number=folder, for each panel")
    parser.add_argument("--lr", type=float, default=defaults.lr, help="of the runs for --growth")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with one_line():
        if args.records:
            bench_records(args.records)
        elif args.reads:
            bench_reads(args.reads)
        elif args.probe:
            bench_probe(args.probe, args.data)
        elif args.questions is not None:
            bench_questions(args)
        elif args.page:
            bench_page(args.page)
        elif args.growth:
            draw_growth(args.growth, args.lr).save("growth.png")
        elif args.kills:
            bench_kills(args.kills)
        elif args.tokens:
            bench_length(args)
        else:
            keep_freed_memory()
            bench_steps(args)


if __name__ == "__main__":
    run_script(main)
