"""Work shared by Ray: the same bytes as alone, also if workers are killed; addresses and nodes that do not answer."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster_tasks import refuse, slow_square
from paley.cli.progress import watching
from paley.core.errors import PaleyError
from paley.pipeline import cluster as clusters
from paley.pipeline import quantize
from paley.pipeline.cluster import LOCAL, cluster, fingerprint
from paley.pipeline.pool import Here, Processes, pool_of
from tiny_models import higgs, save_tiny


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def ray_pool():
    """Two workers of a Ray that is started here, for all tests."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        tests = str(Path(__file__).parents[1])  # workers import cluster_tasks
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
        with cluster(LOCAL, 2) as pool:
            yield pool


@pytest.fixture
def joined(ray_pool, monkeypatch):
    """A run that is told to use Ray takes that one."""
    monkeypatch.setattr("paley.pipeline.run.pool_of", lambda workers, ray: nullcontext(ray_pool))


def test_ray_shares_the_work_without_changing_it(joined, tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=True)
    with_ray = quantize(folder, higgs(), output=tmp_path / "ray", ray=LOCAL)
    assert contents(tmp_path / "ray") == contents(_alone(folder, tmp_path / "one"))
    assert with_ray.results.layers


def _alone(folder: Path, output: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paley.pipeline.run.pool_of", pool_of)
        return quantize(folder, higgs(), output=output).output


def test_a_worker_that_is_killed_loses_its_task_alone(ray_pool, tmp_path):
    items = [(number, str(tmp_path)) for number in range(6)]
    results, killed = dict[int, int](), set[int]()
    for number, square in ray_pool.run(slow_square, items):
        results[number] = square
        marks = [tuple(map(int, file.name.split("-"))) for file in tmp_path.iterdir()]
        at_work = [pid for other, pid in marks if other not in results and pid not in killed]
        if at_work and len(killed) < 2:
            os.kill(at_work[0], signal.SIGKILL)
            killed.add(at_work[0])
    assert killed
    assert results == {number: number * number for number in range(6)}
    assert len(list(tmp_path.iterdir())) > 6  # begun again


def test_what_a_task_raises_comes_out(ray_pool):
    with pytest.raises(PaleyError, match="layer 3: no; leave it"):
        list(ray_pool.run(refuse, [3]))


def test_workers_of_another_paley_arerefused(ray_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "fingerprint", lambda: "Paley 0.0.1 (00000000)")
    with pytest.raises(PaleyError, match=r"runs Paley .*, but this is Paley 0\.0\.1 .*install the same"):
        ray_pool.check(output=tmp_path)
    with pytest.raises(PaleyError, match=r"runs Paley .*, but this is Paley 0\.0\.1"):
        list(ray_pool.run(refuse, [3]))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_node_does_not_see_is_named(ray_pool, tmp_path):
    with pytest.raises(PaleyError, match=r"does not see /nowhere; put model and output on storage"):
        ray_pool.check(Path("/nowhere"), output=tmp_path)


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("nonsense", "is no address; give HOST:PORT"),
        ("127.0.0.1:x", "is no address; give HOST:PORT"),
        ("127.0.0.1:1", "does not answer .*refused"),
        ("127.0.0.1:99999999", "does not answer"),
    ],
)
def test_an_address_that_does_not_answer(address, complaint):
    pytest.importorskip("ray")
    with pytest.raises(PaleyError, match=complaint), cluster(address, 1):
        pass


def test_what_ray_prints_is_no_output(monkeypatch, capsys):
    """Of workers that died, for example, amid the JSON of --json. Programs that use Paley keep their own stdout."""
    names = {"init": lambda **_: None, "shutdown": lambda: None, "cluster_resources": lambda: {"CPU": 2.0}}
    monkeypatch.setattr(clusters, "import_module", lambda name: SimpleNamespace(**names))
    with watching(), cluster(LOCAL, 2) as pool:
        print("(raylet) A worker died")
    assert pool.workers == 2
    with cluster(LOCAL, 2):
        print("{}")
    assert capsys.readouterr() == ("{}\n", "(raylet) A worker died\n")


def test_without_ray_it_says_what_to_install(monkeypatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(clusters, "import_module", missing)
    with pytest.raises(PaleyError, match=r'Ray is not installed; pip install "paley\[ray\]"'), cluster(LOCAL, 1):
        pass


@pytest.mark.parametrize(("workers", "kind"), [(1, Here), (3, Processes)])
def test_without_an_address_it_stays_here(workers, kind):
    with pool_of(workers) as pool:
        assert isinstance(pool, kind)
        assert pool.workers == workers


def test_a_fingerprint_is_of_version_and_code():
    assert fingerprint().startswith("Paley 0.")
    assert "PyTorch" in fingerprint()
