"""Tokenizer, and the functions that turn text and pictures into a sequence."""
import heapq
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import VISUAL, tiny_config
from nanoaki import (ANSWER, IMAGE, PAD, PROMPT, Tokenizer, _merge, build_sequence, pad_batch,
                     place_pictures)

TEXTS = ["what color is the circle?", "is there a red square left of the blue star?", "yes", "red",
         "the circle is red.", "  two\n\nlines\t", "naïve café 東京 😀😀 _x_ 1234"] * 5
SPECIAL = ["<image>", "<answer>", "<eos>", "<pad>", "<|endoftext|>", "<image><image>",
           "<ima", "ge>"]
ODD = ["\0", "\x1b", "\x7f", "\x85", "\xa0", "\u2028", "\u200b", "\ufeff", "\ufffd", "\U0010ffff",
       "e\u0301", "²", "Ⅷ", "٣", "_", "___ ", "\r\n", " \n ", "👩‍👩‍👧", "🏳️‍🌈", "🇫🇷", "👍🏽", "한국",
       "שלום"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 340)


def random_text(rng: random.Random) -> str:
    """Words, special tokens written out, oddities, and characters of all of Unicode."""
    def piece():
        kind = rng.randrange(6)
        if kind == 0:
            return chr(rng.choice([rng.randrange(0xd800), rng.randrange(0xe000, 0x110000)]))
        if kind == 1:
            return chr(rng.randrange(0x300)) * rng.randint(1, 40)
        return rng.choice([SPECIAL, ODD, TEXTS, [" ", "  ", "\n", "a" * 50, "." * 50]][kind - 2])
    return "".join(piece() for _ in range(rng.randint(0, 12)))


def test_random_text_comes_back_and_never_becomes_a_special_token(tokenizer):
    rng, merged = random.Random(0), 0
    for _ in range(2000):
        text = random_text(rng)
        for t in (tokenizer, Tokenizer([])):
            ids = t.encode(text)
            assert t.decode(ids) == text
            assert all(0 <= i < 256 or 260 <= i < len(t) for i in ids)
        merged += len(tokenizer.encode(text)) < len(text.encode())
    assert merged > 500  # or the merges were not tried


def test_every_character_comes_back(tokenizer):
    points = [*range(0xd800), *range(0xe000, 0x110000, 7)]
    for start in range(0, len(points), 5000):
        text = "".join(map(chr, points[start:start + 5000]))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_the_four_after_the_bytes_and_have_no_text(tokenizer):
    assert (tokenizer.image, tokenizer.answer, tokenizer.eos, tokenizer.pad) == (256, 257, 258, 259)
    assert tokenizer.decode([256, 104, 257, 105, 258, 259]) == "hi"


def test_bytes_are_their_own_ids():
    for text in ("hello", "é", "\0\n", "<image>", "😀", ""):
        assert Tokenizer([]).encode(text) == list(text.encode())


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer):
    assert tokenizer.decode([104, len(tokenizer), 105, 9999]) == "hi"  # a model may have more ids


@pytest.mark.parametrize("ids, text", [([0xff], "\ufffd"), ([104, 0xc3], "h"), ([], ""), ([0xc3], ""),
                                       ([0xc3, 258, 0xa9], "é"), ([0xf0, 0x9f, 104], "\ufffdh")])
def test_invalid_utf8_is_the_replacement_character_and_a_cut_off_one_is_left_out(ids, text):
    assert Tokenizer([]).decode(ids) == text


@pytest.mark.parametrize("text", ["\ud800", "good \udfff", "a\ud83db"])
def test_a_lone_surrogate_is_a_value_error(tokenizer, text):
    with pytest.raises(ValueError):
        tokenizer.encode(text)
    with pytest.raises(ValueError):
        Tokenizer.train([text])


def test_training_twice_gives_the_same_merges_in_another_process_too(tokenizer):
    assert Tokenizer.train(list(TEXTS), 340).merges == tokenizer.merges
    assert Tokenizer.train(TEXTS[3:], 340).merges != tokenizer.merges
    code = ("import sys; from nanoaki import Tokenizer; "
            "print(Tokenizer.train(eval(sys.argv[1]), 340).merges)")
    run = subprocess.run([sys.executable, "-c", code, ascii(TEXTS)], capture_output=True, text=True,
                         cwd=Path(__file__).parents[1], check=True,
                         env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    assert run.stdout.strip() == str(tokenizer.merges)


def test_every_merge_is_of_a_most_frequent_pair_counted_anew():
    rng = random.Random(4)
    for vocab_size in (262, 290, 10 ** 6):
        texts = ["".join(rng.choices("aab ", k=rng.randint(1, 60))) for _ in range(30)]
        trained = Tokenizer.train(texts, vocab_size)
        words = Counter(word for text in texts for word in Tokenizer.words.findall(text))
        for n in range(len(trained.merges) + 1):
            before, pairs = Tokenizer(trained.merges[:n]), Counter()
            for word, times in words.items():
                ids = before.encode(word)
                for pair in zip(ids, ids[1:]):
                    pairs[pair] += times
            if n < len(trained.merges):
                assert pairs[trained.merges[n]] == max(pairs.values()) >= 2
            if n == 0:  # max is the first of equals
                assert trained.merges[0] == max(pairs, key=pairs.get)
        assert len(trained) == vocab_size or max(pairs.values(), default=0) < 2


def test_of_equally_frequent_pairs_the_first_seen_is_merged():
    for first in ("zy", "ab", "ba", "qx", "\x7f\0"):
        text = first + " mn op " + first + " op mn"
        assert Tokenizer.train([text], 261).merges == [tuple(first.encode())]


@pytest.mark.parametrize("vocab_size", [260, 261, 300])
def test_vocab_size_is_an_upper_bound_that_rich_text_reaches(vocab_size):
    assert len(Tokenizer.train(TEXTS, vocab_size)) == vocab_size
    assert len(Tokenizer.train(["ab"], vocab_size)) == 260  # no pair occurs twice
    assert len(Tokenizer.train([], vocab_size)) == len(Tokenizer.train([""], vocab_size)) == 260


@pytest.mark.parametrize("vocab_size", [259, 0, -1])
def test_vocab_size_below_the_bytes_and_special_tokens_is_refused(vocab_size):
    with pytest.raises(ValueError, match=rf"{vocab_size}.*260"):
        Tokenizer.train(TEXTS, vocab_size)


def test_frequent_words_become_one_token():
    tokenizer = Tokenizer.train(TEXTS, 1000)
    assert len(tokenizer.encode("red")) == 1
    assert len(tokenizer.encode("what color is the circle?")) == 6


def test_a_megabyte_of_varied_text_trains_and_comes_back():
    rng = random.Random(0)
    known = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(3000)]
    text = ""
    while len(text) < 10 ** 6:
        text += " ".join(rng.choices(known, k=2000)) + random_text(rng) + "\n"
    tokenizer = Tokenizer.train([text], 400)
    assert len(tokenizer) == 400
    ids = tokenizer.encode(text[:10 ** 5])
    assert tokenizer.decode(ids) == text[:10 ** 5] and len(ids) < 0.7 * 10 ** 5


@pytest.mark.parametrize("alphabet", ["a", "abcdefghijklmnopqrstuvwxyz"])
def test_300_kilobytes_without_a_space_train_and_come_back(alphabet):
    text = "".join(random.Random(0).choices(alphabet, k=300_000))
    tokenizer = Tokenizer.train([text], 270)
    assert len(tokenizer) > 260
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text)


def merged_naively(tokenizer: Tokenizer, word: str) -> list[int]:
    """All occurrences of the pair learned first, from the left, until no pair can be merged."""
    ids = list(word.encode())
    while True:
        known = [tokenizer.ids[pair] for pair in zip(ids, ids[1:]) if pair in tokenizer.ids]
        if not known:
            return ids
        ids = _merge(ids, tokenizer.merges[min(known) - 260], min(known))


@pytest.mark.parametrize("alphabet", ["ab", "aab é", "the circle is red", "東京😀a"])
def test_a_word_is_merged_as_a_plain_loop_merges_it(tokenizer, alphabet):
    rng, shorter = random.Random(0), 0
    trained = Tokenizer.train(["".join(rng.choices(alphabet, k=200)) for _ in range(20)], 330)
    for _ in range(150):
        word = "".join(rng.choices(alphabet, k=rng.randint(1, 60)))
        for t in (tokenizer, trained):
            assert t.encode_word(word) == merged_naively(t, word)
            shorter += len(t.encode_word(word)) < len(word.encode())
    assert shorter > 100  # or nothing was merged


@pytest.mark.parametrize("alphabet", ["a", "abcdefghijklmnopqrstuvwxyz"])
def test_the_work_of_encoding_is_in_proportion_to_a_text_without_a_space(monkeypatch, alphabet):
    pops, pop = [0], heapq.heappop

    def counted(heap):
        pops[0] += 1
        return pop(heap)

    text = "".join(random.Random(0).choices(alphabet, k=100_000))
    tokenizer = Tokenizer.train([text[:10_000]], 400)
    monkeypatch.setattr(heapq, "heappop", counted)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < 0.9 * len(text)
    assert len(text) / 10 < pops[0] < 3 * len(text)  # a merge makes two pairs, and takes one


BYTES, CONFIG = Tokenizer([]), tiny_config(block_size=200)
V, A, E = [256] * VISUAL, [257], [258]
ORDERS = ("data", "image", "text")


def raw(text: str) -> list[int]:
    return list(text.encode())


def chat(*turns):
    return list(zip(("human", "gpt") * 9, turns))


def sequence(turns, pictures, answer=None, config=CONFIG, order="data", tokenizer=BYTES):
    return build_sequence(tokenizer, config, place_pictures(turns, pictures, order), answer)


def check(turns, pictures, answer, given, order="data"):
    """The sequence is `given`, with roles that follow from it, then the answer and <eos>."""
    tokens, roles = sequence(turns, pictures, answer, order=order)
    generated = [] if answer is None else raw(answer) + E
    assert tokens == given + generated
    assert roles == [IMAGE if t == 256 else PROMPT for t in given] + [ANSWER] * len(generated)


def test_question_is_image_then_text_then_marker_then_answer_and_eos():
    tokens, roles = sequence(chat("<image>\nhm?"), 1, "no")
    assert tokens == [256, 256, 256, 256, *b"hm?", 257, *b"no", 258]
    assert roles == [IMAGE] * 4 + [PROMPT] * 4 + [ANSWER] * 3


def test_caption_is_image_then_marker_then_caption():
    check([("human", "")], 1, "a red dot", V + A)
    check([("human", "")], 3, "dots", V * 3 + A)


def test_without_an_answer_the_sequence_ends_with_the_marker():
    check(chat("hm?"), 0, None, raw("hm?") + A)
    check(chat("hm?"), 1, None, V + raw("hm?") + A)
    check(chat("hm?"), 0, "", raw("hm?") + A)  # an empty answer is <eos>


def test_pictures_stand_where_they_are_written_and_first_if_nowhere():
    check(chat("is <image> like <image>?"), 2, "no",
          raw("is ") + V + raw(" like ") + V + raw("?") + A)
    check(chat("alike?"), 2, "no", V + V + raw("alike?") + A)
    check(chat("look: <image>"), 1, None, raw("look: ") + V + A)
    check(chat("<image><image>"), 2, None, V + V + A)


def test_line_breaks_around_a_written_picture_are_dropped():
    for text in ("<image>\nhm?", "hm?\n<image>", "\n<image>\n\nhm?\n"):
        given = V + raw("hm?") if text.index("<") < text.index("h") else raw("hm?") + V
        check(chat(text), 1, "no", given + A)
    check(chat("<image>\na\n\nb"), 1, None, V + raw("a\n\nb") + A)  # those inside the text stay


@pytest.mark.parametrize("text, pictures", [("<image> hm?", 0), ("<image> hm?", 2),
                                            ("<image>" * 3, 2), ("<image><image>", 1)])
def test_a_wrong_count_of_pictures_is_refused_with_both_numbers(text, pictures):
    for turns in (chat(text), chat("a", "b", text), chat(text, "b", "c")):
        for order in ORDERS:
            with pytest.raises(ValueError) as e:
                place_pictures(turns, pictures, order)
            assert f"{text.count('<image>')} <image>" in str(e.value)
            assert f"{pictures} pictures" in str(e.value) and "\n" not in str(e.value)


def test_special_tokens_written_as_text_are_ordinary_bytes():
    check([("system", "<image>"), *chat("hm?", "<image>!", "so?")], 1, "<image><eos>",
          V + raw("<image>\n") + raw("hm?") + A + raw("<image>!") + E + raw("so?") + A)
    check(chat("<answer><eos><pad>"), 0, "<answer>", raw("<answer><eos><pad>") + A)
    check(chat("<image> vs <answer>", "<image>", "so?"), 1, None,
          V + raw(" vs <answer>") + A + raw("<image>") + E + raw("so?") + A)


def test_earlier_turns_are_prompt_with_their_answers():
    given = V + raw("who?") + A + raw("me") + E + raw("why?") + A
    check(chat("<image>\nwho?", "me", "why?"), 1, "because", given)
    check(chat("who?", "me", "<image>\nwhy?"), 1, "so", raw("who?") + A + raw("me") + E + V
          + raw("why?") + A)
    check(chat("<image>a", "b", "<image>c"), 2, "d",
          V + raw("a") + A + raw("b") + E + V + raw("c") + A)


def test_system_text_is_prompt_in_its_place():
    system = ("system", "be brief")
    check([system, ("human", "<image>\nhm?")], 1, "ok", raw("be brief\n") + V + raw("hm?") + A)
    check([system, *chat("who?", "me", "hm?")], 0, "ok",
          raw("be brief\n") + raw("who?") + A + raw("me") + E + raw("hm?") + A)
    check([system, *chat("hm?")], 1, "ok", V + raw("be brief\n") + raw("hm?") + A)  # not written


def shown(turns, pictures, order):
    """Turns with a `#` wherever a picture stands."""
    placed = place_pictures(turns, pictures, order)
    assert [speaker for speaker, _ in placed] == [speaker for speaker, _ in turns]
    return ["#".join(pieces) for _, pieces in placed]


@pytest.mark.parametrize("text, pictures, data, image, text_first", [
    ("hm?", 0, "hm?", "hm?", "hm?"), ("", 0, "", "", ""),
    ("hm?", 1, "#hm?", "#hm?", "hm?#"), ("hm?", 2, "##hm?", "##hm?", "hm?##"),  # not written
    ("<image>\nhm?", 1, "#hm?", "#hm?", "hm?#"), ("hm?\n<image>", 1, "hm?#", "#hm?", "hm?#"),
    ("<image>\n<image>\nhm?", 2, "##hm?", "##hm?", "hm?##"),
    ("<image>\nhm?\n<image>", 2, "#hm?#", "##hm?", "hm?##"),
    ("is <image> red?", 1, "is # red?", "is # red?", "is # red?"),              # within the text
    ("is <image> like <image>?", 2, "is # like #?", "is # like #?", "is # like #?"),
    ("<image>\nlike <image>?", 2, "#like #?", "#like #?", "like #?#"),
    ("is <image> like\n<image>", 2, "is # like#", "#is # like", "is # like#"),
    ("a\n<image>\n<image>\nb", 2, "a##b", "a##b", "a##b"),
    ("<image> \n <image> hm?", 2, "# \n # hm?", "## hm?", " hm?##"),            # edges of blanks
    ("", 1, "#", "#", "#"), ("<image>", 1, "#", "#", "#"), ("<image>\n<image>", 2, *["##"] * 3),
])
def test_order_moves_pictures_at_an_edge_and_none_within_the_text(text, pictures, data, image,
                                                                  text_first):
    for order, expected in zip(ORDERS, (data, image, text_first)):
        assert shown(chat(text), pictures, order) == [expected]


def test_order_holds_in_every_human_turn_alike():
    turns = [("system", "s"), *chat("<image>\na", "r <image>", "b\n<image>", "t",
                                    "<image>\nis <image> c?\n<image>")]
    assert shown(turns, 5, "data") == ["s", "#a", "r <image>", "b#", "t", "#is # c?#"]
    assert shown(turns, 5, "image") == ["s", "#a", "r <image>", "#b", "t", "##is # c?"]
    assert shown(turns, 5, "text") == ["s", "a#", "r <image>", "b#", "t", "is # c?##"]


def test_pictures_written_nowhere_stand_first_and_by_the_first_question_in_an_order():
    turns = [("system", "s <image>"), *chat("a", "<image>", "b")]  # written by nobody human
    assert shown(turns, 2, "data") == ["##s <image>", "a", "<image>", "b"]
    assert shown(turns, 2, "image") == ["s <image>", "##a", "<image>", "b"]
    assert shown(turns, 2, "text") == ["s <image>", "a##", "<image>", "b"]
    for order in ORDERS:
        assert shown(turns[1:], 0, order) == ["a", "<image>", "b"]


def test_order_reaches_the_sequence_and_its_answer():
    check(chat("<image>\nhm?"), 1, "no", raw("hm?") + V + A, order="text")
    check(chat("hm?"), 1, None, raw("hm?") + V + A, order="text")
    check(chat("hm?\n<image>"), 1, "no", V + raw("hm?") + A, order="image")
    check([("system", "s"), *chat("<image>\na", "b", "<image>\nc")], 2, "d", raw("s\n")
          + raw("a") + V + A + raw("b") + E + raw("c") + V + A, order="text")
    check(chat(""), 1, "a red dot", V + A, order="text")


def test_place_pictures_leaves_the_turns_it_was_given_alone():
    turns = [("system", "s"), *chat("<image>\na", "b", "c\n<image>")]
    for order in ORDERS:
        before = list(turns)
        assert place_pictures(turns, 2, order) == place_pictures(turns, 2, order)
        assert turns == before


def test_random_chats_have_every_role_in_its_place(tokenizer):
    rng, config = random.Random(2), tiny_config(block_size=10 ** 5)
    for _ in range(300):
        pictures, n = rng.randint(0, 3), rng.randrange(4)
        texts = [random_text(rng).replace("<image>", "") for _ in range(2 * n + 1)]
        texts = [text.replace("<image>", "") for text in texts]  # "<ima" + "ge>" of two pieces
        if rng.random() < 0.5 and pictures:
            texts[2 * rng.randint(0, n)] += "<image>" * pictures
        turns, answer = chat(*texts), random_text(rng)
        tokens, roles = sequence(turns, pictures, answer, config, rng.choice(ORDERS), tokenizer)
        new = len(tokenizer.encode(answer)) + 1
        assert len(tokens) == len(roles)
        assert roles[-new:] == [ANSWER] * new and ANSWER not in roles[:-new] and PAD not in roles
        assert tokens[-new:] == tokenizer.encode(answer) + E and tokens[-new - 1] == 257
        assert [t == 256 for t in tokens] == [r == IMAGE for r in roles]
        assert (tokens.count(256), tokens.count(257)) == (VISUAL * pictures, n + 1)
        assert tokens.count(258) == n + 1 and 259 not in tokens


def test_too_long_a_sequence_is_refused_with_the_numbers():
    config = tiny_config(block_size=20)
    fits = sequence(chat("x" * 10), 1, "y" * 4, config)
    assert len(fits[0]) == 20
    with pytest.raises(ValueError, match=r"\b15\b.*\b6\b.*\b20\b"):
        sequence(chat("x" * 10), 1, "y" * 5, config)
    assert len(sequence(chat("x" * 14), 1, config=config)[0]) == 19  # room for one new token
    with pytest.raises(ValueError, match=r"\b20\b.*\b20\b"):
        sequence(chat("x" * 15), 1, config=config)


def test_a_long_history_loses_the_text_of_its_oldest_turns_but_no_picture():
    system, turns = ("system", "s"), chat("<image>aaaaa", "bbbbbb", "<image>cc", "ddd", "eeee?")
    parts = [raw("s\n"), V + raw("aaaaa") + A, raw("bbbbbb") + E, V + raw("cc") + A, raw("ddd") + E,
             raw("eeee?") + A]
    shorter = [raw("s\n"), V, [], V, [], parts[-1]]  # the last turn and the system text stay whole
    # A question goes with its answer.
    cuts = [sum(parts[:1] + shorter[1:n] + parts[n:], []) for n in (1, 3, 5)]
    lengths = [len(cut) + 2 for cut in cuts]  # and "f", <eos>
    for block in range(lengths[-1], lengths[0] + 2):
        fitting = next(cut for cut, n in zip(cuts, lengths) if n <= block)  # no more than needed
        config = tiny_config(block_size=block)
        tokens, roles = sequence([system, *turns], 2, "f", config)
        assert tokens == fitting + raw("f") + E and len(tokens) <= block
        assert roles == [IMAGE if t == 256 else PROMPT for t in fitting] + [ANSWER] * 2
    config = tiny_config(block_size=lengths[-1] - 1)
    with pytest.raises(ValueError, match=rf"\b{len(cuts[-1])}\b.*\b2\b.*\b{lengths[-1] - 1}\b"):
        sequence([system, *turns], 2, "f", config)


@pytest.mark.parametrize("order", ORDERS)
def test_a_long_history_keeps_pictures_that_are_written_nowhere(order):
    turns, last = chat("a" * 9, "b" * 9, "c?"), raw("c?") + A
    system, config = [("system", "s")], tiny_config(block_size=25)
    assert len(sequence(turns, 2)[0]) > 25  # so the first question loses its text
    assert sequence(turns, 2, None, config, order)[0] == V + V + last
    before = V + V + raw("s\n") if order == "data" else raw("s\n") + V + V
    assert sequence(system + turns, 2, None, config, order)[0] == before + last


def test_pad_batch_pads_with_pad_and_targets_answers_only():
    sequences = [sequence(chat(q), n, a)
                 for q, n, a in [("hm?", 1, "no"), ("a longer one?", 0, "yes"), ("", 2, None)]]
    tokens, roles, targets = pad_batch(sequences)
    assert tokens.shape == roles.shape == targets.shape == (3, max(len(t) for t, _ in sequences))
    assert tokens.dtype == roles.dtype == targets.dtype == torch.int64
    for row, (t, r) in enumerate(sequences):
        n = len(t)
        assert tokens[row].tolist() == t + [259] * (tokens.shape[1] - n)
        assert roles[row].tolist() == r + [PAD] * (tokens.shape[1] - n)
        expected = [token if role == ANSWER else -100 for token, role in zip(t, r)]
        assert targets[row].tolist() == expected + [-100] * (tokens.shape[1] - n)
    assert (targets >= 0).sum(1).tolist() == [3, 4, 0]
