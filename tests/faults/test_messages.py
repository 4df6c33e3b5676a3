"""What goes wrong for users is one line that names the place and the way out, and leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Ran, run, run_apart, tree, write_rows
from tiny_icl.tasks import sample_task

from ia2.utils.locks import LOCK

TASK = sample_task(0, num_classes=3)
FAST = ["--align-epochs", 1, "--sft-epochs", 1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_icl_model_path: Path) -> Path:
    """A working folder with labelled rows (rows.jsonl) and the small model (model)."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", TASK.examples(12, seed=0))
    (tmp_path / "model").symlink_to(tiny_icl_model_path)
    return tmp_path


Command = Callable[..., Ran]


@pytest.fixture
def ia2(here: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """``ia2``, without its log lines where the command has any."""

    def command(*arguments: Any) -> Ran:
        logs = bool(arguments) and arguments[0] in ("train", "compare", "probe", "predict", "eval")
        return run(capsys, *arguments, *(["--quiet"] if logs and "-h" not in arguments else []))

    return command


@pytest.fixture
def train(here: Path, ia2: Command) -> Command:
    """``ia2 train`` on the small model into ``out``; later options win."""

    def command(*options: Any, data: str = "rows.jsonl") -> Ran:
        return ia2("train", "--model", "model", "--data", data, "--output-dir", "out", *FAST, *options)

    return command


@pytest.fixture
def refused(here: Path, train: Command) -> Callable[..., str]:
    """``ia2 train`` is refused and leaves no trace; gives its line."""

    def command(*options: Any, data: str = "rows.jsonl") -> str:
        before = tree(here)
        line = train(*options, data=data).refusal()
        assert tree(here) == before
        assert not (here / "out").exists()
        return line

    return command


Refused = Callable[..., str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Path:
    """A finished run."""
    from ia2.cli import main

    folder = tmp_path_factory.mktemp("finished")
    rows = write_rows(folder / "rows.jsonl", TASK.examples(12, seed=0))
    arguments = [
        "train",
        "--model",
        tiny_icl_model_path,
        "--data",
        rows,
        "--output-dir",
        folder / "out",
        *FAST,
        *("--recipe", "sft", "--quiet"),
    ]
    main([str(argument) for argument in arguments])
    return folder / "out"


# ------------------------------------------------------------------------------------------ rows


def test_missing_file(refused: Refused) -> None:
    line = refused(data="rws.jsonl")
    assert "rws.jsonl: no such file" in line
    assert "Did you mean 'rows.jsonl'?" in line


def test_no_data_and_no_output_folder(ia2: Command) -> None:
    assert "--data" in ia2("train", "--model", "model", "--output-dir", "out").refusal()
    assert "--output-dir" in ia2("train", "--model", "model", "--data", "rows.jsonl").refusal()
    assert "--output-dir" in ia2("compare", "--model", "model", "--data", "rows.jsonl").refusal()


def test_empty_file(refused: Refused, here: Path) -> None:
    (here / "none.jsonl").write_text("")
    assert "none.jsonl is empty" in refused(data="none.jsonl")


def test_every_bad_row_is_named_at_once(refused: Refused, here: Path) -> None:
    rows = [*TASK.examples(3, seed=1), {"prompt": "a0"}, ("a1", " L1"), {"prompt": "", "completion": " L1"}]
    path = write_rows(here / "bad.jsonl", rows)
    path.write_text(path.read_text() + "{oops\n")
    line = refused(data="bad.jsonl")
    assert "3 bad rows" in line
    assert "bad.jsonl:4: no column 'completion'" in line
    assert "bad.jsonl:6: empty prompt" in line
    assert "bad.jsonl:7: invalid JSON" in line


def test_a_template_names_a_column_that_is_not_there(refused: Refused) -> None:
    line = refused("--prompt-template", r"Text: {promt}\nLabel:")
    assert "'promt'" in line
    assert "Did you mean 'prompt'?" in line


def test_more_examples_than_rows(refused: Refused) -> None:
    line = refused("--num-examples", 30)
    assert "asked for 30 examples, the data has 12 rows" in line
    assert "ask for at most 8" in line


@pytest.mark.parametrize(
    ("map_", "expected"),
    [("L1=a", "not in the label map"), ("nonsense", "0=negative"), ("{oops", "JSON object")],
)
def test_label_map(refused: Refused, map_: str, expected: str) -> None:
    assert expected in refused("--label-map", map_)


def test_a_split_that_a_folder_lacks(refused: Refused, here: Path) -> None:
    import datasets

    # commands switch bars off by the environment, which is too late where tqdm has been imported before
    datasets.disable_progress_bars()
    (here / "set").mkdir()
    write_rows(here / "set" / "train.jsonl", TASK.examples(6, seed=0))
    line = refused("--split", "tset", data="set")
    assert "no split 'tset'" in line
    assert "'train'" in line


def test_a_split_of_a_file(refused: Refused) -> None:
    assert "single file" in refused("--split", "train")


def test_a_data_set_of_the_hub_without_network(refused: Refused) -> None:
    line = refused(data="owner/rows")
    assert line.startswith("owner/rows: ")
    assert "local file" in line


# --------------------------------------------------------------------------------------- prompts


@pytest.fixture
def long_rows(here: Path) -> str:
    """Rows of which the eighth has 600 tokens; the window holds 512."""
    rows = TASK.examples(12, seed=0)
    rows[7] = (" ".join(["z0"] * 600), rows[7][1])
    write_rows(here / "long.jsonl", rows)
    return "long.jsonl"


@pytest.mark.parametrize("recipe", ["sft", "ia2", "ia2-sft"])
def test_train_on_a_prompt_that_is_too_long(refused: Refused, long_rows: str, recipe: str) -> None:
    line = refused("--recipe", recipe, data=long_rows)
    assert "long.jsonl:8: the prompt has 601 tokens" in line
    assert "512" in line


def test_test_data_with_a_prompt_that_is_too_long(refused: Refused, long_rows: str) -> None:
    assert "long.jsonl:8: the prompt has 601 tokens" in refused("--test-data", long_rows)


def test_overwrite_deletes_nothing_before_the_rows_are_known_to_be_good(
    here: Path, train: Command, finished: Path, long_rows: str
) -> None:
    shutil.copytree(finished, here / "out")
    before = tree(here / "out")
    assert "601 tokens" in train("--overwrite", data=long_rows).refusal()
    assert tree(here / "out") == before


@pytest.mark.parametrize("recipes", ["base,icl", "sft", "ia2-sft", "base"])
def test_compare_a_prompt_that_is_too_long(ia2: Command, here: Path, long_rows: str, recipes: str) -> None:
    options = ["--model", "model", "--output-dir", "out", "--recipes", recipes, *FAST]
    line = ia2("compare", "--data", long_rows, *options).refusal()
    assert "long.jsonl:8: the prompt has 601 tokens" in line
    line = ia2("compare", "--data", "rows.jsonl", "--test-data", long_rows, *options).refusal()
    assert "long.jsonl:8: the prompt has 601 tokens" in line
    assert not (here / "out").exists()


def test_probe_a_prompt_that_is_too_long(ia2: Command, long_rows: str) -> None:
    line = ia2("probe", "--model", "model", "--data", long_rows).refusal()
    assert "long.jsonl:8: the prompt has 601 tokens" in line


def test_predict_and_eval_a_prompt_that_is_too_long(
    ia2: Command, here: Path, finished: Path, long_rows: str
) -> None:
    for command in ("predict", "eval"):
        line = ia2(command, "--adapter", finished, "--data", long_rows, "--output", "found.jsonl").refusal()
        assert "long.jsonl:8: the prompt has 601 tokens" in line
        assert not (here / "found.jsonl").exists()


def test_demonstrations_that_do_not_fit(refused: Refused) -> None:
    line = refused("--max-context-tokens", 9)
    assert "no demonstration fits" in line
    assert "rows.jsonl:" in line


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("seeed: 1", ["unknown key 'seeed'", "Did you mean 'seed'?"]),
        ("align: {epoch: 3}", ["unknown key 'align.epoch'", "Did you mean 'epochs'?"]),
        ("adapter: {rank: 0}", ["adapter.rank", "greater than or equal to 1"]),
        ("batch_size: many", ["batch_size", "integer"]),
        ("align: 3", ["align"]),
        ("- 1", ["expected keys and values"]),
        ("a: [", ["not YAML"]),
        ("{seed: -1, batch_size: 0}", ["seed", "batch_size"]),
    ],
)
def test_config_file(refused: Refused, here: Path, yaml: str, expected: list[str]) -> None:
    (here / "settings.yaml").write_text(yaml)
    line = refused("--config", "settings.yaml")
    assert line.startswith("settings.yaml: ")
    for text in expected:
        assert text in line


def test_missing_config_file(refused: Refused) -> None:
    assert "settings.yaml: no such file" in refused("--config", "settings.yaml")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--lerning-rates", "1"], ["--lerning-rates", "Did you mean '--learning-rates'?"]),
        (["--adapter-rank", "x"], ["--adapter-rank", "integer"]),
        (["--adapter-rank", "0"], ["adapter.rank", "greater than or equal to 1"]),
        (["--targets", "disk"], ["targets", "'store'"]),
        (["--learning-rates", "0"], ["learning_rates.0", "greater than 0"]),
        (["--learning-rates", "1e-3", "-1e-3"], ["learning_rates.1", "greater than 0"]),
        (["--learning-rates", "x"], ["learning_rates", "number"]),
        (["--recipe", "ia2sft"], ["'ia2sft'", "Did you mean 'ia2-sft'?"]),
        (["--recipe", "icl"], ["'icl' trains nothing", "sft, ia2, ia2-sft"]),
        (["--batch-size", "4", "--micro-batch-size", "3"], ["3 does not divide batch_size 4"]),
        (["--device", "gpu"], ["device 'gpu'", "--device cpu"]),
        (["--device", "cuda:63"], ["device 'cuda:63'", "--device cpu"]),
        (["--adapter-type", "lora2"], ["'lora2' is not one of lora, rslora", "Did you mean 'lora'?"]),
        (["--adapter-target-modules", "qq_proj"], ["qq_proj"]),
        (["--adapter-peft", '{"r": 1}'], ["peft_type"]),
        (["--attention-modules", "*.nothing"], ["'*.nothing' matches no module"]),
        (["--activation-checkpointing-kwargs", '{"use_reentrant": true}'], ["use_reentrant"]),
        (["--parser", "hsah"], ["'hsah'", "Did you mean 'hash'?"]),
        (["--parser", "no_such_module:f"], ["cannot import 'no_such_module'"]),
        (["--targets", "online", "--context-draws", "2"], ["permutation_targets to sample"]),
        (["--labels", "L1,L2", "--task", "generation"], ["labels are given, but task is generation"]),
        (["surplus"], ["surplus"]),
    ],
)
def test_options(refused: Refused, options: list[str], expected: list[str]) -> None:
    line = refused(*options)
    for text in expected:
        assert text in line


def test_reentrant_checkpointing_in_a_file(refused: Refused, here: Path) -> None:
    (here / "s.yaml").write_text("activation_checkpointing_kwargs: {use_reentrant: true}")
    assert "use_reentrant=True is not possible" in refused("--config", "s.yaml")


def test_unknown_recipe_or_too_few_folds_to_compare(ia2: Command, here: Path) -> None:
    common = ["compare", "--model", "model", "--data", "rows.jsonl", "--output-dir", "out"]
    assert "Did you mean 'ia2-sft'?" in ia2(*common, "--recipes", "base,ia2sft").refusal()
    assert "named twice" in ia2(*common, "--recipes", "base,base").refusal()
    assert "folds" in ia2(*common, "--folds", 1).refusal()
    assert "13 folds need at least 13 rows" in ia2(*common, "--folds", 13).refusal()
    assert "max_test" in ia2(*common, "--max-test", 3).refusal()
    assert not (here / "out").exists()


def test_unknown_command_in_a_process_of_its_own() -> None:
    line = run_apart("trian").refusal()
    assert "'trian'" in line
    assert "Did you mean 'train'?" in line


def test_missing_option(ia2: Command) -> None:
    assert "--adapter" in ia2("predict", "--data", "rows.jsonl").refusal()
    assert "--data" in ia2("eval", "--adapter", "out").refusal()


def test_help_and_version_are_no_mistakes(ia2: Command) -> None:
    from ia2 import __version__

    assert ia2("--version") == Ran(0, f"{__version__}\n", "")
    for arguments in ([], ["--help"], ["train", "-h"]):
        ran = ia2(*arguments)
        assert (ran.status, ran.err) == (0, "")
        assert "Usage" in ran.out


# ----------------------------------------------------------------------------------------- model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("owner/name", ["'owner/name'", "neither as a local folder or .gguf file nor on the hub"]),
        ("./nothing", ["./nothing: no such file or folder"]),
        ("nothing.gguf", ["nothing.gguf: no such file"]),
        ("rows.jsonl", ["not a .jsonl file"]),
        ("empty", ["no config.json"]),
        ("broken", ["broken"]),
        ("dmeo", ["'dmeo' is unknown", "Did you mean 'demo'?"]),
    ],
)
def test_model(refused: Refused, here: Path, model: str, expected: list[str]) -> None:
    (here / "empty").mkdir()
    (here / "broken").mkdir()
    (here / "broken" / "config.json").write_text("{}")
    line = refused("--model", model)
    for text in expected:
        assert text in line


def test_damaged_weights(refused: Refused, here: Path, tiny_icl_model_path: Path) -> None:
    shutil.copytree(tiny_icl_model_path, here / "damaged")
    (here / "damaged" / "model.safetensors").write_bytes(b"oops")
    assert "damaged" in refused("--model", "damaged")


def test_unknown_model_in_a_process_of_its_own(here: Path) -> None:
    ran = run_apart("train", "--model", "owner/name", "--data", "rows.jsonl", "--output-dir", "out")
    assert "'owner/name'" in ran.refusal()
    assert not (here / "out").exists()


# ---------------------------------------------------------------------------------------- labels


def test_a_label_of_the_test_data_that_training_has_not(refused: Refused, here: Path) -> None:
    write_rows(here / "test.jsonl", [*TASK.examples(3, seed=1), ("a0", " other")])
    line = refused("--test-data", "test.jsonl")
    assert "test.jsonl:4: the completion ' other' is not one of the labels" in line


def test_a_row_with_a_label_that_is_not_in_the_set(refused: Refused) -> None:
    line = refused("--labels", '[" L1", " none"]')
    assert "rows.jsonl:" in line
    assert "is not one of the labels" in line


def test_eval_rows_with_another_label(ia2: Command, here: Path, finished: Path) -> None:
    write_rows(here / "test.jsonl", [*TASK.examples(3, seed=1), ("a0", " other")])
    line = ia2("eval", "--adapter", finished, "--data", "test.jsonl", "--output", "found.jsonl").refusal()
    assert "test.jsonl:4: the completion ' other' is not one of the labels" in line
    assert not (here / "found.jsonl").exists()


def test_a_label_of_several_tokens_where_one_was_declared(refused: Refused, here: Path) -> None:
    rows = [(q, " L1 L2" if i % 2 else " L3") for i, (q, _) in enumerate(TASK.examples(8, 0))]
    write_rows(here / "two.jsonl", rows)
    line = refused("--max-answer-tokens", 1, data="two.jsonl")
    assert "max_answer_tokens is 1, but the label ' L1 L2' has 2 tokens" in line
    assert "--label-map" in line


def test_all_rows_of_one_label(refused: Refused, here: Path) -> None:
    write_rows(here / "same.jsonl", [(q, " L1") for q, _ in TASK.examples(8, 0)])
    assert "all rows have the completion ' L1'" in refused(data="same.jsonl")


def test_labels_that_are_the_same_tokens(refused: Refused, here: Path) -> None:
    rows = [(q, (" ja", " nein")[i % 2]) for i, (q, _) in enumerate(TASK.examples(8, 0))]
    write_rows(here / "unknown.jsonl", rows)
    line = refused(data="unknown.jsonl")
    assert "[' ja', ' nein'] are the same tokens" in line


def test_an_answer_longer_than_allowed(refused: Refused, here: Path) -> None:
    rows = [(q, " L1" + f" z{i}" * i) for i, (q, _) in enumerate(TASK.examples(10, 0))]
    write_rows(here / "free.jsonl", rows)
    line = refused("--task", "generation", "--max-answer-tokens", 5, data="free.jsonl")
    assert "free.jsonl:6: the completion has 6 tokens" in line
    assert "free.jsonl:10:" in line


def test_a_limit_of_answers_that_leaves_no_window(refused: Refused) -> None:
    """To shorten the row, which has five tokens, would not have helped."""
    line = refused("--max-answer-tokens", 100_000)
    assert "lower max_answer_tokens" in line


def test_rows_of_other_columns_for_a_finished_run(ia2: Command, here: Path, finished: Path) -> None:
    """``--prompt-template`` was suggested, which only commands that train have."""
    write_rows(here / "other.jsonl", [{"text": q, "label": a} for q, a in TASK.examples(4, 0)])
    for command in ("predict", "eval"):
        line = ia2(command, "--adapter", finished, "--data", "other.jsonl").refusal()
        assert "names the column 'prompt'; there are 'text', 'label'" in line
        assert "--prompt-template" not in line
    line = ia2("analyze", finished, "--data", "other.jsonl").refusal()
    assert "--prompt-template" not in line


# --------------------------------------------------------------------------------- output folder


def test_a_folder_that_holds_another_run(here: Path, train: Command, finished: Path) -> None:
    shutil.copytree(finished, here / "out")
    before = tree(here / "out")
    line = train("--seed", 1).refusal()
    assert "out holds another run" in line
    assert "seed" in line
    assert "--overwrite" in line
    write_rows(here / "other.jsonl", TASK.examples(12, seed=5))
    line = train("--model", "model", data="other.jsonl").refusal()
    assert "data of train" in line
    assert tree(here / "out") == before


def test_a_folder_in_which_nothing_was_computed_may_be_another_run_s(
    here: Path, train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ia2.teacher.teacher.Teacher.to_store", _full)
        assert "no space left" in train("--seed", 1).refusal()
    assert sorted(tree(here / "out")) == ["ia2_config.yaml", "ia2_run.json"]
    assert train("--seed", 2).status == 0
    assert "seed: 2" in (here / "out" / "ia2_config.yaml").read_text()


def test_compare_into_the_folder_of_a_training_run(ia2: Command, here: Path, finished: Path) -> None:
    shutil.copytree(finished, here / "out")
    before = tree(here / "out")
    line = ia2("compare", "--model", "model", "--data", "rows.jsonl", "--output-dir", "out", *FAST).refusal()
    assert "the command" in line
    assert tree(here / "out") == before


def test_a_folder_with_files_that_are_not_ours(here: Path, train: Command) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("mine")
    for options in ([], ["--overwrite"]):
        line = train(*options).refusal()
        assert "out is not empty and holds no ia2 run (thesis.tex …)" in line
        assert tree(here / "out") == {"thesis.tex": b"mine"}


def test_an_output_folder_that_is_a_file(here: Path, train: Command) -> None:
    (here / "out").write_text("mine")
    assert "out is a file" in train().refusal()
    assert "out/run" in train("--output-dir", "out/run").refusal()
    assert (here / "out").read_text() == "mine"


def test_predictions_into_a_file_of_another_kind(ia2: Command, finished: Path) -> None:
    line = ia2("predict", "--adapter", finished, "--data", "rows.jsonl", "--output", "x.txt").refusal()
    assert ".jsonl or a .csv" in line


def test_an_adapter_that_is_none(ia2: Command, here: Path) -> None:
    for command in ("predict", "eval"):
        assert (
            "nowhere: no ia2 run there"
            in ia2(command, "--adapter", "nowhere", "--data", "rows.jsonl").refusal()
        )


@pytest.mark.parametrize("missing", ["metrics.json", "adapter_model.safetensors", "ia2_run.json"])
def test_an_adapter_that_is_not_finished(ia2: Command, here: Path, finished: Path, missing: str) -> None:
    shutil.copytree(finished, here / "out")
    (here / "out" / missing).unlink()
    line = ia2("predict", "--adapter", "out", "--data", "rows.jsonl").refusal()
    assert line.startswith("out: ")


def test_a_run_file_that_is_damaged(ia2: Command, here: Path, train: Command, finished: Path) -> None:
    shutil.copytree(finished, here / "out")
    (here / "out" / "ia2_run.json").write_text("{")
    assert "ia2_run.json" in ia2("predict", "--adapter", "out", "--data", "rows.jsonl").refusal()
    assert "ia2_run.json" in train().refusal()


# ------------------------------------------------------------------------------------- full disk


def _full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_space_for_the_first_file(train: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fdopen", _full)
    line = train().refusal()
    assert "no space left" in line
    assert "out" in line
    assert [path.name for path in (here / "out").rglob("*")] == [LOCK]


def test_no_space_for_a_stage(train: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.save_pretrained", _full)
        line = train().refusal()
    assert "no space left" in line
    assert "align/lr-0.001" in line
    assert not (here / "out" / "align" / "lr-0.001").exists()
    # and with space it goes on
    assert train().status == 0
    assert (here / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "said",
    [
        # safetensors, then torch.save, on a full disk; neither raises an OSError
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "[enforce fail at inline_container.cc:672] . unexpected pos 140160 vs 140052",
    ],
)
def test_no_space_for_a_checkpoint(
    train: Command, here: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError(said)

    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer._save_checkpoint", full)
        line = train("--checkpoint-every", 1).refusal()
    assert "align/lr-0.001: no space left" in line
    assert "run the same command again" in line
    assert train("--checkpoint-every", 1).status == 0


def test_no_space_for_predictions(
    ia2: Command, here: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fdopen", _full)
    arguments = ["predict", "--adapter", finished, "--data", "rows.jsonl", "--output", "found.csv"]
    assert "found.csv: no space left" in ia2(*arguments).refusal()
    assert not list(here.glob("*found.csv*"))


def test_a_folder_that_may_not_be_written(
    train: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", forbidden)
    line = train().refusal()
    assert "not writable (Permission denied)" in line
    assert "Choose another folder" in line


# ----------------------------------------------------------------------------- quiet and success


def test_quiet_says_nothing_and_json_is_one_document(train: Command, here: Path) -> None:
    ran = train("--json")
    assert (ran.status, ran.err) == (0, "")
    assert ran.json["output_dir"] == "out"
    # the same command again trains nothing and says the same
    again = train("--json")
    assert (again.status, again.err) == (0, "")
    assert again.json == ran.json
    assert json.loads((here / "out" / "metrics.json").read_text()) == {
        k: v for k, v in ran.json.items() if k != "output_dir"
    }


def test_quiet_and_json_in_a_process_of_its_own(here: Path, finished: Path) -> None:
    ran = run_apart("predict", "--adapter", finished, "--data", "rows.jsonl", "--json", "--quiet")
    assert (ran.status, ran.err) == (0, "")
    assert len(ran.json) == 12


def test_a_folder_of_several_configurations_for_a_finished_run(
    ia2: Command, here: Path, finished: Path
) -> None:
    """`eval` and `predict` asked for a configuration, and had no option to name one."""
    for name in ("one", "two"):
        (here / "many" / name).mkdir(parents=True)
        write_rows(here / "many" / name / "test.jsonl", TASK.examples(4 if name == "one" else 6, 0))
    (here / "many" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/test.jsonl\n"
        "- config_name: two\n  data_files: two/test.jsonl\n---\n"
    )
    for command in ("predict", "eval"):
        given = (command, "--adapter", finished, "--data", "many", "--json")
        assert "say which configuration to read" in ia2(*given).refusal()
        ran = ia2(*given, "--data-config", "two")
        assert ran.status == 0
        assert (len(ran.json) if command == "predict" else ran.json["test"]["n"]) == 6


def test_an_interrupt_while_commands_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "ia2.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "ia2.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    from ia2.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert gc.isenabled()  # for whoever called


def test_what_cannot_be_checked_is_said_once_by_every_command_that_uses_an_adapter(
    ia2: Command, here: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, here / "copied")
    (here / "copied" / "ia2_manifest.jsonl").unlink()
    for arguments in (
        ("predict", "--adapter", "copied", "--data", "rows.jsonl"),
        ("eval", "--adapter", "copied", "--data", "rows.jsonl"),
        ("analyze", "copied", "--parts", "weights", "--output-dir", "found"),
    ):
        ran = run(capsys, *arguments, "--quiet")
        assert ran.status == 0 and ran.err.count("cannot be checked for damage") == 1, ran
