"""What the pages show is there and works: links, commands, the two lines of the mask, the tree."""
import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), ROOT / "data/README.md"]
# (links, commands): where fewer are found, it is the finding that fails
LEAST = {"README.md": (12, 16), "docs/claim.md": (10, 5), "docs/running.md": (9, 12),
         "docs/pretrained.md": (10, 9), "data/README.md": (0, 2)}
MODULES = {"train.py": "train", "sample.py": "sample", "draw.py": "draw", "compare.py": "compare",
           "engine/pretrained.py": "engine.pretrained", "engine/memory.py": "engine.memory",
           "tests/bench.py": "bench"}
DATASETS = {"data/shapes.py": "shapes", "data/digits.py": "digits", "data/photos.py": "photos"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def least(page: Path) -> tuple[int, int]:
    return LEAST.get(name(page), (0, 0))


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


# Links -------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Targets of a page's links and pictures, but for those on other sites."""
    targets = re.findall(r"\]\(([^)]*)\)", re.sub(r"`[^`]*`", "code", prose(text)))
    return [target for target in targets if not re.match(r"\w+:", target)]


def broken(page: Path, text: str) -> list[str]:
    """The links of a text on that page that lead nowhere."""
    bad = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if not there.exists() or anchor and anchor not in anchors(there):
            bad.append(target)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = page.read_text()
    assert len(links(text)) >= least(page)[0]
    assert broken(page, text) == []


def test_a_link_that_leads_nowhere_is_found():
    text = "[a](train.py) [b](https://no.where/x) ![c](trian.png) [d](docs/claim.md#no) [e](#no)"
    assert broken(README, text) == ["trian.png", "docs/claim.md#no", "#no"]


# Commands ----------------------------------------------------------------------------------------


def shell_lines(text: str) -> list[str]:
    """The lines of a page's sh blocks, continued ones as one, and the commands within its text."""
    lines = []
    for language, code in blocks(text):
        if language == "sh":
            lines += code.replace("\\\n", " ").splitlines()
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]
    return lines + [code for code in inline if re.match(r"(\w+=\S+ )*(python3?|torchrun) ", code)]


def words_of_commands(line: str) -> list[list[str]]:
    """The words of each command of a line of shell, without comments and what it sets before."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands = [[]]
    for word in lexer:
        if word in ("&&", "||", "|", ";"):
            commands.append([])
        elif commands[-1] or not re.match(r"\w+=", word):
            commands[-1].append(word)
    return [words for words in commands if words]


def python_commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of all commands of a page that run a Python file."""
    found = []
    for line in shell_lines(text):
        for program, *words in words_of_commands(line):
            program = Path(program).name
            if program in ("python", "python3") and words[0] != "-m":
                found.append((words[0], words[1:]))
            elif program == "torchrun":
                run = get_args_parser().parse_args(words)
                found.append((run.training_script, run.training_script_args))
    return found


def parser_of(script: str) -> argparse.ArgumentParser:
    """A script's own parser; raises KeyError if it is none of ours."""
    if script == "nanoaki.py":
        return argparse.ArgumentParser()  # it has no flags
    if script in DATASETS:
        pictures = Path(".") if script == "data/photos.py" else None
        return importlib.import_module("data.scenes").make_parser(DATASETS[script], pictures)
    return importlib.import_module(MODULES[script]).make_parser()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_is_understood_by_its_script(page):
    commands = python_commands(page.read_text())
    assert len(commands) >= least(page)[1]
    for script, arguments in commands:
        try:
            parser_of(script).parse_args(arguments)
        except SystemExit as end:
            if end.code != 0:  # --help ends with 0
                pytest.fail(f"{name(page)}: python {shlex.join([script, *arguments])}")


@pytest.mark.parametrize("shown", ["```sh\n{}  # so\n```\n", "so: `{}`."], ids=["block", "inline"])
@pytest.mark.parametrize("command, right, wrong", [
    ("python train.py --{} 5", "steps", "setps"),
    ("python sample.py --data DIR --{} test", "split", "part"),
    ("python draw.py --ask a --{} b", "out", "colour"),
    ("OMP_NUM_THREADS=1 python3 compare.py --{} causal,mma", "masks", "mask-names"),
    ("python data/digits.py --{} 1", "seed", "sed"),
    ("python tests/bench.py --{} 3", "kills", "kill-all"),
    ("torchrun --nproc_per_node=2 train.py --{} 5", "steps", "setps"),
    ("torchrun --{}=2 train.py --steps 5", "nproc_per_node", "nproc_for_node")])
def test_a_flag_that_does_not_exist_is_found(shown, command, right, wrong):
    for script, arguments in python_commands(shown.format(command.format(right))):
        parser_of(script).parse_args(arguments)
    with pytest.raises(SystemExit):
        for script, arguments in python_commands(shown.format(command.format(wrong))):
            parser_of(script).parse_args(arguments)


def test_a_script_that_is_not_ours_is_found():
    (script, _), = python_commands("`python trian.py --seed 1`")
    with pytest.raises(KeyError):
        parser_of(script)


def test_commands_are_read_as_a_shell_reads_them():
    text = """```sh
pip install a && .venv/bin/python data/digits.py --scenes 3   # python train.py --no
python draw.py --ask "<image>; or # not?" \\
    --out -                                                   # python train.py --no
torchrun --nproc_per_node=2 --rdzv_endpoint=HOST:29400 \\
    train.py --seed 1
python3 -m venv .venv
```
```python
python train.py --no
```
Not `--no`, but `python
train.py --seed 2`."""
    assert python_commands(text) == [
        ("data/digits.py", ["--scenes", "3"]),
        ("draw.py", ["--ask", "<image>; or # not?", "--out", "-"]),
        ("train.py", ["--seed", "1"]), ("train.py", ["--seed", "2"])]


# README ------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_readme_shows_the_lines_of_the_mask():
    code = next(code for language, code in blocks(README.read_text()) if language == "python")
    shown = re.findall(r"^def (\w+)\(q, k\): +(return .*)$", code, re.MULTILINE)
    assert [rule for rule, _ in shown] == ["causal", "mma"]
    source = (ROOT / "nanoaki.py").read_text()
    for rule, line in shown:
        body = source.split(f"\ndef {rule}(q: Token, k: Token)")[1].split("\n\n\n")[0]
        assert body.splitlines()[-1].strip() == line


def test_readme_names_what_lies_at_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip(f"not a git checkout: {tracked.stderr.strip()}")
    tree = next(code for language, code in blocks(README.read_text()) if not language)
    named = []
    for line in tree.splitlines():
        here = re.match(r"[^\s,]+(, [^\s,]+)*", line)[0].split(", ")  # then what is said of them
        named += here
        for file in re.findall(r"\w+\.py", line) if here[0].endswith("/") else []:
            assert (ROOT / here[0] / file).exists(), file
    top = {path.split("/")[0] + "/" * ("/" in path) for path in tracked.stdout.splitlines()}
    assert sorted(named) == sorted(top)
