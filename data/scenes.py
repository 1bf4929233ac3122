"""
Scenes of things on a 3 x 3 grid, questions about them, and how a dataset of them is written.

shapes.py, digits.py and photos.py say what the things are and how they are drawn. They write the
one format that data/README.md describes. A scene depends on the dataset's name, the seed, its
split and its number alone.
"""
import argparse
import errno
import json
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, NamedTuple

from tqdm import tqdm

from engine.flags import leave, one_line, quoted, run_script

PLACES = ["top left", "top", "top right", "left", "center", "right",
          "bottom left", "bottom", "bottom right"]
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
CELL = 32


class Thing(NamedTuple):
    name: str                # "red circle", "duck"
    traits: tuple[str, ...]  # what one calls the only one of its sort: ("circle", "red thing")


def plural(word: str) -> str:
    if word.endswith("s") and not word.endswith("ss"):
        return word  # a folder's name may be one
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("ss", "sh", "ch", "x")) else f"{word}s"


def article(name: str) -> str:
    return "an" if name[0].lower() in "aeiou8" else "a"


def neighbours(scene: dict[int, Thing]) -> list[tuple[int, str, int]]:
    """(place, direction, next place there) of all things that have a thing beside them."""
    found = []
    for place in scene:
        for direction, (down, right) in STEPS.items():
            row, column = place // 3 + down, place % 3 + right
            if 0 <= row < 3 and 0 <= column < 3 and 3 * row + column in scene:
                found.append((place, direction, 3 * row + column))
    return found


def the_only(scene: dict[int, Thing]) -> list[tuple[Thing, str]]:
    """(thing, trait) of the traits that one thing of the scene has alone."""
    traits = [trait for thing in scene.values() for trait in thing.traits]
    return [(thing, trait) for thing in scene.values() for trait in thing.traits
            if traits.count(trait) == 1]


def random_scene(rng: random.Random, things: list[Thing], questions: Callable,
                 tasks: list[str]) -> dict[int, Thing]:
    """3 to 7 different things, not all, with a question in each task: place (0-8) -> thing.

    A thing that stands several times among the things is drawn as often.
    """
    most = min(7, len(set(things)) - 1)
    while True:
        n = rng.randint(3, most)
        some = rng.sample(things, n)
        scene = dict(sorted(zip(rng.sample(range(9), n), some)))
        if len(set(some)) == n and all(questions(scene, task, rng) for task in tasks):
            return scene


def questions(scene: dict[int, Thing], task: str, rng: random.Random, things: list[Thing],
              traits: list[str], what: str = "what", article: Callable = article) -> list:
    """A draw of (question, answer) pairs of one task, possibly none, balanced for each text.

    things and traits are all that there are. Nothing is asked about a name that is there twice.
    """
    here = list(scene.values())
    if task == "exist":
        absent = [thing for thing in things if thing not in here]
        answer = rng.choice(["yes", "no"])
        name = rng.choice(here if answer == "yes" else absent).name
        return [(f"is there {article(name)} {name}?", answer)]
    if task == "count":
        by_number = {}
        for trait in traits:
            number = sum(trait in thing.traits for thing in here)
            by_number.setdefault(number, []).append(plural(trait))
        number = rng.choice(sorted(by_number))  # each number that occurs is as likely as the others
        return [(f"how many {rng.choice(by_number[number])} are there?", str(number))]
    if task == "at":
        return [(f"{what} is at the {PLACES[p]}?", thing.name) for p, thing in scene.items()]
    once = {place: thing.name for place, thing in scene.items() if here.count(thing) == 1}
    if task == "where":
        return [(f"where is the {name}?", PLACES[place]) for place, name in once.items()]
    near = neighbours(scene)
    if task == "rel":
        return [(f"{what} is {step} the {once[place]}?", scene[other].name)
                for place, step, other in near if place in once]
    only = the_only(scene)  # hop
    return [(f"what is {second} the object {first} the {trait}?", scene[far].name)
            for start, first, place in near for middle, second, far in near
            if middle == place and far != start
            for trait in scene[start].traits if (scene[start], trait) in only]


def ask(questions: Callable, tasks: list[str], scene: dict, rng: random.Random) -> list:
    """(task, question, answer) of each task, in any order."""
    return [(task, *rng.choice(questions(scene, task, rng)))
            for task in rng.sample(tasks, len(tasks))]


def describe(scene: dict[int, Thing], rng: random.Random) -> tuple[str, str]:
    """What asks for a caption, and the caption: what is where."""
    return "Describe the picture.", ", ".join(f"{PLACES[place]} {thing.name}"
                                              for place, thing in scene.items())


def describe_more(scene: dict[int, Thing], rng: random.Random) -> tuple[str, str]:
    """describe's or, as often, what is beside what: then `rel` and `hop` come in half the steps."""
    wanted, names = rng.choice(list(STEPS)), [thing.name for thing in scene.values()]
    beside = [f"{step} the {scene[place].name} {scene[other].name}"
              for place, step, other in neighbours(scene)
              if step == wanted and names.count(scene[place].name) == 1]
    if beside and rng.random() < 0.5:
        return f"Describe what is {wanted} what.", ", ".join(beside)
    return describe(scene, rng)


def talk(human: str, gpt: str) -> list[dict]:
    return [{"from": "human", "value": f"<image>\n{human}"}, {"from": "gpt", "value": gpt}]


def refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already: remove it, or name another with --out")


def write(folder: Path, title: str, scenes: int, held_out: int, random_scene: Callable,
          draw: Callable, ask: Callable, describe: Callable = describe) -> None:
    """Write a dataset of scenes, each drawn from title, split and number; raises FileExistsError.

    random_scene(rng, split) -> dict; draw(scene, rng, split) -> picture; ask(scene, rng) -> list;
    describe(scene, rng) -> what asks for the caption, and the caption.
    All is written beside the folder and renamed at the end: a folder that exists is whole.
    """
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    taken, captions = set(), []  # no scene is in two splits
    with (TemporaryDirectory(prefix=f"{folder.name}.part", dir=folder.parent) as beside,
          ThreadPoolExecutor(1) as thread,
          tqdm(total=scenes + 2 * held_out, desc=f"making {folder}", unit="scene",
               leave=False) as bar):
        saving = None  # a picture, while the next is drawn
        part = Path(beside) / folder.name
        for split, n in [("test", held_out), ("val", held_out), ("train", scenes)]:
            (part / "images" / split).mkdir(parents=True)
            records = []
            for i in range(n):
                rng = random.Random(f"{title} {split} {i}")
                scene = random_scene(rng, split)
                while tuple(scene.items()) in taken:
                    scene = random_scene(rng, split)
                taken.add(tuple(scene.items()))
                image = f"images/{split}/{i:05}.png"
                picture = draw(scene, rng, split)
                if saving:
                    saving.result()
                saving = thread.submit(picture.save, part / image, compress_level=1)
                for j, (task, question, answer) in enumerate(ask(scene, rng)):
                    records.append({"id": f"{split}-{i:05}-{j}", "image": image, "task": task,
                                    "conversations": talk(question, answer)})
                if split == "train":
                    captions.append({"id": f"caption-{i:05}", "image": image,
                                     "conversations": talk(*describe(scene, rng))})
                bar.update()
            (part / f"{split}.json").write_text(json.dumps(records))
        (part / "captions.json").write_text(json.dumps(captions))
        if saving:
            saving.result()
        part.rename(folder)


def make_parser(dataset: str, pictures: Path | None = None) -> argparse.ArgumentParser:
    """Of a script; with --pictures, and that default, where there is one."""
    parser = argparse.ArgumentParser(description=f"make the {dataset} dataset", allow_abbrev=False,
                                     usage=argparse.SUPPRESS)  # errors are one line
    parser.add_argument("--seed", type=int, default=0, help="others give other scenes (default 0)")
    parser.add_argument("--scenes", type=int, default=20000,
                        help="to train on (default 20000); to validate and to test there are 600")
    parser.add_argument("--out", type=Path, help=f"folder (default data/{dataset}-seed<seed>)")
    if pictures:
        parser.add_argument("--pictures", type=Path, default=pictures,
                            help=f"a folder of them, or a Debian package (default {pictures})")
    return parser


def command(make: Callable, dataset: str, pictures: Path | None = None) -> None:
    """A script that makes a dataset; Ctrl-C and SIGTERM end it with nothing half-written."""
    signal.signal(signal.SIGTERM, leave)
    run_script(lambda: run(make, dataset, pictures))


def run(make: Callable, dataset: str, pictures: Path | None) -> None:
    flags = vars(make_parser(dataset, pictures).parse_args())
    out, seed, scenes = flags.pop("out"), flags["seed"], flags["scenes"]
    out = out or Path(__file__).parent / f"{dataset}-seed{seed}"
    with one_line():
        if scenes < 1 or seed < 0:
            raise ValueError(f"--scenes must be at least 1 and --seed 0, not {scenes} and {seed}")
        refuse_existing(out)  # before pictures are read
        try:
            make(out, **flags)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            raise OSError(f"{out}: {e.strerror}") from e
        print(f"made {out}: {quoted(['python', 'train.py', '--data', str(out)])}")
