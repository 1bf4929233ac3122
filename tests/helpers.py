"""A tiny dataset and a tiny model for it, which learn in seconds; and processes to end early."""
import json
import multiprocessing
import os
import random
import signal
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import train
from engine.folder import hold

ROOT = Path(__file__).parent.parent

COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220),
          "white": (250, 250, 250)}
SIDES = ["left", "right"]

TINY = ["--image-size", "16", "--patch-size", "8", "--n-embd", "32", "--n-head", "2", "--n-layer",
        "2", "--vit-embd", "32", "--vit-head", "2", "--vit-layer", "1", "--block-size", "64",
        "--batch-size", "32", "--workers", "0", "--device", "cpu"]


def make_tiny(folder: Path, n: int = 240, shuffled: bool = False) -> Path:
    """Two-coloured pictures; "what color is left?" and "... right?". Shuffled: wrong pictures."""
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    captions = []
    for split, count in (("train", n), ("val", n // 6), ("test", n // 6)):
        records = []
        for i in range(count):
            two = [rng.choice(list(COLORS)) for _ in SIDES]
            image = Image.new("RGB", (16, 16), COLORS[two[0]])
            image.paste(COLORS[two[1]], (8, 0, 16, 16))
            image.save(folder / f"images/{split}{i}.png")
            shown = f"images/{split}{rng.randrange(count) if shuffled else i}.png"
            for side, color in zip(SIDES, two):
                records.append({"id": f"{split}-{i}-{side}", "image": shown, "task": side,
                                "conversations": [
                                    {"from": "human", "value": f"<image>\nwhat color is {side}?"},
                                    {"from": "gpt", "value": color}]})
            if split == "train":
                captions.append({"id": f"c{i}", "image": shown, "conversations": [
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": " ".join(two)}]})
        (folder / f"{split}.json").write_text(json.dumps(records))
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what time makes of them."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_second")}
            for line in lines]


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(capsys, main, *argv) -> str:
    """The one line that a command refuses with."""
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1, error
    return error


def refused_at_last(capsys, main, *argv) -> str:
    """What a command that has begun, and said things, ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    assert e.value.code == 2
    return capsys.readouterr().err


def spoil(path: Path) -> None:
    """Make a PNG undecodable, in a way that only decoding it shows."""
    data = path.read_bytes()
    start = data.index(b"IDAT")
    size = int.from_bytes(data[start - 4:start], "big")
    body = b"IDAT" + bytes(size)
    path.write_bytes(data[:start] + body + zlib.crc32(body).to_bytes(4, "big")
                     + data[start + 4 + size + 4:])


# Processes ---------------------------------------------------------------------------------------

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "helpers", "torch._dynamo"])  # the last: optimizers need it


@contextmanager
def started(log: Path, work, *args, **environment: str):
    """work(*args) in a process and session of its own, its output in a file; killed at the end.

    It is forked from one that has imported torch and done nothing yet, so it starts at once.
    """
    process = SERVER.Process(target=run_logged, args=(log, environment, work, args))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for what the server imports
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run_logged(log: Path, environment: dict, work, args) -> None:
    multiprocessing.set_start_method("fork", force=True)  # Linux's own, not that of this process
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # as loaders begin
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(*args)


def wait_for(process, is_so) -> None:
    """Wait until something is so; fail where the process ends before, or after a minute."""
    deadline = time.time() + 60
    while not is_so():
        assert time.time() < deadline and process.is_alive()
        time.sleep(0.002)


@contextmanager
def held(folder: Path):
    """A folder that another process is at work in."""
    ours, theirs = multiprocessing.Pipe()

    def child():
        try:
            with hold(folder):
                theirs.send(True)
                theirs.recv()
        except ValueError:
            theirs.send(False)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send("enough")
        process.join()


def kill_and_resume(data: Path, folder: Path, kills: int) -> None:
    """Kill runs at random moments and go on with them: each has to end as one that was not killed.

    A checkpoint is written after every step, so kills fall into its writing as well.
    """
    command = ["--data", str(data), *TINY, "--align-steps", "30", "--steps", "60", "--eval-every",
               "15", "--save-every", "0", "--out"]
    rng, whole, log, n, killed = random.Random(0), folder / "whole", folder / "log", 0, 0
    with started(log, train.main, [*command, str(whole)]) as process:
        process.join()
        assert process.exitcode == 0, log.read_text()
    length = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    while True:
        out = folder / f"cut{n}"
        last = out / "last.pt"
        before = last.stat().st_mtime_ns if last.exists() else None
        argv = [*(["--resume", "--out"] if before else command), str(out)]
        with started(log, train.main, argv) as process:
            if killed < kills:
                while process.is_alive() and (not last.exists() or
                                              last.stat().st_mtime_ns == before):
                    time.sleep(0.002)  # until there is something to lose
                process.join(rng.uniform(0, 0.5 * length))
                if process.is_alive():
                    process.kill()
                    killed += 1
            process.join()
            assert process.exitcode in (0, -9), log.read_text()
            ended = process.exitcode == 0
        if ended:
            for name in ("last.pt", "model.pt"):
                assert same(weights(out / name), weights(whole / name)), f"{out}: {name} differs"
            assert metrics(out) == metrics(whole), f"{out}: metrics.jsonl differs"
            if killed == kills:
                return
            n += 1
