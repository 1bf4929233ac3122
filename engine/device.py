"""The device: which one, in what precision, and how a batch gets there."""
import ctypes
import os
import sys

import torch

from nanoaki import Batch


def choose_device(name: str, dtype: str = "auto") -> tuple[torch.device, str]:
    """The device asked for, or the best there is, and a line that says why; raises ValueError."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [device for device in has if has[device]]
    if name != "auto" and name not in found:
        raise ValueError(f"device {name!r} must be auto or one that torch {torch.__version__} "
                         f"finds here: {', '.join(found)}")
    device = found[0] if name == "auto" else name
    what = f"{torch.get_num_threads()} threads"
    if device == "cuda":
        number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= gpus:
            raise ValueError(f"process {number} of this machine has no GPU: there are {gpus}")
        torch.cuda.set_device(number)
        what = torch.cuda.get_device_name()
    why = {"cuda": "a CUDA GPU was found", "mps": "an Apple GPU was found", "cpu": "no GPU found"}
    reason = why[device] if name == "auto" else "asked for"
    precision = "bfloat16" if in_bfloat16(device, dtype) else "float32"
    return torch.device(device), f"device: {device}, {what}, {precision} ({reason})"


def in_bfloat16(device: str, dtype: str) -> bool:
    """Whether to compute in bfloat16: if asked for; by auto, on GPUs that do not emulate it."""
    if dtype == "auto":
        return device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    return dtype == "bfloat16"


def autocast(device: torch.device, dtype: str = "auto") -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device.type, dtype))


class Objective(torch.nn.Module):
    """A model's training loss as a module's forward, which DDP and torch.compile can wrap."""

    def __init__(self, model, device: torch.device, dtype: str):
        super().__init__()
        self.model, self.device, self.dtype = model, device, dtype

    def forward(self, batch: Batch, mask: str) -> torch.Tensor:
        """Mean over the targets of a batch, which is brought to the device."""
        gpu = self.device.type == "cuda"  # on MPS, a copy that does not block may read freed memory
        batch = Batch(*(value.to(self.device, non_blocking=gpu) if torch.is_tensor(value) else value
                        for value in batch))
        with autocast(self.device, self.dtype):
            return self.model.loss(batch, mask)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks: to return and fault them in anew costs a tenth of a CPU step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def explain(error: RuntimeError) -> str | None:
    """One line on what torch raises because of a flag, and what helps; None of anything else."""
    module, lines = type(error).__module__, str(error).strip().splitlines() or [""]
    reason = lines[0][:200]
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return f"not enough memory: a smaller model, --batch-size, or more --grad-accum ({reason})"
    if module.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile or --attention flex does not work here, leave it out ({reason})"
    if "DataLoader worker" in str(error):
        return f"--workers: one has ended; 0 reads in the training process ({reason})"
    if isinstance(error, (NotImplementedError, torch.AcceleratorError)) or "CUDA" in reason:
        return f"--device: it cannot do this ({reason})"
    if "overflow" in reason:
        return f"a number is too large ({reason})"
    return None
