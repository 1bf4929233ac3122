"""Command lines: a flag for every field of a dataclass, and one clear line where one is wrong."""
import argparse
import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from engine.device import explain

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def fail(message) -> None:
    """One clear line on standard error, exit code 2."""
    shown = escaped(str(message), keep="\n")
    print(f"{Path(sys.argv[0]).name}: {shown}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_line():
    """Within, what is wrong with a user's input or machine ends the program with one line."""
    try:
        yield
    except BrokenPipeError:  # is run_script's
        raise
    except (ValueError, OSError, FloatingPointError, OverflowError) as e:
        fail(e)
    except MemoryError as e:
        fail(f"not enough memory: {e}")
    except RuntimeError as e:
        reason = explain(e)
        if reason is None:
            raise
        fail(reason)


def leave(number: int, frame) -> None:
    """A signal's handler: end, without reports of what is half-built then, as a bar may be."""
    sys.unraisablehook = lambda report: None
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def run_script(main) -> None:
    """A script's main, on a console that may not know every character.

    Ctrl-C ends it quietly, and so does a reader that has enough, as head does.
    """
    sys.stdout.reconfigure(errors="replace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, leave)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped; what was saved is whole", file=sys.stderr)
        raise SystemExit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        raise SystemExit(1)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which suggests the nearest flag."""

    def __init__(self, doc: str):
        super().__init__(description=doc.strip().splitlines()[0], allow_abbrev=False)

    def error(self, message):
        fail(f"{message} (--help lists the flags)")

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = list(self._option_string_actions)
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
            fail(f"no such flag: {unknown[0]}; {hint}")
        return known

    def add_fields(self, title: str, cls, **helps: str) -> None:
        """A flag for every field of a dataclass that has none yet, absent where it is not given.

        A field's help is its metadata's, or what helps says of it; argparse.SUPPRESS leaves it out.
        """
        group = self.add_argument_group(title)
        for f in fields(cls):
            left_out = helps.get(f.name) == argparse.SUPPRESS
            if left_out or flag(f.name) in self._option_string_actions:
                continue
            how = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
            about = helps.get(f.name, f"{f.metadata['help']} (default {f.default!r})")
            group.add_argument(flag(f.name), **how, default=argparse.SUPPRESS,
                               help=about.replace("%", "%%"))  # else argparse fills it in


def check_asked(questions: list[str]) -> None:
    """Raise ValueError where one says nothing, not even that there is a picture."""
    for n, question in enumerate(questions, 1):
        if not question.strip():
            raise ValueError(f'--ask: question {n} is empty; "<image>" is a picture and no word')


def escaped(text: str, keep: str = "") -> str:
    """Text whose control characters, which a terminal would obey, are escaped, but some to keep."""
    shown = [c if c in keep or not CONTROL.match(c) else c.encode("unicode_escape").decode()
             for c in text]
    return "".join(shown)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def pick(cls, flags: dict) -> dict:
    """The flags that are fields of a dataclass."""
    return {f.name: flags[f.name] for f in fields(cls) if f.name in flags}


def as_command(script: str, flags: dict) -> list[str]:
    """The command that gives a script these flags."""
    command = ["python", script]
    for name, value in flags.items():
        command.append(flag(name))
        if value is not True:
            command.append(str(value))
    return command


def quoted(command: list[str]) -> str:
    """A command as it is typed on this system."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
