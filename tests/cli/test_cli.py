"""The command line as users meet it; refusals are tested in ``faults``."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command_line import Ran, run, run_apart, tree, write_rows
from tiny_icl.tasks import sample_task

import ia2
from ia2.cli.options import gather_lists, list_flags, with_settings
from ia2.config import AdaptConfig, CompareConfig, CurveConfig, ProbeConfig, TrainConfig
from ia2.config.sections import SECTIONS

TASK = sample_task(0, num_classes=3)


# ---------------------------------------------------------------------------------------- imports

HEAVY = ("torch", "transformers", "datasets", "peft", "scipy", "matplotlib", "pandas")


def loaded_after(code: str) -> tuple[list[str], float]:
    """Heavy packages that ``code`` imports, and the seconds it takes."""
    script = (
        "import sys, time, json\nbegan = time.perf_counter()\n"
        f"try:\n    {code}\nexcept SystemExit:\n    pass\n"
        "seconds = time.perf_counter() - began\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(json.dumps([found, seconds]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found, seconds = json.loads(done.stderr.splitlines()[-1])
    return found, seconds


def test_importing_is_quick() -> None:
    found, seconds = loaded_after("import ia2")
    assert found == []
    assert seconds < 0.3


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_is_quick(arguments: list[str]) -> None:
    found, seconds = loaded_after(f"from ia2.cli import main; main({arguments!r})")
    assert found == []
    assert seconds < 5  # generous: 0.5 s on an idle machine


def test_public_names() -> None:
    for name in ia2.__all__:
        assert getattr(ia2, name) is not None
    assert dir(ia2) == sorted(ia2.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ia2.nothing


def test_public_names_are_known_to_type_checkers() -> None:
    source = Path(ia2.__file__).read_text(encoding="utf-8").split("if TYPE_CHECKING:")[1].split("def ")[0]
    for name, module in ia2._PUBLIC.items():
        assert f"from {module} import" in source
        assert name in source.replace(",", " ").replace("(", " ").split(), name
        assert hasattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------------------- options


def options_of(kind: type[AdaptConfig], leave_out: tuple[str, ...] = ()) -> list[str]:
    flags = []
    for name, field in kind.model_fields.items():
        if name in leave_out:
            continue
        inner = field.annotation.model_fields if name in ("adapter", *SECTIONS) else None  # type: ignore[union-attr]
        names = [name] if inner is None else [f"{name}_{leaf}" for leaf in inner]
        flags += ["--" + n.replace("_", "-") for n in names]
    return flags


NOT_PROBED = ("recipe", "unlabelled", "max_unlabelled", "unlabelled_split", "selection")
OPTIONS = {
    "train": [*options_of(TrainConfig), "--config", "--json", "--quiet", "--overwrite"],
    "compare": [*options_of(CompareConfig, ("recipe",)), "--config", "--json", "--quiet", "--overwrite"],
    "curve": [*options_of(CurveConfig, ("recipe", "num_examples", "folds")), "--config", "--json", "--quiet"],
    "probe": [*options_of(ProbeConfig, NOT_PROBED), "--config", "--json", "--quiet"],
    "eval": ["--adapter", "--data", "--split", "--output", "--device", "--json", "--quiet"],
    "predict": ["--adapter", "--data", "--split", "--output", "--device", "--json", "--quiet"],
    "demo": ["--output-dir", "--model", "--seeds", "--json", "--quiet", "--overwrite"],
    "env": ["--json"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    ran = run(capsys, command, "--help")
    assert ran.status == 0
    words = ran.out.replace(",", " ").split()
    for option in OPTIONS[command]:
        assert option in words, option


def test_lists_may_be_written_with_spaces() -> None:
    flags = list_flags(TrainConfig, CompareConfig, ProbeConfig)
    assert flags == {
        "--learning-rates",
        "--recipes",
        "--adapters",
        "--objectives",
        "--labels",
        "--report-to",
        "--adapter-target-modules",
        "--align-layers",
        "--joint-layers",
        "--joint-betas",
    }
    given = ["train", "--learning-rates", "1e-4", "3e-4", "1e-3", "--seed", "1", "--report-to"]
    assert gather_lists(given, flags) == [
        "train", "--learning-rates", "1e-4,3e-4,1e-3", "--seed", "1", "--report-to"
    ]  # fmt: skip


def read(kind: type[AdaptConfig], *arguments: str) -> Any:
    """What a command with the settings of ``kind`` would be given."""
    import typer

    app, given = typer.Typer(), []

    @with_settings(kind)
    def command(config: Any) -> None:
        given.append(config)

    app.command()(command)
    app(gather_lists(list(arguments), list_flags(kind)), standalone_mode=False)
    return given[0]


@pytest.mark.parametrize(
    "written",
    [["1e-4", "3e-4", "1e-3"], ["1e-4,3e-4,1e-3"], ["1e-4, 3e-4", "1e-3"], ["[1e-4, 3e-4, 1e-3]"]],
)
def test_learning_rates(written: list[str]) -> None:
    config = read(TrainConfig, "--learning-rates", *written, "--seed", "2")
    assert (config.learning_rates, config.seed) == ([1e-4, 3e-4, 1e-3], 2)


@pytest.mark.parametrize("written", ["0=negative,1=positive", ' {"0": "negative", "1": "positive"}'])
def test_label_map(written: str) -> None:
    assert read(TrainConfig, "--label-map", written).label_map == {"0": "negative", "1": "positive"}


def test_templates_and_separator_are_unescaped() -> None:
    config = read(
        TrainConfig, "--prompt-template", r"Text: {text}\nLabel:", "--completion-template", r"\t{label}",
        "--separator", r"\n---\n",
    )  # fmt: skip
    assert config.prompt_template == "Text: {text}\nLabel:"
    assert config.completion_template == "\t{label}"
    assert config.separator == "\n---\n"


def test_switches_sections_and_mappings() -> None:
    config = read(
        TrainConfig, "--balanced", "--no-align-restore-best", "--align-objective", "cosine",
        "--adapter-peft", '{"peft_type": "IA3"}', "--adapter-target-modules", "q_proj", "k_proj",
    )  # fmt: skip
    assert config.balanced is True
    assert config.align.restore_best is False
    assert config.sft.restore_best is True
    assert config.align.objective == "cosine"
    assert config.adapter.peft == {"peft_type": "IA3"}
    assert config.adapter.target_modules == ["q_proj", "k_proj"]


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "balanced: true\nseed: 5\nalign: {epochs: 3}\nprompt_template: 'a {b}\\n'\n"
    )
    config = read(TrainConfig, "--config", str(tmp_path / "s.yaml"), "--no-balanced", "--align-epochs", "4")
    assert (config.balanced, config.seed, config.align.epochs) == (False, 5, 4)
    assert config.prompt_template == "a {b}\\n"  # YAML has escapes of its own


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "env", "--json").json
    assert found["versions"]["ia2"] == ia2.__version__
    assert found["machine"]["cpu_cores"] >= 1
    assert list(found["packaged_models"]) == ["demo", "demo-gemma", "demo-qwen", "demo-qwen-1.5b"]
    assert "transformers: " in run(capsys, "env").out


def test_an_interrupt_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("ia2.experiment.adapt.load_examples", interrupted)
    ran = run(capsys, "train", "--data", "rows.jsonl", "--output-dir", tmp_path / "out")
    assert (ran.status, ran.out) == (130, "")
    assert ran.err == "\nia2: interrupted; start the same command again to continue.\n"


# ------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Path:
    """A folder with a run: raw labels, a template, a label map, one text of two tokens."""
    folder = tmp_path_factory.mktemp("work")
    words = dict(zip(TASK.answers, ("billing_issue", "refund", "other"), strict=True))
    texts = {"billing_issue": " L1 L2", "refund": " L3", "other": " L4"}

    def rows(n: int, seed: int) -> list[dict[str, Any]]:
        return [{"id": i, "text": q, "label": words[a]} for i, (q, a) in enumerate(TASK.examples(n, seed))]

    write_rows(folder / "train.jsonl", rows(24, 0))
    write_rows(folder / "test.jsonl", rows(9, 1))
    with (folder / "new.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows(5, 2))
    settings = {"prompt_template": "{text}", "completion_template": "{label}", "label_map": texts}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    options = {
        "--config": folder / "settings.yaml",
        "--model": tiny_icl_model_path,
        "--data": folder / "train.jsonl",
        "--test-data": folder / "test.jsonl",
        "--output-dir": folder / "out",
        "--learning-rates": "1e-2",
        "--align-epochs": 4,
        "--sft-epochs": 25,
        "--sft-patience": 12,
    }
    arguments = ["train", *(part for option in options.items() for part in option)]
    ran = run_apart(*arguments)
    assert ran.status == 0, ran.err
    (folder / "train.out").write_text(ran.out)
    (folder / "train.err").write_text(ran.err)
    return folder


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Ran:
    ran = run(capsys, *arguments)
    assert ran.status == 0, ran.err
    return ran


def test_train_prints_results_and_logs_apart(work: Path) -> None:
    out, err = (work / "train.out").read_text(), (work / "train.err").read_text()
    assert "among the labels" in out
    assert "asim to ICL" in out
    assert "ia2 predict --adapter" in out
    assert "Task: 3 labels" in err
    assert "Stage align" in err
    assert "Warning" not in err


def test_train_leaves_what_other_tools_load(work: Path) -> None:
    files = set(tree(work / "out"))
    assert {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "metrics.json", "predictions.jsonl",
        "tokenizer.json", "ia2_config.yaml", "ia2_run.json",
    } <= files  # fmt: skip
    assert not [name for name in files if name.startswith(".") or "checkpoint-" in name]
    metrics = json.loads((work / "out" / "metrics.json").read_text())
    assert metrics["test"]["n"] == 9
    assert metrics["test"]["labels"]["accuracy"]["value"] > 0.6  # chance is 0.33
    assert len((work / "out" / "predictions.jsonl").read_text().splitlines()) == 9


def test_the_adapter_loads_with_peft(work: Path, tiny_icl_model_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_icl_model_path)
    model = PeftModel.from_pretrained(base, str(work / "out"))
    assert any(bool(p.abs().sum() > 0) for n, p in model.named_parameters() if "lora_B" in n)


def test_predict_rows(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, "predict", "--adapter", work / "out", "--data", work / "new.csv", "--quiet")
    assert ran.err == ""
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert len(rows) == 5
    assert (
        rows
        == command(capsys, "predict", "--adapter", work / "out", "--data", work / "new.csv", "--json").json
    )
    words = dict(zip(TASK.answers, ("billing_issue", "refund", "other"), strict=True))
    gold = [words[answer] for _, answer in TASK.examples(5, 2)]
    assert sum(row["label"] == truth for row, truth in zip(rows, gold, strict=True)) >= 4
    for row in rows:
        assert set(row["labels"]) == {"billing_issue", "refund", "other"}
        assert sum(row["labels"].values()) == pytest.approx(1)
        assert row["confidence"] == max(row["labels"].values()) == row["labels"][row["label"]]
        assert row["source"].startswith("new.csv:")


def test_predict_into_files(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["predict", "--adapter", work / "out", "--data", work / "new.csv", "--quiet"]
    assert "5 predictions" in command(capsys, *common, "--output", tmp_path / "p.csv").out
    found = command(capsys, *common, "--output", tmp_path / "p.jsonl", "--json").json
    assert found == {"rows": 5, "output": str(tmp_path / "p.jsonl")}
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    with (tmp_path / "p.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["label"] for row in table] == [row["label"] for row in lines]
    for flat, row in zip(table, lines, strict=True):
        assert float(flat["confidence"]) == row["confidence"]
        assert {k[2:-1]: float(v) for k, v in flat.items() if k.startswith("p(")} == row["labels"]


def test_eval_agrees_with_train(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["eval", "--adapter", work / "out", "--data", work / "test.jsonl"]
    found = command(capsys, *common, "--json", "--quiet", "--output", tmp_path / "p.jsonl").json
    metrics = json.loads((work / "out" / "metrics.json").read_text())
    assert found["test"]["n"] == 9
    for scope in ("labels", "vocabulary"):
        for name, value in found["test"][scope].items():
            assert value["value"] == pytest.approx(metrics["test"][scope][name]["value"], abs=1e-5), name
    assert found["test"]["scaled"]["labels"]["temperature"] == metrics["temperatures"]["labels"]
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["gold"] for row in rows[:1]] == [
        json.loads((work / "test.jsonl").read_text().splitlines()[0])["label"]
    ]
    assert "accuracy" in command(capsys, *common).out


def test_probe(
    work: Path, tiny_icl_model_path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", TASK.examples(20, 3))
    common = ["probe", "--model", tiny_icl_model_path, "--data", rows, "--quiet"]
    assert command(capsys, *common, "--json").json["verdict"] == "likely to help"
    assert "Verdict: likely to help." in command(capsys, *common).out


def test_compare(tiny_icl_model_path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", TASK.examples(12, 3))
    common = ["compare", "--model", tiny_icl_model_path, "--data", rows, "--quiet", "--seeds", 1,
              "--recipes", "base", "icl", "--output-dir", tmp_path / "out"]  # fmt: skip
    ran = command(capsys, *common, "--json")
    assert ran.err == ""
    assert set(ran.json["recipes"]) == {"base", "icl"}
    assert ran.json == json.loads((tmp_path / "out" / "compare.json").read_text())
    shown = command(capsys, *common).out
    assert "Results: " in shown
    assert "compare.svg" in shown
    assert (tmp_path / "out" / "compare.svg").is_file()
