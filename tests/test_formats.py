"""What people bring as records: other keys, other formats, odd conversations, broken pictures."""
import json
import os
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import data.formats
import train
from conftest import tiny_config
from data.formats import check_picture, parse_record
from data.llava import Examples, Records, positions_needed, read_split, read_splits
from helpers import TINY, make_tiny, refused
from nanoaki import ANSWER, Tokenizer, place_pictures

TALK = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]


def parsed(**item):
    return parse_record({"conversations": TALK} | item, 0)


def bad(**item) -> str:
    with pytest.raises(ValueError) as e:
        parsed(**item)
    assert "\n" not in str(e.value)
    return str(e.value)


# Keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, value", [
    ("image_path", "a.jpg"), ("img", "x/A.PNG"), ("photos", ["note", "b.webp"]),
    ("picture", "https://a.b/c.jpeg?size=2"), ("scan", "a.tif"), ("clip", "a.mp4"),
    ("video", "c17"), ("audio", ["c.wav"]), ("audios", [{"id": 3}])])
def test_a_picture_or_film_under_another_key_is_refused_with_the_name_that_is_right(key, value):
    said = bad(**{key: value})
    assert repr(key) in said and '"image"' in said
    in_turn = [{**TALK[0], key: value}, TALK[1]]
    assert repr(key) in bad(conversations=in_turn)


@pytest.mark.parametrize("key, value", [
    ("picture", {"bytes": None, "path": "a"}), ("photo", {"path": "x/1.png"}),
    ("image_url", {"url": "https://a.b/c?size=2"}), ("scans", [{"file": {"name": "a.tif"}}]),
    ("image_path", "images/0"), ("img", {"bytes": [137, 80]}), ("Image", "a"), ("imagePath", "a"),
    ("frame", "data:image/png;base64,iVBOR"), ("image_base64", "iVBOR"),
    ("image_1", {"bytes": "iVBOR", "path": "b.png"})])
def test_a_picture_deep_in_another_key_or_under_a_picture_s_name_is_refused(key, value):
    assert repr(key) in bad(**{key: value})
    assert repr(key) in bad(conversations=[{**TALK[0], key: value}, TALK[1]])
    assert key not in parsed(**{key: None}).notes  # the control, as an export may leave it


@pytest.mark.parametrize("key", ["image", "images"])
def test_a_picture_of_a_turn_is_refused(key):
    assert repr(key) in bad(conversations=[{**TALK[0], key: "images/0"}, TALK[1]])


def test_beside_a_picture_its_address_on_the_web_and_what_is_deeper_are_noted_but_a_path_is_refused():
    parts = [{"type": "image", "image": "a.jpg"}]
    shown = [{"image": "a.jpg"}, {"conversations": None, "messages": [
        {"role": "user", "content": parts}, {"role": "assistant", "content": "this"}]}]
    for item in shown:
        for key, value in (("url", "https://a.b/c.jpg"), ("coco", {"file": "c.jpg"}),
                           ("image_url", "http://a.b/c"), ("photo", {"author": "Jane"})):
            record = parsed(**item, **{key: value})
            assert record.pictures == ["a.jpg"]
            assert record.notes == [f"name pictures under {key!r}, where none is read"]
            assert repr(key) in bad(**{key: value})  # the control: it is the only one
        assert parsed(**item, source="coco", photo=None, meta={"a": 1}).notes == []
        for value in ("b.jpg", ["b.jpg"]):
            assert "'second'" in bad(**item, second=value)
    turns = [{**TALK[0], "meta": {"file": "0.jpg"}}, TALK[1]]
    assert parsed(image="a.jpg", conversations=turns).notes


def test_a_picture_s_bytes_in_place_of_its_path_are_refused_and_not_printed(tmp_path):
    picture = Image.new("RGB", (8, 8))
    picture.save(tmp_path / "a.png")
    long = "A" * 200_000
    for name in (f"data:image/png;base64,{long}", long, f"{long}/a.png"):
        item = {"id": long, "image": name, "conversations": TALK}
        (tmp_path / "train.json").write_text(json.dumps([item]))
        with pytest.raises(ValueError, match="AAA") as e:
            Records.read(tmp_path, "train.json")
        assert len(str(e.value)) < 600


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_what_is_no_file_is_no_picture_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name in ("a.png", "b.png"):
        with pytest.raises(ValueError, match=f"^{name}: is no file$"):
            check_picture(tmp_path, name)


def test_objects_nested_thousands_deep_are_looked_through():
    value = "a.png"
    for _ in range(5000):
        value = {"in": [value]}
    assert "'meta'" in bad(meta=value)


def test_other_keys_are_allowed_and_those_that_are_known_may_look_like_files():
    record = parsed(id="a.jpg", task="b.png", image="c.jpg", source="coco", size=[3, 4], url=None,
                    notes=["see a.jpg, b.png too"], model={"path": "x.png"}, video=None, audio=[])
    assert (record.id, record.task, record.pictures) == ("a.jpg", "b.png", ["c.jpg"])


@pytest.mark.parametrize("item", [{}, {"image": ""}, {"image": None}, {"images": []},
                                  {"image": "", "images": None}])
def test_an_empty_image_is_no_picture(item):
    assert parsed(**item).pictures == []


def test_images_is_read_as_image_is_and_both_are_refused():
    for value in ("a.png", ["a.png"], ["a.png", "b.png"]):
        assert parsed(images=value) == parsed(image=value) != parsed()
    assert parsed(image="", images="a.png") == parsed(image="a.png", images=[])
    assert "both" in bad(image="a.png", images="b.png")
    for wrong in (7, [""], [None], {"path": "a.png"}):
        assert '"image" must be' in bad(image=wrong) and '"images" must be' in bad(images=wrong)
        assert str(wrong) in bad(images=wrong)


# Formats -----------------------------------------------------------------------------------------

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def random_chat(rng) -> dict:
    """A record of LLaVA's form, each picture written where it stands, or none."""
    turns, written, count = [], rng.random() < 0.7, 0
    if rng.random() < 0.3:
        turns.append({"from": "system", "value": "be <image> brief"})
    for _ in range(rng.randint(1, 3)):
        n = rng.choice([0, 0, 1, 2]) if written else 0
        text = "".join(rng.choice(["a", "b c", "\n"]) + "<image>" for _ in range(n)) + "é?"
        count += n
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": f"<image> {n}"}]
    if not written:
        count = rng.choice([0, 1, 2])
    return {"id": "x", "task": "t", "image": [f"{i}.png" for i in range(count)],
            "conversations": turns}


def as_messages(record: dict, rng) -> dict:
    """The same with roles, its text in parts where that is drawn, some pictures with their paths."""
    listed, left, messages = list(record["image"]), [], []
    for turn in record["conversations"]:
        content = turn["value"]
        if turn["from"] == "human" and rng.random() < 0.7:
            content = []
            for n, text in enumerate(turn["value"].split("<image>")):
                if n and rng.random() < 0.5:
                    content.append({"type": "image", "image": listed.pop(0)})
                elif n:
                    content.append({"type": "image", "text": None})
                    left.append(listed.pop(0))
                content += [{"type": "text", "text": part} for part in (text[:1], text[1:])]
        elif turn["from"] == "human":
            count = content.count("<image>")
            left, listed = left + listed[:count], listed[count:]
        messages.append({"role": ROLES[turn["from"]], "content": content})
    return {"id": "x", "task": "t", "images": left + listed, "messages": messages}


def test_messages_are_the_conversations_that_they_say_whole_or_in_parts():
    rng, kinds = random.Random(0), set()
    for _ in range(300):
        record = random_chat(rng)
        messages = as_messages(record, rng)
        found, wanted = parse_record(messages, 0), parse_record(record, 0)
        assert found == wanted
        place_pictures(found.turns, len(found.pictures))
        kinds |= {type(message["content"]) for message in messages["messages"]}
        if len(wanted.pictures) > 1:  # the control
            messages["images"] = messages["images"][::-1]
            if len(messages["images"]) > 1:
                assert parse_record(messages, 0) != wanted
    assert kinds == {str, list}


@pytest.mark.parametrize("content, words", [
    ([{"type": "video", "video": "a.mp4"}], "a part of a turn must be"),
    ([{"type": "image_url", "image_url": {"url": "a.png"}}], "a part of a turn must be"),
    ([{"type": "image", "path": "a.png"}], "'path' is not read"),
    ([{"type": "image", "image": 7}], "a part of a turn must be"),
    (["what?"], "a part of a turn must be"), (7, "each turn must be"), (None, "each turn must be"),
    ([{"type": "image"}], "1 <image> in the text for 0 pictures"),
    ("<image><image>", "2 <image> in the text for 0 pictures")])
def test_messages_keep_every_check(tmp_path, content, words):
    record = {"messages": [{"role": "user", "content": content},
                           {"role": "assistant", "content": "this"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=re.escape(f"record 0 (id None): {words}")):
        Records.read(tmp_path, "train.jsonl")


def test_of_conversations_and_messages_a_record_has_one_and_a_model_shows_no_picture():
    assert "messages" in bad(messages=[]) and "messages" in bad(conversations=None)
    assert "unknown speaker 'tool'" in bad(conversations=[{"role": "tool", "content": "a"}])
    for role in ("assistant", "system"):
        assert "of a user" in bad(conversations=[
            TALK[0], {"role": role, "content": [{"type": "image", "image": "a.png"}]}])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data", n=30)


def as_lines(source, folder, change=lambda record: record) -> None:
    """The dataset of a folder as JSON lines, blank ones between them, its pictures as they are."""
    folder.mkdir(exist_ok=True)
    (folder / "images").symlink_to(source / "images")
    for path in source.glob("*.json"):
        lines = [json.dumps(change(record)) for record in json.loads(path.read_text())]
        (folder / f"{path.name}l").write_text("\ufeff" + "\n\n".join(lines))


def test_json_lines_train_the_very_model_that_a_json_list_does(tiny, tmp_path, capsys):
    def change(record):
        return as_messages(record | {"image": [record["image"]]}, random.Random(0)) | {
            "id": record["id"], "task": record.get("task")}

    as_lines(tiny, tmp_path / "lines", change)
    outs = []
    for data in (tiny, tmp_path / "lines"):
        out = tmp_path / f"out{len(outs)}"
        train.main(["--data", str(data), "--out", str(out), *TINY, "--align-steps", "4", "--steps",
                    "6", "--batch-size", "8"])
        outs.append(torch.load(out / "last.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(outs[0]["model"].values(),
                                                 outs[1]["model"].values(), strict=True))
    train_records = read_splits(tmp_path / "lines")["train"]
    assert train_records[7].id == json.loads((tiny / "train.json").read_text())[7]["id"]
    assert read_split(tmp_path / "lines", "test").path.name == "test.jsonl"
    with open(tmp_path / "lines/train.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="train.jsonl: changed since it was read"):
        train_records[7]


@pytest.mark.parametrize("text, words", [
    ('{"a": 1}\n{"b": ', "line 2 is not JSON"), ("[1]\n\n7 8\n", "line 3 is not JSON"),
    ("[" * 100000, "line 1 is not JSON"), ("\n\n", "no records"), (b'{}\n"\xff"', "not UTF-8"),
    ('{"conversations": []}', "record 0 (id None): turns must alternate")])
def test_bad_lines_are_refused_by_number(tmp_path, text, words):
    (tmp_path / "train.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(words)) as e:
        Records.read(tmp_path, "train.jsonl")
    assert str(tmp_path / "train.jsonl") in str(e.value)


@pytest.mark.parametrize("name", ["train", "val", "captions", "test"])
def test_a_split_in_both_forms_is_refused(tiny, tmp_path, name, capsys):
    as_lines(tiny, tmp_path)
    (tmp_path / f"{name}.json").write_text("[]")
    said = refused(capsys, train.main, "--data", tmp_path, "--out", tmp_path / "out")
    assert f"both {name}.json and {name}.jsonl" in said


# Conversations -----------------------------------------------------------------------------------


def talk(*speakers) -> list[dict]:
    return [{"from": speaker, "value": f"{speaker} {i}"} for i, speaker in enumerate(speakers)]


def read(tmp_path, *records) -> Records:
    (tmp_path / "train.json").write_text(json.dumps(records))
    return Records.read(tmp_path, "train.json")


def examples_of(records, **config) -> Examples:
    return Examples(records, Tokenizer([]), tiny_config(**{"block_size": 128} | config))


def test_a_question_without_reply_is_left_out_with_its_pictures_and_said_once(tmp_path, capsys):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    whole = {"image": "a.png", "conversations": [{"from": "human", "value": "<image> what?"},
                                                 {"from": "gpt", "value": "this"}]}
    more = {"image": ["a.png", "b.png"],
            "conversations": whole["conversations"] + [{"from": "human", "value": "<image> too?"}]}
    (plain,) = examples_of(read(tmp_path, whole))
    assert capsys.readouterr().out == ""
    first, second = examples_of(read(tmp_path, more, more))
    assert first == second._replace(id="0") == plain
    said = capsys.readouterr().out
    assert "2 of 2 records end with a question without a reply" in said and said.count("\n") == 1


@pytest.mark.parametrize("before", [[], ["system"]])
def test_a_reply_that_nobody_asked_for_is_given_and_never_learned(tmp_path, capsys, before):
    (example,) = examples_of(read(tmp_path, {"conversations": talk(*before, "gpt", "human", "gpt")}))
    n = len(before)
    assert "1 of 1 records begin with a reply" in capsys.readouterr().out
    given = bytes(t for t, role in zip(*example.whole) if role != ANSWER and t < 256).decode()
    learned = bytes(t for t, role in zip(*example.whole) if role == ANSWER and t < 256).decode()
    assert given == "".join(f"{s} {i}\n" for i, s in enumerate([*before, "gpt"])) + f"human {n + 1}"
    assert learned == f"gpt {n + 2}"


@pytest.mark.parametrize("speakers", [["human"], ["gpt"], ["system", "human"], ["gpt", "human"],
                                      ["human", "human", "gpt"], ["human", "gpt", "gpt"],
                                      ["gpt", "gpt", "human", "gpt"]])
def test_a_record_with_nothing_to_learn_or_two_turns_of_one_speaker_is_bad(speakers):
    assert "must alternate" in bad(conversations=talk(*speakers))


def test_empty_system_text_is_none():
    chat, empty = talk("human", "gpt"), {"from": "system", "value": ""}
    assert parsed(conversations=[empty, *chat]) == parsed(conversations=chat)
    assert parsed(conversations=[empty | {"value": " "}, *chat]) != parsed(conversations=chat)


def test_line_ends_of_windows_are_line_ends(tmp_path):
    def chat(end):
        return {"conversations": [
            {"from": "system", "value": f"a{end}b"}, {"from": "human", "value": f"{end}c{end}d{end}"},
            {"from": "gpt", "value": f"e{end}f"}, {"from": "human", "value": f"g{end}"},
            {"from": "gpt", "value": f"h{end}i"}]}

    unix, windows, old = (list(examples_of(read(tmp_path, chat(end)))) for end in ("\n", "\r\n", "\r"))
    for a, b, c in zip(unix, windows, old, strict=True):
        assert a._replace(turns=[]) == b._replace(turns=[]) != c._replace(turns=[])


# Lengths -----------------------------------------------------------------------------------------


def long_chat(question: int, answer: int, history: int = 0) -> dict:
    before = [{"from": "human", "value": "h" * history}, {"from": "gpt", "value": "x"}]
    return {"conversations": [*(before if history else []), {"from": "human", "value": "q" * question},
                              {"from": "gpt", "value": "a" * answer}]}


def test_positions_needed_are_those_with_which_every_example_fits_and_no_less(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    chat = long_chat(60, 30, history=50)
    chat["conversations"].insert(0, {"from": "system", "value": "s" * 20})
    chat |= {"image": ["a.png", "a.png"]}
    records = read(tmp_path, long_chat(10, 10), chat, long_chat(70, 40))
    needed = positions_needed([records], Tokenizer([]), tiny_config(block_size=16))
    assert needed == 2 * 4 + 21 + 61 + 31  # pictures, system text, question, answer; no history
    examples_of(records, block_size=needed)
    with pytest.raises(ValueError, match="record 1 .*--block-size"):
        examples_of(records, block_size=needed - 1)
    assert positions_needed([records], Tokenizer([]), tiny_config(block_size=200)) == 200
    longer = read(tmp_path, long_chat(3000, 10))
    assert positions_needed([longer], Tokenizer([]), tiny_config()) == 2048


@pytest.mark.parametrize("flags, size", [([], 147), (["--block-size", "200"], 200)])
def test_the_data_choose_the_block_size_where_it_is_not_given(tmp_path, capsys, flags, size):
    text = "".join(chr(0x4e00 + i) for i in range(48))  # no pair of bytes occurs twice
    (tmp_path / "train.json").write_text(json.dumps(
        [{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]}] * 40))
    (tmp_path / "val.json").write_text(json.dumps([{"conversations": TALK}]))
    tiny_flags = TINY[:TINY.index("--block-size")] + TINY[TINY.index("--block-size") + 2:]
    train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), *tiny_flags, "--vocab-size",
                "260", "--steps", "1", "--batch-size", "2", *flags])
    assert ("block size: 147 positions" in capsys.readouterr().out) == (not flags)
    config = json.loads((tmp_path / "out/config.json").read_text())["config"]
    assert config["block_size"] == size


def test_an_example_that_is_too_long_names_the_flag(tmp_path, capsys):
    (tmp_path / "train.json").write_text(json.dumps([long_chat(100, 10)] * 2))
    (tmp_path / "val.json").write_text(json.dumps([{"conversations": TALK}]))
    command = ["--data", tmp_path, "--out", tmp_path / "out", *TINY, "--vocab-size", "260"]
    with pytest.raises(SystemExit):
        train.main([str(word) for word in command])
    assert "64 positions (--block-size" in capsys.readouterr().err


# Pictures ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """Sound JPEGs of several kinds: name -> bytes."""
    rng, folder, found = np.random.default_rng(0), tmp_path_factory.mktemp("jpegs"), {}
    image = Image.fromarray(rng.integers(0, 256, (200, 300, 3), np.uint8))
    for name, how in {"plain": {}, "progressive": {"progressive": True},
                      "restarts": {"restart_marker_blocks": 1}, "comment": {"comment": b"\xff\xd9"},
                      "grey": {}}.items():
        picture = image.convert("L") if name == "grey" else image
        picture.save(folder / "a.jpg", quality=90, **how)
        found[name] = (folder / "a.jpg").read_bytes()
    small = Image.new("RGB", (30, 20))  # a thumbnail within, with an end marker of its own
    small.save(folder / "small.jpg")
    data = (folder / "small.jpg").read_bytes()
    image.save(folder / "a.jpg", exif=b"Exif\0\0" + data)
    found["thumbnail"] = (folder / "a.jpg").read_bytes()
    found["film behind it"] = found["plain"] + b"\0\0\0\x18ftypmp42" + rng.bytes(5000)
    found["zeros behind it"] = found["plain"] + bytes(100)
    return found


KINDS = ["plain", "progressive", "restarts", "comment", "grey", "thumbnail", "film behind it",
         "zeros behind it"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_jpeg_is_found_undecoded_and_a_whole_one_is_not(kind, jpegs, tmp_path,
                                                                    monkeypatch):
    path, decoded, load = tmp_path / "a.jpg", [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load",
                        lambda image: decoded.append(1) or load(image))
    path.write_bytes(jpegs[kind])
    check_picture(tmp_path, "a.jpg")
    assert not decoded
    data = jpegs["plain" if "behind" in kind else kind]
    for share in (0.3, 0.6, 0.9, 0.99):
        path.write_bytes(data[:int(share * len(data))])
        with pytest.raises(ValueError, match="a.jpg: not a picture .*truncated"):
            check_picture(tmp_path, "a.jpg")
    assert decoded  # for Pillow's reason


def test_a_whole_jpeg_is_not_read_whole(jpegs, tmp_path, monkeypatch):
    read = []

    class Counted:
        def __init__(self, file):
            self.file = file

        def read(self, *size):
            part = self.file.read(*size)
            read.append(len(part))
            return part

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    monkeypatch.setattr(data.formats, "open", lambda *a: Counted(open(*a)), raising=False)
    for kind, most in (("plain", 2), ("film behind it", len(jpegs["film behind it"]) + 2)):
        (tmp_path / "a.jpg").write_bytes(jpegs[kind])
        read.clear()
        check_picture(tmp_path, "a.jpg")
        assert sum(read) == most


@pytest.mark.parametrize("name, there, hint", [("images\\a.png", True, True),
                                               ("images\\b.png", True, False), ("a.png", True, False)])
def test_a_backslash_is_named_as_the_mistake_where_it_is_one(tmp_path, name, there, hint):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/a.png")
    with pytest.raises(ValueError, match="no such file") as e:
        check_picture(tmp_path, name)
    assert ("slashes" in str(e.value)) == hint
    check_picture(tmp_path, "images/a.png")


def test_a_part_or_a_turn_that_holds_two_things_is_refused():
    """Of which one would be read, and the other be ignored."""
    for part in ({"type": "text", "text": "what?", "image": "a.png"},
                 {"type": "image", "text": "what?", "image": "a.png"}):
        assert "a part of a turn" in bad(conversations=[{"role": "user", "content": [part]}, TALK[1]])
    assert "each turn must be" in bad(conversations=[TALK[0] | {"content": [{"type": "image"}]}, TALK[1]])
    assert parsed(conversations=[TALK[0] | {"content": None}, TALK[1]]) == parsed()
