"""``ia2 analyze``: whom it looks at, what views are, what comes out, and what it refuses.

The runs are real, of the small in-context learner.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benches import icl_base, icl_examples
from helpers.command_line import run, write_rows

from ia2.analysis import conditions
from ia2.analysis.analyze import AnalysisSettings, analyze
from ia2.analysis.checkpoints import find_checkpoints
from ia2.analysis.conditions import BASE, ICL, OTHER, Condition, Runner, conditions_of, run_conditions
from ia2.analysis.sections.activations import ActivationAccumulator
from ia2.config import CompareConfig, TrainConfig
from ia2.data.examples import Example, Examples
from ia2.experiment.adapt import adapt
from ia2.experiment.compare import compare
from ia2.models.load import BaseModel
from ia2.prompts.task import Task, make_task
from ia2.report.analysis import analysis_figures, analysis_tables, analysis_verdict
from ia2.utils.errors import ConfigError, DataError, RunFolderError
from ia2.utils.files import finite, write_json

BRIEF = {"epochs": 3}
RECIPES = ["base", "icl", "sft", "ia2", "ia2-sft"]
ONLY = AnalysisSettings(("activations",))


def saved(file: Path, rows: Examples) -> str:
    return str(write_rows(file, [(e.query, e.answer or "") for e in rows]))


@pytest.fixture(scope="module")
def base(tiny_icl_model_path: Path) -> BaseModel:
    return icl_base(tiny_icl_model_path)


@pytest.fixture(scope="module")
def runs(
    base: BaseModel, tiny_icl_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A comparison with test rows, a cross-fitted one, and two training runs on the same examples."""
    root = tmp_path_factory.mktemp("runs")
    data = saved(root / "rows.jsonl", icl_examples(30))
    test_data = saved(root / "test.jsonl", icl_examples(12, seed=9))
    rows, test = Examples.load(data), Examples.load(test_data)
    settings: dict[str, Any] = {
        "align": BRIEF,
        "sft": BRIEF,
        "learning_rates": [0.01],
        "num_examples": 8,
        "task": "classification",
        "data": data,
    }
    tested = CompareConfig(seeds=2, recipes=RECIPES, test_data=test_data, **settings)
    compare(base, rows, tested, test=test, output_dir=root / "compare")
    crossed = CompareConfig(seeds=1, folds=2, recipes=["sft", "ia2"], **settings)
    compare(base, rows, crossed, output_dir=root / "crossed")
    for recipe in ("sft", "ia2-sft"):
        config = TrainConfig(recipe=recipe, test_data=test_data, **settings)
        adapt(icl_base(tiny_icl_model_path), rows, config, test=test, output_dir=root / recipe)
    return {p.name: p for p in root.iterdir() if p.is_dir()}


def task_of(base: BaseModel, runs: dict[str, Path]) -> Task:
    found = find_checkpoints([runs["compare"]])
    return make_task(found.examples, found.config, base.tokenizer)


def by_name(result: dict[str, Any]) -> dict[str, Any]:
    return {view["name"]: view for view in result["activations"]["views"]}


def test_whom_a_comparison_holds(runs: dict[str, Path]) -> None:
    found = find_checkpoints([runs["compare"]])
    assert [(t.seed, t.fold) for t in found.sets] == [(0, None), (1, None)]
    for set_ in found.sets:
        assert [s.name for s in set_.checkpoints] == ["sft", "ia2", "ia2-sft"]
        assert all((s.weights / "stage.json").is_file() and s.seed == set_.seed for s in set_.checkpoints)
        assert len(set_.data.train) == 8
        assert len(set_.queries) == 12
        # neither demonstrations nor queries: 30 rows less those trained on
        assert len(set_.others) == 22
        assert not {e.query for e in set_.others} & {e.query for e in set_.data.train}
    assert find_checkpoints([runs["compare"] / "seed-1"]).sets[0].seed == 1


def test_folds_are_trials_and_their_queries_the_held_out_rows(runs: dict[str, Path]) -> None:
    trials = find_checkpoints([runs["crossed"]]).sets
    assert [(t.seed, t.fold) for t in trials] == [(0, 0), (0, 1)]
    assert sorted(place for t in trials for place in t.places) == list(range(30))
    for set_ in trials:
        trained = {e.source for e in set_.data.train}
        assert not trained & {e.source for e in set_.queries}
        assert not {e.source for e in set_.others} & (trained | {e.source for e in set_.queries})


def test_training_runs_on_the_same_examples_are_one_trial(runs: dict[str, Path]) -> None:
    found = find_checkpoints([runs["sft"], runs["ia2-sft"]])
    assert len(found.sets) == 1
    # a run of two stages also shows what the first one left
    assert [s.name for s in found.sets[0].checkpoints] == ["sft", "ia2-sft:align", "ia2-sft"]
    copy = shutil.copytree(runs["sft"], runs["sft"].with_name("again"))
    try:
        twice = find_checkpoints([runs["sft"], copy]).sets[0].checkpoints
        assert [s.name for s in twice] == ["sft", "sft@again"]
    finally:
        shutil.rmtree(copy)


@pytest.fixture
def runner(base: BaseModel, runs: dict[str, Path], tmp_path: Path) -> Any:
    made = Runner(base, task_of(base, runs), find_checkpoints([runs["compare"]]).sets[0], tmp_path)
    yield made
    made.close()


def test_each_view_is_that_model_on_those_prompts(runner: Runner) -> None:
    """Against one plain forward pass at a time, with the adapter's weights merged into the model's."""
    import copy

    from peft import PeftModel

    members = [0, 3]
    sites = ("output", "residual")
    answers, icl = runner.reference(members, sites)
    sft = next(s for s in runner.set.checkpoints if s.name == "sft")
    seen = {
        "icl": (None, "own", icl),
        "base": (None, "none", runner.run(BASE, members, answers, sites)),
        "sft": (sft, "none", runner.run(Condition("sft", sft), members, answers, sites)),
        "sft+demos": (
            sft,
            "own",
            runner.run(Condition("x", sft, "own"), members, answers, sites),
        ),
    }
    runner.close()
    outputs: dict[int, torch.Tensor] = {}
    for checkpoint, context, found in seen.values():
        model = copy.deepcopy(runner.base.model)
        if checkpoint is not None:
            model = PeftModel.from_pretrained(model, str(checkpoint.weights)).merge_and_unload()
        for place, layer in enumerate(model.model.layers):
            layer.self_attn.register_forward_hook(lambda m, a, o, p=place: outputs.update({p: o[0]}))
        for prompt, activations in zip(runner.prompts(context, members), found, strict=True):
            with torch.no_grad():
                record = model(torch.tensor([prompt]), output_hidden_states=True)
            expected = torch.stack([outputs[i][0, -1:] for i in range(4)])
            torch.testing.assert_close(activations["output"], expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(
                activations["residual"][0], record.hidden_states[1][0, -1:], atol=2e-5, rtol=1e-4
            )


def test_blocks_do_not_matter(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    sft = next(s for s in runner.set.checkpoints if s.name == "sft")
    results = []
    for size in (256, 5, 1):
        monkeypatch.setattr(conditions, "_MAX_BLOCK", size)
        meter = ActivationAccumulator([0, 1, 2, 3])
        answers: list[Any] = []
        for members in runner.blocks(("output",)):
            run_conditions(runner, [OTHER, BASE, Condition("sft", sft)], [meter], answers, members)
        assert len(answers) == 12
        results.append(meter.finish())
    for other in results[1:]:
        assert set(other) == {"icl-other", "base", "sft"}
        for name, similar in other.items():
            np.testing.assert_allclose(similar.asim, results[0][name].asim, atol=1e-5)


def test_demonstrations_that_virtual_tokens_leave_no_room_for(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of prompt tuning, whose tokens come before the prompt."""
    monkeypatch.setattr(conditions, "virtual_tokens", lambda model: runner.teaching.prompts.window - 10)
    sft = next(s for s in runner.set.checkpoints if s.name == "sft")
    runner.run(Condition("sft", sft), [0], [(5,)], ("output",))
    with pytest.raises(DataError, match=r"sft\+demos: \d+ tokens do not fit the 10 .* \(--no-controls\)"):
        runner.run(Condition("sft+demos", sft, "own"), [0], [(5,)], ("output",))


def test_controls(runs: dict[str, Path]) -> None:
    trials = find_checkpoints([runs["compare"]]).sets
    names = {v.name: v for v in conditions_of(trials[0], trials, controls=True, others=True)}
    assert set(names) == {
        "icl-other", "icl-mean", "base", "sft", "ia2", "ia2-sft",
        "sft+demos", "ia2+demos", "ia2-sft+demos", "sft~seed", "ia2~seed", "ia2-sft~seed",
    }  # fmt: skip
    twin = names["sft~seed"].checkpoint
    assert twin is not None
    assert twin.seed == 1
    assert twin.weights != names["sft"].checkpoint.weights  # type: ignore[union-attr]
    plain = conditions_of(trials[0], trials, controls=False, others=True)
    assert [v.name for v in plain] == ["base", "sft", "ia2", "ia2-sft"]
    assert {v.kind for v in plain} == {"base", "adapter"}
    assert names["ia2~seed"].kind == names["icl-mean"].kind == "control"
    assert ICL.kind == "base"


@pytest.fixture(scope="module")
def whole(base: BaseModel, runs: dict[str, Path]) -> dict[str, Any]:
    return analyze([runs["compare"]], base=base, output_dir=runs["compare"])


def test_similarity_is_what_the_comparison_measured(whole: dict[str, Any], runs: dict[str, Path]) -> None:
    known = json.loads((runs["compare"] / "compare.json").read_text())["recipes"]
    found = by_name(whole)
    for name in ("base", "sft", "ia2", "ia2-sft"):
        assert found[name]["asim"]["value"] == pytest.approx(known[name]["asim"]["value"], abs=1e-5)
        np.testing.assert_allclose(
            found[name]["asim_by_layer"]["value"], known[name]["similarity"]["asim_by_layer"], atol=1e-5
        )
        np.testing.assert_allclose(
            found[name]["variance_unexplained_by_layer"],
            known[name]["similarity"]["variance_unexplained_by_layer"],
            rtol=1e-4,
        )


def test_what_the_sections_say(whole: dict[str, Any]) -> None:
    views_found = by_name(whole)
    for view in views_found.values():
        assert view["asim"]["low"] <= view["asim"]["value"] <= view["asim"]["high"]
        assert view["n"] == 24
        assert view["asim_by_token"]["count"] == [24]
    # what this model's tests are built on: alignment brings the adapter to ICL, demonstrations more so
    assert views_found["ia2"]["asim"]["value"] > views_found["sft"]["asim"]["value"]
    assert views_found["ia2"]["centred"]["value"] > views_found["base"]["centred"]["value"]
    assert views_found["icl-other"]["asim"]["value"] > views_found["base"]["asim"]["value"]
    assert "centred" not in views_found["icl-mean"]
    pairs = {(d["a"], d["b"]): d["asim"]["value"] for d in whole["activations"]["differences"]}
    for (a, b), value in pairs.items():
        expected = views_found[a]["asim"]["value"] - views_found[b]["asim"]["value"]
        assert value == pytest.approx(expected, abs=1e-9)
    assert set(whole) >= {"lens", "heads", "neurons", "weights"}
    assert {pair["kind"] for pair in whole["weights"]["pairs"]} == {"recipes", "seeds"}
    assert json.loads(json.dumps(whole, allow_nan=True))


def test_the_report_has_it(
    whole: dict[str, Any], runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    names = [figure.name for figure in analysis_figures(whole)]
    assert len(set(names)) == len(names) > 5
    for figure in analysis_figures(json.loads(json.dumps(finite(whole)))):
        assert figure.save(tmp_path / f"{figure.name}.svg").stat().st_size > 3000
    sentences = " ".join(analysis_verdict(whole))
    # two draws: however large the difference, its interval holds zero
    assert "as near to ICL as SFT" in sentences and "difference +0." in sentences
    assert "one constant" in sentences
    table = analysis_tables(whole)[0]
    assert [row[0].text for row in table.rows] == list(by_name(whole))
    ran = run(capsys, "report", str(runs["compare"]), "--output", str(tmp_path / "page.html"), "--quiet")
    assert ran.status == 0
    page = (tmp_path / "page.html").read_text()
    assert "Inside compare" in page
    assert str(runs["compare"].parent) not in page
    ran = run(capsys, "report", str(runs["compare"]), "--markdown", "-q")
    assert "Similarity of attention outputs to ICL" in ran.out


def test_the_causal_check_and_side_effects(
    base: BaseModel, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ia2.analysis.sections import effects

    passes: list[Any] = []
    perplexity = effects.perplexity
    monkeypatch.setattr(
        effects, "perplexity", lambda model, *a, **k: passes.append(model) or perplexity(model, *a, **k)
    )
    settings = AnalysisSettings(("neurons", "causal", "effects"), causal_queries=4)
    result = analyze([runs["compare"]], settings, base=base, max_queries=6, adapters=["sft"])
    assert result["subjects"] == ["sft"]
    causal, found = result["causal"], result["effects"]
    assert set(causal["targets"]) == set(causal["reverse"]) == {"base", "sft"}
    assert (causal["queries"], causal["trials"]) == (4, 2)
    # one token: nothing but attention outputs tells the two runs apart at the answer
    assert causal["targets"]["base"]["all"]["recovered"] == pytest.approx(1, abs=1e-3)
    assert causal["sets"][0].startswith("50 neurons most unlike ICL")
    assert found["views"] == ["base", "sft"]
    assert found["wordings"]["rows"] == 6
    assert found["perplexity"]["texts"] == 40
    # of the base model what does not depend on the training set is measured once, for both seeds
    assert len(passes) == 3
    sentences = " ".join(analysis_verdict(result))
    assert "Causal check, base: of a gap of" in sentences
    assert "Perplexity on plain text, over the base model's: SFT" in sentences
    with pytest.raises(ConfigError, match=r"adapters: there is no .stf.\. Did you mean .sft."):
        analyze([runs["compare"]], settings, base=base, adapters=["stf"])
    count = len(passes)
    unknown = AnalysisSettings(("effects",), benchmarks=("SST3",))
    with pytest.raises(ConfigError, match="SST3"):
        analyze([runs["compare"]], unknown, base=base)
    assert len(passes) == count
    with pytest.raises(ConfigError, match="effects is not among the parts"):
        AnalysisSettings(("lens",), benchmarks=("SST2",))


def test_cross_fitted_rows_are_pooled(base: BaseModel, runs: dict[str, Path]) -> None:
    result = analyze([runs["crossed"]], ONLY, base=base)
    found = by_name(result)
    assert found["sft"]["n"] == 30
    # one seed: there is no adapter of another
    assert not any(name.endswith("~seed") for name in found)


def test_free_text(base: BaseModel, tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = icl_examples(16)
    data = saved(tmp_path / "rows.jsonl", rows)
    config = TrainConfig(
        recipe="ia2", data=data, num_examples=6, task="generation", max_answer_tokens=3,
        selection="dev", align=BRIEF,
    )  # fmt: skip
    adapt(icl_base(tiny_icl_model_path), Examples.load(data), config, output_dir=tmp_path / "out")
    result = analyze([tmp_path / "out"], base=base)
    view = by_name(result)["ia2"]
    assert view["n"] == 3  # the dev rows: there are no test rows
    counts = view["asim_by_token"]["count"]
    assert counts[0] == 3
    assert len(view["asim_by_token"]["value"]) == len(counts) <= 3
    assert result["task"] == "generation"
    assert analysis_verdict(result)[0].startswith("asim to ICL: IA2 ")


def test_the_command(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    ran = run(
        capsys, "analyze", str(runs["compare"] / "seed-0"), "--parts", "activations,weights", "--no-controls",
        "--max-queries", "6", "--output-dir", str(out), "--figures", str(tmp_path / "figures"), "--quiet",
    )  # fmt: skip
    assert ran.status == 0
    assert "asim" in ran.out
    found = json.loads((out / "analysis.json").read_text())
    assert found["data"]["queries"] == 6
    assert list(by_name(found)) == ["base", "sft", "ia2", "ia2-sft"]
    assert (tmp_path / "figures" / "activations-layers.svg").is_file()
    ran = run(
        capsys, "analyze", str(runs["sft"]), "--parts", "weights", "--json", "-q", "--output-dir", str(out)
    )
    assert ran.json["weights"]["adapters"][0]["name"] == "sft"


def test_mistakes(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such folder" in run(capsys, "analyze", str(tmp_path / "none")).refusal()
    assert "Did you mean 'heads'" in run(capsys, "analyze", str(runs["sft"]), "--parts", "head").refusal()
    assert "none are named" in run(capsys, "analyze", str(runs["sft"]), "--parts", ",").refusal()
    with pytest.raises(ConfigError, match="there is no 'x'"):
        AnalysisSettings(("x",))
    (tmp_path / "file").write_text("")
    refused = run(capsys, "analyze", str(runs["sft"]), "--output-dir", str(tmp_path / "file")).refusal()
    assert "file is a file). Choose another folder" in refused
    strange = saved(tmp_path / "strange.jsonl", Examples([Example("a0 z1", " L77", "row 1")], name="x"))
    refused = run(capsys, "analyze", str(runs["sft"]), "--data", strange, "--quiet").refusal()
    assert "L77" in refused
    one = saved(tmp_path / "one.jsonl", icl_examples(1))
    with pytest.raises(ConfigError, match="at least two queries"):
        analyze([runs["sft"]], AnalysisSettings(("causal",)), data=one)
    spoilt = Path(shutil.copytree(runs["sft"], tmp_path / "spoilt"))
    (spoilt / "metrics.json").unlink()
    with pytest.raises(RunFolderError, match="has not finished"):
        find_checkpoints([spoilt])
    partial = Path(shutil.copytree(runs["compare"], tmp_path / "partial"))
    (partial / "seed-1" / "evaluations" / "ia2.json").unlink()
    with pytest.raises(RunFolderError, match="ia2 has not been evaluated yet"):
        find_checkpoints([partial])
    (partial / "ia2_run.json").unlink()
    with pytest.raises(RunFolderError, match="only results are there"):
        find_checkpoints([partial])


def test_changed_rows_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(runs["compare"], tmp_path / "moved"))
    facts = json.loads((moved / "ia2_run.json").read_text())
    facts["config"]["data"] = saved(tmp_path / "changed.jsonl", icl_examples(30, seed=5))
    write_json(moved / "ia2_run.json", facts)
    with pytest.raises(DataError, match="have changed since"):
        find_checkpoints([moved])


def test_other_models_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs["sft"], tmp_path / "other"))
    facts = json.loads((other / "ia2_run.json").read_text())
    facts["config"]["model"] = "owner/other"
    write_json(other / "ia2_run.json", facts)
    names = [c.name for c in find_checkpoints([runs["sft"], other]).sets[0].checkpoints]
    assert "sft@other" in names  # another name of the same content
    facts["data"]["model"]["weights"] = "another digest"
    write_json(other / "ia2_run.json", facts)
    with pytest.raises(ConfigError, match=r"model is 'owner/other', .*; these differ: weights\."):
        find_checkpoints([runs["sft"], other])
    del facts["data"]["model"]
    write_json(other / "ia2_run.json", facts)
    with pytest.raises(RunFolderError, match=f"{other}.*'model'"):
        find_checkpoints([runs["sft"], other])


def test_a_missing_adapter_is_told(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = Path(shutil.copytree(runs["compare"], tmp_path / "bare"))
    for folder in bare.glob("seed-*/sft"):
        shutil.rmtree(folder)
    found = find_checkpoints([bare])
    assert [c.name for c in found.sets[0].checkpoints] == ["ia2", "ia2-sft"]
    assert "sft has no weights there" in caplog.text
