"""How far predicted numbers are from true ones, as clinical papers report it: statistics and a Bland-Altman plot.

J. M. Bland and D. G. Altman, Statistical methods for assessing agreement between two methods of clinical measurement,
Lancet 1986;327:307-310.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ..errors import DataError

__all__ = ["agreement", "bland_altman"]

_DPI = 100


def agreement(predicted: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """Statistics of predicted against true values.

    With the differences d = predicted - true: bias = mean d, limits of agreement = bias ± 1.96 SD, SD that of d with
    n - 1 in the denominator, and Pearson's correlation of predicted and true.

    Args:
        predicted: one number a case, any unit; NaN where the prediction has none.
        true: the same cases in the same unit; NaN where the truth has none.

    Returns:
        ``cases`` that both have, ``undefined`` (those left out), ``mean_absolute_error``, ``bias``, ``limit_low`` and
        ``limit_high`` in the values' unit, ``correlation`` in -1 to 1. What cannot be computed is NaN: all of no case,
        limits and correlation of one, correlation of a constant.

    Raises:
        DataError: when the counts differ or a number is infinite.
    """
    x, y = _pairs(predicted, true)
    d = x - y
    bias = d.mean() if len(d) else math.nan
    spread = 1.96 * d.std(ddof=1) if len(d) > 1 else math.nan
    varies = len(d) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return {
        "cases": len(d),
        "undefined": len(predicted) - len(d),
        "mean_absolute_error": float(np.abs(d).mean()) if len(d) else math.nan,
        "bias": float(bias),
        "limit_low": float(bias - spread),
        "limit_high": float(bias + spread),
        "correlation": float(np.corrcoef(x, y)[0, 1]) if varies else math.nan,
    }


def bland_altman(predicted: Sequence[float], true: Sequence[float], title: str, unit: str) -> Figure:
    """Differences over means of predicted and true values, with lines at the bias and the limits of agreement.

    Args:
        predicted: as of :func:`agreement`.
        true: likewise.
        title: of the figure, such as ``LV ejection fraction``.
        unit: of the values, such as ``mL``; that of differences of percentages is points.

    Returns:
        560 by 400 pixels.

    Raises:
        DataError: as :func:`agreement`.
    """
    x, y = _pairs(predicted, true)
    found = agreement(predicted, true)
    figure = Figure(figsize=(560 / _DPI, 400 / _DPI), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.margins(y=0.15)  # room for the figures at the limits
    axes.plot((x + y) / 2, x - y, "o", markersize=4, alpha=0.7)
    for name, style in {"limit_low": "--", "bias": "-", "limit_high": "--"}.items():
        if math.isfinite(found[name]):
            axes.axhline(found[name], color="black", linestyle=style, linewidth=1)
            axes.annotate(
                f"{found[name]:.1f}", (1, found[name]), (-2, 2), ("axes fraction", "data"), "offset points", ha="right"
            )
    left_out = f", {found['undefined']} undefined" if found["undefined"] else ""
    axes.set_title(f"{title}: {found['cases']} cases{left_out}")
    axes.set(
        xlabel=f"mean of predicted and true, {unit}", ylabel=f"predicted - true, {'points' if unit == '%' else unit}"
    )
    return figure


def _pairs(predicted: Sequence[float], true: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Cases that both have."""
    x, y = np.asarray(predicted, float), np.asarray(true, float)
    if x.ndim != 1 or x.shape != y.shape:
        raise DataError(f"Predicted and true values need one each a case, got {x.size} and {y.size}.")
    if np.isinf(x).any() or np.isinf(y).any():
        raise DataError("A predicted or true value is infinite.")
    both = ~np.isnan(x) & ~np.isnan(y)
    return x[both], y[both]
