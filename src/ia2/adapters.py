"""Adapters: what is trained. Everything goes through PEFT; ``lora`` is the default.

To add an adapter type, add one entry to :data:`ADAPTERS`. Any PEFT configuration can also be given as
it is (``AdapterConfig(peft={...})`` or a ``peft.PeftConfig`` to :func:`attach`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ia2.capture import find_attention_modules, unwrap
from ia2.config import AdapterConfig
from ia2.errors import ConfigError, ModelError, suggest

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn

# Leaf names of value projections: the paper adapts queries, keys and outputs.
_VALUE_NAMES = ("v_proj", "value", "v")


def attention_projections(model: nn.Module, pattern: str | None = None) -> list[str]:
    """Names of the query, key and output projections (or fused ones), shortest that are unambiguous.

    Returns names as PEFT's ``target_modules`` takes them: the leaf name where it occurs in attention
    only (``q_proj``), with its parent where another module has the same leaf (``attn.c_proj`` on
    GPT-2, whose MLP has a ``c_proj`` too).

    Raises:
        ModelError: the attention modules have no linear layers.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    inner = unwrap(model)
    linear = (torch.nn.Linear, Conv1D)
    attention = [name for name, _ in find_attention_modules(inner, pattern).values()]
    # where the output projection itself is hooked (Bloom), its parent is the attention module
    attention = [n.rsplit(".", 1)[0] if isinstance(inner.get_submodule(n), linear) else n for n in attention]
    inside: dict[str, str] = {}
    for parent in attention:
        for name, module in inner.get_submodule(parent).named_modules():
            leaf = name.rsplit(".", 1)[-1]
            if isinstance(module, linear) and leaf not in _VALUE_NAMES:
                inside[f"{parent}.{name}"] = leaf
    if not inside:
        raise ModelError(
            f"no linear layers found in the attention modules of {type(inner).__name__}; "
            "give adapter.target_modules."
        )
    outside = {
        name.rsplit(".", 1)[-1]
        for name, module in inner.named_modules()
        if isinstance(module, linear) and name not in inside
    }
    names: dict[str, None] = {}
    for full, leaf in inside.items():
        names[leaf if leaf not in outside else ".".join(full.split(".")[-2:])] = None
    return list(names)


def _lora(model: nn.Module, config: AdapterConfig) -> PeftConfig:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # floats work too
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules or attention_projections(model)),
        # GPT-2's layers keep their weights transposed
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in unwrap(model).modules()),
        task_type="CAUSAL_LM",
    )


ADAPTERS: dict[str, Callable[[nn.Module, AdapterConfig], PeftConfig]] = {"lora": _lora}


def peft_config(model: nn.Module, config: AdapterConfig) -> PeftConfig:
    """The PEFT configuration that an :class:`AdapterConfig` stands for.

    Raises:
        ConfigError: unknown type, or a PEFT dictionary that PEFT does not take.
    """
    if config.peft is None:
        if config.type not in ADAPTERS:
            raise ConfigError(
                f"adapter type '{config.type}' is unknown. Choose one of {', '.join(ADAPTERS)}, or give any "
                f"PEFT configuration under adapter.peft.{suggest(config.type, list(ADAPTERS))}"
            )
        return ADAPTERS[config.type](model, config)
    from peft import get_peft_config

    given = {"task_type": "CAUSAL_LM", **config.peft}
    if "peft_type" not in given:
        raise ConfigError("adapter.peft needs the key peft_type, for example IA3 or PROMPT_TUNING.")
    try:
        return get_peft_config(given)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"adapter.peft: PEFT does not take this configuration: {error}") from error


def attach(model: Any, config: PeftConfig, seed: int) -> PeftModel:
    """Put a freshly initialised adapter on a base model; the same seed gives the same weights.

    Raises:
        ConfigError: the configuration does not fit the model.
    """
    import torch
    from peft import get_peft_model

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            message = " ".join(str(error).split())
            raise ConfigError(f"the adapter does not fit {type(model).__name__}: {message[:400]}") from error
    return adapted.eval()  # type: ignore[no-any-return]


def detach(model: PeftModel) -> Any:
    """The base model, as it was before :func:`attach`."""
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        base = model.get_base_model()
    else:
        base = model.unload()
    # PEFT marks the base; without this the next attach warns of a second adapter
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base.requires_grad_(False)


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Context in which the adapter is switched off: the model equals its base bit for bit.

    So the teacher needs no second copy of the model. Does nothing on a bare model.
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


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of the adapter's weights on the CPU, from which training can go on."""
    from peft import get_peft_model_state_dict

    if model.active_peft_config.is_prompt_learning:
        # PEFT keeps what the encoder of p-tuning computes, not the encoder itself
        state = model.prompt_encoder.state_dict(prefix="prompt_encoder.")
    else:
        # the base's embeddings never change size here, and looking whether they did asks the hub
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def load_adapter_state(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Set the adapter's weights, from :func:`adapter_state` or from a file that PEFT has written.

    Raises:
        ConfigError: the weights are of another adapter.
    """
    from peft import set_peft_model_state_dict

    config: Any = model.active_peft_config
    try:
        if not config.is_prompt_learning:
            result: Any = set_peft_model_state_dict(model, dict(state))
            unexpected = result.unexpected_keys
        elif "prompt_embeddings" in state:
            set_peft_model_state_dict(model, dict(state))
            # these are the encoder's outputs, to be used as they are
            config.inference_mode = True
            unexpected = []
        else:
            config.inference_mode = False
            prefix = "prompt_encoder."
            weights = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            unexpected = model.prompt_encoder.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:  # other shapes
        raise ConfigError(f"these adapter weights do not fit the model: {error}") from error
    if unexpected:
        raise ConfigError(f"these adapter weights do not fit the model: {unexpected[:3]} …")
