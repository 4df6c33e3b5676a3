"""Where the teacher's activations live between the teacher pass and training.

``store``: safetensors shards and a JSON index on disk, written while the teacher runs, so memory does
not grow with the number of examples; a fingerprint says what they were computed from. ``memory``: the
same in a dict. ``online``: nothing is kept; each training step computes them with the adapter
switched off. All three give the same loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ia2.utils.distributed import gathered, is_first, number
from ia2.utils.errors import RunFolderError
from ia2.utils.files import digest, read_json, write_json
from ia2.utils.manifest import check

if TYPE_CHECKING:
    import torch

_INDEX = "index.json"
# A shard is in memory until it is written.
_SHARD_BYTES = 16 * 2**20


@dataclass(frozen=True)
class TeacherAnswer:
    """What the teacher answered to one query, and how it went.

    Attributes:
        ids: ``Ŷ``, with the end-of-sequence id where the answer ended by itself.
        text: its text.
        ended: it ended by itself (always true for single-token tasks).
    """

    ids: tuple[int, ...]
    text: str
    ended: bool = True


class Targets(Protocol):
    """What the teacher gave for a set of examples, by index and permutation.

    Activations ``A_ICL`` are ``[L, G, d]``; attention weights ``[L, G, H, S]``; token distributions are
    as :func:`pack_soft` has them, and then there are no layers.
    """

    answers: list[TeacherAnswer]
    permutations: int
    rms: list[float]
    layers: list[int]

    def get(self, index: int, permutation: int = 0) -> torch.Tensor | None:
        """One example's tensor, its answer tokens along the second axis; None where it is online."""
        ...


def pack_soft(probabilities: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Token distributions as targets are kept.

    Args:
        probabilities: ``[G, V]``.
        top_k: keep the k most probable tokens; None keeps all.

    Returns:
        ``[1, G, V]`` log-probabilities, or ``[2, G, k]``: token ids (exact in float32) and their
        log-probabilities.
    """
    import torch

    log_p = probabilities.float().clamp_min(1e-45).log()
    if top_k is None or top_k >= log_p.shape[-1]:
        return log_p[None]
    values, ids = log_p.topk(top_k, dim=-1)
    return torch.stack([ids.to(log_p.dtype), values])


def pack_targets(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Targets of several examples, one behind the other along their answer tokens (axis 1).

    The last axis of attention weights is as long as each row; it is filled on the left with zeros,
    since positions are counted from the right.
    """
    import torch

    width = max(tensor.shape[-1] for tensor in tensors)
    padded = [torch.nn.functional.pad(t, (width - t.shape[-1], 0)) for t in tensors]
    return torch.cat(padded, dim=1)


class Statistics:
    """Root mean square of each layer over all targets, frozen for the objectives' scales."""

    def __init__(self) -> None:
        self.sums: Any = None
        self.count = 0

    def add(self, activations: torch.Tensor) -> None:
        squares = activations.double().pow(2).flatten(1).sum(dim=1)
        self.sums = squares if self.sums is None else self.sums + squares
        self.count += activations[0].numel()

    def rms(self) -> list[float]:
        """By layer, over the targets of all processes; all of them must ask for it."""
        parts = [part for part in gathered((self.sums, self.count)) if part[1]]
        if not parts:
            return []
        total, count = sum(sums for sums, _ in parts), sum(count for _, count in parts)
        return [float(value) for value in (total / count).sqrt()]


class MemoryTargets:
    """Targets in a dict; also what collects them."""

    def __init__(self, layers: Sequence[int], permutations: int = 1) -> None:
        self.answers: list[TeacherAnswer] = []
        self.layers = list(layers)
        self.permutations = permutations
        self.rms: list[float] = []
        self._tensors: dict[tuple[int, int], torch.Tensor] = {}
        self._statistics = Statistics()

    def add(self, index: int, permutation: int, activations: torch.Tensor) -> None:
        """Keep ``[L, G, d]`` of one example and permutation."""
        self._tensors[index, permutation] = activations
        self._statistics.add(activations)

    def finish(self, answers: list[TeacherAnswer]) -> MemoryTargets:
        """All targets have been added."""
        self.answers, self.rms = answers, self._statistics.rms()
        self._tensors = {key: tensor for part in gathered(self._tensors) for key, tensor in part.items()}
        return self

    def get(self, index: int, permutation: int = 0) -> torch.Tensor:
        return self._tensors[index, permutation]


class JoinedTargets:
    """Targets of several sets of examples, one set after the other.

    Args:
        parts: of each set.
        indices: of each set, the examples that count.
    """

    def __init__(self, parts: Sequence[Targets], indices: Sequence[Sequence[int]]) -> None:
        self._places = [(part, i) for part, own in zip(parts, indices, strict=True) for i in own]
        self.answers = [part.answers[i] for part, i in self._places]
        self.layers, self.permutations = parts[0].layers, parts[0].permutations
        self.online = any(getattr(part, "online", False) for part in parts)
        # of all together: each layer's mean square is one over answer tokens
        tokens = [sum(len(answer.ids) for answer in part.answers) for part in parts]
        self.rms = [
            (sum(n * rms**2 for n, rms in zip(tokens, layer, strict=True)) / sum(tokens)) ** 0.5
            for layer in zip(*(part.rms for part in parts), strict=True)
        ]

    def get(self, index: int, permutation: int = 0) -> torch.Tensor | None:
        part, own = self._places[index]
        return part.get(own, permutation)


class OnlineTargets:
    """Answers and scales only; the trainer computes the rest in every step."""

    online = True

    def __init__(
        self,
        answers: list[TeacherAnswer],
        layers: Sequence[int],
        rms: list[float],
        permutations: int = 1,
    ) -> None:
        self.answers, self.layers, self.rms = answers, list(layers), rms
        self.permutations = permutations

    def get(self, index: int, permutation: int = 0) -> None:
        return None


class StoreWriter:
    """Writes targets to shards as they come; at most one shard is in memory."""

    def __init__(self, folder: Path, layers: Sequence[int], permutations: int) -> None:
        self.folder, self.layers, self.permutations = folder, list(layers), permutations
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._shards: dict[str, str] = {}
        self._statistics = Statistics()

    def add(self, index: int, permutation: int, activations: torch.Tensor) -> None:
        """Write ``[L, G, d]`` of one example and permutation."""
        self._statistics.add(activations)
        self._pending[f"{index}.{permutation}"] = activations.contiguous()
        self._bytes += activations.numel() * activations.element_size()
        if self._bytes >= _SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._pending:
            return
        name = f"shard-{number():03d}-{len(set(self._shards.values())):05d}.safetensors"
        save_file(self._pending, self.folder / name)
        self._shards.update(dict.fromkeys(self._pending, name))
        self._pending, self._bytes = {}, 0

    def finish(self, answers: list[TeacherAnswer], fingerprint: Mapping[str, Any]) -> None:
        """Write the last shard; the first process then writes the index of all processes' shards."""
        self._flush()
        rms, shards = self._statistics.rms(), gathered(self._shards)
        if not is_first():
            return
        write_json(
            self.folder / _INDEX,
            {
                "fingerprint": dict(fingerprint),
                "layers": self.layers,
                "permutations": self.permutations,
                "rms": rms,
                "answers": [asdict(answer) for answer in answers],
                "shards": {key: name for part in shards for key, name in part.items()},
            },
        )


class TargetStore:
    """Targets on disk, read by memory map.

    Raises:
        RunFolderError: the folder holds no complete store, or a file of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / _INDEX).is_file():
            raise RunFolderError(f"{folder} holds no teacher targets.")
        self._mend = f"Delete {folder} and run the same command again."
        index = read_json(folder / _INDEX, self._mend)
        self.folder = folder
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self.layers: list[int] = index["layers"]
        self.permutations: int = index["permutations"]
        self.rms: list[float] = index["rms"]
        self.answers = [TeacherAnswer(tuple(a["ids"]), a["text"], a["ended"]) for a in index["answers"]]
        self._shards: dict[str, str] = index["shards"]
        self._open: dict[str, Any] = {}

    def get(self, index: int, permutation: int = 0) -> torch.Tensor:
        from safetensors import safe_open

        key = f"{index}.{permutation}"
        shard = self._shards[key]
        if shard not in self._open:
            check(self.folder / shard, mend=self._mend)
            self._open[shard] = safe_open(self.folder / shard, framework="pt")
        tensor: torch.Tensor = self._open[shard].get_tensor(key)
        return tensor


def open_store(folder: Path, fingerprint: Mapping[str, Any]) -> TargetStore | None:
    """The store in ``folder`` if it was computed from exactly this, None if there is none.

    Raises:
        RunFolderError: there is a store of something else; the message names what differs.
    """
    if not (folder / _INDEX).is_file():
        return None
    store = TargetStore(folder)
    # what a JSON round trip makes of the expected fingerprint is what was written
    if digest(store.fingerprint) == digest(fingerprint):
        return store
    keys = sorted({*store.fingerprint, *fingerprint})
    differing = [k for k in keys if digest(store.fingerprint.get(k)) != digest(fingerprint.get(k))]
    raise RunFolderError(
        f"{folder} holds teacher targets computed from something else; these differ: {', '.join(differing)}. "
        "Choose another output folder, or delete that one."
    )
