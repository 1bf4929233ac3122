"""The built-in dataset and the reader of the format."""
import json
import re
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import digits, shapes
from data.llava import Batches, Examples, Indices, Records, augment, loader, parse_list
from helpers import make_tiny
from nanoaki import ANSWER, IMAGE, PAD, Config, NanoAKI, Tokenizer, fit_picture

CONFIG = Config(image_size=16, patch_size=8, vit_embd=32, n_embd=32, n_head=2, vit_head=2, block_size=96)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    shapes.make(folder, seed=0, scenes=2500, held_out=200)
    return folder


def records(folder, split):
    return json.loads((folder / f"{split}.json").read_text())


def turns(record):
    return (turn["value"].replace("<image>\n", "") for turn in record["conversations"])


def test_shapes_depends_on_its_seed_alone(made, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        shapes.make(tmp_path / name, seed=seed, scenes=20, held_out=5)
    content = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "abc"]
    assert content[0] == content[1] and content[0].keys() == content[2].keys() and content[0] != content[2]


@pytest.mark.parametrize("flags, wanted", [
    (["--scenes", "0"], "--scenes must be at least 1"), (["--scenes", "x"], "invalid int value: 'x'"),
    (["--seed", "-1"], "--seed 0, not 20000 and -1"), (["--sede", "1"], "unrecognized arguments: --sede")])
def test_bad_flags_of_the_data_scripts_get_one_line_and_make_nothing(flags, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shapes.py", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as ended:
        shapes.command("shapes", None)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and wanted in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_no_scene_is_in_two_splits(made):
    pictures = {split: {p.read_bytes() for p in (made / "images" / split).iterdir()} for split in ("train", "val", "test")}
    assert [len(p) for p in pictures.values()] == [2500, 200, 200]
    assert not (pictures["train"] & pictures["val"] or pictures["train"] & pictures["test"]
                or pictures["val"] & pictures["test"])


def solve(question, scene):
    """The answer, from scratch: scene is {(row, column): (color, shape)}."""
    step = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    place = {p: (i // 3, i % 3) for i, p in enumerate(shapes.PLACES)}

    def find(words):
        hits = [at for at, kind in scene.items() if all(w in kind for w in words.split() if w != "thing")]
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
    scenes = {}
    for record in records(made, "captions"):
        objects = [o.rsplit(" ", 2) for o in list(turns(record))[1].split(", ")]
        scenes[record["image"]] = {divmod(shapes.PLACES.index(p), 3): (c, s) for p, c, s in objects}
    for record in records(made, "train"):
        question, answer = turns(record)
        assert solve(question, scenes[record["image"]]) == answer, record


def test_a_caption_names_what_the_picture_shows(made):
    for record in records(made, "captions")[:300]:
        picture = Image.open(made / record["image"])
        for place, color, _ in (o.rsplit(" ", 2) for o in list(turns(record))[1].split(", ")):
            row, column = divmod(shapes.PLACES.index(place), 3)
            cell = picture.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32))
            seen = max((p for _, p in cell.getcolors(1024)), key=lambda p: max(p) - min(p))
            near = min(shapes.COLORS, key=lambda c: sum((a - b) ** 2
                                                        for a, b in zip(shapes.COLORS[c], seen)))
            assert near == color, record


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


def alone(lengths):
    """Examples of these lengths, each with a picture of its own, as far as Batches looks at them."""
    return SimpleNamespace(lengths=lengths.double(), groups=torch.arange(len(lengths)))


def test_batches_are_a_function_of_seed_and_step_and_hold_every_example_once_an_epoch():
    lengths = alone(torch.randint(5, 400, (1000,)))
    whole = list(Batches(lengths, 10, [3, 1], 250))
    assert list(Batches(lengths, 10, [3, 1], 250, start=130)) == whole[130:]
    assert list(Batches(lengths, 10, [4, 1], 250)) != whole
    for epoch in (whole[:100], whole[100:200]):
        assert sorted(sum(epoch, [])) == list(range(1000))
    assert whole[:100] != whole[100:200]
    assert [len(b) for b in Batches(alone(torch.tensor([5, 6, 7])), 8, [0, 0], 4)] == [8] * 4


@pytest.mark.parametrize("lengths", [torch.randint(5, 400, (20000,)), torch.randint(42, 53, (20000,)),
                                     torch.tensor([46 + 3 * (i % 5) for i in range(20000)])])
def test_padding_is_under_15_percent_where_random_batches_may_waste_half(lengths):
    batches = list(Batches(alone(lengths), 32, [0, 0], 500))
    longest = sum(32 * int(lengths[b].max()) for b in batches)
    assert 1 - sum(int(lengths[b].sum()) for b in batches) / longest < 0.15


@pytest.mark.parametrize("low, high, mixed", [(40, 70, True), (20, 120, False)])
def test_batches_are_sorted_by_length_only_where_random_ones_would_be_a_quarter_padding(low, high, mixed):
    lengths = torch.randint(low, high + 1, (20000,)).double()
    means = torch.stack([lengths[b].mean() for b in Batches(alone(lengths), 32, [0, 0], 500)])
    assert (means.std() < 1.2 * lengths.std() / 32 ** 0.5) == mixed


def test_examples_about_a_picture_share_a_batch_and_still_come_once_an_epoch():
    examples = SimpleNamespace(lengths=torch.full((700,), 50.0), groups=torch.arange(100).repeat_interleave(7))
    batches = list(Batches(examples, 10, [0, 0], 70, share=4))
    assert sorted(sum(batches, [])) == list(range(700))
    pictures = [len(set(examples.groups[b].tolist())) for b in batches]
    assert sum(pictures) / 70 < 5 < sum(len(set(examples.groups[b].tolist()))
                                        for b in Batches(examples, 10, [0, 0], 70)) / 70
    first = {tuple(sorted(i % 7 for i in b if i // 7 == b[0] // 7)) for b in batches}
    assert len(first) > 10  # not always the same questions together


def test_a_picture_encoded_once_for_its_questions_gives_the_gradient_of_one_each(tmp_path):
    folder = make_tiny(tmp_path / "data", n=20)
    examples = Examples(Records.read(folder, "train.json"), Tokenizer([]), CONFIG)
    model = NanoAKI(CONFIG).double()
    batch = examples.__getitems__([0, 7, 1, 6, 3])
    assert len(batch.images) == 3 and batch.index.tolist() == [0, 1, 0, 1, 2]
    gradients = []
    for images in (model.see(batch.images)[batch.index], batch.images[batch.index],
                   batch.images[batch.index.flip(0)]):
        model.zero_grad()
        model(images, batch.tokens, batch.roles, batch.targets)[1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
    assert not torch.allclose(gradients[0], gradients[2], atol=1e-6)


def test_a_conversation_of_n_turns_is_n_examples_with_all_before_as_prompt(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    Image.new("RGB", (10, 20), "blue").save(tmp_path / "b.png")
    talk = [("system", "be brief"), ("human", "first <image>"), ("gpt", "red"), ("human", "<image>\nnext"), ("gpt", "blue")]
    data = [{"id": 1, "image": ["a.png", "b.png"], "task": None, "conversations": [{"from": s, "value": v} for s, v in talk]},
            {"id": 2, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "<image> ho"}]}]
    (tmp_path / "train.json").write_text(json.dumps(data))
    examples = Examples(Records.read(tmp_path, "train.json"), Tokenizer([]), CONFIG)
    assert [(e.answer, len(e.pictures)) for e in examples] == [("red", 1), ("blue", 2), ("<image> ho", 0)]
    assert [e.whole[1].count(IMAGE) for e in examples] == [4, 8, 0]
    for e in examples:
        assert e.task == ""
        tokens = [t for t, r in zip(*e.whole) if r == ANSWER]
        assert tokens == [*e.answer.encode(), Tokenizer.eos]
        assert e.whole[0][:len(e.prompt[0])] == e.prompt[0] and ANSWER not in e.prompt[1]
    batch = examples.__getitems__([2, 1, 0])
    assert batch.images.shape == (2, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.index.tolist() == [0, 1, 0]  # the rows: none, both, the first
    assert batch.images[0, 0].sum() > batch.images[0, 2].sum()  # which is red


BAD = {
    "{": "must be a JSON list", "[1, 2": "not a JSON list", "[{]": "not JSON", "[" * 100000: "nested too deeply",
    "[]": "no records", "[1]": "record 0",
    '[{"id": 7, "conversations": []}]': "record 0 (id 7): turns must alternate",
    '[{"conversations": [{"from": "human", "value": "a"}]}]': "must alternate",
    '[{"conversations": [{"from": "bot", "value": "a"}]}]': "unknown speaker 'bot'",
    '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}]': "answer is empty",
    '[{"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]}]': "1 <image>",
    '[{"image": "no.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]':
        "no.png: no such file",
    '[{"image": "../x.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]':
        "below the data folder",
    '[{"image": "train.json", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]':
        "not a picture",
}


@pytest.mark.parametrize("text, words", BAD.items(), ids=list(map(str, range(len(BAD)))))
def test_bad_data_is_refused_with_file_record_and_reason(tmp_path, text, words):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as e:
        Records.read(tmp_path, "train.json")
    assert str(tmp_path) in str(e.value)


def test_an_answer_that_does_not_fit_the_positions_is_refused_with_its_record(tmp_path):
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "long " * 30}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "x9", "conversations": talk}]))
    with pytest.raises(ValueError, match="x9.*96 positions"):
        Examples(Records.read(tmp_path, "train.json"), Tokenizer([]), CONFIG)


def test_records_are_read_one_by_one_as_json_reads_them_at_once(tmp_path):
    for text in ('[]', ' [ ] ', '[1]', '[1, "a]", {"b": [2]}, null ]\n', '[{"a": "\\u20ac,"},\n{}]'):
        assert [item for item, _ in parse_list(text, tmp_path)] == json.loads(text)


def test_a_held_out_share_has_no_picture_on_both_sides(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "p0.png")
    for i in range(1, 30):
        (tmp_path / f"p{i}.png").write_bytes((tmp_path / "p0.png").read_bytes())
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    data = [{"id": i, "image": [f"p{i % 20}.png", f"p{i % 10 + 20}.png"][:1 + i % 2], "conversations": talk}
            for i in range(60)]
    (tmp_path / "train.json").write_text(json.dumps(data))
    both = Records.read(tmp_path, "train.json")
    rest, held = both.split(0.1, seed=0)
    used = [{p for i in range(len(side)) for p in shapes_pictures(side[i])} for side in (rest, held)]
    assert not used[0] & used[1] and len(rest) + len(held) == 60 and 6 <= len(held) < 30
    assert [r["id"] for r in both.split(0.1, seed=0)[1]] == [r["id"] for r in held]


def shapes_pictures(record):
    return record["image"]


def test_augmentation_keeps_what_answers_are_about_and_is_a_function_of_the_batch(made):
    rng = np.random.default_rng(0)
    for record in records(made, "captions")[:40]:
        with Image.open(made / record["image"]) as image:
            before = fit_picture(image, 96)
        after = augment(before, rng)
        assert after.shape == before.shape and not torch.equal(after, before)

        def alike(other):  # correlation, seen from afar
            pair = [torch.nn.functional.avg_pool2d(p.float(), 12).flatten() for p in (other, before)]
            return float(torch.corrcoef(torch.stack(pair))[0, 1])

        assert alike(after) > max(alike(after.flip(2)), alike(after.flip(1)), 0.5)
        for place, color, _ in (o.rsplit(" ", 2) for o in list(turns(record))[1].split(", ")):
            row, column = divmod(shapes.PLACES.index(place), 3)
            cell = after[:, 32 * row:32 * row + 32, 32 * column:32 * column + 32].float()
            strong = (cell.amax(0) - cell.amin(0)).flatten().topk(40).indices
            seen = cell.flatten(1)[:, strong].median(1).values.tolist()
            near = min(shapes.COLORS, key=lambda c: sum((a - b) ** 2
                                                        for a, b in zip(shapes.COLORS[c], seen)))
            assert near == color, record
    examples = Examples(Records.read(made, "val.json"), Tokenizer([]), Config(block_size=200))
    examples.augment_seed = [1, 0]

    def pictures(step, indices):
        part = Indices(indices)
        part.step = step
        return examples.__getitems__(part).images

    whole = pictures(3, [0, 9, 20])  # however a step's batch is split; other steps differ
    assert torch.equal(whole, torch.cat([pictures(3, [0]), pictures(3, [9, 20])]))
    assert not torch.equal(whole, pictures(4, [0, 9, 20]))
    assert all(part.step == 5 + n for n, part in enumerate(Batches(examples, 4, [0], 9, start=5)))


def test_digits_are_scans_that_no_other_split_has_and_its_answers_are_right(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)  # stands in for scikit-learn's, which nothing else needs
    scans = SimpleNamespace(images=rng.integers(0, 17, (800, 8, 8)), target=np.arange(800) % 10)
    fake = SimpleNamespace(load_digits=lambda: scans)
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace(datasets=fake))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", fake)
    split = digits.split_scans(0)
    seen = [{scan.tobytes() for some in part.values() for scan in some} for part in split.values()]
    assert list(map(len, seen)) == [300, 300, 200] and len(set.union(*seen)) == 800
    digits.make(tmp_path / "digits", 0, scenes=60, held_out=10)
    captions = {r["image"]: list(turns(r))[1] for r in records(tmp_path / "digits", "captions")}
    words = {"left of": -1, "right of": 1, "above": -3, "below": 3}
    asked = Counter()
    for r in records(tmp_path / "digits", "train"):
        scene = {shapes.PLACES.index(place): digit for place, digit in
                 (o.rsplit(" ", 1) for o in captions[r["image"]].split(", "))}
        question, answer = turns(r)
        where = {digit: place for place, digit in scene.items()}
        found = re.findall(r"\d", question)
        step = next((step for word, step in words.items() if f" {word} " in question), None)
        line = question[question.find("in the ") + 7:-1]
        right = {"exist": lambda: "yes" if found[0] in where else "no",
                 "count": lambda: str(list(scene.values()).count(found[0])),
                 "where": lambda: shapes.PLACES[where[found[0]]],
                 "at": lambda: scene[shapes.PLACES.index(question[22:-1])],
                 "rel": lambda: scene[where[found[0]] + step],
                 "sum": lambda: str(int(found[0]) + int(scene[where[found[0]] + step])),
                 "max": lambda: max(scene[p] for p in digits.LINES[line] if p in scene)}[r["task"]]()
        assert answer == right, (question, scene)
        asked[r["task"]] += 1
    assert asked == {task: 60 for task in digits.TASKS}
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        digits.split_scans(0)


def test_padding_is_under_15_percent_on_shapes(made):
    tokenizer = Tokenizer.train(list(Records.read(made, "train.json").texts(10 ** 6)))
    examples = Examples(Records.read(made, "train.json"), tokenizer, Config())
    batches = list(loader(examples, 64, [0, 1], 20, 0, 7, workers=0))
    assert sum(int((b.roles == PAD).sum()) for b in batches) < 0.15 * sum(b.roles.numel() for b in batches)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_and_the_training_process_read_the_same_batches(method, tmp_path):
    folder = make_tiny(tmp_path / "data", n=40)
    examples = Examples(Records.read(folder, "train.json"), Tokenizer([]), CONFIG)
    working = loader(examples, 8, [0, 0], 5, workers=2)
    working.multiprocessing_context = method
    batches = working.batch_sampler  # to send a tensor to a spawned worker frees its memory
    for own, tensor in ((batches.lengths, examples.lengths), (batches.groups, examples.groups)):
        assert not np.shares_memory(own, tensor.numpy())
    for a, b in zip(working, loader(examples, 8, [0, 0], 5, workers=0), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4])) and a.ids == b.ids
