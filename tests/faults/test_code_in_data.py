"""Data never runs code: not a run folder, a YAML file, a model, a chat template, a row, a label or a name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command_line import Ran, run, write_rows
from strangers import EVIL, FUNCTION, Stranger, edit_json
from tiny_icl.tasks import sample_task

from ia2.config import TrainConfig
from ia2.data.benchmarks import load_benchmark
from ia2.data.examples import Examples
from ia2.experiment.adapt import adapt, load_adapter
from ia2.experiment.sweep.grid import load_grid
from ia2.utils.errors import ConfigError, ModelError
from ia2.utils.logging import printable

TASK = sample_task(0, num_classes=3)
STEERING = "a\x1b[2Jb\rc\x07d\x9b31me\u202ef\u2066g\u200fh\x7fi\u2028jl\x85"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Path:
    """A finished run that answers with free text, with its rows beside it."""
    root = tmp_path_factory.mktemp("trained")
    data = write_rows(root / "rows.jsonl", TASK.examples(12, seed=0))
    config = TrainConfig(
        model=str(tiny_icl_model_path),
        data=str(data),
        recipe="sft",
        sft={"epochs": 1},
        task="generation",
        max_answer_tokens=2,
    )
    adapt(str(tiny_icl_model_path), Examples.load(data), config, output_dir=root / "out")
    return root / "out"


@pytest.fixture
def stranger(
    tmp_path: Path, trained: Path, tiny_icl_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Stranger:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, EVIL, None)  # put back at the end
    del sys.modules[EVIL]
    return Stranger(tmp_path, trained, tiny_icl_model_path)


Command = Callable[..., Ran]


@pytest.fixture
def ia2(stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> Command:
    """``ia2``, quiet; whatever comes of it, no code was run."""

    def command(*arguments: Any) -> Ran:
        logs = arguments[0] not in ("report", "benchmarks")
        ran = run(capsys, *arguments, *(["--quiet"] if logs else []))
        assert not stranger.marker.exists()
        return ran

    return command


def settings(**changes: Any) -> Callable[[Stranger], Path]:
    return lambda stranger: stranger.run_with(**changes)


def based_on(build: Callable[[Stranger], Path], **changes: Any) -> Callable[[Stranger], Path]:
    return lambda stranger: stranger.run_with(model=str(build(stranger)), **changes)


def task_parser(stranger: Stranger) -> Path:
    folder = stranger.run_with()
    edit_json(folder / "ia2_run.json", lambda facts: facts["task"].update(parser=FUNCTION))
    return folder


def pickled_adapter(stranger: Stranger) -> Path:
    folder = stranger.run_with()
    (folder / "adapter_model.safetensors").unlink()
    stranger.pickles(folder, "adapter_model.bin", "pytorch_model.bin")
    return folder


def tuned_with_code(stranger: Stranger) -> Path:
    peft = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 2,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "a",
        "tokenizer_name_or_path": str(stranger.model_with_tokenizer_code()),
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    return stranger.run_with(adapter={"peft": peft})


MEGATRON = {
    "peft_type": "LORA",
    "target_modules": ["q_proj"],
    "megatron_config": {"a": 1},
    "megatron_core": EVIL,
}
TRUST, PARSER, FUNCTION_FLAG = "--trust-remote-code", f"--parser {FUNCTION}", f"--context-function {FUNCTION}"

# What is wrong with a run folder, and what a command that would run it says.
RUNS: dict[str, tuple[Callable[[Stranger], Path], str]] = {
    "trust": (based_on(Stranger.model_with_code, trust_remote_code=True), TRUST),
    "code": (based_on(Stranger.model_with_code), TRUST),
    "tokenizer": (based_on(Stranger.model_with_tokenizer_code), TRUST),
    "parser": (settings(parser=FUNCTION), PARSER),
    "pickled model": (based_on(Stranger.model_of_a_pickle), "A pickle is never read"),
    "kernel": (based_on(Stranger.model_with_a_kernel), "attn_implementation"),
    "embedded adapter": (based_on(Stranger.model_with_an_adapter), "an adapter lies beside the model"),
    "pickled adapter": (pickled_adapter, "Run the same `ia2 train` again"),
    "tuning": (tuned_with_code, "its tokenizer brings code"),
    "megatron": (settings(adapter={"peft": MEGATRON}), "adapter"),
}
runs = pytest.mark.parametrize("trick", list(RUNS))


@pytest.mark.parametrize("command", ["predict", "eval"])
@runs
def test_a_run_folder_on_new_rows(stranger: Stranger, ia2: Command, command: str, trick: str) -> None:
    build, expected = RUNS[trick]
    rows = write_rows(stranger.root / "new.jsonl", TASK.examples(3, seed=5))
    assert expected in ia2(command, "--adapter", build(stranger), "--data", rows).refusal()


@runs
def test_a_run_folder_looked_into(stranger: Stranger, ia2: Command, trick: str) -> None:
    build, expected = RUNS[trick]
    line = ia2("analyze", build(stranger), "--parts", "activations").refusal()
    assert expected in line


@pytest.mark.parametrize("command", ["report", "doctor"])
@runs
def test_a_run_folder_that_is_only_read(stranger: Stranger, ia2: Command, command: str, trick: str) -> None:
    ran = ia2(command, RUNS[trick][0](stranger))
    if ran.status:
        ran.refusal()
    else:
        assert "Traceback" not in ran.err


@pytest.mark.parametrize("trick", [name for name in RUNS if name != "pickled adapter"])
def test_a_configuration(stranger: Stranger, ia2: Command, trick: str) -> None:
    build, expected = RUNS[trick]
    config = build(stranger) / "ia2_config.yaml"
    assert expected in ia2("train", "--config", config, "--output-dir", "mine").refusal()
    assert not Path("mine").exists()


def test_a_context_function_in_a_run_folder(stranger: Stranger, ia2: Command) -> None:
    """An adapter is shown no context, so predicting neither runs it nor needs it."""
    folder = stranger.run_with(context_function=FUNCTION)
    rows = write_rows(stranger.root / "new.jsonl", TASK.examples(3, seed=5))
    assert ia2("predict", "--adapter", folder, "--data", rows).status == 0
    assert FUNCTION_FLAG in ia2("analyze", folder).refusal()
    assert FUNCTION_FLAG in ia2("train", "--config", folder / "ia2_config.yaml").refusal()


def test_a_parser_in_the_task_of_a_run_folder(stranger: Stranger, ia2: Command) -> None:
    folder = task_parser(stranger)
    line = ia2("predict", "--adapter", folder, "--data", stranger.run.parent / "rows.jsonl").refusal()
    assert line.startswith(str(folder / "ia2_run.json")) and PARSER in line


def test_pickles_beside_a_run(stranger: Stranger, ia2: Command) -> None:
    folder = stranger.run_with()
    names = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin")
    stranger.pickles(folder, *names, *(f"stages/checkpoint-1/{name}" for name in names))
    rows = write_rows(stranger.root / "new.jsonl", TASK.examples(3, seed=5))
    for arguments in (
        ["predict", "--adapter", folder, "--data", rows],
        ["eval", "--adapter", folder, "--data", rows],
        ["report", folder],
        ["doctor", folder],
    ):
        assert ia2(*arguments).status == 0


def test_a_checkpoint_with_pickles(stranger: Stranger, ia2: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that somebody else began: training goes on from optimiser and random states on disk."""
    from transformers import Trainer

    from ia2.training.best_weights import BestWeights
    from ia2.utils.manifest import record_tree

    on_save = BestWeights.on_save

    def killed(self: Any, *given: Any, **named: Any) -> None:
        on_save(self, *given, **named)
        raise KeyboardInterrupt

    arguments = ["train", "--config", stranger.run / "ia2_config.yaml", "--output-dir", "half"]
    arguments += ["--checkpoint-every", 1]
    with monkeypatch.context() as patched:
        patched.setattr(BestWeights, "on_save", killed)
        assert ia2(*arguments).status == 130
    states = [file for ending in ("pt", "pth") for file in Path("half").rglob(f"checkpoint-*/*.{ending}")]
    assert len(states) == 3
    read = []
    for name in ("_load_rng_state", "_load_optimizer_and_scheduler"):
        monkeypatch.setattr(Trainer, name, noting(read, getattr(Trainer, name)))
    shutil.copytree("half", "whole")
    for file in states:
        shutil.rmtree("half")
        shutil.copytree("whole", "half")
        stranger.pickles(file.parent, file.name)
        record_tree(file.parent, file.parent)  # strangers know how to make a manifest fit
        line = ia2(*arguments).refusal()
        assert str(file.parent) in line and "Delete it" in line
    assert not stranger.marker.exists()
    assert read


def noting(calls: list[str], function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*given: Any, **named: Any) -> Any:
        calls.append(function.__name__)
        return function(*given, **named)

    return noted


def test_data_with_a_script(stranger: Stranger, ia2: Command) -> None:
    line = ia2("predict", "--adapter", stranger.run, "--data", stranger.data_script()).refusal()
    assert "scripted" in line


def test_yaml_that_makes_objects(stranger: Stranger, ia2: Command) -> None:
    file = stranger.root / "evil.yaml"
    file.write_text(f"model: !!python/object/apply:{EVIL}.run []\n")
    for command in (["train", "--config"], ["sweep"], ["benchmarks", "show"]):
        assert "evil.yaml: not YAML" in ia2(*command, file).refusal()


BENCHMARK = {
    "name": "Evil",
    "path": "rows",
    "test": {"split": "test", "rows": 2},
    "pool": {"split": "train", "rows": 8},
    "prompt": "{prompt}",
    "answer": "{completion}",
}


def benchmark_file(stranger: Stranger, file_name: str = "evil.yaml", **changes: Any) -> Path:
    for split in ("train", "test"):
        (stranger.root / "rows").mkdir(exist_ok=True)
        write_rows(stranger.root / "rows" / f"{split}.jsonl", TASK.examples(12, seed=len(split)))
    file = stranger.root / file_name
    file.write_text(yaml.safe_dump({**BENCHMARK, **changes}))
    return file


@pytest.mark.parametrize("command", ["show", "prepare"])
def test_a_benchmark_of_a_stranger(stranger: Stranger, ia2: Command, command: str) -> None:
    file = benchmark_file(stranger, parser=FUNCTION)
    line = ia2("benchmarks", command, file).refusal()
    assert line.startswith(str(file)) and PARSER in line


def grid_file(stranger: Stranger, **changes: Any) -> Path:
    grid = {
        "benchmarks": [str(benchmark_file(stranger))],
        "models": [str(stranger.model)],
        "recipes": ["base"],
        **changes,
    }
    file = stranger.root / "grid.yaml"
    file.write_text(yaml.safe_dump(grid))
    return file


GRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "trust": ({"trust_remote_code": True}, TRUST),
    "settings": ({"settings": {"parser": FUNCTION}}, PARSER),
    "part": ({"parts": [{"settings": {"context_function": FUNCTION}}]}, FUNCTION_FLAG),
    "axis": ({"axes": {"parser": ["hash", FUNCTION]}}, PARSER),
    "variant": ({"variants": {"a": {"context_function": FUNCTION}}}, FUNCTION_FLAG),
}


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize("trick", list(GRIDS))
def test_a_grid(stranger: Stranger, ia2: Command, trick: str, options: list[str]) -> None:
    changes, expected = GRIDS[trick]
    file = grid_file(stranger, **changes)
    line = ia2("sweep", file, *options, "--output-dir", "mine").refusal()
    assert line.startswith(str(file)) and expected in line
    assert not Path("mine").exists()


@pytest.mark.parametrize("partner", [False, True])
def test_a_benchmark_that_a_grid_names(stranger: Stranger, ia2: Command, partner: bool) -> None:
    named = benchmark_file(stranger, "coded.yaml", name="Coded", parser=FUNCTION)
    if partner:
        file = grid_file(stranger)
        benchmark_file(stranger, ood=["coded.yaml"])
    else:
        file = grid_file(stranger, benchmarks=[str(named)])
    line = ia2("sweep", file, "--output-dir", "mine").refusal()
    assert line.startswith(str(named)) and PARSER in line


def test_a_kernel_for_a_part_of_a_model(tmp_path: Path) -> None:
    from transformers import Gemma3Config

    from ia2.models.load import load_base

    config = {**Gemma3Config().to_dict(), "attn_implementation": {"text_config": "evil/kernel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"names evil/kernel.* Remove the key attn_implementation"):
        load_base(str(tmp_path), device="cpu")


def test_a_benchmark_for_an_analysis(stranger: Stranger, ia2: Command) -> None:
    file = benchmark_file(stranger, parser=FUNCTION)
    line = ia2("analyze", stranger.run, "--parts", "effects", "--benchmarks", file).refusal()
    assert line.startswith(str(file)) and PARSER in line


# ------------------------------------------------------------------------ what the user names, runs


def test_what_the_command_names_runs(stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    """The flags that the errors suggest are accepted, and do what the file asked for."""
    rows = write_rows(stranger.root / "new.jsonl", TASK.examples(3, seed=5))
    model = stranger.model_with_code(known=True)
    folder = stranger.run_with(model=str(model), trust_remote_code=True, parser=FUNCTION)
    edit_json(folder / "ia2_run.json", lambda facts: facts["task"].update(parser=FUNCTION))
    named: list[str] = []
    for flag in (TRUST, PARSER):
        line = run(capsys, "predict", "--adapter", folder, "--data", rows, *named).refusal()
        assert f"give {flag} in this command" in line
        named += flag.split()
    ran = run(capsys, "predict", "--adapter", folder, "--data", rows, *named, "--quiet")
    assert stranger.marker.exists()
    assert [json.loads(line)["label"] for line in ran.out.splitlines()] == ["a"] * 3
    assert run(capsys, "eval", "--adapter", folder, "--data", rows, *named, "--quiet").status == 0
    analysis = ["--parts", "activations", "--output-dir", "mine", "--quiet"]
    assert run(capsys, "analyze", folder, *named, *analysis).status == 0


def test_what_python_names_runs(stranger: Stranger) -> None:
    folder = stranger.run_with(parser=FUNCTION)
    with pytest.raises(ConfigError, match="--parser"):
        load_adapter(folder)
    assert load_adapter(folder, code={"parser": FUNCTION})[0].config.parser == FUNCTION
    assert load_adapter(folder, code={"parser": "hash"})[0].task.parser == "hash"


def test_a_training_run_says_what_to_give_again(
    stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stranger.run / "ia2_config.yaml"
    ran = run(capsys, "train", "--config", config, "--output-dir", "mine", "--parser", FUNCTION, "--quiet")
    assert f"--data new.jsonl --parser {FUNCTION}\n" in ran.out


def test_flags_that_benchmarks_and_grids_need(stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    file = benchmark_file(stranger, parser=FUNCTION)
    assert run(capsys, "benchmarks", "show", file, "--parser", FUNCTION).status == 0
    assert load_benchmark(file, [FUNCTION]).parser == FUNCTION
    grid = grid_file(stranger, benchmarks=[str(file)], trust_remote_code=True)
    benchmark_file(stranger, parser=FUNCTION)
    ran = run(capsys, "sweep", grid, "--output-dir", "mine", "--quiet", TRUST, "--parser", FUNCTION)
    assert ran.status == 0, ran
    assert "1 of 1 cells are done" in ran.out


def test_values_that_are_no_code_stay(stranger: Stranger, ia2: Command) -> None:
    folder = stranger.run_with(parser="hash", trust_remote_code=False, context_function=None)
    assert ia2("predict", "--adapter", folder, "--data", stranger.run.parent / "rows.jsonl").status == 0
    load_grid(grid_file(stranger, settings={"parser": "hash"}, trust_remote_code=False))
    assert load_benchmark(benchmark_file(stranger, parser="hash")).parser == "hash"


# ---------------------------------------------------------------------- templates, names and rows


def test_a_template_of_a_stranger_in_a_command(stranger: Stranger, ia2: Command) -> None:
    model = stranger.model_with_template("{{ 'a' * 10**10 }}")
    data = stranger.run.parent / "rows.jsonl"
    options = ["--chat", "turns", "--output-dir", "mine", "--recipe", "sft"]
    line = ia2("train", "--model", model, "--data", data, *options).refusal()
    assert "chat template takes more than 512 MB" in line
    folder = stranger.run_with(model=str(model), chat="turns")
    assert "chat template takes" in ia2("predict", "--adapter", folder, "--data", data).refusal()


def test_errors_steer_no_terminal(stranger: Stranger, ia2: Command) -> None:
    name = f"{STEERING}.jsonl"
    line = ia2("predict", "--adapter", stranger.run, "--data", name).refusal()
    assert line == printable(line) and "a[2Jb cd31mefghi jl .jsonl" in line
    config = stranger.root / "config.yaml"
    config.write_text(yaml.safe_dump({"recipe": STEERING}))
    line = ia2("train", "--config", config).refusal()
    assert line == printable(line)


def test_rows_steer_no_terminal(stranger: Stranger, ia2: Command) -> None:
    rows = write_rows(stranger.root / "new.jsonl", [(STEERING, "b")])
    ran = ia2("predict", "--adapter", stranger.run, "--data", rows)
    assert printable(ran.out) == ran.out
    assert json.loads(ran.out)["query"] == STEERING
    ran = ia2("predict", "--adapter", stranger.run, "--data", rows, "--json")
    assert printable(ran.out) == ran.out
    assert ran.json[0]["query"] == STEERING
    file = benchmark_file(stranger, name=f"Evil{STEERING}", prompt=f"[red]{STEERING}[/] {{prompt}}")
    ran = ia2("benchmarks", "show", file)
    assert printable(ran.out) == ran.out
    assert "[red]" in ran.out and "[/]" in ran.out


def test_a_stranger_s_tricks_work(stranger: Stranger) -> None:
    """Were they run, there would be a marker: else the tests above would show nothing."""
    stranger.pickles(stranger.root, "evil.bin")
    torch.load(stranger.root / "evil.bin", weights_only=False)
    assert stranger.marker.exists()
    stranger.marker.unlink()
    __import__(EVIL)
    assert stranger.marker.exists()


def test_a_pickle_that_an_index_names(stranger: Stranger, ia2: Command) -> None:
    """The index of safetensors files may name any file, which would be unpickled where it is none."""
    from safetensors.torch import load_file

    folder = stranger.root / "indexed"
    shutil.copytree(stranger.model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = stranger.run.parent / "rows.jsonl"
    line = ia2(
        "train", "--model", folder, "--data", rows, "--output-dir", "mine", "--recipe", "sft"
    ).refusal()
    assert "names 'weights.bin', no safetensors file" in line
