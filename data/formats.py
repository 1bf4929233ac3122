"""
What a file of records may look like, and what may be wrong with one (data/README.md).

    for number, (item, start, stop) in enumerate(items(Path("data/shapes-seed0/train.json"))):
        record = parse_record(item, number)
"""
import errno
import json
import re
import warnings
from pathlib import Path
from typing import Any, Iterator, NamedTuple

from PIL import Image

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # too large is refused

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt",
            "system": "system"}
MEDIA = re.compile(r"\.(jpe?g|jpe|jfif|jp2|png|gif|bmp|webp|tiff?|heic|heif|avif|svg|p[bgnp]m|tga|"
                   r"ico|dng|npy|mp[34]|m4[av]|mpe?g|mov|avi|mkv|webm|wm[av]|flv|3gp|wav|aiff?|flac|"
                   r"ogg|opus|aac)(\?.*)?\s*$|^data:(image|video|audio)/", re.IGNORECASE)
FILMS = ("video", "videos", "audio", "audios")  # keys
PICTURE = re.compile(r"(image|img|picture|photo)s?(_?(path|url|file|data|base64)s?)?",
                     re.IGNORECASE)  # keys
RECORD_KEYS = frozenset(("id", "task", "image", "images", "conversations", "messages"))
TURN_KEYS = frozenset(("from", "value", "role", "content"))
PART_KEYS = frozenset(("type", "text", "image"))


class Record(NamedTuple):
    id: str
    task: str                     # "" for none
    pictures: list[str]           # paths below the folder
    turns: list[tuple[str, str]]  # speaker, "system", "human" or "gpt", and text
    notes: list[str]              # what it does that records should not, and what becomes of that


def parse_record(item: Any, number: int) -> Record:
    """The record that an item of a file is; raises ValueError that says what is wrong with it."""
    known = item if isinstance(item, dict) else {}
    names = [name for name in ("conversations", "messages") if known.get(name) is not None]
    if len(names) == 2:
        raise ValueError('has both "conversations" and "messages"')
    if not names or not isinstance(item[names[0]], list):
        raise ValueError('must be {"id", "image", "conversations": [...]}, or the same with '
                         '"messages"')
    if item.get("image") and item.get("images"):
        raise ValueError('has both "image" and "images"')
    key = "images" if item.get("images") else "image"
    listed = item.get(key) or []
    if isinstance(listed, str):
        listed = [listed]
    if not isinstance(listed, list) or not all(isinstance(p, str) and p for p in listed):
        raise ValueError(f'"{key}" must be a path, a list of paths, or absent, not '
                         f'{str(item[key])[:80]}')
    turns, pictures, listed = [], [], iter(listed)
    for turn in item[names[0]]:
        speaker, text, shown = parse_turn(turn)
        turns.append((speaker, text))
        for path in shown:
            path = path or next(listed, None)
            if path:  # where there is none, place_pictures will miss it
                pictures.append(path)
    pictures += listed
    turns, notes = settle_ends(turns)
    notes += unread(item, RECORD_KEYS, pictures)
    for turn in item[names[0]]:
        notes += unread(turn, TURN_KEYS, pictures)
    task = str(item.get("task") or "")
    if task == "all":
        raise ValueError('"task" must not be "all", which the sum is called')
    return Record(str(item.get("id", number)), task, pictures, turns, notes)


def parse_turn(turn: Any) -> tuple[str, str, list[str]]:
    """Speaker, text, and for each <image> in human text the path that stands there, if one does."""
    values = []
    if isinstance(turn, dict):
        values = [turn[key] for key in ("value", "content") if turn.get(key) is not None]
    if len(values) != 1 or not isinstance(values[0], (str, list)):
        raise ValueError('each turn must be {"from": "human" or "gpt", "value": text}, or the same '
                         'with "role" ("user" or "assistant") and "content"')
    value, name = values[0], turn.get("from", turn.get("role"))
    if not isinstance(name, str) or name not in SPEAKERS:
        raise ValueError(f'unknown speaker {name!r}: "human", "gpt" or "system" (in messages '
                         f'"user" and "assistant")')
    speaker, text, shown = SPEAKERS[name], value, []
    if isinstance(value, list):
        text, shown = join_parts(value, speaker)
    elif speaker == "human":
        shown = [""] * value.count("<image>")
    if speaker == "gpt" and not text.strip():
        raise ValueError("an answer is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text has a lone surrogate, which UTF-8 cannot encode") from None
    return speaker, text, shown


def join_parts(parts: list, speaker: str) -> tuple[str, list[str]]:
    """Text of the parts of a turn, and for each <image> in it the path that stands there, or ""."""
    text, shown = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str) and not part.get("image"):
            text += part["text"]
            if speaker == "human":
                shown += [""] * part["text"].count("<image>")
        elif (kind == "image" and isinstance(part.get("image") or "", str) and not part.get("text")
              and speaker == "human"):
            text += "<image>"
            shown.append(part.get("image") or "")
        else:
            raise ValueError(f'a part of a turn must be {{"type": "text", "text": text}} or, of a '
                             f'user, {{"type": "image", "image": path}}, not {str(part)[:80]}')
        unread(part, PART_KEYS, [])
    return text, shown


def unread(item: dict, known: frozenset[str], shown: list[str]) -> list[str]:
    """The keys that are not known and name pictures, which are not read, as a note; or none.

    Raises ValueError on a film, and on a picture that seems meant to be seen: where the record
    shows none, any; beside those that are shown a path, since addresses and what stands deeper are
    mostly about them.
    """
    found = []
    for key in sorted(item.keys() - known):
        film, media = key in FILMS, leaves(item[key])
        if not film and not PICTURE.fullmatch(key):
            media = [leaf for leaf in media if is_media(leaf)]
        direct = item[key] if isinstance(item[key], list) else [item[key]]
        paths = [value for value in direct
                 if is_media(value) and not value.startswith(("http://", "https://"))]
        if media and (film or paths or not shown):
            raise ValueError(f'{key!r} is not read, and holds {str(media[0])[:80]!r}: '
                             f'pictures stand under "image" of the record, films nowhere')
        if media:
            found.append(f"name pictures under {key!r}, where none is read")
    return found


def is_media(value: Any) -> bool:
    """Whether a JSON value is the name of a picture or a film, or one itself."""
    return isinstance(value, str) and MEDIA.search(value) is not None


def leaves(value: Any) -> list:
    """All that stands in a JSON value, however deep, but for keys and what is empty, false or 0."""
    found, waiting = [], [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif value:
            found.append(value)
    return found


def settle_ends(turns: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """Turns with a reply that nobody asked for as system text; and what is unusual at their ends.

    Raises ValueError if no reply follows a question, or if turns do not alternate.
    """
    if turns and turns[0] == ("system", ""):
        turns = turns[1:]
    notes, start = [], 1 if turns and turns[0][0] == "system" else 0
    if turns[start:] and turns[start][0] == "gpt":
        notes.append("begin with a reply, which is given and never learned")
        text = "\n".join(text for _, text in turns[:start + 1])
        turns, start = [("system", text), *turns[start + 1:]], 1
    talk = [speaker for speaker, _ in turns[start:]]
    if talk and talk[-1] == "human":
        notes.append("end with a question without a reply, which is left out")
        talk = talk[:-1]
    if not talk or talk != ["human", "gpt"] * (len(talk) // 2):
        raise ValueError('turns must alternate, "human" then "gpt", after at most one "system"')
    return turns, notes


def check_picture(folder: Path, picture: str) -> None:
    """Raise ValueError that names a picture and says what is wrong with it, mostly undecoded."""
    path, name = folder / picture, picture if len(picture) <= 200 else f"{picture[:80]}..."
    if picture.startswith("data:"):
        raise ValueError(f"{name}: must be a path below the data folder, not the picture itself")
    if Path(picture).is_absolute() or ".." in Path(picture).parts:
        raise ValueError(f"{name}: must be a path below the data folder")
    try:
        if path.exists() and not path.is_file():  # to open a pipe would be to wait for it
            raise OSError(errno.EINVAL, "is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format in ("JPEG", "MPO") and not jpeg_ends(path):
                    image.load()  # to be sure, and to know why
                image.verify()  # of a PNG, all of it, undecoded; of others, what is cheap
    except FileNotFoundError:
        hint = ""
        if "\\" in picture and (folder / picture.replace("\\", "/")).exists():
            hint = "; with slashes in place of backslashes there is one"
        raise ValueError(f"{name}: no such file{hint}") from None
    except OSError as e:
        reason = e.strerror or f"not a picture that Pillow can read ({e})"
        raise ValueError(f"{name}: {reason}") from e
    except Exception as e:  # Pillow raises whatever the bytes make it raise
        raise ValueError(f"{name}: not a picture that Pillow can read ({e})") from e


def jpeg_ends(path: Path) -> bool:
    """Whether a JPEG has its end marker: as its last bytes, or where its segments lead to."""
    with open(path, "rb") as file:
        file.seek(-2, 2)
        if file.read() == b"\xff\xd9":
            return True
        file.seek(0)
        data, at = file.read(), 2
    marker = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # others stand within what is coded
    while found := marker.search(data, at):
        if found[1] == b"\xd9":
            return True  # what follows it, as a phone's film, is not the picture's
        at = found.end() + int.from_bytes(data[found.end():found.end() + 2], "big")
    return False


def items(path: Path) -> Iterator[tuple[Any, int, int]]:
    """The items of a file and the bytes they stand at: (item, start, stop); raises ValueError."""
    return json_lines(path) if path.suffix == ".jsonl" else json_items(path)


def json_lines(path: Path) -> Iterator[tuple[Any, int, int]]:
    """items, of a file with one on each line that is not blank."""
    with open(path, "rb") as file:
        stop = 0
        for number, line in enumerate(file, 1):
            start, stop = stop, stop + len(line)
            text = line.decode("utf-8-sig")  # Windows editors put a mark in front
            if text.strip():
                try:
                    item = json.loads(text)
                except (RecursionError, ValueError) as e:
                    reason = getattr(e, "msg", e)
                    raise ValueError(f"{path}: line {number} is not JSON: {reason}; a .jsonl has "
                                     f"a record a line, a list of them is a .json") from None
                yield item, start, stop


def json_items(path: Path, part: int = 1 << 20) -> Iterator[tuple[Any, int, int]]:
    """items, of a JSON list.

    It is read in parts, of so many characters at least. Raises ValueError if it is no JSON list.
    """
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    with open(path, encoding="utf-8", newline="") as file:
        text, at, byte, sign = file.read(part), 0, 0, "["  # text[at] is that byte of the file
        if text.startswith("\ufeff"):  # Windows editors put this mark in front
            at, byte = 1, 3
        while sign != "]":
            try:
                before = space.match(text, at).end()
                if text[before:before + 1] != sign:
                    raise ValueError("must be a JSON list of records, or one a line in a .jsonl")
                start = stop = space.match(text, before + 1).end()
                empty = sign == "[" and text[start:start + 1] == "]"
                if not empty:
                    item, stop = decoder.raw_decode(text, start)
                end = space.match(text, stop).end()
                if text[end:end + 1] not in (",", "]"):  # nor may a number go on
                    raise ValueError("not a JSON list: ',' or ']' expected")
            except RecursionError:
                raise ValueError(f"{path}: nested too deeply, after byte {byte}") from None
            except ValueError as e:
                more = file.read(max(part, len(text) - at))
                if more:  # so far it may just not have been whole
                    text, at = text[at:] + more, 0
                    continue
                reason = f"not JSON: {e.msg}" if isinstance(e, json.JSONDecodeError) else e
                raise ValueError(f"{path}: {reason}, after byte {byte}") from None
            first = byte + start - at  # white space and signs are a byte each
            byte = first + len(text[start:stop].encode())
            if not empty:
                yield item, first, byte
            byte, at, sign = byte + end - stop, end, text[end]
        if (text[at + 1:] + file.read()).strip(" \t\r\n"):
            raise ValueError(f"{path}: not a JSON list: more stands behind it, at byte {byte + 1}")
