"""The page that draw.py writes: everything is computed here, and put into assets/page.html."""
import base64
import io
import json
from pathlib import Path

from PIL import Image
from torch import Tensor

from engine.attention import MARKS
from engine.cells import RULES, STATE_OF, UNLOCKED, mask_reasons
from engine.views import View, grid_side, pack_legend, pack_movement, pack_reasons, pack_view
from nanoaki import IMAGE, PROMPT, make_mask

TEMPLATE = Path(__file__).parent.parent / "assets/page.html"
PLACE = "{{data}}"   # in the template, once
LARGEST = 5_000_000  # bytes of a page
LONGEST = 5_000      # tokens of a sequence in it
MARK = "The answer begins after the mark <answer>."
ERROR = ("A weight is shown as one of 255 parts of the largest in its row, so it is off by at most "
         "0.2% of that one.")


def as_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def choose_word(view: View) -> int:
    """The longest word of a prompt, if it can be one that stands after a picture and is no mark."""
    prompt = (view.roles == PROMPT).nonzero()[:, 0].tolist()
    labels, first = [label.strip() for label in view.labels], view.roles.tolist().index(IMAGE)
    words = [i for i in prompt if labels[i] not in MARKS.values()]
    return max(words or prompt, key=lambda i: (i > first, len(labels[i]), i))


def make_tour(views: list[View], start: int) -> list[dict]:
    """How a page opens, and four sentences with what is to be seen meanwhile.

    Each is which token, and a second one; whether it is turned to who reads it; what is scrolled
    to. views are those of one question under each mask.
    """
    roles, masks = views[start].roles, [view.mask for view in views]
    images = (roles == IMAGE).nonzero()[:, 0].tolist()
    last, visual = int((roles == PROMPT).nonzero()[-1]), images[len(images) // 2]
    word = choose_word(views[start])
    told = masks if len(masks) == 2 else [masks[start]]
    rules = "; ".join(f"under {mask} {RULES[mask]}" for mask in told)
    if any((STATE_OF[mask_reasons(mask, roles)] == UNLOCKED).any() for mask in told):
        rules += ": the orange cells of the grid"
    readers = [int(make_mask(mask, roles[None])[0, images, word].sum()) for mask in masks]
    counts = ", ".join(f"{count} under {mask}" for count, mask in zip(readers, masks))
    plain = {"other": None, "pin": None, "turned": False, "see": ".picture"}
    opening = {"at": last, "say": ""}
    if any(readers):
        opening |= {"at": word, "turned": True}
    return [plain | stop for stop in (
        opening,
        {"at": last, "say": "This is one sequence, from the picture to the answer, which begins "
         "after the mark <answer>: point at any part of it, tap it, or walk with the arrow keys, "
         "and what it reads lights up."},
        {"at": visual, "see": "canvas", "say": rules[0].upper() + rules[1:] + "."},
        {"at": word, "turned": True, "say": f"This is 'who reads it' (r): of {len(images)} visual "
         f"tokens, {counts} read this word."},
        {"at": visual, "other": word, "pin": {"at": visual, "other": word}, "see": ".sentence",
         "say": "Click or tap a token to pin it, then point at another or tap it, or a cell of the "
         "grid: a sentence says why it is open or closed, until you click the pinned one again."})]


def make_page(path, views: list[list[View]], questions: list[str], V: int, own: str, about: str,
              squares: list[Image.Image] = (), moved: list[Tensor] = (), notes: list[str] = (),
              layers: list[int] | None = None, head: int | None = None, placed: bool = True) -> str:
    """The page of views[question][mask], pictures having V visual tokens; own is shown first.

    Where visual tokens are not placed in their picture, they are shown beside it.
    moved: movement's shares for each mask; layers and head as for choose_planes. Heads are averaged
    where all of them would make it larger than LARGEST. Raises ValueError where that is not enough,
    and, before anything is computed, on more than LONGEST tokens.
    """
    T = max(len(view.roles) for row in views for view in row)
    if T > LONGEST:
        raise ValueError(f"{path}: {T:,} tokens, and a page may have {LONGEST:,}: leave out "
                         f"pictures or text, or give pictures fewer tokens (--visual-tokens)")
    masks, weights = [view.mask for view in views[0]], views[0][0].weights
    start = masks.index(own) if own in masks else 0
    data = {"about": about, "questions": questions, "masks": masks, "start": start,
            "visual": V, "side": grid_side(V), "placed": placed,
            "pictures": [as_url(s) for s in squares],
            "reasons": pack_reasons(), "legend": pack_legend(views),
            "moved": [pack_movement(shares) for shares in moved],
            "tour": make_tour(views[0], start), "notes": [MARK, *notes]}
    if weights is not None:
        data["layers"] = layers or ["mean", *range(1, len(weights) + 1)]
        data["heads"] = [head] if head else ["mean", *range(1, weights.shape[1] + 1)]
        data["notes"].append(ERROR)
    page = fill_views(data, views, layers, head, average=False)
    if len(page.encode()) > LARGEST and len(data.get("heads", [])) > 1:
        data["heads"] = ["mean"]
        data["notes"].append(f"Only the mean of the heads is shown: with all of them this page "
                             f"would have {len(page.encode()) / 1e6:.1f} MB.")
        page = fill_views(data, views, layers, head, average=True)
    size = len(page.encode())
    if size > LARGEST:
        less = "" if weights is None else "fewer layers (--layer 1), "
        raise ValueError(f"{path}: {size / 1e6:.1f} MB, and a page may have "
                         f"{LARGEST // 10 ** 6}: leave out something, {less}masks (--masks mma) or "
                         f"questions")
    return page


def fill_views(data: dict, views: list[list[View]], layers: list[int] | None, head: int | None,
               average: bool) -> str:
    """The page of data and of these views."""
    packed = [[pack_view(view, data["visual"], data["placed"], layers, head, average)
               for view in row] for row in views]
    return fill(json.dumps(data | {"views": packed}, separators=(",", ":")))


def fill(text: str) -> str:
    """The template with JSON in its place, in which nothing can be taken for markup."""
    for character in "<>&":  # they stand only within JSON's strings
        text = text.replace(character, f"\\u{ord(character):04x}")
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    return before + text + after
