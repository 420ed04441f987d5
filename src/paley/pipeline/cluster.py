"""Work on a Ray cluster: tasks of `pipeline.pool`, whose files lie on storage that all nodes see at the same path.

Ray sends functions by the name of their module and arguments pickled, between machines that trust each other
(docs/beyond-one-machine.md). A task whose worker or node is lost is begun again elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from paley.core.errors import PaleyError, Setting
from paley.pipeline.machine import free_memory
from paley.pipeline.pool import Pool, again, begin, check_fit

__all__ = ["LOCAL", "Ray", "cluster", "fingerprint"]

T = TypeVar("T")
R = TypeVar("R")

LOCAL = "local"
_PATIENCE = 5.0  # seconds that an address may take to answer
_RETRIES = 10  # of a task whose worker was lost


@dataclass(frozen=True)
class Ray:
    """A cluster that this process is connected to; local: of this machine alone, started for this run."""

    ray: Any
    workers: int
    resumes: bool = True
    local: bool = False

    def run(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        remote = self.ray.remote(num_cpus=1, max_retries=_RETRIES)(_run)
        errors = self.ray.exceptions
        waiting = [remote.remote(fingerprint(), task, item) for item in items]
        try:
            while waiting:
                done, waiting = self.ray.wait(waiting, num_returns=1)
                yield self.ray.get(done[0])
        except errors.RayTaskError as error:  # what the task raised
            if isinstance(error.cause, errors.RayError):
                raise PaleyError(f"Ray: a worker cannot run the task ({_first_line(error.cause)})") from None
            raise error.cause from None
        except (errors.RayError, ConnectionError) as error:
            raise PaleyError(f"Ray: the work was lost ({_first_line(error)})", remedy=again(self.resumes)) from None
        finally:
            for ref in waiting:
                with suppress(Exception):  # the cluster may be gone
                    self.ray.cancel(ref, force=True)

    def check(self, *folders: Path, output: Path | None = None, memory: int = 0) -> None:
        """As of Pool; every node is asked."""
        token = None if output is None else output / f".seen-{secrets.token_hex(4)}"
        if token is not None:
            token.write_text("")
        paths = [str(path) for path in (*folders, token) if path is not None]
        strategy = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        look = self.ray.remote(num_cpus=0, max_retries=_RETRIES)(_look)
        try:
            nodes = [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            asked = [
                look.options(scheduling_strategy=strategy(node["NodeID"], soft=False)).remote(paths) for node in nodes
            ]
            cores = Counter[str]()  # by machine: several nodes of one share its memory
            for node in nodes:
                cores[node["NodeManagerAddress"]] += int(node["Resources"]["CPU"])
            for node, reference in zip(nodes, asked, strict=True):
                address = node["NodeManagerAddress"]
                runs, unseen, free = self._answer(address, reference)
                self._check_node(address, runs, unseen, output)
                self._check_memory(address, cores[address], memory, free)
        finally:
            if token is not None:
                token.unlink(missing_ok=True)

    def release(self) -> None:
        """Ray ends its workers by itself."""

    def _check_node(self, address: str, runs: str, unseen: str, output: Path | None) -> None:
        if runs != fingerprint():
            raise PaleyError(
                f"Ray: node {address} runs {runs}, but this is {fingerprint()}",
                remedy="install the same Paley and PyTorch on all nodes",
            )
        if unseen:
            where = unseen if output is None else re.sub(r"\.seen-\w+$", "", unseen)
            also = () if output is None else (" and ", Setting("output"))
            raise PaleyError(
                f"Ray: node {address} does not see {where}",
                remedy=("put model", *also, " on storage that all nodes share"),
            )

    def _check_memory(self, address: str, cores: int, memory: int, free: int | None) -> None:
        """Raises if a node takes more tasks at a time than its memory holds: one for each of its cores."""
        if self.local:
            check_fit(cores, memory, free)
        elif free is not None and cores * memory > free:
            most, each = free // memory, memory / 2**30
            way_out = f"start Ray there with --num-cpus {most}" if most else "use nodes with more memory"
            raise PaleyError(
                f"memory: {cores} workers of node {address} need about {each:.1f} GiB each, and {free / 2**30:.1f} GiB "
                "are free there",
                remedy=way_out,
            )

    def _answer(self, address: str, answer: Any) -> tuple[str, str, int | None]:
        try:
            return self.ray.get(answer)
        except self.ray.exceptions.RayError as error:  # it has no Paley, or another Python
            raise PaleyError(
                f"Ray: node {address} cannot run Paley ({_first_line(error)})",
                remedy="install the same Paley on all nodes",
            ) from None


@contextmanager
def cluster(address: str, workers: int, *, resumes: bool = True) -> Iterator[Pool]:
    """The Ray cluster at `address`, HOST:PORT or auto; "local" starts one here with so many workers, for this run.

    resumes: as of `paley.pipeline.pool.Processes`.

    Errors: PaleyError if `ray` is not installed, or if the address does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        ray: Any = import_module("ray")
        import_module("ray.util.scheduling_strategies")
    except ImportError:
        raise PaleyError("Ray is not installed", remedy='pip install "paley[ray]"') from None
    _check_answers(address)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    where = {"num_cpus": workers, "include_dashboard": False} if address == LOCAL else {"address": address}
    try:
        ray.init(**where, **quiet)
    except Exception as error:  # each way to fail has its own
        raise PaleyError(
            f"Ray: {address} does not answer ({_first_line(error)})",
            remedy=("start a cluster (`ray start --head`), or leave ", Setting("ray_address"), " out"),
        ) from None
    try:
        yield Ray(ray, int(ray.cluster_resources().get("CPU", 1)), resumes, address == LOCAL)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises for an address that nobody listens at: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in (LOCAL, "auto"):
        return
    if not (colon and host and port.isdecimal()):
        raise PaleyError(f"Ray: {address!r} is no address; give HOST:PORT, as `ray start --head` prints it, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise PaleyError(
            f"Ray: {address} does not answer ({_first_line(error)})",
            remedy=("start a cluster (`ray start --head`), or leave ", Setting("ray_address"), " out"),
        ) from None


@functools.cache
def fingerprint() -> str:
    """Which Paley and PyTorch this process runs: version, and a digest of the code."""
    digest, package = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    version = getattr(sys.modules["paley"], "__version__", "?")
    return f"Paley {version} ({digest.hexdigest()[:8]}) with PyTorch {torch.__version__}"


def _run(wanted: str, task: Callable[[Any], Any], item: Any) -> Any:
    """In a worker, which may have joined after the nodes were asked."""
    if wanted != fingerprint():
        raise PaleyError(
            f"Ray: node {socket.gethostname()} runs {fingerprint()}, but this is {wanted}",
            remedy="install the same Paley and PyTorch on all nodes",
        )
    begin()
    return task(item)


def _look(paths: list[str]) -> tuple[str, str, int | None]:
    """-> (what a node runs, the first of the paths that it does not see, bytes of memory that are free there)."""
    return fingerprint(), next((path for path in paths if not Path(path).exists()), ""), free_memory()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
