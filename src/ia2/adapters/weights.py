"""An adapter on a model: put on and taken off, switched off, its weights kept and read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.models.sharding import NEEDS_WHOLE, keep_whole
from ia2.utils.distributed import shards_model
from ia2.utils.errors import ConfigError, DataError, RunFolderError
from ia2.utils.imports import without_bitsandbytes
from ia2.utils.manifest import check

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn

    from ia2.adapters.full_finetuning import FullConfig, FullModel

# PEFT's own file names.
_WEIGHTS = "adapter_model.safetensors"
# What PEFT leaves out: the network that computes the virtual tokens of p-tuning.
_ENCODER = "encoder.safetensors"


# -------------------------------------------------------------------------------------- on and off


def attach(model: Any, config: PeftConfig | FullConfig, seed: int) -> PeftModel | FullModel:
    """Put a freshly initialised adapter on a base model; the same seed gives the same weights.

    Returns:
        In evaluation mode. (IA)³ and VeRA start alike whatever the seed.

    Raises:
        ConfigError: the configuration does not fit the model.
    """
    import torch
    from transformers import dynamic_module_utils

    from ia2.adapters.full_finetuning import FullConfig, FullModel

    with without_bitsandbytes():
        from peft import get_peft_model

    if isinstance(config, FullConfig):
        if shards_model():
            raise ConfigError(NEEDS_WHOLE)
        return FullModel(model).eval()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        # PEFT may load a tokenizer; whoever runs us is not asked whether its code is to be run
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
        # of the hub: PEFT then loads the commit that the adapter was trained on
        config.revision = getattr(model.config, "_commit_hash", None)
        try:
            with without_bitsandbytes(), _biases_allowed():
                adapted = get_peft_model(model, config)
        except Exception as error:
            _put_back(model, whole=False)  # it may have come half-way
            if "DTensor" in str(error):
                raise ConfigError(NEEDS_WHOLE) from error
            if not isinstance(error, ValueError):
                raise
            message = " ".join(str(error).split())
            if "trust_remote_code" in message:
                raise ConfigError(
                    "adapter.peft: its tokenizer brings code of its own, which is never run. Name another "
                    "in tokenizer_name_or_path."
                ) from error
            raise ConfigError(f"the adapter does not fit {type(model).__name__}: {message[:400]}") from error
    keep_whole(adapted)
    return adapted.eval()  # type: ignore[no-any-return]


def detach(model: PeftModel | FullModel) -> Any:
    """The base model, as it was before :func:`attach`."""
    from ia2.adapters.full_finetuning import FullModel

    if isinstance(model, FullModel):
        base = model.unload()
    elif getattr(model.active_peft_config, "is_prompt_learning", False):
        base = model.get_base_model()
        # PEFT's generate leaves it there, and with it a reference from the model to itself
        base.__dict__.pop("prepare_inputs_for_generation", None)
    else:
        _put_back(model, whole=True)
        base = model.unload()
    # PEFT marks the base; without this the next attach warns of a second adapter
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base.requires_grad_(False)


def _put_back(model: Any, *, whole: bool) -> None:
    """Put back what PEFT has wrapped.

    Args:
        model: base or PEFT model.
        whole: only modules with a trained copy, which ``unload`` would leave in the base.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, ModulesToSaveWrapper):
            setattr(model.get_submodule(parent), child, module.original_module)
        elif not whole and isinstance(module, BaseTunerLayer):
            setattr(model.get_submodule(parent), child, module.get_base_layer())


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Context in which the adapter is switched off: the model equals its base bit for bit.

    So the teacher needs no second copy of the model (but for full fine-tuning, which keeps one). Does
    nothing on a bare model.
    """
    inner = getattr(model, "module", model)
    disable = getattr(inner, "disable_adapter", None)
    if disable is None:
        yield
        return
    # PEFT marks every adapter weight as trainable when it switches back on
    trainable = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    try:
        with disable():
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def virtual_tokens(model: Any) -> int:
    """Tokens of the context window that the attached adapter takes before every prompt."""
    return virtual_tokens_of(getattr(getattr(model, "module", model), "active_peft_config", None))


def virtual_tokens_of(config: Any) -> int:
    """The same of a PEFT configuration, before the adapter is put on."""
    if not getattr(config, "is_prompt_learning", False):
        return 0
    return int(getattr(config, "num_virtual_tokens", 0))


# ------------------------------------------------------------------------------------------- weights


def adapter_state(model: PeftModel | FullModel) -> dict[str, torch.Tensor]:
    """Copies of what is trained on the CPU, from which training can go on."""
    from ia2.adapters.full_finetuning import FullModel

    if isinstance(model, FullModel):
        state = model.state()
    elif model.active_peft_config.is_prompt_learning:
        # PEFT keeps what the encoder of p-tuning computes, not the encoder itself
        state = model.prompt_encoder.state_dict(prefix="prompt_encoder.")
    else:
        state = _peft_state(model)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def _peft_state(model: PeftModel) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # the base's embeddings never change size here, and looking whether they did asks the hub
    with _biases_allowed():
        return get_peft_model_state_dict(model, save_embedding_layers=False)  # type: ignore[no-any-return]


@contextmanager
def _biases_allowed() -> Iterator[None]:
    """PEFT takes the vectors of its own ``lora_bias`` for lost weights, and says that they do not merge."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape")
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
        yield


def load_adapter_state(model: PeftModel | FullModel, state: Mapping[str, torch.Tensor]) -> None:
    """Set the trained weights, from :func:`adapter_state` or from a file that PEFT has written.

    Raises:
        ConfigError: the weights are of another adapter.
    """
    from peft import set_peft_model_state_dict

    from ia2.adapters.full_finetuning import FullModel

    if isinstance(model, FullModel):
        model.load_state(state)
        return
    config: Any = model.active_peft_config
    try:
        if not config.is_prompt_learning:
            wrong = sorted(set(_peft_state(model)) - set(state))
            result: Any = set_peft_model_state_dict(model, dict(state))
            wrong += result.unexpected_keys
        elif "prompt_embeddings" in state:
            set_peft_model_state_dict(model, dict(state))
            # these are the encoder's outputs, to be used as they are
            config.inference_mode = True
            wrong = []
        else:
            config.inference_mode = False
            prefix = "prompt_encoder."
            weights = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            result = model.prompt_encoder.load_state_dict(weights, strict=False)
            wrong = [*result.missing_keys, *result.unexpected_keys]
    except RuntimeError as error:  # other shapes
        raise ConfigError(f"these adapter weights do not fit the model: {error}") from error
    if wrong:
        raise ConfigError(f"these adapter weights do not fit the model: {', '.join(wrong[:3])} …")


def save_adapter(model: PeftModel | FullModel, folder: str | Path) -> None:
    """Write what other tools load: PEFT's two files, or (``full``) a whole model.

    Where PEFT leaves out what training goes on from (the encoder of p-tuning), it is added.
    """
    from safetensors.torch import save_file

    from ia2.adapters.full_finetuning import FullModel

    folder = Path(folder)
    if isinstance(model, FullModel):
        model.save_pretrained(folder)
        return
    card = folder / "README.md"
    before = card.read_bytes() if card.is_file() else None
    with _biases_allowed():
        model.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT writes a card of its own, into one that is there already too
    card.unlink(missing_ok=True)
    if before is not None:
        card.write_bytes(before)
    (folder / _ENCODER).unlink(missing_ok=True)
    if model.active_peft_config.is_prompt_learning:
        state = adapter_state(model)
        if len(state) > 1:  # more than the table of virtual tokens that PEFT has written
            save_file(state, folder / _ENCODER)


def read_adapter_state(
    folder: str | Path, mend: str = "Run the command that made it again."
) -> dict[str, torch.Tensor]:
    """The weights in a folder of :func:`save_adapter`, or of PEFT's or transformers' own saving.

    Args:
        folder: where they lie.
        mend: the way out if they are damaged, as a sentence.

    Returns:
        What :func:`load_adapter_state` takes, and training goes on from exactly.

    Raises:
        DataError: there are none, a file is missing or broken, or a weight is not finite.
        RunFolderError: a file of a run is not as it was written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in _weight_files(Path(folder), mend):
        check(file, mend=mend)
        try:
            found = load_file(file)
        except FileNotFoundError:
            raise DataError(f"{file}: no such file.") from None
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file}: cannot be read ({error}).") from error
        if bad := [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]:
            raise DataError(f"{file}: {bad[0]} is not finite, so it is of no use. Train it again.")
        state |= found
    return state


def _weight_files(folder: Path, mend: str) -> list[Path]:
    from ia2.utils.files import read_json

    for name in (_ENCODER, _WEIGHTS, "model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return sorted({folder / name for name in read_json(index)["weight_map"].values()})
        except (RunFolderError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{index}: not an index of weights ({error}).") from error
    raise DataError(f"{folder}: no adapter in it ({_WEIGHTS} or model.safetensors). {mend}")
