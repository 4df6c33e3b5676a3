"""Adapters: what is trained. All go through PEFT but ``full``; ``lora`` is the default.

To add an adapter type, add one entry to :data:`ADAPTERS`. Any PEFT configuration can also be given as
it is (``AdapterConfig(peft={...})`` or a ``peft.PeftConfig`` to :func:`attach`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.capture import find_attention_modules, unwrap
from ia2.config import AdapterConfig
from ia2.errors import ConfigError, DataError, ModelError, RunFolderError, suggest

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn

    from ia2.full import FullConfig, FullModel

# Leaf names of value projections: the paper adapts queries, keys and outputs.
_VALUE_NAMES = ("v_proj", "value", "v")

# Leaf names of output projections; elsewhere the last linear layer of the right width is taken.
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")

# PEFT's own file names.
_WEIGHTS = "adapter_model.safetensors"
# What PEFT leaves out: the network that computes the virtual tokens of p-tuning.
_ENCODER = "encoder.safetensors"

# Virtual tokens of these come through the KV cache, those of other prompt learning as embeddings.
_CACHE_TYPES = ("PREFIX_TUNING", "CARTRIDGE")


# ----------------------------------------------------------------------------------- which modules


def attention_projections(model: nn.Module, pattern: str | None = None) -> list[str]:
    """Names of the query, key and output projections (or fused ones), shortest that are unambiguous.

    Returns names as PEFT's ``target_modules`` takes them: the leaf name where it occurs in attention
    only (``q_proj``), with its parent where another module has the same leaf (``attn.c_proj`` on
    GPT-2, whose MLP has a ``c_proj`` too).

    Raises:
        ModelError: the attention modules have no linear layers.
    """
    inner = unwrap(model)
    inside = [
        name
        for parent in _attention(inner, pattern)
        for name in _linear_layers(inner, parent)
        if name.rsplit(".", 1)[-1] not in _VALUE_NAMES
    ]
    if not inside:
        raise ModelError(
            f"no linear layers found in the attention modules of {type(inner).__name__}; "
            "give adapter.target_modules."
        )
    return _short_names(inner, inside)


def output_projections(model: nn.Module, placement: str) -> list[str]:
    """Names of the layers after which bottleneck adapters come, named as PEFT's ``target_modules``.

    ``pfeiffer``: the last linear layer of each MLP, also in a hybrid's layers without attention;
    ``houlsby``: also attention's output projection.

    Raises:
        ModelError: they are not recognised, as where the MLP is a mixture of experts.
    """
    inner = unwrap(model)
    width = inner.config.get_text_config().hidden_size
    found: list[str] = []
    for parent in _attention(inner, None):
        layer = re.match(r"(.*\.\d+)(\.|$)", parent)
        names = [n for n in _linear_layers(inner, layer[1] if layer else "") if _out(inner, n) == width]
        attention = [name for name in names if name.startswith(f"{parent}.")]
        known = [name for name in attention if name.rsplit(".", 1)[-1] in _OUTPUT_NAMES]
        # beside the MLP's last layer a few models have narrow ones that lead back to the full width
        mlp = [name for name in names if name not in attention]
        last = max(reversed(mlp), key=lambda n: _in(inner, n), default=None)
        if layer is None or not attention or last is None or _has_experts(inner, layer[1], parent):
            raise ModelError(
                f"where bottleneck adapters go in {type(inner).__name__} is not known: output projections of "
                f"attention and MLP were not recognised around {parent} (mixtures of experts have none). "
                "Give adapter.target_modules, such as mlp."
            )
        if placement == "houlsby":
            found.append((known or attention)[-1])
        stack, place = layer[1].rsplit(".", 1)[0], last.removeprefix(f"{layer[1]}.")
        alike = re.compile(rf"{re.escape(stack)}\.\d+\.{re.escape(place)}")
        found += [name for name in _linear_layers(inner, stack) if alike.fullmatch(name)]
    return _short_names(inner, found)


def _attention(inner: nn.Module, pattern: str | None) -> list[str]:
    linear = _linear_kinds()
    names = [name for name, _ in find_attention_modules(inner, pattern).values()]
    # where the output projection itself is hooked (Bloom), its parent is the attention module
    return [n.rsplit(".", 1)[0] if isinstance(inner.get_submodule(n), linear) else n for n in names]


def _linear_kinds() -> tuple[type, ...]:
    import torch
    from transformers.pytorch_utils import Conv1D

    return torch.nn.Linear, Conv1D


def _linear_layers(inner: nn.Module, parent: str) -> list[str]:
    kinds = _linear_kinds()
    root = inner.get_submodule(parent)
    return [n for n, module in root.named_modules(prefix=parent) if isinstance(module, kinds) and n != parent]


def _out(inner: nn.Module, name: str) -> int:
    module: Any = inner.get_submodule(name)
    return module.nf if hasattr(module, "nf") else module.out_features


def _in(inner: nn.Module, name: str) -> int:
    module: Any = inner.get_submodule(name)
    return module.nx if hasattr(module, "nx") else module.in_features


def _has_experts(inner: nn.Module, layer: str, attention: str) -> bool:
    """Whether a layer holds the weights of several experts in one tensor."""
    import torch

    modules = inner.get_submodule(layer).named_modules(prefix=layer)
    return any(
        weight.dim() == 3
        for name, module in modules
        if not f"{name}.".startswith(f"{attention}.") and not isinstance(module, torch.nn.Conv1d)
        for weight in module.parameters(recurse=False)
    )


def _short_names(inner: nn.Module, chosen: list[str]) -> list[str]:
    kinds = _linear_kinds()
    others = {
        name.rsplit(".", 1)[-1]
        for name, module in inner.named_modules()
        if isinstance(module, kinds) and name not in chosen
    }
    names: dict[str, None] = {}
    for name in chosen:
        leaf = name.rsplit(".", 1)[-1]
        names[leaf if leaf not in others else ".".join(name.split(".")[-2:])] = None
    return list(names)


# ------------------------------------------------------------------------------------ adapter types


def _lora(model: nn.Module, config: AdapterConfig, **kind: Any) -> PeftConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank or 8,
        lora_alpha=config.alpha or 8,  # type: ignore[arg-type]  # floats work too
        lora_dropout=config.dropout or 0.0,
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
    from ia2.bottleneck import BottleneckConfig

    names = config.target_modules or output_projections(model, config.placement or "houlsby")
    return BottleneckConfig(
        bottleneck_size=config.bottleneck_size or 16, target_modules=list(names), task_type="CAUSAL_LM"
    )


def _full(model: nn.Module, config: AdapterConfig) -> FullConfig:
    from ia2.full import FullConfig

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
        settings: fields of :class:`~ia2.config.AdapterConfig` that this type has.
        description: one line for people.
    """

    build: Callable[[nn.Module, AdapterConfig], Any]
    learning_rate: float
    settings: tuple[str, ...]
    description: str


_LOW_RANK = ("rank", "alpha", "dropout", "target_modules")

ADAPTERS: dict[str, AdapterType] = {
    "lora": AdapterType(_lora, 1e-3, _LOW_RANK, "low-rank updates of linear layers"),
    "rslora": AdapterType(_rslora, 1e-3, _LOW_RANK, "LoRA scaled by alpha over the root of the rank"),
    "dora": AdapterType(_dora, 1e-3, _LOW_RANK, "LoRA of directions, with magnitudes of their own"),
    "vera": AdapterType(
        _vera, 1e-2, ("rank", "dropout", "target_modules"), "vectors between shared random projections"
    ),
    "ia3": AdapterType(_ia3, 1e-2, ("target_modules",), "factors on the inputs of linear layers"),
    "prefix": AdapterType(_prefix, 1e-2, ("virtual_tokens",), "keys and values before the prompt"),
    "prompt": AdapterType(_prompt, 1e-2, ("virtual_tokens",), "embeddings before the prompt"),
    "p-tuning": AdapterType(
        _p_tuning, 1e-3, ("virtual_tokens",), "embeddings before the prompt, from a small network"
    ),
    "bottleneck": AdapterType(
        _bottleneck,
        1e-3,
        ("bottleneck_size", "placement", "target_modules"),
        "small networks after attention and MLP",
    ),
    "full": AdapterType(_full, 1e-5, (), "every weight of the model"),
}

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
    """The rate that is tried where none is given.

    Raises:
        ConfigError: unknown type.
    """
    if config.peft is None:
        return _adapter_type(config.type).learning_rate
    name = _PEFT_NAMES.get(str(config.peft.get("peft_type")).rsplit(".", 1)[-1])
    return ADAPTERS[name].learning_rate if name else 1e-3


def narrowed(config: AdapterConfig, type: str) -> AdapterConfig:
    """The same settings with another type, without those that it has not.

    Raises:
        ConfigError: unknown type.
    """
    kept = _adapter_type(type).settings
    return AdapterConfig(type=type, **{name: getattr(config, name) for name in kept})


def _adapter_type(name: str) -> AdapterType:
    if name not in ADAPTERS:
        raise ConfigError(
            f"adapter type '{name}' is unknown. Choose one of {', '.join(ADAPTERS)}, or give any "
            f"PEFT configuration under adapter.peft.{suggest(name, list(ADAPTERS))}"
        )
    return ADAPTERS[name]


def peft_config(model: nn.Module, config: AdapterConfig) -> Any:
    """The PEFT configuration that an :class:`AdapterConfig` stands for (``full``: a ``FullConfig``).

    Raises:
        ConfigError: unknown type, or a PEFT dictionary that PEFT does not take.
        ModelError: the model has no modules of the kind that is wanted.
    """
    if config.peft is None:
        made = _adapter_type(config.type).build(model, config)
    else:
        from peft import get_peft_config

        given = {"task_type": "CAUSAL_LM", **config.peft}
        if "peft_type" not in given:
            raise ConfigError("adapter.peft needs the key peft_type, for example IA3 or PROMPT_TUNING.")
        if given["peft_type"] == "BOTTLENECK":
            import ia2.bottleneck  # noqa: F401 - makes the type known to PEFT

        try:
            made = get_peft_config(given)
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"adapter.peft: PEFT does not take this configuration: {error}") from error
    if made.is_prompt_learning:
        _fill_sizes(model, made)
    return made


def _fill_sizes(model: Any, config: Any) -> None:
    """Sizes that PEFT would guess from the names of settings, which is wrong for MPT, Falcon and OPT."""
    text = model.config.get_text_config()
    if config.peft_type in _CACHE_TYPES:
        if None in (config.num_layers, config.num_attention_heads, config.token_dim):
            layers, heads, width = _cache_sizes(model)
            config.num_layers = config.num_layers or layers
            config.num_attention_heads = config.num_attention_heads or heads
            config.token_dim = config.token_dim or heads * width
    else:
        config.num_layers = config.num_layers or text.num_hidden_layers
        config.num_attention_heads = config.num_attention_heads or getattr(text, "num_attention_heads", 1)
        config.token_dim = config.token_dim or model.get_input_embeddings().weight.shape[1]
    if getattr(config, "encoder_hidden_size", 1) is None:
        config.encoder_hidden_size = config.token_dim


# ------------------------------------------------------------------------------------- what cannot work


def check_adapter(model: Any, config: AdapterConfig, *, activation_checkpointing: bool = False) -> None:
    """Refuse an adapter that cannot work, before anything is computed with it.

    What a model does with embeddings or a KV cache is tried out on a few tokens.

    Args:
        model: the base model.
        config: settings of the adapter.
        activation_checkpointing: whether activations are going to be recomputed.

    Raises:
        ConfigError: an unknown type, a setting that the type has not, or things that exclude each other.
        ModelError: the model does not allow for this adapter.
    """
    _check_settings(config)
    kind = type(unwrap(model)).__name__
    peft_type = str((config.peft or {}).get("peft_type", ""))
    prefix = config.type == "prefix" if config.peft is None else peft_type in _CACHE_TYPES
    if prefix and activation_checkpointing:
        raise ConfigError(
            "prefix tuning does not work with activation_checkpointing, which leaves no room for its keys "
            "and values in the KV cache. Leave activation_checkpointing out, or choose prompt or lora."
        )
    if prefix and not _keeps_keys_and_values(model):
        raise ModelError(
            f"prefix tuning needs keys and values in every layer, and {kind} has recurrent or convolutional "
            "ones. Choose another adapter, such as prompt or lora."
        )
    if config.peft is None and config.target_modules:
        _check_targets(model, config.target_modules)
    made = peft_config(model, config)
    _check_quantized(model, made)
    if made.is_prompt_learning and made.peft_type not in _CACHE_TYPES:
        problem = _embedding_problem(model)
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
    has = _adapter_type(config.type).settings
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


def _keeps_keys_and_values(model: Any) -> bool:
    """Whether a KV cache is all that a model keeps of what it has read."""
    if getattr(unwrap(model), "_is_stateful", False):
        return False
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    return all("attention" in kind and "linear" not in kind for kind in kinds)


def _cache_sizes(model: Any) -> tuple[int, int, int]:
    """Layers, heads and width of a head of the KV cache, as one token leaves it.

    Raises:
        ModelError: they differ from layer to layer, or between keys and values.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with _trying(model):
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    shapes = {tuple(t.shape[1::2]) for layer in layers for t in (layer.keys, layer.values)}
    if len(shapes) > 1:
        seen = ", ".join(f"{heads}×{width}" for heads, width in sorted(shapes))
        raise ModelError(
            "prefix tuning needs keys and values of one size in all layers, and those of "
            f"{type(unwrap(model)).__name__} have {seen}. Choose another adapter, such as prompt or lora."
        )
    heads, width = shapes.pop()
    return len(layers), heads, width


def _embedding_problem(model: Any) -> str | None:
    """Why a model cannot read virtual tokens, which are embeddings without ids; None if it can."""
    import torch

    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        return "looks ids up in a table of every layer, and virtual tokens have no ids"
    embed = model.get_input_embeddings()
    ids = torch.arange(9, device=embed.weight.device)[None]
    with _trying(model):
        expected = model(input_ids=ids[:, :-1], use_cache=True)
        try:
            start = model(inputs_embeds=embed(ids[:, :-1]), use_cache=True)
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
            return f"takes no embeddings instead of ids ({' '.join(str(error).split())[:100]})"
        if not _alike(start.logits, expected.logits):
            return "does not do with embeddings what it does with the ids that they are of"
        # PEFT's generate finds by the cache that it has put the virtual tokens there, and gives no
        # position ids, which would not count them
        first, second = getattr(start, "past_key_values", None), getattr(expected, "past_key_values", None)
        if first is None:
            return "returns no KV cache, which answers after virtual tokens are generated with"
        if "position_ids" in inspect.signature(unwrap(model).forward).parameters:
            step: dict[str, Any] = {"input_ids": ids[:, -1:], "use_cache": True}
            found = model(**step, past_key_values=first).logits
            place = ids[:, -1:] * 0 + ids.shape[1] - 1
            if not _alike(found, model(**step, past_key_values=second, position_ids=place).logits):
                return "counts positions anew at every step of an answer unless it is told them"
    return None


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())


@contextmanager
def _trying(model: nn.Module) -> Iterator[None]:
    """No gradient, no dropout."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


# -------------------------------------------------------------------------------------- on and off


def attach(model: Any, config: PeftConfig | FullConfig, seed: int) -> PeftModel | FullModel:
    """Put a freshly initialised adapter on a base model; the same seed gives the same weights.

    Returns:
        In evaluation mode. (IA)³ and VeRA start alike whatever the seed.

    Raises:
        ConfigError: the configuration does not fit the model.
    """
    import torch
    from peft import get_peft_model

    from ia2.full import FullConfig, FullModel

    if isinstance(config, FullConfig):
        return FullModel(model).eval()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            message = " ".join(str(error).split())
            raise ConfigError(f"the adapter does not fit {type(model).__name__}: {message[:400]}") from error
    return adapted.eval()  # type: ignore[no-any-return]


def detach(model: PeftModel | FullModel) -> Any:
    """The base model, as it was before :func:`attach`."""
    from ia2.full import FullModel

    if isinstance(model, FullModel):
        base = model.unload()
    elif getattr(model.active_peft_config, "is_prompt_learning", False):
        base = model.get_base_model()
        # PEFT's generate leaves it there, and with it a reference from the model to itself
        base.__dict__.pop("prepare_inputs_for_generation", None)
    else:
        base = model.unload()
    # PEFT marks the base; without this the next attach warns of a second adapter
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base.requires_grad_(False)


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
    config = getattr(getattr(model, "module", model), "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return 0
    return int(getattr(config, "num_virtual_tokens", 0))


# ------------------------------------------------------------------------------------------- weights


def adapter_state(model: PeftModel | FullModel) -> dict[str, torch.Tensor]:
    """Copies of what is trained on the CPU, from which training can go on."""
    from ia2.full import FullModel

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
    return get_peft_model_state_dict(model, save_embedding_layers=False)  # type: ignore[no-any-return]


def load_adapter_state(model: PeftModel | FullModel, state: Mapping[str, torch.Tensor]) -> None:
    """Set the trained weights, from :func:`adapter_state` or from a file that PEFT has written.

    Raises:
        ConfigError: the weights are of another adapter.
    """
    from peft import set_peft_model_state_dict

    from ia2.full import FullModel

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

    from ia2.full import FullModel

    folder = Path(folder)
    if isinstance(model, FullModel):
        model.save_pretrained(folder)
        return
    card = folder / "README.md"
    before = card.read_bytes() if card.is_file() else None
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


def read_adapter_state(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a folder of :func:`save_adapter`, or of PEFT's or transformers' own saving.

    Returns:
        What :func:`load_adapter_state` takes, and training goes on from exactly.

    Raises:
        DataError: there are none, or a file is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in _weight_files(Path(folder)):
        try:
            state.update(load_file(file))
        except FileNotFoundError:
            raise DataError(f"{file}: no such file.") from None
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file}: cannot be read ({error}).") from error
    return state


def _weight_files(folder: Path) -> list[Path]:
    from ia2.files import read_json

    for name in (_ENCODER, _WEIGHTS, "model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return sorted({folder / name for name in read_json(index)["weight_map"].values()})
        except (RunFolderError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{index}: not an index of weights ({error}).") from error
    raise DataError(f"{folder}: no adapter in it ({_WEIGHTS} or model.safetensors).")
