"""The store: shards, what is read back, and which store is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ia2.teacher import targets
from ia2.teacher.targets import MemoryTargets, StoreWriter, TargetStore, TeacherAnswer, open_store
from ia2.utils.errors import RunFolderError

LAYERS, WIDTH = [0, 2, 5], 16
ANSWERS = [TeacherAnswer((3, 4, 2), " a b"), TeacherAnswer((5,), "c", ended=False), TeacherAnswer((2,), "")]
FINGERPRINT = {"model": {"name": "m", "dtype": "float32"}, "seed": 0, "orders": [[1, 2], (3, 4)]}


def activations(dtype: torch.dtype, permutations: int = 2) -> dict[tuple[int, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        (i, k): torch.randn(len(LAYERS), len(answer.ids), WIDTH, generator=generator).to(dtype)
        for i, answer in enumerate(ANSWERS)
        for k in range(permutations)
    }


def written(folder: Path, dtype: torch.dtype) -> dict[tuple[int, int], torch.Tensor]:
    folder.mkdir(parents=True)
    made = activations(dtype)
    writer = StoreWriter(folder, LAYERS, 2)
    for (i, k), tensor in made.items():
        writer.add(i, k, tensor)
    writer.finish(ANSWERS, FINGERPRINT)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [1, 400, 2**20])
def test_what_is_read_back_is_what_was_written(
    dtype: torch.dtype, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "_SHARD_BYTES", shard_bytes)
    made = written(tmp_path / "store", dtype)
    shards = sorted((tmp_path / "store").glob("*.safetensors"))
    sizes = [tensor.numel() * tensor.element_size() for tensor in made.values()]
    if shard_bytes == 1:
        assert len(shards) == len(made)
    elif shard_bytes == 400:
        assert 1 < len(shards) < len(made)
        assert all(shard.stat().st_size < 400 + max(sizes) + 1000 for shard in shards)
    else:
        assert len(shards) == 1
    store = TargetStore(tmp_path / "store")
    for (i, k), tensor in made.items():
        read = store.get(i, k)
        assert read.dtype == dtype and torch.equal(read, tensor)
    assert store.answers == ANSWERS
    assert (store.layers, store.permutations) == (LAYERS, 2)
    direct = torch.cat([t.double() for t in made.values()], dim=1).pow(2).mean(dim=(1, 2)).sqrt()
    assert store.rms == pytest.approx(direct.tolist(), rel=1e-12)
    memory = MemoryTargets(LAYERS, 2)
    for (i, k), tensor in made.items():
        memory.add(i, k, tensor)
    memory.finish(ANSWERS)
    assert memory.rms == store.rms and memory.answers == store.answers
    assert all(torch.equal(memory.get(*key), store.get(*key)) for key in made)


def test_nothing_in_a_store_is_pickled(tmp_path: Path) -> None:
    written(tmp_path / "store", torch.float32)
    assert {path.suffix for path in (tmp_path / "store").iterdir()} == {".json", ".safetensors"}
    json.loads((tmp_path / "store" / "index.json").read_text())


def test_a_slice_of_a_batch_is_stored_alone(tmp_path: Path) -> None:
    """Tensors that come as views of a batch must neither share memory in the file nor be refused."""
    batch = torch.randn(3, 6, WIDTH)
    writer = StoreWriter(tmp_path, LAYERS, 1)
    writer.add(0, 0, batch[:, :2])
    writer.add(1, 0, batch[:, 2:])
    writer.finish(ANSWERS[:2], {})
    store = TargetStore(tmp_path)
    assert torch.equal(store.get(0), batch[:, :2]) and torch.equal(store.get(1), batch[:, 2:])


def test_the_same_fingerprint_opens_and_another_names_what_differs(tmp_path: Path) -> None:
    assert open_store(tmp_path / "store", FINGERPRINT) is None
    written(tmp_path / "store", torch.float32)
    # tuples become lists in JSON; that is no difference
    assert open_store(tmp_path / "store", {**FINGERPRINT, "orders": [(1, 2), [3, 4]]}) is not None
    other = {**FINGERPRINT, "model": {"name": "m", "dtype": "bfloat16"}, "seed": 1, "new": 3}
    with pytest.raises(RunFolderError, match="these differ: model, new, seed"):
        open_store(tmp_path / "store", other)


def test_a_folder_without_an_index_is_no_store(tmp_path: Path) -> None:
    written(tmp_path / "store", torch.float32)
    (tmp_path / "store" / "index.json").unlink()
    assert open_store(tmp_path / "store", FINGERPRINT) is None
    with pytest.raises(RunFolderError, match="holds no teacher targets"):
        TargetStore(tmp_path / "store")
