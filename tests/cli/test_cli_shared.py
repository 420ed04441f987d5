"""--workers and --ray on the command line: of `paley eval` and `paley sensitivity`."""

from __future__ import annotations

import json
from importlib.util import find_spec

import paley
from command_line import paley_
from tiny_models import higgs, save_tiny

NO_RAY = find_spec("ray") is None


def test_workers_and_what_they_are_not_for(tmp_path, tiny_tokenizer):
    model = save_tiny(tmp_path / "model", tiny_tokenizer)
    out = paley.quantize(model, higgs(), output=tmp_path / "out").output
    sizes = ["--sequences", 9, "--seq-len", 16]
    shown = json.loads(paley_("eval", out, "--against", model, *sizes, "--workers", 2, "--json").out)
    assert shown["sequences"] == 9
    assert shown["kl"] > 0
    bad = paley_("eval", out, "--tasks", "piqa", "--workers", 2, code=2)
    assert "--tasks: are answered by one process; leave --workers and --ray out" in bad.err
    for verb in (
        ["eval", out, *sizes],
        ["sensitivity", model, "--output", tmp_path / "alpha.json", "--text", "random", "--method", "noise"],
    ):
        bad = paley_(*verb, "--ray-address", "nonsense", code=2)
        assert ("Ray is not installed" if NO_RAY else "'nonsense' is no address; give HOST:PORT") in bad.err
        assert len(bad.err.strip().splitlines()[-1]) < 200
