"""What ia2 did not write is neither removed nor replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.command_line import Ran, run, tree, write_rows
from helpers.sweeping import swept
from tiny_icl.tasks import sample_task

from ia2.experiment.sweep.store import SweepFolder
from ia2.utils.errors import RunFolderError
from ia2.utils.files import atomic_dir, write_text
from ia2.utils.manifest import TEMPORARY, begin, clean, is_ours, remove

TASK = sample_task(0, num_classes=3)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", TASK.examples(12, seed=0))


@pytest.fixture
def train(tiny_icl_model_path: Path, rows: Path) -> list[str | Path]:
    brief = ["--align-epochs", "1", "--sft-epochs", "1", "--quiet"]
    return ["train", "--model", tiny_icl_model_path, "--data", rows, *brief]


def test_an_input_is_no_output(
    train: list[str | Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, link = tmp_path / "out", tmp_path / "link.jsonl"
    link.symlink_to(rows)
    assert run(capsys, *train, "--output-dir", out).status == 0
    before = tree(tmp_path)
    for command in ("predict", "eval"):

        def into(output: Path, command: str = command) -> Ran:
            return run(capsys, command, "--adapter", out, "--data", rows, "--output", output, "--quiet")

        for output in (rows, link):
            assert "cannot be the output too" in into(output).refusal()
        assert "belongs to the run" in into(out / "predictions.jsonl").refusal()
        assert "belongs to the run" in run(capsys, "report", out, "--output", out / "metrics.json").refusal()
        assert tree(tmp_path) == before
        # another file is written, also into the run's folder, and stays the user's
        assert into(out / "mine.jsonl").status == 0
        assert not is_ours(out / "mine.jsonl")
        (out / "mine.jsonl").unlink()


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


def test_a_manifest_leads_nowhere_else(tmp_path: Path) -> None:
    """A stranger's run: what --overwrite removes lies in its folder, not behind links or above it."""
    mine = tmp_path / "mine"
    mine.mkdir()
    names = ("above", "absolute", "linked")
    for name in names:
        (mine / name).write_text("mine")
    run_folder = tmp_path / "run"
    begin(run_folder)
    write_text(run_folder / "theirs", "1")
    (run_folder / "link").symlink_to(mine)
    paths = ["../mine/above", str(mine / "absolute"), "link/linked", "link", "a\0b", "", "a/../../mine/above"]
    with (run_folder / "ia2_manifest.jsonl").open("a") as file:
        file.writelines(json.dumps({"path": path, "sha256": "0"}) + "\n" for path in paths)
        file.write("[" * 100_000 + "\n")
    remove(run_folder)
    assert not (run_folder / "theirs").exists()
    assert sorted(path.name for path in mine.iterdir()) == sorted(names)


def test_another_manifest_that_ends_alike_is_read(tmp_path: Path) -> None:
    """In one process: a folder is replaced by another run's, whose manifest has the same last lines."""
    manifest = tmp_path / "ia2_manifest.jsonl"
    last = json.dumps({"path": "same", "sha256": "0" * 200}) + "\n"
    for name in ("a", "b"):
        manifest.write_text(json.dumps({"path": name, "sha256": "0"}) + "\n" + last)
        assert is_ours(tmp_path / name)
    assert not is_ours(tmp_path / "a")


def test_a_run_around_another_does_not_speak_for_it(
    train: list[str | Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A published adapter, without its manifest, that was put into the folder of a run."""
    out = tmp_path / "out"
    assert run(capsys, *train, "--output-dir", out).status == 0
    inner = out / "inner"
    shutil.copytree(out, inner)
    (inner / "ia2_manifest.jsonl").unlink()
    ran = run(capsys, "predict", "--adapter", inner, "--data", rows, "--quiet")
    assert ran.status == 0 and "cannot be checked" in ran.err
    # and its files are no outputs
    before = tree(inner)
    for command in ("predict", "eval"):
        options = ["--adapter", inner, "--data", rows, "--output", inner / "predictions.jsonl", "--quiet"]
        (inner / "predictions.jsonl").write_text("results")
        assert "cannot be the output too" in run(capsys, command, *options).refusal()
    for name in ("metrics.json", "adapter_config.json"):
        line = run(capsys, "report", inner, "--output", inner / name).refusal()
        assert "cannot be the output too" in line
        assert (inner / name).read_bytes() == before[name]


def test_a_file_of_a_folder_that_is_read_is_no_output(
    train: list[str | Path],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    assert run(capsys, *train, "--output-dir", out).status == 0
    data.mkdir()
    shutil.copy(rows, data / "test.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = tree(data)
    for given in (data, "~/data", "~/data/test.jsonl"):
        options = ["--adapter", out, "--data", given, "--output", data / "test.jsonl", "--quiet"]
        assert "cannot be the output too" in run(capsys, "predict", *options).refusal()
    assert tree(data) == before


def test_advice_for_a_damaged_run_file_is_accepted(
    train: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without that file a folder is no run, so "delete it" would lead into a dead end."""
    out = tmp_path / "out"
    assert run(capsys, *train, "--output-dir", out).status == 0
    (out / "ia2_run.json").write_text("{}")
    line = run(capsys, *train, "--output-dir", out).refusal()
    assert "Delete" not in line and "with --overwrite" in line
    assert run(capsys, *train, "--output-dir", out, "--overwrite").status == 0
    # of which nothing is known is not replaced, and nobody is told so
    manifest = out / "ia2_manifest.jsonl"
    manifest.write_text("damaged\n")
    before = tree(out)
    for more in ([], ["--overwrite"]):
        line = run(capsys, *train, "--output-dir", out, *more).refusal()
        assert "Delete" not in line and "overwrite" not in line and "another --output-dir" in line
    assert tree(out) == before


def test_rows_of_benchmarks_replace_no_others(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare = ["benchmarks", "prepare", files / "two.yaml", "--output-dir", out]
    for _ in range(2):
        assert run(capsys, *prepare).status == 0
    written = next(out.rglob("pool.jsonl"))
    written.write_text("mine")
    ran = run(capsys, *prepare)
    assert ran.status == 2 and "pool.jsonl: holds other rows" in ran.err
    assert written.read_text() == "mine"
    benchmark = (files / "two.yaml").read_text()
    (files / "evil.yaml").write_text(benchmark.replace("name: ", "name: ../../"))
    ran = run(capsys, *prepare[:2], files / "evil.yaml", *prepare[3:])
    assert ran.status == 2 and "cannot be a folder" in ran.err


def test_a_damaged_note_of_the_grid_is_written_anew(tmp_path: Path) -> None:
    begin(tmp_path)
    folder = SweepFolder(tmp_path)
    folder.begin("models: [demo]")
    (tmp_path / "grid.yaml").write_bytes(b"\x80")
    folder.begin("models: [demo]")
    assert (tmp_path / "grid.yaml").read_text() == "models: [demo]"
