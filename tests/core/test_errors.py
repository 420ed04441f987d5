"""Errors with fields: one sentence, whose settings the command line spells in its own words."""

from __future__ import annotations

import pickle

import pytest

from paley.cli.words import spell
from paley.core.errors import Call, PaleyError, Setting, renaming

ERROR = PaleyError(
    "exists already", where="out", got="a file", remedy=("set ", Setting("overwrite", True), " or ", Setting("output"))
)


def test_an_error_is_where_problem_got_and_remedy():
    assert str(ERROR) == "out: exists already, got a file; set overwrite=True or output"
    assert (ERROR.where, ERROR.got) == ("out", "a file")
    assert str(PaleyError("a sentence: as it is")) == "a sentence: as it is"


def test_the_command_line_spells_settings_its_own_way():
    assert ERROR.render(lambda part: spell(part, "quantize")) == (
        "out: exists already, got a file; set --overwrite or --output"
    )


def test_at_adds_a_place_and_keeps_the_fields():
    assert str(ERROR.at("here")) == f"here: {ERROR}"
    assert ERROR.at("here").remedy == ERROR.remedy
    assert str(PaleyError("bad").at("here")) == "here: bad"


def test_a_function_speaks_of_its_own_parameters():
    with pytest.raises(PaleyError, match=r"^seq_len=9 is long; set seq_len=5$"), renaming({"test.seq_len": "seq_len"}):
        raise PaleyError(Setting("test.seq_len", 9), " is long", remedy=("set ", Setting("test.seq_len", 5)))


def test_an_error_comes_whole_out_of_another_process():
    again = pickle.loads(pickle.dumps(ERROR))
    assert str(again) == str(ERROR)
    assert again.remedy == ERROR.remedy


@pytest.mark.parametrize(
    ("part", "verb", "spelled"),
    [
        (Setting("test.seq_len", 256), "quantize", "test.seq_len=256"),
        (Setting("seq_len", 256), "eval", "--seq-len 256"),
        (Setting("budget.weights"), "plan", "--target-bpw"),
        (Setting("dtype", "float32"), "dequantize", "--dtype float32"),
        (Setting("dtype", "float32"), "quantize", "dtype=float32"),
        (Call("measure_sensitivity", (Setting("fold", False),)), "quantize", "`paley sensitivity --no-fold`"),
        (Call("measure_sensitivity", (Setting("kinds", ("weight",)),)), "plan", "`paley sensitivity --activations`"),
    ],
)
def test_spelling(part, verb, spelled):
    assert spell(part, verb) == spelled
