"""What is free in memory, by the files of a system that is made up."""

import pytest

from paley.pipeline.machine import free_memory, multiplications

GIB = 2**30


def write(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def cgroup2(folder, limit, used=GIB, dropped=0):
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {dropped}\n",
    }


SYSTEM = {"proc/meminfo": f"MemTotal: {32 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (SYSTEM, 8 * GIB),
        (SYSTEM | {"proc/self/cgroup": "0::/a/b\n"} | cgroup2("sys/fs/cgroup/a/b", 3 * GIB), 2 * GIB),
        # A parent's limit binds, and so does that of a container, which sees the path outside of it.
        (SYSTEM | {"proc/self/cgroup": "0::/a/b\n"} | cgroup2("sys/fs/cgroup/a", 4 * GIB), 3 * GIB),
        (SYSTEM | {"proc/self/cgroup": "0::/x/y\n"} | cgroup2("sys/fs/cgroup", 5 * GIB), 4 * GIB),
        # Files in the cache can be dropped.
        (SYSTEM | {"proc/self/cgroup": "0::/\n"} | cgroup2("sys/fs/cgroup", 3 * GIB, 2 * GIB, GIB), 2 * GIB),
        (SYSTEM | {"proc/self/cgroup": "0::/\n"} | cgroup2("sys/fs/cgroup", "max"), 8 * GIB),
        (SYSTEM | {"proc/self/cgroup": "0::/\n"} | cgroup2("sys/fs/cgroup", GIB, 2 * GIB), 0),
        (
            SYSTEM
            | {
                "proc/self/cgroup": "5:cpu:/q\n4:memory:/q\n",
                "sys/fs/cgroup/memory/q/memory.limit_in_bytes": f"{6 * GIB}",
                "sys/fs/cgroup/memory/q/memory.usage_in_bytes": f"{2 * GIB}",
                "sys/fs/cgroup/memory/q/memory.stat": f"total_inactive_file {GIB}\n",
            },
            5 * GIB,
        ),
        ({}, None),
    ],
)
def test_the_smallest_limit_counts(files, free, tmp_path):
    write(tmp_path, files)
    assert free_memory(tmp_path) == free


def test_products_are_timed():
    assert 1e8 < multiplications() < 1e15
