"""A folder of published weights, as the Hugging Face hub has them: what it says, and its tensors."""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, mapped: eight bytes, that many of JSON, raw numbers.

    Raises ValueError where something is not as github.com/huggingface/safetensors specifies it.
    """
    size, found = path.stat().st_size, {}
    try:
        whole = torch.from_file(str(path), size=size, dtype=torch.uint8)
        start = 8 + int.from_bytes(whole[:8].numpy().tobytes(), "little")
        if not 8 < start <= size:
            raise ValueError(f"a header up to byte {start} of {size}")
        header = json.loads(whole[8:start].numpy().tobytes())
        header.pop("__metadata__", None)
        for name, about in header.items():
            dtype, shape = DTYPES[about["dtype"]], about["shape"]
            first, last = about["data_offsets"]
            if not (0 <= first <= last <= size - start and min(shape, default=0) >= 0
                    and last - first == math.prod(shape) * dtype.itemsize):
                raise ValueError(f"bytes {first} to {last} for {name}, {shape} of {dtype}")
            raw = whole[start + first:start + last]
            if (start + first) % dtype.itemsize:
                raw = raw.clone()
            found[name] = raw.view(dtype).view(shape)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError) as e:
        raise ValueError(f"{path}: not a whole safetensors file ({type(e).__name__}: {e})") from e
    return found


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises ValueError on anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e})") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found


class Published:
    """A folder's config, and its tensors, which are taken one by one until none is left."""

    def __init__(self, folder: Path, defaults: dict[str, dict], landmark: str):
        """defaults are each model_type's; a key is the root of all, then landmark, which it has."""
        self.config_path, self.path = folder / "config.json", folder / "model.safetensors"
        config = read_json(self.config_path)
        self.type = config.get("model_type")
        if self.type not in defaults:
            raise ValueError(f"{self.config_path}: model_type {self.type!r} is none of "
                             f"{', '.join(defaults)}")
        self.config = defaults[self.type] | config.get("vision_config", config)
        if not self.path.exists():
            raise ValueError(f"{folder}: there is no model.safetensors, and pickles (.bin, .pt) "
                             f"are not opened: the hub can convert them")
        self.tensors = read_tensors(self.path)
        roots = [key.partition(landmark)[0] for key in self.tensors if landmark in key]
        if not roots:
            raise ValueError(f"{self.path}: no key has {landmark}")
        self.root = roots[0]

    def number(self, key: str) -> int:
        """A whole number of the config, at least 1; raises ValueError."""
        value = self.config.get(key)
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.config_path}: {key} must be a whole number, not {value!r}")
        return value

    def choose(self, key: str, choices: dict):
        """What stands in choices for the config's value; raises ValueError where nothing does."""
        value = self.config.get(key)
        if value not in choices:
            raise ValueError(f"{self.config_path}: {key} {value!r} is none of "
                             f"{', '.join(map(str, choices))}")
        return choices[value]

    def take(self, key: str, *shape: int | None) -> Tensor:
        """A tensor of the root, in float32, with those sizes; None is any. Raises ValueError."""
        key = self.root + key
        if key not in self.tensors:
            raise ValueError(f"{self.path}: there is no {key}")
        found = self.tensors.pop(key).to(torch.float32, copy=True)  # the file's map can be let go
        sizes = tuple(found.shape)
        if len(sizes) != len(shape) or any(wanted not in (None, size)
                                           for wanted, size in zip(shape, sizes)):
            raise ValueError(f"{self.path}: {key} is {sizes}, not {shape}")
        return found

    def take_layer(self, ours: str, key: str, *shape: int | None, turned=False) -> dict[str, Tensor]:
        """Weight and bias under our name; turned, the weight stands there as (columns, rows)."""
        weight = self.take(f"{key}.weight", *(shape[::-1] if turned else shape))
        return {f"{ours}.weight": weight.t() if turned else weight,
                f"{ours}.bias": self.take(f"{key}.bias", shape[0])}

    def take_block(self, key: str, names: dict[str, str], C: int, turned=False) -> dict[str, Tensor]:
        """The weights of a Block of width C whose layers are called names[ours] below key.

        An MLP of less than 4 C is filled with zeros, which change nothing. Raises ValueError.
        """
        up = f"{self.root}{key}{names['up']}.bias"
        inner = len(self.tensors.get(up, []))
        if not 0 < inner <= 4 * C:
            raise ValueError(f"{self.path}: {up} must have at most 4 times the {C} numbers of the "
                             f"block's width, and it has {inner}")
        shapes = {"norm1": (C,), "norm2": (C,), "qkv": (3 * C, C), "up": (inner, C),
                  "down": (C, inner)}
        found, spare = {}, 4 * C - inner
        for ours, name in names.items():
            shape = shapes.get(ours, (C, C))
            found |= self.take_layer(ours, key + name, *shape, turned=turned)
        if "q" in names:
            for kind in ("weight", "bias"):
                found[f"qkv.{kind}"] = torch.cat([found.pop(f"{part}.{kind}") for part in "qkv"])
        found["up.weight"] = F.pad(found["up.weight"], (0, 0, 0, spare))
        found["up.bias"] = F.pad(found["up.bias"], (0, spare))
        found["down.weight"] = F.pad(found["down.weight"], (0, spare))
        return found

    def refuse_rest(self, *ignored: str) -> None:
        """Raise ValueError that names a tensor of the root for which nothing here has a place."""
        for key in self.tensors:
            if key.startswith(self.root) and not any(part in key for part in ignored):
                raise ValueError(f"{self.path}: {key} has no place in nanoAKI's model")
