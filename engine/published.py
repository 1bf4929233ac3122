"""A folder of published weights, as the Hugging Face hub has them: its config and its tensors."""
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
    found, end = {}, 0
    try:
        size = path.stat().st_size
        whole = torch.from_file(str(path), size=size, dtype=torch.uint8)
        start = 8 + int.from_bytes(whole[:8].numpy().tobytes(), "little")
        if not 8 < start <= size:
            raise ValueError("no header's length in its first bytes: a git-lfs pointer, perhaps?")
        header = json.loads(whole[8:start].numpy().tobytes())
        header.pop("__metadata__", None)
        for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if about["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of {about['dtype']}, not {', '.join(DTYPES)}")
            dtype, shape = DTYPES[about["dtype"]], about["shape"]
            first, last = about["data_offsets"]
            if not (end == first <= last <= size - start and min(shape, default=0) >= 0
                    and last - first == math.prod(shape) * dtype.itemsize):
                raise ValueError(f"bytes {first} to {last}, after {end}, for {name}, {shape}")
            raw, end = whole[start + first:start + last], last
            if (start + first) % dtype.itemsize:
                raw = raw.clone()
            found[name] = raw.view(dtype).view(shape)
        if end != size - start:
            raise ValueError(f"{end} bytes of tensors in {size - start}")
    except Exception as e:  # whatever the bytes make json and torch raise
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"{path}: not a whole safetensors file ({reason})") from e
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
        self.type, own = config.get("model_type"), config.get("vision_config", config)
        if self.type not in list(defaults):
            raise ValueError(f"{self.config_path}: model_type {self.type!r} is none of "
                             f"{', '.join(defaults)}")
        if not isinstance(own, dict):
            raise ValueError(f"{self.config_path}: vision_config must be an object, not {own!r}")
        self.config = defaults[self.type] | own
        if not self.path.exists():
            raise ValueError(f"{folder}: there is no model.safetensors; pickles (.bin, .pt) are "
                             f"not opened, nor files in several parts")
        self.tensors = read_tensors(self.path)
        roots = [key.partition(landmark)[0] for key in self.tensors if landmark in key]
        if not roots:
            raise ValueError(f"{self.path}: there is no {landmark}")
        self.root = roots[0]

    def number(self, key: str, kind=int):
        """A number of the config, above 0 and of that type; raises ValueError."""
        value = self.config.get(key)
        if type(value) is not kind or value <= 0:
            what = {int: "a whole number", float: "a fraction"}[kind]
            raise ValueError(f"{self.config_path}: {key} must be {what} above 0, not {value!r}")
        return value

    def one_of(self, key: str, *choices):
        """The config's value, if it is among those; raises ValueError."""
        value = self.config.get(key)
        if value not in choices:
            raise ValueError(f"{self.config_path}: {key} must be "
                             f"{' or '.join(map(repr, choices))}, not {value!r}")
        return value

    def take(self, key: str, *shape: int | None) -> Tensor:
        """A tensor of the root, in float32, of that shape; None is any size. Raises ValueError."""
        key = self.root + key
        if key not in self.tensors:
            raise ValueError(f"{self.path}: there is no {key}")
        tensor = self.tensors.pop(key)
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{self.path}: {key} has not only finite floats")
        found = tensor.to(torch.float32, copy=True)  # the file's map can be let go
        sizes = tuple(found.shape)
        wanted = tuple(size if want is None else want for want, size in zip(shape, sizes))
        if len(sizes) != len(shape) or sizes != wanted:
            raise ValueError(f"{self.path}: {key} is {sizes}, not {shape}")
        return found

    def take_layer(self, ours: str, key: str, *shape: int | None, turned=False) -> dict:
        """Weight and bias under our name; turned, the weight stands there as (columns, rows)."""
        weight = self.take(f"{key}.weight", *(shape[::-1] if turned else shape))
        if turned:
            weight = weight.t().contiguous()
        return {f"{ours}.weight": weight, f"{ours}.bias": self.take(f"{key}.bias", len(weight))}

    def take_block(self, key: str, names: dict[str, str], C: int, turned=False) -> dict:
        """The weights of a Block of width C whose layers are called names[ours] below key.

        An MLP of less than 4 C is filled up with zeros, which change nothing. Raises ValueError.
        """
        found = self.take_layer("up", key + names["up"], None, C, turned=turned)
        inner = len(found["up.bias"])
        spare = 4 * C - inner
        if spare < 0:
            raise ValueError(f"{self.path}: {self.root}{key}{names['up']} makes {inner} numbers, "
                             f"more than 4 times the {C} of its block")
        shapes = {"norm1": (C,), "norm2": (C,), "qkv": (3 * C, C), "down": (C, inner)}
        for ours, name in names.items():
            if ours != "up":
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
