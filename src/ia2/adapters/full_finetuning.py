"""Full fine-tuning: every weight is trained, and the base stays at hand as a frozen copy.

PEFT has no such thing, so :class:`FullModel` has the parts of ``PeftModel``'s interface that this package
uses. Half-precision weights are trained as float32 under autocast: at a rate of 1e-5 most steps are
smaller than the distance between two neighbouring bfloat16 numbers, and would be rounded away.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ia2.utils.errors import ConfigError, ModelError


@dataclass
class FullConfig:
    """What stands where an adapter has its PEFT configuration."""

    peft_type: str = "FULL"
    is_prompt_learning: bool = False


@dataclass
class _Slot:
    """One weight: the modules that hold it, the trained parameter and the frozen one."""

    holders: list[tuple[nn.Module, str]]
    trained: nn.Parameter
    frozen: nn.Parameter

    def hold(self, wanted: nn.Parameter) -> None:
        for module, leaf in self.holders:
            module._parameters[leaf] = wanted


class FullModel(nn.Module):
    """A model whose every floating point weight is trained; the original weights are kept.

    The trained weights are new parameters. :meth:`disable_adapter` puts the original ones back into
    their modules for a while, which costs nothing, is exact, and leaves modules, hooks and the
    optimiser's parameters alone. Memory: the base once, a float32 copy, and what the optimiser needs.

    Buffers are not trained, and none that a forward pass changes exist in causal language models
    (rotary tables and masks follow from the configuration).

    Args:
        model: the base model; it holds the trained weights until :meth:`unload`.

    Raises:
        ConfigError: a quantised model, whose weights cannot be trained.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if is_quantized(model):
            raise ConfigError(QUANTIZED)
        self.base_model = model
        self.active_peft_config = FullConfig()
        self._adapters_disabled = False
        self._depth = 0
        self._autocast = model.dtype if model.dtype.itemsize < 4 else None
        self._slots = _slots(model)
        for slot in self._slots:
            slot.hold(slot.trained)

    def __getattr__(self, name: str) -> Any:
        """What this wrapper has not is the model's: its configuration, device, embeddings, …"""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: asking it would ask here again
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass."""
        with self._precision():
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generation."""
        with self._precision():
            return self.base_model.generate(*args, **kwargs)

    def _precision(self) -> AbstractContextManager[Any]:
        if self._autocast is None or self._depth:
            return nullcontext()
        return torch.autocast(self.base_model.device.type, dtype=self._autocast)

    def get_base_model(self) -> Any:
        """The transformers model."""
        return self.base_model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the model has its original weights. May be nested.

        Raises:
            ModelError: something has replaced the weights, as FSDP does when it shards them.
        """
        if not self._depth:
            self._check_holders()
            for slot in self._slots:
                if slot.frozen.device != slot.trained.device:  # the model was moved meanwhile
                    slot.frozen.data = slot.frozen.data.to(slot.trained.device)
                slot.hold(slot.frozen)
        self._depth += 1
        self._adapters_disabled = True
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._adapters_disabled = False
                for slot in self._slots:
                    slot.hold(slot.trained)

    def _check_holders(self) -> None:
        for slot in self._slots:
            for module, leaf in slot.holders:
                if module._parameters.get(leaf) is not slot.trained:
                    raise ModelError(
                        f"the weight {leaf} of a {type(module).__name__} was replaced since full fine-tuning "
                        "began (FSDP does so), so the base model is not at hand. Set targets to store."
                    )

    def state(self) -> dict[str, torch.Tensor]:
        """All weights as they are trained, tied ones once; no copies.

        Raises:
            RuntimeError: inside :meth:`disable_adapter`, where these are the base's.
        """
        if self._depth:
            raise RuntimeError("the original weights are in place; leave disable_adapter() first")
        tied = self._tied_names()
        return {k: v.detach() for k, v in self.base_model.state_dict().items() if k not in tied}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set all weights, from :meth:`state` or from a file that ``save_pretrained`` has written.

        Raises:
            ConfigError: the weights are of another model.
        """
        if self._depth:
            raise RuntimeError("the original weights are in place; leave disable_adapter() first")
        own = self.base_model.state_dict()
        if not set(state) <= set(own):
            state = self._converted(state)
        wanted = {name for name in own if name not in self._tied_names()}
        wrong = sorted(wanted - set(state)) or sorted(set(state) - set(own))
        wrong = wrong or [name for name in state if state[name].shape != own[name].shape]
        if wrong:
            raise ConfigError(f"these weights do not fit the model: {', '.join(wrong[:3])} …")
        self.base_model.load_state_dict(dict(state), strict=False)

    def _tied_names(self) -> set[str]:
        every = {name for name, _ in self.base_model.named_parameters(remove_duplicate=False)}
        return every - {name for name, _ in self.base_model.named_parameters()}

    def _converted(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Names as in memory, for models whose files name weights otherwise (mixtures of experts)."""
        kind: Any = type(self.base_model)
        try:
            loaded, facts = kind.from_pretrained(
                None,
                config=self.base_model.config,
                state_dict=dict(state),
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError, KeyError, AttributeError):
            return state
        if any(facts.get(name) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            return state
        return loaded.state_dict()  # type: ignore[no-any-return]

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the whole model as ``model.safetensors`` (or shards) and its configuration."""
        if self._depth:
            raise RuntimeError("the original weights are in place; leave disable_adapter() first")
        config = self.base_model.config
        dtype = getattr(config, "dtype", None)
        try:
            self.base_model.save_pretrained(folder, **kwargs)
        finally:
            config.dtype = dtype  # saving sets it to that of the trained weights

    def unload(self) -> Any:
        """The base model with its original weights; the trained ones are let go."""
        for slot in self._slots:
            slot.hold(slot.frozen)
        self._slots = []
        return self.base_model


QUANTIZED = (
    "full fine-tuning cannot train the weights of a quantised model. Leave quantization out, or choose "
    "another adapter, such as lora."
)


def is_quantized(model: Any) -> bool:
    """Whether a transformers model holds quantised weights."""
    return bool(getattr(model, "is_quantized", False)) or getattr(model, "hf_quantizer", None) is not None


def _slots(model: nn.Module) -> list[_Slot]:
    """Every floating point weight once, with all the modules that hold it."""
    slots: dict[int, _Slot] = {}
    for module in model.modules():
        for leaf, frozen in module._parameters.items():
            if frozen is None or not frozen.is_floating_point():
                continue
            if id(frozen) not in slots:
                dtype = torch.float32 if frozen.dtype.itemsize < 4 else frozen.dtype
                trained = nn.Parameter(frozen.detach().to(dtype, copy=True))
                frozen.requires_grad_(False)
                slots[id(frozen)] = _Slot([], trained, frozen)
            slots[id(frozen)].holders.append((module, leaf))
    return list(slots.values())
