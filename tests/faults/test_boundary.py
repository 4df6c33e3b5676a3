"""What streams, disks and memory refuse is one line, and a run goes on once they do not."""

from __future__ import annotations

import errno
import gc
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Ia2, Ran, names, run_apart
from helpers.finished_runs import write_comparison

from ia2.cli import boundary, main
from ia2.utils.locks import LOCK
from ia2.utils.manifest import begin

LABEL = "größe 😀"
DIAGNOSE = "ia2.report.doctor.diagnosis.diagnose_all"


@pytest.fixture
def compared(here: Path) -> Path:
    begin(here / "compared")  # what is listed is as it was written, so errors in it are ours
    write_comparison(here / "compared")
    return here / "compared"


# ----------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_a_stream_lacks_is_written_as_json_has_it(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    boundary.open_streams()
    print(json.dumps([LABEL, "\ud800", "日本"], ensure_ascii=False), flush=True)
    assert json.loads(written.getvalue().decode(encoding)) == [LABEL, "\ud800", "日本"]


def streamed(shell: str, *arguments: str, before: str = "") -> Ran:
    """``ia2`` with redirections of a shell."""
    code = f'{before} "$0" -m ia2 "$@" {shell}'
    command = ["bash", "-c", code, sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_streams_of_a_shell(here: Path, compared: Path) -> None:
    train = ["train", "--model", "model", "--data", "rows.jsonl", "--output-dir", "out"]
    line = streamed("> /dev/full", *train).refusal()
    names(line, "standard output cannot be written (No space left on device)")
    assert not (here / "out").exists()
    names(streamed(">&-", "env").refusal(), "standard output is closed")
    # files may grow to a kilobyte: the beginning of the text fits
    line = streamed("> out.txt", "benchmarks", "ls", "--json", before="ulimit -f 1;").refusal()
    names(line, "standard output, or a file: file too large")
    ran = streamed("<&- 2>&-", "doctor", "compared")
    assert ran.status == 0 and "finished" in ran.out
    # and what goes wrong is not written into the results
    assert streamed("2>&-", "doctor", "rows.jsonl") == Ran(2, "", "")
    ran = streamed("| true; exit ${PIPESTATUS[0]}", "benchmarks", "show", "SST2")
    assert ran.status in (0, 1) and ran.err == ""


def test_an_interrupt_while_commands_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "ia2.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "ia2.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    from ia2.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert gc.isenabled()  # for whoever called


def test_a_hub_cache_that_is_a_file(here: Path) -> None:
    options = ["--model", "owner/name", "--data", "rows.jsonl", "--output-dir", "out", "--quiet"]
    names(run_apart("train", *options, HF_HOME=str(here / "rows.jsonl")).refusal(), "owner/name")


# ------------------------------------------------------------------------------- a marker of images


def test_a_token_without_a_row_is_refused_where_a_prompt_has_it(
    here: Path, tiny_icl_model_path: Path
) -> None:
    """Gemma 3's tokenizer has one token more than its text models: the marker of an image."""
    import torch

    from ia2.models.load import load_base
    from ia2.utils.errors import ModelError

    base = load_base(str(tiny_icl_model_path))
    assert base.tokenizer.add_tokens(["<image>"], special_tokens=True) == 1
    base.model.save_pretrained(here / "marked")
    base.tokenizer.save_pretrained(here / "marked")
    base = load_base(str(here / "marked"))
    base.model(input_ids=torch.tensor([base.tokenizer("a0 a1")["input_ids"]]))
    with pytest.raises(ModelError, match=r"a prompt has token 73, and the embedding has only 73 rows"):
        base.model(input_ids=torch.tensor([base.tokenizer("a0 <image>")["input_ids"]]))


# ------------------------------------------------------------------------------------------- disks


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


# safetensors, then torch.save, on a full disk; neither raises an OSError
SERIALISING = [
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 140160 vs 140052"),
]


@pytest.mark.parametrize(
    ("place", "error", "named"),
    [
        ("peft.PeftModel.save_pretrained", OSError(errno.ENOSPC, "full"), "align/lr-0.001"),
        *(("transformers.Trainer._save_checkpoint", error, "align/lr-0.001") for error in SERIALISING),
    ],
)
def test_no_space_for_a_stage(
    place: str, error: Exception, named: str, train: Ia2, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        line = train("--checkpoint-every", 1).refusal()
    names(line, f"{named}: no space left", "run the same command again")
    assert not (here / "out" / "align" / "lr-0.001").exists()
    assert train("--checkpoint-every", 1).status == 0


def test_no_space_for_a_file(
    train: Ia2, ia2: Ia2, here: Path, compared: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.fdopen", full)
        names(train().refusal(), "out", "no space left")
        assert [path.name for path in (here / "out").rglob("*")] == [LOCK]
        predict = ["predict", "--adapter", finished, "--data", "rows.jsonl", "--output", "found.csv"]
        names(ia2(*predict).refusal(), "found.csv: no space left")
        names(ia2("report", "compared", "--figures", "drawn").refusal(), "drawn/", "no space left")
    assert not list(here.glob("*found.csv*")) and not list((here / "drawn").iterdir())

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", forbidden)
    names(train().refusal(), "not writable (Permission denied)", "Choose another folder")


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "Input/output error", "a/b"), "a/b: input/output error"),
        (OSError(errno.EMFILE, "Too many open files", "a/b"), "a/b: too many open files. Raise the limit"),
        (OSError(errno.ESTALE, "Stale file handle", b"a/b"), "a/b: stale file handle"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: permission denied. Choose"),
        (OSError("the mirror\nis gone"), "the mirror is gone"),
        (OSError(), "OSError"),
        (MemoryError(), "out of memory (MemoryError)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory (CUDA"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not Unicode"),
    ],
    ids=repr,
)
def test_errors_of_the_machine(error: Exception, expected: str) -> None:
    line = boundary.in_words(error)
    assert line is not None and expected in line and "\n" not in line


@pytest.mark.parametrize("error", [TypeError("a\nb"), AssertionError(), RecursionError("deep")], ids=repr)
def test_our_own_mistakes(
    error: Exception, compared: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setenv("TMPDIR", str(here))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv(boundary.DEBUG, raising=False)
    monkeypatch.setattr(DIAGNOSE, fails)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "compared"])
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    (written,) = here.glob("ia2-traceback-*.txt")
    assert (stop.value.code, captured.out) == (1, "")
    assert line.startswith(f"ia2: bug: {type(error).__name__}")
    names(line, "doctor.py:", "please report it", str(written))
    assert "Traceback" in written.read_text()
    monkeypatch.setenv(boundary.DEBUG, "1")
    with pytest.raises(type(error)):
        main(["doctor", "compared"])
