"""
Another dataset: 96 x 96 mosaics of scanned handwritten digits, questions in seven tasks, captions.

    pip install scikit-learn                        # it holds the scans: 1,797 of 8 x 8 pixels
    python data/digits.py                           # data/digits-seed0
    python data/digits.py --seed 1 --scenes 2000    # a smaller one, other mosaics and another split
    python train.py --data data/digits-seed0 --merge 2 --batch-size 64 --align-steps 300 --steps 7000

It writes the one format that data/README.md describes. The scans are split before any mosaic is
made: val and test show scans that training never saw.
"""
import random
import sys
from functools import partial
from pathlib import Path

from PIL import Image

if __name__ == "__main__":  # a script's folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import scenes as grid
from data.scenes import CELL, Thing, article, ask, command, neighbours, write

DIGITS = "0123456789"
THINGS = [Thing(digit, (digit,)) for digit in DIGITS]
LINES = {"top row": (0, 1, 2), "middle row": (3, 4, 5), "bottom row": (6, 7, 8),
         "left column": (0, 3, 6), "middle column": (1, 4, 7), "right column": (2, 5, 8)}
TASKS = ["exist", "count", "where", "at", "rel", "sum", "max"]


def split_scans(seed: int) -> dict[str, dict[str, list[Image.Image]]]:
    """Split -> digit -> 8 x 8 grey scans: 30 of each digit for val, 30 for test, others for train.

    Raises ValueError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ValueError(f"the scans are in scikit-learn: pip install scikit-learn ({e})") from None
    data, rng = load_digits(), random.Random(f"digits {seed} scans")
    splits = {"val": {}, "test": {}, "train": {}}
    for digit in DIGITS:
        scans = [Image.fromarray((ink * 255 / 16).astype("uint8"))  # a pixel's ink is 0 to 16
                 for ink in data.images[data.target == int(digit)]]
        rng.shuffle(scans)
        for split, part in zip(splits, [scans[:30], scans[30:60], scans[60:]]):
            splits[split][digit] = part
    return splits


def random_scene(rng: random.Random, split: str) -> dict[int, Thing]:
    """5 to 9 digits, some equal: place (0-8, row by row) -> digit. Each task has a question."""
    while True:
        n = rng.randint(5, 9)
        some = rng.sample(THINGS, rng.randint(4, 8))
        scene = dict(zip(sorted(rng.sample(range(9), n)), rng.choices(some, k=n)))
        if all(questions(scene, task, rng) for task in TASKS):
            return scene


def draw_scene(scene: dict[int, Thing], rng: random.Random, scans: dict) -> Image.Image:
    """The scene as a grey picture: white ink on black cards; scan, place, size and ground vary."""
    image = Image.new("L", (3 * CELL, 3 * CELL), rng.randint(110, 146))
    for place, thing in scene.items():
        side = rng.randint(26, 30)
        scan = rng.choice(scans[thing.name]).resize((side, side), Image.Resampling.BICUBIC)
        y, x = (CELL * i + (CELL - side) // 2 + rng.randint(-1, 1) for i in divmod(place, 3))
        image.paste(0, (x - 1, y - 1, x + side + 1, y + side + 1))  # else none is learned
        image.paste(255, (x, y), scan)
    return image


def questions(scene: dict[int, Thing], task: str, rng: random.Random) -> list[tuple[str, str]]:
    """Those of scenes.questions but for `exist`, and `max` and `sum`."""
    digits = {place: thing.name for place, thing in scene.items()}
    here = list(digits.values())
    if task == "exist":  # a digit that is there twice is as likely as one that is there once
        answer = rng.choice(["yes", "no"])
        digit = rng.choice([d for d in DIGITS if (d in here) == (answer == "yes")])
        return [(f"is there {article(digit)} {digit}?", answer)]
    if task == "max":
        lines = {line: [digits[p] for p in LINES[line] if p in digits] for line in LINES}
        return [(f"what is the largest digit in the {line}?", max(found))
                for line, found in lines.items() if len(found) > 1]
    if task == "sum":
        return [(f"what is the sum of the {digits[place]} and the digit {step} it?",
                 str(int(digits[place]) + int(digits[other])))
                for place, step, other in neighbours(scene) if here.count(digits[place]) == 1]
    return grid.questions(scene, task, rng, THINGS, list(DIGITS), "which digit")


def make(folder: Path, seed: int = 0, scenes: int = 20000, held_out: int = 600) -> None:
    """Write the dataset, as shapes.make does; raises ValueError without scikit-learn."""
    scans = split_scans(seed)
    write(folder, f"digits {seed}", scenes, held_out, random_scene,
          lambda scene, rng, split: draw_scene(scene, rng, scans[split]),
          partial(ask, questions, TASKS))


if __name__ == "__main__":
    command(make, "digits")
