"""Agreement of predicted and true values, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import pearsonr

from networks.errors import DataError
from networks.results.agreement import agreement, bland_altman

PREDICTED, TRUE = [52.0, 60.0, 47.0], [50.0, 61.0, 50.0]
# Differences 2, -1, -3: mean -2/3, deviations 8/3, -1/3, -7/3, their squares' sum 38/3, variance 19/3.
BIAS, LIMIT = -2 / 3, 1.96 * math.sqrt(19 / 3)


def test_statistics_by_hand():
    assert agreement(PREDICTED, TRUE) == {
        "cases": 3,
        "undefined": 0,
        "mean_absolute_error": 2,
        "bias": pytest.approx(BIAS),
        "limit_low": pytest.approx(BIAS - LIMIT),
        "limit_high": pytest.approx(BIAS + LIMIT),
        "correlation": pytest.approx(pearsonr(PREDICTED, TRUE).statistic),
    }
    assert agreement([5, 3, 1], [1, 2, 3])["correlation"] == pytest.approx(-1)


def test_undefined_cases_are_counted():
    found = agreement([*PREDICTED, math.nan, 7], [*TRUE, 30, math.nan])
    assert found == {**agreement(PREDICTED, TRUE), "undefined": 2}


@pytest.mark.parametrize(
    ("predicted", "true", "known"),
    [([], [], set()), ([3], [1], {"mean_absolute_error", "bias"}), ([3, 3], [1, 2], {"limit_low", "limit_high"})],
)
def test_what_cannot_be_computed_is_nan(predicted, true, known):
    found = agreement(predicted, true)
    assert known <= {name for name, value in found.items() if not math.isnan(value)}
    assert math.isnan(found["correlation"])


def test_bland_altman_shows_the_cases_and_their_limits():
    figure = bland_altman([*PREDICTED, math.nan], [*TRUE, 4], "LV ejection fraction", "%")
    axes = figure.axes[0]
    points, *lines = axes.lines
    assert points.get_xdata().tolist() == [51, 60.5, 48.5] and points.get_ydata().tolist() == [2, -1, -3]
    assert [line.get_ydata()[0] for line in lines] == pytest.approx([BIAS - LIMIT, BIAS, BIAS + LIMIT])
    assert axes.get_title() == "LV ejection fraction: 3 cases, 1 undefined"
    assert axes.get_ylabel() == "predicted - true, points"
    figure.canvas.draw()
    bland_altman([], [], "EDV", "mL").canvas.draw()


@pytest.mark.parametrize(("predicted", "true"), [([1, 2], [1]), ([1, math.inf], [1, 2]), (np.ones((2, 2)),) * 2])
def test_wrong_values_are_told(predicted, true):
    for function in (agreement, lambda *pair: bland_altman(*pair, "EDV", "mL")):
        with pytest.raises(DataError):
            function(predicted, true)
