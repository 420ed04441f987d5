"""The clock of clusters: exact where the answer can be worked out by hand."""

from __future__ import annotations

import pytest
from studies.scale import Place, makespan

SLOW = 1e30  # bytes a second: reading takes no time


@pytest.mark.parametrize(
    ("nodes", "cores", "storage", "network", "moved", "computed", "expected"),
    [
        (1, 2, SLOW, SLOW, [1, 1, 1], [3, 1, 1], 3),  # one worker takes the two short ones
        (1, 1, 10, 10, [20, 10], [1, 1], 5),  # 2 + 1 + 1 + 1
        (1, 2, 10, 10, [20, 20], [1, 1], 5),  # 40 bytes at 10 a second for both, then one more second
        (2, 1, 10, 5, [20, 20], [1, 1], 5),  # each by its own network, the storage has enough
        (2, 1, 100, 5, [20, 20], [1, 1], 5),
        (1, 2, 10, 10, [10, 30], [5, 0], 7),  # alike until 2 s, then the second one alone until 4 s; the first at 7 s
    ],
)
def test_makespan(nodes, cores, storage, network, moved, computed, expected):
    assert makespan(moved, computed, Place(nodes, cores, storage, network)) == pytest.approx(expected)
