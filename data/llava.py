"""
Reads the one format, LLaVA's (data/README.md): records, their examples, and batches of those.

    records = Records.read("data/shapes-seed0", "train.json")
    examples = Examples(records, tokenizer, config)
    for batch in loader(examples, batch_size=64, seed=[0], steps=100): ...
"""
import json
import math
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nanoaki import Config, Tokenizer, build_sequence, fit_picture, pad_batch


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
        except FileNotFoundError:
            return f"{picture}: no such file"
        except Exception as e:  # Pillow raises whatever the bytes make it raise
            return f"{picture}: not a picture that Pillow can read ({type(e).__name__})"
        seen.add(picture)
    return None


def parse_list(text: str, path: Path) -> Iterator:
    """The items of a JSON list, one at a time; raises ValueError where the text is not one."""
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
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}: not JSON: {e}") from None
        yield item
        at = space.match(text, at).end()
        more = text[at:at + 1] == ","
        at = space.match(text, at + more).end()
    if text[at:].strip() != "]":
        raise ValueError(f"{path}: not a JSON list: ',' or ']' expected at character {at}")


class Records:
    """Checked records, packed into one block of bytes: processes share it and copy no objects."""

    def __init__(self, folder: Path, records: Iterable[dict]):
        self.folder, packed, ends, replies = folder, bytearray(), [], []
        for record in records:
            pictures, before = pictures_of(record), 0
            turns = record["conversations"]
            placed = any("<image>" in t["value"] for t in turns if t["from"] == "human")
            seen = 0 if placed else len(pictures)
            for j, turn in enumerate(turns):
                size = len(turn["value"].encode())
                if turn["from"] == "gpt":
                    replies.append((len(ends), j, seen, before, size))
                elif turn["from"] == "human":
                    seen += turn["value"].count("<image>")
                before += size + 2
            packed += json.dumps(record).encode()
            ends.append(len(packed))
        if not ends:
            raise ValueError(f"{folder}: there are no records")
        self.data = torch.frombuffer(packed, dtype=torch.uint8)
        self.ends = torch.tensor(ends)
        self.replies = torch.tensor(replies)  # record, turn, pictures before, bytes before, bytes

    @classmethod
    def read(cls, folder, name: str) -> "Records":
        """Records of folder/name; raises ValueError that counts the bad and shows ten of them."""
        folder, path = Path(folder), Path(folder) / name
        try:
            text = path.read_text("utf-8")
        except OSError as e:
            raise ValueError(f"{path}: {e.strerror}") from None
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: not UTF-8: {e}") from None
        seen, bad = set(), []

        def good() -> Iterator[dict]:
            for i, record in enumerate(parse_list(text, path)):
                if problem := problem_with(record, folder, seen):
                    id = record.get("id") if isinstance(record, dict) else None
                    bad.append(f"  record {i} (id {id!r}): {problem}")
                else:
                    yield record
            if bad:
                bad.insert(0, f"{path}: {len(bad)} of {i + 1} records are bad")
                raise ValueError("\n".join(bad[:11]))

        return cls(folder, good())

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> dict:
        start, end = int(self.ends[i - 1]) if i else 0, int(self.ends[i])
        return json.loads(self.data[start:end].numpy().tobytes())

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
        sides = [[self[i] for i, key in enumerate(keys) if (first(key) in held) == side]
                 for side in (False, True)]
        return Records(self.folder, sides[0]), Records(self.folder, sides[1])

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
    images: Tensor | None  # uint8 (pictures in the batch, 3, H, W)
    tokens: Tensor         # int64 (B, T)
    roles: Tensor          # int64 (B, T)
    targets: Tensor        # int64 (B, T), -100 outside ANSWER
    ids: list[str]


class Examples(Dataset):
    """A conversation of n turns is n examples; as captions, a record is its last reply alone."""

    def __init__(self, records: Records, tokenizer: Tokenizer, config: Config,
                 captions: bool = False):
        self.records, self.tokenizer = records, tokenizer
        self.config, self.captions = config, captions
        replies = records.replies
        if captions:
            last = torch.cat([replies[1:, 0] != replies[:-1, 0], torch.tensor([True])])
            replies = replies[last] * torch.tensor([1, 1, 1, 0, 1])
        self.index = replies[:, :2]  # (record, turn) of each example
        visual = replies[:, 2] * config.visual_tokens
        text = replies[:, 3] + replies[:, 4] + 2  # bytes, <answer> and <eos>: no fewer than tokens
        for i in (visual + text > config.block_size).nonzero()[:, 0].tolist():
            try:
                self[i]
            except ValueError as e:
                record = int(self.index[i, 0])
                raise ValueError(f"{records.folder}: record {record} "
                                 f"(id {records[record].get('id')!r}): {e}") from None
        some = range(0, len(self), -(-len(self) // 500))
        tokens = sum(len(self[i].whole[0]) - int(visual[i]) for i in some)
        self.lengths = visual + text * (tokens / int(text[some].sum()))  # in tokens, about

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
        prompt = build_sequence(self.tokenizer, self.config, given, len(pictures))
        whole = build_sequence(self.tokenizer, self.config, given, len(pictures), answer)
        question = given[-1][1].replace("<image>", "").strip()
        return Example(str(r.get("id", record)), str(r.get("task", "")), question, answer, prompt,
                       whole, pictures)

    def __getitem__(self, i: int) -> Example:
        return self.example(*self.index[i].tolist())

    def picture(self, path: Path) -> Tensor:
        """uint8 (3, image_size, image_size); raises ValueError if the file is no picture."""
        try:
            with Image.open(path) as image:
                return fit_picture(image, self.config.image_size)
        except Exception as e:
            raise ValueError(f"{path}: the picture cannot be read ({type(e).__name__}: {e})") from e

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of some examples, their pictures decoded."""
        examples = [self[i] for i in indices]
        pictures = [self.picture(path) for e in examples for path in e.pictures]
        tokens, roles, targets = pad_batch([e.whole for e in examples])
        return Batch(torch.stack(pictures) if pictures else None, tokens, roles, targets,
                     [e.id for e in examples])


class Batches(Sampler):
    """Indices of each step's batch, from step `start` to `steps`: a pure function of (seed, step).

    Every example comes once an epoch, but for the last few that fill no batch. A window of batches
    is sorted by length, lengths within a fifth of each other counting as equal: little padding, and
    batches still mixed.
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: list[int], steps: int,
                 start: int = 0, window: int = 32):
        self.lengths, self.batch_size, self.seed = lengths.numpy(), batch_size, seed
        self.steps, self.start, self.window = steps, start, window * batch_size

    def __len__(self) -> int:
        return self.steps - self.start

    def epoch(self, number: int) -> np.ndarray:
        """All batches of an epoch, (batches, batch_size)."""
        rng, n = np.random.default_rng([*self.seed, number]), len(self.lengths)
        rounds = -(-self.batch_size // n)  # fewer examples than a batch: they come more than once
        order = np.concatenate([rng.permutation(n) for _ in range(rounds)])
        order = order[:len(order) // self.batch_size * self.batch_size]
        for at in range(0, len(order), self.window):
            part, least, group = order[at:at + self.window], 0, []
            part[:] = part[np.argsort(self.lengths[part], kind="stable")]
            for length in self.lengths[part]:
                least = length if length > 1.2 * least else least
                group.append(least)
            shuffled = rng.permutation(len(part))
            part[:] = part[shuffled[np.argsort(np.array(group)[shuffled], kind="stable")]]
        return rng.permutation(order.reshape(-1, self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        number = batches = None
        for step in range(self.start, self.steps):
            per_epoch = max(1, len(self.lengths) // self.batch_size)
            if step // per_epoch != number:
                number = step // per_epoch
                batches = self.epoch(number)
            yield batches[step % per_epoch].tolist()


def loader(examples: Examples, batch_size: int, seed: list[int], steps: int, start: int = 0,
           workers: int = 1) -> DataLoader:
    """The batches of steps start to steps, read and decoded by worker processes."""
    batches = Batches(examples.lengths, batch_size, seed, steps, start)
    return DataLoader(examples, batch_sampler=batches, num_workers=workers, collate_fn=_whole,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=_quiet,
                      prefetch_factor=4 if workers else None)


def _whole(batch: Batch) -> Batch:
    return batch  # __getitems__ has made it


def _quiet(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process decides
    torch.set_num_threads(1)
