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
from helpers.command_line import TASK, Ia2, Ran, names, write_rows
from strangers import EVIL, FUNCTION, Stranger

from ia2.config import TrainConfig
from ia2.data.benchmarks import load_benchmark
from ia2.data.examples import Examples
from ia2.experiment.adapt import adapt, load_adapter
from ia2.experiment.sweep.grid import load_grid
from ia2.utils.errors import ConfigError, ModelError
from ia2.utils.logging import printable

STEERING = "a\x1b[2Jb\rc\x07d\x9b31me\u202ef\u2066g\u200fh\x7fi\u2028jl\x85"
TRUST, PARSER, CONTEXT = "--trust-remote-code", f"--parser {FUNCTION}", f"--context-function {FUNCTION}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Path:
    """A finished run that answers with free text, with its rows beside it."""
    root = tmp_path_factory.mktemp("trained")
    data = write_rows(root / "rows.jsonl", TASK.examples(12, seed=0))
    free = {"task": "generation", "max_answer_tokens": 2, "recipe": "sft", "sft": {"epochs": 1}}
    free["selection"] = "dev"
    config = TrainConfig(model=str(tiny_icl_model_path), data=str(data), **free)
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
    write_rows(tmp_path / "new.jsonl", TASK.examples(3, seed=5))
    return Stranger(tmp_path, trained, tiny_icl_model_path)


@pytest.fixture
def safely(stranger: Stranger, ia2: Ia2) -> Ia2:
    """``ia2``; whatever comes of it, no code was run."""

    def command(*arguments: Any) -> Ran:
        ran = ia2(*arguments)
        assert not stranger.marker.exists()
        return ran

    return command


def based_on(trick: str, **changes: Any) -> Callable[[Stranger], Path]:
    return lambda stranger: stranger.run_with(model=stranger.model_of(trick), **changes)


def tuned_with_code(stranger: Stranger) -> Path:
    peft = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 2,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "a",
        "tokenizer_name_or_path": stranger.model_of("tokenizer"),
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    return stranger.run_with(adapter={"peft": peft})


MEGATRON = {
    "peft_type": "LORA",
    "target_modules": ["q_proj"],
    "megatron_config": {"a": 1},
    "megatron_core": EVIL,
}

# What is wrong with a run folder, and what a command that would run it says.
RUNS: dict[str, tuple[Callable[[Stranger], Path], str]] = {
    "trust": (based_on("code", trust_remote_code=True), TRUST),
    "code": (based_on("code"), TRUST),
    "tokenizer": (based_on("tokenizer"), TRUST),
    "parser": (lambda stranger: stranger.run_with(parser=FUNCTION), PARSER),
    "pickled model": (based_on("pickle"), "A pickle is never read"),
    "kernel": (based_on("kernel"), "attn_implementation"),
    "embedded adapter": (based_on("adapter"), "an adapter lies beside the model"),
    "pickled adapter": (Stranger.pickled_adapter, "Run the same `ia2 train` again"),
    "tuning": (tuned_with_code, "its tokenizer brings code"),
    "megatron": (lambda stranger: stranger.run_with(adapter={"peft": MEGATRON}), "adapter"),
}


@pytest.mark.parametrize("trick", RUNS)
def test_a_run_folder(stranger: Stranger, safely: Ia2, trick: str) -> None:
    build, expected = RUNS[trick]
    folder = build(stranger)
    for command in (["predict", "--data", "new.jsonl", "--adapter"], ["analyze", "--parts", "activations"]):
        names(safely(*command, folder).refusal(), expected)
    for command in (["report"], ["doctor"]):  # what is only read may be shown
        ran = safely(*command, folder)
        assert ran.status == 0 or ran.refusal()
    if trick != "pickled adapter":
        line = safely("train", "--config", folder / "ia2_config.yaml", "--output-dir", "mine").refusal()
        names(line, expected)
        assert not Path("mine").exists()


def test_functions_in_a_run_folder(stranger: Stranger, safely: Ia2) -> None:
    """An adapter is shown no context, so predicting neither runs such a function nor needs it."""
    folder = stranger.run_with(context_function=FUNCTION)
    assert safely("predict", "--adapter", folder, "--data", "new.jsonl").status == 0
    names(safely("analyze", folder).refusal(), CONTEXT)
    names(safely("train", "--config", folder / "ia2_config.yaml").refusal(), CONTEXT)
    shutil.rmtree(folder)
    folder = stranger.run_with(task_parser=FUNCTION)
    line = safely("predict", "--adapter", folder, "--data", "new.jsonl").refusal()
    names(line, str(folder / "ia2_run.json"), PARSER)


def test_pickles_beside_a_run(stranger: Stranger, safely: Ia2) -> None:
    folder = stranger.run_with()
    pickles = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin")
    stranger.pickles(folder, *pickles, *(f"stages/checkpoint-1/{name}" for name in pickles))
    assert safely("predict", "--adapter", folder, "--data", "new.jsonl").status == 0
    for command in ("report", "doctor"):
        assert safely(command, folder).status == 0


def test_a_checkpoint_with_pickles(stranger: Stranger, safely: Ia2, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that somebody else began: training goes on from optimiser and random states on disk."""
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
        assert safely(*arguments).status == 130
    states = [file for ending in ("pt", "pth") for file in Path("half").rglob(f"checkpoint-*/*.{ending}")]
    assert len(states) == 3
    shutil.copytree("half", "whole")
    for file in states:
        shutil.rmtree("half")
        shutil.copytree("whole", "half")
        stranger.pickles(file.parent, file.name)
        record_tree(file.parent, file.parent)  # strangers know how to make a manifest fit
        names(safely(*arguments).refusal(), str(file.parent), "Delete it")


def test_an_index_that_names_a_pickle(stranger: Stranger, safely: Ia2) -> None:
    """The index of safetensors files may name any file, which would be unpickled where it is none."""
    from safetensors.torch import load_file

    shutil.copytree(stranger.model, "indexed")
    tensors = load_file("indexed/model.safetensors")
    Path("indexed/model.safetensors").unlink()
    torch.save(tensors, "indexed/weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.bin")}
    Path("indexed/model.safetensors.index.json").write_text(json.dumps(index))
    line = safely("train", "--model", "indexed", "--data", "new.jsonl", "--output-dir", "mine").refusal()
    names(line, "names 'weights.bin', no safetensors file")


def test_a_kernel_for_a_part_of_a_model(tmp_path: Path) -> None:
    from transformers import Gemma3Config

    from ia2.models.load import load_base

    config = {**Gemma3Config().to_dict(), "attn_implementation": {"text_config": "evil/kernel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"names evil/kernel.* Remove the key attn_implementation"):
        load_base(str(tmp_path), device="cpu")


def test_data_with_a_script_and_yaml_that_makes_objects(stranger: Stranger, safely: Ia2) -> None:
    Path("scripted").mkdir()
    Path("scripted/scripted.py").write_text(stranger.code)
    Path("scripted/dataset_infos.json").write_text("{}")
    names(safely("predict", "--adapter", stranger.run, "--data", "scripted").refusal(), "scripted")
    Path("evil.yaml").write_text(f"model: !!python/object/apply:{EVIL}.run []\n")
    for command in (["train", "--config"], ["sweep"], ["benchmarks", "show"]):
        names(safely(*command, "evil.yaml").refusal(), "evil.yaml: not YAML")


# ---------------------------------------------------------------------------- benchmarks and grids


def benchmark_file(stranger: Stranger, file_name: str = "evil.yaml", **changes: Any) -> Path:
    (stranger.root / "rows").mkdir(exist_ok=True)
    for split in ("train", "test"):
        write_rows(stranger.root / "rows" / f"{split}.jsonl", TASK.examples(12, seed=len(split)))
    parts = {"test": {"split": "test", "rows": 2}, "pool": {"split": "train", "rows": 8}}
    entry = {
        "name": "Evil",
        "path": "rows",
        **parts,
        "prompt": "{prompt}",
        "answer": "{completion}",
        **changes,
    }
    file = stranger.root / file_name
    file.write_text(yaml.safe_dump(entry))
    return file


def grid_file(stranger: Stranger, **changes: Any) -> Path:
    grid = {"benchmarks": ["evil.yaml"], "models": [str(stranger.model)], "recipes": ["base"], **changes}
    file = stranger.root / "grid.yaml"
    file.write_text(yaml.safe_dump(grid))
    return file


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trust_remote_code": True}, TRUST),
        ({"settings": {"parser": FUNCTION}}, PARSER),
        ({"parts": [{"settings": {"context_function": FUNCTION}}]}, CONTEXT),
        ({"axes": {"parser": ["hash", FUNCTION]}}, PARSER),
        ({"variants": {"a": {"context_function": FUNCTION}}}, CONTEXT),
    ],
    ids=str,
)
def test_a_grid(stranger: Stranger, safely: Ia2, changes: dict[str, Any], expected: str) -> None:
    benchmark_file(stranger)
    file = grid_file(stranger, **changes)
    for options in ([], ["--dry-run"]):
        names(safely("sweep", file, *options, "--output-dir", "mine").refusal(), str(file), expected)
    assert not Path("mine").exists()


def test_a_benchmark(stranger: Stranger, safely: Ia2) -> None:
    file = benchmark_file(stranger, "coded.yaml", name="Coded", parser=FUNCTION)
    named = (str(file), PARSER)
    for command in ("show", "prepare"):
        names(safely("benchmarks", command, file).refusal(), *named)
    analyze = ["analyze", stranger.run, "--parts", "effects", "--benchmarks", file]
    names(safely(*analyze).refusal(), *named)
    benchmark_file(stranger, ood=["coded.yaml"])
    for benchmarks in (["coded.yaml"], ["evil.yaml"]):
        grid = grid_file(stranger, benchmarks=benchmarks)
        names(safely("sweep", grid, "--output-dir", "mine").refusal(), "coded.yaml", PARSER)


# ------------------------------------------------------------------------ what the user names, runs


def test_what_the_command_names_runs(stranger: Stranger, ia2: Ia2, capsys: Any) -> None:
    """The flags that the errors suggest are accepted, and do what the file asked for."""
    model = stranger.model_of("code", known=True)
    folder = stranger.run_with(model=model, trust_remote_code=True, parser=FUNCTION, task_parser=FUNCTION)
    predict = ["predict", "--adapter", folder, "--data", "new.jsonl"]
    named: list[str] = []
    for flag in (TRUST, PARSER):
        names(ia2(*predict, *named).refusal(), f"give {flag} in this command")
        named += flag.split()
    ran = ia2(*predict, *named)
    assert stranger.marker.exists()
    assert [json.loads(line)["label"] for line in ran.out.splitlines()] == ["a"] * 3
    seen = ["--parts", "activations", "--output-dir", "seen"]
    assert ia2("analyze", folder, *named, *seen).status == 0
    train = ["train", "--config", stranger.run / "ia2_config.yaml", "--output-dir", "mine"]
    # a run says what to give again
    assert f"--data new.jsonl {PARSER}\n" in ia2(*train, *PARSER.split()).out


def test_what_python_names_runs(stranger: Stranger) -> None:
    folder = stranger.run_with(parser=FUNCTION)
    with pytest.raises(ConfigError, match="--parser"):
        load_adapter(folder)
    assert load_adapter(folder, code={"parser": FUNCTION})[0].config.parser == FUNCTION
    assert load_adapter(folder, code={"parser": "hash"})[0].task.parser == "hash"


def test_flags_that_benchmarks_and_grids_need(stranger: Stranger, ia2: Ia2) -> None:
    # values that are no code need none
    load_grid(grid_file(stranger, settings={"parser": "hash"}, trust_remote_code=False))
    assert load_benchmark(benchmark_file(stranger, parser="hash")).parser == "hash"
    file = benchmark_file(stranger, parser=FUNCTION)
    assert ia2("benchmarks", "show", file, *PARSER.split()).status == 0
    grid = grid_file(stranger, trust_remote_code=True)
    ran = ia2("sweep", grid, "--output-dir", "mine", TRUST, *PARSER.split())
    assert ran.status == 0 and "1 of 1 cells are done" in ran.out


# ------------------------------------------------------------------------------ templates and names


def test_a_template_of_a_stranger(stranger: Stranger, safely: Ia2) -> None:
    model = stranger.model_of("template")
    (Path(model) / "chat_template.jinja").write_text("{{ 'a' * 10**10 }}")
    train = ["train", "--model", model, "--data", stranger.run.parent / "rows.jsonl", "--recipe", "sft"]
    line = safely(*train, "--chat", "turns", "--output-dir", "mine").refusal()
    names(line, "chat template takes more than 512 MB")
    folder = stranger.run_with(model=model, chat="turns")
    names(safely("predict", "--adapter", folder, "--data", "new.jsonl").refusal(), "chat template takes")


def test_texts_steer_no_terminal(stranger: Stranger, ia2: Ia2, capsys: Any) -> None:
    line = ia2("predict", "--adapter", stranger.run, "--data", f"{STEERING}.jsonl").refusal()
    assert line == printable(line) and "a[2Jb cd31mefghi jl .jsonl" in line
    write_rows(Path("new.jsonl"), [(STEERING, "b")])
    for options in ([], ["--json"]):
        ran = ia2("predict", "--adapter", stranger.run, "--data", "new.jsonl", *options)
        (row,) = ran.json if options else [ran.json]
        assert printable(ran.out) == ran.out and row["query"] == STEERING
    file = benchmark_file(stranger, name=f"Evil{STEERING}", prompt=f"[red]{STEERING}[/] {{prompt}}")
    ran = ia2("benchmarks", "show", file)
    assert printable(ran.out) == ran.out and "[red]" in ran.out and "[/]" in ran.out


def test_a_stranger_s_tricks_work(stranger: Stranger) -> None:
    """Were they run, there would be a marker: else the tests above would show nothing."""
    stranger.pickles(stranger.root, "evil.bin")
    torch.load(stranger.root / "evil.bin", weights_only=False)
    assert stranger.marker.exists()
    stranger.marker.unlink()
    __import__(EVIL)
    assert stranger.marker.exists()
