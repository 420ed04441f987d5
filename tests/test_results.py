"""results.json as a document: strict, of one version, and the fields that the rest of Paley reads."""

from __future__ import annotations

import json
import math

import pytest

from paley.core.errors import PaleyError
from paley.results import EvalResult, LayerResult, Results


def results(**changes) -> Results:
    evaluation = EvalResult(
        source="pydoc", sha256="0" * 64, sequences=1, tokens=8, nll=800.0, nll_stderr=None, perplexity=math.inf,
        perplexity_stderr=None, kv_cache_bytes_per_token=16.0, kv_cache_bytes_per_token_at_16_bits=64.0,
        reference_nll=2.0, gap=798.0, kl=1.0, top1_agreement=0.5,
    )  # fmt: skip
    fields = {
        "run": "key", "model_type": "llama", "fingerprint": "f", "parameters": 10, "bits_per_weight": 4.0,
        "bits_per_quantized_weight": None, "bytes": 5, "original_bytes": 20, "untouched": {"norms and biases": 2},
        "evaluation": evaluation, "layers": {"model.layers.0.mlp.up_proj": LayerResult(0.1)},
    }  # fmt: skip
    return Results(**fields | changes)


def test_a_file_reads_back_to_an_equal_document_infinite_numbers_too(tmp_path):
    made = results()
    made.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == made == Results.beside(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == made.to_dict()
    assert made.to_dict()["evaluation"]["perplexity"] == "inf"
    assert made.to_dict()["evaluation"] == made.evaluation.to_dict()


def test_a_file_of_an_older_paley_names_no_versions(tmp_path):
    older = {key: value for key, value in results().to_dict().items() if key != "made_with"}
    (tmp_path / "results.json").write_text(json.dumps(older))
    assert Results.load(tmp_path / "results.json").made_with == {}


def test_the_original_has_a_perplexity_where_it_was_measured():
    assert results().evaluation.reference_perplexity == pytest.approx(math.exp(2))


def test_a_folder_without_results_or_with_those_of_an_older_paley_has_none(tmp_path):
    assert Results.beside(tmp_path) is None
    (tmp_path / "results.json").write_text('{"run": "key", "bits_per_weight": 4.0}')
    assert Results.beside(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 2}, "results file of version 2, this Paley reads version 1"),
        ({"byte": 3}, "byte: unknown key; did you mean 'bytes'"),
        ({"bytes": "many"}, "bytes: should be a valid integer"),
        ({"evaluation": {"source": "pydoc"}}, "evaluation.* is required and missing"),
        ({"layers": {"up": {"error": 0.1}}}, "unknown key; did you mean 'rel_error'"),
    ],
)
def test_a_damaged_file_is_refused_by_key(tmp_path, change, complaint):
    (tmp_path / "results.json").write_text(json.dumps(results().to_dict() | change))
    with pytest.raises(PaleyError, match=complaint):
        Results.beside(tmp_path)
