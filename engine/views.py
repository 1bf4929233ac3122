"""What a page shows of a sequence under a mask: each of its cells, weights and names, as JSON."""
import base64
import math
from typing import NamedTuple

import torch
from torch import Tensor

from engine.cells import REASONS, RULES, SEGMENTS, STATES, mask_reasons, mask_states, runs
from nanoaki import IMAGE, PAD

COLORS = {state: name.split()[0] for state, (name, *_) in STATES.items()}  # as the page calls them


class View(NamedTuple):
    """A sequence of T tokens under a mask, and what a model does with it."""
    mask: str
    roles: Tensor                   # (T,)
    labels: list[str]               # of T tokens; a space begins a word
    weights: Tensor | None = None   # (layers, heads, T, T): all that the model has
    likeliest: list = []            # for each generated token: [(label, probability), ...]
    trained: bool = True            # whether the model was trained under this mask


def short(number: float, digits: int = 4) -> float:
    """So many digits of it."""
    return float(f"{number:.{digits}g}")


def grid_side(V: int) -> int:
    """Columns of the grid over a picture with V visual tokens."""
    return math.isqrt(V - 1) + 1


def token_names(roles: list[int], labels: list[str], V: int) -> list[str]:
    """What sentences call each token, where a picture has V visual tokens."""
    names, seen, several = [], 0, roles.count(IMAGE) > V
    for role, label in zip(roles, labels):
        if role == IMAGE:
            picture, at = divmod(seen, V)
            seen += 1
            names.append(f"visual token {at + 1}" + (f" of image {picture + 1}" if several else ""))
        elif role == PAD:
            names.append("padding")
        else:
            names.append(label.strip() or ("a line break" if "\n" in label else "a space"))
    return names


def token_places(roles: list[int], V: int) -> list[str]:
    """Where in its picture each visual token stands; of other tokens nothing."""
    places, seen, side = [], 0, grid_side(V)
    for role in roles:
        if role == IMAGE:
            row, column = divmod(seen % V, side)
            places.append(f" (row {row + 1}, column {column + 1})")
            seen += 1
        else:
            places.append("")
    return places


def segments(roles: list[int], V: int) -> list[dict]:
    """Stretches of one role, each picture on its own: its number is picture, else None."""
    marks, seen, several = [], 0, roles.count(IMAGE) > V
    for role in roles:
        marks.append((role, seen // V if role == IMAGE else None))
        if role == IMAGE:
            seen += 1
    parts = []
    for start, stop in runs(marks):
        role, picture = SEGMENTS[marks[start][0]][0], marks[start][1]
        name = f"{role} {picture + 1}" if several and picture is not None else role
        parts.append({"role": role, "name": name, "start": start, "stop": stop,
                      "picture": picture})
    return parts


def pack_reasons() -> list[dict]:
    """All reasons that a cell can have: its colour, whether it is open, and a sentence."""
    return [reason._asdict() | {"state": COLORS[reason.state]} for reason in REASONS.values()]


def pack_legend(views: list[list[View]]) -> list[dict]:
    """What the cells of all views can be: a colour and what it says."""
    found = {state for row in views for view in row
             for state in mask_states(view.mask, view.roles)[0].unique().tolist()}
    return [{"state": COLORS[state], "name": STATES[state].name} for state in sorted(found)]


def pack_cells(reasons: Tensor) -> list[list[tuple[int, int, int]]]:
    """Rows of a mask's reasons (T, T), in stretches: (reason, start, stop)."""
    return [[(row[start], start, stop) for start, stop in runs(row)] for row in reasons.tolist()]


def choose_planes(weights: Tensor, layers: list[int] | None, head: int | None,
                  average: bool) -> Tensor:
    """Weights (layers, heads, T, T) as a page has them: their means first, or only what is asked.

    layers and head count from 1, None is all; of heads, average leaves only the mean.
    """
    if layers is None:
        weights = torch.cat([weights.mean(0, keepdim=True), weights])
    else:
        weights = weights[[layer - 1 for layer in layers]]
    if head is not None:
        return weights[:, head - 1:head]
    mean = weights.mean(1, keepdim=True)
    return mean if average else torch.cat([mean, weights], 1)


def pack_weights(planes: Tensor) -> dict:
    """Each row of planes (layers, heads, T, T) in parts of its largest, the scale: 255 are all."""
    scales = planes.amax(-1, keepdim=True)
    parts = (planes / scales * 255).round().to(torch.uint8)
    return {"bytes": base64.b64encode(parts.numpy().tobytes()).decode(),
            "scales": [float(f"{scale:.6g}") for scale in scales.flatten().tolist()]}


def pack_view(view: View, V: int, placed: bool, layers: list[int] | None, head: int | None,
              average: bool) -> dict:
    """All that a page shows of a view; see choose_planes, and make_page for placed."""
    roles, (_, title) = view.roles.tolist(), mask_states(view.mask, view.roles)
    rule = RULES[view.mask] if view.trained else f"not trained so: {RULES[view.mask]}"
    packed = {"mask": view.mask, "title": title, "rule": rule, "labels": view.labels,
              "names": token_names(roles, view.labels, V),
              "places": token_places(roles, V) if placed else [""] * len(roles),
              "segments": segments(roles, V),
              "cells": pack_cells(mask_reasons(view.mask, view.roles)),
              "likeliest": view.likeliest,
              "first": len(roles) - len(view.likeliest)}  # the row that predicts the first of them
    if view.weights is not None:
        packed |= pack_weights(choose_planes(view.weights, layers, head, average))
    return packed


def pack_movement(moved: Tensor) -> dict:
    """Shares (layers, visual tokens of all pictures); the largest, or 1 if it is 0; and a title."""
    shares, most = [[short(share, 2) for share in layer] for layer in moved.tolist()], moved.max()
    far = f"up to {most:.2g} times its length" if most else "exactly 0"
    return {"shares": shares, "most": float(most) or 1.0,
            "title": "How far each visual token's state, a vector, moves when the question "
                     f"changes: {far}"}
