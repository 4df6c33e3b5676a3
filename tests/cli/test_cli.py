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
import typer
import yaml
from helpers.command_line import TASK, Ran, run, run_apart, tree, write_rows

import ia2
from ia2.cli.options import gather_lists, list_flags, settings_of, with_settings
from ia2.config import AdaptConfig, CompareConfig, CurveConfig, ProbeConfig, TrainConfig

HEAVY = ("torch", "transformers", "datasets", "peft", "scipy", "matplotlib", "pandas")
WORDS = dict(zip(TASK.answers, ("billing_issue", "refund", "other"), strict=True))


@pytest.mark.parametrize(
    ("code", "limit"),  # generous: 0.1 s and 0.5 s on an idle machine
    [
        ("import ia2", 0.5),
        *((f"from ia2.cli import main; main({given})", 5) for given in (["--help"], ["train", "--help"])),
    ],
)
def test_starting_is_quick(code: str, limit: float) -> None:
    script = (
        "import sys, time, json\nbegan = time.perf_counter()\n"
        f"try:\n    {code}\nexcept SystemExit:\n    pass\nseconds = time.perf_counter() - began\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(json.dumps([found, seconds]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found, seconds = json.loads(done.stderr.splitlines()[-1])
    assert found == [] and seconds < limit


def test_public_names() -> None:
    assert dir(ia2) == sorted(ia2.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ia2.nothing
    # and they are known to type checkers
    source = Path(ia2.__file__).read_text(encoding="utf-8").split("if TYPE_CHECKING:")[1].split("def ")[0]
    for name, module in ia2._PUBLIC.items():
        assert getattr(ia2, name) is getattr(importlib.import_module(module), name)
        assert f"from {module} import" in source
        assert name in source.replace(",", " ").replace("(", " ").split(), name


# ----------------------------------------------------------------------------------------- options

NOT_PROBED = ("recipe", "unlabelled", "max_unlabelled", "unlabelled_split", "selection")
OPTIONS: dict[str, tuple[type[AdaptConfig] | None, tuple[str, ...], list[str]]] = {
    "train": (TrainConfig, (), ["--config", "--json", "--quiet", "--overwrite"]),
    "compare": (CompareConfig, ("recipe",), ["--config", "--json", "--quiet", "--overwrite"]),
    "curve": (CurveConfig, ("recipe", "num_examples", "folds"), ["--config", "--json", "--quiet"]),
    "probe": (ProbeConfig, NOT_PROBED, ["--config", "--json", "--quiet"]),
    "eval": (None, (), ["--adapter", "--data", "--split", "--output", "--device", "--json", "--quiet"]),
    "predict": (None, (), ["--adapter", "--data", "--split", "--output", "--device", "--json", "--quiet"]),
    "demo": (None, (), ["--output-dir", "--model", "--seeds", "--json", "--quiet", "--overwrite"]),
    "env": (None, (), ["--json"]),
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(command: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    ran = run(capsys, command, "--help")
    assert (ran.status, ran.err) == (0, "")
    kind, left_out, others = OPTIONS[command]
    flags = [setting.flag for setting in settings_of(kind, left_out).values()] if kind else []
    assert {*flags, *others} <= set(ran.out.replace(",", " ").split())


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == Ran(0, f"{ia2.__version__}\n", "")
    for arguments in ([], ["train", "-h"]):
        ran = run(capsys, *arguments)
        assert (ran.status, ran.err) == (0, "") and "Usage" in ran.out


def read(kind: type[AdaptConfig], *arguments: str) -> Any:
    """What a command with the settings of ``kind`` would be given."""
    app, given = typer.Typer(), []

    @with_settings(kind)
    def command(config: Any) -> None:
        given.append(config)

    app.command()(command)
    app(gather_lists(list(arguments), list_flags(kind)), standalone_mode=False)
    return given[0]


RATES = [1e-4, 3e-4, 1e-3]
LABELS = {"0": "negative", "1": "positive"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--learning-rates", "1e-4", "3e-4", "1e-3", "--seed", "2"], {"learning_rates": RATES, "seed": 2}),
        (["--learning-rates", "1e-4,3e-4,1e-3"], {"learning_rates": RATES}),
        (["--learning-rates", "1e-4, 3e-4", "1e-3"], {"learning_rates": RATES}),
        (["--learning-rates", "[1e-4, 3e-4, 1e-3]"], {"learning_rates": RATES}),
        (["--label-map", "0=negative,1=positive"], {"label_map": LABELS}),
        (["--label-map", ' {"0": "negative", "1": "positive"}'], {"label_map": LABELS}),
        (["--prompt-template", r"Text: {text}\nLabel:"], {"prompt_template": "Text: {text}\nLabel:"}),
        (["--completion-template", r"\t{label}"], {"completion_template": "\t{label}"}),
        (["--separator", r"\n---\n"], {"separator": "\n---\n"}),
        (["--no-balanced"], {"balanced": False}),
        (["--no-align-restore-best"], {"align.restore_best": False, "sft.restore_best": True}),
        (["--align-objective", "cosine"], {"align.objective": "cosine", "align.layers": "all"}),
        (["--adapter-peft", '{"peft_type": "IA3"}'], {"adapter.peft": {"peft_type": "IA3"}}),
        (
            ["--adapter-target-modules", "q_proj", "k_proj", "--balanced"],
            {"adapter.target_modules": ["q_proj", "k_proj"], "balanced": True},
        ),
        # flags win over the file, whose YAML has escapes of its own
        (
            ["--config", "s.yaml", "--no-balanced", "--align-epochs", "4"],
            {"balanced": False, "seed": 5, "align.epochs": 4, "prompt_template": "a {b}\\n"},
        ),
    ],
    ids=str,
)
def test_options_become_settings(
    arguments: list[str], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text("balanced: true\nseed: 5\nalign: {epochs: 3}\nprompt_template: 'a {b}\\n'\n")
    config = read(TrainConfig, *arguments)
    for name, value in expected.items():
        found: Any = config
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value, name


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "env", "--json").json
    assert found["versions"]["ia2"] == ia2.__version__
    assert found["machine"]["cpu_cores"] >= 1
    assert list(found["packaged_models"]) == ["demo", "demo-gemma", "demo-qwen", "demo-qwen-1.5b"]
    assert "transformers: " in run(capsys, "env").out


def test_an_interrupt_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("ia2.data.examples.Examples.load", interrupted)
    ran = run(capsys, "train", "--data", "rows.jsonl", "--output-dir", tmp_path / "out")
    assert (ran.status, ran.out) == (130, "")
    assert ran.err == "\nia2: interrupted; start the same command again to continue.\n"


# -------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Path:
    """A folder with a run: raw labels, a template, a label map, one text of two tokens."""
    folder = tmp_path_factory.mktemp("work")
    texts = {"billing_issue": " L1 L2", "refund": " L3", "other": " L4"}
    for name, count, seed in (("train", 24, 0), ("test", 9, 1)):
        pairs = enumerate(TASK.examples(count, seed))
        write_rows(folder / f"{name}.jsonl", [{"id": i, "text": q, "label": WORDS[a]} for i, (q, a) in pairs])
    with (folder / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["id", "text"], *([i, q] for i, (q, _) in enumerate(TASK.examples(5, 2)))]
        )
    settings = {"prompt_template": "{text}", "completion_template": "{label}", "label_map": texts}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config", folder / "settings.yaml", "--model", tiny_icl_model_path]
    arguments += ["--data", folder / "train.jsonl", "--test-data", folder / "test.jsonl"]
    arguments += ["--output-dir", folder / "out", "--learning-rates", "1e-2"]
    arguments += ["--align-epochs", 4, "--sft-epochs", 25, "--sft-patience", 12, "--selection", "dev"]
    ran = run_apart("train", *arguments)
    assert ran.status == 0, ran.err
    (folder / "train.out").write_text(ran.out)
    (folder / "train.err").write_text(ran.err)
    return folder


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Ran:
    ran = run(capsys, *arguments, "--quiet")
    assert (ran.status, ran.err) == (0, "")
    return ran


def test_train(work: Path, tiny_icl_model_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out, err = (work / "train.out").read_text(), (work / "train.err").read_text()
    assert all(text in out for text in ("among the labels", "asim to ICL", "ia2 predict --adapter"))
    assert "Task: 3 labels" in err and "Stage align" in err and "Warning" not in err
    files = set(tree(work / "out"))
    assert {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "metrics.json", "predictions.jsonl",
        "tokenizer.json", "ia2_config.yaml", "ia2_run.json",
    } <= files  # fmt: skip
    assert not [name for name in files if name.startswith(".") or "checkpoint-" in name]
    metrics = json.loads((work / "out" / "metrics.json").read_text())
    assert metrics["test"]["n"] == len((work / "out" / "predictions.jsonl").read_text().splitlines()) == 9
    assert metrics["test"]["labels"]["accuracy"]["value"] > 0.6  # chance is 0.33
    # other tools load it
    base = AutoModelForCausalLM.from_pretrained(tiny_icl_model_path)
    model = PeftModel.from_pretrained(base, str(work / "out"))
    assert any(bool(p.abs().sum() > 0) for n, p in model.named_parameters() if "lora_B" in n)


def test_predict(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["predict", "--adapter", work / "out", "--data", work / "new.csv"]
    rows = command(capsys, *common, "--json").json
    assert [json.loads(line) for line in command(capsys, *common).out.splitlines()] == rows
    gold = [WORDS[answer] for _, answer in TASK.examples(5, 2)]
    assert sum(row["label"] == truth for row, truth in zip(rows, gold, strict=True)) >= 4
    for row in rows:
        assert set(row["labels"]) == set(WORDS.values()) and row["source"].startswith("new.csv:")
        assert sum(row["labels"].values()) == pytest.approx(1)
        assert row["confidence"] == max(row["labels"].values()) == row["labels"][row["label"]]
    assert "5 predictions" in command(capsys, *common, "--output", tmp_path / "p.csv").out
    found = command(capsys, *common, "--output", tmp_path / "p.jsonl", "--json").json
    assert found == {"rows": 5, "output": str(tmp_path / "p.jsonl")}
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == rows
    for flat, row in zip(csv.DictReader((tmp_path / "p.csv").open(newline="")), rows, strict=True):
        assert (flat["label"], float(flat["confidence"])) == (row["label"], row["confidence"])
        assert {k[2:-1]: float(v) for k, v in flat.items() if k.startswith("p(")} == row["labels"]


def test_eval_agrees_with_train(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["eval", "--adapter", work / "out", "--data", work / "test.jsonl"]
    found = command(capsys, *common, "--json", "--output", tmp_path / "p.jsonl").json
    metrics = json.loads((work / "out" / "metrics.json").read_text())
    for scope in ("labels", "vocabulary"):
        for name, value in found["test"][scope].items():
            assert value["value"] == pytest.approx(metrics["test"][scope][name]["value"], abs=1e-5), name
    assert found["test"]["scaled"]["labels"]["temperature"] == metrics["temperatures"]["labels"]
    gold = [json.loads(line)["gold"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert gold == [json.loads(line)["label"] for line in (work / "test.jsonl").read_text().splitlines()]
    assert "accuracy" in command(capsys, *common).out


def test_probe_and_compare(tiny_icl_model_path: Path, capsys: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", TASK.examples(20, 3))
    common = ["--model", tiny_icl_model_path, "--data", rows]
    assert command(capsys, "probe", *common, "--json").json["verdict"] == "likely to help"
    assert "Verdict: likely to help." in command(capsys, "probe", *common).out
    options = ["--seeds", 1, "--recipes", "base", "icl", "--output-dir", tmp_path / "out"]
    found = command(capsys, "compare", *common, *options, "--json").json
    assert set(found["recipes"]) == {"base", "icl"}
    assert found == json.loads((tmp_path / "out" / "compare.json").read_text())
    shown = command(capsys, "compare", *common, *options).out
    assert "Results: " in shown and "compare.svg" in shown
    assert (tmp_path / "out" / "compare.svg").is_file()


def test_configurations_of_a_folder(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("one", 4), ("two", 6)):
        (tmp_path / "many" / name).mkdir(parents=True)
        rows = [{"text": q, "label": WORDS[a]} for q, a in TASK.examples(count, 0)]
        write_rows(tmp_path / "many" / name / "test.jsonl", rows)
    for name in ("predict", "eval"):
        given = [name, "--adapter", work / "out", "--data", tmp_path / "many", "--json", "--split", "test"]
        assert "'one', 'two'" in run(capsys, *given, "--quiet").refusal()
        found = command(capsys, *given, "--data-config", "two").json
        assert (len(found) if name == "predict" else found["test"]["n"]) == 6
