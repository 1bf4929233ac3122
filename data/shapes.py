"""
The built-in dataset: 96 x 96 scenes of coloured shapes on a 3 x 3 grid, questions in seven tasks, and captions.

    python data/shapes.py                                   # data/shapes-seed0, as train.py makes it
    python data/shapes.py --seed 1 --scenes 2000            # a smaller one, other scenes
    python data/shapes.py --out /tmp/shapes --scenes 100

It writes the one format that data/README.md describes. A scene depends on the seed, its split and its number alone.
"""
import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

COLORS = {"red": (214, 39, 40), "green": (44, 150, 44), "blue": (35, 80, 200), "yellow": (240, 200, 20),
          "purple": (140, 50, 170), "orange": (245, 130, 25)}
SHAPES = ["circle", "square", "triangle", "cross"]
PLACES = ["top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"]
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
TASKS = ["exist", "count", "where", "at", "attr", "rel", "hop"]
CELL = 32


def random_scene(rng: random.Random) -> dict[int, tuple[str, str]]:
    """3 to 7 different objects: place (0-8, row by row) -> (color, shape)."""
    n = rng.randint(3, 7)
    kinds = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], n)
    return dict(sorted(zip(rng.sample(range(9), n), kinds)))


def draw_scene(scene: dict, rng: random.Random) -> Image.Image:
    """The scene as a picture: place, size, shades and background vary; outlines set shapes off."""
    image = Image.new("RGB", (3 * CELL, 3 * CELL), (rng.randint(110, 146),) * 3)
    draw = ImageDraw.Draw(image)
    for place, (color, shape) in scene.items():
        r = rng.randint(10, 13)
        y, x = (CELL * (i + 0.5) + rng.randint(-2, 2) for i in divmod(place, 3))
        style = {"fill": tuple(min(255, max(0, channel + rng.randint(-14, 14))) for channel in COLORS[color]),
                 "outline": "white", "width": 2}
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), **style)
        elif shape == "square":
            draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), **style)
        elif shape == "triangle":
            draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], **style)
        else:
            w = r / 3
            corners = [(w, r), (w, w), (r, w), (r, -w), (w, -w), (w, -r)]
            draw.polygon([(x + i, y + j) for i, j in corners] + [(x - i, y - j) for i, j in corners], **style)
    return image


def neighbour(place: int, direction: str) -> int | None:
    row, column = divmod(place, 3)
    row, column = row + STEPS[direction][0], column + STEPS[direction][1]
    return 3 * row + column if 0 <= row < 3 and 0 <= column < 3 else None


def name(kind: tuple[str, str]) -> str:
    return " ".join(kind)


def questions(scene: dict, task: str, rng: random.Random) -> list[tuple[str, str]]:
    """A draw of (question, answer) pairs of one task, possibly empty, such that answers are balanced for each text."""
    kinds = list(scene.values())
    if task == "exist":
        absent = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in kinds]
        answer = rng.choice(["yes", "no"])
        return [(f"is there a {name(rng.choice(kinds if answer == 'yes' else absent))}?", answer)]
    if task == "count":
        words = {color: f"{color} things" for color in COLORS} | {s: f"{s}es" if s == "cross" else f"{s}s" for s in SHAPES}
        by_number = {}
        for word in words:
            by_number.setdefault(sum(word in kind for kind in kinds), []).append(word)
        number = rng.choice(sorted(by_number))  # each number that occurs is as likely as the others
        return [(f"how many {words[rng.choice(by_number[number])]} are there?", str(number))]
    if task == "where":
        return [(f"where is the {name(kind)}?", PLACES[place]) for place, kind in scene.items()]
    if task == "at":
        return [(f"what is at the {PLACES[place]}?", name(kind)) for place, kind in scene.items()]
    colors, shapes = [kind[0] for kind in kinds], [kind[1] for kind in kinds]
    if task == "attr":
        return ([(f"what color is the {s}?", c) for c, s in kinds if shapes.count(s) == 1]
                + [(f"what shape is the {c} thing?", s) for c, s in kinds if colors.count(c) == 1])
    pairs = []
    for place, (color, shape) in scene.items():
        for first in STEPS:
            near = neighbour(place, first)
            if near not in scene:
                continue
            if task == "rel":
                pairs.append((f"what is {first} the {color} {shape}?", name(scene[near])))
                continue
            for second in STEPS:
                far = neighbour(near, second)
                if far in scene and far != place:
                    start = f"what is {second} the object {first} the "
                    if shapes.count(shape) == 1:
                        pairs.append((f"{start}{shape}?", name(scene[far])))
                    if colors.count(color) == 1:
                        pairs.append((f"{start}{color} thing?", name(scene[far])))
    return pairs


def make(folder: Path, seed: int = 0, scenes: int = 20000, held_out: int = 600, per_scene: int = 7) -> None:
    """Write the dataset: `scenes` to train on, `held_out` each for val and test, `per_scene` questions about a scene.

    Everything is written beside the folder and renamed at the end, so that a folder that exists is whole.
    """
    part = Path(f"{folder}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    taken, captions = set(), []  # no scene is in two splits
    with tqdm(total=scenes + 2 * held_out, desc=f"making {folder}", unit="scene", leave=False) as bar:
        for split, n in [("test", held_out), ("val", held_out), ("train", scenes)]:
            (part / "images" / split).mkdir(parents=True)
            records = []
            for i in range(n):
                rng = random.Random(f"shapes {seed} {split} {i}")
                scene = random_scene(rng)
                while tuple(scene.items()) in taken:
                    scene = random_scene(rng)
                taken.add(tuple(scene.items()))
                image = f"images/{split}/{i:05}.png"
                draw_scene(scene, rng).save(part / image, compress_level=1)
                tasks = rng.sample(TASKS, len(TASKS))
                asked = 0
                while asked < per_scene:
                    task = tasks[asked % len(TASKS)]
                    drawn = questions(scene, task, rng) or questions(scene, "count", rng)
                    question, answer = rng.choice(drawn)
                    records.append({"id": f"{split}-{i:05}-{asked}", "image": image, "task": task, "conversations": [
                        {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]})
                    asked += 1
                if split == "train":
                    text = ", ".join(f"{PLACES[place]} {name(kind)}" for place, kind in scene.items())
                    captions.append({"id": f"caption-{i:05}", "image": image, "conversations": [
                        {"from": "human", "value": "<image>\nDescribe the picture."}, {"from": "gpt", "value": text}]})
                bar.update()
            (part / f"{split}.json").write_text(json.dumps(records))
    (part / "captions.json").write_text(json.dumps(captions))
    part.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="make the shapes dataset", allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other scenes (default 0)")
    parser.add_argument("--out", type=Path, help="folder to write (default data/shapes-seed<seed>)")
    args = parser.parse_args()
    make(args.out or Path(__file__).parent / f"shapes-seed{args.seed}", args.seed)
