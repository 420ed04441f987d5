"""What this machine has to offer: memory that is free, and how fast it multiplies."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["free_memory", "multiplications"]

_SHAPE = (2048, 576, 1536)  # of a small model's linears, for a batch of tokens
_PROBE = 0.3  # seconds
# Of a memory cgroup, its files for limit and use, and the line of memory.stat with what can be dropped: version 2, 1.
_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@functools.cache
def multiplications() -> float:
    """float32 operations a second (an addition is one, too) of matrix products, measured when it is first asked for."""
    tokens, width, out = _SHAPE
    x, weight = torch.ones(tokens, width), torch.ones(width, out)
    torch.mm(x, weight)  # starts the threads
    start, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < _PROBE:
        torch.mm(x, weight)
        count += 1
    return 2 * tokens * width * out * count / taken


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a process may still take: what the system calls available, or less if a cgroup limits it.

    None if the system does not say, as on other systems than Linux.
    """
    found = [*_available(root), *_within_cgroups(root)]
    return max(0, min(found)) if found else None


def _available(root: Path) -> Iterator[int]:
    with suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _within_cgroups(root: Path) -> Iterator[int]:
    """Of each memory cgroup that this process is in, limit - use, files that can be dropped aside."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            here = mount / path.lstrip("/")
            # In a container the path may be that outside of it, and the mount itself is the process's group.
            for folder in {mount, *(f for f in (here, *here.parents) if f.is_relative_to(mount))}:
                yield from _limit(folder)


def _limit(folder: Path) -> Iterator[int]:
    for limit, use, dropped in _CGROUPS:
        with suppress(OSError, ValueError):  # ValueError: "max", which is none
            most, used = (int((folder / name).read_text()) for name in (limit, use))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield most - used + int(stat.get(dropped, 0))
