"""Models in GGUF files, packaged models (:mod:`ia2.config.packaged_models`) among them.

They are converted once, atomically, into the user's cache, since reading a GGUF tokenizer takes 20–50 s.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path

from ia2.config.packaged_models import PACKAGED_MODELS, PackagedModel
from ia2.models.identity import SOURCE_FILE, converted_from, file_digests, sealed
from ia2.utils.errors import ModelError, RunFolderError
from ia2.utils.files import atomic_dir, cache_dir, check_writable, digest, write_json
from ia2.utils.logging import logger
from ia2.utils.machine_errors import memory_exhausted

# Bump when a conversion changes, so that folders of older versions are not reused.
_CONVERSION = 2


def packaged_folder(name: str) -> Path:
    """The folder of a packaged model, converted when it is first asked for.

    Raises:
        ModelError: it is not installed, in part or at all; its files are not those of the table; or they
            cannot be converted.
    """
    model = PACKAGED_MODELS[name]
    found = {package: _file_in(package, model.file) for package in model.packages}
    parts = [path for path in found.values() if path is not None]
    if missing := [package for package, path in found.items() if path is None]:
        state = f"is incomplete: {', '.join(missing)} missing" if parts else "is not installed"
        raise ModelError(f"model '{name}' ({model.title}) {state}. Run: {model.install(missing)}")
    return convert(parts, name, model)


def _file_in(package: str, pattern: str) -> Path | None:
    """The file that a package holds; None if there is none, or it is not installed."""
    # find_spec of a top-level name locates the package without importing it
    spec = importlib.util.find_spec(package.replace("-", "_"))
    locations = (spec.submodule_search_locations or []) if spec else []
    return next((path for place in locations for path in sorted(Path(place).glob(pattern))), None)


def convert(parts: list[Path], label: str, packaged: PackagedModel | None = None) -> Path:
    """Convert a GGUF file (given whole or in parts) to a transformers folder in the cache.

    Args:
        parts: the files that make it up, in order.
        label: what the folder's name begins with.
        packaged: what the file must be; None: any model.

    Raises:
        ModelError: it cannot be read, is not what it must be, or cannot be written there.
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
            if packaged is not None:
                _check_space(folder.parent, packaged, label)
            with atomic_dir(folder) as temporary:
                _write_converted(parts, temporary, label, packaged)
    return folder


def _check_space(cache: Path, model: PackagedModel, name: str) -> None:
    needed = model.bytes * (len(model.packages) > 1) + model.converted_bytes
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise ModelError(
            f"model '{name}' needs {needed / 1e9:.1f} GB in {cache}, where {free / 1e9:.1f} GB are free. "
            "Free some, or set IA2_CACHE_DIR to a folder on another disk."
        )


def _write_converted(parts: list[Path], target: Path, label: str, packaged: PackagedModel | None) -> None:
    import torch

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:  # pragma: no cover - transformers is a dependency
        raise ModelError(str(error)) from error
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading a GGUF model needs the package gguf. Run: pip install 'ia2[gguf]'")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-") as scratch:
        if len(parts) > 1:
            source = Path(scratch) / "model.gguf"
            sha = _join(parts, source)
        else:
            source = parts[0]
            sha = file_digests(source)[""]
        if packaged is not None and sha != packaged.sha256:
            raise ModelError(
                f"model '{label}' ({packaged.title}): its files are damaged or of another version (sha256 "
                f"{sha[:12]}… where {packaged.sha256[:12]}… is expected). Run: {packaged.reinstall}"
            )
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
        write_json(
            target / SOURCE_FILE,
            {"files": [p.name for p in parts], "sha256": sha, "written": sealed(target)},
        )


def _join(parts: list[Path], whole: Path) -> str:
    """Write the parts one after the other into one file; its SHA-256."""
    sha = hashlib.sha256()
    with whole.open("wb") as joined:
        for part in parts:
            with part.open("rb") as piece:
                while block := piece.read(1 << 20):
                    joined.write(block)
                    sha.update(block)
    return sha.hexdigest()


def installed_packaged_models() -> dict[str, str]:
    """Each packaged model's state: installed, or how to install it."""
    found = {}
    for name, model in PACKAGED_MODELS.items():
        missing = [package for package in model.packages if _file_in(package, model.file) is None]
        state = f"not installed; run: {model.install(missing)}" if missing else "installed"
        found[name] = f"{model.title}, {model.licence}, {model.bytes / 1e6:.0f} MB, {state}"
    return found
