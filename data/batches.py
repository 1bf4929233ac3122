"""
Makes batches of examples: batches[step] is that step's batch, a pure function of seed and step.

    order = Order(examples.lengths, examples.replies.group, batch_size=64, steps=100, seed=[0])
    batches = Batches(examples, order)
    batches[7].tokens
"""
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data.llava import Examples
from nanoaki import IMAGE, PROMPT, Batch, Tokenizer, pad_batch

NOTHING = [Tokenizer.eos], [PROMPT]  # tokens and roles of a batch with nothing to learn


class Order:
    """Which examples each step has: order[step] is a pure function of (seed, step).

    Every example comes once an epoch, but for the last few that fill no batch. Up to `share`
    examples about the same pictures stand together. A window of batches that would be more than a
    quarter padding is sorted by length, those within a third of each other counting as equal.
    Others stay mixed: batches of like examples teach worse (shapes' captions, sorted: 62% right,
    not 96%).
    """

    WINDOW = 32  # batches

    def __init__(self, lengths: Tensor, groups: Tensor, batch_size: int, steps: int,
                 seed: list[int], share: int = 1):
        self.lengths, self.groups = lengths, groups  # tensors: a spawned worker shares their memory
        self.batch_size, self.steps, self.seed, self.share = batch_size, steps, seed, share
        self.epoch, self.batches = None, None        # the one asked for last

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> np.ndarray:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        self.prepare(step)
        return self.batches[step % len(self.batches)]

    def prepare(self, step: int) -> None:
        """Make the epoch of a step, if it is not at hand: what is forked later shares it."""
        epoch = step // max(1, len(self.groups) // self.batch_size)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self.batches_of(epoch)

    def batches_of(self, epoch: int) -> np.ndarray:
        """All batches of an epoch, (batches, batch_size)."""
        rng, all_lengths = np.random.default_rng([*self.seed, epoch]), self.lengths.numpy()
        rounds = -(-self.batch_size // len(self.groups))  # fewer examples than a batch: repeat
        order = np.concatenate([self.shuffled(rng) for _ in range(rounds)])
        order = order[:len(order) // self.batch_size * self.batch_size]
        for at in range(0, len(order), self.WINDOW * self.batch_size):
            part, bounds = order[at:at + self.WINDOW * self.batch_size], [0.0]
            lengths = all_lengths[part].reshape(-1, self.batch_size)
            if lengths.mean() >= 0.75 * lengths.max(1).mean():
                continue
            for length in np.unique(lengths):
                if length > 1.35 * bounds[-1]:
                    bounds.append(length)
            classes = np.searchsorted(bounds, all_lengths[part], side="right")
            part[:] = part[np.argsort(classes, kind="stable")]
        return rng.permutation(order.reshape(-1, self.batch_size))

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Every example once, up to `share` of a group in a row."""
        groups = self.groups.numpy()
        order = rng.permutation(len(groups))
        order = order[np.argsort(groups[order], kind="stable")]
        start = np.searchsorted(groups[order], groups[order])  # of each one's group, in order
        run = np.cumsum((np.arange(len(order)) - start) % self.share == 0) - 1
        place = np.argsort(rng.permutation(run[-1] + 1))       # of each run of up to `share`
        return order[np.argsort(place[run], kind="stable")]    # arrays alone: a list is 20 times it


class Batches(Dataset):
    """Each step's batch, or one of several parts of it, with its pictures in one of some orders.

    The orders (Config.order) take turns by step. What is wrong with a file or a picture that was
    good when it was checked is the batch's problem, and it holds nothing else; pictures that
    examples with skip_bad leave out are in unread.
    """

    def __init__(self, examples: Examples, order: Order, part: int = 0, parts: int = 1,
                 picture_orders: tuple[str, ...] = ("data",),
                 augment_seed: list[int] | None = None):
        self.examples, self.order, self.part, self.parts = examples, order, part, parts
        self.picture_orders, self.augment_seed = picture_orders, augment_seed

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Batch:
        indices = np.array_split(self.order[step], self.parts)[self.part].tolist()
        picture_order = self.picture_orders[step % len(self.picture_orders)]
        seed = None if self.augment_seed is None else [*self.augment_seed, step]
        try:
            return make_batch(self.examples, indices, picture_order, seed)
        except ValueError as e:  # raised in a worker, it would reach the user as a traceback
            none = torch.empty(0, dtype=torch.int64)
            return Batch(none, none, none, none, none, none, none, 0, [], str(e), unread=[])


def make_batch(examples: Examples, indices: list[int], picture_order: str,
               augment_seed: list[int] | None = None) -> Batch:
    """The batch of some examples, each picture decoded once.

    Raises ValueError on a broken picture; with examples' skip_bad, what shows it is left out.
    """
    rows, images, unread = [], {}, []
    for example in examples.some(indices, picture_order):
        try:
            for path in example.pictures:
                if path not in images:
                    images[path] = examples.look(path)
            rows.append(example)
        except ValueError as e:
            if not examples.skip_bad:
                raise ValueError(f"{e}; --skip-bad, also with --resume, leaves it out") from e
            unread.append(str(e))
    if augment_seed is not None:  # a function of seed, step and picture, however a batch is split
        for path in images:
            name = zlib.crc32(path.relative_to(examples.records.path.parent).as_posix().encode())
            images[path] = augment(images[path], np.random.default_rng([*augment_seed, name]))
    number = {path: n for n, path in enumerate(images)}
    shown = [number[path] for example in rows for path in example.pictures]
    pictures = list(images.values())
    if not pictures:  # one that is not shown: DDP waits for every gradient
        size = examples.config.image_size
        pictures = [torch.zeros(3, size, size, dtype=torch.uint8)]
    tokens, roles, targets = pad_batch([example.whole for example in rows] or [NOTHING])
    row, column = (targets != -100).nonzero().unbind(1)
    return Batch(torch.stack(pictures), torch.tensor(shown, dtype=torch.int64), tokens,
                 roles, targets, visual=(roles == IMAGE).flatten().nonzero()[:, 0],
                 learned=row * tokens.shape[1] + column,
                 start=min(column.tolist(), default=1) - 1,
                 ids=[example.id for example in rows], problem="", unread=unread)


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
