"""
Reads the one format, LLaVA's (data/README.md): records, their examples, and batches of those.

    records = Records.read("data/shapes-seed0", "train.json")
    examples = Examples(records, tokenizer, config)
    for batch in loader(examples, batch_size=64, seed=[0], steps=100): ...
"""
import json
import multiprocessing
import os
import re
import signal
import sys
import warnings
import zlib
from array import array
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from nanoaki import ANSWER, Config, Tokenizer, build_sequence, fit_picture, pad_batch

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # too large is refused


def pictures_of(record: dict) -> list[str]:
    image = record.get("image") or []
    return [image] if isinstance(image, str) else image


def problem_with(record, folder: Path, seen: set[str]) -> str | None:
    """What is wrong with a record, or None; `seen` holds the pictures already found good."""
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        return 'must be {"id", "image", "conversations": [...]}'
    speakers = []
    for turn in record["conversations"]:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return 'each turn must be {"from": "human" or "gpt", "value": text}'
        if turn.get("from") not in ("system", "human", "gpt"):
            return f'unknown speaker {turn.get("from")!r}: "human", "gpt" or "system"'
        if turn["from"] == "gpt" and not turn["value"].strip():
            return "an answer is empty"
        try:
            turn["value"].encode()
        except UnicodeEncodeError:
            return "text has a lone surrogate, which UTF-8 cannot encode"
        speakers.append(turn["from"])
    talk = speakers[speakers[:1] == ["system"]:]
    if not talk or talk != ["human", "gpt"] * (len(talk) // 2):
        return 'turns must alternate, "human" then "gpt", after at most one "system"'
    pictures = pictures_of(record)
    if not isinstance(pictures, list) or not all(isinstance(p, str) and p for p in pictures):
        return '"image" must be a path, a list of paths, or absent'
    written = sum(turn["value"].count("<image>") for turn in record["conversations"]
                  if turn["from"] == "human")
    if written not in (0, len(pictures)):
        return (f"{written} <image> in the text for {len(pictures)} pictures: "
                f"write one for each, or none")
    for picture in pictures:
        if picture in seen:
            continue
        if Path(picture).is_absolute() or ".." in Path(picture).parts:
            return f"{picture}: must be a path below the data folder"
        try:
            with Image.open(folder / picture) as image:
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    return f"{picture}: {image.width} x {image.height} pixels are too many"
                image.verify()  # of a PNG, all of it, undecoded; of others, what is cheap
        except FileNotFoundError:
            return f"{picture}: no such file"
        except Image.DecompressionBombError:
            return f"{picture}: more than twice {Image.MAX_IMAGE_PIXELS} pixels are too many"
        except Exception as e:  # Pillow raises whatever the bytes make it raise
            return f"{picture}: not a picture that Pillow can read ({type(e).__name__})"
        seen.add(picture)
    return None


def parse_list(text: str, path: Path) -> Iterator:
    """The items of a JSON list and where each ends; raises ValueError if text is not a list."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at = space.match(text).end()
    if text[at:at + 1] != "[":
        raise ValueError(f"{path}: must be a JSON list of records")
    at = space.match(text, at + 1).end()
    more = text[at:at + 1] != "]"
    while more:
        try:
            item, at = decoder.raw_decode(text, at)
        except RecursionError:
            raise ValueError(f"{path}: nested too deeply, at character {at}") from None
        except ValueError as e:
            raise ValueError(f"{path}: not JSON: {e}") from None
        yield item, at
        at = space.match(text, at).end()
        more = text[at:at + 1] == ","
        at = space.match(text, at + more).end()
    if text[at:].strip() != "]":
        raise ValueError(f"{path}: not a JSON list: ',' or ']' expected at character {at}")


def refuse(path: Path, bad: list[str], total: int, skip: bool) -> None:
    """Raise ValueError that counts the bad and shows ten of them, or, to skip them, say so."""
    lines = "\n  ".join([f"{path}: {len(bad):,} of {total:,} are bad", *bad[:10]])
    if bad and not skip:
        raise ValueError(lines + "\n  (--skip-bad trains on the rest)")
    if bad:
        print(f"skipping: {lines}", file=sys.stderr)


class Records:
    """Checked records, compressed into one block: processes share it and copy no objects."""

    def __init__(self, path: Path, numbered: Iterable[tuple[int, dict]], skipped: int = 0):
        packed, ends, numbers, replies = bytearray(), array("q"), array("q"), array("i")
        pictures, group = [], -1  # of records in a row with the same pictures
        for number, record in numbered:
            group += not pictures or pictures != pictures_of(record)
            turns, pictures, before, asked = record["conversations"], pictures_of(record), 0, 0
            system = len(turns[0]["value"].encode()) + 2 if turns[0]["from"] == "system" else 0
            placed = any("<image>" in t["value"] for t in turns if t["from"] == "human")
            shown = 0 if placed else len(pictures)
            for j, turn in enumerate(turns):
                size = len(turn["value"].encode())
                if turn["from"] == "human":
                    shown += turn["value"].count("<image>")
                if turn["from"] == "gpt":
                    replies.extend((len(ends), j, shown, before, size, group, system + asked))
                before, asked = before + size + 2, size + 2
            talk = [{"from": t["from"], "value": t["value"]} for t in turns]
            kept = {"id": str(record.get("id", number)), "image": pictures,
                    "task": str(record.get("task") or ""), "conversations": talk}
            packed += zlib.compress(json.dumps(kept).encode(), 1)
            ends.append(len(packed))
            numbers.append(number)
        if not ends:
            raise ValueError(f"{path}: there are no records")
        self.path, self.folder, self.skipped = path, path.parent, skipped
        self.data = torch.frombuffer(packed, dtype=torch.uint8)
        self.ends = torch.frombuffer(ends, dtype=torch.int64)
        self.numbers = torch.frombuffer(numbers, dtype=torch.int64)  # in the file
        # Of each reply: record, turn, pictures before it, bytes before it, its own bytes, group,
        # and bytes before it that are not history, which cannot be left out.
        self.replies = torch.frombuffer(replies, dtype=torch.int32).view(-1, 7)

    @classmethod
    def read(cls, folder, name: str, skip_bad: bool = False) -> "Records":
        """Records of folder/name, all checked; raises ValueError on bad ones, or skips them."""
        path, seen, bad = Path(folder) / name, set(), []
        try:
            text = path.read_text("utf-8-sig")  # Windows editors put a mark in front
        except OSError as e:
            raise ValueError(f"{path}: {e.strerror}") from None
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: not UTF-8: {e}") from None

        def good() -> Iterator[tuple[int, dict]]:
            n = -1
            with tqdm(total=len(text), desc=f"reading {name}", unit="B", unit_scale=True,
                      leave=False, delay=2) as bar:
                for n, (record, at) in enumerate(parse_list(text, path)):
                    if problem := problem_with(record, path.parent, seen):
                        id = record.get("id") if isinstance(record, dict) else None
                        bad.append(f"record {n} (id {id!r}): {problem}")
                    else:
                        yield n, record
                    bar.update(at - bar.n)
            refuse(path, bad, n + 1, skip_bad)

        records = cls(path, good())
        records.skipped = len(bad)
        return records

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> dict:
        start, end = int(self.ends[i - 1]) if i else 0, int(self.ends[i])
        return json.loads(zlib.decompress(self.data[start:end].numpy()))

    def split(self, share: float, seed: int) -> tuple["Records", "Records"]:
        """(rest, held out): about `share` of the records, and no picture on both sides."""
        group = {}  # picture -> the first picture that records link it to

        def first(picture):
            while group.setdefault(picture, picture) != picture:
                picture = group[picture]
            return picture

        keys = []
        for i in range(len(self)):
            pictures = pictures_of(self[i]) or [i]
            for picture in pictures[1:]:
                group[first(picture)] = first(pictures[0])
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

        def side(held_out: bool) -> Iterator[tuple[int, dict]]:
            return ((int(self.numbers[i]), self[i]) for i, key in enumerate(keys)
                    if (first(key) in held) == held_out)

        return Records(self.path, side(False), self.skipped), Records(self.path, side(True))

    def without(self, pictures: set[str]) -> "Records":
        """The records that show none of these pictures."""
        kept = ((int(self.numbers[i]), record) for i, record in enumerate(self)
                if not pictures & set(pictures_of(record)))
        return Records(self.path, kept, self.skipped)

    def texts(self, limit: int, seed: int = 0) -> Iterator[str]:
        """All text of the records, in an order drawn from seed, up to limit bytes."""
        for i in np.random.default_rng(seed).permutation(len(self)):
            for turn in self[int(i)]["conversations"]:
                limit -= len(turn["value"].encode())
                if limit < 0:
                    return
                yield turn["value"].replace("<image>\n", "")


class Example(NamedTuple):
    """One reply: (tokens, roles) of all before it, and with it; and the paths of its pictures."""
    id: str
    task: str
    question: str
    answer: str
    prompt: tuple[list[int], list[int]]
    whole: tuple[list[int], list[int]]
    pictures: list[Path]


class Batch(NamedTuple):
    images: Tensor | None  # uint8 (different pictures, 3, H, W)
    index: Tensor          # int64: which of them stands at each <image> of the batch
    tokens: Tensor         # int64 (B, T)
    roles: Tensor          # int64 (B, T)
    targets: Tensor        # int64 (B, T), -100 outside ANSWER
    ids: list[str]


class Examples(Dataset):
    """A conversation of n turns is n examples; as captions, a record is its last reply alone."""

    def __init__(self, records: Records, tokenizer: Tokenizer, config: Config,
                 captions: bool = False, skip_bad: bool = False):
        self.records, self.tokenizer = records, tokenizer
        self.config, self.captions = config, captions
        self.augment_seed = None  # a list of numbers: augment the pictures of batches
        replies = records.replies
        if captions:
            last = torch.cat([replies[1:, 0] != replies[:-1, 0], torch.tensor([True])])
            replies = replies[last] * torch.tensor([1, 1, 1, 0, 1, 1, 0], dtype=torch.int32)
        self.index = replies[:, :2]  # (record, turn) of each example
        visual = replies[:, 2] * config.visual_tokens
        text = replies[:, 3] + replies[:, 4] + 2  # bytes, <answer> and <eos>: no fewer than tokens
        bad, least = {}, replies[:, 6] + replies[:, 4] + 2
        for i in (visual + least > config.block_size).nonzero()[:, 0].tolist():
            try:
                self[i]
            except ValueError as e:
                r = int(self.index[i, 0])
                bad[i] = f"record {records.numbers[r]} (id {records[r]['id']!r}): {e}"
        refuse(records.path, list(bad.values()), len(self), skip_bad)
        self.skipped = records.skipped + len(bad)
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[list(bad)] = False
        self.index, visual, text = self.index[keep], visual[keep], text[keep]
        self.groups = replies[keep, 5]
        if not len(self):
            raise ValueError(f"{records.path}: there are no examples")
        some = range(0, len(self), -(-len(self) // 500))
        tokens = sum(len(self[i].whole[0]) - int(visual[i]) for i in some)
        self.lengths = visual + text * (tokens / int(text[some].sum()))  # in tokens, about
        self.lengths.clamp_(max=config.block_size)  # a longer history is shortened

    def __len__(self) -> int:
        return len(self.index)

    def example(self, record: int, turn: int) -> Example:
        r = self.records[record]
        turns = [(t["from"], t["value"]) for t in r["conversations"]]
        given, answer = [("human", "")] if self.captions else turns[:turn], turns[turn][1]
        pictures = [self.records.folder / p for p in pictures_of(r)]
        if not self.captions and any("<image>" in text for who, text in turns if who == "human"):
            shown = sum(text.count("<image>") for who, text in given if who == "human")
            pictures = pictures[:shown]
        whole = build_sequence(self.tokenizer, self.config, given, len(pictures), answer)
        start = whole[1].index(ANSWER)
        prompt = whole[0][:start], whole[1][:start]
        question = given[-1][1].replace("<image>", "").strip()
        return Example(r["id"], r["task"], question, answer, prompt, whole, pictures)

    def __getitem__(self, i: int) -> Example:
        return self.example(*self.index[i].tolist())

    def picture(self, path: Path) -> Tensor:
        """uint8 (3, image_size, image_size); raises ValueError if the file is no picture."""
        try:
            with Image.open(path) as image:
                return fit_picture(image, self.config.image_size)
        except Exception as e:
            raise ValueError(f"{path}: the picture cannot be read ({type(e).__name__}: {e})") from e

    def __getitems__(self, indices: list[int]) -> "Batch | ValueError":
        """The batch of some examples, pictures decoded; or what is wrong with one, to raise."""
        examples = [self[i] for i in indices]
        number = {path: n for n, path in enumerate({p: None for e in examples for p in e.pictures})}
        try:
            pictures = [self.picture(path) for path in number]
        except ValueError as e:
            return e  # raised in a worker, it would reach the user as a traceback
        if self.augment_seed is not None:  # a function of seed, step and picture, however split
            for n, path in enumerate(number):
                name = zlib.crc32(path.relative_to(self.records.folder).as_posix().encode())
                rng = np.random.default_rng([*self.augment_seed, indices.step, name])
                pictures[n] = augment(pictures[n], rng)
        index = torch.tensor([number[p] for e in examples for p in e.pictures], dtype=torch.int64)
        return Batch(torch.stack(pictures) if pictures else None, index,
                     *pad_batch([e.whole for e in examples]), [e.id for e in examples])


def augment(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """A picture as a slightly other camera sees it, uint8 (3, S, S) -> the same.

    Up to 8% smaller, anywhere on grey, brighter or darker, with noise: never flipped,
    cropped or recoloured, so that answers about left and right, counts and colors stay true.
    """
    size = picture.shape[-1]
    small = size - int(rng.integers(0, max(1, round(0.08 * size)) + 1))
    x, y = rng.integers(0, size - small + 1, 2)
    square = torch.full(picture.shape, 128.0)
    square[:, y:y + small, x:x + small] = F.interpolate(
        picture[None].float(), (small, small), mode="bilinear", antialias=True)[0]
    noise = torch.from_numpy(rng.normal(0, 3, picture.shape).astype(np.float32))
    return (square * rng.uniform(0.9, 1.1) + noise).clamp(0, 255).to(torch.uint8)


class Indices(list):
    """Indices of a step's examples, or of a piece of them, and the number of the step."""
    step = 0


class Batches(Sampler):
    """Indices of each step's batch, from step `start` to `steps`: a pure function of (seed, step).

    Every example comes once an epoch, but for the last few that fill no batch. Up to `share`
    examples about the same pictures stand together. A batch comes whole, or as some pieces of the
    number that it is cut into. A window of batches that would be more than a quarter padding is
    sorted by length, those within a third of each other counting as equal. Others stay mixed:
    batches of like examples teach worse (shapes' captions, sorted: 62% right, not 96%).
    """

    def __init__(self, examples: "Examples", batch_size: int, seed: list[int], steps: int,
                 start: int = 0, share: int = 1, pieces: range = range(1), of: int = 1,
                 window: int = 32):
        # Copies: a spawned worker is sent the tensors by shared memory, and their own is freed.
        self.lengths = examples.lengths.numpy().copy()
        self.groups = examples.groups.numpy().copy()
        self.batch_size, self.seed, self.steps, self.start = batch_size, seed, steps, start
        self.share, self.window, self.pieces, self.of = share, window * batch_size, pieces, of

    def __len__(self) -> int:
        return (self.steps - self.start) * len(self.pieces)

    def epoch(self, number: int) -> np.ndarray:
        """All batches of an epoch, (batches, batch_size)."""
        rng = np.random.default_rng([*self.seed, number])
        rounds = -(-self.batch_size // len(self.groups))  # fewer examples than a batch: repeat
        order = np.concatenate([self.shuffled(rng) for _ in range(rounds)])
        order = order[:len(order) // self.batch_size * self.batch_size]
        for at in range(0, len(order), self.window):
            part, bounds = order[at:at + self.window], [0.0]
            lengths = self.lengths[part].reshape(-1, self.batch_size)
            if lengths.mean() >= 0.75 * lengths.max(1).mean():
                continue
            for length in np.unique(lengths):
                if length > 1.35 * bounds[-1]:
                    bounds.append(length)
            classes = np.searchsorted(bounds, self.lengths[part], side="right")
            part[:] = part[np.argsort(classes, kind="stable")]
        return rng.permutation(order.reshape(-1, self.batch_size))

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Every example once, up to `share` of a group in a row."""
        order = rng.permutation(len(self.groups))
        order = order[np.argsort(self.groups[order], kind="stable")]
        first = np.searchsorted(self.groups[order], self.groups[order])  # of its group
        part = np.cumsum((np.arange(len(order)) - first) % self.share == 0) - 1
        place = np.argsort(rng.permutation(part[-1] + 1))  # of each part
        return order[np.argsort(place[part], kind="stable")]

    def __iter__(self) -> Iterator[list[int]]:
        number = batches = None
        for step in range(self.start, self.steps):
            per_epoch = max(1, len(self.groups) // self.batch_size)
            if step // per_epoch != number:
                number = step // per_epoch
                batches = self.epoch(number)
            cut = np.array_split(batches[step % per_epoch], self.of)
            for piece in self.pieces:
                indices = Indices(cut[piece].tolist())
                indices.step = step
                yield indices


def loader(examples: Examples, *how, workers: int = 1, **more) -> DataLoader:
    """The batches of Batches(examples, *how, **more), read and decoded by worker processes."""
    batches = Batches(examples, *how, **more)
    return DataLoader(examples, batch_sampler=batches, num_workers=workers, collate_fn=_whole,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=leave_group,
                      prefetch_factor=4 if workers else None)


def _whole(batch: Batch) -> Batch:
    return batch  # __getitems__ has made it


GROUP = {signal.SIGINT, signal.SIGTERM}  # what a terminal or a scheduler sends to a whole group


@contextmanager
def signals_blocked():
    """A process started within gets no signal of its group before it has called leave_group."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_group(worker: int = 0) -> None:
    """Signals to the group, as Ctrl-C, are for the process that started this one: it ends it."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
        while some := signal.sigpending() & GROUP:
            signal.sigwait(some)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP)
        if os.getppid() != multiprocessing.parent_process().pid:
            sys.exit(1)  # it is dead: torch's own watch begins after this, and would not see it
