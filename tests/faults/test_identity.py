"""A base model is known by its content, and so are rows: paths and names are not what is compared."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import word_examples
from helpers.command_line import Ran, listed, run, tree, write_rows
from helpers.families import llama
from helpers.gguf_files import write_gguf
from helpers.words import make_word_tokenizer
from safetensors import safe_open
from tiny_icl.tasks import sample_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from ia2.config import AdaptConfig
from ia2.data.examples import Example, Examples
from ia2.experiment.adapt import adapt, load_adapter
from ia2.models import identity
from ia2.models.load import BaseModel, load_base, resolve
from ia2.utils import manifest
from ia2.utils.errors import ModelError

TASK = sample_task(0, num_classes=3)
ROWS = TASK.examples(12, seed=0)
EXAMPLES = Examples([Example(*row, "rows") for row in ROWS])
FAST = ["--align-epochs", 1, "--sft-epochs", 1, "--device", "cpu", "--quiet"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("IA2_CACHE_DIR", str(cache))
    return cache


def lay_out(project: Path, model: Path) -> Path:
    """A project folder with its own model, rows and the text of a context."""
    project.mkdir(parents=True)
    shutil.copytree(model, project / "model")
    write_rows(project / "rows.jsonl", ROWS)
    write_rows(project / "new.jsonl", TASK.examples(6, seed=1))
    (project / "context.txt").write_text("be brief\n")
    return project


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Path:
    """A project with a run in ``out``, trained with relative paths; no test may change it."""
    from ia2.cli import main

    project = lay_out(tmp_path_factory.mktemp("trained") / "project", tiny_icl_model_path)
    before = Path.cwd()
    os.chdir(project)
    try:
        main(listed(train_command(Path())))
    finally:
        os.chdir(before)
    return project


def train_command(project: Path, *options: Any, command: str = "train") -> list[Any]:
    paths = ["--model", project / "model", "--data", project / "rows.jsonl", "--output-dir", project / "out"]
    return [command, *paths, "--test-data", project / "new.jsonl", *FAST, *options]


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trained project at a place of its own: as it was trained in, for all that its files say."""
    here = tmp_path / "here"
    shutil.copytree(trained, here)
    for file in ("ia2_run.json", "ia2_config.yaml", "adapter_config.json"):
        path = here / "out" / file
        path.write_text(path.read_text().replace(str(trained.resolve()), str(here.resolve())))
        manifest.record(here / "out", {file: manifest.sha256(path)})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return here


Ia2 = Callable[..., Ran]


@pytest.fixture
def ia2(capsys: pytest.CaptureFixture[str]) -> Ia2:
    def command(*arguments: Any) -> Ran:
        return run(capsys, *arguments)

    return command


@pytest.fixture
def predict(project: Path, ia2: Ia2) -> Ia2:
    def command(*options: Any, folder: Path | None = None) -> Ran:
        data = (folder or project) / "new.jsonl"
        return ia2("predict", "--adapter", (folder or project) / "out", "--data", data, "--quiet", *options)

    return command


def change_weight(model: Path, restore_times: bool = False) -> None:
    """Flip a bit of one value in the middle of the largest tensor; the file's size stays."""
    file = model / "model.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    begin, end = max(
        (e["data_offsets"] for n, e in header.items() if n != "__metadata__"), key=lambda o: o[1] - o[0]
    )
    content[8 + length + (begin + end) // 8 * 4 + 2] ^= 0x10
    with file.open("r+b") as handle:  # the same inode
        handle.write(content)
    if restore_times:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# --------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("command", ["predict", "eval", "analyze"])
def test_changed_weights_are_noticed(command: str, project: Path, ia2: Ia2) -> None:
    change_weight(project / "model")
    arguments = ["--adapter", project / "out", "--data", project / "new.jsonl", "--quiet"]
    if command == "analyze":
        arguments = [project / "out", "--parts", "weights", "--quiet"]
    line = ia2(command, *arguments).refusal()
    assert line == (
        f"{(project / 'model').resolve()} is not the base model that {project / 'out'} was trained on; these "
        "differ: weights. Say with --model where that one lies now."
    )


def test_what_differs_is_said(project: Path, predict: Ia2, tmp_path: Path) -> None:
    other = tmp_path / "other"

    def differing(change: Callable[[], Any]) -> str:
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(project / "model", other)
        change()
        line = predict("--model", other).refusal()
        # both are named
        assert line.startswith(f"{other} is not the base model that {project / 'out'} was trained on, ")
        assert str(project / "model") in line
        return line.split("these differ: ")[1].split(". ")[0]

    assert differing(lambda: change_weight(other)) == "weights"
    assert differing(lambda: change_json(other / "config.json", rms_norm_eps=1e-4)) == "config"
    assert differing(lambda: change_json(other / "generation_config.json", eos_token_id=5)) == "config"
    assert differing(lambda: change_json(other / "tokenizer_config.json", eos_token="<pad>")) == "tokenizer"
    assert differing(lambda: (other / "chat_template.jinja").write_text("{{ messages }}")) == "tokenizer"
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] = dict(zip(words["model"]["vocab"], range(10**4), strict=False))
    swapped = list(words["model"]["vocab"].items())
    (a, i), (b, j) = swapped[10], swapped[11]
    words["model"]["vocab"] |= {a: j, b: i}
    assert differing(lambda: (other / "tokenizer.json").write_text(json.dumps(words))) == "tokenizer"

    def everything() -> None:
        change_weight(other)
        change_json(other / "config.json", rms_norm_eps=1e-4)

    assert differing(everything) == "weights, config"


def test_a_name_that_is_another_model_in_another_folder(project: Path, predict: Ia2, ia2: Ia2) -> None:
    """Trained with ``--model model``; where predict is started, ``model`` is another one."""
    right = predict().out
    shutil.copytree(project / "model", Path("model"))
    change_weight(Path("model"))
    assert predict().out == right
    shutil.move(project / "model", project.parent / "gone")
    line = predict().refusal()
    assert line == (
        f"{project / 'out'}: its base model: {(project / 'model').resolve()}: no such file or folder. "
        "Say with --model where it lies now."
    )
    assert "weights" in predict("--model", "model").refusal()
    assert predict("--model", project.parent / "gone").out == right
    arguments = ["--adapter", project / "out", "--data", project / "new.jsonl", "--quiet"]
    assert "Say with --model" in ia2("eval", *arguments).refusal()
    assert ia2("eval", *arguments, "--model", project.parent / "gone").status == 0


def test_copies_saved_again_in_shards_and_by_link_are_the_same(project: Path, predict: Ia2) -> None:
    right = predict().out
    again, link = project.parent / "again", project.parent / "link"
    model = AutoModelForCausalLM.from_pretrained(project / "model")
    model.save_pretrained(again, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(project / "model").save_pretrained(again)
    assert len(list(again.glob("model-*.safetensors"))) > 2
    assert identity.folder_identity(again) == identity.folder_identity(project / "model")
    link.symlink_to(again)
    shutil.rmtree(project / "model")
    assert predict("--model", again).out == right
    assert predict("--model", link).out == right
    shard = sorted(again.glob("model-*.safetensors"))[1]
    shard.rename(again / "model.safetensors")
    change_weight(again)
    (again / "model.safetensors").rename(shard)
    assert "these differ: weights." in predict("--model", link).refusal()


def test_types_are_those_of_the_run(project: Path, tmp_path: Path) -> None:
    """An adapter of a half-precision model is used with that, where ``auto`` would be another type."""
    base = load_base(str(project / "model"), device="cpu", dtype="bfloat16")
    folder = tmp_path / "half"
    adapt(base, EXAMPLES, AdaptConfig(recipe="sft", sft={"epochs": 1}), output_dir=folder)
    assert load_adapter(folder, "cpu")[0].model.dtype == torch.bfloat16
    whole = load_base(str(project / "model"), device="cpu", dtype="float32")
    with pytest.raises(ModelError, match=r"these differ: dtype \(bfloat16, float32\)\."):
        load_adapter(folder, "cpu", base=whole)
    assert load_adapter(project / "out", "cpu", base=whole)[1] is whole


def test_a_model_made_in_memory(tmp_path: Path) -> None:
    def made() -> BaseModel:
        return BaseModel(llama(), make_word_tokenizer(), "mine", "mine")

    config = AdaptConfig(recipe="sft", sft={"epochs": 1})
    adapt(made(), word_examples(6), config, output_dir=tmp_path / "run")
    assert load_adapter(tmp_path / "run", "cpu", base=made())[0].folder == tmp_path / "run"
    changed = made()
    with torch.no_grad():
        changed.model.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    with pytest.raises(ModelError, match=r"mine is not the base model .* these differ: tensors"):
        load_adapter(tmp_path / "run", "cpu", base=changed)
    made().model.save_pretrained(tmp_path / "saved")
    made().tokenizer.save_pretrained(tmp_path / "saved")
    assert load_adapter(tmp_path / "run", "cpu", base=str(tmp_path / "saved"))[1].path == str(
        tmp_path / "saved"
    )


def test_a_run_that_does_not_say_what_its_base_is(project: Path, predict: Ia2) -> None:
    file = project / "out" / "ia2_run.json"
    facts = json.loads(file.read_text())
    del facts["data"]["model"]
    file.write_text(json.dumps(facts))
    manifest.record(project / "out", {"ia2_run.json": manifest.sha256(file)})
    line = predict().refusal()
    assert line.startswith(f"{project / 'out'}: ") and "'model'" in line


def test_a_branch_of_the_hub_that_has_moved(
    tmp_path: Path, tiny_icl_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run keeps the commit; the branch's new commit is another model."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub))
    repository = hub / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        shutil.copytree(tiny_icl_model_path, repository / "snapshots" / commit)
    change_weight(repository / "snapshots" / commits[1])
    (repository / "refs" / "main").write_text(commits[0])
    config = AdaptConfig(recipe="sft", sft={"epochs": 1})
    adapt("owner/name", EXAMPLES, config, output_dir=tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "ia2_run.json").read_text())
    assert (facts["config"]["model"], facts["config"]["revision"]) == ("owner/name", commits[0])
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["revision"] == commits[0]

    (repository / "refs" / "main").write_text(commits[1])
    assert load_adapter(tmp_path / "run", "cpu")[1].revision == commits[0]
    with pytest.raises(ModelError, match="these differ: weights"):
        load_adapter(tmp_path / "run", "cpu", base="owner/name")
    # the same content is the same model, whatever it is called
    assert load_adapter(tmp_path / "run", "cpu", base=str(tiny_icl_model_path))[1].revision is None


# ------------------------------------------------------------------------------- what a run stores


def test_a_run_says_where_its_base_is_from_anywhere(project: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    facts = json.loads((project / "out" / "ia2_run.json").read_text())
    here = project.resolve()
    assert facts["config"]["model"] == str(here / "model")
    assert facts["config"]["data"] == str(here / "rows.jsonl")
    assert sorted(facts["data"]["model"]) == ["config", "dtype", "tokenizer", "weights"]
    kept = json.loads((project / "out" / "adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == str(here / "model")
    loaded = AutoPeftModelForCausalLM.from_pretrained(project / "out")
    ours = load_adapter(project / "out", "cpu")[0].model
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, ours(input_ids=ids).logits)


# ---------------------------------------------------------------------------------- moved projects


def move(project: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    project.rename(to)
    return to


def test_a_moved_project_is_complete(project: Path, ia2: Ia2, predict: Ia2, tmp_path: Path) -> None:
    right = predict().out
    moved = move(project, tmp_path / "far" / "away" / "project")
    # before anything is started there again
    assert predict(folder=moved).out == right
    assert ia2("analyze", moved / "out", "--parts", "weights", "--output-dir", "seen", "--quiet").status == 0
    found = ia2("doctor", moved / "out", "--json").json["runs"][0]
    assert not [reason for reason in found["untold"].values() if "is not there" in reason]
    before = tree(moved / "out")
    assert ia2(*train_command(moved)).status == 0
    after = tree(moved / "out")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"ia2_run.json", "ia2_config.yaml"}  # where things lie
    assert str(moved / "model") in after["ia2_config.yaml"].decode()
    assert predict(folder=moved).out == right
    assert ia2(*train_command(moved)).status == 0
    assert tree(moved / "out") == after


def test_a_moved_project_that_was_interrupted_goes_on(project: Path, ia2: Ia2, tmp_path: Path) -> None:
    weights = (project / "out" / "adapter_model.safetensors").read_bytes()
    (project / "out" / "metrics.json").unlink()
    (project / "out" / "adapter_model.safetensors").unlink()
    shutil.rmtree(project / "out" / "sft")
    first = next((project / "out" / "align").rglob("stage.json"))
    kept = first.stat().st_mtime_ns
    moved = move(project, tmp_path / "far" / "project")
    assert ia2(*train_command(moved)).status == 0
    assert (moved / "out" / "adapter_model.safetensors").read_bytes() == weights
    assert (moved / first.relative_to(project)).stat().st_mtime_ns == kept  # reused


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", ["compare", "curve"])
def test_a_moved_comparison_is_complete(
    command: str, tmp_path: Path, tiny_icl_model_path: Path, ia2: Ia2, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = lay_out(tmp_path / "project", tiny_icl_model_path)
    sizes = ["--sizes", 2, 4] if command == "curve" else ["--num-examples", 4]
    options = ["--recipes", "icl", "sft", "--seeds", 1, *sizes]
    assert ia2(*train_command(project, *options, command=command)).status == 0
    moved = move(project, tmp_path / "far" / "project")
    monkeypatch.setattr(
        "ia2.experiment.workbench.Workbench.evaluate", lambda *_: pytest.fail("evaluated again")
    )
    assert ia2(*train_command(moved, *options, command=command)).status == 0
    run_of = moved / "out" / ("n-4" if command == "curve" else "")
    assert ia2("doctor", run_of).status == 0
    change_weight(moved / "model")
    line = ia2(*train_command(moved, *options, command=command)).refusal()
    assert "another run (the model's weights differ)" in line


def test_changed_content_is_another_run(project: Path, ia2: Ia2) -> None:
    text = ["--context-file", project / "context.txt", "--overwrite"]
    assert ia2(*train_command(project, *text)).status == 0
    assert ia2(*train_command(project, *text[:2])).status == 0
    (project / "context.txt").rename(project / "moved.txt")
    moved = ["--context-file", project / "moved.txt"]
    assert ia2(*train_command(project, *moved)).status == 0
    (project / "moved.txt").write_text("be long\n")
    assert "holds another run (data of context differ)" in ia2(*train_command(project, *moved)).refusal()
    write_rows(project / "rows.jsonl", ROWS[::-1])
    assert "data of dev, data of train differ" in ia2(*train_command(project)).refusal()


def test_cells_of_grids_are_known_by_content(tmp_path: Path, files: Path) -> None:
    from helpers.sweeping import grid_of

    from ia2.experiment.sweep.execute import cells_of, read_benchmarks
    from ia2.experiment.sweep.grid import GridConfig

    def keys(model: Path, **values: Any) -> list[tuple[str, str]]:
        settings = {**values, **({"context_file": str(values["context_file"])} if values else {})}
        given = grid_of(files, recipes=["icl", "sft"], models=[str(model)], settings=settings)
        grid = GridConfig(**given)
        return [(c.key, c.unit) for unit in cells_of(grid, read_benchmarks(grid)) for c in unit.cells]

    shutil.copytree(files / "model", tmp_path / "one")
    before = keys(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert keys(tmp_path / "two") == before
    assert len(keys(tmp_path / "one")) == len(before)  # it is gone: its cells will say so
    change_weight(tmp_path / "two")
    assert not set(keys(tmp_path / "two")) & set(before)

    (tmp_path / "a.txt").write_text("be brief")
    with_text = keys(files / "model", context_file=tmp_path / "a.txt")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert keys(files / "model", context_file=tmp_path / "b.txt") == with_text
    (tmp_path / "b.txt").write_text("be long")
    assert not set(keys(files / "model", context_file=tmp_path / "b.txt")) & set(with_text)


# ------------------------------------------------------------------------------------------ digests


@pytest.fixture
def model(tmp_path: Path, tiny_icl_model_path: Path) -> Path:
    """A copy of the small model that has lain there for a while."""
    shutil.copytree(tiny_icl_model_path, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files need not lie for two seconds before their digests are kept."""
    monkeypatch.setattr(identity, "_SETTLED_NS", -1)


def test_files_are_read_once(model: Path, settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_base(str(model), device="cpu").identity
    read = identity._sha
    monkeypatch.setattr(identity, "_sha", lambda _: pytest.fail("read again"))
    assert load_base(str(model), device="cpu").identity == first
    monkeypatch.setattr(identity, "_sha", read)
    time.sleep(0.02)
    change_weight(model, restore_times=True)
    assert load_base(str(model), device="cpu").identity["weights"] != first["weights"]


def test_what_has_just_been_written_is_read_again(model: Path, own_cache: Path) -> None:
    """A clock may be too coarse to tell two writes apart."""
    (model / "model.safetensors").touch()
    first = identity.folder_identity(model)
    assert not list((own_cache / "digests").glob("*"))
    change_weight(model, restore_times=True)
    assert identity.folder_identity(model) != first


@pytest.mark.parametrize("state", ["absent", "a file", "read-only", "damaged"])
def test_caches_that_cannot_be_used(
    state: str, model: Path, own_cache: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = identity.folder_identity(model)
    if state == "damaged":
        for file in (own_cache / "digests").iterdir():
            file.write_bytes(file.read_bytes()[:40])
    else:
        shutil.rmtree(own_cache)
    if state == "a file":
        own_cache.write_text("")
    if state == "read-only":

        def refuse(path: Path, value: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(identity, "write_json", refuse)
    assert identity.folder_identity(model) == expected
    change_weight(model)
    assert identity.folder_identity(model) != expected


def test_every_value_counts(model: Path) -> None:
    """One bit of any tensor, and what four values of each would miss."""
    with safe_open(model / "model.safetensors", "pt") as file:
        names = list(file.keys())
    content = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    seen = {json.dumps(identity.folder_identity(model))}
    for name in names:
        begin, end = header[name]["data_offsets"]
        place = 8 + length + begin + (end - begin) // 5
        flipped = bytearray(content)
        flipped[place] ^= 1
        (model / "model.safetensors").write_bytes(flipped)
        seen.add(json.dumps(identity.folder_identity(model)))
    assert len(seen) == len(names) + 1


def test_code_counts_where_it_is_run(model: Path) -> None:
    plain = identity.folder_identity(model)
    (model / "modeling.py").write_text("one = 1")
    assert identity.folder_identity(model, code=True) == plain  # nothing names it
    change_json(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    one, without = identity.folder_identity(model, code=True), identity.folder_identity(model)
    (model / "modeling.py").write_text("one = 2")
    two = identity.folder_identity(model, code=True)
    assert one is not None
    assert two is not None
    assert identity.differences(one, two) == ["code"]
    assert identity.folder_identity(model) == without


# --------------------------------------------------------------------------------------------- GGUF


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama())
    return path


def test_a_gguf_file_with_another_middle_is_another_model(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_base(str(gguf), device="cpu")
    content = bytearray(gguf.read_bytes())
    # the converted values are small; this flips one's sign
    content[len(content) // 2 | 3] ^= 0x80
    gguf.write_bytes(content)
    second = load_base(str(gguf), device="cpu")
    assert second.identity["weights"] != first.identity["weights"]
    assert second.path != first.path


def test_a_large_gguf_file_with_another_middle(tmp_path: Path) -> None:
    """Its two ends alone are the same."""
    path = tmp_path / "large.gguf"
    content = bytearray(os.urandom(5 << 19))
    path.write_bytes(content)
    first = identity.file_digests(path)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert identity.file_digests(path) != first


def test_a_gguf_file_is_known_wherever_it_lies(gguf: Path, own_cache: Path) -> None:
    first = load_base(str(gguf), device="cpu")
    moved = gguf.rename(gguf.with_name("renamed.gguf"))
    assert load_base(str(moved), device="cpu").identity == first.identity
    # what PEFT's file names is the converted folder
    assert load_base(first.path, device="cpu").identity == first.identity
    copy = shutil.copytree(first.path, own_cache / "copy")
    assert load_base(str(copy), device="cpu").identity == first.identity
    change_weight(copy)
    assert load_base(str(copy), device="cpu").identity != first.identity


@pytest.mark.parametrize("damage", ["flipped", "half", "missing", "unsealed"])
def test_damaged_conversions_are_made_again(
    damage: str, gguf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_base(str(gguf), device="cpu")
    file = Path(first.path) / "model.safetensors"
    whole = file.read_bytes()
    if damage == "flipped":
        change_weight(Path(first.path))
    elif damage == "half":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "missing":
        (Path(first.path) / "tokenizer.json").unlink()
    else:
        (Path(first.path) / identity.SOURCE_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        assert resolve(str(gguf)) == first.path
    assert "converted again" in caplog.text
    assert file.read_bytes() == whole
    assert load_base(str(gguf), device="cpu").identity == first.identity
