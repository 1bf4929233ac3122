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

import numpy as np
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
    photos.make(folder, 0, scenes=1000, held_out=300, pictures=tree)
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
            colors = picture.crop((x, y, x + CELL, y + CELL)).getcolors(CELL * CELL)
            scene |= {place: names[color] for _, color in colors if color in names}
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
        assert caption == ", ".join(f"{place} {name}" for place, name in shown[image].items())
    for split in ("train", "val", "test"):
        for image, task, question, answer in records(made, split):
            assert solve(question, shown[image]) == answer, (task, question, shown[image])


def test_no_scene_is_in_two_splits(shown):
    splits = defaultdict(list)
    for image, scene in shown.items():
        splits[image.split("/")[1]].append(tuple(scene.items()))
    assert {split: len(some) for split, some in splits.items()} == {"train": 1000, "val": 300,
                                                                    "test": 300}
    assert len(set(sum(splits.values(), []))) == 1600


def test_no_scene_is_made_twice_however_few_there_are(tmp_path):
    drawn = []

    def draw(scene, rng, split):
        drawn.append(str(scene))
        return Image.new("L", (1, 1))

    scenes.write(tmp_path / "out", "few", 12, 3, lambda rng, split: {
        rng.randrange(9): Thing(rng.choice("ab"), ())}, draw, lambda scene, rng: [])
    assert len(drawn) == len(set(drawn)) == 18  # all that there are


def text_alone(folder):
    """Share of right answers of the best constant for each text, even chosen after the fact."""
    answers = defaultdict(Counter)
    for split in ("train", "val", "test"):
        for _, task, question, answer in records(folder, split):
            answers[task, question][answer] += 1
    hits = sum(found.most_common(1)[0][1] for found in answers.values())
    assert {task for task, _ in answers} == {*photos.TASKS, "new"}
    return hits / sum(found.total() for found in answers.values())


def test_no_task_can_be_answered_from_its_text(made):
    assert text_alone(made) <= 0.35
    yes = Counter(answer for _, task, _, answer in records(made, "train") if task == "exist")
    assert 0.45 < yes["yes"] / yes.total() < 0.55
    learned = defaultdict(Counter)  # of a rare text, all answers may be one: what training tells
    for _, task, question, answer in records(made, "train"):
        learned[question][answer] += 1
    right = Counter(task for _, task, question, answer in records(made, "test")
                    if learned[question] and learned[question].most_common(1)[0][0] == answer)
    asked = Counter(task for _, task, _, _ in records(made, "test"))
    for task in asked:
        assert right[task] / asked[task] <= (0.55 if task == "exist" else 0.45), task


def test_uneven_kinds_are_drawn_alike_so_that_text_alone_tells_little(tmp_path, monkeypatch):
    for i, (kind, number) in enumerate(zip(KINDS, (48, 4, 4, 4, 4))):
        for j in range(number):
            save(cut_out((9, 50 * i, 5 * j)), tmp_path / f"in/{kind}/{kind} no {j}.png")
    found = {}
    for name in ("even", "as they come"):
        photos.make(tmp_path / name, 0, scenes=1000, held_out=300, pictures=tmp_path / "in")
        kinds = Counter(answer for _, _, question, answer in records(tmp_path / name, "train")
                        if "what kind of" in question)
        found[name] = kinds["bird"] / kinds.total(), text_alone(tmp_path / name)
        monkeypatch.setattr(photos, "even_out", lambda some, things: some)  # the control
    assert found["even"][0] < 0.3 and found["even"][1] < 0.35
    assert found["as they come"][0] > 0.5 and found["as they come"][1] > found["even"][1]


def test_new_is_asked_about_things_that_training_never_saw(made, shown):
    seen = {name for image, scene in shown.items() if "/train/" in image
            for name in scene.values()}
    assert Counter(KIND[name] for name in seen) == {kind: 6 for kind in KINDS}  # of eight each
    for split in ("train", "val", "test"):
        for image, task, question, answer in records(made, split):
            names = set(shown[image].values())
            if task == "new":
                assert split != "train" and not names & seen and answer in KINDS
            else:  # whoever has learned all that training shows can know all of them
                assert names <= seen
    asked = {task for _, task, _, _ in records(made, "val")} & {task for _, task, _, _ in
                                                                records(made, "test")}
    assert asked == {*photos.TASKS, "new"}
    new = [all(name not in seen for name in scene.values()) for image, scene in shown.items()
           if "/train/" not in image]
    assert 0.09 < np.mean(new) < 0.16  # an eighth
    kinds = [question for _, _, question, _ in records(made, "train") if "what kind of" in question]
    assert len(kinds) > 300  # training asks it, too, of what it shows


def test_pictures_of_one_thing_are_split_before_any_scene_is_made(tmp_path):
    for n, kind in enumerate(KINDS[:4]):
        for m, name in enumerate("abcd"):
            for i in range(8):
                save(cut_out((255, 8 * i, 16 * n + 4 * m)), tmp_path / f"in/{kind}/{name}{i}.png",
                     f"{kind} {name}")
    photos.make(tmp_path / "out", 0, scenes=300, held_out=100, pictures=tmp_path / "in")
    things = photos.load(tmp_path / "in")
    _, new, shown = photos.split_pictures(things, 0)
    assert len(things) == 16 and len(new) == 4
    for thing, pictures in things.items():
        train, val, test = ({p.tobytes() for p in shown[split][thing]} for split in shown)
        assert len(train) == 6 and len(val) == 2 and train.isdisjoint(val) and val == test
        assert len(train | val) == len(pictures)
    drawn = defaultdict(set)  # each picture has a color of its own
    for path in (tmp_path / "out").rglob("*.png"):
        with Image.open(path) as picture:
            drawn[path.parent.name] |= {color for n, color in picture.getcolors(96 * 96)
                                        if n > 99 and color[0] == 255}  # no edge
    assert len(drawn["train"]) >= 72 and drawn["train"].isdisjoint(drawn["val"] | drawn["test"])
    assert len(drawn["val"] & drawn["test"]) > 24
    one = {thing: pictures[:1] for thing, pictures in things.items()}
    _, _, shown = photos.split_pictures(one, 0)
    assert shown["train"] == shown["val"] == one  # the control: there is nothing to split


def test_size_place_side_and_ground_vary_and_a_tile_hides_the_ground(tmp_path):
    left, right = (200, 10, 10), (10, 10, 200)
    whole = Image.new("RGBA", (40, 40), (*left, 255))
    whole.paste((*right, 255), (20, 0, 40, 40))
    clear = whole.copy()
    ImageDraw.Draw(clear).rectangle((12, 12, 28, 28), fill=(0, 0, 0, 0))
    thing, found = Thing("a", ("b",)), defaultdict(set)
    for seed in range(60):
        for name, picture in (("tile", whole), ("cut-out", clear)):
            scene = photos.draw_scene({4: thing}, random.Random(seed), {thing: [picture]})
            ground = scene.getpixel((0, 0))
            mask = Image.new("L", scene.size)
            mask.putdata([255 * (color != ground) for color in scene.get_flattened_data()])
            box = mask.getbbox()
            assert CELL <= min(box[:2]) and max(box[2:]) <= 2 * CELL  # in its cell
            middle = scene.getpixel(((box[0] + box[2]) // 2, (box[1] + box[3]) // 2))
            assert (middle == ground) == (name == "cut-out")
            found["size"].add(box[2] - box[0])
            found["place"].add(box[:2])
            found["ground"].add(ground)
            found["side"].add(scene.getpixel((box[0] + 2, box[1] + 2)))
    assert len(found["size"]) == 7 and len(found["place"]) > 20 and len(found["ground"]) > 50
    assert found["side"] == {left, right}


@pytest.mark.parametrize("text, name", [
    ("A red squirrel.\nfr.utf8=Un écureuil roux.", "red squirrel"), ("An owl", "owl"),
    ("the Moon.\r\n", "Moon"), ("Anemone.", "Anemone"), ("\ufeffA café", "café"),
    ("A\tsnow\u00a0owl \t.\ranother line", "snow owl"), (None, "the file 7"), ("", "the file 7"),
    ("A ", "A")])  # the file's own name is the_file 7
def test_a_name_is_the_first_line_beside_the_picture_or_the_name_of_its_file(text, name, tmp_path):
    if text is not None:
        (tmp_path / "in/bird").mkdir(parents=True)
        (tmp_path / "in/bird/the_file 7.TXT").write_bytes(text.encode())
    for i, kind in enumerate(KINDS[:4]):
        for j in range(4):
            save(cut_out((i, j, 9)), tmp_path / f"in/{kind}/{kind} {j}.png")
    save(cut_out((9, 9, 9)), tmp_path / "in/bird/the_file 7.png")
    names = [thing.name for thing in photos.load(tmp_path / "in")]
    assert name in names and len(names) == 17


def test_what_cannot_be_used_is_left_out_counted_and_said(tree, tmp_path, capsys):
    things = photos.load(tree)
    assert "64 pictures of 64 things of 8 kinds; left out: none" in capsys.readouterr().out
    assert {thing.name: thing.traits for thing in things} == {n: (k,) for n, k in KIND.items()}
    bad = tmp_path / "bad"
    for path in tree.rglob("*.*"):
        (bad / path.relative_to(tree)).parent.mkdir(parents=True, exist_ok=True)
        (bad / path.relative_to(tree)).write_bytes(path.read_bytes())
    save(cut_out((9, 9, 9), (20, 20)), bad / "bird/small.png")          # but for its clear edges
    save(Image.new("RGBA", (90, 90)), bad / "bird/nothing.png")
    save(Image.new("RGB", (900, 2)), bad / "bird/line.png")
    (bad / "bird/broken.png").write_bytes((bad / "bird/a birder.png").read_bytes()[:150])
    save(cut_out((9, 9, 1)), bad / "bird/long.png", "A bird that stands on one leg, asleep.")
    save(cut_out((9, 9, 2)), bad / "bird/1.png", "A thing of two kinds.")
    save(cut_out((9, 9, 3)), bad / "hat/1.png", "a Thing of two kinds")
    save(cut_out((9, 9, 4)), bad / "tree/fish.png")                     # a kind's word
    save(cut_out((9, 9, 5)), bad / "tree/ .png")
    save(cut_out((9, 9, 6)), bad / "car/1.png")
    save(cut_out((9, 9, 6)), bad / "hat/copy.png")
    (bad / "bird/song.ogg").write_bytes(b"tweet")
    (bad / "more").symlink_to(tree)                                     # it might be a loop
    assert photos.load(bad).keys() == things.keys()
    said = capsys.readouterr().out
    for words in ("64 pictures of 64 things", "4 too small or unreadable ('bird/broken.png')",
                  "5 without a short name of their own", "1 of a kind with fewer than 4 things",
                  "1 the same as another ('hat/copy.png')",
                  "2 not pictures by their names ('bird/song.ogg')"):
        assert words in said, said


def test_a_deep_picture_is_seen_as_it_is(tmp_path):
    values = np.linspace(3000, 7000, 40 * 40).astype(np.uint16).reshape(40, 40)
    Image.fromarray(values).save(tmp_path / "deep.png")
    low, high = photos.read_picture((tmp_path / "deep.png").read_bytes()).getextrema()[0]
    assert 0 < low < 20 and 20 < high < 40  # of 65,535, in eight bits; clipped it would be white


def test_of_tux_paint_the_listed_photographs_are_taken_and_no_drawings(tmp_path, capsys):
    for i, file in enumerate(photos.STAMPS):
        save(cut_out((9, 9, i)), tmp_path / file)
    save(cut_out((9, 9, 255)), tmp_path / "animals/birds/cartoon/tux.png")
    things = photos.load(tmp_path)
    assert "1 not listed as photographs" in capsys.readouterr().out
    kinds = Counter(thing.traits[0] for thing in things)
    assert kinds == Counter(photos.STAMPS.values())
    assert len(things) >= 64 and len(kinds) == 9 and min(kinds.values()) >= photos.FEWEST


def test_a_dataset_depends_on_its_seed_and_pictures_alone(made, tree, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        photos.make(tmp_path / name, seed, scenes=20, held_out=5, pictures=tree)
    a, b, c = ({p.relative_to(tmp_path / name): p.read_bytes()
                for p in (tmp_path / name).rglob("*.*")} for name in "abc")
    assert a == b and a.keys() == c.keys() and a != c
    new = [photos.split_pictures(photos.load(tree), seed)[1] for seed in range(3)]
    assert new[0] != new[1] != new[2]


# Packages ----------------------------------------------------------------------------------------


def member(name, data):
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
    return header + data + b"\n" * (len(data) % 2)


def package(tree, pack=lzma.compress, name="data.tar.xz"):
    """The bytes of a Debian package with a folder's files where Tux Paint has its stamps."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.add(tree, "./usr/share/tuxpaint/stamps")
    return (b"!<arch>\n" + member("debian-binary", b"2.0") + member("control.tar.xz", b"abc")
            + member(name, pack(tar.getvalue())))


def test_a_debian_package_holds_what_a_folder_holds(tree, tmp_path):
    (tmp_path / "a.deb").write_bytes(package(tree))
    ours, theirs = photos.load(tmp_path / "a.deb"), photos.load(tree)
    assert list(ours) == list(theirs) and len(ours) == 64
    for thing in ours:
        assert [p.tobytes() for p in ours[thing]] == [p.tobytes() for p in theirs[thing]]


# Bad input ---------------------------------------------------------------------------------------


def refused(tmp_path, monkeypatch, capsys, *flags):
    """The one line with which the script ends; nothing is written."""
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["photos.py", "--out", str(out), "--scenes", "5", *flags])
    with pytest.raises(SystemExit) as ended:
        scenes.command(photos.make, "photos", photos.INSTALLED)
    error = re.sub(r".*\r", "", capsys.readouterr().err)  # progress bars erase themselves
    assert ended.value.code == 2 and error.count("\n") == 1 and error.startswith("photos.py: ")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    return error


def test_no_pictures_and_too_few_kinds_get_one_line(tree, tmp_path, monkeypatch, capsys):
    def error(*flags):
        return refused(tmp_path, monkeypatch, capsys, *flags)

    assert "no such folder or Debian package" in error("--pictures", str(tmp_path / "nowhere"))
    (tmp_path / "in").mkdir()
    assert "0 kinds" in error("--pictures", str(tmp_path / "in"))
    for n, kind in enumerate(KINDS[:4]):
        assert f"{n} kinds" in error("--pictures", str(tmp_path / "in"))
        for i, name in enumerate("abcd"):
            save(cut_out((9, n, i)), tmp_path / f"in/{kind}/{name} {kind}.png")
    photos.make(tmp_path / "four", 0, scenes=5, held_out=2, pictures=tmp_path / "in")
    monkeypatch.setattr(photos, "INSTALLED", tmp_path / "stamps")
    assert "apt install tuxpaint-stamps-default" in error()


@pytest.mark.parametrize("name", ["salt / pepper", "a\0b", "a\x1b[1m", "<image>", "\udcff"])
def test_a_name_that_cannot_be_asked_about_gets_one_line(name, tree, tmp_path, monkeypatch, capsys):
    save(cut_out((9, 9, 9)), tmp_path / "in/bird/1.png")
    (tmp_path / "in/bird/1.txt").write_bytes(name.encode("utf-8", "surrogateescape"))
    error = refused(tmp_path, monkeypatch, capsys, "--pictures", str(tmp_path / "in"))
    assert "bird/1.png" in error


@pytest.mark.parametrize("file", ["bird/a\nb.png", "bird/a\x1b[1m.png", "a\nb/bird/1.png",
                                  "<image>/1.png", "a\tb/1.png", "bird/<image>.png"])
def test_a_file_or_folder_that_cannot_be_asked_about_gets_one_line(file, tmp_path, monkeypatch,
                                                                   capsys):
    save(cut_out((9, 9, 9)), tmp_path / "in" / file)
    error = refused(tmp_path, monkeypatch, capsys, "--pictures", str(tmp_path / "in"))
    assert error[:-1].isprintable()
    if "\n" not in file:  # where its pictures are at the top of what was asked for
        top = str((tmp_path / "in" / file).parent)
        assert refused(tmp_path, monkeypatch, capsys, "--pictures", top)[:-1].isprintable()


@pytest.mark.parametrize("kinds", [("bird", "Bird"), ("bird", "birds")])
def test_kinds_that_read_alike_get_one_line(kinds, tmp_path, monkeypatch, capsys):
    for i, kind in enumerate([*kinds, "fish", "hat", "cup"]):
        for j in range(4):
            save(cut_out((9, i, j)), tmp_path / f"in/{i}/{kind}/{i} {j}.png")
    error = refused(tmp_path, monkeypatch, capsys, "--pictures", str(tmp_path / "in"))
    assert repr(kinds[0]) in error and repr(kinds[1]) in error
    (tmp_path / f"in/1/{kinds[1]}").rename(tmp_path / "in/1/owl")  # the control
    assert len(photos.load(tmp_path / "in")) == 20


def test_a_damaged_package_gets_one_line(tree, tmp_path, monkeypatch, capsys):
    whole = package(tree)
    spoiled = bytearray(whole)
    spoiled[len(whole) // 2] ^= 1
    sizes = whole.index(b"control.tar.xz") + 48
    for data, words in [
            (b"", "begin as one"), (b"a text", "begin as one"), (whole[:70], "no data.tar.xz"),
            (package(tree, bytes, "data.tar.zst"), "can be unpacked"),
            (whole[:len(whole) // 2], ""), (whole[:-3], ""), (bytes(spoiled), ""),
            (package(tree, lambda tar: lzma.compress(tar[:5000])), ""),
            (package(tree, lambda tar: lzma.compress(b"no tar" * 500)), ""),
            (whole[:sizes] + b"-60       " + whole[sizes + 10:], "no data.tar.xz")]:
        (tmp_path / "a.deb").write_bytes(data)
        error = refused(tmp_path, monkeypatch, capsys, "--pictures", str(tmp_path / "a.deb"))
        assert "a.deb: neither a folder nor a sound Debian package" in error and words in error
