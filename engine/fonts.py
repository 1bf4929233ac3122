"""Text in pictures, in any script: in Pillow's own font, or in one of the system's that has it."""
import os
import re
import unicodedata
from functools import cache
from glob import glob

from PIL import Image, ImageDraw, ImageFont, features

FONT, LINE, BASE = 11, 13, 11       # in pixels: size of text, distance of lines, baseline in one
OWN = ImageFont.load_default(FONT)  # of Pillow: ASCII and little else
HIDDEN = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufe0e\ufe0f\ufeff"  # joiners, directions
FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
           "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts",
           "${WINDIR}/Fonts", "${LOCALAPPDATA}/Microsoft/Windows/Fonts")
PLAIN = re.compile(r"(sans|arial)[^/\\]*$", re.I)
STYLED = re.compile(r"(bold|black|light|thin|ital|obli|condensed|mono|serif)[^/\\]*$", re.I)
open_font = cache(ImageFont.truetype)


@cache
def font_files() -> list[str]:
    """Paths of all fonts of system and user, plain sans ones first."""
    folders = [os.path.expanduser(os.path.expandvars(folder)) for folder in FOLDERS]
    paths = sum([glob(f"{folder}/**/*.[oOtT][tT][cCfF]", recursive=True) for folder in folders], [])
    return sorted((path for path in paths if "LastResort" not in path),  # it has only boxes
                  key=lambda path: (bool(STYLED.search(path)), not PLAIN.search(path), path))


@cache
def has(path: str, character: str) -> bool:
    """Whether the font in a file, or OWN for "", draws a character: Pillow has no other way."""
    try:  # without shaping, which would add a dotted circle to a mark; and what no font has
        font = open_font(path, FONT, layout_engine=ImageFont.Layout.BASIC) if path else OWN
        drawn, box = (bytes(font.getmask(c)) for c in (character, "\U0010FFFF"))
    except OSError:  # it is broken, or has bitmaps of other sizes
        return False
    if character in HIDDEN:
        return path != ""  # OWN has boxes for them
    return not any(drawn) if character == " " else any(drawn) and drawn != box


@cache
def find_font(string: str) -> ImageFont.FreeTypeFont | None:
    """The first font that has all of a string."""
    if string.isascii() and string.isprintable():
        return OWN
    for path in ("", *font_files()):
        if all(has(path, character) for character in set(string)):
            return open_font(path, FONT) if path else OWN
    return None


def clusters(string: str) -> list[str]:
    """Characters, each with the marks and joiners that follow it."""
    parts = []
    for c in string:
        if not parts or c not in HIDDEN and not unicodedata.category(c).startswith("M"):
            parts.append("")
        parts[-1] += c
    return parts


def runs(string: str) -> list[str]:
    """Parts of a text, each as long as there is a font that has all of it."""
    found = [""]
    for part in [string] if find_font(string) else clusters(string):
        if not find_font(found[-1] + part):
            found.append("")
        found[-1] += part
    return found


def length(string: str) -> float:
    return sum(find_font(part).getlength(part) for part in runs(string))


def text(string: str, color="black", limit: int | None = None) -> Image.Image:
    """A line of text, cut to a number of pixels; what no font has is shown as U+ and its number."""
    string = unicodedata.normalize("NFC", string[:1000])  # longer ones would take minutes
    string = " ".join(string.split())[:limit]             # no character is narrower than a pixel
    if not features.check("raqm"):  # only shaping hides them, joins letters, and turns directions
        string = "".join(c for c in string if c not in HIDDEN)
    parts = [part if find_font(part) else "".join(f"U+{ord(c):04X}" for c in part)
             for part in clusters(string)]
    if limit and length("".join(parts)) > limit:
        while parts and length("".join(parts) + "...") > limit:
            parts.pop()
        parts.append("...")
    string, x = "".join(parts), 0
    image = Image.new("RGB", (max(1, int(length(string) + 1)), LINE), "white")
    for part in runs(string):
        font = find_font(part)
        y = min(BASE, LINE - font.getbbox(part, anchor="ls")[3])  # what reaches deep is raised
        ImageDraw.Draw(image).text((x, y), part, color, font, "ls")
        x += font.getlength(part)
    return image
