"""What streams, disks, memory, devices and names refuse is one line, before the work where it can be."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults import bad_inputs
from helpers.command_line import Ran, run, run_apart, tree, write_rows
from helpers.finished_runs import write_comparison
from tiny_icl.tasks import sample_task

from ia2.cli import boundary
from ia2.data.examples import Examples
from ia2.utils.errors import DataError, ModelError, RunFolderError
from ia2.utils.manifest import begin

TASK = sample_task(0, num_classes=3)
LONG = "n" * 300  # names of files end at 255 bytes
LABEL = "größe 😀"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_icl_model_path: Path) -> Path:
    """A working folder with labelled rows, the small model and a finished comparison."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", TASK.examples(12, seed=0))
    (tmp_path / "model").symlink_to(tiny_icl_model_path)
    begin(tmp_path / "compared")  # what is listed is as it was written, so errors in it are ours
    write_comparison(tmp_path / "compared")
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo.csv")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


Command = Callable[..., Ran]


@pytest.fixture
def ia2(here: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """``ia2`` in that folder."""
    return lambda *arguments: run(capsys, *arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Path:
    """An adapter one of whose labels is not ASCII."""
    from ia2.cli import main

    folder = tmp_path_factory.mktemp("finished")
    names = dict(zip(TASK.answers, (LABEL, "b", "c"), strict=True))
    write_rows(folder / "rows.jsonl", [{"text": q, "label": names[a]} for q, a in TASK.examples(12, seed=0)])
    settings = {
        "prompt_template": "{text}",
        "completion_template": "{label}",
        "label_map": {name: answer for answer, name in names.items()},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    options = {
        "--config": folder / "settings.yaml",
        "--model": tiny_icl_model_path,
        "--data": folder / "rows.jsonl",
        "--output-dir": folder / "out",
        "--recipe": "sft",
        "--sft-epochs": 1,
    }
    main(["train", "--quiet", *(str(part) for option in options.items() for part in option)])
    return folder / "out"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loads a model has begun to work."""

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded before the outputs were looked at")

    monkeypatch.setattr("ia2.experiment.adapt.load_base", loaded)


# --------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("options", [["--json"], []])
def test_labels_go_to_streams_of_any_encoding(
    finished: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bytes_ = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_, encoding="ascii"))
    given = ["predict", "--adapter", finished, "--data", finished.parent / "rows.jsonl", "--quiet", *options]
    ran = run(capsys, *given)
    assert (ran.status, ran.err) == (0, "")
    sys.stdout.flush()
    out = bytes_.getvalue().decode("ascii")
    rows = json.loads(out) if options else [json.loads(line) for line in out.splitlines()]
    assert LABEL in rows[0]["labels"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_a_stream_lacks_is_written_as_json_has_it(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    bytes_ = io.BytesIO()
    stream = io.TextIOWrapper(bytes_, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    boundary.open_streams()
    print(json.dumps([LABEL, "\ud800", "日本"], ensure_ascii=False), flush=True)
    assert json.loads(bytes_.getvalue().decode(encoding)) == [LABEL, "\ud800", "日本"]


def streamed(*arguments: str, shell: str, cwd: Path) -> Ran:
    """``ia2`` with redirections of a shell."""
    code = f'"$0" -m ia2 "$@" {shell}'
    done = subprocess.run(
        ["bash", "-c", code, sys.executable, *arguments], capture_output=True, text=True, timeout=100, cwd=cwd
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def test_a_full_output_is_said_before_the_work(here: Path) -> None:
    for arguments in (
        ["env"],
        ["train", "--model", "model", "--data", "rows.jsonl", "--output-dir", "out"],
    ):
        line = streamed(*arguments, shell="> /dev/full", cwd=here).refusal()
        assert "standard output cannot be written (No space left on device)" in line
    assert not (here / "out").exists()
    assert "standard output is closed" in streamed("env", shell=">&-", cwd=here).refusal()


def test_an_output_that_is_full_at_the_end(here: Path) -> None:
    # files may grow to a kilobyte: the beginning of the text fits
    shell = "> out.txt"
    code = f'ulimit -f 1; "$0" -m ia2 "$@" {shell}'
    done = subprocess.run(
        ["bash", "-c", code, sys.executable, "benchmarks", "ls", "--json"],
        capture_output=True,
        text=True,
        cwd=here,
    )
    line = Ran(done.returncode, done.stdout, done.stderr).refusal()
    assert "standard output, or a file: file too large" in line


def test_closed_streams(here: Path, finished: Path) -> None:
    assert streamed("benchmarks", "ls", "--json", shell="<&-", cwd=here).json
    ran = streamed("doctor", str(finished), shell="2>&-", cwd=here)
    assert ran.status == 0
    assert "finished" in ran.out
    # and what goes wrong is not written into the results
    assert streamed("doctor", "file", shell="2>&-", cwd=here) == Ran(2, "", "")
    assert streamed("doctor", "file", shell="2>/dev/full", cwd=here) == Ran(2, "", "")


def test_a_pipe_that_is_closed(here: Path) -> None:
    ran = streamed("benchmarks", "show", "SST2", shell="| true; exit ${PIPESTATUS[0]}", cwd=here)
    assert ran.status in (0, 1)
    assert ran.err == ""


# --------------------------------------------------------------------------------------------- outputs

FOLDERS = [
    "file",
    "file/out",
    "/proc/out",
    "/dev/full/out",
    LONG,
    f"out/{LONG}",
    "é" * 200,
    "a/" * 3000,
    "loop/out",
]
TRAINING = ["--model", "model", "--data", "rows.jsonl", "--output-dir"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.usefixtures("no_model")
def test_folders_that_cannot_be_written_are_refused_before_the_work(
    here: Path, ia2: Command, finished: Path, folder: str
) -> None:
    before = tree(here)
    for arguments in (
        ["train", *TRAINING],
        ["compare", *TRAINING],
        ["curve", *TRAINING[:-1], "--test-data", "rows.jsonl", "--output-dir"],
        ["demo", "--output-dir"],
        ["analyze", finished, "--output-dir"],
        ["analyze", finished, "--figures"],
        ["report", "compared", "--figures"],
        ["report", "compared", "--output-dir"],
        ["benchmarks", "prepare", "Intents", "--output-dir"],
    ):
        line = ia2(*arguments, folder).refusal()
        assert folder[:200] in line
        assert "Choose another folder" in line
        assert len(line) < 1700
    assert {k: v for k, v in tree(here).items() if k != "fifo.csv"} == before
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    "file", [f"{f}/x.csv" for f in FOLDERS] + [f"{LONG}.csv", "fifo.csv", "compared.csv"]
)
@pytest.mark.usefixtures("no_model")
def test_files_that_cannot_be_written_are_refused_before_the_work(
    here: Path, ia2: Command, finished: Path, file: str
) -> None:
    (here / "compared.csv").mkdir()
    common = ["--adapter", finished, "--data", "rows.jsonl", "--output", file]
    for arguments in (["predict", *common], ["eval", *common], ["report", "compared", "--output", file]):
        assert "Choose another file" in ia2(*arguments).refusal()
    assert (here / "fifo.csv").is_fifo()  # a file would have taken its name
    assert not (here / "out").exists()


def test_a_sweep_into_a_folder_that_cannot_be_written(ia2: Command, here: Path) -> None:
    (here / "grid.yaml").write_text("benchmarks: [Intents]\nmodels: [model]\nrecipes: [sft]\n")
    assert "Choose another folder" in ia2("sweep", "grid.yaml", "--output-dir", "file/out").refusal()


def test_the_writers_say_it_too(here: Path) -> None:
    from ia2.utils.files import atomic_dir, write_text

    for path in (here / LONG, here / "loop" / "x", here / "fifo.csv", here / "file" / "x", here / "compared"):
        with pytest.raises(RunFolderError, match=r"name|file|link"):
            write_text(path, "a")
    with pytest.raises(RunFolderError, match="too long"), atomic_dir(here / LONG):
        pass
    assert (here / "fifo.csv").is_fifo()


def test_a_figure_is_whole_or_not_there(ia2: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fdopen", full)
    line = ia2("report", "compared", "--figures", "drawn").refusal()
    assert "drawn/" in line
    assert "no space left" in line
    assert not list((here / "drawn").iterdir())


def test_a_report_on_a_full_disk(ia2: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    assert "page.html: no space left" in ia2("report", "compared", "--output", "page.html").refusal()


# -------------------------------------------------------------------------------------- caches, devices


@pytest.mark.parametrize("variable", ["IA2_CACHE_DIR", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("folder", ["file", "/proc/cache", LONG, "loop"])
def test_a_cache_folder_that_is_none(
    ia2: Command, here: Path, monkeypatch: pytest.MonkeyPatch, variable: str, folder: str
) -> None:
    monkeypatch.delenv("IA2_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, folder)
    (here / "model.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    line = ia2("train", "--model", "model.gguf", *TRAINING[2:], "out").refusal()
    assert folder[:100] in line
    assert "IA2_CACHE_DIR" in line


def test_a_hub_cache_that_is_a_file(here: Path) -> None:
    for options in (
        ["--model", "owner/name", *TRAINING[2:]],
        ["--model", "model", "--data", "owner/name", "--output-dir"],
    ):
        run_apart("train", *options, "out", "--quiet", HF_HOME=str(here / "file")).refusal()


@pytest.mark.parametrize("device", ["meta", "hpu", "xla", "mkldnn", "vulkan", "cuda:99", "cpu:-1", "", "gpu"])
def test_devices_that_compute_nothing(
    ia2: Command, finished: Path, device: str, recwarn: pytest.WarningsRecorder
) -> None:
    rows = finished.parent / "rows.jsonl"
    line = ia2("predict", "--adapter", finished, "--data", rows, "--device", device).refusal()
    assert f"device '{device}' is not available" in line
    assert not [w for w in recwarn if "mkldnn" in str(w.message)]


# ----------------------------------------------------------------------------------------------- inputs

NO_RUNS = [
    "/",
    "/proc",
    "/proc/self",
    "file",
    "fifo.csv",
    "loop",
    "/dev/null",
    LONG,
    "a/" * 3000,
    "~nobody-at-all",
    "",
]


@pytest.mark.parametrize("folder", NO_RUNS)
def test_folders_that_are_no_runs(ia2: Command, folder: str) -> None:
    for command in ("doctor", "analyze", "report"):
        ia2(command, folder).refusal()
    for command in ("predict", "eval"):
        ia2(command, "--adapter", folder, "--data", "rows.jsonl").refusal()


def test_an_empty_text_is_no_folder(ia2: Command, here: Path, finished: Path) -> None:
    """What a shell makes of a variable that is not set was read as the folder that one is in."""
    write_rows(here / "train.jsonl", [{"text": q, "label": "b"} for q, _ in TASK.examples(2, seed=1)])
    command = ["predict", "--adapter", finished, "--data", "rows.jsonl"]
    for flag in ("--data", "--adapter", "--model", "--output"):
        assert f"{flag}: an empty text is no path" in ia2(*command, flag, "").refusal()
        assert f"{flag}: an empty text is no path" in ia2(*command, f"{flag}=").refusal()
    assert "--output-dir: an empty" in ia2("analyze", finished, "--output-dir", "").refusal()
    assert "an empty text is no path" in ia2("analyze", finished, "").refusal()
    with pytest.raises(DataError, match="an empty text is no path"):
        Examples.load("")


@pytest.mark.parametrize("name", ["~nobody-at-all", "~nobody-at-all/x.yaml", LONG, "a/" * 3000])
def test_names_that_no_file_can_have(ia2: Command, name: str) -> None:
    ia2("train", "--model", name, "--data", "rows.jsonl", "--output-dir", "out").refusal()
    ia2("train", *TRAINING, "out", "--config", name).refusal()
    ia2("train", *TRAINING, "out", "--context-file", name, "--quiet").refusal()
    ia2("sweep", name).refusal()
    ia2("benchmarks", "show", name).refusal()


@pytest.mark.parametrize(
    "text",
    ["1: 2", "? \n: 2", "? [a]\n: 2", "adapter: {1: 2}", "seed: 2024-99-99", "seed: !!timestamp x",
     "seed: !!binary '%'", "seed: " + "9" * 5000, "seed: " + "[" * 1_000, "seed: \0", "labels: &a [*a]"],
)  # fmt: skip
def test_yaml_of_any_kind(ia2: Command, here: Path, text: str) -> None:
    (here / "s.yaml").write_text(text)
    for arguments in (["train", *TRAINING, "out", "--config"], ["sweep"], ["benchmarks", "show"]):
        assert "s.yaml" in ia2(*arguments, "s.yaml").refusal()


@pytest.mark.parametrize("option", ["--adapter-peft", "--label-map", "--labels"])
def test_json_that_is_nested_too_deeply(ia2: Command, option: str) -> None:
    for value in ("[" * 100_000, '{"a":' * 100_000, "[1]", "[[1]]"):
        line = ia2("train", *TRAINING, "out", option, value).refusal()
        assert len(line) < 1700


# ------------------------------------------------------------------------------- tokenizers and embeddings


def cut(model: Path, to: Path, rows: int) -> Path:
    """The model with so many rows of its embedding."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors")
    kept = {n: t[:rows].clone() if "embed" in n or "lm_head" in n else t for n, t in tensors.items()}
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return to


def test_a_tokenizer_with_more_tokens_than_the_embedding(
    ia2: Command, here: Path, tiny_icl_model_path: Path
) -> None:
    cut(tiny_icl_model_path, here / "small", 72)
    line = ia2("train", "--model", "small", *TRAINING[2:], "out").refusal()
    assert "tokenizer has 73 tokens, its embedding 72 rows" in line
    assert not (here / "out").exists()


def test_a_marker_without_a_row_is_refused_where_a_prompt_has_it(
    here: Path, tiny_icl_model_path: Path
) -> None:
    """Gemma 3's tokenizer has one token more than its text models: the marker of an image."""
    import torch

    from ia2.models.load import load_base

    shutil.copytree(tiny_icl_model_path, here / "marked")
    tokenizer = load_base(str(tiny_icl_model_path)).tokenizer
    assert tokenizer.add_tokens(["<image>"], special_tokens=True) == 1
    tokenizer.save_pretrained(here / "marked")
    base = load_base(str(here / "marked"))
    assert len(base.tokenizer) == 74
    base.model(input_ids=torch.tensor([base.tokenizer("a0 a1")["input_ids"]]))
    with pytest.raises(ModelError, match=r"a prompt has token 73, and the embedding has only 73 rows"):
        base.model(input_ids=torch.tensor([base.tokenizer("a0 <image>")["input_ids"]]))


def test_a_model_that_breaks_its_reader(ia2: Command, here: Path, tiny_icl_model_path: Path) -> None:
    shutil.copytree(tiny_icl_model_path, here / "strange")
    config = json.loads((here / "strange" / "config.json").read_text())
    for change in ({"num_attention_heads": 0}, {"hidden_size": "large"}, {"rope_parameters": 3}):
        (here / "strange" / "config.json").write_text(json.dumps({**config, **change}))
        line = ia2("train", "--model", "strange", *TRAINING[2:], "out").refusal()
        assert "model strange cannot be read" in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--report-to", "nothing"], "report_to: 'nothing' is not installed. There are all, none"),
        (["--adapter-peft", '{"peft_type": "LORA", "r": "x"}'], "does not work with"),
    ],
)
def test_settings_that_only_a_library_refused(ia2: Command, options: list[str], expected: str) -> None:
    assert expected in ia2("train", *TRAINING, "out", "--quiet", *options).refusal()
    assert not Path("out").exists()


# ------------------------------------------------------------------------------- the boundary on its own


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "Input/output error", "a/b"), "a/b: input/output error"),
        (OSError(errno.EMFILE, "Too many open files", "a/b"), "a/b: too many open files. Raise the limit"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), "a: too many levels"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: no space left"),
        (OSError(errno.ESTALE, "Stale file handle", b"a/b"), "a/b: stale file handle"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: permission denied. Choose"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "a: is a directory. Name a file"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), "a: no such file"),
        (OSError("the mirror\nis gone"), "the mirror is gone"),
        (OSError(), "OSError"),
        (MemoryError(), "out of memory (MemoryError)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory (CUDA"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not Unicode"),
    ],
)  # fmt: skip
def test_errors_of_the_machine(
    ia2: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("ia2.report.doctor.signatures.diagnose_all", fails)
    assert expected in ia2("doctor", "compared").refusal()


@pytest.mark.parametrize(
    "error", [TypeError("a\nb"), AssertionError(), KeyError("x"), RecursionError("deep")]
)
def test_our_own_mistakes(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception) -> None:
    from ia2.cli import main

    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setenv("TMPDIR", str(here))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv(boundary.DEBUG, raising=False)
    monkeypatch.setattr("ia2.report.doctor.signatures.diagnose_all", fails)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "compared"])
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"ia2: bug: {type(error).__name__}")
    assert "doctor.py:" in line
    assert "please report it" in line
    (written,) = here.glob("ia2-traceback-*.txt")
    assert str(written) in line
    assert "Traceback" in written.read_text()
    monkeypatch.setenv(boundary.DEBUG, "1")
    with pytest.raises(type(error)):
        main(["doctor", "compared"])


def test_memory_that_is_not_there(here: Path) -> None:
    code = (
        "import sys\nfrom ia2.cli import main\nimport ia2.report.doctor.signatures as s\n"
        "s.diagnose_all = lambda _: bytearray(1 << 60)\nmain(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "x"], capture_output=True, text=True, cwd=here
    )
    assert "out of memory" in Ran(done.returncode, done.stdout, done.stderr).refusal()


# --------------------------------------------------------------------------------------- generated inputs


@pytest.mark.slow
def test_generated_bad_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    status = bad_inputs.main(["--count", "16", "--seed", "46"])
    said = capsys.readouterr().out
    assert re.search(r"^all: +16 refused$", said, re.MULTILINE), said
    assert status == 0


def test_inputs_are_drawn_anew_by_seed() -> None:
    from faults.bad_inputs import GOOD, generate

    inputs = generate(500)
    shown = [given.shown() for _, given in inputs]
    assert shown == [given.shown() for _, given in generate(500)]
    assert shown != [given.shown() for _, given in generate(500, seed=1)]
    assert {command for command, _ in inputs} == set(GOOD)
    assert len(set(shown)) > 480
