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
from ia2.report.doctor.diagnosis import RULES, SEVERITIES, diagnose, diagnose_all
from ia2.report.doctor.facts import Finding
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
        "selection": "dev",
        "data": str(root / "rows.jsonl"),
        "test_data": str(root / "test.jsonl"),
        "task": "classification",
    }
    base = icl_base(tiny_icl_model_path)
    rows, test = Examples.load(root / "rows.jsonl"), Examples.load(root / "test.jsonl")
    both = CompareConfig(seeds=1, recipes=["base", "icl", "sft", "ia2", "ia2-sft"], **settings)
    compare(base, rows, both, test=test, output_dir=root / "compare")
    adapt(base, rows, TrainConfig(recipe="ia2-sft", **settings), test=test, output_dir=root / "train")
    return {"compare": root / "compare", "train": root / "train"}


@pytest.fixture
def compared(healthy: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the comparison, to be spoilt: without the list of the files' digests, which would tell."""
    shutil.copytree(healthy["compare"], tmp_path / "compare")
    (tmp_path / "compare" / MANIFEST).unlink()
    return tmp_path / "compare"


@pytest.fixture
def trained(healthy: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the training run, to be spoilt."""
    shutil.copytree(healthy["train"], tmp_path / "train")
    (tmp_path / "train" / MANIFEST).unlink()
    return tmp_path / "train"


def edit(file: Path, change: Edit) -> None:
    """Change a JSON file in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def evaluation(folder: Path, recipe: str) -> Path:
    return folder / "seed-0" / "evaluations" / f"{recipe}.json"


def stage(folder: Path, name: str) -> Path:
    return next(folder.rglob(f"{name}/lr-{RATE:g}/stage.json"))


def align(folder: Path) -> Path:
    return stage(folder, "align")


def answer(folder: Path, **right: float) -> None:
    """Give recipes this accuracy in the label set."""
    for recipe, share in right.items():

        def change(value: Any, share: float = share) -> None:
            column = value["measured"]["plain"]["labels"]["correct"]
            count = round(share * len(column))
            value["measured"]["plain"]["labels"]["correct"] = [1.0] * count + [0.0] * (len(column) - count)

        edit(evaluation(folder, recipe.replace("_", "-")), change)


def asim(folder: Path, **values: float) -> None:
    """Give recipes this similarity to ICL, a little more or less from query to query."""
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    for recipe, value in values.items():
        of_queries = (value + noise).tolist()
        file = evaluation(folder, recipe.replace("_", "-"))
        edit(file, lambda found, of_queries=of_queries: found.update(asim=of_queries))  # type: ignore[misc]


def losses(file: Path, train: list[float], dev: tuple[float, ...] = (2.0, 1.99)) -> None:
    """A stage with these losses, two steps apart."""
    history = [{"loss": loss, "step": 2 * place + 2} for place, loss in enumerate(train)]
    history += [{"eval_loss": loss, "step": 2 * place + 2} for place, loss in enumerate(dev)]
    edit(file, lambda value: value.update(history=history))


def config(folder: Path, **changes: Any) -> None:
    edit(folder / "ia2_run.json", lambda value: value["config"].update(changes))


def design(folder: Path, **changes: Any) -> None:
    edit(folder / "compare.json", lambda value: value["design"].update(changes))


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
    for text in (finding.message, finding.evidence, finding.advice, finding.where):
        assert "None" not in text and "nan" not in text, text


# ------------------------------------------------------------------------------------------ healthy


def test_nothing_is_found_in_healthy_runs(healthy: dict[str, Path]) -> None:
    together = set()
    for folder in healthy.values():
        found = diagnose(folder)
        assert found.findings == () and found.finished and not found.missing
        assert {*found.clear, *found.untold} == set(RULES)
        together |= set(found.clear)
    # it needs several rates; its own test judges it
    assert set(RULES) - together == {"rate-at-edge"}


def test_committed_results_have_no_problem() -> None:
    for file in sorted((ROOT / "results").rglob("compare.json")):
        found = diagnose(file.parent)
        assert found.count("problem") == 0, (file, found.findings)
        for finding in found.findings:
            reads_well(finding)


# ------------------------------------------------------------------------- faults of a comparison

NAN = float("nan")

Fault = tuple[str, str, Callable[[Path], Any], str]

ALIKE = ["Two labels differ by case", "' L1', ' l1'", "write them alike"]


def few_dev_rows(folder: Path, rows: int, *rates: float) -> None:
    design(folder, num_dev=rows)
    config(folder, learning_rates=[RATE, *rates])


def nearly_alike(folder: Path) -> None:
    """A little better on average, and not on every query."""
    asim(folder, sft=0.6, ia2_sft=0.6)
    edit(evaluation(folder, "sft"), lambda v: v.update(asim=[0.9, *v["asim"][1:-1], 0.2]))


FAULTS: list[Fault] = [
    ("icl-at-chance", "problem", lambda f: answer(f, icl=0.25), "ICL is right on 25% of 40 rows"),
    ("icl-at-chance", "problem", lambda f: answer(f, icl=0.42), "ICL is right on 42% of 40 rows"),
    ("alignment-not-learnt", "problem", lambda f: losses(align(f), [2, 1.9]), "1.9 at its lowest (5% less)"),
    ("alignment-not-learnt", "problem", lambda f: losses(align(f), [2, 2.4]), "2.4 at its lowest (20% more)"),
    ("rate-at-edge", "warning", lambda f: config(f, learning_rates=[1e-3, 3e-3, RATE]), "in 1 of 1 rounds"),
    ("dev-too-small", "warning", lambda f: few_dev_rows(f, 0), "0 dev rows"),
    ("dev-too-small", "warning", lambda f: few_dev_rows(f, 3), "3 dev rows; 4 are the least"),
    ("dev-too-small", "warning", lambda f: few_dev_rows(f, 7, 1e-3), "7 dev rows choose among 2 rates"),
    ("asim-no-gain", "problem", lambda f: asim(f, sft=0.7, ia2_sft=0.6), "(paired by query)"),
    ("asim-no-gain", "warning", nearly_alike, "(paired by query)"),
    ("sft-undid-alignment", "warning", lambda f: asim(f, sft=0.4, ia2=0.9, ia2_sft=0.5), "20% of the gain"),
    ("sft-undid-alignment", "problem", lambda f: asim(f, sft=0.4, ia2=0.9, ia2_sft=0.38), "-4% of the gain"),
    ("alignment-not-carried-over", "problem", lambda f: asim(f, base=0.5, ia2=0.45), "difference -0.050"),
    ("worse-than-base", "problem", lambda f: answer(f, base=0.9, sft=0.6), "0.600 against 0.900"),
    ("worse-than-guessing", "problem", lambda f: answer(f, ia2=0.3), "accuracy in the label set 0.300"),
    ("worse-than-sft", "warning", lambda f: answer(f, sft=0.9, ia2_sft=0.6), "accuracy -0.300"),
    ("texts-hardly-read", "warning", lambda f: design(f, advice=[ALIKE]), "' L1', ' l1'"),
]


@pytest.mark.parametrize(("rule", "severity", "spoil", "evidence"), FAULTS)
def test_faults(
    compared: Path, rule: str, severity: str, spoil: Callable[[Path], Any], evidence: str
) -> None:
    spoil(compared)
    found = fired(compared, rule)
    assert found.severity == severity and evidence in found.evidence


@pytest.mark.parametrize(
    ("rule", "mend"),
    [
        ("icl-at-chance", lambda f: answer(f, icl=0.8)),
        ("alignment-not-learnt", lambda f: losses(stage(f, "align"), [2.0, 1.9, 1.7])),
        ("rate-at-edge", lambda f: config(f, learning_rates=[1e-3, RATE, 1e-1])),
    ],
)
def test_what_is_no_fault(compared: Path, rule: str, mend: Callable[[Path], Any]) -> None:
    mend(compared)
    assert rule in diagnose(compared).clear


def test_rare_faults_are_notes(compared: Path) -> None:
    """One of three seeds is not the rule; the stage that two recipes share is named once."""
    config(compared, seeds=3)
    for seed in (1, 2):
        shutil.copytree(compared / "seed-0", compared / f"seed-{seed}")
    losses(compared / "seed-0" / "align" / "lr-0.01" / "stage.json", [2.0, 2.0])
    found = fired(compared, "alignment-not-learnt")
    assert found.severity == "note"
    assert found.where == "ia2, ia2-sft, stage align (1 of 3: seed-0/align/lr-0.01)"
    losses(compared / "seed-1" / "align" / "lr-0.01" / "stage.json", [2.0, 2.1])
    assert fired(compared, "alignment-not-learnt").severity == "problem"
    # a seed is judged alone, too
    assert "alignment-not-learnt" in diagnose(compared / "seed-2").clear
    assert diagnose(compared / "seed-0").findings[0].where.endswith("(seed-0/align/lr-0.01)")


def test_stages_at_rates_that_were_not_chosen_do_not_count(compared: Path) -> None:
    config(compared, learning_rates=[1e-3, RATE, 1e-1])
    shutil.copytree(stage(compared, "sft").parent, compared / "seed-0" / "sft" / "lr-0.1")
    other = compared / "seed-0" / "sft" / "lr-0.1" / "stage.json"
    losses(other, [NAN, NAN])
    assert "diverged" in diagnose(compared).clear
    edit(other, lambda value: value.update(diverged_step=3))
    found = fired(compared, "diverged")
    assert (found.severity, found.where) == ("note", "seed-0/sft/lr-0.1")


def test_the_summary_alone_is_judged(compared: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(compared / "compare.json", alone)
    assert "asim-no-gain" in diagnose(alone).clear

    def swap(value: Any) -> None:
        both = [value["recipes"][name] for name in ("sft", "ia2-sft")]
        both[0]["asim"], both[1]["asim"] = both[1]["asim"], both[0]["asim"]

    edit(alone / "compare.json", swap)
    assert "from the summary" in fired(alone, "asim-no-gain").evidence


def test_folds_are_put_together(compared: Path) -> None:
    edit(compared / "ia2_run.json", lambda value: value["data"].update(test=""))
    config(compared, folds=2)
    (compared / "compare.json").unlink()
    for fold, right in ((0, 0.9), (1, 0.2)):
        answer(compared, sft=right, base=0.5)
        shutil.copytree(compared / "seed-0" / "evaluations", compared / f"seed-0/fold-{fold}/evaluations")
    shutil.rmtree(compared / "seed-0" / "evaluations")
    assert "worse-than-base" in diagnose(compared).clear  # 0.55 of all rows
    (part,) = diagnose_all(compared / "seed-0" / "fold-1")
    assert part.folder.name == "fold-1"
    assert "worse-than-base" in {finding.rule for finding in part.findings}


def test_each_size_of_a_curve_is_judged(compared: Path, tmp_path: Path) -> None:
    for size in (16, 4):
        shutil.copytree(compared, tmp_path / "curve" / f"n-{size}")
    answer(tmp_path / "curve" / "n-4", icl=0.2)
    found = diagnose_all(tmp_path / "curve")
    assert [(d.folder.name, d.count("problem")) for d in found] == [("n-4", 1), ("n-16", 0)]
    with pytest.raises(RunFolderError, match="2 runs"):
        diagnose(tmp_path / "curve")


# ------------------------------------------------------------------------ faults of a training run


def put_rows(folder: Path, change: Callable[[list[dict[str, str]]], Any]) -> None:
    """Other rows for a training run: the file, and the fingerprints that the run has of its draw."""
    file = folder.parent / "changed.jsonl"
    data = json.loads((folder / "ia2_run.json").read_text())["config"]["data"]
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config(folder, data=str(file))
    split = Examples.load(file).split(num_examples=16, seed=0)
    prints = {"train": split.train.fingerprint, "dev": split.dev.fingerprint}
    edit(folder / "ia2_run.json", lambda value: value["data"].update(prints))


def leak(folder: Path) -> None:
    query = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])["query"]
    put_rows(folder, lambda rows: rows[0].update(prompt=query))


def one_prompt(folder: Path) -> None:
    put_rows(folder, lambda rows: [row.update(prompt=rows[0]["prompt"]) for row in rows])


def no_l6(folder: Path) -> None:
    put_rows(folder, lambda rows: [r.update(completion=r["completion"].replace("L6", "L2")) for r in rows])


def teacher_says(folder: Path, text: str) -> None:
    index = folder / "teacher" / "train" / "index.json"
    edit(index, lambda value: [answer.update(text=text) for answer in value["answers"]])


def put_metrics(folder: Path, change: Edit) -> None:
    edit(folder / "metrics.json", change)


def several_tokens(folder: Path) -> None:
    change = {"label_ids": [[66], [67, 9, 9], [71]], "max_answer_tokens": 11}
    edit(folder / "ia2_run.json", lambda value: value["task"].update(change))


def right_on(share: float) -> Edit:
    return lambda metrics: metrics["test"]["labels"]["accuracy"].update(value=share)


TRAINING_FAULTS: list[Fault] = [
    ("icl-at-chance", "problem", lambda f: teacher_says(f, "L1"), "of 16 rows"),
    ("diverged", "problem", lambda f: losses(align(f), [2, NAN], (2, NAN)), "not finite after step 4"),
    ("labels-of-several-tokens", "note", several_tokens, "up to 3 tokens (' L2')"),
    ("worse-than-guessing", "problem", lambda f: put_metrics(f, right_on(0.3)), "in the label set 0.300"),
    ("label-missing", "warning", no_l6, "no train row has ' L6'"),
    ("repeated-rows", "problem", leak, "1 prompts"),
    ("repeated-rows", "warning", one_prompt, "1 prompts"),
    ("evaluated-on-dev", "note", lambda f: put_metrics(f, lambda v: v.update(dev=v.pop("test"))), "dev rows"),
]


@pytest.mark.parametrize(("rule", "severity", "spoil", "evidence"), TRAINING_FAULTS)
def test_faults_of_training(
    trained: Path, rule: str, severity: str, spoil: Callable[[Path], Any], evidence: str
) -> None:
    spoil(trained)
    found = fired(trained, rule)
    assert found.severity == severity and evidence in found.evidence


def test_rows_are_those_of_the_file_if_it_is_the_same(trained: Path) -> None:
    for data, reason in (("gone.jsonl", "gone.jsonl is not there"), (None, "in memory")):
        config(trained, data=data)
        assert reason in diagnose(trained).untold["label-missing"]
        assert reason in diagnose(trained).untold["icl-at-chance"]
    other = trained.parent / "other.jsonl"
    rows = [{"prompt": f"{e.query} x", "completion": e.answer} for e in icl_examples(24)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config(trained, data=str(other))
    assert "other.jsonl has changed since" in diagnose(trained).untold["repeated-rows"]


# ---------------------------------------------------------------------------------------- running


def test_a_running_comparison_is_judged_by_what_is_there(compared: Path) -> None:
    (compared / "compare.json").unlink()
    evaluation(compared, "ia2-sft").unlink()
    shutil.rmtree(compared / "seed-0" / "align-sft")
    found = diagnose(compared)
    assert not found.finished
    assert found.missing == ("seed-0: ia2-sft", "compare.json (written last)")
    assert found.findings == () and "alignment-not-carried-over" in found.clear
    assert "the run has not come to it" in found.untold["asim-no-gain"]


def test_a_stage_that_is_being_trained_is_read_from_its_checkpoint(trained: Path) -> None:
    """As the trainer leaves them: only a checkpoint with complete.json counts."""
    for name in ("metrics.json", "predictions.jsonl"):
        (trained / name).unlink()
    history = json.loads(align(trained).read_text())["history"]
    for name in ("align", "sft"):
        shutil.rmtree(trained / name)
    assert diagnose(trained).untold["diverged"] == "no stage has logged a loss yet"
    for step, complete in ((100, True), (200, False)):
        folder = trained / "align" / f".lr-{RATE:g}.0123456789abcdef" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        bad = [*history[:4], {"loss": NAN, "step": 6, "epoch": 1.5}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history if complete else bad}))
        if complete:
            (folder / "complete.json").write_text(json.dumps({"loss": 0.7, "step": 90, "waited": 0}))
    found = diagnose(trained)
    assert not found.finished and {"stage align", "stage sft"} <= set(found.missing)
    assert {"diverged", "alignment-not-learnt"} <= set(found.clear)


# ------------------------------------------------------------------------------------- command line


def test_refusals(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "grid.yaml").write_text("name: x\n")
    assert "ia2 report" in run(capsys, "doctor", tmp_path / "sweep").refusal()
    assert "no ia2 run there" in run(capsys, "doctor", tmp_path).refusal()
    assert "no such folder" in run(capsys, "doctor", tmp_path / "none").refusal()
    (trained / "predictions.jsonl").write_text("{\n")
    assert "predictions.jsonl:1: damaged" in run(capsys, "doctor", trained).refusal()


def test_printed(compared: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "doctor", compared, "--strict").status == 0
    answer(compared, icl=0.2)
    ran = run(capsys, "doctor", trained, compared)
    assert ran.status == 0
    assert f"{trained} (train, finished): Nothing found." in ran.out
    assert f"{compared} (compare, finished): 1 problem" in ran.out
    assert "\nPROBLEM icl-at-chance (icl, seed 0)\n  In-context learning is no better than chance" in ran.out
    assert "\n  Evidence: ICL is right on 20% of 40 rows" in ran.out and "\n  Try: ia2 probe" in ran.out
    assert "Checked, nothing found: icl-at-chance" in ran.out
    assert "Not judged: rate-at-edge: fewer than three rates were tried.\n" in ran.out
    quiet = run(capsys, "doctor", compared, "--quiet").out
    assert "PROBLEM icl-at-chance" in quiet and "Checked" not in quiet and "Not judged" not in quiet
    assert run(capsys, "doctor", compared, "--strict").status == 1


def test_json_and_order(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(compared, icl=0.2)
    design(compared, num_dev=3)
    losses(align(compared), [NAN, NAN])
    found = run(capsys, "doctor", compared, "--json").json
    (only,) = found["runs"]
    assert found["problems"] >= 2 and only["folder"] == str(compared) and only["finished"] is True
    assert only == json.loads(json.dumps(diagnose(compared).to_dict()))
    keys = {"rule", "severity", "message", "evidence", "advice", "where", "numbers"}
    assert {frozenset(finding) for finding in only["findings"]} == {frozenset(keys)}
    order = [SEVERITIES.index(finding["severity"]) for finding in only["findings"]]
    assert order == sorted(order) and len(set(order)) > 1


def test_every_rule_has_a_fault_here_and_is_documented() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text()
    documented = re.findall(r"^\| `([a-z0-9-]+)` \|", page, flags=re.MULTILINE)
    assert {rule for rule, *_ in (*FAULTS, *TRAINING_FAULTS)} == set(RULES) == set(documented)


def test_flags_in_advice_exist() -> None:
    import typer

    from ia2.cli import app

    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    params = [p for name in ("train", "compare") for p in commands[name].params]
    flags = {flag for p in params for flag in (*p.opts, *p.secondary_opts)}
    # {self.kind} stands for each of the kinds
    text = "".join(file.read_text() for file in (ROOT / "src/ia2/report/doctor").glob("*.py"))
    named = set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", text.replace("--{self.kind}", "--sft")))
    assert len(named) > 15 and named <= flags, named - flags


def test_nothing_heavy_is_imported(trained: Path) -> None:
    code = (
        "import sys, ia2.cli.doctor; from ia2 import diagnose; "
        f"diagnose({str(trained)!r}); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
