"""The device and the machine of a run: choosing, naming, memory, random state."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Names in malloc.h."""


def choose_device(name: str) -> torch.device:
    """The device that a flag names, or ValueError; auto is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(:(\d+))?", name)
    if match is None:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(match[2] or 0) >= count:
            raise ValueError(f"device {name} is not there: torch finds {count} GPUs; use cpu")
    return torch.device(name)


def hardware(device: torch.device) -> str:
    """What timings have to say about where they were measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} thread(s)"


def cpu_name() -> str:
    """Name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and torch, on which numbers depend."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's random streams, on the CPU and a device, for `set_random_state`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Take over what `random_state` returned, on the CPU and, if both have one, on a GPU."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def keep_freed_memory() -> None:
    """Have the C library hold on to freed memory for what is allocated next.

    It would give large blocks back to the kernel, which hands out new ones page by page, in every
    training step. glibc only; elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or none
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # bytes; the largest that glibc takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_ARENA_MAX, 1)  # those of further threads give their memory back


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on the CPU torch says so in a RuntimeError of its own words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
