"""A tiny dataset and a tiny model for it, which learn in seconds."""
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.folder import hold

ROOT = Path(__file__).parent.parent

COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
SIDES = ["left", "right"]

TINY = ["--image-size", "16", "--patch-size", "8", "--n-embd", "32", "--n-head", "2", "--n-layer", "2",
        "--vit-embd", "32", "--vit-head", "2", "--vit-layer", "1", "--block-size", "64",
        "--batch-size", "32", "--workers", "0", "--device", "cpu"]


def make_tiny(folder: Path, n: int = 240, shuffled: bool = False) -> Path:
    """Two-coloured pictures; "what color is left?" and "... right?". Shuffled: with wrong pictures."""
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
                records.append({"id": f"{split}-{i}-{side}", "image": shown, "task": side, "conversations": [
                    {"from": "human", "value": f"<image>\nwhat color is {side}?"},
                    {"from": "gpt", "value": color}]})
            if split == "train":
                captions.append({"id": f"c{i}", "image": shown, "conversations": [
                    {"from": "human", "value": "<image>"}, {"from": "gpt", "value": " ".join(two)}]})
        (folder / f"{split}.json").write_text(json.dumps(records))
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what time makes of them."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_second")} for line in lines]


def start(*argv, **kwargs) -> subprocess.Popen:
    """train.py in a process of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)


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


def refused(capsys, main, *argv) -> str:
    """The one line that a command refuses with."""
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1, error
    return error


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def kill_and_resume(data: Path, folder: Path, kills: int) -> None:
    """Kill runs at random moments and go on with them; each has to end as one that was never killed.

    A checkpoint is written after every step, so kills fall into its writing as well.
    """
    command = ["--data", data, *TINY, "--align-steps", "30", "--steps", "60", "--eval-every", "15",
               "--save-every", "0", "--out"]
    rng, whole, n, killed = random.Random(0), folder / "whole", 0, 0
    process = start(*command, whole)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    length = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    while True:
        out = folder / f"cut{n}"
        last = out / "last.pt"
        before = last.stat().st_mtime_ns if last.exists() else None
        process = start(*(["--resume", "--out"] if before else command), out)
        if killed < kills:
            while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
                time.sleep(0.002)  # until there is something to lose
            try:
                process.wait(rng.uniform(0, 0.5 * length))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
        error = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), error
        if process.returncode == 0:  # to its end
            for name in ("last.pt", "model.pt"):
                assert same(weights(out / name), weights(whole / name)), f"{out}: {name} differs"
            assert metrics(out) == metrics(whole), f"{out}: metrics.jsonl differs"
            if killed == kills:
                return
            n += 1
