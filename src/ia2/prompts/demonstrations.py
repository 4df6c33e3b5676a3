"""Choosing demonstrations: shared beginnings, balanced, nearest to the query, or the best of many orders.

Independent random ones are in :mod:`ia2.prompts.context`. ``nearest`` and ``search`` ask the base model;
what that costs is said before it is done, and it is done once.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ia2.adapters.weights import base_weights
from ia2.data.examples import Example
from ia2.models.batching import in_halves, plan_batches, token_budget
from ia2.models.capture import unwrap
from ia2.models.families import evaluating
from ia2.models.forward import answer_pass, check_finite
from ia2.models.tokens import Ids, encode_answer, pad_id, pad_rows
from ia2.prompts.context import DemonstrationContexts, FixedOrders, Orders, pool_orders
from ia2.prompts.format import Rendering
from ia2.utils.logging import logger, progress

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Examples that the search scores an order on; the mean over more would hardly rank orders otherwise.
SEARCH_EXAMPLES = 256

# Prompts that are embedded together: their ids are all that is kept of them.
_EMBEDDED = 4096

# Similarities that are computed together, and neighbours that are kept of all examples together.
_SIMILARITIES = 2**24
_NEIGHBOURS = 10**8


# ----------------------------------------------------------------------------------------- shared


class SharedPrefixes(Orders):
    """Random orders of the others, in which many examples' contexts begin alike.

    A random order of all is cut into halves. The contexts of one half begin with the other half, and go
    on in the same way within their own. Where every beginning is computed once, ``N log2 N``
    demonstrations are computed for N examples, not ``N²``. Each example's order by itself is as random as
    in :class:`~ia2.prompts.context.LeaveOneOut`; the orders of different examples depend on each other.
    Where not all fit the window, contexts begin at different places and share less.

    Args:
        count: number of examples.
        permutations: orders of each; each is cut from an order of its own.
        seed: of the draws.
    """

    leave_one_out = True

    def __init__(self, count: int, permutations: int = 1, seed: int = 0) -> None:
        self.permutations, self.seed = permutations, seed
        draws = [random.Random(f"shared {seed} {k}") for k in range(permutations)]
        self._orders = [np.array(draw.sample(range(count), count), np.int32) for draw in draws]
        self._places = [np.argsort(order).astype(np.int32) for order in self._orders]

    def candidates(self, i: int, k: int, limit: int) -> list[int]:
        order = self._orders[k]
        shown: list[int] = []
        for part in reversed(other_halves(len(order), int(self._places[k][i]))):
            shown[:0] = order[part].tolist()
            if len(shown) >= limit:
                break
        return shown[max(len(shown) - limit, 0) :]

    def facts(self) -> dict[str, Any]:
        return {"order": "shared", "leave_one_out": True, "seed": self.seed}


def other_halves(count: int, place: int) -> list[slice]:
    """The half without ``place`` of ``count`` places, then that of the half with it, and so on to the end."""
    found, low, high = [], 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if place < middle:
            found.append(slice(middle, high))
            high = middle
        else:
            found.append(slice(low, middle))
            low = middle
    return found


# --------------------------------------------------------------------------------------- balanced


class Balanced(Orders):
    """Answers alternate: one demonstration of each in turn, as long as there are any.

    Where not all fit, only whole rounds are shown, so that every answer comes equally often (one that
    has run out of demonstrations excepted).

    Args:
        demonstrations: what is drawn from.
        permutations: orders of each query.
        seed: of the draw.
        leave_one_out: queries are the demonstrations, and each gets the others; otherwise every query
            gets the same ones.
    """

    def __init__(
        self,
        demonstrations: Sequence[Example],
        permutations: int = 1,
        seed: int = 0,
        *,
        leave_one_out: bool,
    ) -> None:
        names: dict[str | None, int] = {}
        labels = [names.setdefault(demo.answer, len(names)) for demo in demonstrations]
        self._label = np.array(labels, np.int32)
        by_label = np.argsort(self._label, kind="stable").astype(np.int32)
        sizes = np.bincount(self._label, minlength=len(names))
        self._members = np.split(by_label, np.cumsum(sizes)[:-1]) if len(names) else []
        self._place = np.empty(len(labels), np.int32)  # of an example among those of its label
        for members in self._members:
            self._place[members] = np.arange(len(members), dtype=np.int32)
        self.permutations, self.seed = permutations, seed
        self.leave_one_out, self.shared = leave_one_out, not leave_one_out

    def candidates(self, i: int, k: int, limit: int) -> list[int]:
        draw = random.Random(f"balanced {self.seed} {'pool' if self.shared else i} {k}")
        own = -1 if self.shared else int(self._label[i])
        # one label more than can be shown, and one that may turn out to be empty
        labels = draw.sample(range(len(self._members)), min(limit + 2, len(self._members)))
        sizes = {label: len(self._members[label]) - (label == own) for label in labels}
        wanted = min(limit + 1, sum(sizes.values()))
        rounds = bisect_left(
            range(max(sizes.values(), default=0)),
            wanted,
            key=lambda r: sum(min(size, r) for size in sizes.values()),
        )
        picked: list[list[int]] = []
        for label, size in sizes.items():
            places = draw.sample(range(size), min(size, rounds))
            if label == own:
                places = [place + (place >= self._place[i]) for place in places]
            picked.append([int(self._members[label][place]) for place in places])
        nearest_first = [drawn[r] for r in range(rounds) for drawn in picked if r < len(drawn)]
        order = nearest_first[: limit + 1][::-1]
        if len(order) <= limit:
            return order
        return order[len(order) - self.whole(order, limit) :]

    def whole(self, order: Sequence[int], count: int) -> int:
        complete = 0
        seen: set[int] = set()
        for shown, j in enumerate(reversed(order)):
            if shown > count:
                break
            label = int(self._label[j])
            if label in seen:  # a round is over when an answer comes again
                complete, seen = shown, set()
            seen.add(label)
        # not even one round fits: as many different answers as do
        return complete or count

    def facts(self) -> dict[str, Any]:
        return {"order": "balanced", "leave_one_out": self.leave_one_out, "seed": self.seed}


# ---------------------------------------------------------------------------------------- nearest


class Nearest(Orders):
    """Each query's nearest demonstrations by cosine, the nearest last.

    Args:
        queries: gives the queries' embeddings, ``[n, d]``; asked when the first order is.
        demonstrations: gives those of the demonstrations, ``[N, d]``.
        leave_one_out: queries are the demonstrations, and none gets itself.
    """

    def __init__(
        self,
        queries: Callable[[], np.ndarray],
        demonstrations: Callable[[], np.ndarray],
        *,
        leave_one_out: bool,
    ) -> None:
        self._queries, self._demonstrations = queries, demonstrations
        self.leave_one_out = leave_one_out
        self._table: np.ndarray | None = None

    def candidates(self, i: int, k: int, limit: int) -> list[int]:
        if self._table is None:
            queries, demonstrations = self._queries(), self._demonstrations()
            most = max(64, _NEIGHBOURS // max(1, len(queries)))
            self._table = nearest_rows(
                queries, demonstrations, min(limit, most), leave_one_out=self.leave_one_out
            )
        return self._table[i, :limit][::-1].tolist()  # type: ignore[no-any-return]

    def facts(self) -> dict[str, Any]:
        return {"order": "nearest", "leave_one_out": self.leave_one_out}


def nearest_rows(
    queries: np.ndarray, demonstrations: np.ndarray, count: int, *, leave_one_out: bool = False
) -> np.ndarray:
    """Indices of each query's nearest demonstrations by cosine, nearest first, ``[n, count]`` or fewer.

    Computed block by block: no n × N matrix is made. Of equals, the first comes first.

    Args:
        queries: ``[n, d]``.
        demonstrations: ``[N, d]``.
        count: how many.
        leave_one_out: row i of both is the same example, which does not get itself.
    """
    total = len(demonstrations)
    count = max(0, min(count, total - leave_one_out))
    found = np.empty((len(queries), count), np.int32)
    left, right = _unit(queries), _unit(demonstrations)
    block = max(1, _SIMILARITIES // max(1, total))
    with progress("nearest demonstrations", len(queries)) as bar:
        for start in range(0, len(queries), block):
            distance = -(left[start : start + block] @ right.T)
            rows = np.arange(len(distance))
            if leave_one_out:
                distance[rows, rows + start] = np.inf
            if 0 < count < total:
                near = np.argpartition(distance, count - 1, axis=1)[:, :count]
                near.sort(axis=1)
            else:
                near = np.broadcast_to(np.arange(total), distance.shape)
            order = np.argsort(np.take_along_axis(distance, near, axis=1), axis=1, kind="stable")
            found[start : start + block] = np.take_along_axis(near, order, axis=1)[:, :count]
            bar.advance(len(distance))
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return cast(np.ndarray, rows / np.maximum(norms, 1e-12))


class Embedder:
    """Embeds queries with the base model itself, and says what it costs.

    Args:
        rendering: how text becomes ids.
        model: gives the model, bare or with an adapter (which is switched off).
    """

    def __init__(self, rendering: Rendering, model: Callable[[], nn.Module]) -> None:
        self.rendering, self.model = rendering, model

    def __call__(self, queries: Sequence[Example], tokens: int) -> np.ndarray:
        """Embeddings of the bare queries, ``[n, d]`` float32.

        Args:
            queries: the examples.
            tokens: of all of them, for the message.
        """
        logger.info(
            "demo_order nearest: embedding %d prompts (%d forward rows, %d tokens).",
            len(queries),
            len(queries),
            tokens,
        )
        model, parts = self.model(), []
        with base_weights(model):
            for start in range(0, len(queries), _EMBEDDED):
                ids = [self.rendering.query_ids(queries[n]) for n in _span(start, len(queries))]
                parts.append(embed(model, self.rendering.tokenizer, ids))
        return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def _span(start: int, end: int) -> range:
    return range(start, min(start + _EMBEDDED, end))


def embed(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Ids]) -> np.ndarray:
    """Mean over each prompt's tokens of the last hidden state, ``[n, d]`` float32."""
    import torch

    inner = unwrap(model)
    body = getattr(inner, "base_model", inner)  # without the head over the vocabulary
    body = inner.get_decoder() if body is inner else body
    device = inner.get_input_embeddings().weight.device
    plan = plan_batches(prompts, [1] * len(prompts), token_budget(model), 0)
    found: dict[int, np.ndarray] = {}

    def run(members: list[int]) -> list[tuple[int, np.ndarray]]:
        batch = pad_rows([prompts[i] for i in members], [1] * len(members), pad_id(tokenizer))
        assert batch.attention_mask is not None
        mask = batch.attention_mask.to(device)
        output = body(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
        state = output.last_hidden_state.float()
        mask = mask.to(state.device)[:, :, None]
        # padding may hold anything, infinities too
        mean = state.masked_fill(mask == 0, 0).sum(1) / mask.sum(1)
        check_finite(model, mean, "hidden states")
        return list(zip(members, mean.cpu().numpy(), strict=True))

    with evaluating(model), torch.no_grad(), progress("embedding prompts", len(prompts)) as bar:
        found.update(in_halves(plan, run, bar))
    return np.stack([found[n] for n in range(len(prompts))])


# ----------------------------------------------------------------------------------------- search


class Search:
    """The best of several random orders of the training pool.

    An order is as good as the mean log-likelihood of an example's true answer, given the others in
    that order.

    Args:
        rendering: how text becomes ids.
        train: the pool.
        max_length: tokens of the context window.
        reserve: tokens of it kept for the answer.
        tries: number of orders.
        seed: of the orders.
        most: at most so many demonstrations a prompt.
        lengths: :meth:`Rendering.demonstration_lengths` of the pool.
        model: gives the model, bare or with an adapter (which is switched off).
    """

    def __init__(
        self,
        rendering: Rendering,
        train: Sequence[Example],
        max_length: int,
        reserve: int,
        *,
        tries: int,
        seed: int,
        model: Callable[[], nn.Module],
        most: int | None = None,
        lengths: np.ndarray | None = None,
    ) -> None:
        self.rendering, self.train, self.model = rendering, train, model
        self.max_length, self.reserve, self.most = max_length, reserve, most
        self.tries, self.seed, self.lengths = tries, seed, lengths

    @cached_property
    def orders(self) -> list[list[int]]:
        """All orders that are tried."""
        return pool_orders(len(self.train), self.tries, self.seed)

    @cached_property
    def ranked(self) -> list[list[int]]:
        """The orders, best first; computed when first asked for."""
        scores = self.scores()
        best = sorted(range(self.tries), key=lambda r: -scores[r])
        logger.info(
            "demo_order search: mean log-likelihood of an answer %.3f in the best order, %.3f in the worst.",
            scores[best[0]],
            scores[best[-1]],
        )
        return [self.orders[r] for r in best]

    def scores(self) -> list[float]:
        """Mean log-likelihood of the examples' answers under each order, ``[tries]``."""
        rows = list(range(len(self.train)))
        if len(rows) > SEARCH_EXAMPLES:
            rows = sorted(random.Random(f"search {self.seed}").sample(rows, SEARCH_EXAMPLES))
        orders = FixedOrders(self.orders, leave_one_out=True)
        contexts = DemonstrationContexts(
            self.rendering,
            self.train,
            self.train,
            orders,
            self.max_length,
            self.reserve,
            "orders tried",
            self.most,
            self.lengths,
        )
        tokenizer = self.rendering.tokenizer
        answers = [
            encode_answer(tokenizer, self.rendering.answer_text(self.train[i]), self.train[i].source)
            for i in rows
        ]
        logger.info(
            "demo_order search: %d orders on %d of %d examples (%d forward rows, about %d tokens).",
            self.tries,
            len(rows),
            len(self.train),
            self.tries * len(rows),
            sum(contexts.tokens(i, r) for r in range(self.tries) for i in rows),
        )
        scores, model = [], self.model()
        with base_weights(model):
            for r in range(self.tries):
                pairs = [(contexts.context_ids(i, r), ids) for i, ids in zip(rows, answers, strict=True)]
                found = log_likelihoods(
                    model, tokenizer, pairs, description=f"demonstration orders ({r + 1}/{self.tries})"
                )
                scores.append(sum(found) / len(found))
        return scores


class SearchedOrders(Orders):
    """The best orders of a :class:`Search`; it runs when the first order is asked for.

    Args:
        search: shared by all prompts of a run.
        permutations: the so many best.
        leave_one_out: queries are the demonstrations, and none gets itself.
    """

    def __init__(self, search: Search, permutations: int = 1, *, leave_one_out: bool) -> None:
        self.search, self.permutations = search, permutations
        self.leave_one_out, self.shared = leave_one_out, not leave_one_out

    @cached_property
    def _found(self) -> FixedOrders:
        best = self.search.ranked[: self.permutations]
        return FixedOrders(best, leave_one_out=self.leave_one_out)

    def candidates(self, i: int, k: int, limit: int) -> list[int]:
        return self._found.candidates(i, k, limit)

    def facts(self) -> dict[str, Any]:
        return {
            "order": "search",
            "leave_one_out": self.leave_one_out,
            "seed": self.search.seed,
            "tries": self.search.tries,
            "window": [self.search.max_length, self.search.reserve, self.search.most],
        }


def log_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    description: str = "log-likelihoods",
) -> list[float]:
    """Log-likelihood of each answer behind its prompt, in input order."""
    import torch

    found = [0.0] * len(pairs)
    for output in answer_pass(model, tokenizer, pairs, description=description):
        assert output.logits is not None
        ids = torch.tensor(pairs[output.index][1])
        scores = output.logits.log_softmax(-1)
        found[output.index] = float(scores.gather(1, ids[:, None]).double().sum())
    return found
