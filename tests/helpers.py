"""A tiny dataset and a tiny model for it, which learn in seconds."""
import json
import random
from pathlib import Path

from PIL import Image

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
