"""NaN and infinity: refused where they enter, named where they arise, and in no file."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.benches import base_of, bench_of, icl_examples, trainer_of, word_examples, wordy_model
from helpers.command_line import Ran, run, tree, write_rows
from helpers.sweeping import grid_of, records, swept, write_grid
from helpers.words import make_word_tokenizer
from safetensors.torch import load_file, save_file
from tiny_icl.tasks import sample_task

from ia2.analysis.patching import patched_log_probs
from ia2.cli.output import print_json
from ia2.config import AdaptConfig, CompareConfig
from ia2.data.examples import FewShotSplit
from ia2.evaluation.metrics import measure_labels, summarise
from ia2.evaluation.plain_text import diversity
from ia2.evaluation.scoring import LabelScorer, Prediction, write_predictions
from ia2.experiment.adapt import adapt
from ia2.experiment.predict import prediction_text
from ia2.models.capture import ActivationCapture
from ia2.models.forward import AnswerOutput, answer_pass
from ia2.prompts.task import Task
from ia2.training.losses import AnswerLoss
from ia2.utils.errors import ModelError
from ia2.utils.files import read_json
from ia2.utils.manifest import MANIFEST

TASK = sample_task(0, num_classes=3)
BRIEF = ["--align-epochs", 2, "--sft-epochs", 2, "--joint-epochs", 2]
MAX_SEED = 2**32 - 1

Command = Callable[..., Ran]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_icl_model_path: Path) -> Path:
    """A working folder with labelled rows (rows.jsonl), the small model (model) and one of NaN (bad)."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", TASK.examples(12, seed=0))
    write_rows(tmp_path / "test.jsonl", TASK.examples(6, seed=1))
    (tmp_path / "model").symlink_to(tiny_icl_model_path)
    return tmp_path


@pytest.fixture
def ia2(here: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """``ia2`` on these rows and this model; later options win."""

    def command(name: str, *options: Any) -> Ran:
        common: list[Any] = []
        if name in ("train", "compare", "probe"):
            common = ["--model", "model", "--data", "rows.jsonl"]
        if name in ("train", "compare"):
            common += ["--output-dir", "out", *BRIEF]
        if name == "probe":
            common += ["--sft-epochs", 1]
        return run(capsys, name, *common, *options)

    return command


def refused(ran: Ran) -> str:
    """The one line of a mistake, whatever was logged before it."""
    assert ran.status == 2, ran
    assert "Traceback" not in ran.err
    *_, last = ran.err.splitlines()
    assert last.startswith("ia2: error: "), ran.err
    assert len([line for line in ran.err.splitlines() if line.startswith("ia2: error: ")]) == 1
    return last.removeprefix("ia2: error: ")


def strict(text: str) -> Any:
    """JSON as the standard has it: without NaN and Infinity."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_finite(folder: Path) -> set[str]:
    """Every file below a folder holds finite numbers only; gives the kinds of files that were read."""

    def walk(value: Any, where: str) -> None:
        if isinstance(value, float):
            assert value == value and abs(value) != float("inf"), where
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner, where)

    kinds = set()
    for name, data in tree(folder).items():
        kind = Path(name).suffix
        kinds.add(kind)
        if kind == ".json":
            walk(strict(data.decode()), name)
        elif kind == ".jsonl":
            for line in data.decode().split("\n"):
                if line.strip():
                    walk(strict(line), name)
        elif kind in (".yaml", ".yml"):
            walk(yaml.safe_load(data), name)
        elif kind == ".safetensors":
            for tensor in load_file(folder / name).values():
                assert torch.isfinite(tensor.float()).all(), name
        elif kind in (".md", ".csv", ".html"):
            text = data.decode().lower()
            assert not [w for w in text.replace("|", " ").replace(",", " ").split() if w in ("nan", "inf")]
    return kinds


def damaged(source: Path, folder: Path, value: float = float("nan"), tensors: str = "") -> Path:
    """A copy of a model or run folder some of whose weights are ``value``."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        for name, tensor in state.items():
            if tensors in name and tensor.is_floating_point():
                state[name] = torch.full_like(tensor, value)
        save_file(state, file, metadata={"format": "pt"})
    (folder / MANIFEST).unlink(missing_ok=True)  # with it, the digest would tell first
    return folder


# ------------------------------------------------------------------------------ where settings enter


@pytest.mark.parametrize(
    ("options", "place"),
    [
        (["--learning-rates", "nan"], "learning_rates.0"),
        (["--learning-rates", "1e-3", "inf"], "learning_rates (at [1])"),
        (["--learning-rates", "1e400"], "learning_rates inf"),
        (["--learning-rates", "-inf"], "learning_rates.0"),
        (["--learning-rates", "-0.0"], "learning_rates.0"),
        (["--align-learning-rate", "nan"], "align.learning_rate"),
        (["--align-temperature", "inf"], "align.temperature"),
        (["--align-temperature", "0"], "align.temperature"),
        (["--joint-betas", "nan"], "joint.betas (at [0])"),
        (["--sft-ia2-weight", "inf"], "sft.ia2_weight"),
        (["--adapter-alpha", "nan"], "adapter.alpha"),
        (["--adapter-dropout", "nan"], "adapter.dropout"),
        (
            ["--adapter-peft", '{"peft_type": "LORA", "lora_alpha": 1e999}'],
            "--adapter-peft",
        ),
        (
            ["--adapter-peft", '{"peft_type": "LORA", "x": {"y": [1, Infinity]}}'],
            "--adapter-peft",
        ),
        (
            ["--activation-checkpointing-kwargs", '{"x": -Infinity}'],
            "--activation-checkpointing-kwargs",
        ),
        (
            ["--schedules", '{"own": [{"stage": "sft", "ia2_weight": NaN}]}'],
            "--schedules",
        ),
        # whole numbers that nothing can count or hold
        (["--batch-size", 2**63], "batch_size"),
        (["--max-context-tokens", 2**70], "max_context_tokens"),
        (["--sft-epochs", 2**64], "sft.epochs"),
        (["--adapter-rank", 10**12], "adapter.rank"),
        (
            ["--adapter-peft", f'{{"peft_type": "LORA", "r": {2**70}}}'],
            "adapter.peft (at r)",
        ),
        (["--sft-patience", 0], "sft.patience"),
        (["--seed", -1], "seed"),
        (["--seed", 2**32], "seed"),
        (["--seed", 2**63], "seed"),
        (["--seed", 2**64], "seed"),
    ],
    ids=str,
)
def test_a_setting_is_refused_where_it_enters(options: list[Any], place: str, ia2: Command) -> None:
    line = ia2("train", *options).refusal()
    setting, _, inside = place.partition(" ")
    assert line.startswith(f"{setting}: ") and inside in line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("learning_rates: [.nan]", "learning_rates.0"),
        ("learning_rates: [0.001, .inf]", "learning_rates (at [1])"),
        ("learning_rates: [1e400]", "learning_rates inf"),
        ("learning_rates: ['nan']", "learning_rates.0"),
        ("align: {temperature: -.inf}", "align.temperature"),
        ("batch_size: .inf", "batch_size"),
        ("batch_size: 1.0e+300", "batch_size"),
        ("max_answer_tokens: .nan", "max_answer_tokens"),
        (
            "schedules: {own: [{stage: sft, ia2_weight: .nan}]}",
            "schedules (at own[0].ia2_weight)",
        ),
        ("schedules: {own: [{stage: sft, ia2_weight: 1e400}]}", "schedules.own.0 ia2_weight: inf"),
        (
            "activation_checkpointing_kwargs: {a: {b: .inf}}",
            "activation_checkpointing_kwargs (at a.b)",
        ),
        ("adapter: {peft: {peft_type: LORA, r: .inf}}", "adapter.peft (at r)"),
    ],
)
def test_a_setting_of_a_file_is_refused(text: str, place: str, ia2: Command, here: Path) -> None:
    (here / "s.yaml").write_text(text)
    line = ia2("train", "--config", "s.yaml").refusal()
    setting, _, inside = place.partition(" ")
    assert line.startswith("s.yaml: ") and f"{setting}: " in line and inside in line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"learning_rates": [float("inf")]}, "learning_rates"),
        ({"learning_rates": {"sft": [float("nan")]}}, "learning_rates"),
        ({"betas": [float("nan")]}, "betas nan"),
        (
            {"settings": {"align.temperature": float("inf")}},
            "settings (at align.temperature)",
        ),
        (
            {"axes": {"align.temperature": [1.0, float("nan")]}},
            "axes (at align.temperature[1])",
        ),
        (
            {"variants": {"hot": {"align": {"temperature": float("inf")}}}},
            "variants (at hot.align.temperature)",
        ),
        (
            {"parts": [{"settings": {"adapter.alpha": float("nan")}}]},
            "parts.0.settings (at adapter.alpha)",
        ),
        ({"seeds": [0, 2**32]}, "seeds"),
        ({"seeds": [2**64]}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": 10**12}, "seeds"),
        ({"max_test": 0}, "max_test"),
        ({"num_examples": [2**70]}, "num_examples"),
    ],
    ids=str,
)
def test_a_grid_is_refused(
    values: dict[str, Any], place: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid(tmp_path / "grid.yaml", grid_of(files, **values))
    for options in ([], ["--dry-run"]):
        line = run(capsys, "sweep", file, "--output-dir", tmp_path / "out", *options).refusal()
        setting, _, inside = place.partition(" ")
        assert line.startswith(f"{file}: ") and setting in line and inside in line
    assert not (tmp_path / "out").exists()


def test_a_benchmark_of_ones_own_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = yaml.safe_load((files / "two.yaml").read_text())
    entry["pool"]["rows"] = float("inf")
    own = files / "own.yaml"
    own.write_text(yaml.safe_dump(entry))
    assert "pool.rows" in run(capsys, "benchmarks", "show", own).refusal()


@pytest.mark.parametrize("share", ["nan", "inf"])
def test_an_option_that_is_no_setting(
    share: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid(tmp_path / "grid.yaml", grid_of(files))
    ran = run(
        capsys, "sweep", file, "--output-dir", tmp_path / "out", "--ray", "local", "--gpus-per-worker", share
    )
    assert "--gpus-per-worker" in ran.refusal()
    assert not (tmp_path / "out").exists()


def test_seeds_of_a_comparison_end_where_seeds_end(ia2: Command) -> None:
    line = ia2("compare", "--seed", MAX_SEED, "--seeds", 2).refusal()
    assert "seeds" in line and str(MAX_SEED) in line
    assert "seeds" in ia2("compare", "--seeds", 10**12).refusal()
    assert CompareConfig(seed=MAX_SEED, seeds=1).seed == MAX_SEED


def test_the_largest_seed_works(ia2: Command, here: Path) -> None:
    assert ia2("train", "--seed", MAX_SEED, "--quiet").status == 0
    assert read_json(here / "out" / "metrics.json")["learning_rate"] > 0
    assert ia2("probe", "--seed", MAX_SEED, "--quiet").status == 0


def test_large_but_possible_settings_work(ia2: Command, here: Path) -> None:
    options = ["--batch-size", 2**62, "--sft-patience", 10**12, "--max-context-tokens", 2**40]
    options += ["--checkpoint-every", 10**12, "--align-objective", "kl", "--align-temperature", "1e-300"]
    assert ia2("train", *options, "--quiet").status == 0
    assert_finite(here / "out")


# ------------------------------------------------------------------------------------- stages that diverge


def test_a_rate_that_diverges_stands_beside_those_that_do_not(
    ia2: Command, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran = ia2("train", "--learning-rates", "1e30", "1e-3", "1e29", "--test-data", "test.jsonl")
    assert ran.status == 0, ran.err
    # which of the first passes overflows depends on how the rows of a step are laid out
    assert re.search(r"rate 1e\+30: diverged at step [12]\b", ran.err)
    metrics = strict((here / "out" / "metrics.json").read_text())
    assert metrics["learning_rate"] == 1e-3
    tried = metrics["dev_loss_by_learning_rate"]
    assert list(tried) == ["1e+30", "0.001", "1e+29"]
    assert tried["1e+30"] is None and tried["1e+29"] is None and tried["0.001"] > 0
    assert list(metrics["diverged"]) == ["1e+30", "1e+29"]
    assert all(re.fullmatch(r"align at step [12]", where) for where in metrics["diverged"].values())
    # the stage by name; what follows is not trained, and its weights are not kept
    stage = strict((here / "out" / "align" / "lr-1e+30" / "stage.json").read_text())
    assert (stage["diverged"], stage["dev_loss"]) == (True, None) and stage["diverged_step"] in (1, 2)
    assert [path.name for path in (here / "out" / "align" / "lr-1e+30").iterdir()] == ["stage.json"]
    assert not (here / "out" / "sft" / "lr-1e+30").exists()
    good = strict((here / "out" / "sft" / "lr-0.001" / "stage.json").read_text())
    assert (good["diverged"], good["diverged_step"]) == (False, None)
    assert "1e+30" in (here / "out" / "README.md").read_text()
    # what reads the run names it, and every file is finite
    assert ia2("report", "out", "--output", "out/page.html").status == 0
    assert "diverged" in (here / "out" / "page.html").read_text()
    found = ia2("doctor", "out", "--json").json["runs"][0]["findings"]
    (finding,) = [f for f in found if f["rule"] == "diverged"]
    assert "1e+30" in finding["evidence"] and "nan" not in finding["evidence"]
    assert ia2("predict", "--adapter", "out", "--data", "test.jsonl", "--output", "out/p.csv").status == 0
    assert ia2("predict", "--adapter", "out", "--data", "test.jsonl", "--output", "out/p.jsonl").status == 0
    assert ia2("eval", "--adapter", "out", "--data", "test.jsonl", "--output", "out/e.jsonl").status == 0
    assert assert_finite(here / "out") >= {".json", ".jsonl", ".csv", ".yaml", ".safetensors", ".md", ".html"}


def test_the_order_of_rates_does_not_matter_and_a_resume_reads_it(ia2: Command, here: Path) -> None:
    options = ["--recipe", "sft", "--learning-rates", "1e-3", "1e30"]
    assert ia2("train", *options, "--quiet").status == 0
    before = tree(here / "out")
    (here / "out" / "metrics.json").unlink()
    ran = ia2("train", *options)
    assert ran.status == 0 and "it diverged at step" in ran.err
    after = tree(here / "out")
    assert after.keys() == before.keys()
    for name in ("adapter_model.safetensors", "sft/lr-1e+30/stage.json", "predictions.jsonl"):
        assert after[name] == before[name]


@pytest.mark.parametrize("recipe", ["sft", "ia2-sft", "ia2+sft", "soft-sft"])  # each begins otherwise
def test_if_all_rates_diverge_one_line_says_so_at_once_and_again(
    recipe: str, ia2: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--recipe", recipe, "--learning-rates", "1e30", "1e29"]
    line = refused(ia2("train", *options))
    assert "1e+30" in line and "1e+29" in line and "diverged" in line
    assert "learning_rates" in line and "--overwrite" in line
    assert not (here / "out" / "metrics.json").exists()
    assert not list((here / "out").rglob("adapter_model.safetensors"))
    assert_finite(here / "out")
    with monkeypatch.context() as patch:
        patch.setattr("ia2.experiment.workbench.run_stage", None)  # nothing is trained again
        assert refused(ia2("train", *options)) == line
    if recipe == "sft":  # what it suggests is accepted
        assert ia2("train", *options[:2], "--learning-rates", "1e-3", "--overwrite", "--quiet").status == 0
        assert_finite(here / "out")


def test_joint_training_over_betas(ia2: Command, here: Path) -> None:
    options = ["--recipe", "ia2+sft", "--joint-betas", "0.2,0.8", "--learning-rates", "1e30", "1e-3"]
    assert ia2("train", *options, "--quiet").status == 0
    metrics = strict((here / "out" / "metrics.json").read_text())
    assert list(metrics["diverged"]) == ["1e+30, β 0.2", "1e+30, β 0.8"]
    assert metrics["learning_rate"] == 1e-3 and metrics["beta"] in (0.2, 0.8)
    assert_finite(here / "out")


def test_without_dev_rows_training_itself_tells(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = icl_examples(6)
    config = AdaptConfig(learning_rates=[1e30, 1e-3, 1e29], recipe="sft", sft={"epochs": 2})
    with caplog.at_level(logging.INFO, "ia2"):
        found = adapt("model", FewShotSplit(rows, rows[:0]), config, output_dir="out")
    assert "nan" not in caplog.text
    metrics = strict((here / "out" / "metrics.json").read_text())
    assert metrics["num_dev"] == 0 and found.metrics["learning_rate"] == 1e-3
    assert metrics["learning_rate"] == 1e-3  # the first that did not diverge
    assert list(metrics["diverged"]) == ["1e+30", "1e+29"]
    assert_finite(here / "out")


def test_a_rate_whose_last_stage_alone_diverges(ia2: Command, here: Path) -> None:
    line = refused(ia2("train", "--sft-learning-rate", "1e30", "--learning-rates", "1e-3", "1e-2"))
    for rate in ("0.001", "0.01"):
        assert re.search(rf"{re.escape(rate)} \(sft with its rate 1e\+30 at step [12]\)", line)
    assert "sft.learning_rate" in line


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_dev_loss_that_is_not_finite_ends_the_stage(bad: float, tmp_path: Path) -> None:
    rows = word_examples(9)
    bench = bench_of(base_of(wordy_model(), make_word_tokenizer()), rows[:6], rows[6:], tmp_path)
    stage = {"epochs": 5, "eval_every": 1}
    trainer = trainer_of(
        bench, AnswerLoss(), bench.sft_rows(), tmp_path, stage=stage, batch_size=2, checkpoint_every=1
    )
    scripted = iter([1.0, 0.9, 0.8, bad, 0.1])  # the first before any step
    trainer._dev_loss = lambda dataset: next(scripted)  # type: ignore[method-assign]
    assert str(trainer.fit()) == "nan"
    assert trainer.best.diverged == 3
    assert trainer.state.global_step == 3
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged == [1.0, 0.9, 0.8]


def test_weights_that_are_not_finite_end_the_stage(tmp_path: Path) -> None:
    rows = word_examples(6)
    bench = bench_of(base_of(wordy_model(), make_word_tokenizer()), rows, rows[:0], tmp_path)
    trainer = trainer_of(bench, AnswerLoss(), bench.sft_rows(), tmp_path, stage={"epochs": 5}, batch_size=2)
    step = trainer.training_step

    def spoil(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        if trainer.state.global_step == 1:  # in the second step
            next(p for p in bench.model.parameters() if p.requires_grad).grad.fill_(float("inf"))
        return loss

    trainer.training_step = spoil  # type: ignore[method-assign]
    trainer.fit()
    assert (trainer.best.diverged, trainer.state.global_step) == (2, 2)


def test_a_loss_that_is_not_finite_before_any_step_is_not_the_rates_fault(ia2: Command, here: Path) -> None:
    line = refused(ia2("train", "--recipe", "sft", "--adapter-alpha", "1e300", "--learning-rates", "1e-3"))
    assert "before the first step" in line
    assert "learning_rates" not in line
    assert "adapter.alpha" in line


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_names_what_diverged(ia2: Command, here: Path) -> None:
    options = ["--test-data", "test.jsonl", "--seeds", 2, "--recipes", "base,sft,ia2"]
    (here / "c.yaml").write_text("align: {learning_rate: 1.0e+30}")
    ran = ia2("compare", *options, "--config", "c.yaml", "--learning-rates", "1e30", "1e-3")
    assert ran.status == 0, ran.err
    summary = strict((here / "out" / "compare.json").read_text())
    assert list(summary["recipes"]) == ["base", "sft"]
    assert list(summary["diverged"]) == ["ia2"]
    assert "seed-0: " in summary["diverged"]["ia2"]
    (diverged,) = summary["recipes"]["sft"]["diverged"]
    assert re.fullmatch(r"1e\+30 \(sft at step [12]\)", diverged)
    assert summary["recipes"]["sft"]["learning_rates"] == [1e-3, 1e-3]
    for text in (ran.out, (here / "out" / "table.md").read_text()):
        assert "ia2 diverged at every learning rate" in text
        assert "sft diverged at 1e+30" in text
    # a resume reads what is there, and says the same
    again = ia2("compare", *options, "--config", "c.yaml", "--learning-rates", "1e30", "1e-3", "--json")
    assert again.json["diverged"] == summary["diverged"]
    assert ia2("report", "out", "--output", "out/page.html").status == 0
    assert "ia2 diverged at every learning rate" in (here / "out" / "page.html").read_text()
    found = ia2("doctor", "out", "--json").json["runs"][0]
    assert "diverged" in [f["rule"] for f in found["findings"]]
    assert found["finished"] is True
    assert_finite(here / "out")


@pytest.mark.usefixtures("undrawn")
def test_what_is_said_of_a_stage_that_diverged_at_its_own_rate(ia2: Command, here: Path) -> None:
    """The recipe's rate was blamed, and lowering it advised, which changes nothing."""
    options = ["--test-data", "test.jsonl", "--seeds", 1, "--recipes", "sft,ia2-sft"]
    options += ["--align-learning-rate", "1e30", "--learning-rates", "1e-3"]
    assert ia2("compare", *options).status == 0
    again = ia2("compare", *options, "--json")
    assert "rate 1e+30: it diverged" in again.err
    assert "1e+30" in again.json["diverged"]["ia2-sft"]
    findings = ia2("doctor", "out", "--json").json["runs"][0]["findings"]
    (found,) = [f for f in findings if f["rule"] == "diverged"]
    assert "rate 1e+30" in found["evidence"] and "--align-learning-rate 1e+29" in found["advice"]
    assert "--learning-rates" not in found["advice"]
    # the recipe that is left is analysed; the comparison has nothing to go on with
    ran = ia2("analyze", "out", "--parts", "activations", "--max-queries", 4)
    assert ran.status == 0, ran.err
    assert "ia2-sft diverged there; it is left out" in ran.err


def test_a_run_that_diverged_is_not_to_be_started_again(ia2: Command, here: Path) -> None:
    """The same command diverges again."""
    refused(ia2("train", "--recipe", "sft", "--learning-rates", "1e30"))
    commands = [["predict", "--adapter"], ["eval", "--adapter"], ["analyze"], ["report"]]
    for command in commands:
        data = ["--data", "test.jsonl"] if "--adapter" in command else []
        line = refused(ia2(*command, "out", *data))
        assert "diverged in it; see what `ia2 doctor out` says" in line
        assert "again" not in line


def test_a_comparison_in_which_all_diverges_is_one_line(ia2: Command, here: Path) -> None:
    options = ["--test-data", "test.jsonl", "--seeds", 1, "--recipes", "sft", "--learning-rates", "1e30"]
    line = refused(ia2("compare", *options))
    assert "diverged" in line and "1e+30" in line
    assert refused(ia2("compare", *options)) == line
    assert_finite(here / "out")


def test_a_curve_names_what_diverged(ia2: Command, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", "model", "--data", "rows.jsonl", "--test-data", "test.jsonl", "--output-dir", "out"]
    options = ["--sizes", "2,4", "--seeds", 1, "--recipes", "base,sft", "--learning-rates", "1e30"]
    ran = run(capsys, "curve", *common, *BRIEF, *options)
    assert ran.status == 0, ran.err
    assert "sft diverged at every learning rate" in (here / "out" / "table.md").read_text()
    assert_finite(here / "out")
    assert ia2("report", "out", "--output", "out/page.html").status == 0


def test_the_doctor_looks_at_a_curve_that_diverged(
    ia2: Command, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It took a curve for a run of another kind, and other commands advise to ask it."""
    options = ["--model", "model", "--data", "rows.jsonl", "--test-data", "test.jsonl", "--output-dir", "out"]
    options += [*map(str, BRIEF), "--recipes", "sft", "--seeds", "1", "--sizes", "4,6"]
    refused(run(capsys, "curve", *options, "--learning-rates", "1e30"))
    assert "see what `ia2 doctor out` says" in refused(ia2("report", "out"))
    (found,) = ia2("doctor", "out", "--json").json["runs"]
    assert "diverged" in [f["rule"] for f in found["findings"]]


def test_a_cell_that_diverges_fails_by_name(files: Path, tmp_path: Path) -> None:
    grid: dict[str, Any] = {"recipes": ["sft", "ia2-sft"], "learning_rates": [1e30, 1e-3]}
    done = swept(files, tmp_path / "out", **grid)
    assert (done.done, len(done.failed)) == (2, 2)
    assert [record["spec"]["learning_rate"] for record in records(tmp_path / "out")] == [1e-3, 1e-3]
    for failure in done.failed:
        assert failure["spec"]["learning_rate"] == 1e30
        assert "diverged" in failure["error"] and "Error:" not in failure["error"]
        assert failure["traceback"] == ""
    again = swept(files, tmp_path / "out", **grid)
    assert [f["error"] for f in again.failed] == [f["error"] for f in done.failed]
    assert_finite(tmp_path / "out")


# ---------------------------------------------------------------------------------- predictions of NaN


@pytest.fixture
def bad(here: Path, tiny_icl_model_path: Path) -> Path:
    """A model whose logits are NaN."""
    return damaged(tiny_icl_model_path, here / "bad", tensors="norm")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("probe", []),
        ("probe", ["--task", "generation", "--max-answer-tokens", 3]),
        ("train", []),
        ("train", ["--task", "generation", "--max-answer-tokens", 3]),
        ("train", ["--targets", "online"]),
        ("train", ["--targets", "memory", "--recipe", "soft-sft"]),
        ("train", ["--demo-order", "nearest"]),
        ("train", ["--demo-order", "search"]),
        ("compare", ["--recipes", "base", "--test-data", "test.jsonl"]),
        ("compare", ["--recipes", "icl", "--test-data", "test.jsonl"]),
    ],
    ids=str,
)
def test_logits_that_are_nan_are_an_error(command: str, options: list[Any], ia2: Command, bad: Path) -> None:
    line = refused(ia2(command, "--model", "bad", *options))
    assert "bad" in line and "not finite" in line and "float32" in line
    assert "chance" not in line


def test_fine_tuning_a_model_of_nan_says_that_no_rate_helps(ia2: Command, bad: Path) -> None:
    line = refused(ia2("train", "--model", "bad", "--recipe", "sft"))
    assert "before the first step" in line


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_an_adapter_of_nan_is_an_error(command: str, ia2: Command, here: Path) -> None:
    assert ia2("train", "--quiet").status == 0
    for name, value in (("nan", float("nan")), ("huge", 1e30)):
        damaged(here / "out", here / name, value, tensors="lora_B")
        line = refused(ia2(command, "--adapter", name, "--data", "test.jsonl", "--output", "found.jsonl"))
        assert "not finite" in line and "rain it again" in line
    assert not (here / "found.jsonl").exists()


def test_half_precision_that_overflows_says_so(ia2: Command, here: Path, tiny_icl_model_path: Path) -> None:
    shutil.copytree(tiny_icl_model_path, here / "large")
    file = here / "large" / "model.safetensors"
    state = load_file(file)
    for name in state:
        if "v_proj" in name or "o_proj" in name:
            state[name] = state[name] * 2000  # fine in float32, beyond 65504 in half precision
    save_file(state, file, metadata={"format": "pt"})
    assert ia2("probe", "--model", "large", "--dtype", "float32", "--quiet").status == 0
    for command, options in (("probe", []), ("train", []), ("train", ["--recipe", "sft", "--overwrite"])):
        line = refused(ia2(command, "--model", "large", "--dtype", "float16", *options))
        assert "float16" in line and "--dtype" in line and "bfloat16" in line and "float32" in line


def test_activations_that_are_not_finite_are_an_error_without_logits_too(tmp_path: Path) -> None:
    model, tokenizer = wordy_model(), make_word_tokenizer()
    layer = model.model.layers[0].self_attn.o_proj
    with torch.no_grad():
        layer.weight.fill_(float("inf"))
    with ActivationCapture(model) as capture, pytest.raises(ModelError, match="activations are not finite"):
        list(answer_pass(model, tokenizer, [((5, 6), (7,))], capture=capture, logits=False))


def test_logits_of_minus_infinity_are_fine(tmp_path: Path) -> None:
    """Some models rule tokens out so."""
    model, tokenizer = wordy_model(), make_word_tokenizer()

    def ruled_out(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., 30:] = float("-inf")
        return output

    model.lm_head.register_forward_hook(ruled_out)
    (output,) = answer_pass(model, tokenizer, [((5, 6), (7,))])
    assert output.logits is not None and output.logits.isneginf().any()


def test_patched_and_sampled_passes_are_checked(tmp_path: Path) -> None:
    model, tokenizer = wordy_model(), make_word_tokenizer()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        patched_log_probs(model, [(5, 6, 7)], [(8,)], [{}], [()])
    with pytest.raises(ModelError, match="not finite"):
        diversity(model, tokenizer, [(5, 6), (6, 7)], ["a"])


# ------------------------------------------------------------------------------------------ measures


def test_a_probability_never_exceeds_one_by_rounding() -> None:
    """The terminators' probabilities are summed: in float32 that may give a little more than 1."""
    terminators = tuple(range(6, 40))
    task = Task(
        "classification", labels=(" a", " a b"), label_ids=((4,), (4, 5)), names=("a", "a b"),
        max_answer_tokens=2, terminators=terminators, index={" a": 0, " a b": 1},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(len(terminators), generator=generator) for _ in range(50)]
    sums = [float(draw.log_softmax(-1).logsumexp(0)) for draw in draws]
    assert max(sums) > 0, "no draw shows the rounding"
    logits = torch.full((2, 40), -1000.0)
    logits[0, 4] = 0.0
    logits[1, 6:] = draws[sums.index(max(sums))]
    scorer = LabelScorer(task, 1)
    assert len(scorer.answers) == 1  # one label begins the other
    scorer.add(AnswerOutput(0, torch.cat([logits, logits[1:]]), None))
    measured = measure_labels(scorer.finish(), np.array([0]), [4, 4], None)
    for rows in measured.plain.values():
        assert ((rows.confidence >= 0) & (rows.confidence <= 1)).all()
        assert (rows.brier >= 0).all() and np.isfinite(rows.nll).all()
    summarise([measured])


def test_a_label_that_the_model_rules_out_has_a_finite_loss() -> None:
    labels = Task("classification", labels=(" a", " b"), label_ids=((0,), (1,)), names=("a", "b"),
                  max_answer_tokens=1, index={" a": 0, " b": 1})  # fmt: skip
    scorer = LabelScorer(labels, 1)
    scorer.add(AnswerOutput(0, torch.tensor([[0.0, float("-inf"), 0.0]]), None))
    measured = measure_labels(scorer.finish(), np.array([1]), [0, 1], None)
    for rows in measured.plain.values():
        assert all(np.isfinite(column).all() for column in rows.arrays())
    assert summarise([measured])["vocabulary"]["nll"]["value"] > 700


@pytest.mark.usefixtures("undrawn")
def test_one_test_row_has_no_variance_and_no_nan(ia2: Command, here: Path) -> None:
    options = ["--test-data", "test.jsonl", "--max-test", 1, "--seeds", 1, "--recipes", "base,icl,sft"]
    for _ in range(2):  # what is written is read back
        (here / "out" / "compare.json").unlink(missing_ok=True)
        ran = ia2("compare", *options)
        assert ran.status == 0, ran.err
        summary = strict((here / "out" / "compare.json").read_text())
        assert summary["recipes"]["sft"]["similarity"]["variance_unexplained"] is None
    assert ia2("report", "out", "--output", "out/page.html").status == 0
    assert ia2("doctor", "out", "--json").json["runs"]
    assert_finite(here / "out")


def test_every_writer_of_json_is_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = float("nan")
    write_predictions(tmp_path / "p.jsonl", [Prediction("s", "q", "g", "p", True, bad, {"x": [bad]})])
    assert strict((tmp_path / "p.jsonl").read_text())["confidence"] is None
    rows = [{"source": "s", "label": "a", "confidence": bad, "labels": {"a": float("inf")}}]
    assert strict(prediction_text(rows, ".jsonl"))["labels"] == {"a": None}
    assert prediction_text(rows, ".csv").splitlines()[1] == '"s","a","",""'
    print_json({"a": [bad]})
    assert strict(capsys.readouterr().out) == {"a": [None]}
