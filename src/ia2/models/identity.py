"""What a base model is, wherever it lies: digests of weights, configuration and tokenizer.

A file is read once: its digests are kept in the user's cache until its size, times or inode change.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.utils.errors import UserError
from ia2.utils.files import cache_dir, digest, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOURCE_FILE = "ia2_source.json"
"""In a folder that was converted from a GGUF file: of which one, and what was written."""

_BLOCK = 1 << 20
# A file system's clock may be this coarse: a younger file can change once more and keep its times.
_SETTLED_NS = 2 * 10**9
# What saving adds or changes of itself, and the types that weights are loaded in anyway.
_VOLATILE = (
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype"),
    *("architectures", "is_local", "local_files_only", "tokenizer_file", "special_tokens_map_file"),
)
_TOKENIZER = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
# What tokenizers without tokenizer.json are made of.
_VOCABULARY = ("vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")


def folder_identity(folder: Path, *, code: bool = False) -> dict[str, str] | None:
    """Digests of ``weights``, ``config`` and ``tokenizer`` of a model's folder.

    How weights are divided among files, and what saving notes beside them, makes no difference. A folder
    that was converted from a GGUF file, and is as it was written, is that file.

    Args:
        folder: holds ``config.json``.
        code: Python files that its settings name are run, so they count.

    Returns:
        None where the files do not say what is loaded: no safetensors, or an adapter beside them.
    """
    files = _weight_files(folder)
    if not files or (folder / "adapter_config.json").is_file():
        return None
    if source := converted_from(folder):
        return dict.fromkeys(("weights", "config", "tokenizer"), f"gguf {source}")
    config, words = _settings(folder / "config.json"), _settings(folder / "tokenizer_config.json")
    generation = _settings(folder / "generation_config.json")
    names = ["chat_template.jinja", "additional_chat_templates/*.jinja", *_TOKENIZER]
    if not (folder / "tokenizer.json").is_file():
        names += _VOCABULARY
    found = {
        "weights": digest({name: sha for file in files for name, sha in file_digests(file).items()}),
        # of the generation settings only the end counts: answers are greedy
        "config": digest([config, (generation or {}).get("eos_token_id")]),
        "tokenizer": digest([words, _whole(folder, names)]),
    }
    if code and any("auto_map" in (settings or {}) for settings in (config, words)):
        found["code"] = digest(_whole(folder, ["*.py"]))
    return found


def memory_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests of a model that no files tell of: of its ``tensors`` as they are now, and of the rest."""
    import torch

    tensors = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(content.data)
            tensors[name] = sha.hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words: Any = tokenizer.get_vocab()
    if backend is not None:
        words = json.loads(backend.to_str())
        # these are set by every call
        words |= {"padding": None, "truncation": None}
    return {
        "tensors": digest(tensors),
        "config": digest(_lasting(json.loads(model.config.to_json_string(use_diff=False)))),
        "tokenizer": digest([words, tokenizer.chat_template, tokenizer.eos_token_id]),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def differences(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words; empty if they are of the same model."""
    parts = [name for name in sorted({*known, *now}) if known.get(name) != now.get(name)]
    plain = {"dtype", "quantization"}
    return [
        f"{name} ({known.get(name, 'none')}, {now.get(name, 'none')})" if name in plain else name
        for name in sorted(parts, key=lambda name: (name in plain, name != "weights", name))
    ]


def file_digests(path: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a safetensors file (with its type and shape), or of a whole file, named "".

    Raises:
        OSError: it cannot be read.
    """
    # in the hub's cache the name is a link to a file without an ending
    kind, path = path.suffix, path.resolve()
    stamp = _stamp(path)
    kept = cache_dir() / "digests" / f"{digest([str(path), kind])}.json"
    try:
        known = read_json(kept)
        if known["stamp"] == stamp and known["path"] == str(path):
            return dict(known["digests"])
    except (OSError, UserError, KeyError, TypeError, ValueError):
        pass  # none, or a damaged one
    began = time.time_ns()
    found = _tensor_digests(path) if kind == ".safetensors" else None
    if found is None:
        with path.open("rb") as file:
            found = {"": _sha(iter(lambda: file.read(_BLOCK), b""))}
    if began - max(stamp[1:3]) > _SETTLED_NS and _stamp(path) == stamp:
        # where nothing can be kept, the next start reads the file again
        with suppress(OSError, UserError):
            write_json(kept, {"path": str(path), "stamp": stamp, "digests": found})
    return found


def sealed(folder: Path) -> dict[str, str]:
    """A digest of each file of a folder, by name; :data:`SOURCE_FILE` itself is left out."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != SOURCE_FILE]
    return {path.name: digest(file_digests(path)) for path in files}


def converted_from(folder: Path) -> str | None:
    """SHA-256 of the GGUF file that a folder was made of; None if of none, or if a file changed since."""
    try:
        source = read_json(folder / SOURCE_FILE)
        return str(source["sha256"]) if source["written"] == sealed(folder) else None
    except (OSError, UserError, KeyError, TypeError):
        return None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(read_json(folder / "model.safetensors.index.json")["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, UserError, KeyError, TypeError, AttributeError):
        return []
    return files if all(file.is_file() for file in files) else []


def _tensor_digests(path: Path) -> dict[str, str] | None:
    """None if it is no safetensors file, whatever its name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return None
        found = {}
        try:
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                sizes = [min(_BLOCK, end - place) for place in range(begin, end, _BLOCK)]
                kind = f"{entry['dtype']} {entry['shape']}".encode()
                found[name] = _sha(chain([kind], (file.read(size) for size in sizes)))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    return found


def _sha(blocks: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for block in blocks:
        sha.update(block)
    return sha.hexdigest()


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    # the time of the inode's own change too: a copy may keep the other one
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _settings(path: Path) -> dict[str, Any] | None:
    """A JSON file without what changes from saving to saving; None if there is none."""
    try:
        return _lasting(read_json(path))
    except (OSError, UserError):
        return None


def _lasting(values: Any) -> Any:
    """The same without volatile keys, in sections too."""
    if isinstance(values, dict):
        return {key: _lasting(inner) for key, inner in values.items() if key not in _VOLATILE}
    return values


def _whole(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): file_digests(path)[""] for path in sorted(files)}
