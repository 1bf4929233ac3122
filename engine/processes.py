"""Processes: torchrun's, which agree on the CPU; a loader's workers; and the signals to them."""
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Callable, Iterator

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, StackDataset

from engine.flags import fail


PROCESS_GROUPS = []  # kept: DDP, as the last to let go of one, waits for its threads for ever


@contextmanager
def joined_processes():
    """Within, those that torchrun has started, if it has, are one group.

    They talk through gloo: what they agree on is known on the CPU, whatever the device will be.
    """
    if "WORLD_SIZE" in os.environ:
        wanted = ("RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in wanted if name not in os.environ]
        if missing:
            fail(f"WORLD_SIZE is set, but not {', '.join(missing)}: start with torchrun")
        try:
            dist.init_process_group("gloo", timeout=timedelta(hours=2))  # while the first one reads
        except (ValueError, RuntimeError) as e:
            fail(f"torchrun's variables do not work: {e}")
    try:
        with redirect_stdout(open(os.devnull, "w") if rank_and_world()[0] else sys.stdout):
            yield
    except RuntimeError as e:
        if "gloo" not in str(e):
            raise
        fail("another process has ended")  # it has said why
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(*numbers: float) -> list[float]:
    """Each number, summed over all processes."""
    if not dist.is_initialized():
        return list(numbers)
    summed = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.tolist()


def first_does(work: Callable):
    """What work() returns in the first process, for all of them; if it raises, all end."""
    rank, world = rank_and_world()
    if world == 1:
        return work()
    went_well, result = False, None
    try:
        if rank == 0:
            result, went_well = work(), True
    finally:
        told = [went_well, result]
        dist.broadcast_object_list(told)
    went_well, result = told
    if not went_well:
        raise SystemExit(2)
    return result


def in_parallel(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A module whose gradients are the mean over all processes."""
    if not dist.is_initialized():
        return module
    if device.type == "mps":
        raise ValueError("several processes need --device cpu, or CUDA")
    group = dist.new_group(backend="nccl") if device.type == "cuda" else dist.group.WORLD
    PROCESS_GROUPS.append(group)
    return DistributedDataParallel(module, process_group=group)


def load(parts: list[Dataset], start: int, workers: int, device: torch.device) -> Iterator[tuple]:
    """For each step from start on, what each dataset has; -1 workers are one, on a GPU four."""
    if workers < 0:
        workers = 4 if device.type == "cuda" else 1
    loader = DataLoader(StackDataset(*parts), batch_size=None, sampler=range(start, len(parts[0])),
                        num_workers=workers, pin_memory=device.type == "cuda",
                        worker_init_fn=leave_group, prefetch_factor=4 if workers else None)
    with signals_blocked():
        return iter(loader)


GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM}  # what terminals and schedulers send to a group


@contextmanager
def signals_blocked():
    """A process started within gets no signal of its group before it has called leave_group."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_group(worker: int = 0) -> None:
    """Signals to the group, as Ctrl-C, are for the process that started this one: it ends it."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
        while True:
            pending = signal.sigpending() & GROUP_SIGNALS
            if not pending:
                break
            signal.sigwait(pending)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
        served = multiprocessing.get_start_method() == "forkserver"  # which is the parent then
        if not served and os.getppid() != multiprocessing.parent_process().pid:
            sys.exit(1)  # it is dead: torch's own watch begins after this, and would not see it


class StopSignal:
    """Within, SIGINT and SIGTERM are kept in .number; a second one of either kind ends at once."""
    number = 0

    def __enter__(self):
        self.before = {n: signal.signal(n, self.keep) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def keep(self, number: int, frame) -> None:
        self.number = number
        for again in self.before:
            signal.signal(again, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
