"""Rows of different lengths side by side in one sequence, without padding.

A *pack* is one row of ids, ``[1, T]``. Its attention hides the rows of a pack from each other, and their
positions start anew, so that each comes out as on its own. In a pass without gradient, what rows begin with
alike is there once: their ids form a trie, each branch sees the way from the root to itself, and what many
branches share lies in a KV cache. So demonstrations that all queries share, contexts that begin alike, and
labels behind one prompt are one mechanism.

Which models can be packed is measured (:func:`packs`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ia2.models.batching import MAX_LOGITS
from ia2.models.capture import unwrap
from ia2.models.families import evaluating, has_sliding_window, input_device, layer_kinds, takes_cache
from ia2.models.tokens import Batch, Ids, common_prefix
from ia2.utils.logging import logger

if TYPE_CHECKING:
    import torch

# Tokens of a pack. More make matrix products no faster, and every position is compared with the whole pack.
_PACK, _PACK_GPU = 256, 2048

# A common beginning shorter than this is computed with each branch: a pass of its own costs more.
_MIN_SHARED = 16

# What a model's attention is called that takes a pack's rows one after the other.
_ROWS = "ia2_rows"

# By how much log-probabilities in a pack may differ from those of rows on their own, nats.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.5

# Model → kind of adapter and attention → whether it packs.
_known: weakref.WeakKeyDictionary[Any, dict[Any, bool]] = weakref.WeakKeyDictionary()

# Model → the configurations of its parts.
_configs: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def pack_size(model: Any) -> int:
    """Tokens of a pack on the model's device."""
    return _PACK if input_device(model).type == "cpu" else _PACK_GPU


# -------------------------------------------------------------------------------- who can be packed


def packs(model: Any) -> bool:
    """Whether rows of a pack come out as on their own; measured once for a model and a kind of adapter.

    Not where positions are not given to the model (ALiBi), where layers keep a recurrent state, or where an
    adapter puts virtual tokens before the sequence.

    Args:
        model: causal model, bare or PEFT.
    """
    inner = unwrap(model)
    if not takes_cache(model) or not _may_pack(model):
        return False
    active = not getattr(model, "_adapters_disabled", False)
    adapter = getattr(getattr(model, "active_peft_config", None), "peft_type", None) if active else None
    key = (adapter, inner.config._attn_implementation == "eager")
    known = _known.setdefault(inner, {})
    if key not in known:
        known[key] = _agrees(model)
    return known[key]


def _may_pack(model: Any) -> bool:
    inner = unwrap(model)
    parameters = inspect.signature(inner.forward).parameters
    return (
        "position_ids" in parameters
        and "logits_to_keep" in parameters
        and inner.config._attn_implementation in ("sdpa", "eager", _ROWS)
        and not any("chunked" in kind for kind in layer_kinds(model))
    )


def _agrees(model: Any) -> bool:
    """Compare rows that begin alike, in packs behind a cache and without, with each row on its own."""
    import torch

    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = [5 + (7 * i * i + 3 * i) % max(1, vocabulary - 6) for i in range(24)]
    common = tuple(ids[:10])
    rows = [(*common, *ids[10:14]), (*common, *ids[14:19]), tuple(ids[19:24])]
    device = input_device(model)
    try:
        with evaluating(model), torch.no_grad(), row_attention(model):
            plain = [
                model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0, -1]
                for row in rows
            ]
            batch = pack_rows(rows, [1] * len(rows))
            beside = model(**inputs(model, batch), logits_to_keep=batch.keep(device), use_cache=False).logits[
                0
            ]
            found = {
                row: output.logits[places[0]]
                for output in tree_pass(model, rows, [1] * len(rows), logits=True, size=12)
                for row, _, places in output.parts
            }
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.debug("%s takes no packed rows: %s", type(unwrap(model)).__name__, error)
        return False
    tolerance = _TOLERANCE if plain[0].dtype == torch.float32 else _TOLERANCE_HALF
    for i, alone in enumerate(plain):
        expected = alone.float().log_softmax(-1)
        for packed in (beside[i], found[i]):
            difference = (packed.float().log_softmax(-1) - expected).abs().max().item()
            if not difference <= tolerance:
                logger.debug("Packed and plain rows differ by %.3g nats; they are padded.", difference)
                return False
    return True


# --------------------------------------------------------------------------------- rows, side by side


def pack_rows(rows: Sequence[Ids], answer_lengths: Sequence[int]) -> Batch:
    """Rows of ids (see :func:`ia2.models.tokens.fed_ids`) as one pack, one behind the other.

    Example:
        >>> pack_rows([(5, 6, 7), (8, 9)], [1, 2]).position_ids
        tensor([[0, 1, 2, 0, 1]])
    """
    import torch

    lengths = [len(row) for row in rows]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    kept = [place for end, g in zip(ends, answer_lengths, strict=True) for place in range(end - g, end)]
    return Batch(
        torch.tensor([[token for row in rows for token in row]]),
        None,
        list(answer_lengths),
        lengths,
        position_ids=torch.tensor([[place for n in lengths for place in range(n)]]),
        kept=torch.tensor(kept),
    )


def inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """What a model is called with to run a batch, packed or padded: ids, mask, positions.

    To be called, as the model then is, inside :func:`row_attention`.
    """
    model = unwrap(model)  # in DDP too
    device = input_device(model)
    ids = batch.input_ids.to(device)
    if batch.position_ids is None:
        assert batch.attention_mask is not None
        return {"input_ids": ids, "attention_mask": batch.attention_mask.to(device)}
    positions = batch.position_ids.to(device)
    mask = _rows_mask(model, batch.row_lengths, positions[0])
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def _rows_mask(model: Any, lengths: Sequence[int], positions: torch.Tensor) -> Any:
    """What hides the rows of a pack from each other."""
    import torch

    if len(lengths) == 1:
        return None
    window = _window(model)
    if unwrap(model).config._attn_implementation == _ROWS and (window is None or max(lengths) <= window):
        return torch.tensor(lengths)[None, None, None]
    rows = torch.tensor(lengths, device=positions.device)
    row = torch.repeat_interleave(torch.arange(len(rows), device=positions.device), rows)
    visible = (row[:, None] == row) & (positions[:, None] >= positions)
    return layer_mask(model, visible, positions, positions)


@contextmanager
def row_attention(model: Any) -> Iterator[None]:
    """Attention that takes a pack's rows one after the other, while this context lasts.

    A mask over the whole pack would have every position compared with those of all other rows, and thrown
    away. Only where the model's attention is sdpa. The recomputation of activation checkpointing must find
    what the forward pass found, so a whole stage of training belongs inside.

    Args:
        model: causal model, bare or PEFT.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    inner = unwrap(model)
    if inner.config._attn_implementation != "sdpa":
        yield
        return
    if inner not in _configs:  # a search through all modules takes longer than the rest of this function
        found = {id(module.config): module.config for module in inner.modules() if hasattr(module, "config")}
        _configs[inner] = list(found.values())
    AttentionInterface.register(_ROWS, _row_attention)
    AttentionMaskInterface.register(_ROWS, sdpa_mask)
    changed = [c for c in _configs[inner] if getattr(c, "_attn_implementation", None) == "sdpa"]
    try:
        for config in changed:
            config._attn_implementation = _ROWS
        yield
    finally:
        for config in changed:
            config._attn_implementation = "sdpa"


def _row_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention; of a pack, whose mask is its rows' lengths, one row at a time.

    Args:
        module: the attention module.
        query: ``[B, H, T, d_head]``.
        key: ``[B, H_kv, K, d_head]``.
        value: the same.
        attention_mask: integers ``[1, 1, 1, rows]`` of a pack; else what sdpa takes.
        options: handed on.

    Returns:
        ``[B, T, H, d_head]`` and no weights.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[return-value]
    lengths = attention_mask.flatten().tolist()
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def _window(model: Any) -> int | None:
    """How far a layer of the model sees, where one does not see everything."""
    if not has_sliding_window(model):
        return None
    return int(model.config.get_text_config().sliding_window)


def layer_mask(model: Any, visible: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> Any:
    """``visible`` ``[T, K]`` as the model's layers take it: a mask, or one for each kind of layer."""
    import torch

    def numbers(seen: torch.Tensor) -> torch.Tensor:
        # not truth values: eager attention adds them
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]

    dtype = unwrap(model).dtype
    window = _window(model)
    if window is None:
        return numbers(visible)
    near = numbers(visible & (queries[:, None] - keys < window))
    kinds = set(layer_kinds(model))
    if len(kinds) < 2:
        return near
    return {"sliding_attention": near, **{kind: numbers(visible) for kind in kinds - {"sliding_attention"}}}


def groups(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of rows that go into one pack each, longest row first; no pack is longer than ``size``.

    A row that is longer is alone.

    Example:
        >>> groups([30, 90, 60, 8], 100)
        [[1, 3], [2, 0]]
    """
    found: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((p for p, left in enumerate(room) if left >= lengths[i]), None)
        if place is None:
            found.append([i])
            room.append(size - lengths[i])
        else:
            found[place].append(i)
            room[place] -= lengths[i]
    return found


# ------------------------------------------------------------------------------ a trie of rows' ids


@dataclass
class _Node:
    """A run of ids between two branchings.

    Attributes:
        ids: of this node.
        start: how many ids come before it, from the root.
        parent: what it goes on from.
        wanted: row, and its first and (exclusive) last answer position, from the root, in this node.
        children: nodes that go on from here.
        total: ids of this node and of all below.
        keep: answer positions of this node and of all below.
    """

    ids: Ids
    start: int
    parent: _Node | None = None
    wanted: list[tuple[int, int, int]] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)
    total: int = 0
    keep: int = 0

    @property
    def end(self) -> int:
        """Ids from the root to the end of this node."""
        return self.start + len(self.ids)

    def places(self) -> list[int]:
        """Answer positions of any row in this node, from the root."""
        return sorted({place for _, first, end in self.wanted for place in range(first, end)})

    def passed_on(self) -> list[_Node]:
        """The children, each with this node's ids before its own; the first takes what is wanted here."""
        for child in self.children:
            child.ids, child.start, child.parent = self.ids + child.ids, self.start, self.parent
            child.total += len(self.ids)
        self.children[0].wanted += self.wanted
        self.children[0].keep += len(self.places())
        return self.children


def _trie(rows: Sequence[Ids], answer_lengths: Sequence[int]) -> list[_Node]:
    """The first nodes of a trie of these rows, counted; built without recursion, however deep it is."""
    tops: list[_Node] = []
    ends: dict[int, _Node] = {}
    last: _Node | None = None
    before: Ids = ()
    for i in sorted(range(len(rows)), key=rows.__getitem__):
        row = rows[i]
        shared = common_prefix([before, row])
        while last is not None and last.start >= shared:
            last = last.parent
        siblings = tops if last is None else last.children
        if last is not None and last.end > shared:
            # the node is cut in two; what it is known by stays its end
            above = _Node(last.ids[: shared - last.start], last.start, last.parent, children=[last])
            (tops if last.parent is None else last.parent.children)[-1] = above
            last.ids, last.start, last.parent = last.ids[shared - last.start :], shared, above
            last, siblings = above, above.children
        if len(row) > shared:
            last = _Node(row[shared:], shared, last)
            siblings.append(last)
        assert last is not None
        ends[i], before = last, row
    for i, end in ends.items():
        first, node = len(rows[i]) - answer_lengths[i], end
        upper = len(rows[i])
        while True:
            node.wanted.append((i, max(first, node.start), upper))
            if node.start <= first or node.parent is None:
                break
            upper, node = node.start, node.parent
    for node in reversed(_in_order(tops)):
        node.total = len(node.ids) + sum(child.total for child in node.children)
        node.keep = len(node.places()) + sum(child.keep for child in node.children)
    return tops


def _in_order(nodes: Sequence[_Node]) -> list[_Node]:
    """These nodes and all below, each before its children."""
    found: list[_Node] = []
    waiting = list(reversed(nodes))
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += reversed(node.children)
    return found


# ------------------------------------------------------------------------------- passes over a trie


@dataclass
class TreeOutput:
    """One forward pass of :func:`tree_pass`.

    Attributes:
        batch: what was fed; its kept positions are the answer positions that lie in it.
        logits: ``[K, V]`` at these K positions, or None.
        parts: row, number of its first answer position that is here, and where its positions are among
            the K.
    """

    batch: Batch
    logits: Any
    parts: list[tuple[int, int, list[int]]]


def tree_pass(
    model: Any,
    rows: Sequence[Ids],
    answer_lengths: Sequence[int],
    *,
    logits: bool,
    size: int,
    before: Callable[[], None] = lambda: None,
) -> Iterator[TreeOutput]:
    """Run rows that may begin alike, each common beginning once; to be called without gradient.

    Args:
        model: a model that :func:`packs`.
        rows: ids as they are fed.
        answer_lengths: G of each row; its last G positions are wanted.
        logits: whether the language-model head is wanted there.
        size: tokens of one pack.
        before: called before every forward pass.

    Yields:
        What each forward pass computed that was wanted. A row's positions may come in several.
    """
    head = model.get_output_embeddings().weight.shape[0] if logits else 1
    most = max(1, MAX_LOGITS // int(head))
    room = max(map(len, rows), default=0) + size
    # nodes behind the same ids, the cache of these ids, and whether the only node is to be run on its own
    waiting: list[tuple[list[_Node], Any, bool]] = [(_trie(rows, answer_lengths), None, False)]
    while waiting:
        nodes, cache, alone = waiting.pop()
        if alone:
            node = nodes[0]
            grown = _branch(cache, room) if cache is not None or node.children else None
            with row_attention(model):  # not around what the caller does between two passes
                output = _run(model, nodes, grown, logits, before)
            if output.parts:
                yield output
            if node.children:
                waiting.append((node.children, grown, False))
            continue
        small: list[_Node] = []
        while nodes:
            node = nodes.pop()
            fits = node.total <= size and node.keep <= most
            if node.children and len(node.ids) < _MIN_SHARED and (cache is None or not fits):
                nodes += node.passed_on()
            elif fits:
                small.append(node)
            else:
                # one after the other, so that few caches are there at a time
                waiting.append(([node], cache, True))
        for together in groups([node.total for node in small], size):
            for part in _within([small[i] for i in together], most):
                own = None if cache is None else _branch(cache, room)
                with row_attention(model):
                    output = _run(model, _in_order(part), own, logits, before)
                yield output


def _within(nodes: Sequence[_Node], most: int) -> list[list[_Node]]:
    """Nodes in groups of at most so many answer positions."""
    found: list[list[_Node]] = []
    kept = 0
    for node in nodes:
        if not found or kept + node.keep > most:
            found.append([])
            kept = 0
        found[-1].append(node)
        kept += node.keep
    return found


def _branch(cache: Any, room: int) -> Any:
    """A cache that holds what ``cache`` holds and grows on its own; an empty one of None.

    All branches write into the same memory, each behind its beginning, since the trie is walked depth first:
    a branch is needed no more when the next one from the same beginning is run.

    Args:
        cache: of the way from the root, or None.
        room: ids of the longest way, and of a pack behind it.
    """
    from transformers import DynamicCache

    from ia2.models.joined_cache import RoomyLayer

    grown = DynamicCache()
    if cache is not None:
        grown.layers = [copy.copy(layer) for layer in cache.layers]
    else:
        grown.layer_class_to_replicate = functools.partial(RoomyLayer, room=room)  # type: ignore[assignment]
    return grown


def _run(
    model: Any, nodes: Sequence[_Node], cache: Any, logits: bool, before: Callable[[], None]
) -> TreeOutput:
    """One pass over nodes, each behind those of its ancestors that are among them and behind the cache."""
    import torch

    device = input_device(model)
    past = cache.get_seq_length() if cache is not None else 0
    ids = [token for node in nodes for token in node.ids]
    queries = torch.tensor([place for node in nodes for place in range(node.start, node.end)], device=device)
    keys = torch.cat([torch.arange(past, device=device), queries])
    kept: list[int] = []
    parts: list[tuple[int, int, list[int]]] = []
    begins: dict[int, int] = {}
    offset = 0
    for node in nodes:
        begins[id(node)] = offset
        at = {place: len(kept) + k for k, place in enumerate(node.places())}
        kept += [offset + place - node.start for place in at]
        parts += [(row, first, [at[p] for p in range(first, end)]) for row, first, end in node.wanted]
        offset += len(node.ids)
    options: dict[str, Any] = {"use_cache": cache is not None}
    if cache is not None:
        options["past_key_values"] = cache
    branching = any(node.parent is not None and id(node.parent) in begins for node in nodes)
    lengths = [len(node.ids) for node in nodes]
    if not past and not branching:
        options["attention_mask"] = _rows_mask(model, lengths, queries)
    elif past or len(nodes) > 1:
        visible = torch.zeros(len(ids), past + len(ids), dtype=torch.bool, device=device)
        visible[:, :past] = True
        for node in nodes:
            here = begins[id(node)]
            own = visible[here : here + len(node.ids), past:]
            above = node.parent
            if above is not None and id(above) in begins:
                end = begins[id(above)] + len(above.ids)
                own |= visible[end - 1, past:]  # what the parent's last id sees
            own[:, here : here + len(node.ids)] = torch.ones(
                len(node.ids), len(node.ids), dtype=torch.bool, device=device
            ).tril()
        options["attention_mask"] = layer_mask(model, visible, queries, keys)
    batch = Batch(
        torch.tensor([ids]),
        None,
        [len(kept)],
        [len(ids)],
        queries[None],
        torch.tensor(kept, dtype=torch.long),
    )
    keep = batch.keep(device) if logits and kept else 1
    before()
    output = model(
        input_ids=batch.input_ids.to(device),
        position_ids=queries[None],
        logits_to_keep=keep,
        **options,
    )
    return TreeOutput(batch, output.logits[0] if logits and kept else None, parts)
