"""The logit lens: what is measured through it, where the task is said to show, and its figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import llama
from scipy.spatial.distance import jensenshannon
from test_unembedding import FEW, streams

from ia2.analysis import unembedding
from ia2.analysis.sections import lens as module
from ia2.analysis.sections.lens import LensAccumulator, LensResult, divergence, summarise
from ia2.analysis.unembedding import Lens
from ia2.utils.errors import ModelError


def test_divergence_is_that_of_scipy() -> None:
    p, q = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.1, 0.0, 0.8])
    with np.errstate(divide="ignore"):
        a, b = torch.tensor(np.log(p)), torch.tensor(np.log(q))
    assert float(divergence(a, b)) == pytest.approx(jensenshannon(p, q, base=2) ** 2)
    assert float(divergence(a, a)) == 0
    apart = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert float(divergence(apart[0], apart[1])) == 1


LABELS = ((9,), (5,), (77,))


def contexts(n: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids of each query with demonstrations and without."""
    made = torch.randint(3, 120, (n, 12), generator=torch.Generator().manual_seed(2))
    return [(row[None], row[None, 6:]) for row in made]


def own_logits(model: Any, count: int = 1) -> dict[str, torch.Tensor]:
    """The model's own at the last positions of each query, ``[n, G, V]``."""
    both = zip(*contexts(), strict=True)
    return {
        view: torch.stack([streams(model, ids)[1][-count:] for ids in part])
        for view, part in zip(("icl", "base"), both, strict=True)
    }


def said_by(model: Any, count: int = 1) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in own_logits(model, count)["icl"].argmax(-1)]


def fed(accumulator: LensAccumulator, model: Any, count: int = 1) -> LensResult:
    """``icl`` and ``base`` of each query, read at their last ``count`` positions."""
    pairs = [[streams(model, ids)[0][:, -count:] for ids in both] for both in contexts()]
    for view, place in (("icl", 0), ("base", 1)):
        for index, found in enumerate(pairs):
            accumulator.add(view, index, {"residual": found[place]}, {"residual": found[0]}, None)
    return accumulator.finish()


def test_measures_of_labels() -> None:
    model = llama(num_hidden_layers=3)
    gold = [0, 1, 2, 0, 1, 2]
    few = fed(LensAccumulator(model, said_by(model), LABELS, gold), model)
    own = {view: logits[:, 0] for view, logits in own_logits(model).items()}
    label_p = {view: logits[:, list(FEW)].softmax(-1).double() for view, logits in own.items()}
    teacher = label_p["icl"].argmax(-1)  # none of its answers is a label
    assert few.over == "labels"
    for view, p in label_p.items():
        found = few.conditions[view]
        assert {x.shape for x in found.values()} == {(6, 3)}
        last = {name: x[:, -1] for name, x in found.items()}
        assert last["agreement"].tolist() == (p.argmax(-1) == teacher).double().tolist()
        assert last["gold"].tolist() == (p.argmax(-1) == torch.tensor(gold)).double().tolist()
        at_teacher = p.gather(1, teacher[:, None])[:, 0].log().numpy()
        np.testing.assert_allclose(last["log_probability"], at_teacher, atol=1e-5)
        jsd = [jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, label_p["icl"], strict=True)]
        np.testing.assert_allclose(last["divergence"], jsd, atol=1e-5)
        np.testing.assert_allclose(last["divergence_from_answer"], jsd, atol=1e-5)
    assert few.conditions["icl"]["divergence"].max() == 0
    # before the last layer ICL itself is not there yet
    assert few.conditions["icl"]["divergence_from_answer"][:, 0].max() > 0.001
    assert few.chance == {"agreement": teacher.bincount().max() / 6, "gold": pytest.approx(1 / 3)}


def test_measures_of_free_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(num_hidden_layers=3)
    monkeypatch.setattr(module, "TOP_TOKENS", 5)
    said = said_by(model, 6)
    found = fed(LensAccumulator(model, said), model, count=6)
    monkeypatch.setattr(unembedding, "_BLOCK", 128)  # a row at a time
    for view, measures in fed(LensAccumulator(model, said), model, count=6).conditions.items():
        for name, values in measures.items():
            np.testing.assert_allclose(values, found.conditions[view][name], atol=1e-6)
    assert "gold" not in found.conditions["base"]
    assert found.chance == {}
    assert found.conditions["icl"]["agreement"][:, -1].tolist() == [1.0] * 6
    places = [0, 2, 3, 5]  # four of six positions
    lens = Lens.of(model)
    for index, both in enumerate(contexts()):
        icl, base = (lens.logits(streams(model, ids)[0][:, -6:][:, places]).softmax(-1) for ids in both)
        answer = icl[-1].argmax(-1)
        measured = {name: values[index] for name, values in found.conditions["base"].items()}
        at_answer = base[:, range(4), answer].log().mean(-1)
        np.testing.assert_allclose(measured["log_probability"], at_answer, atol=1e-4)
        share = (base.argmax(-1) == answer).double().mean(-1)
        assert measured["agreement"].tolist() == share.tolist()
        for name, of in (("divergence", icl), ("divergence_from_answer", icl[-1:].expand_as(icl))):
            first = of.topk(5, dim=-1).indices
            p, q = (_outcomes(x, first) for x in (of, base))
            jsd = (jensenshannon(p, q, base=2, axis=-1) ** 2).mean(-1)
            np.testing.assert_allclose(measured[name], jsd, atol=1e-5)


def _outcomes(p: torch.Tensor, first: torch.Tensor) -> np.ndarray:
    chosen = p.double().gather(-1, first)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1).numpy()


def test_labels_that_begin_alike() -> None:
    model = llama()
    answers = [(50, 9), (50, 5), (51, 9), (50, 9), (50, 77), (50, 9)]
    found = fed(LensAccumulator(model, answers, [(50, 9), (50, 5), (50, 77)]), model, count=2)
    # at the second position, and without the answer that is no label from its first token on
    p = own_logits(model)["base"][[0, 1, 3, 4, 5], 0][:, list(FEW)].softmax(-1)
    expected = p[range(5), [0, 1, 0, 2, 0]].log()
    np.testing.assert_allclose(found.conditions["base"]["log_probability"][:, -1], expected, atol=1e-5)
    assert found.chance["agreement"] == 3 / 5
    with pytest.raises(ModelError, match="begins as the labels do"):
        fed(LensAccumulator(model, [(1, 2)] * 6, [(50, 9), (50, 5)]), model, count=2)


def result(views: dict[str, list[float]], n: int = 200, seed: int = 0) -> LensResult:
    """A trial in which the views agree with the teacher in these shares of examples."""
    rng = np.random.default_rng(seed)
    made = {
        view: {
            "agreement": (rng.random((n, len(shares))) < shares).astype(float),
            "gold": (rng.random((n, len(shares))) < shares).astype(float),
            "log_probability": np.log(np.tile(shares, (n, 1))),
            "divergence": np.tile(1 - np.array(shares), (n, 1)),
            "divergence_from_answer": np.tile(1 - np.array(shares), (n, 1)),
        }
        for view, shares in views.items()
    }
    return LensResult(made, {"agreement": 0.5, "gold": 0.5}, "labels")


LAYERS = [3, 4, 5, 6, 7, 8]
SHARES = {
    "icl": [0.5, 0.5, 0.8, 0.9, 0.95, 1.0],
    "base": [0.5, 0.5, 0.5, 0.5, 0.7, 0.7],
    "sft": [0.5, 0.8, 0.5, 0.5, 0.5, 0.9],
    "ia2": [0.3, 0.3, 0.3, 0.3, 0.7, 0.7],
}


def test_summary_says_where_the_task_shows() -> None:
    section = summarise([result(SHARES, seed=seed) for seed in range(5)], LAYERS)
    assert section["layers"] == [3, 4, 5, 6, 7, 8]
    assert section["chance"] == {"agreement": 0.5, "gold": 0.5}
    shows = {view["name"]: view["shows_at"] for view in section["views"]}
    # one layer in the middle is not enough; ia2 is above chance in the end, but no better than the base model
    assert shows == {"icl": 5, "base": 7, "sft": 8, "ia2": None}
    assert all(view["n"] == 1000 for view in section["views"])
    icl = section["views"][0]
    assert set(icl) >= {"agreement_by_layer", "gold_by_layer", "log_probability_by_layer"}
    for part in (icl["agreement_by_layer"], icl["divergence_by_layer"]):
        low, value, high = (np.array(part[name]) for name in ("low", "value", "high"))
        assert (low <= value + 1e-9).all()
        assert (value <= high + 1e-9).all()
    assert icl["log_probability_by_layer"]["value"] == pytest.approx(np.log(SHARES["icl"]))
    assert icl["agreement_by_layer"]["high"][0] - icl["agreement_by_layer"]["low"][0] > 0.05
