"""What a frozen ViT says of each picture: computed once, in a file that runs share."""
import hashlib
import os
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.llava import Records, say_once
from engine.device import autocast
from engine.folder import try_to_lock
from engine.processes import rank_and_world, total
from nanoaki import NanoAKI, fit_picture

KEY = 32      # bytes before each picture's states: their digest's, written after them
AT_ONCE = 32  # pictures that the ViT looks at


class Features:
    """features[path] are the ViT's states of a picture, float16 (patches, vit_embd)."""

    def __init__(self, folder: Path, shown: list[Records], others: list[Records], model: NanoAKI,
                 bfloat16: bool = False):
        """A row of a file in the folder for each picture; those of the records shown are needed.

        The file's name is of the ViT's weights and type and of all pictures but those of captions
        alone, whose rows come last: so it serves all runs that have these, whatever they need.
        """
        c, digest = model.config, hashlib.sha256(str(bfloat16).encode())
        for weights in model.vit.state_dict().values():
            digest.update(weights.cpu().numpy().tobytes())
        self.weights, asked, captioned, needed = digest.hexdigest(), set(), set(), set()
        for n, some in enumerate([*shown, *others]):
            paths = {some.path.parent / path for record in some for path in record.pictures}
            if some.path.stem == "captions":
                captioned |= paths
            else:
                asked |= paths
            if n < len(shown):
                needed |= paths
        first = sorted(asked)
        for path in first:
            digest.update(f"{path}\n".encode("utf-8", "surrogateescape"))
        self.file = folder / f"features-{digest.hexdigest()[:12]}.f16"
        self.rows = {path: row for row, path in enumerate(first + sorted(captioned - asked))}
        self.needed, self.shape = sorted(needed), (c.patches, c.vit_embd)
        self.size = KEY + 2 * c.patches * c.vit_embd

    def key(self, path: Path) -> bytes:
        """Of a picture's path, size and time, and of the weights; raises ValueError."""
        try:
            status = os.stat(path)
        except OSError as e:
            raise ValueError(f"{path}: {e.strerror}") from None
        about = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {self.weights}"
        return hashlib.sha256(about.encode()).digest()

    def __getitem__(self, path: Path) -> Tensor:
        """Raises ValueError where the picture is not as it was, or could not be read then."""
        with open(self.file, "rb") as file:
            file.seek(self.rows[path] * self.size)
            row = bytearray(file.read(self.size).ljust(self.size, b"\0"))  # it may end before
        if not any(row[:KEY]):
            raise ValueError(f"{path}: could not be read when the ViT looked at it")
        if row[:KEY] != self.key(path):
            raise ValueError(f"{path}: changed since the ViT looked at it")
        return torch.frombuffer(row, dtype=torch.float16, offset=KEY).view(self.shape)

    def missing(self) -> list[Path]:
        """The pictures that are needed, and not in the file as they are now."""
        if not self.file.exists():
            return self.needed
        with open(self.file, "rb") as file:
            return [path for path in self.needed if not self.has(file, path)]

    def has(self, file, path: Path) -> bool:
        file.seek(self.rows[path] * self.size)
        try:
            return file.read(KEY) == self.key(path)
        except ValueError:  # it is gone
            return False

    def check_room(self) -> None:
        """Say how much the file will hold; raises ValueError where its disk has no room for it."""
        there = [folder for folder in self.file.absolute().parents if folder.exists()][0]
        if not there.is_dir():
            raise ValueError(f"--features: {there} is no folder")
        missing, free = len(self.missing()), shutil.disk_usage(there).free
        needed = missing * self.size
        print(f"the ViT is frozen and looks at each picture once: {missing:,} of "
              f"{len(self.needed):,} are left, {needed / 1e9:.2f} GB for {self.file}")
        if needed > free:
            raise ValueError(f"{self.file}: its disk has {free / 1e9:.2f} GB left, which are less "
                             f"than {needed / 1e9:.2f} GB: fewer pictures, a smaller --image-size, "
                             f"or another place, --features")

    def fill(self, model: NanoAKI, dtype: str, skip_bad: bool) -> None:
        """Look at all pictures that are missing, a share of them in every process.

        While another run is looking, wait: it may look at the same. Raises ValueError where a
        picture is broken, but leaves it out with skip_bad.
        """
        (rank, world), device = rank_and_world(), next(model.parameters()).device
        said = set()
        if not total(len(self.missing()))[0]:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        with open(self.file, "r+b") as file:
            while total(float(rank == 0 and not try_to_lock(file)))[0]:
                say_once(f"{self.file}: another run is looking; this one waits for it", said)
                time.sleep(0.5)
            # By row: another process may be at work before this one knows what is missing.
            mine = [path for path in self.missing() if self.rows[path] % world == rank]
            bar = tqdm(total=len(mine), desc="looking", unit="picture", leave=False,
                       disable=rank > 0)
            for at in range(0, len(mine), AT_ONCE):
                some = mine[at:at + AT_ONCE]
                found = self.read(some, model.config.image_size, skip_bad)
                if found:
                    pictures = torch.stack([picture for _, _, picture in found]).to(device)
                    with torch.no_grad(), autocast(device, dtype):
                        states = model.vit(pictures).to(torch.float16).cpu()
                    for (path, key, _), state in zip(found, states):
                        start = self.rows[path] * self.size
                        file.seek(start + KEY)
                        file.write(state.numpy().tobytes())
                        file.seek(start)
                        file.write(key)
                    file.flush()
                bar.update(len(some))
            bar.close()
            total(0)  # another: from here on the shares of all are there

    def read(self, paths: list[Path], size: int, skip_bad: bool) -> list[tuple]:
        """(path, key, picture) of those that can be read; ValueError where one cannot, and must.

        Of the others training says, when it leaves them out, that they could not be read.
        """
        found = []
        for path in paths:
            try:
                found.append((path, self.key(path), fit_picture(path, size)))
            except ValueError as e:
                if not skip_bad:
                    raise ValueError(f"{e}; --skip-bad, also with --resume, leaves it out") from e
        return found
