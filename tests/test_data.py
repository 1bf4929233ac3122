"""The built-in datasets, the reader of the format, and the batches that are made of it."""
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict, namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import digits, shapes
from data.batches import Batches, Order, augment, make_batch
from data.formats import json_items
from data.llava import Examples, Records
from data.scenes import PLACES, Thing, describe_more
from engine.processes import load
from helpers import make_tiny
from nanoaki import ANSWER, IMAGE, PAD, PROMPT, Config, NanoAKI, Tokenizer, fit_picture

CONFIG = Config(image_size=16, patch_size=8, vit_embd=32, n_embd=32, n_head=2, vit_head=2,
                block_size=96)
ROOT = Path(__file__).parent.parent
PARTS = [1, 2, 3, 7, 1 << 20]  # characters that json_items reads at a time

# The built-in datasets ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    shapes.make(folder, seed=0, scenes=2500, held_out=200)
    return folder


@pytest.fixture
def scans(monkeypatch):
    """Stand in for scikit-learn's, which nothing else needs."""
    rng = np.random.default_rng(0)
    data = SimpleNamespace(images=rng.integers(0, 17, (800, 8, 8)), target=np.arange(800) % 10)
    fake = SimpleNamespace(load_digits=lambda: data)
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace(datasets=fake))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", fake)


def records(folder, split):
    return json.loads((folder / f"{split}.json").read_text())


def turns(record):
    return (turn["value"].replace("<image>\n", "") for turn in record["conversations"])


def described(folder):
    """Picture -> place -> name, of those whose caption says what is where."""
    scenes = {}
    for record in records(folder, "captions"):
        human, caption = turns(record)
        if human == "Describe the picture.":
            scene = scenes[record["image"]] = {}
            for part in caption.split(", "):
                place = max((p for p in PLACES if part.startswith(f"{p} ")), key=len)
                scene[place] = part.removeprefix(f"{place} ")
    return scenes


def test_shapes_depends_on_its_seed_alone(made, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        shapes.make(tmp_path / name, seed=seed, scenes=20, held_out=5)
    a, b, c = ({p.relative_to(tmp_path / name): p.read_bytes()
                for p in (tmp_path / name).rglob("*.*")} for name in "abc")
    assert a == b and a.keys() == c.keys() and a != c


def test_seed_0_gives_the_same_shapes_and_digits_everywhere(tmp_path, scans):
    for name, make, wanted in (("shapes", shapes.make, "21b7cb94d50eb5ad"),
                               ("digits", digits.make, "47a474a08dd9e566")):
        make(tmp_path / name, 0, scenes=40, held_out=10)
        digest = hashlib.sha256()  # of pixels: packing differs between builds of Pillow
        for path in sorted((tmp_path / name).rglob("*.*")):
            if path.suffix == ".png":
                with Image.open(path) as picture:
                    digest.update(picture.tobytes())
            else:
                digest.update(path.read_bytes())
        assert digest.hexdigest()[:16] == wanted


@pytest.mark.parametrize("flags, wanted", [
    (["--scenes", "0"], "--scenes must be at least 1"),
    (["--scenes", "x"], "invalid int value: 'x'"),
    (["--seed", "-1"], "--seed 0, not 20000 and -1"),
    (["--sede", "1"], "unrecognized arguments: --sede")])
def test_bad_flags_of_the_data_scripts_get_one_line_and_make_nothing(flags, wanted, tmp_path,
                                                                     capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shapes.py", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as ended:
        shapes.command(shapes.make, "shapes")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and wanted in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that can be handled")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_data_script_says_at_most_a_line_and_leaves_nothing(number, code, tmp_path):
    script = subprocess.Popen([sys.executable, "data/shapes.py", "--out", str(tmp_path / "out")],
                              cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(tmp_path.iterdir()) and script.poll() is None:
        time.sleep(0.05)
    assert [path.name[:8] for path in tmp_path.iterdir()] == ["out.part"]
    script.send_signal(number)
    _, error = script.communicate(timeout=60)
    assert script.returncode == code and not list(tmp_path.iterdir())
    assert b"Traceback" not in error and error.count(b"\n") <= 1  # the bar erases itself


def test_the_command_that_a_data_script_prints_can_be_pasted(tmp_path, monkeypatch, capsys):
    out = tmp_path / "it's a $folder"
    monkeypatch.setattr(sys, "argv", ["shapes.py", "--scenes", "9", "--out", str(out)])
    shapes.command(lambda folder, **flags: None, "shapes")
    command = capsys.readouterr().out.split("made ")[1].removeprefix(f"{out}: ")
    assert shlex.split(command) == ["python", "train.py", "--data", str(out)]


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(sys, "argv", ["shapes.py", "--scenes", "9", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        shapes.command(shapes.make, "shapes")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and f"{tmp_path / 'out'}: No space left on device" in said
    assert not list(tmp_path.iterdir())


HALF_BUILT = """
import os, sys
from tqdm import tqdm
from data import scenes, shapes

number, how = int(sys.argv.pop()), sys.argv.pop()

class Bar(tqdm):
    def __init__(self, *args, **kwargs):
        self.disable = False  # as halfway in tqdm's own
        os.kill(os.getpid(), number)
        super().__init__(*args, **kwargs)

scenes.tqdm = Bar
if how == "reported":
    scenes.leave = lambda number, frame: sys.exit(128 + number)
scenes.command(shapes.make, "shapes")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that can be handled")
@pytest.mark.parametrize("how, number, lines", [("quiet", signal.SIGINT, 1),
                                                ("quiet", signal.SIGTERM, 0),
                                                ("reported", signal.SIGTERM, None)])
def test_a_signal_while_a_bar_is_made_is_not_reported_as_an_error(how, number, lines, tmp_path):
    script = subprocess.run([sys.executable, "-c", HALF_BUILT, "--out", str(tmp_path / "out"),
                             how, str(int(number))], cwd=ROOT, capture_output=True, text=True)
    assert script.returncode == 128 + number and not list(tmp_path.iterdir())
    if how == "reported":  # the control
        assert "Exception ignored" in script.stderr
    else:
        assert script.stderr.count("\n") == lines


def test_no_scene_is_in_two_splits(made):
    pictures = {split: {p.read_bytes() for p in (made / "images" / split).iterdir()}
                for split in ("train", "val", "test")}
    assert [len(p) for p in pictures.values()] == [2500, 200, 200]
    assert not (pictures["train"] & pictures["val"] or pictures["train"] & pictures["test"]
                or pictures["val"] & pictures["test"])


def solve(question, scene):
    """The answer, from scratch: scene is {(row, column): (color, shape)}."""
    step = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    place = {p: (i // 3, i % 3) for i, p in enumerate(PLACES)}

    def find(words):
        hits = [at for at, kind in scene.items()
                if all(word in kind for word in words.split() if word != "thing")]
        assert len(hits) == 1, f"{question}: {words} is not one object"
        return hits[0]

    def beside(direction, at):
        return at[0] + step[direction][0], at[1] + step[direction][1]

    if m := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        return "yes" if m.groups() in scene.values() else "no"
    if m := re.fullmatch(r"how many (\w+)( things)? are there\?", question):
        word = m[1] if m[2] else m[1].removesuffix("es" if m[1] == "crosses" else "s")
        return str(sum(word in kind for kind in scene.values()))
    if m := re.fullmatch(r"where is the (.+)\?", question):
        return next(p for p, at in place.items() if at == find(m[1]))
    if m := re.fullmatch(r"what is at the (.+)\?", question):
        return " ".join(scene[place[m[1]]])
    if m := re.fullmatch(r"what color is the (\w+)\?", question):
        return scene[find(m[1])][0]
    if m := re.fullmatch(r"what shape is the (\w+) thing\?", question):
        return scene[find(m[1])][1]
    if m := re.fullmatch(r"what is ([a-z ]+?) the object ([a-z ]+?) the (.+)\?", question):
        return " ".join(scene[beside(m[1], beside(m[2], find(m[3])))])
    m = re.fullmatch(r"what is ([a-z ]+?) the (.+)\?", question)
    return " ".join(scene[beside(m[1], find(m[2]))])


def test_every_answer_is_right_and_every_question_has_one(made):
    scenes = {image: {divmod(PLACES.index(p), 3): tuple(name.split()) for p, name in scene.items()}
              for image, scene in described(made).items()}
    for record in records(made, "train"):
        question, answer = turns(record)
        if record["image"] in scenes:
            assert solve(question, scenes[record["image"]]) == answer, record


def test_a_caption_names_what_the_picture_shows(made):
    for image, scene in list(described(made).items())[:200]:
        picture = Image.open(made / image)
        for place, name in scene.items():
            row, column = divmod(PLACES.index(place), 3)
            cell = picture.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32))
            seen = max((p for _, p in cell.getcolors(1024)), key=lambda p: max(p) - min(p))
            near = min(shapes.COLORS, key=lambda c: sum((a - b) ** 2
                                                        for a, b in zip(shapes.COLORS[c], seen)))
            assert near == name.split()[0], image


def test_a_caption_of_what_is_beside_what_has_all_that_is_so_of_names_that_are_there_once():
    steps = {"left of": -1, "right of": 1, "above": -3, "below": 3}
    rng, asked, kinds = random.Random(0), set(), Counter()
    for n in range(2000):
        names = [f"thing {rng.randrange(12)}" for _ in range(rng.randint(3, 7))]
        scene = {place: Thing(name, ()) for place, name in
                 zip(sorted(rng.sample(range(9), len(names))), names)}
        human, caption = describe_more(scene, random.Random(n))
        kinds[human] += 1
        if human == "Describe the picture.":
            assert caption == ", ".join(f"{PLACES[p]} {thing.name}" for p, thing in scene.items())
            continue
        (step,) = [step for step in steps if human == f"Describe what is {step} what."]
        asked.add(step)
        right = []
        for place, thing in scene.items():
            other = place + steps[step]
            in_line = abs(steps[step]) == 3 or place // 3 == other // 3
            if other in scene and in_line and names.count(thing.name) == 1:
                right.append(f"{step} the {thing.name} {scene[other].name}")
        assert caption == ", ".join(right) != ""
    assert asked == set(steps) and 0.5 < kinds["Describe the picture."] / 2000 < 0.75


def test_no_task_can_be_answered_from_its_text(made):
    best, hits, counts = defaultdict(Counter), Counter(), Counter()
    for record in records(made, "train"):
        question, answer = turns(record)
        best[question][answer] += 1
    for record in records(made, "val") + records(made, "test"):
        question, answer = turns(record)
        counts[record["task"]] += 1
        hits[record["task"]] += question in best and best[question].most_common(1)[0][0] == answer
    assert set(counts) == set(shapes.TASKS)
    for task in shapes.TASKS:
        assert hits[task] / counts[task] <= (0.55 if task == "exist" else 0.40), task
    assert sum(hits.values()) / sum(counts.values()) <= 0.35


def test_every_word_of_shapes_is_one_token(made):
    texts = [t for r in records(made, "train") + records(made, "captions") for t in turns(r)]
    tokenizer = Tokenizer.train(texts, 512)
    words = {w for t in texts for w in Tokenizer.words.findall(t)}
    assert all(len(tokenizer.encode(word)) == 1 for word in words)


def test_digits_are_scans_that_no_other_split_has_and_its_answers_are_right(tmp_path, scans,
                                                                                monkeypatch):
    split = digits.split_scans(0)
    seen = [{scan.tobytes() for some in part.values() for scan in some} for part in split.values()]
    assert list(map(len, seen)) == [300, 300, 200] and len(set.union(*seen)) == 800
    digits.make(tmp_path / "digits", 0, scenes=60, held_out=10)
    scenes = described(tmp_path / "digits")
    words = {"left of": -1, "right of": 1, "above": -3, "below": 3}
    asked = Counter()
    for r in records(tmp_path / "digits", "train"):
        scene = {PLACES.index(place): digit for place, digit in scenes[r["image"]].items()}
        question, answer = turns(r)
        where = {digit: place for place, digit in scene.items()}
        found = re.findall(r"\d", question)
        step = next((step for word, step in words.items() if f" {word} " in question), None)
        line = question[question.find("in the ") + 7:-1]
        right = {"exist": lambda: "yes" if found[0] in where else "no",
                 "count": lambda: str(list(scene.values()).count(found[0])),
                 "where": lambda: PLACES[where[found[0]]],
                 "at": lambda: scene[PLACES.index(question[22:-1])],
                 "rel": lambda: scene[where[found[0]] + step],
                 "sum": lambda: str(int(found[0]) + int(scene[where[found[0]] + step])),
                 "max": lambda: max(scene[p] for p in digits.LINES[line] if p in scene)}
        assert answer == right[r["task"]](), (question, scene)
        asked[r["task"]] += 1
    assert asked == {task: 60 for task in digits.TASKS}
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        digits.split_scans(0)


# A file's items ----------------------------------------------------------------------------------


def random_value(rng, depth=0):
    """Any JSON: all kinds of numbers, text that is escaped or not, lists and objects of them."""
    kind = rng.randrange(5 if depth < 3 else 3)
    if kind == 0:
        return rng.choice([None, True, False, 0, -7, -0.0, 10 ** 20, 1.5e-7, -2E300, 12345.678,
                           float("inf"), float("-inf"), float("nan")])
    if kind in (1, 2):
        return "".join(rng.choices(["a", " ", "é", "東", "😀", '"', "\\", "\n", "\0", "]", ",",
                                    "}", "\u2028", "\ufeff", "/"], k=rng.randrange(6)))
    some = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return some if kind == 3 else {f"k{i}é": value for i, value in enumerate(some)}


def random_json(rng, items):
    """A list as somebody may write it down: with a mark in front, white space, escapes."""
    def space():
        return "".join(rng.choices(" \t\r\n", k=rng.randrange(3)))

    text = [json.dumps(item, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 0, 2]),
                       separators=("," + space(), ":" + space())) for item in items]
    listed = ",".join(space() + item + space() for item in text)
    return rng.choice(["", "\ufeff"]) + space() + "[" + (listed or space()) + "]" + space()


def written(path, text):
    path.write_bytes(text.encode())
    return path


def test_records_are_read_one_by_one_as_json_reads_them_at_once(tmp_path):
    for text in ('[]', ' [ ] ', '[1]', '[1, "a]", {"b": [2]}, null ]\n',
                 '[{"a": "\\u20ac,"},\n{}]'):
        path = written(tmp_path / "a.json", text)
        assert [item for item, _, _ in json_items(path)] == json.loads(text)


@pytest.mark.parametrize("part", PARTS)
def test_items_and_their_bytes_are_those_of_json_however_little_is_read_at_a_time(part, tmp_path):
    rng = random.Random(0)
    for _ in range(150):
        items = [random_value(rng) for _ in range(rng.randrange(6))]
        path = written(tmp_path / "a.json", random_json(rng, items))
        data, end = path.read_bytes(), None
        found = list(json_items(path, part))
        assert repr([item for item, _, _ in found]) == repr(items)  # 1 is not 1.0, nan is nan
        for item, start, stop in found:
            assert repr(json.loads(data[start:stop])) == repr(item)
            if end is not None:
                assert data[end:start].strip(b" \t\r\n") == b","
            end = stop


@pytest.mark.parametrize("part", PARTS)
def test_what_json_refuses_is_refused_and_nothing_else_is(part, tmp_path):
    rng, refused = random.Random(1), 0
    for _ in range(400):
        text = random_json(rng, [random_value(rng, 2) for _ in range(rng.randrange(4))])
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", *'[]{},:"\\0.e-x \n']) + text[at + rng.randrange(2):]
        path = written(tmp_path / "a.json", text)
        try:
            wanted = json.loads(text.removeprefix("\ufeff"))
        except ValueError:
            wanted = None
        if isinstance(wanted, list):
            assert repr([item for item, _, _ in json_items(path, part)]) == repr(wanted)
        else:
            refused += 1
            with pytest.raises(ValueError, match=re.escape(str(path))):
                list(json_items(path, part))
    assert 100 < refused < 300  # both were tried


# Records -----------------------------------------------------------------------------------------

BAD = {
    "{": "must be a JSON list", "[1, 2": "not a JSON list", "[{]": "not JSON",
    "[" * 100000: "nested too deeply", "[]": "no records", "[1]": "record 0", "": "must be a JSON",
    "[] x": "more stands behind it", b'["\xff"]': "not UTF-8",
    '[{"id": 7, "conversations": []}]': "record 0 (id 7): turns must alternate",
    '[{"conversations": [{"from": "human", "value": "a"}]}]': "must alternate",
    '[{"conversations": [{"from": "bot", "value": "a"}]}]': "unknown speaker 'bot'",
    '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}]':
        "answer is empty",
    '[{"conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "b"}]}]':
        "lone surrogate",
    '[{"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]}]':
        "1 <image>",
    '[{"image": "no.png", "conversations": [{"from": "human", "value": "a"}, '
    '{"from": "gpt", "value": "b"}]}]': "no.png: no such file",
    '[{"image": "../x.png", "conversations": [{"from": "human", "value": "a"}, '
    '{"from": "gpt", "value": "b"}]}]': "below the data folder",
    '[{"image": "train.json", "conversations": [{"from": "human", "value": "a"}, '
    '{"from": "gpt", "value": "b"}]}]': "not a picture",
}


@pytest.mark.parametrize("text, words", BAD.items(), ids=list(map(str, range(len(BAD)))))
def test_bad_data_is_refused_with_file_record_and_reason(tmp_path, text, words):
    (tmp_path / "train.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(words)) as e:
        Records.read(tmp_path, "train.json")
    assert str(tmp_path / "train.json") in str(e.value)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'train.json'}: No such file")):
        Records.read(tmp_path, "train.json")


WORDS = ["red", "naïve café", "東京😀", 'a "quoted" \\', "two\nlines\n", "<answer>", "\u2028"]
MODEL = Config(image_size=16, patch_size=8, block_size=200)  # four visual tokens a picture

# A reply worked out by hand: what Replies holds of it, then the example that it is.
Reply = namedtuple("Reply", "record turn pictures before needed answer group "
                            "id task question text shown")


def random_records(rng, n):
    """LLaVA records of all kinds, some of them bad, about 36 pictures; neighbours often share."""
    items, shown = [], []
    for _ in range(n):
        if rng.random() < 0.6:
            near = 3 * rng.randrange(12)  # no record links pictures of different threes
            shown = [f"p{near + rng.randrange(3)}.png" for _ in range(rng.randrange(4))]
        talk = [[rng.choice(WORDS) for _ in range(rng.randrange(3))]
                for _ in range(rng.randint(1, 4))]
        for _ in shown if rng.random() < 0.6 else []:
            words = rng.choice(talk)
            words.insert(rng.randrange(len(words) + 1), rng.choice(["<image>", "\n<image>\n"]))
        turns = [("system", "be brief")] if rng.random() < 0.3 else []
        for words in talk:
            answer = rng.choice(["yes", "<image> é", " a red dot ", "x" * rng.randint(140, 199)])
            turns += [("human", "".join(words)), ("gpt", answer)]
        if rng.random() < 0.1:
            turns[-1] = ("gpt", " ")
        item = {"conversations": [{"from": who, "value": text} for who, text in turns]}
        item |= rng.choice([{}, {"id": rng.randrange(99)}, {"id": f"é{rng.randrange(99)}"}])
        item |= rng.choice([{}, {"task": None}, {"task": "where"}, {"source": [1.5, {}]}])
        ways = {0: [[], None, ""], 1: [shown, *shown]}  # to write them down
        item["image"] = rng.choice(ways.get(len(shown), [shown]))
        items.append(item)
    return items


def pictures_of(item):
    shown = item["image"] or []
    return [shown] if isinstance(shown, str) else shown


def question_of(text):
    return re.sub(r"\n*<image>\n*", "", text).strip("\n")


def shown_of(text):
    """What is shown of a question: its pictures only where they stand within the text."""
    shown = "<image>".join(piece.strip("\n") for piece in text.split("<image>")).strip()
    while shown.startswith("<image>"):
        shown = shown.removeprefix("<image>").strip()
    while shown.endswith("<image>"):
        shown = shown.removesuffix("<image>").strip()
    return shown


def replies_by_hand(items):
    """The Reply of each answer of the good records, whether it fits a model or not."""
    replies, last, group = [], None, -1
    for number, item in enumerate(items):
        turns = [(turn["from"], turn["value"]) for turn in item["conversations"]]
        if not turns[-1][1].strip():
            continue
        shown = pictures_of(item)
        if not shown or shown != last:
            group += 1
        last = shown
        human = [text if who == "human" else "" for who, text in turns]
        system = len(turns[0][1].encode()) + 2 if turns[0][0] == "system" else 0
        for turn, (who, text) in enumerate(turns):
            if who == "gpt":
                seen = "".join(human[:turn]).count("<image>")
                if "<image>" not in "".join(human):
                    seen = len(shown)
                before = sum(len(t.encode()) + 2 for _, t in turns[:turn])
                replies.append(Reply(
                    number, turn, seen, before, system + len(human[turn - 1].encode()) + 2,
                    len(text.encode()), group, str(item.get("id", number)),
                    item.get("task") or "", shown_of(human[turn - 1]), text,
                    shown[:seen]))
    return replies


def fits(reply, items):
    """Whether pictures, system text, question and answer have room, a byte being a token."""
    talk = items[reply.record]["conversations"]
    given = question_of(talk[reply.turn - 1]["value"]) + "?"  # <answer>
    if talk[0]["from"] == "system":
        given += talk[0]["value"] + "\n"
    return 4 * reply.pictures + len(given.encode()) + reply.answer + 1 <= MODEL.block_size


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """(folder, items of its train.json): random records and small pictures of all colors."""
    folder, rng = tmp_path_factory.mktemp("chats"), random.Random(0)
    for i in range(36):
        size = rng.choice([(20, 10), (16, 16), (9, 30)])
        Image.new("RGB", size, tuple(rng.choices(range(256), k=3))).save(folder / f"p{i}.png")
    items = random_records(rng, 300)
    written(folder / "train.json", random_json(rng, items))
    return folder, items


@pytest.fixture(scope="module")
def examples(chats):
    records = Records.read(chats[0], "train.json", skip_bad=True)
    return Examples(records, Tokenizer([]), MODEL, skip_bad=True)


def check_selection(part, replies, items):
    """A selection of records has exactly these replies, and examples of those that fit."""
    assert [tuple(map(int, row)) for row in zip(*part.replies)] == [r[:7] for r in replies]
    wanted = [r for r in replies if fits(r, items)]
    examples = Examples(part, Tokenizer([]), MODEL, skip_bad=True)
    assert len(examples) == len(wanted)
    assert examples.skipped - part.skipped == len(replies) - len(wanted)
    assert [tuple(map(int, row)) for row in zip(*examples.replies)] == [r[:7] for r in wanted]
    for i, reply in enumerate(wanted):
        e = examples[i]
        assert (e.id, e.task, e.question, e.answer) == reply[7:11]
        assert e.pictures == [part.path.parent / path for path in reply.shown]
        assert e.whole[1].count(IMAGE) == 4 * reply.pictures
        assert bytes(t for t, r in zip(*e.whole) if r == ANSWER and t < 256) == reply.text.encode()
    numbers = list(dict.fromkeys(r.record for r in replies))
    talks = [[(turn["from"], turn["value"]) for turn in items[n]["conversations"]] for n in numbers]
    assert len(part) == len(numbers) and [r.turns for r in part] == talks
    assert [part[i].turns for i in range(len(part))] == talks
    texts = "".join(question_of(text) if who == "human" else text
                    for talk in talks for who, text in talk)
    assert Counter("".join(part.texts(10 ** 9))) == Counter(texts)


def test_what_is_known_of_a_reply_is_what_its_file_says(chats, capsys):
    folder, items = chats
    records, replies = Records.read(folder, "train.json", skip_bad=True), replies_by_hand(items)
    bad = len(items) - len({r.record for r in replies})
    assert records.skipped == bad > 10 and f"{bad} of 300 are bad" in capsys.readouterr().err
    assert 20 < sum(not fits(r, items) for r in replies) < len(replies) / 2  # both are tried
    check_selection(records, replies, items)


def test_selections_are_rows_that_point_to_the_right_records_and_copy_no_text(chats):
    folder, items = chats
    whole, rng = Records.read(folder, "train.json", skip_bad=True), random.Random(0)
    replies = replies_by_hand(items)
    numbers = list(dict.fromkeys(r.record for r in replies))
    shown = {n: set(pictures_of(items[n])) for n in numbers}
    text = re.compile("café|brief|p[0-9]+.png".encode())
    assert text.search(pickle.dumps(list(whole)))  # the control

    def check(part, kept):
        check_selection(part, [r for r in replies if r.record in kept], items)
        assert part.spans is whole.spans and len(part.rows) == len(kept)
        assert not text.search(pickle.dumps(part))

    for _ in range(3):
        part, kept = whole, numbers
        while len(kept) > 40:  # selections of selections
            keep = [rng.random() < 0.5 for _ in kept]
            part, kept = part.where(keep), [n for n, k in zip(kept, keep) if k]
            check(part, kept)
        assert part.skipped == 0
    some = {f"p{i}.png" for i in range(0, 36, 5)}
    part = whole.without(some)
    check(part, [n for n in numbers if not shown[n] & some])
    assert part.skipped == whole.skipped > 0 and 0 < len(part) < len(whole)
    rest, held = part.split(0.2, seed=1)
    sides = [set(side.rows.tolist()) for side in (rest, held)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(part.rows.tolist())
    assert not set.union(*map(shown.get, sides[0])) & set.union(*map(shown.get, sides[1]))
    for side, kept in zip((rest, held), sides):
        check(side, sorted(kept))
    with pytest.raises(ValueError, match="train.json: there are no records"):
        whole.where([False] * len(whole))


def test_texts_are_drawn_from_the_seed_up_to_so_many_bytes(chats):
    records = Records.read(chats[0], "train.json", skip_bad=True)
    texts = [list(records.texts(3000, seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(2500 < len("".join(some).encode()) <= 3000 for some in texts)
    first = [record.turns[0][1] for record in records]
    i = next(i for i, text in enumerate(first) if not text.isascii())
    one, size = records.where([n == i for n in range(len(first))]), len(first[i].encode())
    assert not list(one.texts(size - 1)) and list(one.texts(size))


def test_a_held_out_share_has_no_picture_on_both_sides(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "p0.png")
    for i in range(1, 30):
        (tmp_path / f"p{i}.png").write_bytes((tmp_path / "p0.png").read_bytes())
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    data = [{"id": i, "image": [f"p{i % 20}.png", f"p{i % 10 + 20}.png"][:1 + i % 2],
             "conversations": talk} for i in range(60)]
    (tmp_path / "train.json").write_text(json.dumps(data))
    both = Records.read(tmp_path, "train.json")
    rest, held = both.split(0.1, seed=0)
    used = [{p for i in range(len(side)) for p in side[i].pictures} for side in (rest, held)]
    assert not used[0] & used[1] and len(rest) + len(held) == 60 and 6 <= len(held) < 30
    assert [r.id for r in both.split(0.1, seed=0)[1]] == [r.id for r in held]
    assert [r.id for r in both.split(0.1, seed=1)[1]] != [r.id for r in held]


def grow(path):
    with open(path, "ab") as file:
        file.write(b" ")
    os.utime(path, ns=(0, 0))


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def swap(path):
    path.with_suffix(".new").write_bytes(path.read_bytes().replace(b"left", b"LEFT"))
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize("change, words", [
    (grow, "changed since it was read"), (touch, "changed since it was read"),
    (swap, "changed since it was read"), (os.remove, "No such file")],
    ids=["grown", "of another time", "another of its size", "gone"])
def test_a_file_that_changes_under_a_run_is_refused_by_name_and_a_batch_says_it(change, words,
                                                                               tmp_path):
    path = make_tiny(tmp_path / "data", n=6) / "train.json"
    content, time = path.read_bytes(), path.stat().st_mtime_ns
    os.utime(path, ns=(0, 0))  # so that no clock is too coarse
    records = Records.read(path.parent, "train.json")
    examples = Examples(records, Tokenizer([]), CONFIG)
    batches = Batches(examples, order_of(examples, 4, 3))

    def uses():
        yield from (lambda: records[0], lambda: list(records), lambda: examples[5],
                    lambda: list(records.texts(99)), lambda: records.split(0.5, 0),
                    lambda: records.without({"p.png"}))

    wanted = [use() for use in uses()]
    good = batches[1]
    assert good.problem == "" and len(good.ids) == 4  # the control
    change(path)
    for use in uses():
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{words}"):
            use()
    for workers in (0, 1):
        batch = next(load([batches], 1, workers, torch.device("cpu")))[0]
        assert batch.problem.startswith(f"{path}: ") and words in batch.problem
        assert "\n" not in batch.problem and batch.ids == []
        assert all(len(value) == 0 for value in batch[:7])
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))  # put back as it was
    assert [use() for use in uses()][:4] == wanted[:4] and same_batch(batches[1], good)


# Examples ----------------------------------------------------------------------------------------


def test_a_conversation_of_n_turns_is_n_examples_with_all_before_as_prompt(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    Image.new("RGB", (10, 20), "blue").save(tmp_path / "b.png")
    talk = [("system", "be brief"), ("human", "first <image>"), ("gpt", "red"),
            ("human", "<image>\nnext"), ("gpt", "blue")]
    data = [{"id": 1, "image": ["a.png", "b.png"], "task": None,
             "conversations": [{"from": s, "value": v} for s, v in talk]},
            {"id": 2, "conversations": [{"from": "human", "value": "hi"},
                                        {"from": "gpt", "value": "<image> ho"}]}]
    (tmp_path / "train.json").write_text(json.dumps(data))
    examples = Examples(Records.read(tmp_path, "train.json"), Tokenizer([]), CONFIG)
    some = [examples[i] for i in range(len(examples))]
    assert [(e.answer, len(e.pictures)) for e in some] == [("red", 1), ("blue", 2),
                                                           ("<image> ho", 0)]
    assert [e.whole[1].count(IMAGE) for e in some] == [4, 8, 0]
    for e in some:
        assert e.task == ""
        tokens = [t for t, r in zip(*e.whole) if r == ANSWER]
        assert tokens == [*e.answer.encode(), Tokenizer.eos]
        assert e.whole[0][:len(e.prompt[0])] == e.prompt[0] and ANSWER not in e.prompt[1]
        assert e.whole[1][:len(e.prompt[1])] == e.prompt[1]
    batch = make_batch(examples, [2, 1, 0], "data")
    assert batch.images.shape == (2, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.shown.tolist() == [0, 1, 0]  # the rows: none, both, the first
    assert batch.images[0, 0].sum() > batch.images[0, 2].sum()  # which is red


def test_an_answer_that_does_not_fit_the_positions_is_refused_with_its_record(tmp_path):
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "long " * 30}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "x9", "conversations": talk}]))
    with pytest.raises(ValueError, match="x9.*96 positions"):
        Examples(Records.read(tmp_path, "train.json"), Tokenizer([]), CONFIG)


def test_lengths_are_right_on_average_count_each_picture_and_end_at_the_positions(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    talks = [["hi", "yes"], ["hi", "yes"], ["<image>what is it?", "red" * 9],
             ["why?", "so"] * 5 + ["a" * 20, "b"]]
    (tmp_path / "train.json").write_text(json.dumps(
        [{"image": ["a.png"] * (n in (1, 2)), "conversations": [
            {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(talk)]}
         for n, talk in enumerate(talks)]))
    for block_size, long in ((96, False), (50, True)):
        examples = Examples(Records.read(tmp_path, "train.json"), Tokenizer([]),
                            replace(CONFIG, block_size=block_size))
        real = [len(examples[i].whole[0]) for i in range(len(examples))]
        assert len(real) == 9 and float(examples.lengths[1] - examples.lengths[0]) == 4
        assert (float(examples.lengths.max()) == block_size) == long
        if not long:  # else the history is left out of some
            assert sum(real) == pytest.approx(float(examples.lengths.sum()))


def test_captions_are_records_like_any_other_and_their_human_text_is_the_question(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    talks = [["<image>\nDescribe the picture.", "a red one"], ["<image>", "red"],
             ["What is it?<image>", "red", "And now?", "still red"]]
    for name in ("captions", "train"):
        (tmp_path / f"{name}.json").write_text(json.dumps(
            [{"image": "a.png", "conversations": [
                {"from": who, "value": text} for who, text in zip(["human", "gpt"] * 2, talk)]}
             for talk in talks]))
    captions, train = ([*map(examples.__getitem__, range(len(examples)))] for examples in (
        Examples(Records.read(tmp_path, f"{name}.json"), Tokenizer([]), CONFIG)
        for name in ("captions", "train")))
    assert captions == train
    assert [(e.question, e.answer) for e in captions] == [
        ("Describe the picture.", "a red one"), ("", "red"), ("What is it?", "red"),
        ("And now?", "still red")]
    tokens, roles = captions[0].whole
    assert tokens == [Tokenizer.image] * 4 + [*b"Describe the picture.", Tokenizer.answer,
                                              *b"a red one", Tokenizer.eos]
    assert roles == [IMAGE] * 4 + [PROMPT] * 22 + [ANSWER] * 10


# The order of examples ---------------------------------------------------------------------------


def batches_of(lengths, batch_size, seed, steps, share=1, groups=None):
    """Indices of each step's batch; without groups, each example has a picture of its own."""
    groups = torch.arange(len(lengths)) if groups is None else groups
    order = Order(lengths.double(), groups, batch_size, steps, seed, share)
    return [order[step].tolist() for step in range(len(order))]


def order_of(examples, batch_size, steps, seed=(0,), share=1):
    return Order(examples.lengths, examples.replies.group, batch_size, steps, list(seed), share)


def test_batches_are_a_function_of_seed_and_step_and_hold_every_example_once_an_epoch():
    lengths = torch.randint(5, 400, (1000,))
    whole = batches_of(lengths, 10, [3, 1], 250)
    fresh = Order(lengths.double(), torch.arange(1000), 10, 250, [3, 1])
    assert len(whole) == len(list(fresh)) == 250  # it ends
    for step in (*range(130, 250), *np.random.default_rng(0).permutation(250)[:40].tolist()):
        assert fresh[step].tolist() == whole[step]  # whatever was asked for before
    assert batches_of(lengths, 10, [4, 1], 250) != whole
    for epoch in (whole[:100], whole[100:200]):
        assert sorted(sum(epoch, [])) == list(range(1000))
    assert whole[:100] != whole[100:200]
    assert [len(b) for b in batches_of(torch.tensor([5, 6, 7]), 8, [0, 0], 4)] == [8] * 4


@pytest.mark.parametrize("lengths", [torch.randint(5, 400, (20000,)),
                                     torch.randint(42, 53, (20000,)),
                                     torch.tensor([46 + 3 * (i % 5) for i in range(20000)])])
def test_padding_is_under_15_percent_where_random_batches_may_waste_half(lengths):
    batches = batches_of(lengths, 32, [0, 0], 500)
    longest = sum(32 * int(lengths[b].max()) for b in batches)
    assert 1 - sum(int(lengths[b].sum()) for b in batches) / longest < 0.15


@pytest.mark.parametrize("low, high, mixed", [(40, 70, True), (20, 120, False)])
def test_batches_are_sorted_by_length_only_where_random_ones_would_be_a_quarter_padding(low, high,
                                                                                       mixed):
    lengths = torch.randint(low, high + 1, (20000,)).double()
    means = torch.stack([lengths[b].mean() for b in batches_of(lengths, 32, [0, 0], 500)])
    assert (means.std() < 1.2 * lengths.std() / 32 ** 0.5) == mixed


def test_examples_about_a_picture_share_a_batch_and_still_come_once_an_epoch():
    lengths, groups = torch.full((700,), 50.0), torch.arange(100).repeat_interleave(7)
    batches = batches_of(lengths, 10, [0, 0], 70, 4, groups)
    assert sorted(sum(batches, [])) == list(range(700))
    pictures = [len(set(groups[b].tolist())) for b in batches]
    assert sum(pictures) / 70 < 5 < sum(len(set(groups[b].tolist())) for b in
                                        batches_of(lengths, 10, [0, 0], 70, 1, groups)) / 70
    first = {tuple(sorted(i % 7 for i in b if i // 7 == b[0] // 7)) for b in batches}
    assert len(first) > 10  # not always the same questions together


def test_padding_is_under_15_percent_on_shapes(made):
    tokenizer = Tokenizer.train(list(Records.read(made, "train.json").texts(10 ** 6)))
    examples = Examples(Records.read(made, "train.json"), tokenizer, Config())
    batches = Batches(examples, order_of(examples, 64, 20, [0, 1], 7))
    roles = [batches[step].roles for step in range(20)]
    assert sum(int((r == PAD).sum()) for r in roles) < 0.15 * sum(r.numel() for r in roles)


# Batches -----------------------------------------------------------------------------------------


def same_batch(a, b):
    return all(map(torch.equal, a[:7], b[:7])) and a[7:] == b[7:]


def check_batch(batch, examples, indices, picture_order):
    """All of a batch, worked out from its examples one by one."""
    some = examples.some(indices, picture_order)
    T = max(len(e.whole[0]) for e in some)
    visual, learned, shown = [], [], []
    for row, e in enumerate(some):
        tokens, roles = e.whole
        assert batch.tokens[row].tolist() == tokens + [Tokenizer.pad] * (T - len(tokens))
        assert batch.roles[row].tolist() == roles + [PAD] * (T - len(roles))
        for t, role in enumerate(roles):
            if role == IMAGE:
                visual.append(row * T + t)
            if role == ANSWER:
                learned.append(row * T + t)
            assert batch.targets[row, t] == (tokens[t] if role == ANSWER else -100)
        assert (batch.targets[row, len(roles):] == -100).all()
        shown += e.pictures
    assert batch.visual.tolist() == visual and batch.learned.tolist() == learned
    assert batch.start == min(n % T for n in learned) - 1
    assert batch.ids == [e.id for e in some] and batch.problem == ""
    assert all(value.dtype == torch.int64 for value in batch[1:7])
    assert batch.images.dtype == torch.uint8
    assert len(batch.images) == max(1, len(set(shown))) and len(batch.shown) == len(shown)
    for n, path in zip(batch.shown, shown):
        with Image.open(path) as image:
            assert torch.equal(batch.images[n], fit_picture(image, 16))


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("picture_order", ["data", "image", "text"])
def test_the_parts_of_a_batch_are_the_whole_and_all_in_it_is_right(parts, picture_order, examples):
    order = order_of(examples, 14, 40, share=3)
    cut = [Batches(examples, order, n, parts, (picture_order,)) for n in range(parts)]
    for step in range(0, 40, 3):
        some = [batches[step] for batches in cut]
        indices, done = order[step].tolist(), 0
        assert max(len(p.ids) for p in some) - min(len(p.ids) for p in some) <= 1
        for part in some:
            check_batch(part, examples, indices[done:done + len(part.ids)], picture_order)
            done += len(part.ids)
        assert done == 14


def test_a_batch_is_a_function_of_its_step(examples):
    batches, again = (Batches(examples, order_of(examples, 8, 60)) for _ in range(2))
    assert len(batches) == len(list(batches)) == 60
    for step in (50, 3, 50, 0):
        assert same_batch(batches[step], again[step])
    assert not same_batch(batches[3], again[50])


def test_in_orders_that_take_turns_pictures_move_and_nothing_else(tmp_path):
    data = Records.read(make_tiny(tmp_path / "data", n=20), "train.json")
    examples = Examples(data, Tokenizer([]), CONFIG)
    order = order_of(examples, 6, 13, share=2)
    plain = Batches(examples, order, picture_orders=("data",))
    dual = Batches(examples, order, picture_orders=("image", "text"))
    for step in (7, *range(13)):  # by the number of the step, not by how many were asked for
        one, two, T = plain[step], dual[step], plain[step].tokens.shape[1]
        marker = (one.tokens == Tokenizer.answer).long().argmax(1)[:, None]
        place, after = torch.arange(T), bool(step % 2)
        assert torch.equal(one.roles == IMAGE, (place < 4).expand(6, T))  # the control
        assert torch.equal(two.roles == IMAGE, (place >= marker - 4) & (place < marker)
                           if after else (place < 4).expand(6, T))
        assert torch.equal(two.tokens.sort().values, one.tokens.sort().values)
        assert torch.equal(two.tokens[two.roles == PROMPT], one.tokens[one.roles == PROMPT])
        for name in ("images", "shown", "targets", "learned"):
            assert torch.equal(getattr(two, name), getattr(one, name))
        assert two.ids == one.ids and same_batch(one, two) == (not after)


def test_prompt_first_is_what_the_sequence_builder_makes_of_pictures_written_after_the_text(chats):
    folder, rng, files = chats[0], random.Random(0), {"before": [], "after": []}
    for i in range(40):
        turns, shown = {"before": [], "after": []}, []
        for _ in range(rng.randint(1, 3)):
            text, images = "word" * rng.randint(1, 5), "<image>" * rng.randint(0, 2)
            shown += [f"p{rng.randrange(36)}.png" for _ in range(len(images) // 7)]
            turns["before"] += [("human", images + text), ("gpt", "yes")]
            turns["after"] += [("human", text + images), ("gpt", "yes")]
        for name in files:
            talk = [("system", "be brief"), *turns[name]]
            files[name].append({"id": i, "image": shown, "conversations": [
                {"from": who, "value": text} for who, text in talk]})
    sets = {}
    for name, items in files.items():
        (folder / f"{name}.json").write_text(json.dumps(items))
        sets[name] = Examples(Records.read(folder, f"{name}.json"), Tokenizer([]), MODEL)
    indices = list(range(len(sets["before"])))
    assert len(sets["after"]) == len(indices) > 60
    before, after = (make_batch(sets[name], indices, "data") for name in ("before", "after"))
    assert not torch.equal(before.tokens, after.tokens)  # the control
    assert same_batch(make_batch(sets["before"], indices, "text"), after)
    assert same_batch(make_batch(sets["after"], indices, "image"), before)


def test_a_picture_encoded_once_for_its_questions_gives_the_gradient_of_one_each(tmp_path,
                                                                                 monkeypatch):
    folder = make_tiny(tmp_path / "data", n=20)
    examples = Examples(Records.read(folder, "train.json"), Tokenizer([]), CONFIG)
    model = NanoAKI(CONFIG).double()
    batch = make_batch(examples, [0, 7, 1, 6, 3], "data")
    assert len(batch.images) == 3 and batch.shown.tolist() == [0, 1, 0, 1, 2]
    text, gradients = (batch.tokens, batch.roles, batch.targets), []
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # losses are float32: not here
    for loss in (lambda: model.loss(batch),
                 lambda: model(batch.images[batch.shown], *text)[1],
                 lambda: model.loss(batch._replace(shown=batch.shown.flip(0)))):
        model.zero_grad()
        loss().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
    assert not torch.allclose(gradients[0], gradients[2], atol=1e-6)


def test_a_batch_without_pictures_has_one_that_is_not_shown_and_a_gradient_for_every_parameter(
        examples):
    none = (examples.replies.pictures == 0).nonzero()[:6, 0].tolist()
    batch, model = make_batch(examples, none, "data"), NanoAKI(MODEL)
    assert len(none) == 6 and batch.images.shape == (1, 3, 16, 16)
    assert len(batch.shown) == len(batch.visual) == 0 and not (batch.roles == IMAGE).any()
    loss = model.loss(batch)
    assert torch.allclose(loss, model(None, batch.tokens, batch.roles, batch.targets)[1])
    loss.backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad.any()}
    assert all(p.grad is not None for p in model.parameters()) and moved == {"decoder"}


def test_a_picture_that_breaks_is_what_its_batch_says_and_the_others_are_as_before(tmp_path):
    folder = make_tiny(tmp_path / "data", n=6)
    examples = Examples(Records.read(folder, "train.json"), Tokenizer([]), CONFIG)
    order = order_of(examples, 4, 9)
    halves = [Batches(examples, order, n, 2) for n in range(2)]
    before = [[half[step] for half in halves] for step in range(9)]
    broken = folder / "images/train2.png"
    broken.write_bytes(broken.read_bytes()[:40])
    said = 0
    for step in range(9):
        for n, half in enumerate(halves):
            here = order[step][2 * n:2 * n + 2].tolist()
            if broken not in [path for i in here for path in examples[i].pictures]:
                assert same_batch(half[step], before[step][n])
                continue
            batch, said = half[step], said + 1
            assert batch.problem.startswith(f"{broken}: not a picture")
            assert batch.ids == [] and all(len(value) == 0 for value in batch[:7])
    assert 3 <= said <= 9
    examples.skip_bad = True  # then what shows it is left out, and nothing else
    for step in range(9):
        for n, half in enumerate(halves):
            shown = [examples[i] for i in order[step][2 * n:2 * n + 2].tolist()]
            good, batch = [e for e in shown if broken not in e.pictures], half[step]
            assert batch.ids == [e.id for e in good] and not batch.problem
            assert len(batch.unread) == 2 - len(good)
            assert all(text.startswith(f"{broken}: ") for text in batch.unread)
            if len(good) == 2:
                assert same_batch(batch, before[step][n])


def test_a_batch_in_which_nothing_is_left_has_a_loss_and_gradients_of_zero(tmp_path):
    folder = make_tiny(tmp_path / "data", n=6)
    examples = Examples(Records.read(folder, "train.json"), Tokenizer([]), CONFIG, skip_bad=True)
    model, found = NanoAKI(CONFIG), []
    for break_it in (lambda path: None, lambda path: path.write_bytes(b"")):
        for i in range(6):
            break_it(folder / f"images/train{i}.png")
        model.zero_grad()
        loss = model.loss(make_batch(examples, [0, 5], "data"))
        loss.backward()
        found.append((loss.item(), max(float(p.grad.abs().max()) for p in model.parameters())))
    (loss, gradient), nothing = found
    assert loss > 1 and gradient > 0 and nothing == (0, 0)


def test_augmentation_keeps_what_answers_are_about_and_is_a_function_of_the_batch(made):
    rng = np.random.default_rng(0)
    for path, scene in list(described(made).items())[:40]:
        with Image.open(made / path) as image:
            before = fit_picture(image, 96)
        after = augment(before, rng)
        assert after.shape == before.shape and not torch.equal(after, before)

        def alike(other):  # correlation, seen from afar
            pair = [torch.nn.functional.avg_pool2d(p.float(), 12).flatten()
                    for p in (other, before)]
            return float(torch.corrcoef(torch.stack(pair))[0, 1])

        assert alike(after) > max(alike(after.flip(2)), alike(after.flip(1)), 0.5)
        for place, name in scene.items():
            row, column = divmod(PLACES.index(place), 3)
            cell = after[:, 32 * row:32 * row + 32, 32 * column:32 * column + 32].float()
            strong = (cell.amax(0) - cell.amin(0)).flatten().topk(40).indices
            seen = cell.flatten(1)[:, strong].median(1).values.tolist()
            near = min(shapes.COLORS, key=lambda c: sum((a - b) ** 2
                                                        for a, b in zip(shapes.COLORS[c], seen)))
            assert near == name.split()[0], path
    examples = Examples(Records.read(made, "val.json"), Tokenizer([]), Config(block_size=200))

    def pictures(step, indices):
        return make_batch(examples, indices, "data", [1, 0, step]).images

    whole = pictures(3, [0, 9, 20])  # however a step's batch is split; other steps differ
    assert torch.equal(whole, torch.cat([pictures(3, [0]), pictures(3, [9, 20])]))
    assert not torch.equal(whole, pictures(4, [0, 9, 20]))
    order = order_of(examples, 4, 9)
    for parts in (1, 2):
        some = Batches(examples, order, parts - 1, parts, augment_seed=[1, 0])
        for step in range(5, 9):
            here = order[step][4 - 4 // parts:].tolist()
            assert torch.equal(some[step].images, pictures(step, here))
            plain = make_batch(examples, here, "data")
            assert not torch.equal(some[step].images, plain.images)
            assert same_batch(some[step]._replace(images=plain.images), plain)


# Workers -----------------------------------------------------------------------------------------


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_workers_and_the_training_process_read_the_same_batches(start_method, tmp_path):
    folder = make_tiny(tmp_path / "data", n=20)
    examples = Examples(Records.read(folder, "train.json"), Tokenizer([]), CONFIG)
    order = order_of(examples, 8, 12, share=2)  # two epochs and a half
    parts = [Batches(examples, order, n, 2, ("image", "text"), [0]) for n in range(2)]
    own = [[part[step] for part in parts] for step in range(12)]
    fields = (examples.lengths, examples.records.spans, examples.records.rows, *examples.replies)
    places = [field.data_ptr() for field in fields]
    working = load(parts, 2, 2, torch.device("cpu"))
    for step, batches in enumerate(working, 2):
        assert len(batches) == 2
        assert all(map(same_batch, batches, own[step]))
        # What a spawned worker is sent moves to shared memory (the control), and its old place is
        # freed: the training process has to read the new one.
        moved = [field.data_ptr() != place for field, place in zip(fields, places)]
        assert not any(moved) if start_method == "fork" else all(moved)
        assert all(map(same_batch, [part[11 - step] for part in parts], own[11 - step]))
    assert step == 11
    del working
    assert all(map(same_batch, [part[step] for part in parts], own[step]))
    for thing in (order, *parts, examples, examples.records):
        for value in vars(thing).values():
            if isinstance(value, np.ndarray):  # a view would be of the old place
                assert not any(np.shares_memory(value, field.numpy()) for field in fields)
                assert value.base is None or isinstance(value.base, np.ndarray)
