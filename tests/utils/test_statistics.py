"""Intervals and tests over draws: against scipy, by hand, and by how often they cover."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ia2.evaluation.calibration import ece_equal_mass
from ia2.evaluation.headroom import judge
from ia2.utils.statistics import (
    bounded,
    holm,
    mean_interval,
    over_draws,
    side,
    t_interval,
    t_test,
    wilcoxon,
)
from ia2.utils.wording import estimate

numbers = st.lists(st.floats(-1, 1), min_size=2, max_size=12)


@settings(deadline=None)
@given(numbers)
def test_the_interval_is_students(values: list[float]) -> None:
    found = t_interval(values)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    assert (found.value, found.units) == (pytest.approx(np.mean(values)), len(values))
    assert (found.low, found.high) == pytest.approx((np.mean(values) - half, np.mean(values) + half))


def test_many_columns_at_once() -> None:
    values = np.random.default_rng(0).normal(size=(6, 4, 3))
    found = t_interval(values)
    one = t_interval(values[:, 2, 1])
    assert found.low.shape == (4, 3)
    assert (found.value[2, 1], found.low[2, 1], found.high[2, 1]) == pytest.approx(
        (one.value, one.low, one.high)
    )
    assert json.loads(json.dumps(found.to_dict()))["low"][2][1] == pytest.approx(one.low)


def test_one_draw_has_no_interval() -> None:
    assert t_interval([0.8]).to_dict() == {"value": 0.8, "low": None, "high": None}
    assert t_interval(np.ones((1, 2))).to_dict() == {
        "value": [1.0, 1.0],
        "low": [None] * 2,
        "high": [None] * 2,
    }
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])
    with pytest.raises(ValueError, match="at least one row"):
        mean_interval([np.array([])])


@pytest.mark.parametrize("draws", [3, 5])
def test_it_covers_what_it_says(draws: int) -> None:
    """Draws differ, and so do rows within them: the mean over all draws is inside 95 times in 100."""
    rng = np.random.default_rng(draws)
    hits = []
    for _ in range(1000):
        shares = np.clip(rng.normal(0.7, 0.1, draws), 0, 1)
        runs = [[(rng.random(60) < share).astype(float)] for share in shares]
        found = over_draws(np.mean, runs)
        hits.append(found.low <= 0.7 <= found.high)
    assert 0.93 <= np.mean(hits) <= 0.97


def test_the_statistic_is_of_each_draw() -> None:
    """An ECE of all draws' rows together would be another number."""
    rng = np.random.default_rng(0)
    runs = [[rng.random(40), (rng.random(40) < 0.5).astype(float)] for _ in range(4)]
    each = [float(ece_equal_mass(*run)) for run in runs]
    found = over_draws(lambda c, r, axis: ece_equal_mass(c, r, axis=axis), runs)
    assert found.value == pytest.approx(np.mean(each))
    assert found.low == pytest.approx(t_interval(each).low)


def test_a_mean_of_one_draw_is_over_its_rows() -> None:
    rows = np.array([0.0, 1.0, 1.0, 1.0])
    assert mean_interval([rows]).low == pytest.approx(t_interval(rows).low)
    several = mean_interval([rows, 1 - rows, rows])
    assert (several.units, several.low) == (3, pytest.approx(t_interval([0.75, 0.25, 0.75]).low))


def test_an_interval_ends_where_the_measure_does() -> None:
    found = bounded(t_interval([1.0, 0.9]), "accuracy")
    assert (found.low, found.high) == (pytest.approx(0.95 - 0.635, abs=1e-3), 1.0)
    assert bounded(t_interval([0.1, 1.4]), "nll").low == 0.0
    assert bounded(t_interval([0.8]), "accuracy").to_dict()["high"] is None


def test_sides() -> None:
    assert side({"low": 0.1, "high": 0.2}) == 1
    assert side({"low": -0.2, "high": -0.1}) == -1
    assert side({"low": -0.1, "high": 0.2}) == side({"low": None, "high": None}) == 0
    # two draws that say the same are no evidence, however certain the arithmetic is
    assert side(t_interval([0.05, 0.05]).to_dict()) == 0


@settings(deadline=None, max_examples=40)
@given(numbers.filter(lambda values: len(values) <= 8))  # scipy goes through all signs of values with ties
def test_tests_are_scipys(values: list[float]) -> None:
    t, p = t_test(values)
    if np.ptp(values) > 1e-6:
        expected = stats.ttest_1samp(values, 0.0)
        assert (t, p) == pytest.approx((expected.statistic, expected.pvalue))
    rounded = np.round(values, 12)
    assert wilcoxon(values) == pytest.approx(stats.wilcoxon(rounded).pvalue if rounded.any() else 1.0)


def test_a_test_without_spread() -> None:
    assert t_test([0.0, 0.0]) == (0.0, 1.0)
    assert all(map(math.isnan, [*t_test([0.1, 0.1]), *t_test([0.1])]))


def test_holm_by_hand() -> None:
    # sorted: 0.005·4, 0.01·3 = 0.03, 0.03·2 = 0.06, 0.04·1 < 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_leaves_out_what_is_unknown() -> None:
    found = holm([0.01, math.nan, 0.02])
    assert [found[0], found[2]] == pytest.approx([0.02, 0.02])
    assert math.isnan(found[1])


def test_intervals_need_no_slow_import() -> None:
    code = (
        "import sys; from ia2.utils.statistics import t_interval, t_test; t_interval([1, 2]);"
        "t_test([1, 2]); assert 'scipy.stats' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------ one format


def test_estimates_in_words() -> None:
    found = {"value": 0.8124, "low": 0.76, "high": 0.8649}
    assert estimate(found) == "0.812 [0.760, 0.865]"
    assert estimate(found, percent=True) == "81.2 [76.0, 86.5]"
    assert estimate({"value": -0.0001, "low": -0.02, "high": 0.02}, signed=True) == "+0.000 [−0.020, +0.020]"
    assert estimate({"value": 0.5, "low": None, "high": None}) == "0.500"
    assert estimate(None) == estimate({"value": None, "low": None, "high": None}) == "–"


# ------------------------------------------------------------------------------ the verdict on headroom

SHARES = [round(0.1 * k, 3) for k in range(11)] + [0.4999, 0.5001, 0.50049]
shares = st.sampled_from(SHARES)
draws = st.integers(1, 5).flatmap(lambda n: st.tuples(*[st.lists(shares, min_size=n, max_size=n)] * 2))


@settings(max_examples=600, deadline=None)
@given(draws, shares, shares, st.booleans(), st.booleans())
def test_a_verdict_says_what_the_numbers_beside_it_say(
    pair: tuple[list[float], list[float]], base: float, chance: float, with_sft: bool, with_base: bool
) -> None:
    icl, sft = pair
    found = judge(icl, sft if with_sft else None, [base] if with_base else None, chance)
    shown = dict(part.rsplit(" ", 1) for part in found.figures.split(", ") if part.endswith("%"))
    value = {name: float(text.rstrip("%")) for name, text in shown.items()}
    less = t_interval(np.array(icl) - np.array(sft))
    low, high = (round(100 * float(end), 1) for end in (less.low, less.high))
    said = found.reason
    assert ("not above guessing" in said) == (value["ICL"] <= value["guessing"])
    if "not above the bare model" in said:
        assert value["ICL"] <= value["base"]
    if said == "SFT is better than ICL":
        assert high < 0 and value["ICL"] < value["SFT"]
    if "cannot be told apart" in said:
        assert low <= 0 <= high
    if said == "one draw cannot tell":
        assert len(icl) == 1
    if found.word == "yes":
        assert low > 0 and value["ICL"] > max(value["SFT"], value["base"], value["guessing"])
    # whatever is printed as an interval of ICL − SFT is the one that was judged
    if with_sft:
        assert estimate(less.to_dict(), signed=True, percent=True) in found.figures
    assert found.word in ("yes", "no", "unclear")


def test_verdicts() -> None:
    many = [0.9, 0.92, 0.91]
    assert judge(many, [0.7, 0.74, 0.71], [0.5], 0.5).word == "yes"
    assert judge(many, [0.97, 0.99, 0.98], [0.5], 0.5).reason == "SFT is better than ICL"
    assert judge(many, [0.9, 0.93, 0.90], [0.5], 0.5).reason == "ICL and SFT cannot be told apart"
    assert judge(many, [0.7, 0.74, 0.71], [0.95], 0.5).reason == "ICL is not above the bare model"
    assert judge(many, [0.7, 0.74, 0.71], [0.95], 0.95).reason == "ICL is not above guessing"
    assert judge(many, None, [0.5], 0.5).reason == "SFT was not run beside it"
    assert judge(many, [0.7, 0.74, 0.71], None, 0.5).reason == "the bare model was not run beside it"
    assert judge([0.9], [0.1], [0.5], 0.5).reason == "one draw cannot tell"
    assert judge([1.0], [0.0], None, 0.5, units="rows").reason == "one row cannot tell"
    # the mean is above the bare model, its interval is not
    assert "not for certain" in judge([0.9, 0.5, 0.9], [0.6, 0.2, 0.6], [0.6], 0.5).reason
