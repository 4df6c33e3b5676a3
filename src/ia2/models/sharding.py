"""A base model in shards: each process of a launch holds a part of every layer, as in FSDP2 and ZeRO-3.

The layers are frozen, so only they are worth sharding: embeddings, head and the adapter are whole in every
process, and the adapter's gradients are averaged as in DDP. A layer is gathered from all processes when it
is run, so all must run it equally often: see :func:`in_step`. The model is sharded as it is loaded, long
before training begins, since the teacher needs it too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from ia2.models.capture import unwrap
from ia2.utils.distributed import host_group, process_state, shards_model, wait
from ia2.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def in_turns(device: torch.device) -> Iterator[None]:
    """Processes of one host come one after the other, where each reads a whole model that it then shards."""
    if not shards_model():
        yield
        return
    _mesh(device.type)  # made by all processes together
    turn, count = (int(os.environ.get(f"LOCAL_{name}", "1")) for name in ("RANK", "WORLD_SIZE"))
    for _ in range(turn):
        wait()
    yield
    for _ in range(count - turn):
        wait()


def on_device(model: nn.Module, device: torch.device) -> None:
    """Move a transformers model to its device; where the launch asks for it, only this process's shards.

    Raises:
        ConfigError: its layers are not known.
    """
    import torch

    if shards_model():
        from torch.distributed.fsdp import fully_shard

        kinds = set(getattr(model, "_no_split_modules", None) or ())
        layers = [module for module in model.modules() if type(module).__name__ in kinds]
        if not layers:
            raise ConfigError(
                f"{type(model).__name__} does not say what its layers are (_no_split_modules), and cannot be "
                "sharded. Launch with `ia2 env --accelerate ddp` instead."
            )
        mesh = _mesh(device.type)
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        # a root, which prefetches layers, without parameters of its own
        trunk: Any = model.base_model
        fully_shard(trunk, mesh=mesh, ignored_params={p for p in model.parameters() if not _in_shards(p)})
    torch.nn.Module.to(model, device)


@cache
def _mesh(device: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (process_state().num_processes,))


def _in_shards(parameter: Any) -> bool:
    return hasattr(parameter, "to_local")


NEEDS_WHOLE = (
    "this adapter reads or trains weights of the model itself, which cannot be done in shards. Take lora, or "
    "launch with `ia2 env --accelerate ddp`."
)


def keep_whole(adapted: Any) -> None:
    """Have DDP leave the shards of a base model alone, and average the gradients of its adapter.

    Raises:
        ConfigError: the adapter trains weights that are in shards.
    """
    shards = {name: p for name, p in adapted.named_parameters() if _in_shards(p)}
    if not shards:
        return
    if any(parameter.requires_grad for parameter in shards.values()):
        raise ConfigError(NEEDS_WHOLE)
    adapted._ddp_params_and_buffers_to_ignore = list(shards)


class LastShard:
    """Has the backward pass of a loss on activations inside of layers begin at the end of the last one.

    A layer in shards is gathered anew when the gradient of its output comes. A loss on what the last aligned
    layer computes within itself would give its output none. Nothing is done where the model is whole.

    Args:
        model: bare or PEFT model.
        module: the last one whose activations are read.
    """

    def __init__(self, model: Any, module: nn.Module) -> None:
        around = [shard for shard in _shards_of(model) if any(inner is module for inner in shard.modules())]
        self._layer = around[-1] if around else None  # the innermost
        self._output: Any = None

    def hooks(self) -> list[Any]:
        """Handles of what it needs to hear while activations are captured."""

        def keep(module: Any, given: Any, output: Any) -> None:
            self._output = output[0] if isinstance(output, tuple) else output

        return [] if self._layer is None else [self._layer.register_forward_hook(keep)]

    def begin_with(self, activations: torch.Tensor) -> torch.Tensor:
        """The same activations, whose gradient sends one of zeros to the output of the last layer."""
        output, self._output = self._output, None
        if output is None or not output.requires_grad:
            return activations
        found: torch.Tensor = _both()(activations, output)
        return found


@cache
def _both() -> Any:
    import torch

    class Both(torch.autograd.Function):
        """The first of two tensors, and no gradient but a path to the second."""

        @staticmethod
        def forward(context: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            context.zeros = second.new_zeros(()).expand_as(second)
            return first.view_as(first)

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return gradient, context.zeros

    return Both.apply


_inside = False


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Forward passes of processes that share the layers of a model, but not the rows they work on.

    Each pass begins with a word to the others. A process that has made all of its passes goes on with passes
    over a single token until the last one is done; so they may differ in number and size.

    Args:
        model: bare or PEFT model; nothing is done where it is whole.
    """
    global _inside
    shards = [] if _inside else _shards_of(model)
    if not shards:
        yield
        return
    with ExitStack() as stack:
        stack.callback(_leave)
        handle = shards[1].register_forward_pre_hook(lambda *_: _told(True), prepend=True)
        stack.callback(handle.remove)
        _inside = True
        yield
        handle.remove()
        while _told(False):
            _pass_over_one_token(model)


def stepping() -> bool:
    """Whether passes are in step now: one that fails half-way must not be made again by one process alone."""
    return _inside


def _leave() -> None:
    global _inside
    _inside = False


def _shards_of(model: Any) -> list[Any]:
    """The root and the layers of a model in shards; nothing of a whole one."""
    if not shards_model():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in unwrap(model).modules() if isinstance(module, FSDPModule)]


def _told(running: bool) -> bool | None:
    """Tell the others whether this process makes another pass; returns whether any does."""
    import torch

    count = torch.tensor(int(running))
    torch.distributed.all_reduce(count, group=host_group())
    return None if running else bool(count)


def _pass_over_one_token(model: Any) -> None:
    import torch

    inner = unwrap(model)
    with torch.no_grad():
        inner(input_ids=torch.zeros(1, 1, dtype=torch.long, device=inner.device), use_cache=False)
