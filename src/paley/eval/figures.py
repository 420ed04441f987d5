"""Measured values in text."""

from __future__ import annotations

import math

__all__ = ["with_error"]


def with_error(value: float, stderr: float | None, form: str) -> str:
    """'0.1234 ± 0.0056', to two digits of the standard error; in `form` if there is none, or it is 0.

    A value with an error below 1e-7 is also in `form`, unless it is small itself: '3.212e-12 ± 4.2e-14'.
    """
    if stderr is None:
        return f"{value:{form}}"
    sign, plain = ("+", form[1:]) if form.startswith("+") else ("", form)
    if not 0 < stderr < math.inf:
        return f"{value:{form}} ± {stderr:{plain}}"
    decimals = 1 - math.floor(math.log10(float(f"{stderr:.1e}")))  # of 0.0996, which shows as 0.10, too
    if decimals > 8:
        shown = f"{value:{sign}#.4g}" if 0 < abs(value) < 1 else f"{value:{form}}"
        return f"{shown} ± {stderr:.2g}"
    decimals = max(decimals, 0)
    return f"{value:{sign}.{decimals}f} ± {stderr:.{decimals}f}"
