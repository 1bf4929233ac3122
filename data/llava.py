"""
Reads the one format, LLaVA's (data/README.md): records, and the examples that they hold.

    records = Records.read("data/shapes-seed0", "train.json")
    examples = Examples(records, tokenizer, config)
    examples[0].question, examples[0].whole

The file itself is the store: a record is a range of its bytes, read when it is needed, so that
processes share it and copy nothing.
"""
import hashlib
import json
import os
import re
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.formats import Record, check_picture, items, parse_record
from engine.flags import escaped
from nanoaki import ANSWER, Config, Tokenizer, build_sequence, fit_picture, place_pictures

EDGE_PICTURES = re.compile(r"^(\s*<image>)+|(<image>\s*)+$")  # where they need not be shown
LONGEST = 2048  # positions, where the data choose how many a model has


def say_once(line: str, said: set[str]) -> None:
    """Print a line on standard error if it is not among those said before."""
    if line not in said:
        said.add(line)
        tqdm.write(escaped(line), file=sys.stderr)


def refuse(path: Path, bad: list[str], total: int, skip: bool) -> None:
    """Raise ValueError that counts the bad and shows ten of them, or, to skip them, say so."""
    more = [f"and {len(bad) - 10:,} more"] if len(bad) > 10 else []
    lines = "\n  ".join([f"{path}: {len(bad):,} of {total:,} are bad", *bad[:10], *more])
    if bad and not skip:
        raise ValueError(lines + "\n  (--skip-bad leaves them out)")
    if bad:
        print(escaped(f"skipping: {lines}", keep="\n"), file=sys.stderr)


class Replies(NamedTuple):
    """What is known of each reply without reading it again: int32 tensors of one length."""
    record: Tensor    # number of its record in the file
    turn: Tensor
    pictures: Tensor  # that stand before it
    before: Tensor    # bytes of text before it
    needed: Tensor    # those of them that cannot be left out: all but earlier turns
    answer: Tensor    # its own bytes
    group: Tensor     # number of a stretch of records with the same pictures

    def where(self, keep: Tensor) -> "Replies":
        return Replies(*(column[keep] for column in self))

    def positions(self, visual_tokens: int) -> Tensor:
        """That each may need, its history left out: a token is a byte, or several."""
        return self.pictures * visual_tokens + self.needed + self.answer + 2  # <answer>, <eos>


def replies_of(record: Record) -> Iterator[tuple[int, int, int, int, int]]:
    """turn, pictures, before, needed and answer of each reply, as in Replies; raises ValueError."""
    pictures = before = system = last = 0
    placed = place_pictures(record.turns, len(record.pictures))
    for turn, ((speaker, text), (_, pieces)) in enumerate(zip(record.turns, placed)):
        size = len(text.encode())
        if speaker == "gpt":
            yield turn, pictures, before, system + last, size  # the last turn is the question
        last = size + 2  # <answer> or <eos>, and one to spare
        if speaker == "system":
            system = last
        before += last
        pictures += len(pieces) - 1


@dataclass
class Records:
    """Checked records of a file: which bytes they stand at, and which of them are meant."""
    path: Path
    stamp: tuple[int, int]  # size and time of the file
    spans: Tensor           # int64 (records in the file, 2): first byte, and first behind it
    rows: Tensor            # int64: numbers of the records that are meant
    replies: Replies        # of these
    skipped: int            # bad ones
    digest: str             # of all bytes of the file

    @classmethod
    def read(cls, folder, name: str, skip_bad: bool = False,
             checked: set[str] | None = None) -> "Records":
        """Records of folder/name, all checked; raises ValueError on bad ones, or skips them.

        checked are pictures that were found good before; those that this file shows are added.
        """
        path, bad, notes = Path(folder) / name, [], Counter()
        checked = set() if checked is None else checked
        spans, rows, replies = array("q"), array("q"), array("i")
        last, group = [], -1
        try:
            stamp = stamp_of(os.stat(path))
            with tqdm(total=stamp[0], desc=f"reading {name}", unit="B", unit_scale=True,
                      leave=False, delay=2) as bar:
                for number, (item, start, stop) in enumerate(items(path)):
                    spans.extend((start, stop))
                    bar.update(stop - bar.n)
                    try:
                        record = parse_record(item, number)
                        found = list(replies_of(record))  # or too many <image>
                        for picture in record.pictures:
                            if picture not in checked:
                                check_picture(path.parent, picture)
                                checked.add(picture)
                    except ValueError as e:
                        id = item.get("id") if isinstance(item, dict) else None
                        bad.append(f"record {number} (id {repr(id)[:80]}): {e}")
                        continue
                    if not last or record.pictures != last:
                        group += 1
                    last = record.pictures
                    rows.append(number)
                    notes.update(record.notes)
                    for reply in found:
                        replies.extend((number, *reply, group))
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            raise ValueError(f"{path}: {e.strerror}") from None
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: not UTF-8: {e.reason}") from None
        refuse(path, bad, len(spans) // 2, skip_bad)
        for note, count in notes.items():
            print(escaped(f"{path}: {count:,} of {len(rows):,} records {note}"))
        if not rows:
            raise ValueError(f"{path}: there are no records")
        table = torch.frombuffer(replies, dtype=torch.int32).view(-1, len(Replies._fields))
        return cls(path, stamp, torch.frombuffer(spans, dtype=torch.int64).view(-1, 2),
                   torch.frombuffer(rows, dtype=torch.int64), Replies(*table.unbind(1)), len(bad),
                   digest)

    def records(self, numbers: Iterable[int]) -> Iterator[Record]:
        """The records of these numbers in the file; raises ValueError if it has changed."""
        try:
            with open(self.path, "rb") as file:
                if stamp_of(os.fstat(file.fileno())) != self.stamp:
                    raise ValueError(f"{self.path}: changed since it was read: put it back as it "
                                     f"was, or begin anew")
                for number in numbers:
                    start, stop = self.spans[number].tolist()
                    file.seek(start)
                    yield parse_record(json.loads(file.read(stop - start)), number)
        except OSError as e:
            raise ValueError(f"{self.path}: {e.strerror}") from None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Record:
        (record,) = self.records([int(self.rows[i])])
        return record

    def __iter__(self) -> Iterator[Record]:
        return self.records(self.rows.tolist())

    def where(self, keep: list[bool], skipped: int = 0) -> "Records":
        """The records of which keep says so."""
        rows = self.rows[torch.tensor(keep)]
        if not len(rows):
            raise ValueError(f"{self.path}: there are no records")
        replies = self.replies.where(torch.isin(self.replies.record, rows))
        return replace(self, rows=rows, replies=replies, skipped=skipped)

    def split(self, share: float, seed: int) -> tuple["Records", "Records"]:
        """(rest, held out): about `share` of the records, and no picture on both sides."""
        parent = {}  # picture -> one that records link it to

        def first(picture):
            while parent.setdefault(picture, picture) != picture:
                parent[picture] = parent[parent[picture]]  # shorter for the next one
                picture = parent[picture]
            return picture

        keys = []
        for i, record in enumerate(self):
            pictures = record.pictures or [i]
            for picture in pictures[1:]:
                parent[first(picture)] = first(pictures[0])
            keys.append(pictures[0])
        held, wanted = set(), max(1, round(share * len(self)))
        counts = Counter(first(key) for key in keys)
        names = list(counts)
        for n in np.random.default_rng(seed).permutation(len(names)):
            if wanted > 0:
                held.add(names[n])
                wanted -= counts[names[n]]
        if len(held) == len(names):
            raise ValueError(f"{self.path}: no record can be held out without a picture on both "
                             f"sides; add records about other pictures")
        is_held = [first(key) in held for key in keys]
        return self.where([not h for h in is_held], self.skipped), self.where(is_held)

    def without(self, pictures: set[str]) -> "Records":
        """The records that show none of these pictures."""
        return self.where([not pictures & set(record.pictures) for record in self], self.skipped)

    def texts(self, limit: int, seed: int = 0) -> Iterator[str]:
        """All text of the records, in an order drawn from seed, up to limit bytes."""
        order = np.random.default_rng(seed).permutation(len(self))
        for record in self.records(self.rows[order].tolist()):
            placed = place_pictures(record.turns, len(record.pictures))
            for (_, text), (_, pieces) in zip(record.turns, placed):
                limit -= len(text.encode())
                if limit < 0:
                    return
                yield from pieces


def file_of(folder: Path, name: str) -> Path | None:
    """The file of a split, .json or .jsonl, if there is one; raises ValueError on both."""
    found = [folder / f"{name}{kind}" for kind in (".json", ".jsonl")]
    found = [path for path in found if path.exists()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds both {name}.json and {name}.jsonl: remove one")
    return found[0] if found else None


def read_split(folder: Path, name: str, skip_bad: bool = False) -> Records:
    """The records of one split of a folder; without val, train and what is held out of it."""
    if name in ("train", "val") and not file_of(folder, "val"):
        return read_splits(folder, skip_bad, captions=False)[name]
    path = file_of(folder, name) or folder / f"{name}.json"
    return Records.read(folder, path.name, skip_bad)


def read_splits(folder: Path, skip_bad: bool = False, captions: bool = True) -> dict[str, Records]:
    """The records of a folder by split; without val some of train's are held out."""
    files = {name: file_of(folder, name) for name in ("train", "captions", "val", "test")}
    if not captions:
        del files["captions"]
    files["train"] = files["train"] or folder / "train.json"  # to be missed
    checked = set()
    records = {name: Records.read(folder, path.name, skip_bad, checked)
               for name, path in files.items() if path}
    if "val" not in records:
        records["train"], records["val"] = records["train"].split(0.05, 0)
        print(f"no val.json: {len(records['val']):,} records are held out, by picture")
        if "captions" in records:  # else stage 1 would teach what is held out
            held_out = {picture for record in records["val"] for picture in record.pictures}
            before = len(records["captions"])
            records["captions"] = records["captions"].without(held_out)
            print(f"and {before - len(records['captions']):,} captions of their pictures left out")
    return records


def fit_tokens(records: dict[str, Records], config: Config,
               longer: bool) -> tuple[Tokenizer, Config]:
    """A tokenizer of what is trained on, and the config with its vocab_size.

    Where it may be longer, block_size is what the longest example needs, at least the config's.
    """
    limit = min(5_000_000, 2000 * config.vocab_size)  # bytes: 2 kB a token rank pairs well
    texts = [text for name in ("train", "captions") if name in records
             for text in records[name].texts(limit)]
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    config = replace(config, vocab_size=len(tokenizer))
    needed = positions_needed(records.values(), tokenizer, config) if longer else 0
    if needed > config.block_size:
        more = ", the most that data may ask for" if needed == LONGEST else ""
        print(f"block size: {needed} positions, for the longest example{more} (--block-size)")
        config = replace(config, block_size=needed)
    return tokenizer, config


def positions_needed(some: Iterable[Records], tokenizer: Tokenizer, config: Config) -> int:
    """Positions for every example of some Records, histories aside: at least config's block_size.

    At most LONGEST: what needs more is bad.
    """
    most = config.block_size
    for records in some:
        may_need = records.replies.positions(config.visual_tokens)
        for i in may_need.argsort(descending=True).tolist():
            if may_need[i] <= most or most >= LONGEST:
                break
            most = max(most, least_positions(records, i, tokenizer, config))
    return min(most, LONGEST)


def least_positions(records: Records, i: int, tokenizer: Tokenizer, config: Config) -> int:
    """Positions that a reply needs with pictures, system text and question, but no history."""
    (record,) = records.records([int(records.replies.record[i])])
    turn = int(records.replies.turn[i])
    placed = place_pictures(record.turns, len(record.pictures))
    before, (_, (answer,)) = placed[:turn], placed[turn]
    kept = [given for given in before[:-1] if given[0] == "system"] + before[-1:]
    shown = sum(len(pieces) - 1 for _, pieces in kept)
    tokens, _ = build_sequence(tokenizer, replace(config, block_size=1 << 30), kept, answer)
    return len(tokens) + (int(records.replies.pictures[i]) - shown) * config.visual_tokens


def stamp_of(status: os.stat_result) -> tuple[int, int]:
    """Size and time of a file: what changes when it does."""
    return status.st_size, status.st_mtime_ns


class Example(NamedTuple):
    """One reply: (tokens, roles) of all before it, and with it; and the paths of its pictures."""
    id: str
    task: str
    turns: list[tuple[str, str]]  # all before it, as in Record
    question: str
    answer: str
    prompt: tuple[list[int], list[int]]
    whole: tuple[list[int], list[int]]
    pictures: list[Path]


class Examples:
    """A conversation of n turns is n examples, in the tokens of a model.

    Raises ValueError where an answer or a question does not fit its positions, or skips those.
    """

    def __init__(self, records: Records, tokenizer: Tokenizer, config: Config,
                 skip_bad: bool = False):
        self.records, self.tokenizer, self.config = records, tokenizer, config
        self.replies, self.skip_bad, self.said = records.replies, skip_bad, set()
        self.features = None  # what a frozen ViT says of each picture, where it has looked
        bad = self.too_long()
        refuse(records.path, list(bad.values()), len(self), skip_bad)
        self.skipped = records.skipped + len(bad)
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[list(bad)] = False
        self.replies = self.replies.where(keep)
        if not len(self):
            raise ValueError(f"{records.path}: there are no examples")

    def __len__(self) -> int:
        return len(self.replies.turn)

    def __getitem__(self, i: int) -> Example:
        (example,) = self.some([i], self.config.order)
        return example

    def some(self, indices: list[int], order: str) -> list[Example]:
        """Examples with their pictures in an order (see place_pictures), read at once."""
        r, folder, found = self.replies, self.records.path.parent, []
        turns, pictures = r.turn[indices].tolist(), r.pictures[indices].tolist()
        records = self.records.records(r.record[indices].tolist())
        for record, turn, shown in zip(records, turns, pictures):
            placed = place_pictures(record.turns, len(record.pictures), order)
            before, (_, (answer,)) = placed[:turn], placed[turn]
            whole = build_sequence(self.tokenizer, self.config, before, answer)
            start = whole[1].index(ANSWER)
            question = EDGE_PICTURES.sub("", "<image>".join(before[-1][1])).strip()
            found.append(Example(record.id, record.task, record.turns[:turn], question, answer,
                                 (whole[0][:start], whole[1][:start]), whole,
                                 [folder / path for path in record.pictures[:shown]]))
        return found

    def picture(self, path: Path) -> Tensor:
        """uint8 (3, image_size, image_size); raises ValueError if the file is no picture."""
        return fit_picture(path, self.config.image_size)

    def look(self, path: Path) -> Tensor:
        """What a model is given of a picture: its pixels, or what a frozen ViT says of them."""
        return self.picture(path) if self.features is None else self.features[path]

    def readable(self, indices: list[int]) -> list[int]:
        """Those whose pictures can be read now: with skip_bad; else, which cannot is an error."""
        if not self.skip_bad:
            return indices
        some, broken = self.some(indices, self.config.order), set()
        for path in {path: True for example in some for path in example.pictures}:
            try:
                self.look(path)
            except ValueError as e:
                broken.add(path)
                say_once(f"left out: {e}", self.said)
        return [i for i, example in zip(indices, some) if not broken & set(example.pictures)]

    def too_long(self) -> dict[int, str]:
        """Of each example that does not fit the positions, what to say of it."""
        found, r = {}, self.replies
        may_need = r.positions(self.config.visual_tokens)
        for i in (may_need > self.config.block_size).nonzero()[:, 0].tolist():
            try:
                self[i]
            except ValueError as e:
                number = int(r.record[i])
                (record,) = self.records.records([number])
                found[i] = f"record {number} (id {record.id!r}), turn {int(r.turn[i])}: {e}"
        return found

    @cached_property
    def lengths(self) -> Tensor:
        """About how many tokens each example has, by the bytes that 500 of them take a token."""
        r = self.replies
        visual, text = r.pictures * self.config.visual_tokens, r.before + r.answer + 2
        some = range(0, len(self), -(-len(self) // 500))
        tokens = sum(len(self[i].whole[0]) - int(visual[i]) for i in some)
        lengths = visual + text * (tokens / int(text[some].sum()))
        return lengths.clamp(max=self.config.block_size)  # a longer history is shortened
