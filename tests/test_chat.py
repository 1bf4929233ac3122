"""What can be trained can be asked: history, system text and <image> at the command line."""
import json
import shlex

import pytest

import sample
import train
from data.llava import Example, Examples, Records
from engine.command import ask_command
from helpers import TINY, make_tiny, refused
from nanoaki import IMAGE, PAD, NanoAKI

SYSTEM, FIRST = "be brief", "which sides are there?"
ANSWER = "-left, <image>right"  # no picture stands in an answer
WRITTEN = {"data": "<image>\nwhat color is left?", "text": "<image>\nwhat color is left?",
           "image": "what color is\n<image>\nleft?"}  # by order; the last one is not moved


@pytest.fixture(scope="module", params=list(WRITTEN))
def trained(request, tmp_path_factory):
    """A model of each order, and the examples it was trained on: two turns after a system text.

    By turns the picture stands in the second question, in the first one, and is not written.
    """
    order = request.param
    firsts = [FIRST, f"<image>\n{FIRST}", FIRST]
    seconds = [WRITTEN[order], "and left?", "and left?"]
    folder = tmp_path_factory.mktemp("chat")
    data = make_tiny(folder / "data", n=12)
    for split in ("train", "val", "test"):
        records = json.loads((data / f"{split}.json").read_text())
        for i, record in enumerate(records):
            taught = record["conversations"][1]
            record["conversations"] = [
                {"from": "system", "value": SYSTEM},
                {"from": "human", "value": firsts[i % 3]}, {"from": "gpt", "value": ANSWER},
                {"from": "human", "value": seconds[i % 3]}, taught]
        (data / f"{split}.json").write_text(json.dumps(records))
    train.main(["--data", str(data), *TINY, "--block-size", "96", "--align-steps", "0", "--steps",
                "4", "--eval-every", "4", "--order", order, "--out", str(folder / "out")])
    model = NanoAKI.load(folder / "out/model.pt")
    records = Records.read(data, "train.json")
    return folder / "out/model.pt", Examples(records, model.tokenizer, model.config)


in_data_order = pytest.mark.parametrize("trained", ["data"], indirect=True)


@pytest.fixture
def given(monkeypatch):
    """The (tokens, roles) that a model is given from here on; it answers what it was taught."""
    seen = []

    def stream(self, images, tokens, roles, *more, **how):
        for row, role in zip(tokens, roles):
            seen.append((row[role != PAD].tolist(), role[role != PAD].tolist()))
        for new in self.tokenizer.encode(ANSWER):
            yield [new] * len(tokens)

    monkeypatch.setattr(NanoAKI, "stream", stream)
    return seen


@pytest.fixture
def chat(trained, given, monkeypatch, capsys):
    """What a chat prints; `given` then holds what the model was given."""
    def run(lines, *argv):
        given.clear()
        rest = iter(lines)
        monkeypatch.setattr("builtins.input", lambda prompt: next(rest, ""))
        sample.main(["--model", str(trained[0]), "--chat", *map(str, argv)])
        return capsys.readouterr().out.splitlines()

    return run


# The same prompt ---------------------------------------------------------------------------------


def test_a_trained_conversation_is_asked_token_for_token_from_everywhere(
        trained, given, chat, monkeypatch):
    path, examples = trained
    example, model = examples[1], NanoAKI.load(path)
    (_, (_, first), (_, answer), (_, question)) = example.turns
    picture, history = str(example.pictures[0]), [(first, answer)]
    model.ask(picture, question, history=history, system=SYSTEM)
    model.ask(picture, question, history=history)  # the controls: this one and those after it
    model.ask(picture, question, system=SYSTEM)
    model.ask(picture, question.replace("<image>", ""), history=history, system=SYSTEM)
    command = ["--model", str(path), "--image", picture]
    said = ["--system", SYSTEM, f"--history={first}", f"--history={answer}"]
    sample.main([*command, *said, "--ask", question])
    sample.main([*command, "--ask", question])
    lines = iter([question])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    sample.main([*command, *said])
    found = [one == example.prompt for one in given]
    assert found == [True, False, False, False, True, False, True]
    chat([question], "--image", picture, *said)
    assert given == [example.prompt]


def test_a_chat_gives_the_prompts_that_were_trained_on(trained, chat, given):
    _, examples = trained
    late, early = examples[1], examples[3]
    show, written = f"/image {late.pictures[0]}", late.turns[-1][1].replace("\n", "")
    chat([FIRST, show, written], "--system", SYSTEM)
    assert given == [examples[0].prompt, late.prompt]
    chat([FIRST, "and left?", "/new", FIRST, show, written], "--image", early.pictures[0],
         "--system", SYSTEM)
    assert given == [examples[2].prompt, early.prompt, examples[0].prompt, late.prompt]
    chat([FIRST, "and left?", FIRST, show, written], "--image", early.pictures[0], "--system", SYSTEM)
    assert given[2:] != [examples[0].prompt, late.prompt]  # the control: no /new


def test_the_printed_command_gives_the_prompt_of_its_example(trained, given):
    path, examples = trained
    for example in (examples[i] for i in range(6)):
        python, script, *words = shlex.split(ask_command(path, example, examples.config.order))
        assert (python, script) == ("python", "sample.py")
        sample.main(words)
        assert given.pop() == example.prompt
        words[words.index("--system") + 1] += "!"  # the control
        sample.main(words)
        assert given.pop() != example.prompt


# The command's words -----------------------------------------------------------------------------


def example_of(*turns: tuple[str, str], pictures=()) -> Example:
    return Example("", "", list(turns), "", "", ([], []), ([], []), list(pictures))


@pytest.mark.parametrize("order, text, words", [
    ("data", "<image>\nwhat is it?", "what is it?"),
    ("data", "what is it?\n<image>", "what is it?<image>"),
    ("text", "what is it?\n<image>", "what is it?"),
    ("image", "what is it?\n<image>", "what is it?"),
    ("image", "what\n<image>\nis it?", "what<image>is it?"),
    ("data", "<image>\r\n", "<image>"), ("text", "<image>", "<image>")])
def test_image_is_written_only_where_the_picture_would_stand_elsewhere(order, text, words):
    command = ask_command("m.pt", example_of(("human", text), pictures=["a b.png"]), order)
    assert command == shlex.join(["python", "sample.py", "--model", "m.pt", "--image", "a b.png",
                                  "--ask", words])


def test_every_text_passes_through_the_command_line():
    texts = ["-x", "--ask", "-1", "-- x", "it's \"so\"\n$HOME", "--image=x", "", "?"]
    turns = [("gpt" if i % 2 else "human", text) for i, text in enumerate(texts)]
    for system in ("-s", "so"):
        _, _, *words = shlex.split(ask_command("m.pt", example_of(("system", system), *turns),
                                               "data"))
        args = sample.make_parser().parse_args(words)
        assert (args.system, args.history + args.ask) == (system, texts)
    with pytest.raises(SystemExit):  # the control: as they are
        sample.make_parser().parse_args(["--history", *texts[:-1], "--ask", texts[-1]])


@pytest.mark.parametrize("words", ["", " \n"])
def test_a_question_that_says_nothing_is_left_to_be_typed(words):
    turns = [("human", "a"), ("gpt", "b"), ("human", words)]
    _, _, *words = shlex.split(ask_command("m.pt", example_of(*turns), "data"))
    args = sample.make_parser().parse_args(words)
    sample.check(args)
    assert (args.history, args.ask) == (["a", "b"], None)
    args.ask = [""]
    with pytest.raises(ValueError, match="is empty"):  # the control
        sample.check(args)


def test_the_command_is_quoted_for_windows_there(monkeypatch):
    with monkeypatch.context() as windows:
        windows.setattr("os.name", "nt")
        command = ask_command(r"out\m.pt", example_of(("human", "it's so")), "data")
    assert command == r'''python sample.py --model out\m.pt --ask "it's so"'''


# The chat ----------------------------------------------------------------------------------------


@in_data_order
def test_what_cannot_be_asked_is_one_line_and_changes_nothing(chat, trained, given):
    picture = trained[1][1].pictures[0]
    begin, end, bad = ["one?", f"/image {picture}"], ["two?"], {
        "/image gone.png": "gone.png", f"/image {__file__}": "test_chat.py", "/image": "/new",
        "/help": "/image FILE", "why <image><image>?": "3 <image>", "word " * 500: "96 positions"}
    plain = chat([*begin, *end], "--image", picture)
    wanted = list(given)
    said = chat([*begin, *bad, *end], "--image", picture)
    assert given == wanted and said[:4] + said[-1:] == plain and len(plain) == 5
    assert len(said) == 5 + len(bad)
    assert all(word in line for line, word in zip(said[4:], bad.values())), said
    chat([*begin, "/new", *end], "--image", picture)  # the control: a line that changes something
    assert given[0] == wanted[0] and given[1] != wanted[1]


@in_data_order
@pytest.mark.parametrize("first, question", [("<image>one?", "two?"), ("one?", "two<image>?")])
def test_pictures_of_a_history_that_writes_none_stand_where_ask_has_them(
        chat, trained, given, first, question):
    """In the very first question, but where the next one writes them."""
    path, examples = trained
    picture = str(examples[1].pictures[0])
    said = ["--image", picture, "--history", "one?", "one"]
    sample.main(["--model", str(path), *said, "--ask", question])
    (asked,) = given
    chat([question, f"/image {picture}", "three?", "/new", "four?"], *said)
    assert given[0] == asked
    model = NanoAKI.load(path)
    model.ask([picture] * 2, "<image>three?", history=[(first, "one"), (question, ANSWER)])
    model.ask(None, "four?")  # a new chat has no history and no picture
    assert given[1:3] == given[3:]


@in_data_order
@pytest.mark.parametrize("argv, words", [
    (["--chat", "--ask", "x"], ["--ask", "--chat"]),
    (["--ask", "x", "--history", "a", "b", "c"], ["--history", "3 texts"]),
    (["--chat", "--image", "gone.png"], ["gone.png"]),
    (["--image", __file__], ["test_chat.py"]),
    (["--ask", "", "--history", "a", "b"], ["empty"]),
    (["--data", ".", "--chat"], ["--chat does not go with --data"]),
    (["--data", ".", "--system", "x"], ["--system does not go with --data"]),
    (["--data", ".", "--history", "a", "b"], ["--history does not go with --data"])])
def test_what_makes_no_sense_is_refused_in_one_line_before_anything_is_asked(
        capsys, trained, argv, words):
    error = refused(capsys, sample.main, "--model", trained[0], *argv)
    assert all(word in error for word in words), error


@in_data_order
def test_a_question_may_be_a_picture_alone_but_not_empty(capsys, trained, given):
    path, examples = trained
    shown = ["--image", str(examples[1].pictures[0])]
    for more in ([], shown):
        for empty in ("", " "):
            line = refused(capsys, sample.main, "--model", path, *more, "--ask", "a", empty)
            assert "--ask: question 2 is empty" in line
    sample.main(["--model", str(path), *shown, "--ask", "<image>"])
    (tokens, roles), = given
    assert roles.count(IMAGE) == examples.config.visual_tokens == len(tokens) - 1  # and <answer>
