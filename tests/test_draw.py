"""What draw.py shows is what attention gets and does."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import draw
import nanoaki
from conftest import random_roles, tiny_model
from draw import draw_attention, draw_mask, lit, mask_grid, mask_text, most_read, place_labels, word_batch
from engine.attention import Recorder, attention_maps, movement
from engine.cells import BLOCKED, DIAGONAL, PADDING, SEEN, UNLOCKED, mask_states
from engine.pictures import GAP, RIGHT, SAMPLE, WRONG, draw_samples
from helpers import refused
from nanoaki import ANSWER, IMAGE, MASKS, PAD, PROMPT, Tokenizer, make_mask, mma

SEVEN = torch.tensor([IMAGE] * 3 + [PROMPT] * 2 + [ANSWER] * 2)
ASKED = ["--model", "MODEL", "--image", "PICTURE", "--ask", "a"]
SIGNS = {".": BLOCKED, "-": PADDING, "x": SEEN, "o": UNLOCKED, "*": DIAGONAL}


@pytest.fixture(scope="module")
def model():
    return tiny_model(torch.float32, Tokenizer([]))


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))


def test_the_seven_by_seven_mask_of_the_docstring_is_drawn_cell_by_cell():
    rows = [line.split()[2:9] for line in mma.__doc__.splitlines() if line.strip().startswith("query")]
    drawn, title = mask_states("mma", SEVEN)
    assert title == "mma: 6 pairs unlocked"
    for q in range(7):
        for k in range(7):
            assert int(drawn[q, k]) == (DIAGONAL if q == k else SIGNS[rows[q][k]])


def position(sheet, grid):
    """(y, x) of the only place where a picture holds another."""
    high, wide = grid.shape[:2]
    (found,) = [(y, x) for y, x in zip(*np.where((sheet[:-high, :-wide] == grid[0, 0]).all(-1)))
                if (sheet[y:y + high, x:x + wide] == grid).all()]
    return found


@pytest.mark.parametrize("name", MASKS)
def test_every_cell_of_the_picture_has_the_colour_of_what_attention_gets(name):
    for roles in random_roles(20, seed=1):
        mask = make_mask(name, roles[None])[0]
        sheet = np.asarray(draw_mask(roles, [str(i) for i in range(len(roles))], [name]))
        cell = draw.cell_side(len(roles))
        grid = np.asarray(mask_grid(mask_states(name, roles)[0], cell))
        found = position(sheet, grid)
        for q in range(len(roles)):
            for k in range(len(roles)):
                pad = PAD in (roles[q], roles[k])
                state = (PADDING if pad else DIAGONAL if q == k else BLOCKED if not mask[q, k]
                         else SEEN if k < q else UNLOCKED)
                y, x = found[0] + q * cell + cell // 2, found[1] + k * cell + cell // 2
                assert tuple(sheet[y, x]) == draw.STATES[state][1]


def test_states_differ_in_lightness_so_that_grey_will_do():
    def lightness(color):  # CIE L*
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return 116 * (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]) ** (1 / 3) - 16

    levels = sorted(lightness(color) for _, color, *_ in draw.STATES.values())
    assert min(b - a for a, b in zip(levels, levels[1:])) > 10


@pytest.mark.parametrize("T", [8, 20, 40, 100, 141, 396, 400])
def test_labels_never_overlap_and_an_image_has_one(T):
    roles = [IMAGE] * (T // 2) + [PROMPT] * (T - T // 2 - 2) + [ANSWER] * 2
    cell = draw.cell_side(T)
    found = place_labels([str(i) for i in range(T)], roles, cell)
    places = [y for y, _ in found]
    assert all(b - a >= draw.LINE for a, b in zip(places, places[1:])) and places[-1] + draw.LINE <= T * cell
    sheet = np.asarray(draw_mask(torch.tensor(roles), [str(i) for i in range(T)], ["mma"]))
    grid = np.asarray(mask_grid(mask_states("mma", torch.tensor(roles))[0], cell))
    y, x = position(sheet, grid)
    for band in (sheet[y:y + T * cell, x - draw.GAP - 1], sheet[y - 3, x:x + T * cell]):  # at its own row and column
        assert [tuple(color) for color in band[cell // 2::cell]] == [draw.SEGMENTS[kind][1] for kind in roles]
    assert sum(" x " in label for _, label in found) == 1
    assert len(found) == T - T // 2 + 1 if T <= 40 else len(found) >= 15


def test_a_batch_of_several_images_text_first_and_padding_has_the_sequence_builders_roles():
    roles, labels = word_batch(["see <image> and <image>", "what?"], ["a b", None], 3)
    words = "see image image image and image image image <answer> a b <eos>".split()
    assert labels[0] == words and labels[1] == ["image"] * 3 + ["what?", "<answer>"] + ["padding"] * 7
    kinds = {"image": IMAGE, "a": ANSWER, "b": ANSWER, "<eos>": ANSWER, "padding": PAD}
    assert roles.tolist() == [[kinds.get(label, PROMPT) for label in row] for row in labels]
    named, _ = word_batch(["an image of <image>"] * 2, ["image"], 2)  # a word of that name; one answer for all
    assert named.tolist() == [[PROMPT] * 3 + [IMAGE] * 2 + [PROMPT] + [ANSWER] * 2] * 2
    assert draw_mask(roles, labels, ["causal", "mma"]).height > draw_mask(roles[0], labels[0], ["mma"]).height


def test_the_terminal_gets_the_same_cells_in_plain_ascii():
    labels = ["image"] * 3 + ["what?", "<answer>", "red", "<eos>"]
    lines = mask_text(SEVEN, labels, ["mma"], 80, fancy=False).splitlines()[-7:]
    states, _ = mask_states("mma", SEVEN)
    assert [[SIGNS[sign] for sign in line[-7:]] for line in lines] == states.tolist()
    assert all(line.isascii() for line in lines)


def test_the_terminals_width_is_kept_by_collapsing_image_runs_first():
    roles, labels = word_batch(["what is it?"], ["red"], 100)
    for width in (200, 80, 40, 26):
        text = mask_text(roles[0], labels[0], ["mma"], width, fancy=False)
        rows = text.splitlines()[1:]  # below the legend
        assert max(map(len, rows)) <= width and "500 pairs" not in text and "400 pairs" in text
        assert any("it?" in row for row in rows) and any("<eos>" in row for row in rows)
    with pytest.raises(ValueError, match="too few"):
        mask_text(roles[0], labels[0], ["mma"], 20, fancy=False)


def test_wide_characters_take_two_columns_and_marks_none():
    for string, columns in (("abc", 3), ("\u7ea2\uff1f", 4), ("\u304b\u3099", 2), ("x\u0301\u200d", 1), ("\uc0c9", 2)):
        assert draw.columns_of(string) == columns


def test_colours_are_for_terminals_that_have_not_asked_for_none(monkeypatch, capsys):
    command = ["--ask", "what?", "--out", "-", "--visual-tokens", "2"]
    for terminal, no_color, colored in ((True, "", True), (True, "1", False), (False, "", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        draw.main(command)
        assert ("\033[" in capsys.readouterr().out) == colored


@pytest.mark.parametrize("same_length", [False, True])  # with padding, and without
@pytest.mark.parametrize("mask", ["causal", "mma", "prefix", "image"])
def test_recorded_attention_is_what_fused_attention_computes(model, picture, mask, same_length):
    two = ["<image> or what is <image>" if same_length else "a <image><image>", "what is <image> or <image>"]
    images, tokens, roles = model.prompt([[picture, picture]] * 2, two)
    assert (PAD in roles) != same_length
    with torch.no_grad():
        fused = model.hidden(images, tokens, roles, mask)
        with Recorder() as recorder:
            shown = model.hidden(images, tokens, roles, mask)
    assert (fused - shown).abs().max() < 1e-5 and len(recorder.weights) == 2
    for weights in recorder.weights:
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
        allowed = make_mask(mask, roles)[:, None].expand_as(weights)
        assert (weights[~allowed] == 0).all() and (weights[allowed] > 0).all()


def test_maps_come_with_the_answer_and_are_rows_and_columns_of_all_weights(model, picture):
    question, V = "what is left of it?", 4
    found = attention_maps(model, [picture], question, max_new_tokens=6)
    assert found.answer == model.ask(picture, question, 6)
    assert found.words == [*question.split(), "<answer>"]
    T, given = len(found.roles), V + len(question) + 1
    assert found.weights.shape == (2, 2, T, T) and T == given + len(found.tokens) - 1
    assert (found.weights.sum(-1) - 1).abs().max() < 1e-5
    assert (found.weights[..., ~make_mask("mma", found.roles[None])[0]] == 0).all()
    assert torch.equal(found.looks, found.weights[:, :, given - 1:, :V])
    assert torch.allclose(found.reads[:, :, 0], found.weights[:, :, :V, V:V + 4].sum(-1))
    _, tokens, roles = model.prompt([[picture]], [question])
    with torch.no_grad(), Recorder() as recorder:  # the same, all at once
        ids = model.tokenizer.encode(question)
        model.hidden(model.prompt([[picture]], [question])[0], tokens, roles)
    assert len(ids) == len(question)
    assert torch.allclose(torch.cat(recorder.weights), found.weights[:, :, :given, :given], atol=1e-6)


def test_words_of_the_question_are_whole_whatever_their_characters(model, picture):
    found = attention_maps(model, [picture], "caf\u00e9 <image> \u4f60\u597d <b> \U0001f642?", max_new_tokens=1)
    assert found.words == ["caf\u00e9", "\u4f60", "\u597d", "<b>", "\U0001f642?", "<answer>"]


@pytest.mark.parametrize("question, words", [
    ("\u8fd9\u4e2a\u5706 red\u662f\uff1f", ["\u8fd9", "\u4e2a", "\u5706", "red", "\u662f", "\uff1f"]),
    ("\u304b\u3099\u306a\u30ab", ["\u304b\u3099", "\u306a", "\u30ab"]),
    ("\uc774 \uc6d0\uc740 \uc0c9?", ["\uc774", "\uc6d0\uc740", "\uc0c9?"]),
    ("what  color\nis it? ", ["what", "color", "is", "it?"]),
    ("\u0645\u0627 \u0647\u0648", ["\u0645\u0627", "\u0647\u0648"])], ids=["Chinese", "Japanese", "Korean", "English", "Arabic"])
def test_where_there_are_no_spaces_a_character_is_a_word(model, picture, monkeypatch, question, words):
    (roles,), (labels,) = word_batch([question], [question], 2)
    assert labels == ["image"] * 2 + [*words, "<answer>", *words, "<eos>"]
    rows = mask_text(roles, labels, ["mma"], 80, fancy=False).splitlines()[-len(labels):]
    assert [row.split()[0] for row in rows] == labels
    assert {draw.columns_of(row) for row in rows} == {draw.EDGE + len(labels)}
    drawn, text = [], draw.text
    monkeypatch.setattr(draw, "text", lambda string, *args, **how: drawn.append(string) or text(string, *args, **how))
    draw_mask(roles, labels, ["mma"])
    assert drawn[:len(words) + 1] == ["image x 2", *words]
    assert attention_maps(model, [picture], question, max_new_tokens=1).words == [*words, "<answer>"]


@pytest.mark.parametrize("merges, labels, tokens", [
    ([], ["\u7ea2", "\u8272"], [[0, 1, 2], [3, 4, 5]]),
    ([(0xe7, 0xba)], ["\u7ea2", "\u8272"], [[0, 1], [2, 3, 4]]),
    ([(0xa2, 0xe8)], ["\u7ea2\u8272"], [[0, 1, 2, 3, 4]]),  # the end of one and the start of the other
    ([(0xe7, 0xba), (260, 0xa2), (0xe8, 0x89), (262, 0xb2), (261, 263)], ["\u7ea2\u8272"], [[0]])],
    ids=["bytes", "a part", "parts of two", "whole"])
def test_the_tokens_of_a_character_are_one_label_and_their_weights_a_mean(picture, monkeypatch, merges, labels, tokens):
    tokenizer = Tokenizer(merges)
    model, word = tiny_model(torch.float32, tokenizer), "".join(labels)
    ids = iter([*tokenizer.encode(word), 0xe4, ord("a"), 299, Tokenizer.eos])  # 299 is no token of it
    monkeypatch.setattr(nanoaki, "choose", lambda logits, *_: torch.tensor([next(ids)]))
    found = attention_maps(model, [picture], "<image> " + word)
    assert found.words == [*labels, "<answer>"] and found.tokens == [*labels, r"\xe4", "a", "", "<eos>"]
    V, answer = 4, 4 + 1 + sum(map(len, tokens))  # before the word stands a space, at the end <answer>
    for n, some in enumerate(tokens):
        looks = found.weights[:, :, [answer + i for i in some], :V].mean(2)
        reads = found.weights[:, :, :V, [V + 1 + i for i in ([-1, *some] if n == 0 else some)]].sum(-1)
        assert torch.allclose(found.looks[:, :, n], looks) and torch.allclose(found.reads[:, :, n], reads)
    assert torch.equal(found.looks[:, :, -1], found.weights[:, :, -1, :V])


def test_a_question_may_be_a_picture_alone_but_not_empty(model, picture, tmp_path, capsys):
    model.save(tmp_path / "model.pt")
    picture.save(tmp_path / "p.png")
    for name, more in (("mask.png", []), ("a.png", ["--model", tmp_path / "model.pt", "--image", tmp_path / "p.png"])):
        draw.main([str(a) for a in ["--ask", "<image>", " <image>", "--out", tmp_path / name, *more]])
        assert (tmp_path / name).exists()
        for empty in ("", " \n"):
            line = refused(capsys, draw.main, "--ask", "a", empty, "--out", tmp_path / "b.png", *more)
            assert "--ask: question 2 is empty" in line and not (tmp_path / "b.png").exists()
    draw.main(["--ask", "<image>", "--out", "-", "--visual-tokens", "2", "--masks", "mma"])
    assert [row.split() for row in capsys.readouterr().out.splitlines()[-3:]] == [
        ["image", "*.o"], ["image", "x*o"], ["<answer>", "xx*"]]


def test_only_under_mma_do_visual_tokens_read_the_question_and_move_with_it(model, picture):
    two = ["what?", "a longer question, padded otherwise"]
    assert (attention_maps(model, [picture], two[0], "causal").reads == 0).all()
    assert (attention_maps(model, [picture], two[0], "mma").reads > 0).all()
    assert (movement(model, [picture], two, "causal") == 0).all()
    assert (movement(model, [picture], two, "mma") > 0).all()


def test_weight_shows_as_light_on_a_picture_that_keeps_its_colours():
    square = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.float32)
    shown = [np.asarray(lit(square, np.full((20, 20, 1), share)), np.float32) for share in (0, 0.5, 1)]
    for dark, light in zip(shown, shown[1:]):
        assert (light.mean(-1) > dark.mean(-1)).all()
    for image in shown:
        assert np.corrcoef(image.ravel(), square.ravel())[0, 1] > 0.95
        assert abs(np.corrcoef(image.ravel(), square[::-1].ravel())[0, 1]) < 0.3  # the control


def test_a_still_says_how_many_labels_it_has_no_room_for(monkeypatch):
    lines, text = [], draw.text
    monkeypatch.setattr(draw, "text", lambda string, *args, **how: lines.append(string) or text(string, *args, **how))
    for words in (9, 90):
        lines.clear()
        roles, labels = word_batch(["word " * words] * 2, ["red"], 16)
        draw_mask(roles, labels, ["mma"])
        shown = sum(label in ("word", "red", "<answer>", "<eos>", "image x 16") for label in lines) // 2  # on two sides
        said = [f"no room for {2 * (words + 4) - shown} of the labels"] if words == 90 else []
        assert [line for line in lines if line.startswith("no room")] == said


def test_in_a_chat_marks_are_words_of_their_own(model, picture):
    said = [("what is at the top?", "yellow cross")]
    found = attention_maps(model, [picture], "and below?", max_new_tokens=1, history=said)
    assert found.words == [*"what is at the top? <answer> yellow cross <eos> and below? <answer>".split()]
    place = 4 + len("what is at the top?")  # of the first mark
    assert torch.equal(found.reads[:, :, 5], found.weights[:, :, :4, place])
    plain = attention_maps(model, [picture], "what is top?yellow crossand below?", max_new_tokens=1)  # the control
    assert plain.words == [*"what is top?yellow crossand below? <answer>".split()]


def test_the_words_that_are_read_most_are_shown_in_their_order():
    weights, names = torch.full((9, 4), 0.1), [*"abcdefghi"]
    weights[[1, 3, 4, 5, 7, 8]] = 0.2
    title, shown, rows = most_read("words", names, {"layer 1": weights, "layer 2": weights / 2})
    assert shown == [*"bdefhi"] and "6 of 9" in title
    assert (rows["layer 1"] == 0.2).all() and (rows["layer 2"] == 0.1).all()
    few = {"layer 1": weights[:6]}
    assert most_read("words", names[:6], few) == ("words", names[:6], few)


def test_the_words_of_a_still_are_those_read_most_in_the_layer_and_head_that_is_drawn(
        model, picture, monkeypatch):
    question, drawn = "a b c d e f g h i j", []
    maps = attention_maps(model, [picture], question)
    monkeypatch.setattr(draw, "map_rows", lambda title, square, names, *_: drawn.append(names)
                        or Image.new("RGB", (1, 1)))
    found = []
    for layer, head in [(None, None), (1, None), (2, None), (2, 1), (2, 2)]:
        reads = maps.reads if layer is None else maps.reads[layer - 1:layer]
        reads = reads if head is None else reads[:, head - 1:head]
        most = reads.mean((0, 1, 3)).topk(draw.MOST).indices.sort().values
        draw_attention(model, [picture], [question], layers=layer and [layer], head=head)
        found.append(drawn[-1])
        assert drawn[-1] == [maps.words[i] for i in most]
    assert len(set(map(tuple, found))) > 2  # they differ


def test_a_still_has_one_row_or_the_layers_that_are_asked(model, picture, monkeypatch):
    lines, text = [], draw.text
    monkeypatch.setattr(draw, "text", lambda string, *args, **how: lines.append(string) or text(string, *args, **how))
    one = draw_attention(model, [picture], ["what?"])
    assert lines.count("mean of layers") == 2 and "layer 1" not in lines
    assert one.height < 620  # it fits a screen
    lines.clear()
    two = draw_attention(model, [picture], ["what?"], layers=[2, 1])
    assert [line for line in lines if line.startswith("layer")] == ["layer 2", "layer 1"] * 2
    assert "mean of layers" not in lines and two.height > one.height
    untrained = "the model was trained under mma, not under causal"
    assert untrained not in lines
    lines.clear()
    draw_attention(model, [picture], ["what?"], "causal")
    assert "no visual token reads a word of the question" in lines and untrained in lines


@pytest.mark.parametrize("order, question, said", [
    ("data", "what?", False), ("data", "see <image>", True), ("data", "<image> what?", False),
    ("text", "<image> what?", True), ("image", "what? <image>", False)])
def test_text_before_a_picture_is_said_beside_what_it_moves(picture, monkeypatch, order, question, said):
    lines, text = [], draw.text

    def written(string, *args, **kwargs):
        lines.append(string)
        return text(string, *args, **kwargs)

    monkeypatch.setattr(draw, "text", written)
    draw_attention(tiny_model(torch.float32, Tokenizer([]), order=order), [picture], [question, question])
    assert ("text stands before a picture here: that alone moves its tokens" in lines) == said


@pytest.mark.parametrize("picture", [None, Image.new("RGB", (16, 16), (200, 77, 3))], ids=["no picture", "picture"])
def test_samples_frame_what_is_wrong_and_only_that(picture):
    asked = (picture, "what color is " + "the thing " * 9, "blue ")
    right, wrong = (np.asarray(draw_samples([(*asked, answer) for answer in ["blue"] * 4 + [last]]))
                    for last in ("blue", "red"))
    assert right.shape == wrong.shape
    assert not (right == WRONG).all(-1).any() and (right == RIGHT).all(-1).any()
    y, x = (wrong == WRONG).all(-1).nonzero()  # the fifth stands below the first
    assert len(y) > 3 * SAMPLE and y.min() > SAMPLE and x.max() < GAP + SAMPLE
    assert (right == (200, 77, 3)).all(-1).any() == (picture is not None)


def test_the_command_line_draws_masks_and_attention(model, picture, tmp_path, capsys):
    model.save(tmp_path / "model.pt")
    picture.save(tmp_path / "p.png")
    draw.main(["--ask", "what?", "--masks", "causal,leaky", "--out", str(tmp_path / "mask.png")])
    for more in ([], ["--layer", "2", "--head", "1"], ["--masks", "causal"]):
        draw.main(["--model", str(tmp_path / "model.pt"), "--image", str(tmp_path / "p.png"), *more,
                   "--ask", "what?", "where is it?", "--out", str(tmp_path / "a.png")])
    for name in ("mask.png", "a.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 200 and len(image.getcolors(1 << 20)) > 5


@pytest.mark.parametrize("argv, words", [
    (["--ask", "a", "--masks", "mmm"], "'mmm' is none of causal"),
    (["--ask", "a", "--image", "p.png"], "--image needs --model"),
    (["--ask", "a", "--layer", "1"], "--layer needs --model"),
    (["--ask", "a", "--visual-tokens", "0"], "--visual-tokens must be 1"),
    (["--ask", "a", "--answer", "b", "c"], "2 answers for 1 question"),
    (["--ask", "a", "--model", "MODEL"], "--model needs --image"),
    ([*ASKED, "--answer", "b"], "--answer: a model gives its own"),
    ([*ASKED, "--visual-tokens", "4"], "--visual-tokens: a model has its own"),
    ([*ASKED, "b", "c"], "--ask: a model takes one or two questions, not 3"),
    ([*ASKED, "--masks", "mma,causal"], "--masks: a picture shows one of a model, not 2"),
    ([*ASKED, "--out", "-"], "--out -: with --model it must be a file"),
    (["--ask", "a", "--model", "none.pt", "--image", "p.png"], "none.pt: no such file"),
    (["--ask", "a", "--model", "MODEL", "--image", "none.png"], "none.png: No such file"),
    (["--ask", "a", "--model", "MODEL", "--image", "PICTURE", "--layer", "3"], "--layer must be 1 to 2"),
    (["--ask", "a", "--model", "MODEL", "--image", "PICTURE", "--head", "0"], "--head must be 1 to 2"),
    (["--ask", "a" * 70, "--model", "MODEL", "--image", "PICTURE"], "64 positions"),
    (["--ask", "a", "--out", "/nowhere/mask.png"], "/nowhere/mask.png cannot be written"),
    (["--ask", "a", "--out", "mask.nonsense"], "unknown file extension '.nonsense'; .png is"),
    (["--masks", "mma"], "--ask")], ids=str)
def test_nonsense_is_one_line_and_exit_code_2(model, picture, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    model.save("model.pt")
    picture.save("picture.png")
    argv = [{"MODEL": "model.pt", "PICTURE": "picture.png"}.get(a, a) for a in argv]
    assert words in refused(capsys, draw.main, *argv, *([] if "--out" in argv else ["--out", "x.png"]))
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "mask.nonsense").exists()


def test_a_flag_that_is_given_twice_means_both():
    texts = draw.make_parser().parse_args("--ask a b --ask c --answer d --answer e --history f g --history h i "
                                          "--image j --image k --layer 1 --layer 2 --out x.png".split())
    assert (texts.ask, texts.answer, texts.history) == (["a", "b", "c"], ["d", "e"], ["f", "g", "h", "i"])
    assert (texts.image, texts.layer) == (["j", "k"], [1, 2])


def test_queries_are_cells_beside_the_picture_and_never_a_light_over_it(picture, monkeypatch):
    lines, lit_pictures, text, places = [], [], draw.text, draw.lit_places
    monkeypatch.setattr(draw, "text", lambda string, *args, **how: lines.append(string) or text(string, *args, **how))
    monkeypatch.setattr(draw, "lit_places", lambda *args: lit_pictures.append(args) or places(*args))
    said = "5 learned queries read a picture and have no place in it: each cell is one of them"
    for queries in (5, 0):  # the second is the control
        lines.clear()
        model = tiny_model(torch.float32, Tokenizer([]), queries=queries)
        draw_attention(model, [picture], ["what?", "where?"])
        assert (said in lines) == (queries > 0) and bool(lit_pictures) == (queries == 0)


@pytest.mark.parametrize("queries", [1, 5, 9, 144, 4000])
def test_each_query_is_a_cell_as_bright_as_its_share(queries):
    shares = torch.linspace(0, 1, queries)
    cells = np.asarray(draw.lit_cells(shares))
    columns = next(n for n in range(1, 100) if n * n >= queries)
    side, expected = draw.THUMB // columns, np.full((draw.THUMB, draw.THUMB), 255)
    for n in range(queries):
        y, x = n // columns * side, n % columns * side
        color = lit(np.full((1, 1, 3), 128.0), np.array(float(shares[n])))
        assert (cells[y:y + side - 1, x:x + side - 1] == np.asarray(color)).all()
        expected[y:y + side - 1, x:x + side - 1] = 0
    assert (cells[expected == 255] == 255).all()  # white between them and behind the last
