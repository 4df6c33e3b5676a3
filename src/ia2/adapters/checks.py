"""What cannot work is refused before anything is computed with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ia2.adapters.trials import embedding_problem, is_out_of_memory, trial
from ia2.adapters.types import ADAPTERS, CACHE_TYPES, peft_config
from ia2.adapters.weights import attach, detach, virtual_tokens_of
from ia2.config.sections import AdapterConfig
from ia2.models.capture import unwrap
from ia2.models.families import keeps_keys_and_values
from ia2.utils.errors import ConfigError, ModelError, UserError, suggest

if TYPE_CHECKING:
    from torch import nn


def check_adapter(model: Any, config: AdapterConfig, *, activation_checkpointing: bool = False) -> int:
    """Refuse an adapter that cannot work, before anything is computed with it.

    What a model does with embeddings or a KV cache is tried out on a few tokens.

    Args:
        model: the base model.
        config: settings of the adapter.
        activation_checkpointing: whether activations are going to be recomputed.

    Returns:
        The tokens of the context window that it takes before every prompt.

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
        _check_targets(model, config.target_modules, "adapter.target_modules")
    made = peft_config(model, config)
    _check_quantized(model, made)
    if config.peft is not None:
        _check_peft(model, config.peft, made)
    if made.is_prompt_learning and made.peft_type not in CACHE_TYPES:
        problem = embedding_problem(model)
        if problem:
            raise ModelError(f"{kind} {problem}. Choose another adapter, such as lora.")
    return virtual_tokens_of(made)


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


def _check_peft(model: Any, given: Mapping[str, Any], made: Any) -> None:
    """Refuse what PEFT takes, and then trains nothing, another model than the adapter, or breaks."""
    for key in ("target_modules", "feedforward_modules", "modules_to_save"):
        if isinstance(wanted := given.get(key), (list, tuple)):
            _check_targets(model, wanted, f"adapter.peft.{key}")
    start = given.get("init_lora_weights", True)
    if not (isinstance(start, bool) or start in ("gaussian", "orthogonal")):
        raise ConfigError(
            f"adapter.peft: init_lora_weights {start!r} needs data or changes the base model, which is the "
            "teacher. Leave it out, or set it to gaussian or orthogonal."
        )
    if given.get("layer_replication") or made.is_adaption_prompt:
        what = "layer_replication" if given.get("layer_replication") else made.peft_type.value
        raise ConfigError(
            f"adapter.peft: {what} cannot be taken off the base model again, which is the teacher. Choose "
            "another adapter, such as LORA."
        )
    _try_out(model, made)


def _try_out(model: Any, made: Any) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    adapted = None
    try:
        adapted = attach(model, made, 0)
        trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
        if not trained:
            raise ConfigError("adapter.peft: this adapter has nothing to train.")
        for name, parameter in trained:
            if id(parameter) in own:
                raise ConfigError(
                    f"adapter.peft: {name} of the base model would be trained, which is the teacher. Leave "
                    "out what asks for it, such as bias."
                )
        trial(model, adapted)
    except UserError:
        raise
    except Exception as error:  # whatever such an adapter raises
        if is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"adapter.peft: {made.peft_type.value} does not work with {type(unwrap(model)).__name__}: {said}"
        ) from error
    finally:
        if adapted is not None:
            detach(adapted)


def _check_targets(model: nn.Module, wanted: Sequence[str], place: str) -> None:
    inner = unwrap(model)
    names = [name for name, _ in inner.named_modules() if name]
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            raise ConfigError(
                f"{place}: {type(inner).__name__} has no module named '{target}'.{suggest(target, leaves)}"
            )


def _check_quantized(model: Any, made: Any) -> None:
    from ia2.adapters.full_finetuning import QUANTIZED, FullConfig, is_quantized

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
