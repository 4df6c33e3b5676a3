"""Adapter types: what is trained. All go through PEFT but ``full``; ``lora`` is the default.

To add one, add one entry to :data:`ADAPTERS`, and its name to :data:`ia2.config.recipes.ADAPTER_NAMES`. Any
PEFT configuration can also be given as it is (``AdapterConfig(peft={...})`` or a ``peft.PeftConfig`` to
:func:`ia2.adapters.weights.attach`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ia2.adapters.modules import attention_projections, output_projections
from ia2.adapters.trials import cache_sizes
from ia2.config.sections import AdapterConfig
from ia2.models.capture import unwrap
from ia2.utils.errors import ConfigError, suggest
from ia2.utils.imports import without_bitsandbytes

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from ia2.adapters.full_finetuning import FullConfig

# Virtual tokens of these come through the KV cache, those of other prompt learning as embeddings.
CACHE_TYPES = ("PREFIX_TUNING", "CARTRIDGE")


def _lora(model: nn.Module, config: AdapterConfig, **kind: Any) -> PeftConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank or 8,
        lora_alpha=config.alpha or 8,  # type: ignore[arg-type]  # floats work too
        lora_dropout=config.dropout or 0.0,
        lora_bias=config.bias or False,
        target_modules=_projections(model, config),
        fan_in_fan_out=_is_transposed(model),
        task_type="CAUSAL_LM",
        **kind,
    )


def _rslora(model: nn.Module, config: AdapterConfig) -> PeftConfig:
    return _lora(model, config, use_rslora=True)


def _dora(model: nn.Module, config: AdapterConfig) -> PeftConfig:
    return _lora(model, config, use_dora=True)


def _vera(model: nn.Module, config: AdapterConfig) -> PeftConfig:
    from peft import VeraConfig

    return VeraConfig(
        r=config.rank or 256,
        vera_dropout=config.dropout or 0.0,
        target_modules=_projections(model, config),
        fan_in_fan_out=_is_transposed(model),
        task_type="CAUSAL_LM",
    )


def _ia3(model: nn.Module, config: AdapterConfig) -> PeftConfig:
    from peft import IA3Config

    names = _projections(model, config)
    return IA3Config(
        target_modules=names,
        feedforward_modules=names,  # the inputs are scaled, of all of them (METHOD: hyper-parameters)
        fan_in_fan_out=_is_transposed(model),
        task_type="CAUSAL_LM",
    )


def _prefix(model: nn.Module, config: AdapterConfig) -> PeftConfig:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(num_virtual_tokens=config.virtual_tokens or 16, task_type="CAUSAL_LM")


def _prompt(model: nn.Module, config: AdapterConfig) -> PeftConfig:
    from peft import PromptTuningConfig

    return PromptTuningConfig(
        num_virtual_tokens=config.virtual_tokens or 16,
        # PEFT's own default, normal noise, is many times larger than any embedding
        prompt_tuning_init="SAMPLE_VOCAB",
        task_type="CAUSAL_LM",
    )


def _p_tuning(model: nn.Module, config: AdapterConfig) -> PeftConfig:
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(num_virtual_tokens=config.virtual_tokens or 16, task_type="CAUSAL_LM")


def _bottleneck(model: nn.Module, config: AdapterConfig) -> PeftConfig:
    from ia2.adapters.bottleneck import BottleneckConfig

    names = config.target_modules or output_projections(model, config.placement or "houlsby")
    return BottleneckConfig(
        bottleneck_size=config.bottleneck_size or 16, target_modules=list(names), task_type="CAUSAL_LM"
    )


def _full(model: nn.Module, config: AdapterConfig) -> FullConfig:
    from ia2.adapters.full_finetuning import FullConfig

    return FullConfig()


def _projections(model: nn.Module, config: AdapterConfig) -> list[str]:
    return list(config.target_modules or attention_projections(model))


def _is_transposed(model: nn.Module) -> bool:
    """Whether linear layers keep their weights transposed, as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in unwrap(model).modules())


@dataclass(frozen=True)
class AdapterType:
    """A named kind of adapter.

    Attributes:
        build: base model and settings to a PEFT configuration (``full``: a ``FullConfig``).
        learning_rate: the rate that is tried where none is given.
        settings: fields of :class:`~ia2.config.sections.AdapterConfig` that this type has.
        description: one line for people.
    """

    build: Callable[[nn.Module, AdapterConfig], Any]
    learning_rate: float
    settings: tuple[str, ...]
    description: str


_LOW_RANK = ("rank", "alpha", "dropout", "target_modules")

ADAPTERS: dict[str, AdapterType] = {
    "lora": AdapterType(_lora, 1e-3, (*_LOW_RANK, "bias"), "low-rank updates of linear layers"),
    "rslora": AdapterType(
        _rslora, 1e-3, (*_LOW_RANK, "bias"), "LoRA scaled by alpha over the root of the rank"
    ),
    "dora": AdapterType(_dora, 1e-3, _LOW_RANK, "LoRA of directions, with magnitudes of their own"),
    "vera": AdapterType(
        _vera, 3e-2, ("rank", "dropout", "target_modules"), "vectors between shared random projections"
    ),
    "ia3": AdapterType(_ia3, 3e-2, ("target_modules",), "factors on the inputs of linear layers"),
    "prefix": AdapterType(_prefix, 1e-2, ("virtual_tokens",), "keys and values before the prompt"),
    "prompt": AdapterType(_prompt, 3e-2, ("virtual_tokens",), "embeddings before the prompt"),
    "p-tuning": AdapterType(
        _p_tuning, 1e-3, ("virtual_tokens",), "embeddings before the prompt, from a small network"
    ),
    "bottleneck": AdapterType(
        _bottleneck,
        3e-3,
        ("bottleneck_size", "placement", "target_modules"),
        "small networks after attention and MLP",
    ),
    "full": AdapterType(_full, 3e-5, (), "every weight of the model"),
}

# What an adapter_config.json says beside what the adapter is: of whom it was, and that it was finished.
_OF_A_FILE = (
    *("task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
)

_PEFT_NAMES = {
    "LORA": "lora",
    "VERA": "vera",
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "p-tuning",
    "BOTTLENECK": "bottleneck",
}


def default_learning_rate(config: AdapterConfig) -> float:
    """The rate that is tried where none is given; from the study ``results/adapters/learning_rates.md``."""
    if config.peft is None:
        return ADAPTERS[config.type].learning_rate
    name = _PEFT_NAMES.get(str(config.peft.get("peft_type")).rsplit(".", 1)[-1])
    return ADAPTERS[name].learning_rate if name else 1e-3


def narrowed(config: AdapterConfig, type: str) -> AdapterConfig:
    """The same settings with another type, without those that it has not."""
    kept = ADAPTERS[type].settings
    return AdapterConfig(type=type, **{name: getattr(config, name) for name in kept})


def peft_config(model: nn.Module, config: AdapterConfig) -> Any:
    """The PEFT configuration that an :class:`AdapterConfig` stands for (``full``: a ``FullConfig``).

    Raises:
        ConfigError: a PEFT dictionary that PEFT does not take.
        ModelError: the model has no modules of the kind that is wanted.
    """
    with without_bitsandbytes():
        import peft
    if config.peft is None:
        made = ADAPTERS[config.type].build(model, config)
    else:
        given = _what_is_made(config.peft)
        try:
            made = peft.get_peft_config(given)
        except Exception as error:  # whatever the checks of this type raise
            said = " ".join(str(error).split())[:400]
            raise ConfigError(f"adapter.peft: PEFT does not take this configuration: {said}") from error
        tokens = getattr(made, "num_virtual_tokens", None)
        if made.is_prompt_learning and (not isinstance(tokens, int) or tokens < 1):
            raise ConfigError("adapter.peft: num_virtual_tokens must be a whole number of at least 1.")
    if made.is_prompt_learning:
        _fill_sizes(model, made)
    return made


def _what_is_made(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a PEFT dictionary that say what adapter it is, of a causal model.

    Raises:
        ConfigError: it is of another kind of model, or of a type that PEFT has not.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if "peft_type" not in given:
        raise ConfigError("adapter.peft needs the key peft_type, for example IA3 or PROMPT_TUNING.")
    kind, task = given["peft_type"], given.get("task_type")
    if kind == "BOTTLENECK":
        import ia2.adapters.bottleneck  # noqa: F401 - makes the type known to PEFT

    known = [getattr(name, "value", name) for name in PEFT_TYPE_TO_CONFIG_MAPPING]
    if kind not in known:
        raise ConfigError(f"adapter.peft: PEFT has no peft_type {kind!r}.{suggest(str(kind), known)}")
    if task not in (None, "CAUSAL_LM"):
        raise ConfigError(
            f"adapter.peft: task_type is {task!r}, and only causal models are trained here. Set it to "
            "CAUSAL_LM, or leave it out."
        )
    return {"task_type": "CAUSAL_LM", **{k: v for k, v in given.items() if k not in _OF_A_FILE}}


def _fill_sizes(model: Any, config: Any) -> None:
    """Sizes that PEFT would guess from the names of settings, which is wrong for MPT, Falcon and OPT."""
    text = model.config.get_text_config()
    if config.peft_type in CACHE_TYPES:
        if None in (config.num_layers, config.num_attention_heads, config.token_dim):
            layers, heads, width = cache_sizes(model)
            config.num_layers = config.num_layers or layers
            config.num_attention_heads = config.num_attention_heads or heads
            config.token_dim = config.token_dim or heads * width
    else:
        config.num_layers = config.num_layers or text.num_hidden_layers
        config.num_attention_heads = config.num_attention_heads or getattr(text, "num_attention_heads", 1)
        config.token_dim = config.token_dim or model.get_input_embeddings().weight.shape[1]
    if getattr(config, "encoder_hidden_size", 1) is None:
        config.encoder_hidden_size = config.token_dim
