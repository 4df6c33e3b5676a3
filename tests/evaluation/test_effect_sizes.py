"""Effect sizes: against scipy, under the null, and whether training sets agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from ia2.evaluation.effect_sizes import LARGEST, ShiftTest, effects, rank_agreement, stability


def test_effects_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 12, 5, 7))
    found = effects((a - b).mean(0), (a - b).std(0, ddof=1), 12)
    np.testing.assert_allclose(found.p, stats.ttest_rel(a, b).pvalue)
    constant = effects(np.array([-2.0, 0.0]), np.zeros(2), 12)
    assert constant.d_z.tolist() == [-LARGEST, 0.0] and constant.p[1] == 1


def test_stability() -> None:
    rng = np.random.default_rng(0)
    maps = list(rng.normal(size=(3, 4, 5)))
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([stats.spearmanr(maps[i].ravel(), maps[j].ravel()).statistic for i, j in pairs])
    assert rank_agreement(maps) == pytest.approx(expected)
    holey = [maps[0].copy(), maps[1].copy()]
    holey[0][0, 0] = holey[1][1, 1] = np.nan
    kept = np.isfinite(holey[0] + holey[1])
    assert rank_agreement(holey) == pytest.approx(stats.spearmanr(maps[0][kept], maps[1][kept]).statistic)
    assert np.isnan(rank_agreement(maps[:1])) and np.isnan(rank_agreement([maps[0], np.ones((4, 5))]))
    assert stability([maps[0], maps[0]], 5)["jaccard"] == 1
    # of random maps as much as is said to be chance
    pairs_of_maps = rng.normal(size=(2000, 2, 20))
    found = [stability(list(pair), 6) for pair in pairs_of_maps]
    assert np.mean([f["jaccard"] for f in found]) == pytest.approx(found[0]["jaccard_by_chance"], abs=0.01)
    assert stability(maps, 500)["k"] == 10


def test_a_planted_direction_is_found() -> None:
    rng = np.random.default_rng(2)
    shift = ShiftTest()
    move = np.zeros((2, 4, 24))
    move[1, 2] = 0.3
    for i in range(60):
        shift.add(i, torch.from_numpy(rng.normal(size=move.shape) + move))
    found = shift.effects()
    assert [tuple(map(int, p)) for p in np.argwhere(found.significant)] == [(1, 2)]
    assert found.d_z[1, 2] > 0.8  # ‖shift‖ = 1.5 in units of the spread, less what the estimate of it loses
