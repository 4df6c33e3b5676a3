"""Where the teacher's activations live between the teacher pass and training.

:class:`TargetStore` keeps them: in memory, or in a folder as safetensors shards and a JSON index, written
while the teacher runs, so that memory does not grow with the number of examples. :class:`OnlineTargets` keeps
answers and scales only; each training step computes the rest with the adapter switched off. The loss is the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


class OnlineTargets:
    """What the teacher gave for a set of examples, but for the targets themselves.

    Attributes:
        layers: of the targets; none of token distributions.
        permutations: targets of each example.
        answers: one an example.
        rms: root mean square of each layer over all targets, for the objectives' scales.
    """

    online = True

    def __init__(self, layers: Sequence[int], permutations: int = 1) -> None:
        self.layers, self.permutations = list(layers), permutations
        self.answers: list[TeacherAnswer] = []
        self.rms: list[float] = []
        self._squares: Any = 0.0
        self._count = 0

    def add(self, index: int, permutation: int, target: torch.Tensor) -> None:
        """Take the target of one example and permutation.

        Activations are ``[L, G, d]``; attention weights ``[L, G, H, S]``; token distributions are as
        :func:`pack_soft` has them.
        """
        self._squares = self._squares + target.double().pow(2).flatten(1).sum(dim=1)
        self._count += target[0].numel()

    def finish(self, answers: list[TeacherAnswer]) -> None:
        """All targets have been added, here and in the other processes of the launch."""
        self.answers = answers
        parts = [part for part in gathered((self._squares, self._count)) if part[1]]
        if parts:
            mean = sum(squares for squares, _ in parts) / sum(count for _, count in parts)
            self.rms = [float(value) for value in mean.sqrt()]

    def get(self, index: int, permutation: int = 0) -> torch.Tensor | None:
        """The target of one example, its answer tokens along the second axis; None where it is online."""
        return None


class TargetStore(OnlineTargets):
    """Targets that are kept: in a folder, with a fingerprint of what they are computed from, or in memory."""

    online = False

    def __init__(
        self,
        layers: Sequence[int],
        permutations: int = 1,
        folder: Path | None = None,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(layers, permutations)
        self.folder, self.fingerprint = folder, dict(fingerprint or {})
        self._memory: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._shards: dict[str, str] = {}
        self._open: dict[str, Any] = {}

    @classmethod
    def read(cls, folder: Path) -> TargetStore:
        """The targets in a folder, read by memory map.

        Raises:
            RunFolderError: there are none, or a file is damaged.
        """
        if not (folder / _INDEX).is_file():
            raise RunFolderError(f"{folder} holds no teacher targets.")
        index = read_json(folder / _INDEX, _way_out(folder))
        store = cls(index["layers"], index["permutations"], folder, index["fingerprint"])
        store.rms, store._shards = index["rms"], index["shards"]
        store.answers = [TeacherAnswer(tuple(a["ids"]), a["text"], a["ended"]) for a in index["answers"]]
        return store

    def add(self, index: int, permutation: int, target: torch.Tensor) -> None:
        super().add(index, permutation, target)
        self._memory[f"{index}.{permutation}"] = target.contiguous()
        self._bytes += target.numel() * target.element_size()
        if self.folder is not None and self._bytes >= _SHARD_BYTES:
            self._write_shard(self.folder)

    def _write_shard(self, folder: Path) -> None:
        from safetensors.torch import save_file

        if not self._memory:
            return
        name = f"shard-{number():03d}-{len(set(self._shards.values())):05d}.safetensors"
        save_file(self._memory, folder / name)
        self._shards.update(dict.fromkeys(self._memory, name))
        self._memory, self._bytes = {}, 0

    def finish(self, answers: list[TeacherAnswer]) -> None:
        super().finish(answers)
        if self.folder is None:
            self._memory = {key: tensor for part in gathered(self._memory) for key, tensor in part.items()}
            return
        self._write_shard(self.folder)
        shards = gathered(self._shards)
        if not is_first():
            return
        index = {
            "fingerprint": self.fingerprint,
            "layers": self.layers,
            "permutations": self.permutations,
            "rms": self.rms,
            "answers": [asdict(answer) for answer in answers],
            "shards": {key: name for part in shards for key, name in part.items()},
        }
        write_json(self.folder / _INDEX, index)

    def get(self, index: int, permutation: int = 0) -> torch.Tensor:
        from safetensors import safe_open

        key = f"{index}.{permutation}"
        if self.folder is None:
            return self._memory[key]
        shard = self._shards[key]
        if shard not in self._open:
            check(self.folder / shard, mend=_way_out(self.folder))
            self._open[shard] = safe_open(self.folder / shard, framework="pt")
        return self._open[shard].get_tensor(key)  # type: ignore[no-any-return]


def _way_out(folder: Path) -> str:
    return f"Delete {folder} and run the same command again."


def open_store(folder: Path, fingerprint: Mapping[str, Any]) -> TargetStore | None:
    """The store in ``folder`` if it was computed from exactly this, None if there is none.

    Raises:
        RunFolderError: there is a store of something else; the message names what differs.
    """
    if not (folder / _INDEX).is_file():
        return None
    store = TargetStore.read(folder)
    # what a JSON round trip makes of the expected fingerprint is what was written
    keys = sorted({*store.fingerprint, *fingerprint})
    differing = [k for k in keys if digest(store.fingerprint.get(k)) != digest(fingerprint.get(k))]
    if not differing:
        return store
    raise RunFolderError(
        f"{folder} holds teacher targets computed from something else; these differ: {', '.join(differing)}. "
        "Choose another output folder, or delete that one."
    )


class JoinedTargets(OnlineTargets):
    """Targets of several sets of examples, one after the other; of each the examples with these indices."""

    def __init__(self, parts: Sequence[OnlineTargets], indices: Sequence[Sequence[int]]) -> None:
        super().__init__(parts[0].layers, parts[0].permutations)
        self._rows = [(part, i) for part, own in zip(parts, indices, strict=True) for i in own]
        self.answers = [part.answers[i] for part, i in self._rows]
        self.online = any(part.online for part in parts)
        # of all together: each layer's mean square is one over answer tokens
        tokens = [sum(len(answer.ids) for answer in part.answers) for part in parts]
        self.rms = [
            (sum(n * rms**2 for n, rms in zip(tokens, layer, strict=True)) / sum(tokens)) ** 0.5
            for layer in zip(*(part.rms for part in parts), strict=True)
        ]

    def get(self, index: int, permutation: int = 0) -> torch.Tensor | None:
        part, own = self._rows[index]
        return part.get(own, permutation)


def pack_soft(probabilities: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Token distributions ``[G, V]`` as targets are kept.

    Returns:
        ``[1, G, V]`` log-probabilities, or ``[2, G, k]`` of the k most probable tokens: their ids (exact in
        float32) and their log-probabilities.
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
