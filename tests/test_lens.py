"""The logit lens: the model's own read-out of every family, what is measured through it, and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapting import lora
from families import ALL, FAMILIES, build, llama
from scipy.spatial.distance import jensenshannon
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaForCausalLM, OPTConfig

from ia2.analysis import readings
from ia2.analysis.lens import LensMeter, LensResult, summarise
from ia2.analysis.readings import LabelTokens, divergence
from ia2.analysis.unembedding import Lens
from ia2.capture import ActivationCapture
from ia2.errors import ModelError
from ia2.full import FullModel
from ia2.report.lens_figures import lens_figures
from ia2.report.style import Figure

IDS = torch.tensor([[5, 17, 40, 33, 21, 60, 12]])
FEW = (9, 5, 77)


def streams(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual streams ``[L, T, d]`` and the model's own logits ``[T, V]``."""
    with torch.no_grad(), ActivationCapture(model, site="residual") as capture:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        return torch.stack([layer[0] for layer in capture.take().values()]), logits


def check(model: Any, tolerance: float = 1e-5) -> Lens:
    """The lens of the last layer is the model's own logits."""
    stream, logits = streams(model)
    lens = Lens.of(model)
    assert torch.allclose(lens.logits(stream[-1]), logits.float(), atol=tolerance)
    few = Lens.of(model, FEW).logits(stream[-1])
    assert torch.allclose(few, logits.float()[:, FEW], atol=tolerance)
    assert not torch.allclose(lens.logits(stream[0]), logits.float(), atol=0.1)
    return lens


# ------------------------------------------------------------------------------------------- the lens


@pytest.mark.parametrize("name", ALL)
def test_last_layer_is_the_models_own_output(name: str) -> None:
    check(ALL[name]())


def changed(name: str, config: type, **fields: Any) -> Any:
    known = FAMILIES[name]().config.to_dict() if name in FAMILIES else {}
    return build(config(**{**known, **fields}))


def test_logits_that_are_scaled_or_capped() -> None:
    assert check(changed("granite", GraniteConfig, logits_scaling=4.0)).scale == pytest.approx(0.25)
    assert check(changed("cohere", CohereConfig, logit_scale=3.0)).scale == pytest.approx(3.0)
    # a cap that the logits reach
    assert check(changed("gemma2", Gemma2Config, final_logit_softcapping=1.5)).cap == 1.5


def test_opt_without_a_last_norm_and_with_a_projection() -> None:
    bare = check(changed("opt", OPTConfig, do_layer_norm_before=False))
    assert bare.tail == ()
    both = check(changed("opt", OPTConfig, word_embed_proj_dim=16))
    assert [type(module).__name__ for module in both.tail] == ["LayerNorm", "Linear"]


def test_half_precision() -> None:
    check(llama().to(torch.bfloat16), tolerance=0.03)


def test_lens_stays_the_base_models() -> None:
    model = llama(tie_word_embeddings=False)
    stream, logits = streams(model)
    whole, few = Lens.of(model), Lens.of(model, FEW)
    full = FullModel(model)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert not torch.allclose(streams(full)[1], logits, atol=0.1)
    for lens, columns in ((whole, slice(None)), (few, list(FEW))):
        assert torch.allclose(lens.logits(stream[-1]), logits[:, columns], atol=1e-5)
    check(full)  # and a new one is of the weights that are on
    with full.disable_adapter():
        assert torch.allclose(Lens.of(full).logits(stream[-1]), logits, atol=1e-5)


def test_output_embeddings_with_an_adapter_are_called() -> None:
    model = lora(llama(tie_word_embeddings=False), target_modules=["q_proj", "lm_head"])
    before = streams(model)[1]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name and "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(streams(model)[1], before, atol=0.1)
    assert check(model).weight is None


def test_what_cannot_be_followed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    forward = LlamaForCausalLM.forward

    def bent(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits**3
        return output

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", bent)
        with pytest.raises(ModelError, match="do not give its own logits"):
            Lens.of(model)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(ModelError, match="no output embeddings"):
        Lens.of(model)
    # one that is never called
    monkeypatch.setattr(model, "get_output_embeddings", lambda: torch.nn.Linear(32, 128))
    with pytest.raises(ModelError, match="does not call"):
        Lens.of(model)


def test_watching_leaves_nothing_behind() -> None:
    model = llama().train()
    Lens.of(model)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ------------------------------------------------------------------------------------------- measures


def test_label_tokens() -> None:
    assert LabelTokens.of([(4,), (7,)]) == LabelTokens((), (4, 7), (0, 1))
    # told apart by their second tokens; two share it
    assert LabelTokens.of([(4, 1), (4, 2, 3), (4, 2, 5)]) == LabelTokens((4,), (1, 2), (0, 1, 1))
    assert LabelTokens.of([]) is None
    assert LabelTokens.of([(4,), (4, 2)]) is None  # one begins the other


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


def fed(meter: LensMeter, model: Any, count: int = 1) -> LensResult:
    """``icl`` and ``base`` of each query, read at their last ``count`` positions."""
    pairs = [[streams(model, ids)[0][:, -count:] for ids in both] for both in contexts()]
    for view, place in (("icl", 0), ("base", 1)):
        for index, found in enumerate(pairs):
            meter.add(view, index, {"residual": found[place]}, {"residual": found[0]})
    return meter.finish()


def test_measures_of_labels() -> None:
    model = llama(num_hidden_layers=3)
    gold = [0, 1, 2, 0, 1, 2]
    few = fed(LensMeter.for_task(model, range(3), LABELS, gold), model)
    whole = fed(LensMeter.for_task(model, range(3), LABELS, gold, whole=True), model)
    own = {
        view: torch.stack([streams(model, ids)[1][-1] for ids in part])
        for view, part in zip(("icl", "base"), zip(*contexts(), strict=True), strict=True)
    }
    label_p = {view: logits[:, list(FEW)].softmax(-1).double() for view, logits in own.items()}
    teacher = label_p["icl"].argmax(-1)  # none of its answers is a label
    assert few.over == "labels"
    assert whole.over == "vocabulary"
    for view, p in label_p.items():
        found = few.views[view]
        assert {x.shape for x in found.values()} == {(6, 3)}
        last = {name: x[:, -1] for name, x in found.items()}
        assert last["agreement"].tolist() == (p.argmax(-1) == teacher).double().tolist()
        assert last["gold"].tolist() == (p.argmax(-1) == torch.tensor(gold)).double().tolist()
        at_teacher = p.gather(1, teacher[:, None])[:, 0].log().numpy()
        np.testing.assert_allclose(last["log_probability"], at_teacher, atol=1e-5)
        jsd = [jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, label_p["icl"], strict=True)]
        np.testing.assert_allclose(last["divergence"], jsd, atol=1e-5)
        np.testing.assert_allclose(last["divergence_from_answer"], jsd, atol=1e-5)
        for name in ("agreement", "gold", "divergence"):
            np.testing.assert_allclose(whole.views[view][name], found[name], atol=1e-5)
        answer = own["icl"].argmax(-1)
        expected = own[view].log_softmax(-1).gather(1, answer[:, None])[:, 0].numpy()
        np.testing.assert_allclose(whole.views[view]["log_probability"][:, -1], expected, atol=1e-4)
        assert whole.views[view]["top1"][:, -1].tolist() == (own[view].argmax(-1) == answer).tolist()
    assert few.views["icl"]["divergence"].max() == 0
    # before the last layer ICL itself is not there yet
    assert few.views["icl"]["divergence_from_answer"][:, 0].max() > 0.001
    assert few.chance["agreement"] == teacher.bincount().max() / 6
    assert few.chance["gold"] == pytest.approx(1 / 3)


def test_measures_of_free_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(num_hidden_layers=3)
    monkeypatch.setattr(readings, "TOP_TOKENS", 5)
    found = fed(LensMeter.for_task(model, range(3)), model, count=6)
    monkeypatch.setattr(readings, "_BLOCK", 128)  # a row at a time
    for view, measures in fed(LensMeter.for_task(model, range(3)), model, count=6).views.items():
        for name, values in measures.items():
            np.testing.assert_allclose(values, found.views[view][name], atol=1e-6)
    assert "gold" not in found.views["base"]
    assert found.chance == {}
    assert found.views["icl"]["agreement"][:, -1].tolist() == [1.0] * 6
    places = [0, 2, 3, 5]  # four of six positions
    lens = Lens.of(model)
    for index, both in enumerate(contexts()):
        icl, base = (lens.logits(streams(model, ids)[0][:, -6:][:, places]).softmax(-1) for ids in both)
        answer = icl[-1].argmax(-1)
        at_answer = base[:, range(4), answer].log().mean(-1)
        np.testing.assert_allclose(found.views["base"]["log_probability"][index], at_answer, atol=1e-4)
        share = (base.argmax(-1) == answer).double().mean(-1)
        assert found.views["base"]["agreement"][index].tolist() == share.tolist()
        for name, of in (("divergence", icl), ("divergence_from_answer", icl[-1:].expand_as(icl))):
            first = of.topk(5, dim=-1).indices
            p, q = (_outcomes(x, first) for x in (of, base))
            jsd = (jensenshannon(p, q, base=2, axis=-1) ** 2).mean(-1)
            np.testing.assert_allclose(found.views["base"][name][index], jsd, atol=1e-5)


def _outcomes(p: torch.Tensor, first: torch.Tensor) -> np.ndarray:
    chosen = p.double().gather(-1, first)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1).numpy()


def test_answers_that_are_given() -> None:
    model = llama()
    answers: list[tuple[int, ...]] = []
    meter = LensMeter.for_task(model, range(2), LABELS, answers=answers)
    answers += [(77,), (5,), (9,), (9,), (9,), (100,)]  # known only once the meter is there
    agreement = fed(meter, model).views["icl"]["agreement"][:, -1]
    tops = [int(streams(model, both[0])[1][-1, list(FEW)].argmax()) for both in contexts()]
    assert agreement.tolist() == [float(a == b) for a, b in zip(tops, [2, 1, 0, 0, 0, tops[5]], strict=True)]


def test_labels_that_begin_alike() -> None:
    model = llama()
    answers = [(50, 9), (50, 5), (51, 9), (50, 9), (50, 77), (50, 9)]
    meter = LensMeter.for_task(model, range(2), [(50, 9), (50, 5), (50, 77)], answers=answers)
    found = fed(meter, model, count=2)
    # at the second position, and without the answer that is no label from its first token on
    p = torch.stack([streams(model, contexts()[i][1])[1][-1, list(FEW)] for i in (0, 1, 3, 4, 5)]).softmax(-1)
    expected = p[range(5), [0, 1, 0, 2, 0]].log()
    np.testing.assert_allclose(found.views["base"]["log_probability"][:, -1], expected, atol=1e-5)
    assert found.chance["agreement"] == 3 / 5
    with pytest.raises(ModelError, match="begins as the labels do"):
        fed(LensMeter.for_task(model, range(2), [(50, 9), (50, 5)], answers=[(1, 2)] * 6), model, count=2)


def test_a_view_with_a_lens_of_its_own() -> None:
    model = llama()
    meter = LensMeter.for_task(model, range(2), LABELS)
    usual = fed(meter, model).views["base"]["log_probability"]
    with torch.no_grad():
        model.get_output_embeddings().weight[list(FEW)] = 0
    flat = Lens.of(model, FEW)
    other = fed(LensMeter(meter.lens, range(2), None, meter.labels, None, {"base": flat}), model)
    np.testing.assert_allclose(other.views["base"]["log_probability"], -np.log(3), atol=1e-6)
    assert not np.allclose(usual, -np.log(3), atol=0.01)


def test_memory_is_that_of_a_block() -> None:
    model = llama()
    meter = LensMeter.for_task(model, range(2), LABELS)
    stream = {"residual": streams(model)[0][:, -1:]}
    for block in range(3):
        for view in ("icl", "base", "sft"):
            for index in range(4 * block, 4 * block + 4):
                meter.add(view, index, stream, stream)
        assert len(meter._references) == 4
    assert meter.finish().views["sft"]["agreement"].shape == (12, 2)


def test_what_does_not_fit() -> None:
    model = llama()
    stream = {"residual": streams(model)[0][:, -1:]}
    with pytest.raises(ValueError, match="3 layers"):
        LensMeter.for_task(model, range(3), LABELS).add("base", 0, stream, stream)
    with pytest.raises(ValueError, match="its answer 2 ids"):
        LensMeter.for_task(model, range(2), LABELS, answers=[(9, 9)]).add("base", 0, stream, stream)
    with pytest.raises(ValueError, match="needs the labels"):
        LensMeter(Lens.of(model, FEW), range(2))


# ------------------------------------------------------------------------------------------- summary


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
    return LensResult([3, 4, 5, 6, 7, 8], list(range(n)), made, "labels", {"agreement": 0.5, "gold": 0.5})


SHARES = {
    "icl": [0.5, 0.5, 0.8, 0.9, 0.95, 1.0],
    "base": [0.5, 0.5, 0.5, 0.5, 0.7, 0.7],
    "sft": [0.5, 0.8, 0.5, 0.5, 0.5, 0.9],
    "ia2": [0.3, 0.3, 0.3, 0.3, 0.7, 0.7],
}


def test_summary_says_where_the_task_shows() -> None:
    section = summarise([result(SHARES, seed=seed) for seed in range(5)])
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


def test_view_of_some_trials_only() -> None:
    section = summarise([result(SHARES), result({"base": SHARES["base"], "icl": SHARES["icl"]}, seed=1)])
    assert {view["name"]: view["n"] for view in section["views"]} == {
        "icl": 400, "base": 400, "sft": 200, "ia2": 200
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- figures


def numbers(figure: Figure) -> list[dict[str, str]]:
    names = [column.title for column in figure.numbers.columns]
    return [dict(zip(names, (e.text for e in row), strict=True)) for row in figure.numbers.rows]


def test_figure(tmp_path: Path) -> None:
    controls = {"icl-other": SHARES["sft"], "sft+demos": SHARES["icl"], "sft~seed": SHARES["sft"]}
    section = summarise([result({**SHARES, **controls})])
    [figure] = lens_figures(section, "tiny: words")
    assert len(figure.panels) == 4
    picture = figure.save(tmp_path / "lens.svg").read_text()
    assert all(f">{name}</text>" in picture for name in (*SHARES, "icl-other"))
    assert not any(f">{name}</text>" in picture for name in ("sft+demos", "sft~seed"))
    assert len(figure.pictures()) == 4
    rows = numbers(figure)
    assert len(rows) == 5 * 6
    icl = [row for row in rows if row["view"] == "icl"]
    assert [row["layer"] for row in icl] == ["3", "4", "5", "6", "7", "8"]
    assert [row["task shows from here"] for row in icl] == ["", "", "yes", "", "", ""]
    found = section["views"][0]["agreement_by_layer"]
    value, low, high = (found[name][1] for name in ("value", "low", "high"))
    assert icl[1]["agreement with ICL's answer"] == f"{value:.3f} [{low:.3f}, {high:.3f}]"
    assert icl[1]["log-probability of ICL's answer"].startswith("−0.693")


def test_figure_of_little(tmp_path: Path) -> None:
    lone = LensResult([0], [0, 1], {"icl": {"agreement": np.ones((2, 1))}}, "vocabulary", {})
    section = summarise([lone])
    [figure] = lens_figures(section, "")
    assert len(figure.panels) == 1
    assert "one label for every query" not in figure.caption
    figure.save(tmp_path / "lens.svg")
    section["views"][0]["agreement_by_layer"] = {"value": [None], "low": [None], "high": [None]}
    [figure] = lens_figures(section, "")
    figure.save(tmp_path / "lens.svg")
    assert numbers(figure)[0]["agreement with ICL's answer"] == "–"
    assert lens_figures({**section, "views": []}, "") == []
