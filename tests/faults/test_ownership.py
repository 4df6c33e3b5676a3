"""What ia2 did not write is neither removed nor replaced, and an input is no output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.command_line import TASK, Ia2, names, tree, write_rows
from helpers.sweeping import swept

from ia2.utils.errors import RunFolderError
from ia2.utils.files import atomic_dir, write_text
from ia2.utils.manifest import MANIFEST, TEMPORARY, begin, clean, is_ours, remove


@pytest.fixture
def out(here: Path, finished: Path) -> Path:
    """The finished run as ``out``; ``train`` with the options of :func:`same` is its command."""
    shutil.copytree(finished, here / "out")
    shutil.copy(finished.parent / "rows.jsonl", here / "rows.jsonl")
    return here / "out"


SAME = ("--recipe", "sft", "--sft-epochs", 1, "--align-epochs", 50, "--joint-epochs", 50, "--device", "cpu")


def test_an_input_is_no_output(ia2: Ia2, here: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "link.jsonl").symlink_to("rows.jsonl")
    (here / "data").mkdir()
    shutil.copy("rows.jsonl", here / "data" / "test.jsonl")
    monkeypatch.setenv("HOME", str(here))
    before = tree(here)
    for command in ("predict", "eval"):
        for data, output in (
            *(("rows.jsonl", output) for output in ("rows.jsonl", "link.jsonl")),
            *((data, "data/test.jsonl") for data in ("data", "~/data", "~/data/test.jsonl")),
        ):
            line = ia2(command, "--adapter", "out", "--data", data, "--output", output).refusal()
            names(line, "cannot be the output too")
        options = ["--adapter", "out", "--data", "rows.jsonl", "--output"]
        names(ia2(command, *options, "out/predictions.jsonl").refusal(), "belongs to the run")
    names(ia2("report", "out", "--output", "out/metrics.json").refusal(), "belongs to the run")
    assert tree(here) == before
    # another file is written, also into the run's folder, and stays the user's
    assert ia2("predict", *options, "out/mine.jsonl").status == 0
    assert not is_ours(out / "mine.jsonl")


def test_overwrite_leaves_other_files(train: Ia2, here: Path, out: Path) -> None:
    out.rename(here / "elsewhere")
    out.symlink_to("elsewhere")
    (out / "sft" / "sub").mkdir()
    mine = [out / "notes.txt", out / "sft" / "sub" / "plot.png", out / ".hidden"]
    for file in mine:
        file.write_text("mine")
    before = tree(out)
    line = train(*SAME, "--seed", 7).refusal()
    names(line, "out holds another run", "seed", "--overwrite")
    # nothing is deleted before the rows are known to be good
    write_rows(here / "bad.jsonl", [(" ".join(["z0"] * 600), " L1"), *TASK.examples(8, 0)])
    names(train(*SAME, "--overwrite", "--data", "bad.jsonl").refusal(), "601 tokens")
    names(train(*SAME, "--data", "test.jsonl").refusal(), "data of train")
    assert tree(out) == before
    assert train(*SAME, "--seed", 7, "--overwrite").status == 0
    assert [file.read_text() for file in mine] == ["mine"] * 3
    assert json.loads((out / "ia2_run.json").read_text())["config"]["seed"] == 7
    assert train(*SAME, "--seed", 7).status == 0  # it is the run of this command now


def test_a_file_of_a_result_s_name_is_not_replaced(train: Ia2, out: Path) -> None:
    """A user's README.md, put there while a stopped run waits to go on."""
    (out / "metrics.json").unlink()
    (out / "README.md").unlink()
    kept = [line for line in (out / MANIFEST).read_text().splitlines() if "README.md" not in line]
    (out / MANIFEST).write_text("".join(f"{line}\n" for line in kept))
    (out / "README.md").write_text("mine")
    names(train(*SAME).refusal(), "README.md: a file that ia2 did not write is in the way")
    assert (out / "README.md").read_text() == "mine"


def test_a_folder_of_others_is_refused(train: Ia2, ia2: Ia2, here: Path, files: Path) -> None:
    (here / "out" / "cells").mkdir(parents=True)
    (here / "out" / "cells" / "mine.json").write_text('{"key": "mine"}')
    before = tree(here / "out")
    for more in ([], ["--overwrite"]):
        names(train(*more).refusal(), "out is not empty and holds no ia2 run")
    compare = ["compare", "--model", "model", "--data", "rows.jsonl", "--output-dir", "out"]
    names(ia2(*compare).refusal(), "is not empty and holds no ia2 run")
    with pytest.raises(RunFolderError, match="is not empty and holds no sweep"):
        swept(files, here / "out", recipes=["base"])
    assert tree(here / "out") == before and not (here / "out" / ".ia2.lock").exists()


def test_commands_do_not_share_a_folder(train: Ia2, ia2: Ia2, here: Path, out: Path, files: Path) -> None:
    swept(files, here / "sweep", recipes=["base"])
    before = tree(here)
    with pytest.raises(RunFolderError, match="holds no sweep"):
        swept(files, out, recipes=["base"])
    for more in ([], ["--overwrite"]):
        names(train("--output-dir", "sweep", *more).refusal(), "holds no run of this command")
    compare = ["compare", "--model", "model", "--data", "rows.jsonl", "--output-dir", "out"]
    names(ia2(*compare).refusal(), "the command")
    assert tree(here) == before


def test_a_sweep_leaves_cells_of_others(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    swept(files, out, recipes=["base"])
    (out / "cells").mkdir()
    (out / "cells" / "mine.json").write_text('{"key": "mine"}')
    (out / "failed.json").write_text("[]")
    swept(files, out, recipes=["base", "icl"])
    assert (out / "cells" / "mine.json").read_text() == '{"key": "mine"}'
    assert (out / "failed.json").read_text() == "[]"


def test_leftovers_of_killed_writes_go_with_the_next_start(train: Ia2, out: Path) -> None:
    before = tree(out)
    (out / f".metrics.json{TEMPORARY}abc").write_text("half")
    half = out / "sft" / f".lr-0.001{TEMPORARY}def"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert train(*SAME).status == 0
    assert tree(out).keys() == before.keys()


def test_a_folder_is_replaced_only_if_all_of_it_is_ours(tmp_path: Path) -> None:
    begin(tmp_path)
    with atomic_dir(tmp_path / "stage") as temporary:
        write_text(temporary / "a", "1")
    (tmp_path / "stage" / "mine").write_text("mine")
    with pytest.raises(RunFolderError, match="mine: in the way"), atomic_dir(tmp_path / "stage") as temporary:
        write_text(temporary / "a", "2")
    assert remove(tmp_path) == [tmp_path / "stage" / "mine"]
    clean(tmp_path)
    assert (tmp_path / "stage" / "mine").read_text() == "mine"
    assert [p.name for p in tmp_path.rglob("*")] == ["stage", "mine"]


def test_a_manifest_leads_nowhere_else(tmp_path: Path) -> None:
    """A stranger's run: what --overwrite removes lies in its folder, not behind links or above it."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("above", "absolute", "linked"):
        (mine / name).write_text("mine")
    begin(tmp_path / "run")
    write_text(tmp_path / "run" / "theirs", "1")
    (tmp_path / "run" / "link").symlink_to(mine)
    paths = ["../mine/above", str(mine / "absolute"), "link/linked", "link", "a\0b", "", "a/../../mine/above"]
    with (tmp_path / "run" / MANIFEST).open("a") as file:
        file.writelines(json.dumps({"path": path, "sha256": "0"}) + "\n" for path in paths)
        file.write("[" * 100_000 + "\n")
    remove(tmp_path / "run")
    assert not (tmp_path / "run" / "theirs").exists()
    assert sorted(path.name for path in mine.iterdir()) == ["above", "absolute", "linked"]


def test_a_run_around_another_does_not_speak_for_it(ia2: Ia2, out: Path) -> None:
    """A published adapter, without its manifest, that was put into the folder of a run."""
    shutil.copytree(out, out / "inner")
    (out / "inner" / MANIFEST).unlink()
    inner = ["--adapter", "out/inner", "--data", "rows.jsonl"]
    for command in (["predict", *inner], ["eval", *inner], ["analyze", "out/inner", "--parts", "weights"]):
        seen = ["--output-dir", "seen"] if command[0] == "analyze" else []
        ran = ia2(*command, *seen)
        assert ran.status == 0 and ran.err.count("cannot be checked for damage") == 1
    before = tree(out)
    names(ia2("predict", *inner, "--output", "out/inner/predictions.jsonl").refusal(), "cannot be the output")
    names(ia2("report", "out/inner", "--output", "out/inner/metrics.json").refusal(), "cannot be the output")
    assert tree(out) == before


def test_advice_for_a_damaged_run_file_is_accepted(train: Ia2, out: Path) -> None:
    """Without that file a folder is no run, so "delete it" would lead into a dead end."""
    (out / "ia2_run.json").write_text("{}")
    line = train(*SAME).refusal()
    assert "Delete" not in line and "with --overwrite" in line
    assert train(*SAME, "--overwrite").status == 0
    # of which nothing is known is not replaced, and nobody is told so
    (out / "ia2_run.json").write_text("{}")
    (out / MANIFEST).write_text("damaged\n")
    before = tree(out)
    for more in ([], ["--overwrite"]):
        line = train(*SAME, *more).refusal()
        assert "Delete" not in line and "overwrite" not in line and "another --output-dir" in line
    assert tree(out) == before


def test_rows_of_benchmarks_replace_no_others(files: Path, tmp_path: Path, ia2: Ia2) -> None:
    prepare = ["--output-dir", tmp_path / "out"]
    for _ in range(2):
        assert ia2("benchmarks", "prepare", files / "two.yaml", *prepare).status == 0
    written = next((tmp_path / "out").rglob("pool.jsonl"))
    written.write_text("mine")
    names(ia2("benchmarks", "prepare", files / "two.yaml", *prepare).err, "pool.jsonl: holds other rows")
    assert written.read_text() == "mine"
    entry = (files / "two.yaml").read_text()
    (files / "evil.yaml").write_text(entry.replace("name: ", "name: ../../"))
    names(ia2("benchmarks", "prepare", files / "evil.yaml", *prepare).err, "cannot be a folder")


def test_a_folder_in_which_nothing_was_computed_may_be_another_run_s(train: Ia2, out: Path) -> None:
    for path in sorted(out.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        elif path.name not in ("ia2_run.json", "ia2_config.yaml", MANIFEST):
            path.unlink()
    assert train(*SAME, "--seed", 2).status == 0
    assert "seed: 2" in (out / "ia2_config.yaml").read_text()
