"""Evaluation: what a model answers, and what it answers blind, about another record's pictures."""
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from data.batches import make_batch
from data.llava import Examples
from engine.device import Objective, autocast
from engine.pictures import draw_samples, join, padded
from engine.processes import rank_and_world, total
from engine.scores import Answered, table
from nanoaki import NanoAKI, pad_batch


def report(model: NanoAKI, examples: Examples, split: str, indices: list[int],
           mask: str | None = None, **how) -> list[Answered]:
    """Ask a model some Examples of a split, print the table, and return what came back.

    how is answer_all's.
    """
    answered = ask_all(model, examples, indices, mask, progress=rank_and_world()[0] == 0, **how)
    print(f"\n{split} split, exact match of generated answers:\n{table(answered)}")
    return answered


def draw_answered(examples: Examples, indices: list[int], answered: list[Answered]) -> Image.Image:
    """Some answered Examples with their pictures, several of them row by row in a square."""
    cards = []
    for i, one in zip(indices, answered):
        square, paths = None, examples[i].pictures
        if paths:
            shown = [Image.fromarray(examples.picture(path).permute(1, 2, 0).numpy())
                     for path in paths]
            side = math.ceil(len(shown) ** 0.5)
            rows = [join(shown[n:n + side]) for n in range(0, len(shown), side)]
            square = padded(join(rows, down=True), (side * shown[0].width, side * shown[0].width))
        cards.append((square, one.question, one.right, one.answer))
    return draw_samples(cards)


def ask_all(model: NanoAKI, examples: Examples, indices: list[int], mask: str | None = None,
            blind: bool = True, **how) -> list[Answered]:
    """The model's answers to some Examples, and its answers blind; how is answer_all's."""
    answers, blinds = answer_all(model, examples, indices, mask, **how), [None] * len(indices)
    others = other_pictures(examples, indices) if blind else {}
    if any(others.values()):
        blinds = answer_all(model, examples, indices, mask, others, **how)
    found = []
    some = examples.some(indices, examples.config.order)
    for e, answer, blinded in zip(some, answers, blinds):
        found.append(Answered(e.id, e.task, e.question, e.answer.strip(), answer, blinded))
    return found


def answer_all(model: NanoAKI, examples: Examples, indices: list[int], mask: str | None = None,
               pictures: dict[int, list[Path]] | None = None, dtype: str = "auto",
               batch_size: int = 250, progress: bool = False) -> list[str]:
    """The model's greedy answers to some Examples, about their own pictures or others.

    Generation stops a token after the longest right answer of its batch: what is longer is wrong.
    Every process answers its share and gets all answers.
    """
    device, found, (rank, world) = next(model.parameters()).device, {}, rank_and_world()
    lengths, group = examples.lengths.tolist(), examples.replies.group.tolist()
    # Together what differs little in length (padding costs time), and of that what shows the same
    # picture: it is read and encoded once.
    mine = sorted(indices, key=lambda i: (lengths[i] // 16, group[i]))
    mine = mine[rank * len(mine) // world:(rank + 1) * len(mine) // world]
    with tqdm(total=len(mine), desc="asking", unit="question", leave=False,
              disable=not progress) as bar:
        for at in range(0, len(mine), batch_size):
            part = mine[at:at + batch_size]
            some, number, shown = examples.some(part, examples.config.order), {}, []
            for i, example in zip(part, some):
                for path in pictures[i] if pictures else example.pictures:
                    shown.append(number.setdefault(path, len(number)))
            images = [examples.look(path) for path in number]
            tokens, roles, _ = pad_batch([example.prompt for example in some])
            longest = max(len(example.whole[0]) - len(example.prompt[0]) for example in some)
            with autocast(device, dtype):
                rows = model.generate(torch.stack(images).to(device) if images else None,
                                      tokens.to(device), roles.to(device), longest, mask=mask,
                                      shown=torch.tensor(shown, dtype=torch.int64, device=device))
            found |= {i: model.tokenizer.decode(ids).strip() for i, ids in zip(part, rows)}
            bar.update(len(part))
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, found)
        found = {i: answer for share in shares for i, answer in share.items()}
    return [found[i] for i in indices]


def other_pictures(examples: Examples, indices: list[int]) -> dict[int, list[Path]]:
    """As many pictures as each example has, of another that shares none; {} where there is none.

    Always the same: those that come next in the order of their paths.
    """
    shown = examples.some(indices, examples.config.order)
    own = {i: tuple(e.pictures) for i, e in zip(indices, shown)}
    some = sorted(set(own.values()) - {()})
    place, found = {pictures: n for n, pictures in enumerate(some)}, {}
    for i, mine in own.items():
        start = place.get(mine, 0)
        other = first_apart(some[start + 1:] + some[:start], mine) if mine else ()
        if other is None:
            return {}
        found[i] = [other[k % len(other)] for k in range(len(mine))]
    return found


def first_apart(others, mine: tuple) -> tuple | None:
    """The first of some sets of pictures that shares none with mine."""
    for other in others:
        if not set(other) & set(mine):
            return other
    return None


def examine(objective: Objective, examples: Examples, sample: int, mask: str, blind: bool,
            **how) -> tuple[float, list[Answered]]:
    """Held-out loss and answers of a sample of examples, always the same; how is answer_all's."""
    indices = np.random.default_rng(0).permutation(len(examples)).tolist()[:sample]
    indices = examples.readable(indices)
    if not indices:
        return math.nan, []
    loss = held_out_loss(objective, examples, indices, mask, how["batch_size"])
    return loss, ask_all(objective.model, examples, indices, mask, blind, **how)


@torch.no_grad()
def held_out_loss(objective: Objective, examples: Examples, indices: list[int], mask: str,
                  batch_size: int) -> float:
    """Mean loss over the answer tokens of some examples, in nats, a share for every process."""
    rank, world = rank_and_world()
    loss = count = 0
    for at in range(0, len(indices), batch_size):
        part = indices[at:at + batch_size][rank::world]
        if part:
            batch = make_batch(examples, part, examples.config.order)
            loss += len(batch.learned) * objective(batch, mask).item()
            count += len(batch.learned)
    loss, count = total(loss, count)
    return loss / count
