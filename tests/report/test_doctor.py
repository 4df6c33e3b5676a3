"""``ia2 doctor``: every rule fires on a run with the fault, and none on real healthy ones.

The healthy runs are real, of the small in-context learner; faults are put into copies of their files, where
the code writes them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.benches import icl_base, icl_examples
from helpers.command_line import run

from ia2.config import CompareConfig, TrainConfig
from ia2.data.examples import Examples
from ia2.experiment.adapt import adapt
from ia2.experiment.compare import compare
from ia2.experiment.run_folder import find_runs
from ia2.report.doctor import findings
from ia2.report.doctor.reading import read_facts
from ia2.report.doctor.signatures import RULES, SEVERITIES, Diagnosis, Finding, diagnose, diagnose_all
from ia2.utils.errors import RunFolderError
from ia2.utils.manifest import MANIFEST

RATE = 0.01
ROOT = Path(__file__).parents[2]
Edit = Callable[[Any], Any]


@pytest.fixture(scope="module")
def healthy(tiny_icl_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A comparison and a training run that are as they should be, and their rows in files."""
    root = tmp_path_factory.mktemp("doctor")
    for name, rows in (("rows.jsonl", icl_examples(24)), ("test.jsonl", icl_examples(40, seed=9))):
        lines = [json.dumps({"prompt": e.query, "completion": e.answer}) + "\n" for e in rows]
        (root / name).write_text("".join(lines))
    settings: dict[str, Any] = {
        # one layer of this model is four fifths of the plain distance
        "align": {"normalise": True, "patience": 3},
        "sft": {"epochs": 15},
        "learning_rates": [RATE],
        "num_examples": 16,
        "data": str(root / "rows.jsonl"),
        "test_data": str(root / "test.jsonl"),
        "task": "classification",
    }
    base = icl_base(tiny_icl_model_path)
    rows, test = Examples.load(root / "rows.jsonl"), Examples.load(root / "test.jsonl")
    recipes = ["base", "icl", "sft", "ia2", "ia2-sft"]
    compare(
        base,
        rows,
        CompareConfig(seeds=1, recipes=recipes, **settings),
        test=test,
        output_dir=root / "compare",
    )
    adapt(base, rows, TrainConfig(recipe="ia2-sft", **settings), test=test, output_dir=root / "train")
    return {"compare": root / "compare", "train": root / "train"}


@pytest.fixture
def compared(healthy: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the comparison, to be spoilt."""
    return spoilable(healthy["compare"], tmp_path / "compare")


@pytest.fixture
def trained(healthy: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the training run, to be spoilt."""
    return spoilable(healthy["train"], tmp_path / "train")


def spoilable(run_folder: Path, copy: Path) -> Path:
    """A copy of a run whose files may be changed: without the list of their digests, which would tell."""
    shutil.copytree(run_folder, copy)
    (copy / MANIFEST).unlink()
    return copy


def edit(file: Path, change: Edit) -> None:
    """Change a JSON file in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def evaluation(folder: Path, recipe: str) -> Path:
    return folder / "seed-0" / "evaluations" / f"{recipe}.json"


def stage(folder: Path, name: str) -> Path:
    return next(folder.rglob(f"{name}/lr-{RATE:g}/stage.json"))


def answer(folder: Path, recipe: str, right: float) -> None:
    """Give the recipe this accuracy in the label set."""

    def change(value: Any) -> None:
        column = value["measured"]["plain"]["labels"]["correct"]
        count = round(right * len(column))
        value["measured"]["plain"]["labels"]["correct"] = [1.0] * count + [0.0] * (len(column) - count)

    edit(evaluation(folder, recipe), change)


def asim(folder: Path, recipe: str, value: float) -> None:
    """Give the recipe this similarity to ICL, a little more or less from query to query."""
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    edit(evaluation(folder, recipe), lambda found: found.update(asim=(value + noise).tolist()))


def losses(file: Path, train: list[float], dev: list[float], **facts: Any) -> None:
    """A stage with these losses, two steps apart, four steps an epoch; the best one chosen."""
    history: list[dict[str, Any]] = []
    for place in range(max(len(train), len(dev))):
        at = {"step": 2 * place + 2, "epoch": (place + 1) / 2}
        history += [{"loss": train[place], **at}] if place < len(train) else []
        history += [{"eval_loss": dev[place], **at}] if place < len(dev) else []
    finite = [loss if loss == loss else float("inf") for loss in dev]
    best = {"best_step": 2 * int(np.argmin(finite)) + 2, "steps": 2 * len(dev), "dev_loss": min(finite)}
    edit(
        file, lambda value: value.update({"history": history, "selection_loss": min(finite), **best, **facts})
    )


def config(folder: Path, **changes: Any) -> None:
    """Change settings of a run; dotted names with a double underscore."""

    def change(value: Any) -> None:
        for name, new in changes.items():
            section, _, key = name.partition("__")
            value["config"] = {
                **value["config"],
                section: {**value["config"][section], key: new} if key else new,
            }

    edit(folder / "ia2_run.json", change)


def fired(folder: Path, rule: str) -> Finding:
    """The rule's finding, the first if there are several."""
    found = diagnose(folder)
    mine = [finding for finding in found.findings if finding.rule == rule]
    assert mine, (rule, [finding.rule for finding in found.findings], found.untold.get(rule))
    reads_well(mine[0])
    return mine[0]


def reads_well(finding: Finding) -> None:
    assert re.fullmatch(r"[A-Z][^\n]+\.", finding.message), finding.message
    assert not finding.evidence.endswith(".") and re.search(r"\d", finding.evidence), finding.evidence
    assert not finding.advice.endswith(".") and finding.advice, finding.advice
    assert finding.severity in SEVERITIES
    for text in (finding.message, finding.evidence, finding.advice, finding.where):
        assert "None" not in text and "nan" not in text.replace("the loss is nan", ""), text


# ------------------------------------------------------------------------------------------ healthy


def test_nothing_is_found_in_healthy_runs(healthy: dict[str, Path]) -> None:
    for folder in healthy.values():
        found = diagnose(folder)
        assert found.findings == (), found.findings
        assert found.finished and not found.missing
        assert {*found.clear, *found.untold} == set(RULES)
    together = {rule for folder in healthy.values() for rule in diagnose(folder).clear}
    # it needs several rates; its own test judges it
    assert set(RULES) - together == {"rate-at-edge"}


def test_committed_results_have_no_problem() -> None:
    for file in sorted((ROOT / "results").rglob("compare.json")):
        found = diagnose(file.parent)
        assert found.count("problem") == 0, (file, found.findings)
        for finding in found.findings:
            reads_well(finding)
    demo = diagnose(ROOT / "results" / "demo")
    assert not demo.findings
    assert "asim-no-gain" in demo.clear and "sft-undid-alignment" in demo.clear


# ------------------------------------------------------------------------------------------ teacher


@pytest.mark.parametrize("right", [0.25, 0.42])
def test_icl_at_chance(compared: Path, right: float) -> None:
    answer(compared, "icl", right)
    found = fired(compared, "icl-at-chance")
    assert found.severity == "problem" and found.where == "icl, seed 0"
    assert f"right on {round(right * 40) / 40:.0%} of 40 rows" in found.evidence
    assert found.numbers["chance"] >= 1 / 3


def test_icl_above_chance(compared: Path) -> None:
    answer(compared, "icl", 0.8)
    assert "icl-at-chance" in diagnose(compared).clear


def test_icl_at_chance_in_training_runs_is_what_the_teacher_said(trained: Path) -> None:
    index = trained / "teacher" / "train" / "index.json"
    edit(index, lambda value: [answer.update(text="L1") for answer in value["answers"]])
    found = fired(trained, "icl-at-chance")
    assert found.severity == "problem" and found.where == "teacher" and "of 16 rows" in found.evidence


def test_what_the_teacher_should_say_comes_from_the_rows_if_they_are_the_same(trained: Path) -> None:
    rows = read_facts(trained).rounds[0].train
    assert rows is not None and len(rows) == 16
    config(trained, data="gone.jsonl")
    assert "gone.jsonl is not there" in diagnose(trained).untold["icl-at-chance"]
    other = trained.parent / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"{q} x", "completion": a}) + "\n" for q, a in rows) * 2)
    config(trained, data=str(other))
    assert "has changed since" in diagnose(trained).untold["icl-at-chance"]
    config(trained, data=None)
    assert "in memory" in diagnose(trained).untold["label-missing"]


# ----------------------------------------------------------------------------------------- training


def test_diverged(trained: Path) -> None:
    bad = [2.0, float("nan"), float("nan")]
    losses(stage(trained, "align"), bad, bad)
    found = fired(trained, "diverged")
    assert found.severity == "problem" and "stage align (align/lr-0.01)" in found.where
    assert "--learning-rates 0.001" in found.advice


def test_nan_of_a_loss_is_written_as_json_knows_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses(stage(trained, "align"), [float("nan")] * 2, [float("nan")] * 2)
    ran = run(capsys, "doctor", trained, "--json")
    assert ran.json["runs"][0]["findings"][0]["rule"] == "diverged"


@pytest.mark.parametrize("fell", [0.95, 1.2])
def test_alignment_not_learnt(compared: Path, fell: float) -> None:
    losses(stage(compared, "align"), [2.0, 2.0 * fell, 2.0 * fell], [2.0, 1.99, 1.98])
    found = fired(compared, "alignment-not-learnt")
    assert found.severity == "problem"
    # the stage that two recipes share is named once
    assert found.where == "ia2, ia2-sft, stage align (seed-0/align/lr-0.01)"
    assert found.numbers["fall"] == pytest.approx(1 - fell)


def test_alignment_that_fell_is_learnt(compared: Path) -> None:
    losses(stage(compared, "align"), [2.0, 1.9, 1.7], [2.0, 1.99, 1.98])
    assert "alignment-not-learnt" in diagnose(compared).clear


def test_rare_faults_are_notes(compared: Path) -> None:
    """One of three seeds is not the rule."""
    config(compared, seeds=3)
    for seed in (1, 2):
        shutil.copytree(compared / "seed-0", compared / f"seed-{seed}")
    losses(stage(compared, "align"), [2.0, 2.0], [2.0, 2.0])
    found = fired(compared, "alignment-not-learnt")
    assert found.severity == "note" and "(1 of 3: seed-0/align/lr-0.01)" in found.where
    losses(compared / "seed-1" / "align" / "lr-0.01" / "stage.json", [2.0, 2.1], [2.0, 2.0])
    assert fired(compared, "alignment-not-learnt").severity == "problem"


def test_rate_at_edge(compared: Path) -> None:
    config(compared, learning_rates=[1e-3, 3e-3, RATE])
    found = fired(compared, "rate-at-edge")
    assert "0.01 of 0.001, 0.003, 0.01 was chosen in 1 of 1 rounds" in found.evidence
    assert "--learning-rates 0.001 0.003 0.01 0.03" in found.advice
    config(compared, learning_rates=[1e-3, RATE, 1e-1])
    assert "rate-at-edge" in diagnose(compared).clear


def test_stages_at_rates_that_were_not_chosen_do_not_count(compared: Path) -> None:
    config(compared, learning_rates=[1e-3, RATE, 1e-1])
    shutil.copytree(stage(compared, "sft").parent, compared / "seed-0" / "sft" / "lr-0.1")
    losses(compared / "seed-0" / "sft" / "lr-0.1" / "stage.json", [float("nan")] * 2, [float("nan")] * 2)
    assert "diverged" in diagnose(compared).clear


@pytest.mark.parametrize(
    ("rows", "rates", "says"),
    [(0, [RATE], "no dev rows"), (3, [RATE], "to stop by"), (7, [RATE, 1e-3], "to choose by")],
)
def test_dev_too_small(compared: Path, rows: int, rates: list[float], says: str) -> None:
    edit(compared / "compare.json", lambda value: value["design"].update(num_dev=rows))
    config(compared, learning_rates=rates)
    found = fired(compared, "dev-too-small")
    assert found.severity == "warning" and says in found.message and str(rows) in found.evidence


# ------------------------------------------------------------------------------------------- inside


@pytest.mark.parametrize(("sft", "severity"), [(0.6, "warning"), (0.7, "problem")])
def test_asim_no_gain(compared: Path, sft: float, severity: str) -> None:
    asim(compared, "ia2-sft", 0.6)
    asim(compared, "sft", sft)
    if severity == "warning":  # a little better on average, and not on every query
        edit(evaluation(compared, "sft"), lambda v: v.update(asim=[0.9, *v["asim"][1:-1], 0.2]))
    found = fired(compared, "asim-no-gain")
    assert found.severity == severity and "paired by query" in found.evidence
    assert found.numbers["low"] <= 0


def test_asim_no_gain_from_the_summary_alone(compared: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(compared / "compare.json", alone)
    assert "asim-no-gain" in diagnose(alone).clear

    def swap(value: Any) -> None:
        recipes = value["recipes"]
        recipes["sft"]["asim"], recipes["ia2-sft"]["asim"] = (
            recipes["ia2-sft"]["asim"],
            recipes["sft"]["asim"],
        )

    edit(alone / "compare.json", swap)
    assert "from the summary" in fired(alone, "asim-no-gain").evidence


@pytest.mark.parametrize(("after", "severity"), [(0.5, "warning"), (0.38, "problem")])
def test_sft_undid_alignment(compared: Path, after: float, severity: str) -> None:
    for recipe, value in (("sft", 0.4), ("ia2", 0.9), ("ia2-sft", after)):
        asim(compared, recipe, value)
    found = fired(compared, "sft-undid-alignment")
    assert found.severity == severity and "--sft-ia2-weight" in found.advice
    assert found.numbers["kept"] == pytest.approx((after - 0.4) / 0.5)


def test_alignment_not_carried_over(compared: Path) -> None:
    asim(compared, "base", 0.5)
    asim(compared, "ia2", 0.45)
    assert fired(compared, "alignment-not-carried-over").severity == "problem"


# ------------------------------------------------------------------------------------------ answers


def test_labels_of_several_tokens(trained: Path) -> None:
    change = {"label_ids": [[66], [67, 9, 9], [71]], "max_answer_tokens": 11}
    edit(trained / "ia2_run.json", lambda value: value["task"].update(change))
    found = fired(trained, "labels-of-several-tokens")
    assert found.severity == "note" and "up to 3 tokens (' L2')" in found.evidence


def test_worse_than_base(compared: Path) -> None:
    answer(compared, "base", 0.9)
    answer(compared, "sft", 0.6)
    found = fired(compared, "worse-than-base")
    assert found.severity == "problem" and found.numbers["high"] < 0
    assert "0.600 against 0.900: difference -0.300" in found.evidence


def test_worse_than_guessing(compared: Path, trained: Path) -> None:
    answer(compared, "ia2", 0.3)
    assert fired(compared, "worse-than-guessing").where == "ia2, seed 0"
    edit(trained / "metrics.json", lambda v: v["test"]["labels"]["accuracy"].update(value=0.3))
    assert "accuracy in the label set 0.300" in fired(trained, "worse-than-guessing").evidence


def test_worse_than_sft(compared: Path) -> None:
    answer(compared, "sft", 0.9)
    answer(compared, "ia2-sft", 0.6)
    assert fired(compared, "worse-than-sft").severity == "warning"


# --------------------------------------------------------------------------------------------- rows


def put_rows(folder: Path, change: Callable[[list[dict[str, str]]], None]) -> None:
    """Other rows for a training run: the file, and the fingerprints that the run has of its draw."""
    file = folder.parent / "changed.jsonl"
    config_of = json.loads((folder / "ia2_run.json").read_text())["config"]
    rows = [json.loads(line) for line in Path(config_of["data"]).read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config(folder, data=str(file))
    split = Examples.load(file).split(num_examples=16, seed=0)
    prints = {"train": split.train.fingerprint, "dev": split.dev.fingerprint}
    edit(folder / "ia2_run.json", lambda value: value["data"].update(prints))


def test_label_missing(trained: Path) -> None:
    def rename(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["completion"] = row["completion"].replace("L6", "L2")

    put_rows(trained, rename)
    found = [f for f in diagnose(trained).findings if f.rule == "label-missing"]
    assert [(f.severity, f.where) for f in found] == [("warning", "train rows"), ("note", "dev rows")]
    assert found[0].evidence == "no train row has ' L6'" and "--balanced" in found[0].advice


@pytest.mark.parametrize("kind", ["train", "compare"])
def test_texts_hardly_read(trained: Path, compared: Path, kind: str) -> None:
    """What the run said when it began."""
    folder, name, part = (
        (trained, "ia2_run.json", "task") if kind == "train" else (compared, "compare.json", "design")
    )
    said = ["Some labels differ only by case", "' L1', ' l1'", "write them alike"]
    edit(folder / name, lambda value: value[part].update(advice=[said]))
    found = fired(folder, "texts-hardly-read")
    assert (found.message, found.evidence, found.advice) == (f"{said[0]}.", said[1], said[2])
    edit(folder / name, lambda value: value[part].pop("advice"))
    assert "texts-hardly-read" in diagnose(folder).untold


def test_repeated_rows(trained: Path) -> None:
    tested = json.loads((trained / "predictions.jsonl").read_text().splitlines()[0])["query"]
    put_rows(trained, lambda rows: rows[0].update(prompt=tested))
    found = fired(trained, "repeated-rows")
    assert found.severity == "problem" and found.evidence.startswith("1 prompts")


def test_one_prompt_with_two_answers(trained: Path) -> None:
    def tear(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["prompt"] = rows[0]["prompt"]

    put_rows(trained, tear)
    messages = [f.message for f in diagnose(trained).findings if f.rule == "repeated-rows"]
    assert messages == ["Training rows are among the dev rows.", "The same prompt has different answers."]


def test_evaluated_on_dev_rows(trained: Path) -> None:
    edit(trained / "metrics.json", lambda value: value.update(dev=value.pop("test")))
    assert fired(trained, "evaluated-on-dev").severity == "note"


def test_every_rule_has_a_test_and_is_documented() -> None:
    tests = Path(__file__).read_text()
    page = (ROOT / "docs" / "doctor.md").read_text()
    for rule in RULES:
        assert f'"{rule}"' in tests, rule
        assert f"| `{rule}` |" in page, rule
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", page, flags=re.MULTILINE)) == set(RULES)


# ----------------------------------------------------------------------------------- running, parts


def test_a_running_comparison_is_judged_by_what_is_there(compared: Path) -> None:
    (compared / "compare.json").unlink()
    evaluation(compared, "ia2-sft").unlink()
    shutil.rmtree(compared / "seed-0" / "align-sft")
    found = diagnose(compared)
    assert not found.finished
    assert found.missing == ("seed-0: ia2-sft", "compare.json (written last)")
    assert found.findings == () and "alignment-not-carried-over" in found.clear
    assert "the run has not come to it" in found.untold["asim-no-gain"]
    losses(stage(compared, "align"), [2.0, 2.0], [2.0, 2.0])
    assert fired(compared, "alignment-not-learnt").severity == "problem"


def test_a_stage_that_is_being_trained_is_read_from_its_checkpoint(trained: Path) -> None:
    """As `example_trainer.py` leaves them: only a checkpoint with complete.json counts."""
    for name in ("metrics.json", "predictions.jsonl"):
        (trained / name).unlink()
    shutil.rmtree(trained / "sft")
    history = json.loads(stage(trained, "align").read_text())["history"]
    shutil.rmtree(trained / "align")
    for step, complete in ((100, True), (200, False)):
        folder = trained / "align" / f".lr-{RATE:g}.0123456789abcdef" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        bad = [*history[:4], {"loss": float("nan"), "step": 6, "epoch": 1.5}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history if complete else bad}))
        if complete:
            (folder / "complete.json").write_text(json.dumps({"loss": 0.7, "step": 90, "waited": 0}))
    found = diagnose(trained)
    assert not found.finished and "stage align" in found.missing and "stage sft" in found.missing
    assert {"diverged", "alignment-not-learnt"} <= set(found.clear)
    (only,) = read_facts(trained).rounds[0].stages
    assert (only.finished, only.chosen) == (False, None)
    assert len(only.train) == sum("loss" in entry for entry in history)


def test_a_run_that_has_just_begun(trained: Path) -> None:
    for path in trained.iterdir():
        if path.name not in ("ia2_run.json", "ia2_config.yaml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    edit(trained / "ia2_run.json", lambda value: value.pop("task"))
    found = diagnose(trained)
    assert found.findings == () and not found.finished
    assert found.untold["diverged"] == "no stage has logged a loss yet"


def test_a_seed_of_a_comparison_is_judged_alone(compared: Path) -> None:
    config(compared, seeds=2)
    shutil.copytree(compared / "seed-0", compared / "seed-1")
    losses(stage(compared, "align"), [2.0, 2.0], [2.0, 2.0])
    assert "alignment-not-learnt" in diagnose(compared / "seed-1").clear
    assert fired(compared / "seed-0", "alignment-not-learnt").severity == "problem"
    assert diagnose(compared / "seed-1").folder == compared / "seed-1"


def test_folds_are_put_together(tmp_path: Path, compared: Path) -> None:
    """Rows of folds are paired in the order of the data."""
    edit(compared / "ia2_run.json", lambda value: value["data"].update(test=""))
    config(compared, folds=2)
    (compared / "compare.json").unlink()
    for fold in (0, 1):
        shutil.copytree(compared / "seed-0" / "evaluations", compared / f"seed-0/fold-{fold}/evaluations")
    shutil.rmtree(compared / "seed-0" / "evaluations")
    for file in (compared / "seed-0").glob("fold-1/evaluations/*.json"):
        edit(file, lambda value: value.update(places=[place + 40 for place in value["places"]]))
    facts = read_facts(*find_runs(compared)[0])
    assert [(r.seed, r.fold, r.place) for r in facts.rounds] == [(0, f, f"seed-0/fold-{f}") for f in (0, 1)]
    ((base, icl),) = facts.columns(("base", "icl"), findings.correct_in("labels"))
    assert len(base) == len(icl) == 80 and icl.mean() > base.mean()
    (part,) = diagnose_all(compared / "seed-0" / "fold-1")
    assert part.folder.name == "fold-1"


def test_each_size_of_a_curve_is_judged(compared: Path, tmp_path: Path) -> None:
    for size in (16, 4):
        shutil.copytree(compared, tmp_path / "curve" / f"n-{size}")
    answer(tmp_path / "curve" / "n-4", "icl", 0.2)
    found = diagnose_all(tmp_path / "curve")
    assert [(d.folder.name, d.count("problem")) for d in found] == [("n-4", 1), ("n-16", 0)]
    with pytest.raises(RunFolderError, match="2 runs"):
        diagnose(tmp_path / "curve")


# ------------------------------------------------------------------------------------- command line


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "grid.yaml").write_text("name: x\n")
    assert "ia2 report" in run(capsys, "doctor", tmp_path / "sweep").refusal()
    assert "no ia2 run there" in run(capsys, "doctor", tmp_path).refusal()
    assert "no such folder" in run(capsys, "doctor", tmp_path / "none").refusal()


def test_damaged_files_are_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "predictions.jsonl").write_text("{\n")
    assert "predictions.jsonl:1: damaged" in run(capsys, "doctor", trained).refusal()
    (trained / "metrics.json").write_text("{")
    assert "metrics.json: damaged" in run(capsys, "doctor", trained).refusal()


def test_printed(compared: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(compared, "icl", 0.2)
    out = run(capsys, "doctor", trained, compared).out
    assert f"{trained} (train, finished): Nothing found." in out
    assert f"{compared} (compare, finished): 1 problem" in out
    assert "\nPROBLEM icl-at-chance (icl, seed 0)\n  In-context learning is no better than chance" in out
    assert "\n  Evidence: ICL is right on 20% of 40 rows" in out and "\n  Try: ia2 probe" in out
    assert "Checked, nothing found: icl-at-chance" in out
    assert "Not judged: rate-at-edge: fewer than three rates were tried.\n" in out
    quiet = run(capsys, "doctor", compared, "--quiet").out
    assert "PROBLEM icl-at-chance" in quiet and "Checked" not in quiet and "Not judged" not in quiet


def test_in_a_terminal_lines_are_wrapped(
    compared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ia2.cli import doctor

    answer(compared, "icl", 0.2)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    doctor._print(diagnose(compared), quiet=False, first=True)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(compared) not in line) <= 60
    assert any(line.startswith("    ") for line in lines)


def test_exit_codes(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "doctor", compared, "--strict").status == 0
    answer(compared, "icl", 0.2)
    assert run(capsys, "doctor", compared).status == 0
    assert run(capsys, "doctor", compared, "--strict").status == 1


def test_json(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(compared, "icl", 0.2)
    found = run(capsys, "doctor", compared, "--json").json
    assert found["problems"] == 1
    (only,) = found["runs"]
    assert only["folder"] == str(compared) and only["finished"] is True
    assert only == json.loads(json.dumps(diagnose(compared).to_dict()))
    first = only["findings"][0]
    assert set(first) == {"rule", "severity", "message", "evidence", "advice", "where", "numbers"}


def test_findings_come_by_severity(compared: Path) -> None:
    answer(compared, "icl", 0.2)
    edit(compared / "compare.json", lambda value: value["design"].update(num_dev=3))
    order = [SEVERITIES.index(finding.severity) for finding in diagnose(compared).findings]
    assert order == sorted(order) and len(set(order)) > 1


def test_flags_in_advice_exist() -> None:
    import typer

    from ia2.cli import app

    commands: Any = typer.main.get_command(app)
    flags = {
        flag
        for name in ("train", "compare")
        for p in commands.commands[name].params
        for flag in (*p.opts, *p.secondary_opts)
    }
    named = set()
    for file in (ROOT / "src" / "ia2" / "report" / "doctor").glob("*_rules.py"):
        # {stage.kind} stands for each of the kinds
        text = file.read_text().replace("--{stage.kind}", "--sft")
        named |= set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", text))
    assert len(named) > 15 and named <= flags, named - flags


def test_nothing_heavy_is_imported(trained: Path) -> None:
    code = (
        "import sys, ia2.cli.doctor; from ia2.report.doctor.signatures import diagnose; "
        f"diagnose({str(trained)!r}); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_to_dict_is_json(compared: Path) -> None:
    found: Diagnosis = diagnose(compared)
    assert json.loads(json.dumps(found.to_dict()))["kind"] == "compare"
