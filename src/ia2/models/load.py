"""Base model and tokenizer: a hub id, a local folder, a GGUF file, or a packaged model."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.config.packaged_models import PACKAGED_MODELS
from ia2.models.gguf import convert, packaged_folder
from ia2.models.identity import (
    differences,
    folder_identity,
    memory_identity,
)
from ia2.models.sharding import in_turns, on_device
from ia2.utils.distributed import first_then_all, process_state, shards_model
from ia2.utils.errors import ConfigError, ModelError, UserError, suggest
from ia2.utils.machine_errors import memory_exhausted
from ia2.utils.user_files import user_path
from ia2.utils.wording import quoted

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")


@dataclass
class BaseModel:
    """A causal language model ready for use, in evaluation mode on its device.

    Attributes:
        model: the model; its head may be skipped by asking for few logits.
        tokenizer: its tokenizer; never modified.
        name: what the user gave.
        path: what ``from_pretrained`` was given: a hub id, or an absolute path (of the converted folder, for
            GGUF and packaged models).
        revision: commit on the hub, or None.
        identity: digests that tell this model from any other, wherever it lies (:mod:`ia2.models.identity`);
        part of
            every fingerprint. Of a model that was made in memory: of its tensors when it is put in here.
        adapted: the model with an adapter, while one is on it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: str
    revision: str | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    adapted: Any = None

    def __post_init__(self) -> None:
        if not self.identity:
            self.identity = dict(memory_identity(self.model, self.tokenizer))

    @property
    def current(self) -> Any:
        """The model in whatever wrapping it has now."""
        return self.model if self.adapted is None else self.adapted

    def differs_from(self, identity: Mapping[str, Any]) -> list[str]:
        """What is not as this identity says (``weights``, ``config``, …); empty if it is of this model."""
        if "tensors" in identity:
            return differences(identity, memory_identity(self.model, self.tokenizer))
        if "tensors" in self.identity:
            return ["weights (in memory now, which cannot be compared with files)"]
        return differences(identity, self.identity)

    @property
    def source(self) -> str:
        """The name, usable from any working folder: an absolute path, a hub id or a packaged model's name."""
        file = user_path(self.name)
        if self.name in PACKAGED_MODELS:
            return self.name
        return str(file.resolve()) if file.is_file() else self.path

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def max_length(self) -> int:
        """Tokens that fit in the context window (position table and tokenizer limit)."""
        config = self.model.config.get_text_config()
        limits = [
            getattr(config, name, None)
            for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        ]
        limits.append(self.tokenizer.model_max_length)
        # tokenizers without a limit carry 1e30; alibi models have no position table
        known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
        return min(known, default=10**9)


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: str | None = None,
) -> BaseModel:
    """Load a base model and its tokenizer.

    Args:
        name: hub id, local folder, ``.gguf`` file, or a packaged model's (:mod:`ia2.config.packaged_models`).
        dtype: ``auto`` is bfloat16 on an accelerator and float32 on a CPU.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None takes an accelerator if there is one.
        revision: hub branch, tag or commit.
        trust_remote_code: run code that comes with the model. Off unless the user asks.
        attn_implementation: ``eager`` or ``sdpa``; None leaves transformers' choice.
        quantization: ``4bit`` (NF4) or ``8bit`` weights through bitsandbytes; computation is in ``dtype``.

    Raises:
        ModelError: the model cannot be found, is not a causal language model, or cannot be read; or it is
            to be quantised where that is not possible.
        ConfigError: unknown dtype or quantisation, or absent device.
    """
    path = resolve(name)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    target = _device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' is unknown. Choose one of {', '.join(DTYPES)}.")
    if dtype == "auto":
        dtype = "float32" if target.type == "cpu" else "bfloat16"
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            kernel = str(getattr(part, "_attn_implementation", None))
            if "/" in kernel:
                raise ValueError(
                    f"its config.json names {kernel}, attention code of the hub. Remove the key "
                    "attn_implementation from it."
                )
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if attn_implementation:
            options["attn_implementation"] = attn_implementation
        if quantization is not None:
            options.update(_quantized(quantization, path, dtype, target, revision, trust_remote_code))
        # a pickle can run code, so none is ever read, also where an index of safetensors files names one
        index = Path(path) / "model.safetensors.index.json"
        if index.is_file() and not index.with_name("model.safetensors").is_file():
            for file in {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}:
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise ValueError(f"{index.name} names {quoted(file)}, no safetensors file beside it")
        with in_turns(target):
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), use_safetensors=True, **options
            )
            if quantization is None:  # else it was put there while it was read, and refuses to move
                on_device(model, target)
    except UserError:
        raise
    except Exception as error:  # files that are no model's lead their readers to errors of any kind
        if memory_exhausted(error):
            raise
        raise ModelError(_explain(name, path, error)) from error
    _check_vocabulary(model, tokenizer, name)
    if quantization == "4bit":
        _keep_packing(model)
        _check_dequantised(model, name)
    model.eval().requires_grad_(False)
    folder = _folder(path, revision)
    if folder is not None and not Path(path).is_dir():
        revision = folder.name
        model.config._commit_hash = revision  # for what PEFT writes
    identity = first_then_all(lambda: folder and folder_identity(folder, code=trust_remote_code))
    identity = identity or memory_identity(model, tokenizer)
    identity = {**identity, "dtype": dtype}
    if quantization is not None:
        identity["quantization"] = quantization
    return BaseModel(model, tokenizer, name, path, revision, identity)


def content_of(name: str, *, revision: str | None = None, code: bool = False) -> dict[str, Any]:
    """What a name stands for now, without loading it: digests, or the commit of what is not on this machine.

    Args:
        name: as :func:`load_base` takes it.
        revision: hub branch, tag or commit.
        code: its Python files are run, so they count.

    Returns:
        The name itself where nothing is found; loading it says why.
    """
    try:
        path = resolve(name)
    except ModelError:
        return {"name": name}
    folder = _folder(path, revision)
    if folder is None:
        return {"name": name, "revision": revision}
    if not Path(path).is_dir():  # weights on the hub are not fetched for this
        return {"name": name, "commit": folder.name}
    return dict(folder_identity(folder, code=code) or {"path": path})


def _folder(path: str, revision: str | None) -> Path | None:
    """The folder with a model's files; of a hub id, in the hub's cache. None if there is none."""
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils import cached_file

    try:
        config = cached_file(path, "config.json", revision=revision)
    except (OSError, ValueError):
        return None
    return Path(config).parent if config else None


def resolve(name: str) -> str:
    """What ``from_pretrained`` can read for the name a user gave; converts GGUF files on first use.

    Raises:
        ModelError: a packaged model that is not installed, a missing file, or a name that is neither.
    """
    if name in PACKAGED_MODELS:
        return str(packaged_folder(name))
    path = user_path(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{name}: a model is a folder, a .gguf file or a hub id, not a {path.suffix or 'plain'} file."
            )
        return str(convert([path], path.stem))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: the folder has no config.json, so it holds no model.")
        if (path / "adapter_config.json").is_file():  # transformers would put it on in silence
            raise ModelError(f"{name}: an adapter lies beside the model. Take a folder without its files.")
        return str(path.resolve())
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such file or folder.")
    if "/" not in name and (hint := suggest(name, list(PACKAGED_MODELS))):
        raise ModelError(f"model '{name}' is unknown.{hint}")
    return name


def _device(device: str | None) -> torch.device:
    import torch

    if device is None:
        return torch.device(process_state().device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, on names of devices that it no longer has
            target = torch.device(device)
            torch.ones(1, device=target).add(1).item()  # devices without memory ("meta") fail only here
    except Exception as error:  # of any kind: each backend has its own
        raise ConfigError(f"device '{device}' is not available on this machine. Try --device cpu.") from error
    process_state(on_cpu=target.type == "cpu")
    return target


def _quantized(
    quantization: str, path: str, dtype: str, target: torch.device, revision: str | None, trust: bool
) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a model whose weights are quantised as they are read.

    Raises:
        ConfigError: an unknown quantisation, or a launch that shards models.
        ModelError: no bitsandbytes, a device that it cannot use, or a model that is quantised already.
    """
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    if quantization not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization '{quantization}' is unknown. Choose one of {', '.join(QUANTIZATIONS)}."
        )
    if shards_model():
        raise ConfigError(
            "quantised weights cannot be sharded. Leave quantization out, or launch with "
            "`ia2 env --accelerate ddp`."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "quantization needs the package bitsandbytes. Run: pip install bitsandbytes, or leave it out."
        )
    import bitsandbytes

    devices = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})  # older versions: GPUs only
    if target.type not in devices:
        raise ModelError(
            f"bitsandbytes {bitsandbytes.__version__} cannot quantise on the device {target.type} (but on "
            f"{', '.join(sorted(devices))}). Leave quantization out, or choose another device."
        )
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model {path} is quantised already. Leave quantization out.")
    if quantization == "4bit":
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
        # one line for every layer and batch: "inputs will be cast … to float16"
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": settings, "device_map": {"": str(target)}}


def _keep_packing(model: PreTrainedModel) -> None:
    """Leave 4-bit weights as they were read.

    On CPUs with AVX512-BF16 bitsandbytes would pack them anew, in place, in the first forward pass without
    gradients. That fails for widths that are no multiple of its blocks of 64, and rounds scales to bfloat16,
    so that results would depend on the kind of CPU and on which pass came first.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _check_dequantised(model: PreTrainedModel, name: str) -> None:
    """Rows that end inside one of bitsandbytes' blocks of 64 weights come out wrong on CPUs with AVX512.

    Raises:
        ModelError: the scaled codes of such a layer are not what bitsandbytes makes of them.
    """
    import torch

    for place, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or state.nested or state.shape[-1] % state.blocksize == 0:
            continue
        from bitsandbytes.functional import dequantize_4bit

        packed = module.weight.data.flatten()  # type: ignore[union-attr, operator]
        codes = state.code[torch.stack([packed >> 4, packed & 15], 1).flatten().long()]
        blocks = codes.split(state.blocksize)
        scaled = torch.cat([b * scale for b, scale in zip(blocks, state.absmax, strict=True)])
        made = dequantize_4bit(module.weight.data, state).flatten().float()  # type: ignore[union-attr, arg-type]
        if not torch.allclose(made, scaled, rtol=0.02, atol=1e-6):
            raise ModelError(
                f"model {name}: bitsandbytes computes {place}, whose rows have {state.shape[-1]} weights, "
                f"wrongly in 4 bit on this {made.device.type}: they are no multiple of {state.blocksize}. "
                "Choose 8bit, leave quantization out, or choose another device."
            )


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Every token that a text can have needs a row of the embedding; rows without a token do no harm.

    A marker that was added for other models of a family (Gemma 3 has one for images) is let pass until a
    prompt has it.

    Raises:
        ModelError: the tokenizer and the model do not belong together.
    """
    embedding = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])  # type: ignore[union-attr, index, arg-type]
    beyond = [token for token, place in tokenizer.get_vocab().items() if place >= rows]
    if not beyond:
        return
    markers = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    if wanted := [token for token in beyond if token not in markers or token in used]:
        raise ModelError(
            f"model {name}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows: none for "
            f"{wanted[0]!r} and {len(wanted) - 1} more. Take the tokenizer that the model was trained with, "
            "or enlarge the embedding (resize_token_embeddings) and save the model."
        )
    embedding.register_forward_pre_hook(functools.partial(_check_ids, rows, name))


def _check_ids(rows: int, name: str, embedding: Any, given: tuple[Any, ...]) -> None:
    if given and (highest := int(given[0].max())) >= rows:
        raise ModelError(
            f"model {name}: a prompt has token {highest}, and the embedding has only {rows} rows. Take the "
            "text of this token out of the prompts."
        )


def _explain(name: str, path: str, error: Exception) -> str:
    first = " ".join(str(error).split())
    if "trust_remote_code" in first:
        return (
            f"model {name} brings code of its own, which is not run unless asked for. If you trust it, give "
            "--trust-remote-code in this command."
        )
    if "file named model.safetensors" in first:
        return (
            f"model {name} cannot be read: there is no file named model.safetensors. A pickle is never read, "
            "since it can run code: where it is trusted, save a copy with transformers' save_pretrained."
        )
    if len(first) > 300:
        first = first[:300] + "…"
    if Path(path).exists():
        # others' words are often a key or a number alone
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        return f"model {name} cannot be read: {kind}{first}"
    return (
        f"model '{name}' was found neither as a local folder or .gguf file nor on the hub "
        f"(known names: {', '.join(PACKAGED_MODELS)}). {type(error).__name__}: {first}"
    )
