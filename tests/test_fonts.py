"""Text in pictures shows every character: in a font that has it, or as its code point."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from draw import columns_of
from engine import fonts, pictures
from engine.fonts import clusters, find_font, runs, text

MARKED = "x\u0301"  # there is no single character for it


@pytest.fixture
def system(monkeypatch):
    """Sets which fonts the system has: {path: characters}, or a list of paths of files."""
    def install(found):
        monkeypatch.setattr(fonts, "font_files", lambda: list(found))
        if isinstance(found, dict):
            found[""] = "".join(map(chr, range(32, 127)))
            monkeypatch.setattr(fonts, "has", lambda path, character: character in found[path])
            monkeypatch.setattr(fonts, "open_font", lambda path, size: path)
        find_font.cache_clear()

    yield install
    find_font.cache_clear()


def pixels(*args, **kwargs):
    return np.asarray(text(*args, **kwargs)).tolist()


def in_a_font(*strings):
    if not all(find_font(string) for string in strings):
        pytest.skip("no font of this machine has these characters")


@pytest.mark.parametrize("string", ["what color is it?", "".join(map(chr, range(33, 127))), "g", ""])
def test_ascii_is_drawn_by_pillows_font_and_no_other_is_looked_for(string, monkeypatch):
    monkeypatch.setattr(fonts, "font_files", None)
    font = ImageFont.load_default(11)
    image = Image.new("RGB", (max(1, int(font.getlength(string) + 1)), 13), "white")
    ImageDraw.Draw(image).text((0, 0), string, (0, 96, 0), font)
    assert pixels(string, (0, 96, 0)) == np.asarray(image).tolist()
    assert pixels(string + "!", (0, 96, 0)) != np.asarray(image).tolist()


@pytest.mark.parametrize("limit", [1, 9, 40, 100, 192])
def test_ascii_is_cut_as_late_as_its_dots_allow(limit):
    font, string = ImageFont.load_default(11), "what is left of the red circle, and what is right of it?"
    fitting = [n for n in range(len(string)) if font.getlength(string[:n] + "...") <= limit]
    assert pixels(string, limit=limit) == pixels(string[:max(fitting, default=0)] + "...")
    assert pixels(string, limit=1000) == pixels(string)


@pytest.mark.parametrize("string, shown", [
    ("\u6f22", "U+6F22"), ("\U0001f642", "U+1F642"), ("a\u6f22 b", "aU+6F22 b"),
    (MARKED, "U+0078U+0301"), ("\x01", "U+0001"), ("\ud800", "U+D800")], ids=ascii)
def test_what_no_font_has_is_its_code_point(string, shown, system):
    system([])
    assert pixels(string) == pixels(shown) != pixels("U+6F23")


def test_what_a_font_of_the_system_has_is_not_its_code_point(system):
    in_a_font("\u0416", MARKED)
    letter, marked, unassigned = pixels("\u0416"), pixels(MARKED), pixels("\u0378")
    assert unassigned == pixels("U+0378")  # whatever the fonts are
    assert letter not in (pixels("U+0416"), pixels("\u0378")) and marked not in (pixels("x"), pixels("U+0078U+0301"))
    system([])
    assert pixels("\u0416") == pixels("U+0416")


def test_files_that_are_no_fonts_are_passed_over(system, tmp_path):
    in_a_font("\u0416")
    good, bad = fonts.font_files(), tmp_path / "sans.ttf"
    bad.write_bytes(b"no font")
    shown = pixels("\u0416")
    system([str(bad)])
    assert pixels("\u0416") == pixels("U+0416") and pixels("\u200d") in (pixels("U+200D"), pixels(""))
    system([str(bad), *good])
    assert pixels("\u0416") == shown and pixels("\u0416\u200d") == shown


def test_fonts_of_all_folders_are_found_and_plain_sans_ones_first(tmp_path, monkeypatch):
    wanted = ["sub/OpenSans.ttf", "user/NotoSans.TTC", "sub/Anton.otf", "sub/OpenSans-BoldItalic.ttf", "user/FreeMono.ttf"]
    for name in [*wanted, "sub/LastResort.otf", "sub/OpenSans.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # is Windows' home
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "sub"))
    monkeypatch.setattr(fonts, "FOLDERS", ("~/user", "${LOCALAPPDATA}", "${NOT_SET}/sub", "/nowhere"))
    assert [Path(path) for path in fonts.font_files.__wrapped__()] == [tmp_path / name for name in wanted]


def test_a_line_has_one_font_where_one_has_all_of_it(system):
    system({"first": "\u0416", "all": "\u0416\u6f22 abc", "later": "\u0416\u6f22"})
    assert find_font("a \u0416\u6f22") == "all" and runs("a \u0416\u6f22") == ["a \u0416\u6f22"]
    assert find_font("\u0416") == "first" and find_font("\u0416?") is None
    assert runs("\u0416\u6f22?") == ["\u0416\u6f22", "?"]


def test_a_mark_is_never_parted_from_its_letter(system):
    assert clusters(f"a{MARKED}\u0302 \u2764\ufe0f\U0001f468\u200db") == [
        "a", MARKED + "\u0302", " ", "\u2764\ufe0f", "\U0001f468\u200d", "b"]
    system({"mark": "\u6f22\u0301", "both": MARKED})
    assert runs(f"\u6f22{MARKED}") == ["\u6f22", MARKED]
    assert runs("\u6f22xy") == ["\u6f22", "xy"] and runs("\u6f22\u0301") == ["\u6f22\u0301"]


def test_what_is_cut_ends_with_a_whole_letter():
    in_a_font(MARKED)
    whole = [pixels(MARKED * n + "...") for n in range(20)]
    for limit in range(20, 60):
        assert pixels(MARKED * 30, limit=limit) in whole
    assert pixels(MARKED * 3 + "x...") not in whole


@pytest.mark.parametrize("question", ["\u8fd9\u4e2a\u5706\u662f\u4ec0\u4e48\u989c\u8272" * 5, "what color is the thing? " * 5])
def test_a_question_under_a_picture_fills_two_lines(question, monkeypatch):
    lines = []
    monkeypatch.setattr(pictures, "text", lambda string, *_, **__: lines.append(string) or text(string))
    pictures.draw_card(None, question, "a", "a")
    assert all(25 <= columns_of(line) <= 34 for line in lines[:2])
    assert question.replace(" ", "").startswith("".join(lines[:2]).replace(" ", ""))
