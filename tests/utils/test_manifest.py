"""The list of a run's files: as long as it gets, it is read once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ia2.utils import manifest
from ia2.utils.errors import RunFolderError
from ia2.utils.files import read_json, write_json
from ia2.utils.manifest import MANIFEST, begin, check, compact, record, recorded, sha256


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the manifests that were parsed."""
    sizes: list[int] = []
    parse = manifest._parsed

    def counting(data: bytes) -> manifest.Digests:
        sizes.append(len(data))
        return parse(data)

    monkeypatch.setattr(manifest, "_parsed", counting)
    return sizes


def test_writing_and_reading_many_files_does_not_read_the_list_again(
    tmp_path: Path, parsed: list[int]
) -> None:
    begin(tmp_path)
    for number in range(200):
        write_json(tmp_path / f"{number}.json", number)
    assert [read_json(tmp_path / f"{number}.json") for number in range(200)] == list(range(200))
    assert parsed == [0]
    compact(tmp_path)
    assert len(recorded(tmp_path)) == 200 and len(parsed) == 2


def test_what_another_process_has_changed_is_seen(tmp_path: Path, parsed: list[int]) -> None:
    begin(tmp_path)
    write_json(tmp_path / "a.json", 1)
    (tmp_path / "b.json").write_text("2")
    with (tmp_path / MANIFEST).open("a") as file:
        file.write(manifest._line("b.json", sha256(tmp_path / "b.json")))
    assert set(recorded(tmp_path)) == {"a.json", "b.json"}
    # also while this process writes
    known = manifest._stamp

    def meddling(root: Path) -> tuple[int, ...] | None:
        stamp = known(root)
        with (root / MANIFEST).open("a") as file:
            file.write(manifest._line("c.json", "0" * 64))
        return stamp

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "_stamp", meddling)
        record(tmp_path, {"d.json": "1" * 64})
    assert set(recorded(tmp_path)) == {"a.json", "b.json", "c.json", "d.json"}
    (tmp_path / MANIFEST).write_text("")
    with pytest.raises(RunFolderError, match="does not list it"):
        check(tmp_path / "a.json")
