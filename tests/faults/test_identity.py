"""A base model is known by its content, and so are rows: paths and names are not what is compared."""

from __future__ import annotations

import json
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
from helpers.command_line import TASK, Ia2, listed, names, run, tree, write_rows
from helpers.families import llama
from helpers.gguf_files import write_gguf
from helpers.words import make_word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ia2.config import AdaptConfig
from ia2.data.examples import Example, Examples
from ia2.experiment.adapt import adapt, load_adapter
from ia2.models import identity
from ia2.models.load import BaseModel, load_base, resolve
from ia2.utils import manifest
from ia2.utils.errors import ModelError

ROWS = TASK.examples(12, seed=0)
EXAMPLES = Examples([Example(*row, "rows") for row in ROWS])
SFT = AdaptConfig(recipe="sft", sft={"epochs": 1})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IA2_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def command_of(project: Path, *options: Any, command: str = "train") -> list[Any]:
    paths = ["--model", project / "model", "--data", project / "rows.jsonl", "--output-dir", project / "out"]
    brief = ["--align-epochs", 1, "--sft-epochs", 1, "--device", "cpu"]
    brief += ["--selection", "dev", "--learning-rates", "1e-3"]
    return [command, *paths, "--test-data", project / "new.jsonl", *brief, *options]


def lay_out(project: Path, model: Path) -> Path:
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
        main([*listed(command_of(Path())), "--quiet"])
    finally:
        os.chdir(before)
    return project


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trained project at a place of its own: as it was trained in, for all that its files say."""
    here = Path(shutil.copytree(trained, tmp_path / "here"))
    for file in ("ia2_run.json", "ia2_config.yaml", "adapter_config.json"):
        path = here / "out" / file
        path.write_text(path.read_text().replace(str(trained.resolve()), str(here.resolve())))
        manifest.record(here / "out", {file: manifest.sha256(path)})
    monkeypatch.chdir(tmp_path)
    return here


@pytest.fixture
def predict(project: Path, ia2: Ia2) -> Ia2:
    def command(*options: Any, folder: Path = project) -> Any:
        return ia2("predict", "--adapter", folder / "out", "--data", folder / "new.jsonl", *options)

    return command


def change_weight(model: Path, restore_times: bool = False) -> None:
    """Flip a bit of one value in the middle of the largest tensor; the file's size stays."""
    file = model / "model.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    places = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    begin, end = max(places, key=lambda place: place[1] - place[0])
    content[8 + length + (begin + end) // 8 * 4 + 2] ^= 0x10
    with file.open("r+b") as handle:  # the same inode
        handle.write(content)
    if restore_times:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def swap_words(model: Path) -> None:
    words = json.loads((model / "tokenizer.json").read_text())
    known = list(words["model"]["vocab"])
    words["model"]["vocab"] |= {known[10]: 11, known[11]: 10}
    (model / "tokenizer.json").write_text(json.dumps(words))


# ------------------------------------------------------------------------------ what is compared


@pytest.mark.parametrize("command", ["predict --data new.jsonl --adapter", "analyze"])
def test_changed_weights_are_noticed(command: str, project: Path, ia2: Ia2, monkeypatch: Any) -> None:
    monkeypatch.chdir(project)
    change_weight(project / "model")
    line = ia2(*command.split(), "out").refusal()
    is_not = f"{(project / 'model').resolve()} is not the base model that out was trained on"
    names(line, is_not, "these differ: weights.", "--model")


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights": (change_weight, "weights"),
    "config": (lambda m: change_json(m / "config.json", rms_norm_eps=1e-4), "config"),
    "generation": (lambda m: change_json(m / "generation_config.json", eos_token_id=5), "config"),
    "tokenizer": (lambda m: change_json(m / "tokenizer_config.json", eos_token="<pad>"), "tokenizer"),
    "template": (lambda m: (m / "chat_template.jinja").write_text("{{ messages }}"), "tokenizer"),
    "words": (swap_words, "tokenizer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_said(change: str, project: Path, predict: Ia2, tmp_path: Path) -> None:
    other = Path(shutil.copytree(project / "model", tmp_path / "other"))
    apply, differing = CHANGES[change]
    apply(other)
    line = predict("--model", other).refusal()
    names(line, f"{other} is not the base model that {project / 'out'} was trained on, ")
    names(line, str(project / "model"), f"these differ: {differing}. ")


def test_a_name_that_is_another_model_in_another_folder(project: Path, predict: Ia2, ia2: Ia2) -> None:
    """Trained with ``--model model``; where predict is started, ``model`` is another one."""
    right = predict().out
    shutil.copytree(project / "model", Path("model"))
    change_weight(Path("model"))
    assert predict().out == right
    shutil.move(project / "model", project.parent / "gone")
    names(predict().refusal(), f"{(project / 'model').resolve()}: no such file or folder. ", "--model")
    assert "weights" in predict("--model", "model").refusal()
    assert predict("--model", project.parent / "gone").out == right


def test_copies_saved_again_in_shards_and_by_link_are_the_same(project: Path, predict: Ia2) -> None:
    right = predict().out
    again, link = project.parent / "again", project.parent / "link"
    model = AutoModelForCausalLM.from_pretrained(project / "model")
    model.save_pretrained(again, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(project / "model").save_pretrained(again)
    assert identity.folder_identity(again) == identity.folder_identity(project / "model")
    link.symlink_to(again)
    shutil.rmtree(project / "model")
    assert predict("--model", again).out == predict("--model", link).out == right
    shard = sorted(again.glob("model-*.safetensors"))[1]
    shard.rename(again / "model.safetensors")
    change_weight(again)
    (again / "model.safetensors").rename(shard)
    names(predict("--model", link).refusal(), "these differ: weights.")


def test_types_are_those_of_the_run(project: Path, tmp_path: Path) -> None:
    """An adapter of a half-precision model is used with that, where ``auto`` would be another type."""
    base = load_base(str(project / "model"), device="cpu", dtype="bfloat16")
    adapt(base, EXAMPLES, SFT, output_dir=tmp_path / "half")
    assert load_adapter(tmp_path / "half", "cpu")[0].model.dtype == torch.bfloat16
    whole = load_base(str(project / "model"), device="cpu", dtype="float32")
    with pytest.raises(ModelError, match=r"these differ: dtype \(bfloat16, float32\)\."):
        load_adapter(tmp_path / "half", "cpu", base=whole)
    assert load_adapter(project / "out", "cpu", base=whole)[1] is whole


def test_a_model_made_in_memory(tmp_path: Path) -> None:
    def made() -> BaseModel:
        return BaseModel(llama(), make_word_tokenizer(), "mine", "mine")

    adapt(made(), word_examples(6), SFT, output_dir=tmp_path / "run")
    assert load_adapter(tmp_path / "run", "cpu", base=made())[0].folder == tmp_path / "run"
    changed = made()
    with torch.no_grad():
        changed.model.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    with pytest.raises(ModelError, match=r"mine is not the base model .* these differ: tensors"):
        load_adapter(tmp_path / "run", "cpu", base=changed)
    saved = str(tmp_path / "saved")
    made().model.save_pretrained(saved)
    made().tokenizer.save_pretrained(saved)
    assert load_adapter(tmp_path / "run", "cpu", base=saved)[1].path == saved


def test_a_branch_of_the_hub_that_has_moved(
    tmp_path: Path, tiny_icl_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run keeps the commit; the branch's new commit is another model."""
    for module in ("huggingface_hub", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        shutil.copytree(tiny_icl_model_path, repository / "snapshots" / commit)
    change_weight(repository / "snapshots" / commits[1])
    (repository / "refs" / "main").write_text(commits[0])
    run = tmp_path / "run"
    adapt("owner/name", EXAMPLES, SFT, output_dir=run)
    assert json.loads((run / "ia2_run.json").read_text())["config"]["revision"] == commits[0]
    assert json.loads((run / "adapter_config.json").read_text())["revision"] == commits[0]
    (repository / "refs" / "main").write_text(commits[1])
    assert load_adapter(run, "cpu")[1].revision == commits[0]
    with pytest.raises(ModelError, match="these differ: weights"):
        load_adapter(run, "cpu", base="owner/name")
    # the same content is the same model, whatever it is called
    assert load_adapter(run, "cpu", base=str(tiny_icl_model_path))[1].revision is None


# -------------------------------------------------------------------- what a run stores, and moving


def test_a_run_says_where_its_base_is_from_anywhere(project: Path, predict: Ia2) -> None:
    from peft import AutoPeftModelForCausalLM

    facts = json.loads((project / "out" / "ia2_run.json").read_text())
    assert facts["config"]["model"] == str(project.resolve() / "model")
    assert facts["config"]["data"] == str(project.resolve() / "rows.jsonl")
    loaded = AutoPeftModelForCausalLM.from_pretrained(project / "out")
    ours = load_adapter(project / "out", "cpu")[0].model
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, ours(input_ids=ids).logits)
    # and one that does not say it is refused
    del facts["data"]["model"]
    (project / "out" / "ia2_run.json").write_text(json.dumps(facts))
    sha256 = manifest.sha256(project / "out" / "ia2_run.json")
    manifest.record(project / "out", {"ia2_run.json": sha256})
    names(predict().refusal(), f"{project / 'out'}: ", "'model'")


def test_a_moved_project_is_complete(
    project: Path, ia2: Ia2, predict: Ia2, tmp_path: Path, capsys: Any
) -> None:
    right = predict().out
    moved = Path(shutil.move(project, tmp_path / "far"))
    # before anything is started there again
    assert predict(folder=moved).out == right
    assert ia2("analyze", moved / "out", "--parts", "weights", "--output-dir", "seen").status == 0
    before = tree(moved / "out")
    assert ia2(*command_of(moved, "--recipe", "ia2-sft")).status == 0
    after = tree(moved / "out")
    # where things lie
    assert {name for name in after if after[name] != before.get(name)} == {"ia2_run.json", "ia2_config.yaml"}
    assert str(moved / "model") in after["ia2_config.yaml"].decode()
    # and one that was interrupted goes on
    for name in ("metrics.json", "adapter_model.safetensors"):
        (moved / "out" / name).unlink()
    shutil.rmtree(moved / "out" / "sft")
    moved = Path(shutil.move(moved, tmp_path / "farther"))
    ran = run(capsys, *command_of(moved, "--recipe", "ia2-sft"))
    assert ran.status == 0 and "Stage align at rate 0.001: reusing" in ran.err
    assert tree(moved / "out")["adapter_model.safetensors"] == after["adapter_model.safetensors"]


@pytest.mark.usefixtures("undrawn")
def test_a_moved_comparison_is_complete(
    tmp_path: Path, tiny_icl_model_path: Path, ia2: Ia2, fits: list[str]
) -> None:
    project = lay_out(tmp_path / "project", tiny_icl_model_path)
    options = ["--recipes", "icl", "sft", "--seeds", 1, "--num-examples", 4]
    assert ia2(*command_of(project, *options, command="compare")).status == 0
    moved = Path(shutil.move(project, tmp_path / "far"))
    fits.clear()
    assert ia2(*command_of(moved, *options, command="compare")).status == 0
    assert fits == []
    change_weight(moved / "model")
    line = ia2(*command_of(moved, *options, command="compare")).refusal()
    names(line, "another run (the model's weights differ)")


def test_changed_content_is_another_run(project: Path, ia2: Ia2) -> None:
    def train(*options: Any) -> Any:
        return ia2(*command_of(project, "--recipe", "ia2-sft", *options))

    context, moved = project / "context.txt", project / "moved.txt"
    assert train("--context-file", context, "--overwrite").status == 0
    context.rename(moved)
    assert train("--context-file", moved).status == 0
    moved.write_text("be long\n")
    names(train("--context-file", moved).refusal(), "holds another run (data of context differ)")
    write_rows(project / "rows.jsonl", ROWS[::-1])
    names(train().refusal(), "data of dev, data of train differ")


# ----------------------------------------------------------------------------------------- digests


@pytest.fixture
def model(tmp_path: Path, tiny_icl_model_path: Path) -> Path:
    return Path(shutil.copytree(tiny_icl_model_path, tmp_path / "model"))


def test_files_are_read_once(model: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what has just been written is not kept: a clock may be too coarse to tell two writes apart
    (model / "model.safetensors").touch()
    assert identity.folder_identity(model) and not list((own_cache / "digests").glob("*"))
    monkeypatch.setattr(identity, "_SETTLED_NS", -1)  # else files must have lain for two seconds
    first = identity.folder_identity(model)
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_sha", lambda _: pytest.fail("read again"))
        assert identity.folder_identity(model) == first
    time.sleep(0.02)
    change_weight(model, restore_times=True)
    changed = identity.folder_identity(model)
    assert changed != first
    # caches that cannot be used
    for file in (own_cache / "digests").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert identity.folder_identity(model) == changed
    shutil.rmtree(own_cache)
    own_cache.write_text("a file")
    assert identity.folder_identity(model) == changed


def test_every_value_counts(model: Path) -> None:
    """One bit of any tensor, and what four values of each would miss."""
    file = model / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    seen = {json.dumps(identity.folder_identity(model))}
    tensors = [name for name in header if name != "__metadata__"]
    for name in tensors:
        begin, end = header[name]["data_offsets"]
        flipped = bytearray(content)
        flipped[8 + length + begin + (end - begin) // 5] ^= 1
        file.write_bytes(flipped)
        seen.add(json.dumps(identity.folder_identity(model)))
    assert len(seen) == len(tensors) + 1


def test_code_counts_where_it_is_run(model: Path) -> None:
    plain = identity.folder_identity(model)
    (model / "modeling.py").write_text("one = 1")
    assert identity.folder_identity(model, code=True) == plain  # nothing names it
    change_json(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    one, without = identity.folder_identity(model, code=True), identity.folder_identity(model)
    (model / "modeling.py").write_text("one = 2")
    two = identity.folder_identity(model, code=True)
    assert one and two and identity.differences(one, two) == ["code"]
    assert identity.folder_identity(model) == without


# ------------------------------------------------------------------------------------------- GGUF


def test_a_gguf_file_is_known_by_its_content(tmp_path: Path, own_cache: Path, caplog: Any) -> None:
    pytest.importorskip("gguf")
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf, llama())
    first = load_base(str(gguf), device="cpu")
    renamed = Path(shutil.copy(gguf, tmp_path / "renamed.gguf"))
    copy = Path(shutil.copytree(first.path, own_cache / "copy"))
    for same in (renamed, first.path, copy):  # what PEFT's file names is the converted folder
        assert load_base(str(same), device="cpu").identity == first.identity
    change_weight(copy)
    assert load_base(str(copy), device="cpu").identity != first.identity
    # damaged conversions are made again
    converted = Path(first.path) / "model.safetensors"
    whole = converted.read_bytes()
    for damage in (
        lambda: change_weight(Path(first.path)),
        lambda: converted.write_bytes(whole[: len(whole) // 2]),
        lambda: (Path(first.path) / "tokenizer.json").unlink(),
        lambda: (Path(first.path) / identity.SOURCE_FILE).unlink(),
    ):
        damage()
        caplog.clear()
        assert resolve(str(gguf)) == first.path and "converted again" in caplog.text
        assert converted.read_bytes() == whole
    # another middle is another model
    content = bytearray(gguf.read_bytes())
    content[len(content) // 2 | 3] ^= 0x80  # the converted values are small; this flips one's sign
    gguf.write_bytes(content)
    second = load_base(str(gguf), device="cpu")
    assert second.identity["weights"] != first.identity["weights"] and second.path != first.path
