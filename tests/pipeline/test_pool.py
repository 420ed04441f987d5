"""Processes that share work: begun once, ended with their `with`, and no other child of this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from cluster_tasks import process_of, refuse
from paley.core.errors import PaleyError
from paley.pipeline.pool import Processes


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_stay_for_all_rounds_and_no_longer():
    with Processes(2) as pool:
        seen = {pid for items in ([0.5, 0.5], [0.5, 0.5], [0.0]) for pid in pool.run(process_of, items)}
        assert len(seen) <= 2  # which of them is quick to begin may take all
        assert os.getpid() not in seen  # nor a task alone, which would hold a model beside theirs
        os.kill(min(seen), signal.SIGKILL)
        time.sleep(0.5)
        with pytest.raises(PaleyError, match="one of the 2 processes was ended from outside"):
            list(pool.run(process_of, [0.0, 0.0]))
        other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        other.start()  # a child of whoever uses the library, later than the pool's
        with pytest.raises(PaleyError, match="layer 0: no"):
            list(pool.run(refuse, [0, 0]))
        assert other.is_alive()
        other.kill()
        other.join()
        again = set(pool.run(process_of, [0.5, 0.5]))
        assert not again & seen
    assert not any(map(is_there, again))


def test_one_task_alone_begins_no_process():
    with Processes(2) as pool:
        assert list(pool.run(process_of, [0.0])) == [os.getpid()]
