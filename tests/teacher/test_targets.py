"""The store: shards, what is read back, and which store is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ia2.teacher import targets
from ia2.teacher.targets import JoinedTargets, OnlineTargets, TargetStore, TeacherAnswer, open_store
from ia2.utils.errors import RunFolderError

LAYERS, WIDTH = [0, 2, 5], 16
ANSWERS = [TeacherAnswer((3, 4, 2), " a b"), TeacherAnswer((5,), "c", ended=False), TeacherAnswer((2,), "")]
FINGERPRINT = {"model": {"name": "m", "dtype": "float32"}, "seed": 0, "orders": [[1, 2], (3, 4)]}


def filled(store: OnlineTargets, dtype: torch.dtype = torch.float32) -> dict[tuple[int, int], torch.Tensor]:
    """Adds targets of two permutations, as views of one tensor."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for i, answer in enumerate(ANSWERS):
        batch = torch.randn(len(LAYERS), 2 * len(answer.ids), WIDTH, generator=generator).to(dtype)
        for k, tensor in enumerate(batch.split(len(answer.ids), dim=1)):
            made[i, k] = tensor
            store.add(i, k, tensor)
    store.finish(ANSWERS)
    return made


def written(folder: Path, dtype: torch.dtype = torch.float32) -> dict[tuple[int, int], torch.Tensor]:
    folder.mkdir(parents=True)
    return filled(TargetStore(LAYERS, 2, folder, FINGERPRINT), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shard_bytes", "shards"), [(1, 6), (400, 3), (2**20, 1)])
def test_what_is_read_back_is_what_was_written(
    dtype: torch.dtype, shard_bytes: int, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "_SHARD_BYTES", shard_bytes)
    made = written(tmp_path / "store", dtype)
    files = list((tmp_path / "store").iterdir())
    assert {file.suffix for file in files} == {".json", ".safetensors"}  # nothing is pickled
    assert len(files) - 1 == shards or (shards == 3 and 1 < len(files) - 1 < 6)
    store, memory, online = (
        TargetStore.read(tmp_path / "store"),
        TargetStore(LAYERS, 2),
        OnlineTargets(LAYERS, 2),
    )
    filled(memory, dtype), filled(online, dtype)
    direct = torch.cat([t.double() for t in made.values()], dim=1).pow(2).mean(dim=(1, 2)).sqrt()
    for each in (store, memory, online):
        assert (each.answers, each.layers, each.permutations) == (ANSWERS, LAYERS, 2)
        assert each.rms == pytest.approx(direct.tolist(), rel=1e-12)
    for (i, k), tensor in made.items():
        assert torch.equal(store.get(i, k), tensor) and store.get(i, k).dtype == dtype
        assert torch.equal(memory.get(i, k), tensor) and online.get(i, k) is None


def test_the_same_fingerprint_opens_and_another_names_what_differs(tmp_path: Path) -> None:
    assert open_store(tmp_path / "store", FINGERPRINT) is None
    written(tmp_path / "store")
    # tuples become lists in JSON; that is no difference
    assert open_store(tmp_path / "store", {**FINGERPRINT, "orders": [(1, 2), [3, 4]]}) is not None
    other = {**FINGERPRINT, "model": {"name": "m", "dtype": "bfloat16"}, "seed": 1, "new": 3}
    with pytest.raises(RunFolderError, match="these differ: model, new, seed"):
        open_store(tmp_path / "store", other)
    (tmp_path / "store" / "index.json").unlink()
    assert open_store(tmp_path / "store", FINGERPRINT) is None
    with pytest.raises(RunFolderError, match="holds no teacher targets"):
        TargetStore.read(tmp_path / "store")


def test_joined_targets_are_one_set() -> None:
    parts = [TargetStore(LAYERS, 2), TargetStore(LAYERS, 2)]
    made = [filled(part) for part in parts]
    together = JoinedTargets(parts, [[2, 0], [0, 1, 2]])
    assert together.answers == [ANSWERS[i] for i in (2, 0, 0, 1, 2)] and not together.online
    assert torch.equal(together.get(1, 1), made[0][0, 1]) and torch.equal(together.get(3), made[1][1, 0])
    assert together.rms == pytest.approx(parts[0].rms)
