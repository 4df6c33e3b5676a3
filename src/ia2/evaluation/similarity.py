"""How alike two sets of activations are: cosine (asim), L2, and the fraction of variance unexplained.

All three are taken by layer, between activations ``[L, G, d]`` of the same answer tokens, and streamed,
so memory does not grow with the number of examples (but for L numbers each).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.utils.distributed import gathered

if TYPE_CHECKING:
    import torch


@dataclass
class Similarity:
    """Similarity of n examples' activations to a reference.

    Attributes:
        layers: layer indices, ``[L]``.
        asim, l2: cosine and Euclidean distance, mean over an example's answer tokens, ``[n, L]``.
        unexplained: n times an example's share in the fraction of variance unexplained, ``[n, L]``, so that
            the fraction is the mean: the summed squared distance over the summed squared deviation of the
            reference from its mean. 0 is a perfect match; the mean of the reference scores 1. NaN where the
            reference does not vary.
        asim_by_token: cosine by place in the answer, mean over the examples that are so long, ``[G, L]``.
        tokens: how many those are, ``[G]``.
    """

    layers: list[int]
    asim: np.ndarray
    l2: np.ndarray
    unexplained: np.ndarray
    asim_by_token: np.ndarray
    tokens: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Means over examples, overall and by layer."""
        measures = {"asim": self.asim, "l2": self.l2, "variance_unexplained": self.unexplained}
        return {
            "n": len(self.asim),
            "layers": self.layers,
            **{name: float(np.mean(values.mean(0))) for name, values in measures.items()},
            **{f"{name}_by_layer": values.mean(0).tolist() for name, values in measures.items()},
        }


class SimilarityMeter:
    """Collects :class:`Similarity`, one example at a time."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        # asim, l2, distance: an array of numpy's own, since a small tensor's storage is ten times as large
        self._rows: dict[int, np.ndarray] = {}
        self._sum: Any = 0.0
        self._squares: Any = 0.0
        self._by_token = np.zeros((0, len(layers)))
        self._tokens = np.zeros(0, int)

    def add(self, index: int, activations: torch.Tensor, reference: torch.Tensor) -> None:
        """Compare one example's ``[L, G, d]`` with the reference's."""
        import torch

        a, b = activations.double(), reference.double()
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).numpy()
        distances = (a - b).pow(2).sum(-1).numpy()
        self._rows[index] = np.stack([cosine.mean(-1), np.sqrt(distances).mean(-1), distances.sum(-1)])
        self._sum = self._sum + b.sum(1).numpy()
        self._squares = self._squares + b.pow(2).sum((1, 2)).numpy()
        self._count(cosine.T, np.ones(cosine.shape[1], int))

    def _count(self, by_token: np.ndarray, tokens: np.ndarray) -> None:
        """Add cosines ``[G, L]`` and numbers of examples ``[G]``; answers may be longer than all before."""
        if (longer := len(tokens) - len(self._tokens)) > 0:
            self._by_token = np.pad(self._by_token, ((0, longer), (0, 0)))
            self._tokens = np.pad(self._tokens, (0, longer))
        self._by_token[: len(tokens)] += by_token
        self._tokens[: len(tokens)] += tokens

    def join(self) -> SimilarityMeter:
        """What all processes of a launch have added; all of them must ask for it."""
        mine = self._rows, self._sum, self._squares, self._by_token, self._tokens
        whole = SimilarityMeter(self.layers)
        for rows, total, squares, by_token, tokens in gathered(mine):
            whole._rows |= rows
            whole._sum, whole._squares = whole._sum + total, whole._squares + squares
            whole._count(by_token, tokens)
        return whole

    def finish(self) -> Similarity:
        """All examples have been added."""
        asim, l2, distance = np.stack([self._rows[i] for i in sorted(self._rows)], axis=1)
        variance = self._squares - (self._sum**2).sum(-1) / self._tokens.sum()
        unexplained = len(asim) * distance / np.where(variance > 0, variance, np.nan)
        by_token = self._by_token / self._tokens[:, None]
        return Similarity(self.layers, asim, l2, unexplained, by_token, self._tokens)
