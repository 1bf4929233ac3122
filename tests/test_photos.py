"""Scenes of pictures: who sees which, questions and answers, names, packages, bad input."""
import colorsys
import io
import json
import lzma
import random
import re
import sys
import tarfile
from collections import Counter, defaultdict

import pytest
from PIL import Image, ImageDraw

from data import photos, scenes
from data.scenes import CELL, PLACES, Thing

KINDS = ["bird", "fish", "fruit", "tool", "tree", "hat", "cup", "box"]
COLORS = {f"{word} {kind}er": tuple(round(255 * c) for c in
                                    colorsys.hsv_to_rgb(i / 8, 1, 0.3 + 0.1 * j))
          for i, kind in enumerate(KINDS) for j, word in enumerate("abcdefgh")}
KIND = {name: name.split()[1].removesuffix("er") for name in COLORS}


def cut_out(color, size=(40, 30)):
    """A disc on nothing, with clear edges."""
    image = Image.new("RGBA", (size[0] + 20, size[1] + 10))
    ImageDraw.Draw(image).ellipse((10, 5, size[0] + 9, size[1] + 4), fill=(*color, 255))
    return image


def save(picture, path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text, "utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Each thing is a disc in a color of its own: what a scene shows can be read from it."""
    folder = tmp_path_factory.mktemp("tree")
    for i, (name, color) in enumerate(COLORS.items()):
        if i % 2:
            save(cut_out(color), folder / f"some/{KIND[name]}/{i}.png", f"A {name}.\nde=Ein ...\n")
        else:
            save(cut_out(color), folder / f"{KIND[name]}/{name}.png")
    return folder


@pytest.fixture(scope="module")
def made(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "photos"
    photos.make(folder, 0, scenes=1500, held_out=300, pictures=tree)
    return folder


def records(folder, split):
    """(picture, task, question, answer)"""
    found = []
    for r in json.loads((folder / f"{split}.json").read_text()):
        human, gpt = (turn["value"] for turn in r["conversations"])
        found.append((r["image"], r.get("task"), human.removeprefix("<image>\n"), gpt))
    return found


def look(path):
    """Place -> name of what a picture shows there."""
    names, scene = {color: name for name, color in COLORS.items()}, {}
    with Image.open(path) as picture:
        for i, place in enumerate(PLACES):
            y, x = (CELL * at for at in divmod(i, 3))
            colors = Counter(picture.crop((x, y, x + CELL, y + CELL)).get_flattened_data())
            for color in names.keys() & colors.keys():
                scene[place] = names[color]
    return scene


@pytest.fixture(scope="module")
def shown(made):
    return {path.relative_to(made).as_posix(): look(path) for path in made.rglob("*.png")}


def solve(question, scene):
    """The answer, from scratch; raises AssertionError if there is not one."""
    where = {name: PLACES.index(place) for place, name in scene.items()}
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

    def the(words):
        found = [name for name in where if words in (name, KIND[name])]
        assert len(found) == 1, (words, scene)
        return found[0]

    def beside(direction, name):
        row, column = divmod(where[name], 3)
        row, column = row + steps[direction][0], column + steps[direction][1]
        assert row in range(3) and column in range(3)
        return scene[PLACES[3 * row + column]]

    if m := re.fullmatch(r"is there (an?) (.+)\?", question):
        assert m[1] == ("an" if m[2][0] in "aeiou" else "a")
        return "yes" if m[2] in where else "no"
    if m := re.fullmatch(r"how many (.+)s are there\?", question):
        kind = "box" if m[1] == "boxe" else "fish" if m[1] == "fishe" else m[1]
        assert kind in KINDS
        return str(sum(KIND[name] == kind for name in where))
    if m := re.fullmatch(r"where is the (.+)\?", question):
        return PLACES[where[m[1]]]
    if m := re.fullmatch(r"what is at the (.+)\?", question):
        return scene[m[1]]
    if m := re.fullmatch(r"what kind of thing is at the (.+)\?", question):
        return KIND[scene[m[1]]]
    if m := re.fullmatch(r"what (.+) is there\?", question):
        return the(m[1])
    if m := re.fullmatch(r"what is ([a-z ]+?) the object ([a-z ]+?) the (.+)\?", question):
        return beside(m[1], beside(m[2], the(m[3])))
    m = re.fullmatch(r"what is ([a-z ]+?) the (.+)\?", question)
    return beside(m[1], the(m[2]))


def test_questions_captions_and_pictures_are_about_the_same_things(made, shown):
    assert {len(scene) for scene in shown.values()} == set(range(3, 8))
    for image, _, _, caption in records(made, "captions"):
        assert dict(words.split(maxsplit=1)[::-1][::-1] if words.split()[0] not in
                    ("top", "bottom") else split_place(words)
                    for words in caption.split(", ")) == shown[image]
    for split in ("train", "val", "test"):
        for image, task, question, answer in records(made, split):
            assert solve(question, shown[image]) == answer, (task, question, shown[image])
