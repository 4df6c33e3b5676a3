"""Self-attention activations: find the attention modules of any causal model, and read them.

**The activation** is the output of the self-attention module after its output projection and before
the residual addition, ``[tokens, d]`` per layer (the paper, section 3). transformers' own records are
not that: the "attentions" record is the weights, and ``AttentionInterface`` sees the tensor before the
output projection. Other *sites* of the same layers can be read instead, for objectives beside the
paper's (:data:`SITES`).

The hook only stores a reference. Any tensor operation inside it would be recorded by non-reentrant
activation checkpointing and break its recomputation; slicing happens outside.
"""

from __future__ import annotations

import fnmatch
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ia2.models.tokens import Batch, answer_index
from ia2.utils.errors import ModelError
from ia2.utils.logging import logger

if TYPE_CHECKING:
    import torch
    from torch import nn

# Children that are an attention module's output projection, over the families that transformers has.
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")

# The last projection of a layer's MLP, over the same families.
_DOWN_PROJECTIONS = ("down_proj", "dense_4h_to_h", "fc2", "fc_out", "c_proj", "w2")

SITES = ("output", "heads", "residual", "weights", "neurons")
"""What of a layer is read: ``output`` (the activation), ``heads`` (the heads' outputs side by side, before
the output projection), ``residual`` (the residual stream after the layer), ``weights`` (attention
probabilities), ``neurons`` (what the MLP's last projection is given; not of mixtures of experts)."""

# Models of which a line in the log has said that only some of their layers have attention.
_told: weakref.WeakSet[Any] = weakref.WeakSet()


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


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Attention that gives its weights, for the site ``weights``, while this context lasts.

    Other implementations (sdpa, flash) never hold the weights. The recomputation of activation
    checkpointing must find what the forward pass found, so a whole stage of training belongs inside.
    Dropout on the weights is off meanwhile: what comes out of the module is the weights *after* it, with
    zeros that no divergence can be computed to.

    Args:
        model: bare or wrapped causal model.
    """
    from torch import nn

    inner = unwrap(model)
    # Each configuration once, an outer one before the inner ones that it passes a change on to. Set there
    # and not by set_attn_implementation, which leaves Falcon out though Falcon reads its configuration.
    configs = {id(m.config): m.config for m in inner.modules() if hasattr(m, "config")}
    implementations = [
        (config, config._attn_implementation)
        for config in configs.values()
        if hasattr(config, "_attn_implementation")
    ]
    dropouts: list[tuple[Any, str, float]] = []
    for attention in inner.modules():
        if "ttention" not in type(attention).__name__:
            continue
        for attribute, value in [*vars(attention).items(), *attention.named_children()]:
            if "dropout" not in attribute or "resid" in attribute or "hidden" in attribute:
                continue
            if isinstance(value, nn.Dropout):
                dropouts.append((value, "p", value.p))
            elif isinstance(value, float):
                dropouts.append((attention, attribute, value))
    try:
        for config, _ in implementations:
            config._attn_implementation = "eager"
        for owner, attribute, _ in dropouts:
            setattr(owner, attribute, 0.0)
        yield
    finally:
        for config, implementation in implementations:
            config._attn_implementation = implementation
        for owner, attribute, rate in dropouts:
            setattr(owner, attribute, rate)


def _is_projection(name: str, module: nn.Module) -> bool:
    """The module itself is an output projection: Bloom's, or one that the user's glob names."""
    return name.rpartition(".")[2] in _OUTPUT_PROJECTIONS or hasattr(module, "weight")


def _attention_of(inner: nn.Module, name: str, module: nn.Module) -> nn.Module:
    return inner.get_submodule(name.rpartition(".")[0]) if _is_projection(name, module) else module


def _projection_of(name: str, module: nn.Module) -> nn.Module:
    if _is_projection(name, module):
        return module
    for child in _OUTPUT_PROJECTIONS:
        if hasattr(module, child):
            return getattr(module, child)  # type: ignore[no-any-return]
    raise ModelError(
        f"the objective heads needs the output projection of {name}, which was not recognised among "
        f"{[n for n, _ in module.named_children()]}. Name it with attention_modules (a glob), or choose "
        "another objective."
    )


def layer_of(inner: nn.Module, name: str) -> nn.Module:
    """The decoder layer that a module is part of: the ancestor that stands in a list of layers."""
    from torch import nn

    path = name
    while path:
        parent = path.rpartition(".")[0]
        if parent and isinstance(inner.get_submodule(parent), nn.ModuleList):
            return inner.get_submodule(path)
        path = parent
    raise ModelError(
        f"the objective residual needs the layer around {name}, which stands in no list of layers. "
        "Choose another objective."
    )


def _down_projection_of(inner: nn.Module, name: str, module: nn.Module) -> nn.Module:
    layer = layer_of(inner, name)
    attention = set(_attention_of(inner, name, module).modules())
    found = {
        path: child
        for path, child in layer.named_modules()
        if path.rpartition(".")[2] in _DOWN_PROJECTIONS and child not in attention and "expert" not in path
    }
    if len(found) == 1:
        return next(iter(found.values()))
    raise ModelError(
        f"no single MLP was recognised in the layer around {name} (a mixture of experts has no neurons of "
        "its own). Leave neurons out."
    )


class Capture(Protocol):
    """What a forward pass is watched by."""

    @property
    def site(self) -> str:
        """What is read."""

    def arm(self) -> None:
        """Start listening for the next forward pass."""

    def disarm(self) -> None:
        """Stop listening, and let go of what was heard."""

    def at_answers(self, batch: Batch, spans: Sequence[int] | None = None) -> torch.Tensor:
        """What the pass over ``batch`` left at its answer positions, ``[L, ΣG, …]``."""


class ActivationCapture:
    """Reads one site of every self-attention layer while a model runs.

    ::

        with ActivationCapture(model) as capture:
            model(**batch)
            activations = capture.take()      # {layer: [B, T, d]}

    Works under autograd, non-reentrant activation checkpointing, PEFT and DDP. Between ``take`` and
    the next forward pass nothing is held. Create it after adapters are attached. For a hybrid model, one
    line of log says how many of its layers have attention (see :meth:`describe`).

    Args:
        model: bare or wrapped causal model.
        pattern: optional glob over module names (see :func:`find_attention_modules`).
        layers: keep only these layer indices.
        site: what is read (:data:`SITES`). ``weights`` needs :func:`eager_attention` around the passes.

    Attributes:
        hooked: layer index → the module at which the site is read.

    Raises:
        ModelError: no attention modules, a layer that is not there, or a site that was not found.
        ValueError: an unknown site.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str | None = None,
        layers: Sequence[int] | None = None,
        site: str = "output",
    ) -> None:
        if site not in SITES:
            raise ValueError(f"site '{site}' is not one of {', '.join(SITES)}")
        inner = unwrap(model)
        self.site = site
        self.modules = find_attention_modules(model, pattern)
        self._attention_layers = list(self.modules)
        if layers is not None:
            missing = sorted(set(layers) - set(self.modules))
            if missing:
                raise ModelError(f"layers {missing} have no self-attention; there are {list(self.modules)}.")
            self.modules = {index: self.modules[index] for index in sorted(set(layers))}
        total = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
        self.total_layers = total if isinstance(total, int) else len(self.modules)
        self.hooked = {index: self._module_at(inner, *found) for index, found in self.modules.items()}
        from ia2.models.sharding import LastShard  # which imports this module

        self._last = LastShard(model, list(self.modules.values())[-1][1])
        self._stored: dict[int, Any] = {}
        self._armed = False
        self._handles: list[Any] = []
        if pattern is None and (line := self.describe()) and inner not in _told:
            _told.add(inner)
            logger.info("%s", line)

    def _module_at(self, inner: nn.Module, name: str, module: nn.Module) -> nn.Module:
        if self.site == "heads":
            return _projection_of(name, module)
        if self.site == "neurons":
            return _down_projection_of(inner, name, module)
        if self.site == "residual":
            return layer_of(inner, name)
        return _attention_of(inner, name, module) if self.site == "weights" else module

    @property
    def layers(self) -> list[int]:
        """Indices of the captured layers."""
        return list(self.modules)

    def describe(self) -> str | None:
        """How many layers have attention, in a line; None where all have."""
        found = self._attention_layers
        if len(found) >= self.total_layers:
            return None
        return (
            f"Hybrid model: {len(found)} of {self.total_layers} layers have full attention "
            f"({', '.join(map(str, found))}); only these are aligned and compared."
        )

    def __enter__(self) -> ActivationCapture:
        for index, module in self.hooked.items():
            hook = self._hook(index)
            if self.site in ("heads", "neurons"):
                self._handles.append(
                    module.register_forward_pre_hook(lambda module, args, hook=hook: hook(module, args, args))
                )
            else:
                self._handles.append(module.register_forward_hook(hook))
        self._handles += self._last.hooks()
        self._armed = True
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stored.clear()
        self._armed = False

    def _hook(self, index: int) -> Callable[..., None]:
        place = 1 if self.site == "weights" else 0

        def keep_reference(module: nn.Module, args: Any, output: Any) -> None:
            # The recomputation of a checkpointed layer in the backward pass runs this again; what it
            # makes is not what the loss was computed from, so it is not kept.
            if self._armed:
                parts = output if isinstance(output, (tuple, list)) else (output,)
                self._stored[index] = parts[place] if len(parts) > place else None

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
        """Hand over what the last forward pass left, and stop listening.

        Returns:
            By layer: ``[B, T, d]``; heads ``[B, T, H·d_head]``; neurons ``[B, T, F]`` (OPT: ``[B·T, F]``);
            weights ``[B, H, T, K]`` over K keys.

        Raises:
            ModelError: a layer was not reached by the forward pass, or gave no weights.
        """
        stored, self._stored, self._armed = self._stored, {}, False
        missing = [index for index in self.modules if index not in stored]
        if missing:
            names = [self.modules[index][0] for index in missing]
            raise ModelError(f"the forward pass did not reach the attention modules {names}.")
        silent = [self.modules[index][0] for index, value in stored.items() if value is None]
        if silent:
            raise ModelError(
                f"{silent[0]} gave no attention weights: they exist in eager attention only. Run inside "
                "ia2.models.capture.eager_attention(model), or choose another objective."
            )
        *before, last = self.modules
        return {**{i: stored[i] for i in before}, last: self._last.begin_with(stored[last])}

    def at_answers(self, batch: Batch, spans: Sequence[int] | None = None) -> torch.Tensor:
        """What the pass over ``batch`` left at its answer positions, rows in order.

        Args:
            batch: what the model was fed; a cached prefix or virtual tokens may stand on its left.
            spans: for the site ``weights``, the number S of last real ids of each row whose weights are
                wanted: those that both contexts share.

        Returns:
            ``[L, ΣG, d]``. Weights: ``[L, ΣG, H, S]`` with S the largest of the spans, each position's
            attention to the last S ids of its own row, made to sum to 1 over them, in float32. The last
            column is the row's last id (0 for positions before it, which do not see it); rows of a
            smaller span have zeros on the left.

        Raises:
            ModelError: see :meth:`take`.
            ValueError: weights without spans.
        """
        import torch

        taken = self.take()
        first = next(iter(taken.values()))
        if self.site == "weights":
            if spans is None:
                raise ValueError("the site 'weights' needs spans, the ids of each row to look at")
            return torch.stack([_over_spans(w, batch, spans).to(first.device) for w in taken.values()])
        count = len(batch.input_ids)
        width = first.reshape(count, -1, first.shape[-1]).shape[1]
        rows, positions = batch.index(width)
        # the layers of one model may sit on several devices; OPT's MLP sees its rows one behind the other
        return torch.stack(
            [
                layer.reshape(count, -1, layer.shape[-1])[
                    rows.to(layer.device), positions.to(layer.device)
                ].to(first.device)
                for layer in taken.values()
            ]
        )

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return ((index, name) for index, (name, _) in self.modules.items())


def _over_spans(weights: torch.Tensor, batch: Batch, spans: Sequence[int]) -> torch.Tensor:
    """Attention ``[B, H, T, K]`` of one layer as :meth:`ActivationCapture.at_answers` gives it.

    Counted from the right end, as answer positions are: K is longer than what was fed behind a cached
    prefix, and shorter than a span where a sliding window has dropped keys, which then had no weight.
    """
    import torch

    lengths, fed = batch.row_lengths, batch.input_ids.shape[1]
    rows, positions = answer_index(weights.shape[2], lengths, batch.answer_lengths, fed)
    rows, positions = rows.to(weights.device), positions.to(weights.device)
    at_answers = weights[rows, :, positions].float()  # [ΣG, H, K]
    widest = max(spans)
    padding = torch.tensor([fed - n for n in lengths], device=weights.device)
    ends = weights.shape[3] - padding[rows]
    columns = ends[:, None] - widest + torch.arange(widest, device=weights.device)  # [ΣG, S]
    starts = ends - torch.tensor(list(spans), device=weights.device)[rows]
    inside = columns >= starts.clamp_min(0)[:, None]
    index = columns.clamp_min(0)[:, None, :].expand(-1, at_answers.shape[1], -1)
    chosen = at_answers.gather(-1, index) * inside[:, None, :]
    return chosen / chosen.sum(-1, keepdim=True).clamp_min(torch.finfo(chosen.dtype).tiny)
