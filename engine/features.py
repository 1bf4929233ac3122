"""What a frozen ViT says of each picture: computed once, in a file that processes share."""
import hashlib
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.device import autocast
from engine.processes import rank_and_world
from nanoaki import NanoAKI, fit_picture

KEY = 32  # bytes before each picture's states: their digest's, written after them


class Features:
    """features[path] are the ViT's states of a picture, float16 (patches, vit_embd)."""

    def __init__(self, file: Path, pictures: set[Path], model: NanoAKI):
        c, digest = model.config, hashlib.sha256()
        for weights in model.vit.state_dict().values():
            digest.update(weights.cpu().numpy().tobytes())
        self.file, self.shape, self.weights = file, (c.patches, c.vit_embd), digest.hexdigest()
        self.rows = {path: n for n, path in enumerate(sorted(pictures))}
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
            row = bytearray(file.read(self.size))
        if row[:KEY] != self.key(path):
            raise ValueError(f"{path}: changed since the ViT looked at it, or unreadable then")
        return torch.frombuffer(row, dtype=torch.float16, offset=KEY).view(self.shape)

    def fill(self, model: NanoAKI, dtype: str, skip_bad: bool) -> None:
        """Look at all pictures that are not in the file, a share of them in every process.

        Raises ValueError where the disk has no room, or, but for skip_bad, a picture is broken.
        """
        (rank, world), device = rank_and_world(), next(model.parameters()).device
        self.file.touch()
        missing = [path for path in self.rows if not self.has(path)]
        free, needed = shutil.disk_usage(self.file).free, len(missing) * self.size
        print(f"the ViT is frozen and looks at each picture once: {len(missing):,} of "
              f"{len(self.rows):,} are left, {needed / 1e9:.2f} GB for {self.file}")
        if needed > free:
            raise ValueError(f"{self.file}: {needed / 1e9:.2f} GB are more than the {free / 1e9:.2f} "
                             f"GB that its disk has left")
        with (open(self.file, "r+b", buffering=0) as file,
              tqdm(total=len(missing[rank::world]), desc="looking", unit="picture", leave=False,
                   disable=rank > 0) as bar):
            for at in range(rank, len(missing), 32 * world):
                squares = {}
                for path in missing[at:at + 32 * world:world]:
                    try:
                        squares[path] = fit_picture(path, model.config.image_size)
                    except ValueError:
                        if not skip_bad:
                            raise
                    bar.update()
                if squares:
                    with torch.no_grad(), autocast(device, dtype):
                        states = model.vit(torch.stack(list(squares.values())).to(device))
                    for path, some in zip(squares, states.to(torch.float16).cpu()):
                        start = self.rows[path] * self.size
                        file.seek(start + KEY)
                        file.write(some.numpy().tobytes())
                        file.seek(start)
                        file.write(self.key(path))

    def has(self, path: Path) -> bool:
        with open(self.file, "rb") as file:
            file.seek(self.rows[path] * self.size)
            return file.read(KEY) == self.key(path)
