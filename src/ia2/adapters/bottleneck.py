"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2020) in PEFT's shape, which has none.

After a module with output ``y`` comes ``y + up(act(down(y)))``, with ``up`` zero at first. Importing
this module makes the type known to PEFT, so ``get_peft_model``, ``save_pretrained`` and
``PeftModel.from_pretrained`` work as with any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, mapping
from peft import __version__ as peft_version
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ia2.utils.errors import ConfigError, ModelError

PEFT_TYPE = "BOTTLENECK"
ACTIVATIONS: dict[str, Any] = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings of bottleneck adapters; written to ``adapter_config.json``."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules after which an adapter comes: names, or a regex."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules left out."})
    bottleneck_size: int = field(default=16, metadata={"help": "Width of the bottleneck."})
    non_linearity: str = field(default="gelu", metadata={"help": "gelu or relu."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained whole."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT's own types are members of an enumeration of strings; a plain string is equal to such
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        if self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size must be at least 1, not {self.bottleneck_size}")
        if self.non_linearity not in ACTIVATIONS:
            raise ValueError(f"non_linearity '{self.non_linearity}' is not one of {', '.join(ACTIVATIONS)}")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module with bottleneck adapters on its output, one a name.

    Args:
        base_layer: any module whose output is a tensor ``[..., width]``.
        adapter_name: PEFT's name of the first adapter.
        config: its settings.
        width: last dimension of the output.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_activation",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, width: int
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width = width
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_activation: dict[str, str] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter that changes nothing yet."""
        up = nn.Linear(config.bottleneck_size, self.width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name] = nn.Linear(self.width, config.bottleneck_size)
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_activation[adapter_name] = config.non_linearity
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, Any]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:  # not a single layer: a whole MLP, say
            parameter = next(base_layer.parameters(), None)
            if parameter is not None:
                device, dtype = parameter.device, parameter.dtype
        return device, dtype

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output ``[..., width]``, adapted unless adapters are switched off."""
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output  # type: ignore[no-any-return]
        if not isinstance(output, torch.Tensor) or output.shape[-1] != self.width:
            seen = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ModelError(
                f"a bottleneck adapter needs a tensor of width {self.width}, but "
                f"{type(self.base_layer).__name__} returns {seen}. Choose other target_modules."
            )
        result = output
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down: Any = self.bottleneck_down[name]
                up = self.bottleneck_up[name]
                activation = ACTIVATIONS[self.bottleneck_activation[name]]
                inner = activation(down(result.to(down.weight.dtype)))
                result = result + up(inner).to(result.dtype)
        return result


class BottleneckModel(BaseTuner):
    """Puts a :class:`BottleneckLayer` around every target module."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own form

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        width = _output_width(target) or _hidden_size(self.model)
        if width is None:
            raise ValueError(f"the width of what {current_key} returns is not known")
        layer = BottleneckLayer(target, adapter_name, peft_config, width)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        # not _replace_module: it wants a weight that tells the device, which a whole MLP has not
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ModelError(
            "bottleneck adapters are not linear, so they cannot be merged into the weights. "
            "Use the adapter as it is, or train a lora."
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not possible.

        Raises:
            ModelError: always.
        """
        self._check_merge_allowed()


def _output_width(module: nn.Module) -> int | None:
    """Last dimension of a linear layer's output; transformers' Conv1D calls it ``nf``."""
    width = getattr(module, "out_features", None) or getattr(module, "nf", None)
    return width if isinstance(width, int) else None


def _hidden_size(model: Any) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "hidden_size", None)


def _register() -> None:
    """Make the type known to PEFT, whose own way of doing so takes its own types only.

    Raises:
        ConfigError: this PEFT keeps its types elsewhere.
    """
    tables: dict[str, Any] = {
        "PEFT_TYPE_TO_CONFIG_MAPPING": BottleneckConfig,
        "PEFT_TYPE_TO_TUNER_MAPPING": BottleneckModel,
        "PEFT_TYPE_TO_PREFIX_MAPPING": BottleneckModel.prefix,
    }
    # before PEFT asked the tuner what belongs to it, saving refused types that are not its own
    known = hasattr(BaseTuner, "_get_adapter_state_dict")
    if not known or not all(isinstance(getattr(mapping, name, None), dict) for name in tables):
        raise ConfigError(
            f"bottleneck adapters do not work with PEFT {peft_version} (but with 0.21, for example). Install "
            "another version of peft, or choose another adapter, such as lora."
        )
    for name, entry in tables.items():
        getattr(mapping, name)[PEFT_TYPE] = entry


_register()
