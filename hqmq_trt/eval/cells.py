"""How a document writes numbers: signs, errors, stored bits."""

from __future__ import annotations

import math
from collections.abc import Iterable

NOT_MEASURED = "–"


def signed(value: float, short: bool = False) -> str:
    """Two digits below 100, none from there on; `short`: millions as ``+3.9 M``. Zero has no sign."""
    if short and abs(value) >= 1e6:
        return f"{value / 1e6:+,.1f} M".replace("-", "−")
    text = f"{value:+.2f}" if abs(value) < 100 else f"{value:+,.0f}"
    return text[1:] if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def with_error(value: float, error: float, unit: str = "") -> str:
    """A value and its standard error, as ``+1.20 ± 0.26 %``.

    From 1000 on the error is left out: such a loss says "collapsed", not how much. So is an infinite one (one window).
    """
    shown = ""
    if abs(value) < 1000 and math.isfinite(error):
        shown = f" ± {error:.2f}" if abs(value) < 100 else f" ± {error:,.0f}"
    return signed(value) + shown + (f" {unit}" if unit else "")


def perplexity(value: float) -> str:
    """Two digits below 1000."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def bits(value: float) -> str:
    """Up to three digits."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def bits_range(values: Iterable[float]) -> str:
    """One number, or the smallest and largest where they differ (outliers); a dash for none."""
    found = [bits(value) for value in sorted(values)]
    if not found:
        return NOT_MEASURED
    return found[0] if found[0] == found[-1] else f"{found[0]}…{found[-1]}"


def windows(*counts: int) -> str:
    """``1 window``, ``9, 18 windows``."""
    return f"{', '.join(map(str, counts))} window{'' if counts == (1,) else 's'}"
