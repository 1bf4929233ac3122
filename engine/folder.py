"""A run's folder: nobody else's while it is in use, nothing in it overwritten, and its metrics."""
import errno
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image


def refuse_used(folder: Path) -> None:
    """Raise ValueError if a folder for a new run holds more than one killed at its very start."""
    early = ("config.json", "log.txt")
    check_writable(folder)
    if folder.exists() and any(f.stat().st_size and f.suffix != ".part" and f.name not in early
                               for f in folder.iterdir()):
        raise ValueError(f"{folder} already holds something: choose another --out; what train.py "
                         f"left there goes on with its --resume")


def check_writable(folder: Path) -> None:
    """Raise ValueError where a folder cannot be made, or nothing can be written into it."""
    there = next(filter(os.path.lexists, [folder, *folder.absolute().parents]), folder)
    if not there.is_dir():
        raise ValueError(f"--out: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--out: nothing can be written into {there}")


@contextmanager
def hold(folder: Path):
    """Keep other processes out of a folder; raises ValueError if one is at work there."""
    lock = locked(folder / "lock")
    while not is_at(lock, folder / "lock"):  # another removed it while this one opened it
        lock.close()
        lock = locked(folder / "lock")
    try:
        yield
    finally:
        with lock, suppress(OSError):
            os.remove(lock.name)


def locked(path: Path):
    """The file at a path, open, and locked where that can be done."""
    lock = open(path, "w")
    with suppress(ImportError):  # Windows has none
        import fcntl
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would outlive it in loaders
        except (BlockingIOError, PermissionError):
            lock.close()
            raise ValueError(f"{path.parent}: another process is at work there") from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            print(f"{path.parent}: this file system has no locks; keep other runs out of it")
    return lock


def try_to_lock(file) -> bool:
    """Whether no other process has an open file locked; it is locked until it is closed."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows has no locks, nor have some file systems
        return True
    return True


def is_at(file, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = Path(f"{path}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # it is still there where that failed


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG file whole or not at all."""
    part = Path(f"{path}.part")
    image.save(part, "PNG")
    part.replace(path)


class Metrics:
    """A file of JSON lines that grows, and is cut to what a checkpoint knows of."""

    def __init__(self, path):
        self.file = open(path, "a+", encoding="utf-8")

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()

    def lines(self) -> list[dict]:
        self.file.seek(0)
        return [json.loads(line) for line in self.file]

    def size(self) -> int:
        """Its bytes, all of them on the disk."""
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def cut(self, size: int) -> None:
        self.file.truncate(min(size, self.size()))
