"""What cannot work is refused before anything is computed with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ia2.adapter_trials import embedding_problem, keeps_keys_and_values
from ia2.adapters import ADAPTERS, CACHE_TYPES, peft_config
from ia2.capture import unwrap
from ia2.config_sections import AdapterConfig
from ia2.errors import ConfigError, ModelError, suggest

if TYPE_CHECKING:
    from torch import nn


def check_adapter(model: Any, config: AdapterConfig, *, activation_checkpointing: bool = False) -> None:
    """Refuse an adapter that cannot work, before anything is computed with it.

    What a model does with embeddings or a KV cache is tried out on a few tokens.

    Args:
        model: the base model.
        config: settings of the adapter.
        activation_checkpointing: whether activations are going to be recomputed.

    Raises:
        ConfigError: a setting that the type has not, or things that exclude each other.
        ModelError: the model does not allow for this adapter.
    """
    _check_settings(config)
    kind = type(unwrap(model)).__name__
    peft_type = str((config.peft or {}).get("peft_type", ""))
    prefix = config.type == "prefix" if config.peft is None else peft_type in CACHE_TYPES
    if prefix and activation_checkpointing:
        raise ConfigError(
            "prefix tuning does not work with activation_checkpointing, which leaves no room for its keys "
            "and values in the KV cache. Leave activation_checkpointing out, or choose prompt or lora."
        )
    if prefix and not keeps_keys_and_values(model):
        raise ModelError(
            f"prefix tuning needs keys and values in every layer, and {kind} has recurrent or convolutional "
            "ones. Choose another adapter, such as prompt or lora."
        )
    if config.peft is None and config.target_modules:
        _check_targets(model, config.target_modules)
    made = peft_config(model, config)
    _check_quantized(model, made)
    if made.is_prompt_learning and made.peft_type not in CACHE_TYPES:
        problem = embedding_problem(model)
        if problem:
            raise ModelError(f"{kind} {problem}. Choose another adapter, such as lora.")


def _check_settings(config: AdapterConfig) -> None:
    known = [name for name in AdapterConfig.model_fields if name not in ("type", "peft")]
    given = [name for name in known if getattr(config, name) is not None]
    if config.peft is not None:
        if config.type != AdapterConfig.model_fields["type"].default:
            given = ["type", *given]
        if given:
            raise ConfigError(
                f"adapter.peft is a whole configuration, and adapter.{given[0]} is given beside it. "
                "Leave one of them out."
            )
        return
    has = ADAPTERS[config.type].settings
    for name in given:
        if name not in has:
            raise ConfigError(
                f"adapter.{name} is not a setting of {config.type}; it has {', '.join(has) or 'none'}."
            )
    if config.placement and config.target_modules:
        raise ConfigError("adapter.placement does nothing beside adapter.target_modules. Leave one out.")


def _check_targets(model: nn.Module, wanted: list[str]) -> None:
    inner = unwrap(model)
    names = [name for name, _ in inner.named_modules() if name]
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            raise ConfigError(
                f"adapter.target_modules: {type(inner).__name__} has no module named '{target}'."
                f"{suggest(target, leaves)}"
            )


def _check_quantized(model: Any, made: Any) -> None:
    from ia2.full import QUANTIZED, FullConfig, is_quantized

    inner = unwrap(model)
    if not is_quantized(inner):
        return
    if isinstance(made, FullConfig):
        raise ConfigError(QUANTIZED)
    # PEFT makes float32 of half-precision outputs there, and cannot take these adapters off again
    if made.peft_type == "IA3":
        raise ConfigError(
            "ia3 does not work with quantised weights in PEFT. Leave quantization out, or choose another "
            "adapter, such as lora."
        )
    eight = getattr(inner, "is_loaded_in_8bit", False)
    if getattr(made, "use_dora", False) and eight and inner.device.type == "cpu":
        raise ConfigError(
            "dora loses the scales of 8-bit weights on a CPU in PEFT. Set quantization to 4bit, or choose "
            "another adapter, such as lora."
        )
