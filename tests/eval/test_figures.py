"""Measured values as a person reads them: no digits that the standard error makes noise of."""

from __future__ import annotations

import math

import pytest

from paley.eval.figures import with_error


@pytest.mark.parametrize(
    ("value", "stderr", "form", "shown"),
    [
        (0.123412, 0.00561, ".4g", "0.1234 ± 0.0056"),
        (12.3456, 0.1, ".4f", "12.35 ± 0.10"),
        (0.0308, 0.000996, "+.4f", "+0.0308 ± 0.0010"),
        (0.5, 0.0994, ".4f", "0.500 ± 0.099"),
        (-0.0815, 0.133, "+.4f", "-0.08 ± 0.13"),
        (1569.681, 658.84, ".4f", "1570 ± 659"),
        (71.6512, 3.94, ".2f", "71.7 ± 3.9"),
        (3.21234e-12, 4.21e-14, ".4g", "3.212e-12 ± 4.2e-14"),
        (3.21234e-12, 4.21e-14, "+.4f", "+3.212e-12 ± 4.2e-14"),
        (12.3456, 1e-9, ".4f", "12.3456 ± 1e-09"),
        (-12.3456, 1.23e-9, "+.4f", "-12.3456 ± 1.2e-09"),
        (0.001234567, 1e-10, ".4f", "0.001235 ± 1e-10"),
        (0.5, 1e-10, ".4f", "0.5000 ± 1e-10"),
        (0.0, 1e-10, "+.4f", "+0.0000 ± 1e-10"),
        (0.123456, None, ".4f", "0.1235"),
        (0.123456, 0.0, "+.4f", "+0.1235 ± 0.0000"),
        (math.inf, None, ".4f", "inf"),
        (0.5, math.nan, ".4f", "0.5000 ± nan"),
    ],
)
def test_two_digits_of_the_error_decide(value, stderr, form, shown):
    assert with_error(value, stderr, form) == shown
