"""The page shows what Python computed: every cell, weight and mean; a browser shows the page."""
import base64
import json
import random
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import draw
from conftest import SAFE, random_roles, tiny_model
from draw import word_batch
from engine import page as pages
from engine.attention import attention_maps, movement, token_labels
from engine.cells import REASONS, RULES, SEEN, SEGMENTS, STATES, UNLOCKED, mask_reasons
from engine.page import LARGEST, TEMPLATE, fill, make_page
from engine.views import View, pack_legend, segments, token_names, token_places
from helpers import refused
from nanoaki import ANSWER, IMAGE, MASKS, PAD, PRESETS, PROMPT, NanoAKI, Tokenizer, make_mask

WIDTHS = (360, 800, 1400)
NASTY = "is <script>alert(1)</script> & <!-- \u2028 </script><b>here</b>?"


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))


@pytest.fixture(scope="module")
def model():
    return tiny_model(torch.float32, Tokenizer([]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, picture):
    """With model.pt, whose vocabulary is bytes; nano.pt, as large as the default; and p.png."""
    folder = tmp_path_factory.mktemp("pages")
    model.save(folder / "model.pt")
    torch.manual_seed(0)
    NanoAKI(PRESETS["nano"], Tokenizer([])).save(folder / "nano.pt")
    picture.save(folder / "p.png")
    return folder


def write(folder, name, *argv):
    """(path, data) of the page that a command line writes."""
    argv = [str(folder / a) if a in ("model.pt", "nano.pt", "p.png") else a for a in argv]
    draw.main([*argv, "--out", str(folder / name)])
    return folder / name, read((folder / name).read_text(encoding="utf-8"))


def read(text: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', text)
    return json.loads(found)


def asked(model: str, *questions: str) -> list[str]:
    return ["--model", model, "--image", "p.png", "--ask", *questions]


# What is in the file ------------------------------------------------------------------------------


def shown_reasons(view: dict) -> torch.Tensor:
    """int64 (T, T): which reason the page has for each cell."""
    rows = []
    for row in view["cells"]:
        assert [start for _, start, _ in row] == [0] + [stop for *_, stop in row[:-1]]
        rows.append([n for n, start, stop in row for _ in range(start, stop)])
    return torch.tensor(rows)


def shown_weights(data: dict, view: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights that a page shows, (layers, heads, T, T), and how far each may be off."""
    shape = (len(data["layers"]), len(data["heads"]), len(view["labels"]), len(view["labels"]))
    parts = np.frombuffer(base64.b64decode(view["bytes"]), np.uint8).reshape(shape)
    scales = torch.tensor(view["scales"]).view(*shape[:3], 1)
    return torch.tensor(parts / 255) * scales, (scales * 0.5001 / 255).expand(shape)


def hold_against(data: dict, model, picture) -> None:
    """Every cell, weight, mean and probability of a page of one picture is the model's."""
    for question, views in zip(data["questions"], data["views"]):
        for view in views:
            maps = attention_maps(model, [picture], question, view["mask"])
            reasons = shown_reasons(view)
            assert torch.equal(reasons, mask_reasons(view["mask"], maps.roles))
            is_open = torch.tensor([reason["open"] for reason in data["reasons"]])
            assert torch.equal(is_open[reasons], make_mask(view["mask"], maps.roles[None])[0])
            weights = maps.weights.double()
            weights = torch.cat([weights.mean(0, keepdim=True), weights])
            weights = torch.cat([weights.mean(1, keepdim=True), weights], 1)
            weights = torch.stack([weights[0 if n == "mean" else n] for n in data["layers"]])
            weights = torch.stack([weights[:, 0 if n == "mean" else n] for n in data["heads"]], 1)
            shown, error = shown_weights(data, view)
            assert ((shown - weights).abs() <= error + 1e-7).all()
            assert error.max() <= 0.002 * weights.max()  # as the page says
            chances = maps.logits.softmax(-1)
            for place, five in zip(chances, view["likeliest"], strict=True):
                shares = [share for _, share in five]
                assert shares == pytest.approx(place.topk(5).values.tolist(), rel=1e-3)
                assert five[0][0] == token_labels(model.tokenizer, [int(place.argmax())])[0]
            given = len(view["labels"]) - len(view["likeliest"]) + 1
            assert view["first"] == given - 1 and maps.roles[view["first"]] == PROMPT


@pytest.mark.parametrize("more", [
    [], ["--masks", "prefix,image,leaky,causal,mma"], ["--layer", "2"],
    ["--layer", "2", "1", "--head", "1"]], ids=" ".join)
def test_every_cell_weight_mean_and_probability_is_the_models(folder, model, picture, more):
    _, data = write(folder, "a.html", *asked("model.pt", "what is left?", "and where?"), *more)
    hold_against(data, model, picture)


def test_one_changed_byte_cell_or_scale_is_found(folder, model, picture):
    path, data = write(folder, "a.html", *asked("model.pt", "what is left?"))
    rng, text = random.Random(0), path.read_text()
    view = data["views"][0][1]
    parts = bytearray(base64.b64decode(view["bytes"]))
    for _ in range(5):
        at = rng.randrange(len(parts))
        spoiled = parts[:at] + bytes([parts[at] ^ 2]) + parts[at + 1:]
        other = read(text)
        other["views"][0][1]["bytes"] = base64.b64encode(spoiled).decode()
        with pytest.raises(AssertionError):
            hold_against(other, model, picture)

    def move_a_cell(view):
        view["cells"][5][0][2] += 1
        view["cells"][5][1][1] += 1

    def change_a_scale(view):
        view["scales"][3] *= 1.01

    def change_a_probability(view):
        view["likeliest"][0][4][1] += 0.01

    for spoil in (move_a_cell, change_a_scale, change_a_probability):
        other = read(text)
        spoil(other["views"][0][1])
        with pytest.raises(AssertionError):
            hold_against(other, model, picture)
    hold_against(read(text), model, picture)


@pytest.mark.parametrize("masks", ["mma", "causal", "causal,mma", "image,causal",
                                   "causal,mma,prefix,image,leaky"])
def test_what_the_tour_says_is_true(folder, masks):
    question = "before <image> and afterwards <image>"
    _, data = write(folder, "a.html", "--ask", question, "--answer", "no", "--masks", masks)
    (roles,), (labels,) = word_batch([question], ["no"], 16)
    opening, sequence, rules, readers, pinned = data["tour"]
    shown = data["masks"][data["start"]]
    told = data["masks"] if len(data["masks"]) == 2 else [shown]
    said = [mask for mask in MASKS if f"nder {mask} {RULES[mask]}" in rules["say"]]
    assert said == sorted(told, key=[*MASKS].index)
    assert ("orange" in rules["say"]) == (told != ["causal"])
    assert labels[readers["at"]] == "afterwards" and readers["turned"]
    assert roles[rules["at"]] == IMAGE
    for mask in data["masks"]:
        reads = make_mask(mask, roles[None])[0, roles == IMAGE, readers["at"]]
        assert f" {int(reads.sum())} under {mask}" in readers["say"]
    assert not opening["say"] and opening["at"] == readers["at"] and opening["turned"]
    assert (pinned["at"], pinned["other"]) == (rules["at"], readers["at"])
    assert labels[sequence["at"]] == "<answer>" and "after the mark <answer>" in sequence["say"]


def test_a_page_opens_with_a_word_that_visual_tokens_read_or_with_what_the_answer_is_made_of(
        folder):
    for question, word in [("is the triangle left?", "triangle"), ("<image> a", "a"),
                           ("triangle <image> where", "where"),
                           ("the triangle <image>", "triangle")]:
        for masks in ("mma", "causal,mma"):
            _, data = write(folder, "a.html", "--ask", question, "--masks", masks)
            opening, labels = data["tour"][0], data["views"][0][0]["labels"]
            assert labels[opening["at"]].strip() == word and opening["turned"]
    for masks in ("causal", "causal,image"):  # no visual token reads a word: the control
        _, data = write(folder, "a.html", "--ask", "is the triangle left?", "--masks", masks)
        opening, labels = data["tour"][0], data["views"][0][0]["labels"]
        assert labels[opening["at"]] == " <answer>" and not opening["turned"]
    said = ["--history", "which one of them?", "red"]
    _, data = write(folder, "a.html", "--ask", "where?", "--masks", "mma", *said)
    assert data["views"][0][0]["labels"][data["tour"][0]["at"]] == " where?"


def test_the_line_about_each_mask_and_the_legend_are_true():
    (roles,), _ = word_batch(["before <image> and <image><image>"], ["no"], 3)
    kinds = {"visual tokens": roles == IMAGE, "image and prompt": roles != ANSWER,
             "each token": roles >= IMAGE}
    for name, rule in RULES.items():
        (opened,) = make_mask(name, roles[None]) & ~make_mask("causal", roles[None])
        reader = next(kind for kind in kinds if rule.startswith(kind))
        assert not opened[~kinds[reader]].any() and opened.any() == (name != "causal")
        assert opened[:, roles == PROMPT].any() == ("prompt" in rule)
        assert opened[:, roles == ANSWER].any() == ("answer" in rule)
        assert opened[:, roles == IMAGE].any() == (name in ("prefix", "image"))
        legend = pack_legend([[View(name, roles, [])]])
        assert any(line["state"] == "unlocked" for line in legend) == (name != "causal")
        assert not any(line["state"] == "padding" for line in legend)
    padded = torch.cat([roles, torch.tensor([PAD])])
    assert {"state": "padding", "name": "padding"} in pack_legend([[View("mma", padded, [])]])


@pytest.mark.parametrize("name", MASKS)
def test_the_reason_of_each_cell_is_true(name):
    reasons, unlocked = list(REASONS.items()), 0
    for roles in random_roles(15, seed=2):
        mask, found = make_mask(name, roles[None])[0], mask_reasons(name, roles)
        past = make_mask("causal", roles[None])[0]
        for q in range(len(roles)):
            for k in range(len(roles)):
                key, (state, is_open, sentence) = reasons[found[q, k]]
                assert is_open == mask[q, k] == (" may not " not in sentence)
                assert (state == UNLOCKED) == (is_open and not past[q, k])
                assert ("stands before" in sentence) == (bool(past[q, k]) and q != k)
                assert ("itself" in sentence and is_open) == (q == k)
                assert ("padding" in sentence) == (q != k and PAD in (roles[q], roles[k]))
                assert ("later" in sentence) == (not is_open and PAD not in (roles[q], roles[k]))
                if state == UNLOCKED:
                    unlocked += 1
                    assert key == ("mma" if name == "leaky" and roles[k] == PROMPT else name)
    assert (unlocked > 0) == (name != "causal")


def test_the_template_has_no_rule_of_a_mask_and_needs_nothing_else():
    text = TEMPLATE.read_text(encoding="utf-8")
    assert text.count(pages.PLACE) == 1
    assert len(text.splitlines()) <= 350 and max(map(len, text.splitlines())) <= 120
    script = text.split("<script>")[1]
    assert not re.search(r"\b(causal|mma|prefix|leaky|PROMPT|ANSWER)\b", script)
    assert not re.search(r"\b[qk]\s*[<>]=?\s*[qk]\b", script)
    assert re.search(r"\b[qk]\s*[<>]=?\s*[qk]\b", "k <= q")  # the control
    assert not re.search(r"https?:|src=|href=|innerHTML|@import|url\((?!\$)", text)
    assert "default-src 'none'" in text


def test_the_page_has_the_colours_of_the_pictures():
    light = TEMPLATE.read_text(encoding="utf-8").split("@media")[0]
    for name, color, *_ in [*STATES.values(), *SEGMENTS.values()]:
        assert f"--{name.split()[0]}: rgb({', '.join(map(str, color))});" in light


def test_text_can_never_become_markup(folder):
    plain, _ = write(folder, "plain.html", "--ask", "is it?", "--answer", "no")
    argv = ["--ask", NASTY, "--answer", NASTY, "--history", NASTY, NASTY, "--system", NASTY]
    path, data = write(folder, "nasty.html", *argv)
    tags = [len(re.findall("<[!/a-z]", p.read_text(encoding="utf-8"))) for p in (plain, path)]
    assert tags[0] == tags[1] and data["questions"] == [NASTY]
    labels = [label.strip() for label in data["views"][0][0]["labels"] if label != " image"]
    assert labels.count("<script>alert(1)</script>") == 5
    _, data = write(folder, "nasty.html", *asked("model.pt", "<script></script>"))
    assert "".join(data["views"][0][0]["labels"][4:21]) == "<script></script>"


def test_a_page_that_is_too_large_averages_heads_and_then_is_refused(folder, model, picture, capsys,
                                                                     monkeypatch):
    path, data = write(folder, "a.html", *asked("model.pt", "what?"))
    size = path.stat().st_size
    assert data["heads"] == ["mean", 1, 2] and data["layers"] == ["mean", 1, 2]
    monkeypatch.setattr(pages, "LARGEST", size - 1)
    path, data = write(folder, "b.html", *asked("model.pt", "what?"))
    assert data["heads"] == ["mean"] and path.stat().st_size < size
    assert any("mean of the heads" in note for note in data["notes"])
    hold_against(data, model, picture)
    monkeypatch.setattr(pages, "LARGEST", path.stat().st_size // 2)
    argv = asked(str(folder / "model.pt"), "what?")
    argv[3] = str(folder / "p.png")
    line = refused(capsys, draw.main, *argv, "--out", folder / "c.html")
    assert "--layer 1" in line and "--masks mma" in line and not (folder / "c.html").exists()
    line = refused(capsys, draw.main, "--ask", "a " * 300, "--out", folder / "c.html")
    assert "--masks mma" in line and "--layer" not in line


def test_a_page_of_the_default_models_size_is_small(folder):
    path, data = write(folder, "nano.html", *asked("nano.pt", "what is left of the red circle?"))
    assert len(data["views"][0][0]["labels"]) == 127  # it never ends its answer: the longest
    assert path.stat().st_size < 1_000_000 < LARGEST


def test_movement_is_that_of_the_states_after_each_layer(model, picture):
    two = ["what?", "a longer question"]
    images, tokens, roles = model.prompt([picture] * 2, two)
    with torch.no_grad():
        x, states = model.read(images, tokens, roles), []
        for block in model.decoder.blocks:
            x = block(x, make_mask("mma", roles)[:, None])
            states.append(x)
    moved = movement(model, [picture], two, "mma")
    assert moved.shape == (2, 4)
    for layer, x in zip(moved, states):
        a, b = x[0, :4], x[1, :4]
        assert torch.allclose(layer, 2 * (a - b).norm(dim=-1) / (a.norm(dim=-1) + b.norm(dim=-1)))


def test_movement_on_the_page_is_python_s_and_exactly_0_under_causal(folder, model, picture):
    two = ["what?", "a longer question"]
    _, data = write(folder, "a.html", *asked("model.pt", *two))
    assert data["masks"] == ["causal", "mma"] and data["start"] == 1
    for mask, moved in zip(data["masks"], data["moved"]):
        expected = movement(model, [picture], two, mask)
        assert torch.allclose(torch.tensor(moved["shares"]), expected, rtol=0.05)
        digits = [str(share).strip("0.").replace(".", "")
                  for part in moved["shares"] for share in part]
        assert max(map(len, digits)) <= 2
        assert ("exactly 0" in moved["title"]) == (mask == "causal") == bool((expected == 0).all())
    assert write(folder, "a.html", *asked("model.pt", "what?"))[1]["moved"] == []


def test_tokens_are_named_by_their_text_and_visual_tokens_by_their_place():
    roles, labels = word_batch(["see <image> and <image>", "what?"], ["a"], 3)
    names = token_names(roles[0].tolist(), labels[0], 3)
    assert names[:6] == ["see", *(f"visual token {i} of image 1" for i in (1, 2, 3)), "and",
                         "visual token 1 of image 2"]
    names = token_names(roles[1].tolist(), labels[1], 3)
    assert names[:4] == ["visual token 1", "visual token 2", "visual token 3", "what?"]
    assert names[-1] == "padding"
    assert token_places([PROMPT] + [IMAGE] * 6 + [PAD], 3) == ["", *(
        f" (row {row}, column {column})" for row, column in [(1, 1), (1, 2), (2, 1)] * 2), ""]
    blank = token_names([PROMPT] * 3, ["\n", " \n\n", "  "], 3)
    assert blank == ["a line break", "a line break", "a space"]
    parts = [(part["role"], part["start"], part["stop"], part["picture"])
             for part in segments([PROMPT] + [IMAGE] * 6 + [PROMPT, PAD], 3)]
    assert parts == [("prompt", 0, 1, None), ("image", 1, 4, 0), ("image", 4, 7, 1),
                     ("prompt", 7, 8, None), ("padding", 8, 9, None)]
    tokenizer = Tokenizer([(0xe7, 0xba)])
    ids = tokenizer.encode("\u7ea2a") + [299, tokenizer.answer, tokenizer.eos]
    assert token_labels(tokenizer, ids) == ["\u7ea2 1/2", "\u7ea2 2/2", "a", "<299>", " <answer>",
                                            " <eos>"]


def test_chats_are_asked_and_drawn_with_what_was_said_before(folder, model, picture):
    talk = ["--system", "Be brief.", "--history", "what?", "a dog"]
    _, data = write(folder, "chat.html", *asked("model.pt", "where?"), *talk)
    maps = attention_maps(model, [picture], "where?", history=[("what?", "a dog")],
                          system="Be brief.")
    labels = data["views"][0][1]["labels"]
    assert "".join(labels[4:]).startswith("Be brief.\nwhat? <answer>a dog <eos>where? <answer>")
    assert len(labels) == len(maps.roles)
    (roles,), (words,) = word_batch(["where?"], ["left"], 2, [("what?", "a dog")], "Be brief.")
    assert " ".join(words) == ("image image Be brief. what? <answer> a dog <eos> where? <answer> "
                               "left <eos>")
    assert roles.tolist() == [IMAGE] * 2 + [PROMPT] * 9 + [3, 3]
    draw.main(["--ask", "where?", *talk, "--out", str(folder / "chat.png")])


@pytest.mark.parametrize("argv, words", [
    (["--ask", "a", "--masks", "mma,mmm"], "'mmm' is none of causal"),
    (["--ask", "a", "--masks", "mma,causal,mma"], "--masks names one twice: mma, causal, mma"),
    (["--ask", "a", "--history", "b"], "--history: 1 texts"),
    (["--ask", "a", "--layer", "1"], "--layer needs --model"),
    ([*asked("model.pt", "a"), "--layer", "1", "1", "1"], "--layer names one twice: 1, 1, 1"),
    (asked("model.pt", "a", "b", "c"), "--ask: a model takes one or two questions, not 3"),
    ([*asked("model.pt", "a"), "--layer", "1", "3"], "layer must be 1 to 2"),
    ([*asked("model.pt", "a"), "--head", "0"], "head must be 1 to 2"),
    (asked("model.pt", "a" * 70), "64 positions"),
    (["--ask", "<image>" * 3, "--visual-tokens", "4096"], "12,289 tokens, and a page may have"),
    (["--ask", "a", "--out", "x"], "--out 'x': unknown file extension ''; .png is"),
    (["--ask", "a", "--out", ""], "--out '': unknown file extension"),
    (["--ask", "a", "--out", ".html"], "--out '.html': unknown file extension"),
    (["--ask", "a", "--out", "/nowhere/a.html"], "/nowhere/a.html cannot be written")], ids=str)
def test_nonsense_is_one_line_and_exit_code_2(folder, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(folder)
    if "--out" not in argv:
        argv = [*argv, "--out", "x.html"]
    assert words in refused(capsys, draw.main, *argv)
    assert not (folder / "x.html").exists()


def test_where_a_page_cannot_be_written_nothing_is_left_of_it(folder, capsys):
    (folder / "d.html").mkdir()
    line = refused(capsys, draw.main, "--ask", "a", "--out", folder / "d.html")
    assert "d.html cannot be written" in line and not (folder / "d.html.part").exists()


def test_only_what_is_written_is_said_to_be_what_cannot_be_written(folder, capsys, monkeypatch):
    monkeypatch.setattr(pages, "TEMPLATE", folder / "gone.html")
    line = refused(capsys, draw.main, "--ask", "a", "--out", folder / "x.html")
    assert "gone.html" in line and "cannot be written" not in line


def test_a_sequence_is_refused_by_its_length_before_it_is_packed(folder, capsys, monkeypatch):
    monkeypatch.setattr(pages, "LONGEST", 18)  # 16 visual tokens, a word and <answer>
    write(folder, "a.html", "--ask", "a")
    monkeypatch.setattr(pages, "make_tour", None)
    line = refused(capsys, draw.main, "--ask", "a b", "--out", folder / "b.html")
    assert "19 tokens" in line and "--visual-tokens" in line


# What a browser shows -----------------------------------------------------------------------------

WORDS = "what is left of the red circle? "
CASES = {
    "default model": asked("nano.pt", "what is left of it?"),
    "padded batch": ["--ask", "what color is it?", "where?", "--answer", "red"],
    "two pictures": ["--model", "model.pt", "--image", "p.png", "p.png",
                     "--ask", "<image> or <image>?"],
    "chat": ["--ask", "where?", "--history", "what is it?", "a dog", "--system", "Be brief.",
             "--masks", "causal,mma,leaky"],
    "400 tokens": ["--ask", WORDS * 5, "--answer", "a circle", "--visual-tokens", "361",
                   "--masks", "causal,mma"]}
TOKENS = "[...document.querySelectorAll('.panel:not([hidden]) button.token')]"
PRESSED = "[...document.querySelectorAll('nav [aria-pressed=true]')].map(b => b.textContent)"
CANVAS = "document.querySelector('.panel:not([hidden]) canvas')"


@pytest.fixture(scope="module")
def browser():
    if sys.platform == "win32":
        pytest.skip("a browser's pipe is at descriptors 3 and 4, which Windows has not")
    from browser import Browser, find_chromium
    path = find_chromium()
    if path is None:
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    browser = Browser(path)
    yield browser
    browser.close()


def load(browser, path, width=1200, dark=False, scale=1):
    """Open a page, without its tour: one mask, and what a token reads."""
    browser.open(path, width, 900, dark, scale)
    browser.run("(tour => tour.hidden || tour.lastElementChild.click())"
                "(document.querySelector('aside'))")
    for name, key in (("side by side", "b"), ("who reads it", "r")):
        if name in browser.run(PRESSED):
            browser.key(key)


def chosen(browser, selector: str) -> list[int]:
    return browser.run(f'{TOKENS}.flatMap((token, i) => token.matches("{selector}") ? [i] : [])')


def lit(browser) -> set[int]:
    return set(chosen(browser, ".open"))


def marked(browser, mark: str) -> list[int]:
    return chosen(browser, f".{mark}")


def pinned(browser) -> list[int]:
    return chosen(browser, "[aria-pressed=true]")


def heading(browser) -> str:
    return browser.run("document.querySelector('h1 .asked').textContent")


def sentence(browser) -> str:
    return browser.run("document.querySelector('.panel:not([hidden]) .sentence').textContent")


def middle(browser, script: str) -> tuple[float, float]:
    """Of an element, in the window."""
    return browser.run("(element => { element.scrollIntoView({ block: 'center' }); const box = "
                       "element.getBoundingClientRect(); return [box.left + box.width / 2, "
                       f"box.top + box.height / 2]; }})({script})")


def cell(browser, q: int, k: int, T: int) -> tuple[float, float]:
    """The middle of a cell of the grid, in the window."""
    left, top, side = browser.run(f"(canvas => {{ canvas.scrollIntoView({{ block: 'center' }}); "
                                  f"const box = canvas.getBoundingClientRect(); "
                                  f"return [box.left, box.top, box.width]; }})({CANVAS})")
    return left + 8 + (k + 0.5) * (side - 8) / T, top + 8 + (q + 0.5) * (side - 8) / T


def said(data: dict, view: dict, q: int, k: int) -> str:
    """Why a cell is open or closed, without the full stop."""
    sentence = data["reasons"][shown_reasons(view)[q, k]]["sentence"]
    q, k = (view["names"][i] + view["places"][i] for i in (q, k))
    return sentence.format(q=q, k=k)


def roles_of(view: dict) -> torch.Tensor:
    kinds = {name: role for role, (name, _) in SEGMENTS.items()}
    return torch.tensor([kinds[part["role"]] for part in view["segments"]
                         for _ in range(part["start"], part["stop"])])


def row(mask: torch.Tensor, i: int) -> set[int]:
    return set(mask[i].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("case", CASES)
def test_pointing_keys_and_pinning_light_what_the_mask_opens(folder, browser, case):
    path, data = write(folder, "case.html", *CASES[case])
    load(browser, path)
    views = data["views"][0]
    masks = [make_mask(view["mask"], roles_of(view)[None])[0] for view in views]
    mask, T = masks[data["start"]], len(views[data["start"]]["labels"])
    assert len(browser.run(f"{TOKENS}.map(() => 0)")) == T
    for i in sorted({0, 1, T // 3, T - 2, T - 1}):
        browser.mouse(*middle(browser, f"{TOKENS}[{i}]"))
        assert marked(browser, "at") == [i] and lit(browser) == row(mask, i)
        browser.key("r")
        assert lit(browser) == row(mask.T, i) and "is read by" in sentence(browser)
        browser.key("r")
    browser.key("ArrowLeft")
    assert marked(browser, "at") == [T - 2] and lit(browser) == row(mask, T - 2)
    browser.mouse(*middle(browser, f"{TOKENS}[1]"))
    browser.key("ArrowRight")
    assert marked(browser, "at") == [2] and lit(browser) == row(mask, 2)
    at = next(i for i, role in enumerate(roles_of(views[0]).tolist()) if role == IMAGE)
    browser.mouse(*middle(browser, f"{TOKENS}[{at}]"))
    browser.key("ArrowDown")
    below = at + data["side"]
    assert marked(browser, "at") == [below]
    browser.mouse(*middle(browser, f"{TOKENS}[{at}]"), click=True)
    assert pinned(browser) == [at]
    for click in (False, True):  # a second one, and why; a click holds it
        browser.mouse(*middle(browser, f"{TOKENS}[{T - 1}]"), click=click)
        assert marked(browser, "at") == pinned(browser) == [at]
        assert marked(browser, "other") == [T - 1] and lit(browser) == row(mask, at)
        assert sentence(browser).startswith(said(data, views[data["start"]], at, T - 1))
    browser.mouse(*middle(browser, f"{TOKENS}[{at}]"), click=True)  # on the first it lets go
    assert pinned(browser) == []
    browser.mouse(*middle(browser, f"{TOKENS}[{at}]"), click=True)
    assert pinned(browser) == [at] and marked(browser, "other") == []
    browser.key("Escape")
    browser.mouse(*middle(browser, f"{TOKENS}[2]"))
    assert marked(browser, "at") == [2] and pinned(browser) == []
    for n in range(1, len(masks) + 1):  # in turn, and round
        browser.key("m")
        shown = (data["start"] + n) % len(masks)
        title = browser.run("document.querySelector('.panel:not([hidden]) h2').firstChild.data")
        assert title == views[shown]["title"] and lit(browser) == row(masks[shown], 2)
    browser.key("b")
    sides = browser.run("[...document.querySelectorAll('.panel:not([hidden])')].map(panel => "
                        "[...panel.querySelectorAll('button.token')].flatMap((token, i) => "
                        "token.matches('.open') ? [i] : []))")
    assert [set(side) for side in sides] == [row(other, 2) for other in masks]
    assert browser.run("[...document.querySelectorAll('canvas')].every(grid => "
                       "grid.width === grid.clientWidth)")
    assert browser.errors == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}


def test_the_grid_says_of_each_cell_why_it_is_open_or_closed(folder, browser):
    path, data = write(folder, "case.html", *CASES["padded batch"])
    load(browser, path)
    for question, views in enumerate(data["views"]):
        view = views[data["start"]]
        T = len(view["names"])
        for q, k in [(0, 0), (5, T - 8), (3, 1), (T - 8, 3), (T - 1, 2), (2, T - 1), (T - 1, T - 1),
                     (T - 4, T - 3)]:
            browser.mouse(*cell(browser, q, k, T))
            assert sentence(browser) == said(data, view, q, k) + "."
            assert marked(browser, "at") == [q]
        browser.key("q")
    assert heading(browser) == data["questions"][0]


@pytest.mark.parametrize("turned", [False, True])
def test_while_a_token_is_pinned_the_grid_still_says_it_of_the_cell_pointed_at(folder, browser,
                                                                               turned):
    path, data = write(folder, "case.html", *CASES["chat"])
    load(browser, path)
    view = data["views"][0][data["start"]]
    T = len(view["names"])
    browser.mouse(*middle(browser, f"{TOKENS}[7]"), click=True)
    if turned:
        browser.key("r")
    for q, k in [(3, 1), (5, T - 2), (7, 2), (9, 7), (T - 1, 4), (2, 2)]:
        browser.mouse(*cell(browser, q, k, T))
        at, other = (k, q) if turned else (q, k)
        assert sentence(browser) == said(data, view, q, k) + "."
        assert marked(browser, "at") == [at] and marked(browser, "other") == [other] * (q != k)
        assert pinned(browser) == [7]
    browser.mouse(*middle(browser, "document.querySelector('h1')"))
    assert marked(browser, "at") == [7] and marked(browser, "other") == []
    browser.mouse(*cell(browser, 9, 4, T), click=True)  # now the cell is pinned
    browser.mouse(*middle(browser, "document.querySelector('h1')"))
    assert sentence(browser) == said(data, view, 9, 4) + "."
    assert pinned(browser) == [4 if turned else 9]


@pytest.mark.parametrize("case, scale", [("default model", 3), ("400 tokens", 3),
                                         ("padded batch", 1)])
def test_the_cross_hair_leaves_the_row_that_it_marks_to_be_seen(folder, browser, case, scale):
    path, data = write(folder, "case.html", *CASES[case])
    load(browser, path, 360, scale=scale)
    view = data["views"][0][data["start"]]
    T, q = len(view["names"]), 15
    browser.mouse(*middle(browser, f"{TOKENS}[{q}]"))
    width, pixels = browser.run(f"(grid => [grid.width, [...grid.getContext('2d').getImageData("
                                f"12 * {scale}, 0, 1, grid.height).data]])({CANVAS})")
    column = [tuple(pixels[i:i + 3]) for i in range(0, len(pixels), 4)]  # a key that q sees
    start, stop = (round(8 * scale + i * (width - 8 * scale) / T) for i in (q, q + 1))
    seen, line = STATES[SEEN].color, 2 * scale
    assert set(column[start:stop]) == {seen}
    for beside in (column[start - line:start], column[stop:stop + line]):
        assert set(beside) == {(31, 35, 40)}  # --ink
    assert set(column[start - 2 * line:start - line]) == {(255, 255, 255)}


def touch(browser, x: float, y: float, *moves: tuple[float, float]) -> None:
    """A finger goes down and, by way of moves, up."""
    for kind, at in (("touchStart", (x, y)), *(("touchMove", move) for move in moves)):
        browser.send("Input.dispatchTouchEvent", type=kind, touchPoints=[dict(x=at[0], y=at[1])])
    browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.run("new Promise(done => setTimeout(done, 100))")


def test_a_finger_pins_a_token_then_taps_another_and_can_scroll_over_the_grid(folder, browser):
    path, data = write(folder, "case.html", *CASES["padded batch"])
    load(browser, path, 360)
    browser.send("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        view = data["views"][0][data["start"]]
        T = len(view["names"])
        touch(browser, *middle(browser, f"{TOKENS}[5]"))
        assert marked(browser, "at") == pinned(browser) == [5] and marked(browser, "other") == []
        touch(browser, *middle(browser, f"{TOKENS}[{T - 6}]"))
        assert pinned(browser) == [5] and sentence(browser) == said(data, view, 5, T - 6) + "."
        touch(browser, *middle(browser, f"{TOKENS}[5]"))
        assert pinned(browser) == [] and marked(browser, "other") == []
        x, y = cell(browser, T // 2, T // 2, T)
        touch(browser, x, y, *((x, y - 10 * n) for n in range(1, 12)))
        assert marked(browser, "at") == [5]
        touch(browser, *cell(browser, 9, 3, T))  # the control: a tap there is one
        assert marked(browser, "at") == [9] and marked(browser, "other") == [3]
    finally:
        browser.send("Emulation.setTouchEmulationEnabled", enabled=False)


def test_a_shorter_question_keeps_a_token_that_can_be_reached(folder, browser):
    path, views = folder / "case.html", []
    for last in (11, 7):
        roles = torch.tensor([IMAGE] * 4 + [PROMPT] * (last - 3))
        views.append([View("mma", roles, [str(i) for i in range(last + 1)])])
    path.write_text(make_page(path, views, ["long", "short"], 4, "mma", ""), encoding="utf-8")
    load(browser, path)
    for other, last in ((None, 7), (10, 3)):  # the token is not there, or only the second one
        at = 11 if other is None else 3
        browser.mouse(*middle(browser, f"{TOKENS}[{at}]"), click=True)
        if other is not None:
            browser.mouse(*middle(browser, f"{TOKENS}[{other}]"))
        assert chosen(browser, "[tabindex='0']") == [at]
        browser.key("q")
        assert chosen(browser, "[tabindex='0']") == marked(browser, "at") == [last]
        assert pinned(browser) == [] and " reads " in sentence(browser)
        browser.key("q")


def test_how_far_a_token_moves_is_said_of_visual_tokens_and_of_no_word(folder, browser):
    path, data = write(folder, "case.html", *asked("model.pt", "what?", "where is it?"))
    load(browser, path)
    shares = data["moved"][data["start"]]["shares"]
    labels = "[...document.querySelectorAll('.panel:not([hidden]) .moved small')].map(label => " \
             "label.textContent.split('\\n'))"
    for i, expected in [(2, [layer[2] for layer in shares]), (5, []),
                        (0, [layer[0] for layer in shares])]:
        browser.mouse(*middle(browser, f"{TOKENS}[{i}]"))
        names, lengths = zip(*browser.run(labels))
        assert names == ("layer 1", "layer 2")
        assert [length for length in lengths if length] == [f"by {length:g}" for length in expected]


def test_queries_are_a_grid_beside_their_picture_and_have_no_place_in_it(folder, browser):
    said = "5 learned queries read a picture and have no place in it: each cell is one of them."
    tiny_model(torch.float32, Tokenizer([]), queries=5).save(folder / "queries.pt")
    shown = ("[...document.querySelectorAll('.panel:not([hidden]) .strip .picture')].map(box => "
             "[box.children.length, box.style.backgroundImage.slice(0, 9)])")
    for model, boxes in ((str(folder / "queries.pt"), [[0, 'url("data'], [5, ""]]),
                         ("model.pt", [[4, 'url("data']])):  # the control
        path, data = write(folder, "case.html", *asked(model, "what?", "where?"))
        places = {place for row in data["views"] for view in row for place in view["places"]}
        assert (places == {""}) == (len(boxes) == 2) == (said in data["notes"])
        load(browser, path)
        assert browser.run(shown) == boxes
        browser.mouse(*middle(browser, f"{TOKENS}[0]"))
        assert ("(row 1" in sentence(browser)) == (len(boxes) == 1)


def test_layers_heads_and_weights_are_python_s(folder, browser):
    path, data = write(folder, "case.html", *CASES["default model"])
    load(browser, path)
    view = data["views"][0][data["start"]]
    weights, _ = shown_weights(data, view)
    T, at = len(view["labels"]), 40
    browser.mouse(*middle(browser, f"{TOKENS}[{at}]"))
    browser.key("w")
    for layer, head in [(0, 0), (1, 0), (2, 0), (2, 1), (2, 3), (4, 3)]:
        for name, value in (("layer", layer), ("head", head)):
            now = int(browser.run(f"document.getElementById('{name}').value"))
            for _ in range(abs(value - now)):
                browser.key((name[0] if value > now else name[0].upper()))
            said = browser.run(f"document.querySelector('#{name} + output').value")
            assert said == str(data[f"{name}s"][value])
        shown = browser.run(f"{TOKENS}.map(token => [token.dataset.weight, "
                            "token.style.getPropertyValue('--share')])")
        expected = weights[layer, head, at]
        for (said, share), weight in zip(shown, expected.tolist()):
            assert float(share) == pytest.approx(weight / float(expected.max()), abs=1e-6)
            if said and said[0] != "<":
                error = 0.501 if weight > 0.09 else 0.0501
                assert float(said[:-1]) == pytest.approx(100 * weight, abs=error)
    browser.key("r")
    place = "document.querySelectorAll('.panel:not([hidden]) .likeliest button')[2]"
    browser.mouse(*middle(browser, place), click=True)
    assert marked(browser, "at") == [view["first"] + 2] and " reads " in sentence(browser)
    five = browser.run(f"{place}.textContent")
    assert all(label.strip() in five for label, _ in view["likeliest"][2])
    browser.key("H")
    browser.run("(slider => { slider.value = 0; slider.oninput(); })"
                "(document.getElementById('layer'))")
    assert layer_shown(browser) == "mean"
    assert T == len(shown)


def layer_shown(browser, after: int = 0) -> str:
    return browser.run("new Promise(done => setTimeout(() => done("
                       f"document.querySelector('#layer + output').value), {after}))")


def test_it_plays_the_layers_to_their_end_and_stops_where_it_is_stopped(folder, browser):
    path, data = write(folder, "case.html", *asked("model.pt", "what?"))
    load(browser, path)
    plays = "[...document.querySelectorAll('nav button')].at(-1).ariaPressed"
    browser.run("(slow => { setInterval = (act, pause) => slow(act, pause / 3); })(setInterval)")
    for key in ("p", "?"):  # the tour stops it, too
        browser.key("p")
        assert layer_shown(browser) == "mean" and browser.run(plays) == "true"
        assert layer_shown(browser, 450) == "1"
        browser.key(key)
        assert browser.run(plays) == "false"
        assert layer_shown(browser) == layer_shown(browser, 400) == "1"
    browser.key("Escape")
    browser.key("p")
    assert layer_shown(browser, 1200) == "mean" and browser.run(plays) == "false"


def test_the_page_shows_the_cells_that_it_is_given_whatever_they_are(folder, browser):
    path, data = write(folder, "case.html", "--ask", "what is it?", "--masks", "mma",
                       "--visual-tokens", "4")
    rng, view = random.Random(0), data["views"][0][0]
    T = len(view["labels"])
    given = [[rng.randrange(len(data["reasons"])) for _ in range(T)] for _ in range(T)]
    view["cells"] = [[(n, k, k + 1) for k, n in enumerate(line)] for line in given]
    path.write_text(fill(json.dumps(data)), encoding="utf-8")
    load(browser, path)
    for i in range(T):
        browser.mouse(*middle(browser, f"{TOKENS}[{i}]"))
        assert lit(browser) == {k for k in range(T) if data["reasons"][given[i][k]]["open"]}


def test_a_first_visit_is_led_through_and_the_next_is_not(folder, browser):
    path, data = write(folder, "case.html", *CASES["default model"])
    browser.open(path)
    browser.run("localStorage.clear()")
    browser.open(path)
    opening, *tour = data["tour"]
    said, places = [], [0, len(data["views"][0][0]["labels"])]
    for stop in tour:
        said.append(browser.run("document.querySelector('aside p').textContent"))
        assert marked(browser, "at") == [stop["at"] + place for place in places]
        assert ("who reads it" in browser.run(PRESSED)) == stop["turned"]
        browser.run("document.getElementById('next').click()")
    assert said == [stop["say"] for stop in tour] and len(said) == 4
    assert all(text.count(".") == 1 for text in said)  # sentences
    hidden = "document.querySelector('aside').hidden"
    for _ in range(2):  # at its end, and at the next visit
        assert browser.run(hidden)
        assert marked(browser, "at") == [opening["at"] + place for place in places]
        assert {"side by side", "who reads it"} <= set(browser.run(PRESSED))
        browser.open(path)
    for again in ("key", "button"):
        if again == "key":
            browser.key("?")
        else:
            browser.mouse(*middle(browser, "document.querySelector('p button')"), click=True)
        assert not browser.run(hidden)
        browser.key("Escape")
    path, data = write(folder, "two.html", "--ask", "where is the largest of them?", "where?",
                       "--masks", "causal,mma")
    load(browser, path)
    browser.key("q")  # it is led through the first question
    browser.key("?")
    for stop in data["tour"][1:]:
        assert marked(browser, "at")[0] == stop["at"]
        browser.run("document.getElementById('next').click()")
    assert browser.errors == [] and heading(browser) == data["questions"][0]


def test_a_tour_that_is_left_leaves_nothing_behind_but_what_the_visitor_pinned(folder, browser):
    path, data = write(folder, "case.html", *CASES["default model"])
    following = "document.getElementById('next').click()"
    load(browser, path)
    browser.open(path)
    plain = browser.run(PRESSED)
    for stops in range(1, 5):
        browser.key("?")
        for _ in range(stops - 1):
            browser.run(following)
        assert (browser.run(PRESSED) == plain) == (stops == 3)
        browser.key("Escape")
        assert browser.run(PRESSED) == plain and pinned(browser) == []
    browser.key("b")
    browser.mouse(*middle(browser, f"{TOKENS}[20]"), click=True)
    browser.key("?")
    assert pinned(browser) == []
    browser.run(following)
    browser.key("Escape")  # it was pinned before
    browser.key("b")
    assert pinned(browser) == marked(browser, "at") == [20]
    browser.key("Escape")
    browser.key("?")
    browser.mouse(*middle(browser, f"{TOKENS}[25]"), click=True)
    browser.run("document.querySelector('aside').lastElementChild.click()")  # and here meanwhile
    browser.key("b")
    assert pinned(browser) == marked(browser, "at") == [25]


def test_text_is_text_and_runs_from_the_right_where_it_is_read_so(folder, browser):
    path, _ = write(folder, "case.html", "--ask", NASTY, "\u0645\u0627 \u0647\u0648 \u061f",
                    "--masks", "mma")
    load(browser, path)
    assert heading(browser) == NASTY
    assert browser.run("document.scripts.length") == 2 and browser.errors == []
    browser.key("q")
    lefts = browser.run("[...document.querySelectorAll('.prompt .token')].map(token => "
                        "token.getBoundingClientRect().left)")
    assert lefts == sorted(lefts, reverse=True)
    browser.mouse(*middle(browser, "document.querySelector('.prompt .token')"))
    first = marked(browser, "at")[0]
    browser.key("ArrowLeft")
    assert marked(browser, "at") == [first + 1]


WALK = """((keys, steps = 9) => {  // where parts of the page stand while one walks through it
  const press = key =>
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const parts = ["nav", ".panel:not([hidden]) .strip", ".panel:not([hidden]) canvas", "#notes"];
  const places = new Set();
  const look = (all = parts) => places.add(all.map(part => {
    const box = document.querySelector(part).getBoundingClientRect();
    return part + [box.left, box.top + scrollY, box.width].map(Math.round);
  }).join());
  const walk = (key, n) => { for (let i = 0; i < n; i++) { press(key); look(); } };
  look();
  for (const key of ["r", "w", "l", "h", "r", "p", "p"]) {
    press(key);
    walk("ArrowDown", steps);
    walk("ArrowUp", steps - 2);
  }
  document.querySelector(".panel:not([hidden]) button.token").click();
  walk("ArrowDown", 2 * steps);
  press("Escape");
  const found = [[...places]];
  for (const key of keys) {  // what they show has another length
    places.clear();
    for (let i = 0; i < 6; i++) { press(key); look(parts.slice(0, 2)); }
    found.push([...places]);
  }
  return found;
})"""


@pytest.mark.parametrize("argv", [
    asked("nano.pt", "what is left of it, and what is above it on the right?", "where?"),
    ["--ask", "<image> or <image>?", "--masks", "causal,mma,prefix,image,leaky"]],
    ids=["two questions", "five masks"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_jumps_or_sticks_out(folder, browser, width, argv):
    path, _ = write(folder, "case.html", *argv)
    load(browser, path, width)
    for keys in (["m", "q"], ["q"]):  # m shows one mask alone
        for places in browser.run(f"{WALK}({keys})"):
            assert len(places) == 1, (keys, places)
        assert browser.run("document.documentElement.scrollWidth") == width
        browser.key("b")
    browser.run("document.head.append(document.createElement('style'))")
    controls = [".room { display: none; } .sentence { width: 8rem; }"]  # by steps, and by a key
    if "where?" in argv:
        controls.append("h1 { width: 8rem; } h1 :not(.asked) { display: none; }")
    else:
        controls.append("h2 small { min-height: 0 !important; width: 8rem; }")
    for n, rule in enumerate(controls):
        browser.run(f"document.head.lastChild.textContent = '{rule}'")
        steps, *turns = browser.run(f"{WALK}(['m', 'q'], 3)")
        assert max(len(places) for places in (turns if n else [steps])) > 1, rule
    assert browser.errors == []


def test_everything_has_a_name_and_focus_can_be_seen(folder, browser):
    path, _ = write(folder, "case.html", *CASES["two pictures"])
    load(browser, path)
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    nameless = [node for node in nodes if not node.get("ignored")
                and node["role"]["value"] in ("button", "slider", "img", "group", "navigation")
                and not node.get("name", {}).get("value")]
    assert nameless == [] and sum(node["role"]["value"] == "button" for node in nodes) > 10
    browser.key("ArrowRight")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_what_is_read_is_said_to_who_sees_no_light(folder, browser):
    path, data = write(folder, "case.html", *CASES["default model"])
    load(browser, path)
    view = data["views"][0][data["start"]]
    weights, T = shown_weights(data, view)[0][0, 0], len(view["names"])
    mask = make_mask(view["mask"], roles_of(view)[None])[0]

    def names() -> list[str]:
        nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
        found = [node["name"]["value"] for node in nodes
                 if not node.get("ignored") and node["role"]["value"] == "button"]
        start = next(n for n, name in enumerate(found) if name.startswith("visual token 1 ("))
        return found[start:start + T]

    for key, i, state in (("", 20, "read"), ("r", T - 9, "reading it")):
        browser.key(key or "Escape")
        browser.mouse(*middle(browser, f"{TOKENS}[{i}]"))
        opened, parts = (mask.T[i], weights.T[i]) if key else (mask[i], weights[i])
        called = map("".join, zip(view["names"], view["places"]))
        for name, said, is_open, weight in zip(called, names(), opened, parts.tolist()):
            if is_open:
                start, _, share = said.rpartition(", ")
                assert start == f"{name}, {state}"
                if share == "<0.1%":
                    assert weight < 0.0005
                else:
                    assert float(share[:-1]) == pytest.approx(100 * weight, abs=0.0501)
            else:
                assert said == f"{name}, not {state}"
        assert 0 < opened.sum() < T


def contrast(*colors) -> float:
    """Of two colours, as WCAG has it."""
    lights = []
    for color in colors:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


def channels(color: str) -> list[float]:
    if color.startswith("#"):
        return [int(color[i:i + 2], 16) for i in (1, 3, 5)]
    return [float(part) for part in re.findall(r"[\d.]+", color)]


@pytest.mark.parametrize("dark", [False, True])
def test_weights_can_be_read_where_they_are_largest(folder, browser, dark):
    path, _ = write(folder, "case.html", *CASES["default model"])
    load(browser, path, dark=dark)
    style = f"(name => getComputedStyle({TOKENS}[3], '::after')[name])"
    *plate, alpha = channels(browser.run(f"{style}('backgroundColor')"))
    over_white = [alpha * c + (1 - alpha) * 255 for c in plate]
    assert contrast(channels(browser.run(f"{style}('color')")), over_white) > 4.5
    value = "getComputedStyle(document.documentElement).getPropertyValue"
    ink, light = (channels(browser.run(f"{value}('--{name}')")) for name in ("ink", "light"))
    assert contrast(ink, light) > 4.5
    assert contrast((255, 255, 255), (200, 190, 170)) < 4.5  # the control: a pale tile


def test_it_prints_in_light_colours_from_a_dark_screen(folder, browser):
    path, _ = write(folder, "case.html", *CASES["default model"])
    load(browser, path, dark=True)
    printed = base64.b64decode(browser.send("Page.printToPDF", printBackground=False)["data"])
    assert printed.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 4
    fills = set()
    for stream in re.findall(rb"/FlateDecode.*?stream\r?\n(.*?)endstream", printed, re.DOTALL):
        text = zlib.decompressobj().decompress(stream)
        fills |= set(re.findall(rb"([.\d]+ [.\d]+ [.\d]+) rg\b", text))
    fills = {tuple(round(255 * float(c)) for c in fill.split()) for fill in fills}
    styles = TEMPLATE.read_text(encoding="utf-8").split("@media", 2)
    for name in ("paper", "blocked"):  # the page, and the grid's cells
        light, dark = (tuple(map(int, channels(re.search(rf"--{name}: ([^;]*);", part)[1])))
                       for part in styles[:2])
        assert light in fills and dark not in fills
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    corner = "(grid => [...grid.getContext('2d').getImageData(grid.width - 5, 30, 1, 1).data])" \
             f"({CANVAS}).slice(0, 3)"
    for medium, color in (("print", light), ("screen", dark)):  # where nothing else has it redrawn
        browser.send("Emulation.setEmulatedMedia", media=medium, features=[scheme])
        browser.run("new Promise(done => setTimeout(done, 100))")
        assert tuple(browser.run(corner)) == color
    browser.send("Emulation.setEmulatedMedia", media="")


def test_what_a_token_without_letters_is_shows(folder, browser):
    path, data = write(folder, "case.html", *asked("model.pt", "a\n b"))
    load(browser, path)
    shown = browser.run(f"{TOKENS}.map(token => token.textContent)")
    assert shown[4:8] == ["a", "\u21b5", "\u2423", "b"]
    assert data["views"][0][0]["names"][4:8] == ["a", "a line break", "a space", "b"]


@pytest.mark.skipif(sys.platform == "win32", reason="a browser's pipe needs descriptors 3 and 4")
def test_a_browser_that_hangs_is_given_up(tmp_path, monkeypatch):
    import browser
    hanging = tmp_path / "chromium"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(browser, "PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="has said nothing for 0.2 seconds"):
        browser.Browser(str(hanging))


def test_a_page_says_what_was_not_trained_and_what_parts_of_a_letter_are(folder):
    noted = set()
    for question in ("what?", "a", "where is it?", "\u0645"):
        _, data = write(folder, "a.html", *asked("model.pt", question), "--masks", "mma,image")
        assert [view["rule"].startswith("not trained so: ") for view in data["views"][0]] == [
            False, True]
        parted = any(re.search(r"^. 1/\d$", label) for view in data["views"][0]
                     for label in view["labels"])
        assert (draw.PARTS in data["notes"]) == parted
        noted.add(parted)
        assert "The answer begins after the mark <answer>." in data["notes"]
    assert noted == {False, True} and parted
    _, data = write(folder, "a.html", "--ask", "what?", "--masks", "mma,image")
    assert not any("trained" in view["rule"] for view in data["views"][0])


def test_a_long_question_takes_three_lines_and_is_whole_in_its_title(folder, browser):
    asked = "word " * 300
    path, _ = write(folder, "case.html", "--ask", asked, "--masks", "mma")
    load(browser, path, 360)
    lines = "(h1 => h1.clientHeight / parseFloat(getComputedStyle(h1).lineHeight))" \
            "(document.querySelector('h1'))"
    assert browser.run(lines) == pytest.approx(3, abs=0.1)
    assert browser.run("document.querySelector('h1 span').title") == heading(browser) == asked
    browser.run("document.querySelector('h1 span').style.display = 'block'")
    assert browser.run(lines) > 20  # the control


@pytest.mark.parametrize("width, both, fits", [(360, True, False), (360, False, True),
                                               (1400, True, True)])
def test_weights_over_a_picture_are_shown_where_there_is_room_for_them(folder, browser, width, both,
                                                                       fits):
    path, _ = write(folder, "case.html", *asked("nano.pt", "what?"))
    load(browser, path, width)
    browser.key("w")
    if both:
        browser.key("b")
    shown = browser.run(f"{TOKENS}.slice(0, 36).map(token => [token.scrollWidth, token.clientWidth,"
                        " getComputedStyle(token, '::after').content])")
    assert all((content != "none") == fits for *_, content in shown)
    assert all(inner <= outer for inner, outer, _ in shown)


def test_the_tour_shows_what_it_speaks_of_above_its_own_words(folder, browser):
    path, data = write(folder, "case.html", *asked("nano.pt", "what is it?"), "--masks", "mma")
    browser.open(path, 360, 800)
    browser.run("localStorage.clear()")
    browser.open(path, 360, 800)
    browser.size(360, 800)
    for stop in data["tour"][1:]:
        top, bottom, limit = browser.run(
            "new Promise(done => setTimeout(done, 50)).then(() => { const [seen, said] = "
            f"['{stop['see']}', 'aside'].map(part => document.querySelector(part)"
            ".getBoundingClientRect()); return [seen.top, seen.bottom, said.top]; })")
        assert 0 <= top < bottom <= limit
        browser.run("document.getElementById('next').click()")
    browser.key("?")
    browser.run("scrollTo(0, 0)")
    assert browser.run("document.querySelector('.picture').getBoundingClientRect().bottom > "
                       "document.querySelector('aside').getBoundingClientRect().top")  # the control


def test_keys_are_told_to_who_has_them(folder, browser):
    path, _ = write(folder, "case.html", "--ask", "a")
    load(browser, path)
    seen = "document.getElementById('keys').offsetHeight > 0"
    assert browser.run(seen)
    browser.send("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.send("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=2,
                 mobile=True)
    try:
        assert not browser.run(seen)
    finally:
        browser.send("Emulation.setTouchEmulationEnabled", enabled=False)


def test_a_redraw_is_timed_of_a_page_only(browser, tmp_path):
    from bench import bench_page
    (tmp_path / "other.html").write_text("<p>no page of ours")
    for path, words in ((Path("/nope.html"), "no such file"),
                        (tmp_path / "other.html", "no tokens in it")):
        with pytest.raises(SystemExit, match=words):
            bench_page(path)
