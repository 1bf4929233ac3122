"""
The built-in dataset: 96 x 96 scenes of coloured shapes, questions in seven tasks, and captions.

    python data/shapes.py                           # data/shapes-seed0, as train.py makes it
    python data/shapes.py --seed 1 --scenes 2000    # a smaller one, other scenes
    python data/shapes.py --out /tmp/shapes --scenes 100

It writes the one format that data/README.md describes. A scene depends on the seed, its split and
its number alone.
"""
import argparse
import json
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable

from PIL import Image, ImageDraw
from tqdm import tqdm

COLORS = {"red": (214, 39, 40), "green": (44, 150, 44), "blue": (35, 80, 200),
          "yellow": (240, 200, 20), "purple": (140, 50, 170), "orange": (245, 130, 25)}
SHAPES = ["circle", "square", "triangle", "cross"]
PLACES = ["top left", "top", "top right", "left", "center", "right",
          "bottom left", "bottom", "bottom right"]
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
TASKS = ["exist", "count", "where", "at", "attr", "rel", "hop"]
CELL = 32


def random_scene(rng: random.Random) -> dict[int, tuple[str, str]]:
    """3 to 7 different objects, some of each task to ask: place (0-8) -> (color, shape)."""
    while True:
        n = rng.randint(3, 7)
        kinds = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], n)
        scene = dict(sorted(zip(rng.sample(range(9), n), kinds)))
        if questions(scene, "attr", rng) and questions(scene, "hop", rng):
            return scene


def draw_scene(scene: dict, rng: random.Random) -> Image.Image:
    """The scene as a picture: place, size, shades and background vary; outlines set shapes off."""
    image = Image.new("RGB", (3 * CELL, 3 * CELL), (rng.randint(110, 146),) * 3)
    draw = ImageDraw.Draw(image)
    for place, (color, shape) in scene.items():
        r = rng.randint(10, 13)
        y, x = (CELL * (i + 0.5) + rng.randint(-2, 2) for i in divmod(place, 3))
        fill = tuple(min(255, max(0, channel + rng.randint(-14, 14))) for channel in COLORS[color])
        style = {"fill": fill, "outline": "white", "width": 2}
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), **style)
        elif shape == "square":
            draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), **style)
        elif shape == "triangle":
            draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], **style)
        else:
            w = r / 3
            corners = [(w, r), (w, w), (r, w), (r, -w), (w, -w), (w, -r)]
            draw.polygon([(x + i, y + j) for i, j in corners]
                         + [(x - i, y - j) for i, j in corners], **style)
    return image


def neighbour(place: int, direction: str) -> int | None:
    row, column = divmod(place, 3)
    row, column = row + STEPS[direction][0], column + STEPS[direction][1]
    return 3 * row + column if 0 <= row < 3 and 0 <= column < 3 else None


def name(kind: tuple[str, str]) -> str:
    return " ".join(kind)


def questions(scene: dict, task: str, rng: random.Random) -> list[tuple[str, str]]:
    """A draw of (question, answer) pairs of one task, possibly none, balanced for each text."""
    kinds = list(scene.values())
    if task == "exist":
        absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in kinds]
        answer = rng.choice(["yes", "no"])
        return [(f"is there a {name(rng.choice(kinds if answer == 'yes' else absent))}?", answer)]
    if task == "count":
        words = {c: f"{c} things" for c in COLORS}
        words |= {s: f"{s}es" if s == "cross" else f"{s}s" for s in SHAPES}
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


def describe(scene: dict[int, tuple[str, str]]) -> str:
    return ", ".join(f"{PLACES[place]} {name(kind)}" for place, kind in scene.items())


def ask(scene: dict, questions: Callable, tasks: list[str], n: int, rng: random.Random) -> list:
    """n of (task, question, answer), tasks in turn."""
    order = rng.sample(tasks, len(tasks))
    asked = [order[i % len(order)] for i in range(n)]
    return [(task, *rng.choice(questions(scene, task, rng))) for task in asked]


def talk(human: str, gpt: str) -> list[dict]:
    return [{"from": "human", "value": f"<image>\n{human}"}, {"from": "gpt", "value": gpt}]


def write(folder: Path, title: str, scenes: int, held_out: int, random_scene: Callable,
          show: Callable) -> None:
    """Write a dataset of scenes, each drawn from title, split and number; raises FileExistsError.

    random_scene(rng) -> dict; show(scene, rng, split) -> (picture, caption, what `ask` returned).
    Everything is written beside the folder and renamed at the end: a folder that exists is whole.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it, or name another with --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    taken, captions = set(), []  # no scene is in two splits
    total = scenes + 2 * held_out
    with (TemporaryDirectory(prefix=f"{folder.name}.part", dir=folder.parent) as beside,
          tqdm(total=total, desc=f"making {folder}", unit="scene", leave=False) as bar):
        part = Path(beside) / folder.name
        for split, n in [("test", held_out), ("val", held_out), ("train", scenes)]:
            (part / "images" / split).mkdir(parents=True)
            records = []
            for i in range(n):
                rng = random.Random(f"{title} {split} {i}")
                scene = random_scene(rng)
                while tuple(scene.items()) in taken:
                    scene = random_scene(rng)
                taken.add(tuple(scene.items()))
                picture, caption, asked = show(scene, rng, split)
                image = f"images/{split}/{i:05}.png"
                picture.save(part / image, compress_level=1)
                for j, (task, question, answer) in enumerate(asked):
                    records.append({"id": f"{split}-{i:05}-{j}", "image": image, "task": task,
                                    "conversations": talk(question, answer)})
                if split == "train":
                    captions.append({"id": f"caption-{i:05}", "image": image,
                                     "conversations": talk("Describe the picture.", caption)})
                bar.update()
            (part / f"{split}.json").write_text(json.dumps(records))
        (part / "captions.json").write_text(json.dumps(captions))
        part.rename(folder)


def make(folder: Path, seed: int = 0, scenes: int = 20000, held_out: int = 600,
         per_scene: int = 7) -> None:
    """Write `scenes` to train on, `held_out` each for val and test, `per_scene` questions each."""
    def show(scene, rng, split):
        return draw_scene(scene, rng), describe(scene), ask(scene, questions, TASKS, per_scene, rng)

    write(folder, f"shapes {seed}", scenes, held_out, random_scene, show)


def find(data: str) -> Path:
    """The folder of some data; "shapes" is the built-in one, made if need be."""
    if data != "shapes":
        return Path(data)
    folder = Path(__file__).parent / "shapes-seed0"
    if not folder.exists():
        make(folder)
    return folder


def make_parser(dataset: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=f"make the {dataset} dataset", allow_abbrev=False,
                                     usage=argparse.SUPPRESS)  # errors are one line
    parser.add_argument("--seed", type=int, default=0, help="others give other scenes (default 0)")
    parser.add_argument("--scenes", type=int, default=20000, help="to train on (default 20000)")
    parser.add_argument("--out", type=Path, help=f"folder (default data/{dataset}-seed<seed>)")
    return parser


def command(make: Callable, dataset: str) -> None:
    args = make_parser(dataset).parse_args()
    try:
        if args.scenes < 1 or args.seed < 0:
            raise ValueError(f"--scenes must be at least 1 and --seed 0, not {args.scenes} and "
                             f"{args.seed}")
        folder = args.out or Path(__file__).parent / f"{dataset}-seed{args.seed}"
        make(folder, args.seed, args.scenes)
    except (ValueError, OSError) as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command(make, "shapes")
