"""What ia2 did not write is neither removed nor replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run, tree, write_rows
from sweeping import swept
from tiny_icl.tasks import sample_task

from ia2.errors import RunFolderError
from ia2.files import atomic_dir, write_text
from ia2.manifest import TEMPORARY, begin, clean, is_ours, remove

TASK = sample_task(0, num_classes=3)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", TASK.examples(12, seed=0))


@pytest.fixture
def train(tiny_icl_model_path: Path, rows: Path) -> list[str | Path]:
    brief = ["--align-epochs", "1", "--sft-epochs", "1", "--quiet"]
    return ["train", "--model", tiny_icl_model_path, "--data", rows, *brief]


@pytest.mark.parametrize("command", ["predict", "eval"])
@pytest.mark.parametrize("other_name", [False, True])
def test_an_input_is_no_output(
    train: list[str | Path],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    other_name: bool,
) -> None:
    out = tmp_path / "out"
    assert run(capsys, *train, "--output-dir", out).status == 0
    output = rows
    if other_name:
        output = tmp_path / "link.jsonl"
        output.symlink_to(rows)
    before = tree(tmp_path)
    line = run(capsys, command, "--adapter", out, "--data", rows, "--output", output, "--quiet").refusal()
    assert "cannot be the output too" in line
    line = run(
        capsys, command, "--adapter", out, "--data", rows, "--output", out / "predictions.jsonl", "--quiet"
    ).refusal()
    assert "belongs to the run" in line
    assert tree(tmp_path) == before
    assert "belongs to the run" in run(capsys, "report", out, "--output", out / "metrics.json").refusal()
    # another file is written, also into the run's folder, and stays the user's
    assert (
        run(
            capsys, command, "--adapter", out, "--data", rows, "--output", out / "mine.jsonl", "--quiet"
        ).status
        == 0
    )
    assert not is_ours(out / "mine.jsonl")


@pytest.mark.parametrize("linked", [False, True])
def test_overwrite_leaves_other_files(
    train: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], linked: bool
) -> None:
    out = tmp_path / "out"
    if linked:
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    assert run(capsys, *train, "--output-dir", out).status == 0
    (out / "notes.txt").write_text("mine")
    (out / "align" / "sub").mkdir()
    (out / "align" / "sub" / "plot.png").write_bytes(b"mine too")
    (out / ".hidden").write_text("mine as well")
    before = set(tree(out))
    other = [*train, "--seed", "7", "--output-dir", out]
    assert "--overwrite" in run(capsys, *other).refusal()
    assert set(tree(out)) == before
    assert run(capsys, *other, "--overwrite").status == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "align" / "sub" / "plot.png").read_bytes() == b"mine too"
    assert (out / ".hidden").read_text() == "mine as well"
    assert json.loads((out / "ia2_run.json").read_text())["config"]["seed"] == 7
    assert run(capsys, *other).status == 0  # it is the run of this command now


def test_a_file_of_a_result_s_name_is_not_replaced(
    train: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's README.md, put there while a stopped run waits to go on."""
    out = tmp_path / "out"
    assert run(capsys, *train, "--output-dir", out, "--batch-size", "3").status == 0
    (out / "metrics.json").unlink()
    (out / "README.md").unlink()
    manifest = out / "ia2_manifest.jsonl"
    kept = [line for line in manifest.read_text().splitlines() if "README.md" not in line]
    manifest.write_text("".join(f"{line}\n" for line in kept))
    (out / "README.md").write_text("mine")
    line = run(capsys, *train, "--output-dir", out, "--batch-size", "3").refusal()
    assert "README.md: a file that ia2 did not write is in the way" in line
    assert (out / "README.md").read_text() == "mine"


@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
def test_a_folder_of_others_is_refused(
    train: list[str | Path],
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    out = tmp_path / "out"
    (out / "cells").mkdir(parents=True)
    (out / "cells" / "mine.json").write_text('{"key": "mine"}')
    (out / "work").mkdir()
    before = tree(out)
    if command == "sweep":
        with pytest.raises(RunFolderError, match="is not empty and holds no sweep"):
            swept(files, out, recipes=["base"])
    else:
        line = run(capsys, command, *train[1:], "--output-dir", out).refusal()
        assert "is not empty and holds no ia2 run" in line
    assert tree(out) == before and not (out / ".ia2.lock").exists()


def test_a_sweep_leaves_cells_of_others(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    swept(files, out, recipes=["base"])
    (out / "cells").mkdir()
    (out / "cells" / "mine.json").write_text('{"key": "mine"}')
    (out / "failed.json").write_text("[]")
    swept(files, out, recipes=["base", "icl"])
    assert (out / "cells" / "mine.json").read_text() == '{"key": "mine"}'
    assert (out / "failed.json").read_text() == "[]"


def test_a_sweep_and_a_run_do_not_share_a_folder(
    train: list[str | Path], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *train, "--output-dir", tmp_path / "run").status == 0
    swept(files, tmp_path / "sweep", recipes=["base"])
    before = tree(tmp_path)
    with pytest.raises(RunFolderError, match="holds no sweep"):
        swept(files, tmp_path / "run", recipes=["base"])
    for more in ([], ["--overwrite"]):
        line = run(capsys, *train, "--output-dir", tmp_path / "sweep", *more).refusal()
        assert "holds no run of this command" in line
    assert tree(tmp_path) == before


def test_leftovers_of_killed_writes_go_with_the_next_start(
    train: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(capsys, *train, "--output-dir", out).status == 0
    before = tree(out)
    (out / f".metrics.json{TEMPORARY}abc").write_text("half")
    half = out / "align" / f".lr-0.001{TEMPORARY}def"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert run(capsys, *train, "--output-dir", out).status == 0
    assert tree(out) == before


def test_a_folder_is_replaced_only_if_all_of_it_is_ours(tmp_path: Path) -> None:
    begin(tmp_path)
    with atomic_dir(tmp_path / "stage") as temporary:
        write_text(temporary / "a", "1")
    (tmp_path / "stage" / "mine").write_text("mine")
    with pytest.raises(RunFolderError, match="mine: in the way"), atomic_dir(tmp_path / "stage") as temporary:
        write_text(temporary / "a", "2")
    assert (tmp_path / "stage" / "mine").read_text() == "mine"
    assert remove(tmp_path) == [tmp_path / "stage" / "mine"]
    clean(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["stage", "mine"]
