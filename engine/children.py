"""Processes that a driver starts: each in a folder, with its log, and waited for if it dies."""
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO


def wait_for_others(out: Path) -> TextIO:
    """A file whose lock lasts as long as any process that was started with it.

    Waits for those that another driver started, which was killed.
    """
    at_work = open(out / "at-work", "w+")
    with suppress(ImportError):  # Windows has none
        import fcntl
        try:
            fcntl.flock(at_work, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf's would not be inherited
        except BlockingIOError:
            print(f"{out}: waiting for what was started before and goes on", file=sys.stderr)
            fcntl.flock(at_work, fcntl.LOCK_EX)
        except OSError:
            print(f"{out}: this file system has no locks; see that nothing is at work there")
    return at_work


def start(command: list[str], folder: Path, threads: int, at_work: TextIO) -> subprocess.Popen:
    """Start a process whose output goes to a folder's log.txt, out of the reach of Ctrl-C."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        print(f"\n$ {shlex.join(command)}", file=log, flush=True)
        return subprocess.Popen(command, stdin=at_work, stdout=log, stderr=subprocess.STDOUT,
                                env=environment, start_new_session=True)


def stop(processes: list[subprocess.Popen]) -> None:
    """Ask processes to end, and wait until they have saved what they have."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def failure(folder: Path, code: int) -> ValueError:
    """What the last process in a folder has failed with, and where all that it said is."""
    log = folder / "log.txt"
    said = log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2].splitlines()
    errors = [line for line in said if line.startswith(("train.py: ", "sample.py: "))]
    error = errors[-1] if errors else f"exit code {code}"
    return ValueError(f"{folder}: {error} (all that it said: {log})")
