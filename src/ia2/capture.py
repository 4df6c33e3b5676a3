"""Self-attention activations: find the attention modules of any causal model, and read their output.

**The activation** is the output of the self-attention module after its output projection and before
the residual addition, ``[tokens, d]`` per layer (the paper, section 3). transformers' own records are
not that: the "attentions" record is the weights, and ``AttentionInterface`` sees the tensor before the
output projection.

The hook only stores a reference. Any tensor operation inside it would be recorded by non-reentrant
activation checkpointing and break its recomputation; slicing happens outside.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ia2.errors import ModelError
from ia2.tokens import Batch, answer_index

if TYPE_CHECKING:
    import torch
    from torch import nn

# Children that are an attention module's output projection, over the families that transformers has.
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def unwrap(model: Any) -> Any:
    """The transformers model inside DDP and PEFT wrappers."""
    model = getattr(model, "module", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def find_attention_modules(model: nn.Module, pattern: str | None = None) -> dict[int, tuple[str, nn.Module]]:
    """The module of each layer whose output is the activation, in layer order.

    Looked for in this order: the user's glob over module names; the class that the model declares as
    the source of its "attentions" record; modules with a ``layer_idx`` whose class name contains
    "ttention". Hybrid models match in their full-attention layers only.

    Args:
        model: a causal model, bare or wrapped by PEFT or DDP.
        pattern: a glob such as ``model.layers.*.self_attn``, matched against module names of the
            unwrapped model. Layers are numbered by ``layer_idx`` where the module has one.

    Returns:
        Layer index → (module name, module).

    Raises:
        ModelError: nothing matches; the message names module classes that were seen.
    """
    inner = unwrap(model)
    if pattern is not None:
        found = [(n, m) for n, m in inner.named_modules() if fnmatch.fnmatchcase(n, pattern)]
        if not found:
            raise ModelError(
                f"attention_modules: the glob '{pattern}' matches no module of {type(inner).__name__}. "
                f"{_seen(inner)}"
            )
        return _by_layer(found, exact=True)
    found = _declared(inner) or _by_name(inner)
    if not found:
        raise ModelError(
            f"no self-attention modules found in {type(inner).__name__}; name them with "
            f"attention_modules (a glob over module names). {_seen(inner)}"
        )
    return _by_layer(found, exact=False)


def _declared(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of the class that a transformers model records "attentions" from."""
    from transformers.utils.output_capturing import OutputRecorder

    found: list[tuple[str, nn.Module]] = []
    for prefix, part in model.named_modules():
        declared = getattr(type(part), "_can_record_outputs", None) or {}
        recorders = declared.get("attentions")
        if recorders is None:
            continue
        for recorder in recorders if isinstance(recorders, (list, tuple)) else [recorders]:
            layer_name = None
            target: Any = recorder
            if isinstance(recorder, OutputRecorder):
                layer_name, target = recorder.layer_name, recorder.target_class
            if not isinstance(target, type):
                continue
            kind: Any = target
            for name, module in part.named_modules(prefix=prefix):
                # layer_name tells self-attention from cross-attention of the same class
                suffix_fits = layer_name is None or f".{name}".endswith(layer_name)
                if isinstance(module, kind) and suffix_fits and _is_text_layer(name, module):
                    found.append((name, module))
    return found


def _by_name(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if "ttention" in type(module).__name__ and _is_text_layer(name, module)
    ]


def _is_text_layer(name: str, module: nn.Module) -> bool:
    # Image towers of multimodal models have attention too; it never sees the demonstrations.
    lower = name.lower()
    return hasattr(module, "layer_idx") and "cross" not in lower and "vision" not in lower


def _by_layer(found: Sequence[tuple[str, nn.Module]], *, exact: bool) -> dict[int, tuple[str, nn.Module]]:
    layers: dict[int, tuple[str, nn.Module]] = {}
    seen: set[int] = set()
    for order, (name, module) in enumerate(dict(found).items()):
        if id(module) in seen:
            continue
        seen.add(id(module))
        index = getattr(module, "layer_idx", None)
        index = order if index is None else int(index)
        if index in layers:
            raise ModelError(
                f"two attention modules claim layer {index}: {layers[index][0]} and {name}. "
                "Choose with attention_modules (a glob over module names)."
            )
        layers[index] = (name, module) if exact else _before_residual(name, module)
    return dict(sorted(layers.items()))


def _before_residual(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The output projection, where the attention module itself adds the residual (Bloom)."""
    if "residual" not in inspect.signature(module.forward).parameters:
        return name, module
    for child in _OUTPUT_PROJECTIONS:
        if hasattr(module, child):
            return f"{name}.{child}", getattr(module, child)
    raise ModelError(
        f"{name} adds the residual itself and its output projection was not recognised among "
        f"{[n for n, _ in module.named_children()]}. Name it with attention_modules (a glob)."
    )


def _seen(model: nn.Module) -> str:
    classes: dict[str, str] = {}
    for name, module in model.named_modules():
        if name:
            classes.setdefault(type(module).__name__, name)
    listed = ", ".join(f"{kind} ({name})" for kind, name in list(classes.items())[:20])
    return f"Modules seen: {listed}."


class ActivationCapture:
    """Reads the self-attention output of every layer while a model runs.

    ::

        with ActivationCapture(model) as capture:
            model(**batch)
            activations = capture.take()      # {layer: [B, T, d]}

    Works under autograd, non-reentrant activation checkpointing, PEFT and DDP. Between ``take`` and
    the next forward pass nothing is held. Create it after adapters are attached.

    Args:
        model: bare or wrapped causal model.
        pattern: optional glob over module names (see :func:`find_attention_modules`).
        layers: keep only these layer indices.

    Raises:
        ModelError: no attention modules, or a layer that is not there.
    """

    def __init__(
        self, model: nn.Module, pattern: str | None = None, layers: Sequence[int] | None = None
    ) -> None:
        self.modules = find_attention_modules(model, pattern)
        if layers is not None:
            missing = sorted(set(layers) - set(self.modules))
            if missing:
                raise ModelError(f"layers {missing} have no self-attention; there are {list(self.modules)}.")
            self.modules = {index: self.modules[index] for index in sorted(set(layers))}
        total = getattr(unwrap(model).config.get_text_config(), "num_hidden_layers", None)
        self.total_layers = total if isinstance(total, int) else len(self.modules)
        self._stored: dict[int, torch.Tensor] = {}
        self._armed = False
        self._handles: list[Any] = []

    @property
    def layers(self) -> list[int]:
        """Indices of the captured layers."""
        return list(self.modules)

    def __enter__(self) -> ActivationCapture:
        for index, (_, module) in self.modules.items():
            self._handles.append(module.register_forward_hook(self._hook(index)))
        self._armed = True
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stored.clear()
        self._armed = False

    def _hook(self, index: int) -> Callable[..., None]:
        def keep_reference(module: nn.Module, args: Any, output: Any) -> None:
            # The recomputation of a checkpointed layer in the backward pass runs this again; what it
            # makes is not what the loss was computed from, so it is not kept.
            if self._armed:
                self._stored[index] = output[0] if isinstance(output, (tuple, list)) else output

        return keep_reference

    def arm(self) -> None:
        """Start listening for the next forward pass."""
        self._stored.clear()
        self._armed = True

    def disarm(self) -> None:
        """Stop listening, and let go of what was heard."""
        self._stored.clear()
        self._armed = False

    def take(self) -> dict[int, torch.Tensor]:
        """Hand over what the last forward pass left, ``{layer: [B, T, d]}``, and stop listening.

        Raises:
            ModelError: a layer was not reached by the forward pass.
        """
        stored, self._stored, self._armed = self._stored, {}, False
        missing = [index for index in self.modules if index not in stored]
        if missing:
            names = [self.modules[index][0] for index in missing]
            raise ModelError(f"the forward pass did not reach the attention modules {names}.")
        return {index: stored[index] for index in self.modules}

    def at_answers(self, batch: Batch) -> torch.Tensor:
        """Activations at the answer positions of the batch just run, ``[L, ΣG, d]``, rows in order."""
        import torch

        taken = self.take()
        first = next(iter(taken.values()))
        rows, positions = answer_index(
            first.shape[1], batch.row_lengths, batch.answer_lengths, batch.input_ids.shape[1]
        )
        # the layers of one model may sit on several devices
        return torch.stack(
            [
                layer[rows.to(layer.device), positions.to(layer.device)].to(first.device)
                for layer in taken.values()
            ]
        )

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return ((index, name) for index, (name, _) in self.modules.items())
