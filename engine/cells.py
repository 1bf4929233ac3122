"""The cells of a mask: how each is shown, and why it is open or closed."""
from collections import namedtuple

import torch
from torch import Tensor

from nanoaki import ANSWER, IMAGE, PAD, PROMPT, make_mask

# What a cell of a mask can be: colours differ in lightness too (in L*: 98, 82, 70, 54, 24).
BLOCKED, PADDING, SEEN, UNLOCKED, DIAGONAL = range(5)
State = namedtuple("State", "name color sign block ansi")  # in ASCII, or a block and its colour
STATES = {
    BLOCKED: State("blocked", (249, 249, 249), ".", "· ", "90"),
    PADDING: State("padding", (203, 203, 203), "-", "░░", "90"),
    SEEN: State("seen causally", (86, 180, 233), "x", "▒▒", "36"),
    UNLOCKED: State("unlocked by the mask", (213, 94, 0), "o", "██", "33"),
    DIAGONAL: State("itself", (0, 56, 104), "*", "▓▓", "34")}
SEGMENTS = {PAD: ("padding", (203, 203, 203)), IMAGE: ("image", (0, 158, 115)),
            PROMPT: ("prompt", (204, 121, 167)), ANSWER: ("answer", (230, 200, 30))}

# What each mask lets read, in a line.
RULES = {
    "causal": "each token reads what stands before it",
    "mma": "visual tokens also read all of the prompt",
    "prefix": "image and prompt read each other and themselves, in both directions",
    "image": "visual tokens also read those that follow them in one unbroken run",
    "leaky": "visual tokens also read prompt and answer, which gives the answer away"}

# Why a query {q} may read a key {k}, or not.
Reason = namedtuple("Reason", "state open sentence")
REASONS = {
    "itself": Reason(DIAGONAL, True, "{q} may read itself, as every token may"),
    "before": Reason(SEEN, True, "{q} may read {k}: it stands before"),
    "mma": Reason(UNLOCKED, True, "{q} may read {k}: unlocked by MMA"),
    "prefix": Reason(UNLOCKED, True, "{q} may read {k}: unlocked by prefix, as both are given"),
    "image": Reason(UNLOCKED, True, "{q} may read {k}: unlocked by image, as no text parts them"),
    "leaky": Reason(UNLOCKED, True, "{q} may read {k}: unlocked by leaky, which gives it away"),
    "later": Reason(BLOCKED, False, "{q} may not read {k}: it comes later"),
    "generated": Reason(BLOCKED, False, "{q} may not read {k}: it is generated later"),
    "pads": Reason(PADDING, False, "{q} may not read {k}: padding reads nothing but itself"),
    "padded": Reason(PADDING, False, "{q} may not read {k}: it is padding, which nobody reads"),
    "pad": Reason(PADDING, True, "{q} may read itself, and reads nothing else")}
NUMBER = {key: number for number, key in enumerate(REASONS)}
STATE_OF = torch.tensor([reason.state for reason in REASONS.values()])


def mask_reasons(name: str, roles: Tensor) -> Tensor:
    """Which of REASONS each cell of a mask has, int64 (T, T), for roles (T,)."""
    mask, q, k = make_mask(name, roles[None])[0], roles[:, None], roles[None]
    before, itself = torch.ones_like(mask).tril(-1), torch.eye(len(roles), dtype=torch.bool)
    found = torch.full(mask.shape, NUMBER["later"])
    for key, cells in (("generated", k == ANSWER), (name, mask), ("before", mask & before),
                       ("padded", k == PAD), ("pads", q == PAD), ("itself", itself),
                       ("pad", itself & (k == PAD))):  # what comes later in this list holds
        if key != "causal":  # all that it opens stands before
            found = found.masked_fill(cells, NUMBER[key])
    if name == "leaky":  # to the prompt it opens what MMA does
        found = found.masked_fill((found == NUMBER["leaky"]) & (k == PROMPT), NUMBER["mma"])
    return found


def mask_states(name: str, roles: Tensor) -> tuple[Tensor, str]:
    """Which state each cell of a mask has, int64 (T, T), for roles (T,); and the mask's title."""
    states = STATE_OF[mask_reasons(name, roles)]
    return states, f"{name}: {int((states == UNLOCKED).sum()):,} pairs unlocked"


def runs(values: list) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of equal values."""
    cuts = [0] + [i for i in range(1, len(values)) if values[i] != values[i - 1]] + [len(values)]
    return list(zip(cuts, cuts[1:]))
