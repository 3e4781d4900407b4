"""How much memory is free, and an error before an allocation that does not fit."""

import os
from pathlib import Path

import torch

from .world import processes_on_this_machine

_ALWAYS_THERE = 2**26


def _cgroup_headroom() -> int | None:
    """Bytes left under this process's cgroup (v2, then v1), or None where no limit is set."""
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return int(Path(limit_file).read_text()) - int(Path(used_file).read_text())
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return None


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``, or None where the platform does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    if device.type != "cpu":
        return None
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:  # no /proc, as on macOS: the machine's whole memory is an upper bound
            free_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
    headroom = _cgroup_headroom()
    # All processes that train on this machine share it.
    return (free_bytes if headroom is None else min(free_bytes, headroom)) // processes_on_this_machine()


def fits(needed: int, device: torch.device) -> bool:
    """Whether so many bytes can be allocated; True where that is unknown."""
    if needed < _ALWAYS_THERE:  # asking the system takes 0.25 ms
        return True
    available = available_bytes(device)
    return available is None or needed <= available


def require_memory(needed: int, device: torch.device, what: str, advice: str) -> None:
    """Raise a MemoryError, which says what needs the memory and gives advice, before an allocation that cannot fit."""
    if not fits(needed, device):
        available = (available_bytes(device) or 0) / 1e9
        raise MemoryError(
            f"{what} needs {needed / 1e9:.3g} GB in all, but only {available:.3g} GB are available on {device}. {advice}"
        )
