"""
The built-in dataset: 96 x 96 scenes of coloured shapes, questions in seven tasks, and captions.

    python data/shapes.py                           # data/shapes-seed0, as train.py makes it
    python data/shapes.py --seed 1 --scenes 2000    # a smaller one, other scenes
    python data/shapes.py --out /tmp/shapes --scenes 100

Scenes, questions and files are those of scenes.py.
"""
import random
import sys
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw

if __name__ == "__main__":  # a script's folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import scenes as grid
from data.scenes import CELL, Thing, ask, command, describe_more, the_only, write

COLORS = {"red": (214, 39, 40), "green": (44, 150, 44), "blue": (35, 80, 200),
          "yellow": (240, 200, 20), "purple": (140, 50, 170), "orange": (245, 130, 25)}
SHAPES = ["circle", "square", "triangle", "cross"]
THINGS = [Thing(f"{color} {shape}", (shape, f"{color} thing"))
          for color in COLORS for shape in SHAPES]
TRAITS = [f"{color} thing" for color in COLORS] + SHAPES
TASKS = ["exist", "count", "where", "at", "attr", "rel", "hop"]


def draw_scene(scene: dict[int, Thing], rng: random.Random, split: str) -> Image.Image:
    """The scene as a picture: place, size, shades and background vary; outlines set shapes off."""
    image = Image.new("RGB", (3 * CELL, 3 * CELL), (rng.randint(110, 146),) * 3)
    draw = ImageDraw.Draw(image)
    for place, thing in scene.items():
        color, shape = thing.name.split()
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


def questions(scene: dict[int, Thing], task: str, rng: random.Random) -> list[tuple[str, str]]:
    """Those of scenes.questions, and `attr`: the color of a shape, the shape of a color."""
    if task != "attr":
        return grid.questions(scene, task, rng, THINGS, TRAITS, article=lambda name: "a")
    only = [(*thing.name.split(), trait) for thing, trait in the_only(scene)]
    return ([(f"what color is the {trait}?", color) for color, _, trait in only if trait in SHAPES]
            + [(f"what shape is the {trait}?", shape)
               for _, shape, trait in only if trait not in SHAPES])


def make(folder: Path, seed: int = 0, scenes: int = 20000, held_out: int = 600) -> None:
    """Write `scenes` to train on, `held_out` each for val and test; raises FileExistsError."""
    write(folder, f"shapes {seed}", scenes, held_out,
          lambda rng, split: grid.random_scene(rng, THINGS, questions, ["attr", "hop"]),
          draw_scene, partial(ask, questions, TASKS), describe_more)


def find(data: str) -> Path:
    """The folder of some data; "shapes" is the built-in one, made if need be."""
    if data != "shapes":
        return Path(data)
    folder = Path(__file__).parent / "shapes-seed0"
    if not folder.exists():
        make(folder)
    return folder


if __name__ == "__main__":
    command(make, "shapes")
