"""Subspaces of low-rank updates of weights: how much two of them overlap, and how many directions one has.

An update is ``ΔW = scale · B A`` with ``B`` ``[d_out, r]`` and ``A`` ``[r, d_in]``. Its singular vectors come
from QR decompositions of ``B`` and ``Aᵀ`` and an SVD of the small core between them, so nothing of size
d × d is ever made. Overlap as in the paper's figure 4 (METHOD section 4).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

MEASURES = {
    "b": "left singular vectors of B, the paper's: (1/r)·‖U1ᵀU2‖². They span what ΔW can write, so ΔW's own "
    "left vectors (left) give the same wherever A has full rank",
    "left": "leading left singular vectors of ΔW: (1/r)·‖U1ᵀU2‖²",
    "right": "leading right singular vectors of ΔW, what it reads: (1/r)·‖V1ᵀV2‖². Adapters of one seed "
    "begin with the same A, those of two seeds do not",
    "weighted": "left singular vectors of ΔW weighted by strength: the cosine of ΔW1ΔW1ᵀ and ΔW2ΔW2ᵀ",
    "cosine": "cosine of ΔW1 and ΔW2 as they are",
}
"""Name of an overlap → what is compared. All are 1 for equal updates."""

# What float32 training leaves of a direction that is not there.
_NOISE = float(np.finfo(np.float32).eps)


class LowRank(NamedTuple):
    """Singular vectors of one module's update; directions within rounding of zero are left out.

    Attributes:
        b: left singular vectors of ``B``, ``[d_out, k_b]``.
        left, right: singular vectors of ``ΔW``, ``[d_out, k]`` and ``[d_in, k]``.
        sizes: singular values of ``ΔW``, ``[k]``, descending.
    """

    b: Floats
    left: Floats
    sizes: Floats
    right: Floats


def low_rank(a: Any, b: Any, scale: float) -> LowRank:
    """Singular value decomposition of ``scale · b @ a``, of ``[r, d_in]`` and ``[d_out, r]``."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u_b, s_b, _ = np.linalg.svd(r_b)
    u, s, vt = np.linalg.svd(scale * r_b @ r_a.T, full_matrices=False)
    width = max(a.shape[1], b.shape[0])
    k_b, k = (int((sizes > sizes[:1].sum() * width * _NOISE).sum()) for sizes in (s_b, s))
    return LowRank(q_b @ u_b[:, :k_b], q_b @ u[:, :k], s[:k], q_a @ vt[:k].T)


def effective_rank(sizes: Any) -> float:
    """``exp(entropy of s / Σs)`` of singular values ``[k]`` (Roy and Vetterli 2007); NaN without any.

    >>> round(effective_rank([3, 3, 3, 3]), 6), round(effective_rank([5, 0, 0]), 6)
    (4.0, 1.0)
    """
    p = np.asarray(sizes, dtype=np.float64)
    p = p[p > 0]
    if not p.size:
        return math.nan
    p = p / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def overlap(x: LowRank, y: LowRank) -> tuple[Floats, Floats, Floats]:
    """Compare two updates of one module.

    Adapters of different ranks k1 and k2 are compared by all their directions; sums of squared cosines are
    divided by the smaller rank, so that 1 still means that one subspace holds the other. An update that is
    zero has no subspace: all is NaN.

    Returns:
        Overlap by :data:`MEASURES`, ``[5]``; what random subspaces of the same ranks and singular values have
        on average (0 for the cosine); principal angles between the column spaces of both ``B`` in degrees,
        ascending, ``[min(k1, k2)]``.
    """
    if not (x.sizes.size and y.sizes.size):
        return np.full(5, np.nan), np.full(5, np.nan), np.zeros(0)
    sides = (x.b, y.b), (x.left, y.left), (x.right, y.right)
    between = [u.T @ v for u, v in sides]
    values = [float((m**2).sum() / min(m.shape)) for m in between]
    random = [max(m.shape) / len(u) for m, (u, _) in zip(between, sides, strict=True)]
    squares, strengths = np.outer(x.sizes**2, y.sizes**2), np.outer(x.sizes, y.sizes)
    spread = math.sqrt(float((squares**2).sum()))
    values.append(float((squares * between[1] ** 2).sum()) / spread)
    random.append(float(squares.sum()) / spread / len(x.left))
    values.append(float((strengths * between[1] * between[2]).sum() / math.sqrt(squares.sum())))
    cosines = np.linalg.svd(between[0], compute_uv=False)
    angles = np.degrees(np.arccos(np.clip(cosines, 0.0, 1.0)))
    return np.array(values), np.minimum([*random, 0.0], 1.0), angles
