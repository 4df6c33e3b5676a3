"""Queries in their contexts: how many whole demonstrations fit the window, and the ids of each prompt.

Demonstrations are never cut: if the window is short, whole ones are left out, the farthest from the query
first, and counted. Prompts are made when they are asked for, so memory hardly grows with their number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ia2.data.examples import Example
from ia2.models.tokens import Ids
from ia2.prompts.demonstrations import ORDERS, Demonstrations
from ia2.prompts.format import Preamble, PromptFormat
from ia2.utils.errors import DataError
from ia2.utils.files import digest
from ia2.utils.logging import logger

# Prompts that are looked at to count what does not fit; beyond, it is an estimate.
_LOOKED_AT = 1000


class Context(NamedTuple):
    """What comes before a query: a text or chat messages, then demonstrations."""

    text: Preamble | None = None
    demonstrations: Sequence[Example] = ()


class Dropped(NamedTuple):
    """How many whole demonstrations did not fit: counted in ``of`` prompts of ``total``."""

    demonstrations: int
    prompts: int
    of: int
    total: int


class Selection:
    """The demonstrations that each query is shown: as many whole ones as fit.

    ``sizes`` are the tokens of each demonstration, ``[N]``; ``room`` those beside each query, ``[n]``.
    """

    def __init__(self, draw: Demonstrations, sizes: np.ndarray, room: np.ndarray) -> None:
        self.draw, self.sizes, self.order = draw, sizes, ORDERS[draw.order](draw)
        # queries that share their demonstrations must share them all
        self.room = np.full(len(room), room.min()) if self.order.shared and len(room) else room
        self.others = max(len(sizes) - draw.leave_one_out, 0)
        self._by_size = np.argsort(sizes, kind="stable")
        # more than this fit beside no query: the shortest ones, one after the other
        sums = np.cumsum(sizes[self._by_size], dtype=np.int64)
        fit = int(np.searchsorted(sums, self.room.max(initial=0), side="right"))
        self.limit = fit if draw.most is None else min(fit, draw.most)

    def chosen(self, i: int, k: int) -> list[int]:
        """Indices of the demonstrations of query ``i`` in its context ``k``, as they are shown."""
        room = int(self.room[i])
        order = np.array(self.order.candidates(i, k, self.limit), np.int64)
        # one that would not fit even alone keeps no other out
        order = order[self.sizes[order] <= room]
        sums = np.cumsum(self.sizes[order[::-1]], dtype=np.int64)
        count = int(np.searchsorted(sums, room, side="right"))
        if count < len(order):
            count = self.order.whole(order.tolist(), count)
        if not count and self.others:  # all that were drawn are too long; the shortest is known to fit
            return [self._shortest(i)]
        return order[len(order) - count :].tolist()  # type: ignore[no-any-return]

    def _shortest(self, i: int) -> int:
        own = self.draw.leave_one_out and self._by_size[0] == i
        return int(self._by_size[1 if own else 0])

    def too_narrow(self) -> list[int]:
        """The queries that not even the shortest demonstration fits beside."""
        if not self.others:
            return []
        return [i for i, room in enumerate(self.room) if self.sizes[self._shortest(i)] > room]

    def dropped(self) -> Dropped:
        """What does not fit, over all queries and contexts, or estimated from some of them."""
        queries, permutations = len(self.room), self.draw.permutations
        total = queries * permutations
        if not total or int(self.sizes.sum(dtype=np.int64)) <= self.room.min():
            return Dropped(0, 0, total, total)
        most = self.others if self.draw.most is None else min(self.draw.most, self.others)
        step = -(-total * permutations // _LOOKED_AT)  # the k-th draw is made after all before it
        missing = []
        for i in range(0, queries, step):
            for k in range(permutations):
                wanted = most
                if self.draw.most is not None and self.limit == most:  # what is not wanted is not missing
                    wanted = len(self.order.candidates(i, k, most))
                missing.append(wanted - len(self.chosen(i, k)))
        return Dropped(sum(missing), sum(count > 0 for count in missing), len(missing), total)


class Contexts:
    """Queries, each on its own and in its contexts.

    Args:
        prompt_format: how text becomes ids.
        queries: the examples to be answered.
        window: tokens of the context window.
        reserve: tokens of it kept for the answer.
        name: of the prompts, in messages.
        source: demonstrations to draw from, or a context of its own for each query.
        lengths: of the demonstrations, where they are known.

    Raises:
        DataError: a query or a text is longer than the window, or no demonstration fits beside a query.
    """

    def __init__(
        self,
        prompt_format: PromptFormat,
        queries: Sequence[Example],
        window: int,
        reserve: int,
        name: str,
        source: Demonstrations | Sequence[Context],
        lengths: np.ndarray | None = None,
    ) -> None:
        self.format, self.queries, self.name, self.source = prompt_format, queries, name, source
        self.window, self.reserve, self._budget = window, reserve, window - reserve
        self._bare = bare_lengths(prompt_format, queries, window, reserve)
        self.selection: Selection | None = None
        if not isinstance(source, Demonstrations):
            self.dropped = self._report(self._checked(source))
            return
        known = prompt_format.demonstration_lengths(source.pool) if lengths is None else lengths
        # joint tokenisation may differ from the sum by a token at each boundary
        self.selection = Selection(source, known + np.int32(1), self._budget - self._bare)
        if bad := self.selection.too_narrow():
            # the longest one, where it is what the others are measured by
            longest = max(bad, key=lambda i: int(self._bare[i]))
            raise self._nothing_fits(longest if self.selection.order.shared else bad[0])

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def permutations(self) -> int:
        """Number of contexts of each query."""
        return self.source.permutations if isinstance(self.source, Demonstrations) else 1

    def query_ids(self, i: int) -> Ids:
        """Ids of query ``i`` on its own, ``X``."""
        return self.format.query_ids(self.queries[i])

    def context_ids(self, i: int, k: int = 0) -> Ids:
        """Ids of query ``i`` in its context ``k``, ``I ∘ X``."""
        _ = self.dropped  # what was left out is said once, before it is used
        ids, missing = self._fitted(i, k)
        if missing and self.selection:
            # lengths of parts are an estimate where a chat template treats positions differently
            logger.warning("%s: %d more demonstrations dropped.", self.queries[i].source, missing)
        if len(ids) > self._budget:
            raise self._nothing_fits(i)
        return ids

    def chosen(self, i: int, k: int = 0) -> list[int]:
        """Indices of the demonstrations that query ``i`` has in its context ``k``, as they are shown."""
        return self.selection.chosen(i, k) if self.selection else []

    def _fitted(self, i: int, k: int) -> tuple[Ids, int]:
        """Ids of a prompt, and how many demonstrations had to go for it; the last one stays."""
        source = self.source
        if isinstance(source, Demonstrations):
            context = Context(None, [source.pool[j] for j in self.chosen(i, k)])
        else:
            context = source[i]
        for missing in range(max(len(context.demonstrations), 1)):
            shown = context.demonstrations[missing:]
            ids = self.format.context_ids(shown, self.queries[i], context.text)
            if len(ids) <= self._budget:
                break
        return ids, missing

    def common_suffix(self, i: int) -> int:
        """Ids at the end of query ``i`` that are also the end of each of its contexts."""
        query = same = self.query_ids(i)
        for k in range(self.permutations):
            pairs = list(zip(reversed(same), reversed(self.context_ids(i, k)), strict=False))
            differing = (n for n, (own, other) in enumerate(pairs) if own != other)
            same = query[len(query) - next(differing, len(pairs)) :]
        return len(same)

    def cost(self, i: int) -> int:
        """About how many tokens have to be computed for query ``i`` alone; processes share by it."""
        shown = self.selection
        if shown is None or shown.order.shared:
            return int(self._bare[i])
        return int(self._bare[i]) + min(int(shown.sizes.sum(dtype=np.int64)), max(int(shown.room[i]), 0))

    def prepare(self) -> None:
        """Do now what would otherwise be done when the first context is asked for."""
        if len(self):
            self.context_ids(0)

    @cached_property
    def dropped(self) -> Dropped:
        """What does not fit; reported when the first context is asked for."""
        assert self.selection is not None
        return self._report(self.selection.dropped())

    def _report(self, dropped: Dropped) -> Dropped:
        count, prompts, of, total = dropped
        text = f"{count} demonstrations dropped, whole, from {prompts} of {total} prompts"
        if total > of:
            each = f"about {count / of:.1f} demonstrations dropped, whole, from each of {total} prompts"
            text = f"{each} (by {of} of them)"
        if count:
            logger.warning("%s: %s, to fit the context window of %d tokens.", self.name, text, self.window)
        return dropped

    def facts(self) -> dict[str, Any]:
        """What the contexts depend on, beside tokenizer and model: small, JSON-able.

        Two that differ in any context differ here.
        """
        source = self.source
        if isinstance(source, Demonstrations):
            shown = text_digest((demo.query, demo.answer) for demo in source.pool)
            own = {"orders": source.facts(), "most": source.most, "demonstrations": shown}
        else:
            own = {"given": text_digest(map(_plain, source))}
        return {
            "rendering": self.format.facts(),
            "window": [self.window, self.reserve],
            "permutations": self.permutations,
            "queries": text_digest((query.query,) for query in self.queries),
            **own,
        }

    def _checked(self, source: Sequence[Context]) -> Dropped:
        """Refuse own contexts that do not fit; of demonstrations whole ones are dropped instead."""
        dropped = []
        for i, context in enumerate(source):
            ids, missing = self._fitted(i, 0)
            dropped += [missing] if missing else []
            if len(ids) > self._budget:
                own = context.demonstrations
                what = "no demonstration of the row fits: it is" if own else "the context is"
                raise DataError(
                    f"{self.queries[i].source}: {what} too long: with the prompt it has {len(ids)} tokens; "
                    f"the context window holds {self.window}, of which {self.reserve} are kept for the "
                    "answer. Shorten it, or take a model with a longer window."
                )
        return Dropped(sum(dropped), len(dropped), len(self), len(self))

    def _nothing_fits(self, i: int) -> DataError:
        return DataError(
            f"{self.queries[i].source}: no demonstration fits beside the prompt in the context window of "
            f"{self.window} tokens. Shorten the rows, lower max_answer_tokens, or take a model with a longer "
            "window."
        )


def bare_lengths(
    prompt_format: PromptFormat, queries: Sequence[Example], window: int, reserve: int, virtual: int = 0
) -> np.ndarray:
    """Tokens of each query on its own, ``[n]``; ``virtual`` ones of the window are an adapter's.

    Raises:
        DataError: one is longer than the window.
    """
    lengths = prompt_format.lengths((prompt_format.prompt_text((), query), query.source) for query in queries)
    for i in np.flatnonzero(lengths > window - reserve - virtual)[:1].tolist():
        taken = f" and {virtual} taken by the adapter's virtual tokens" if virtual else ""
        raise DataError(
            f"{queries[i].source}: the prompt has {lengths[i]} tokens; the context window holds "
            f"{window}, of which {reserve} are kept for the answer{taken}. Shorten the row, lower "
            "max_answer_tokens, or take a model with a longer window."
        )
    return lengths


def text_digest(rows: Iterable[Any]) -> str:
    """Sixteen hex digits that change with any row and with their order; rows are read one by one."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row).encode() + b"\n")
    return found.hexdigest()[:16]


def _plain(context: Context) -> Any:
    text = context.text if context.text is None or isinstance(context.text, str) else list(context.text)
    return digest([text, [[demo.query, demo.answer] for demo in context.demonstrations]])
