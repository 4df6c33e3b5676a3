"""Mistakes with ``--unlabelled``: one line each, and nothing half-written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.benches import icl_examples
from helpers.command_line import run, write_rows

ROWS = icl_examples(9, task=1, num_classes=2)
MORE = icl_examples(20, seed=9, task=1, num_classes=2)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), [(e.query, e.answer or "") for e in ROWS])
    write_rows(Path("more.jsonl"), [{"prompt": e.query} for e in MORE])
    write_rows(Path("same.jsonl"), [{"prompt": e.query} for e in ROWS])
    write_rows(Path("texts.jsonl"), [{"text": e.query} for e in MORE])
    Path("empty.jsonl").write_text("")
    yield tmp_path


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--unlabelled", "moore.jsonl"], "moore.jsonl: no such file"),
        (["--unlabelled", "texts.jsonl"], "texts.jsonl: no column 'prompt'"),
        (["--unlabelled", "empty.jsonl"], "empty.jsonl is empty: there is not a single row in it"),
        (
            ["--unlabelled", "same.jsonl"],
            "same.jsonl: at least two unlabelled rows are needed, and 0 can be used of 9 rows, without 9 "
            "that are labelled or test rows too. Give other rows, or leave out --unlabelled.",
        ),
        (["--unlabelled", "more.jsonl", "--max-unlabelled", "0"], "max_unlabelled: input should be greater"),
        (["--unlabelled", ""], "unlabelled: string should have at least 1 character"),
        (
            ["--recipe", "pseudo-sft"],
            "recipe 'pseudo-sft': its stage sft needs unlabelled rows. Name some with --unlabelled",
        ),
        (
            ["--recipe", "ia2", "--align-rows", "unlabelled"],
            "recipe 'ia2': its stage align needs unlabelled rows. Name some with --unlabelled",
        ),
        (["--align-rows", "everything"], "align.rows: input should be 'labelled', 'unlabelled' or 'both'"),
        (
            ["--unlabelled", "more.jsonl", "--max-context-tokens", "8"],
            "no demonstration fits beside the prompt in the context window of 8 tokens",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_one_line_and_nothing_written(
    command: str,
    given: list[str],
    said: str,
    here: Path,
    tiny_icl_model_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "compare" and "--recipe" in given:
        given = ["--recipes", *given[1:]]
    ran = run(
        capsys, command, "--model", tiny_icl_model_path, "--data", "rows.jsonl", "--output-dir", "out",
        "--quiet", *given,
    )  # fmt: skip
    assert said in ran.refusal()
    assert not Path("out").exists()


def test_what_a_refusal_suggests_is_accepted(
    here: Path, tiny_icl_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(
        capsys, "train", "--model", tiny_icl_model_path, "--data", "rows.jsonl", "--output-dir", "out",
        "--recipe", "pseudo-sft", "--unlabelled", "more.jsonl", "--sft-epochs", "1",
    )  # fmt: skip
    assert ran.status == 0, ran.err


def test_every_format_of_data_is_one_of_unlabelled_rows(
    here: Path, tiny_icl_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(f"{example.query}\n" for example in MORE)
    Path("more.csv").write_text(f"prompt\n{lines}")
    ran = run(
        capsys, "train", "--model", tiny_icl_model_path, "--data", "rows.jsonl", "--output-dir", "out",
        "--recipe", "ia2", "--unlabelled", "more.csv", "--align-epochs", "1", "--json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    unlabelled = ran.json["num_unlabelled"] + ran.json["num_unlabelled_dev"]
    assert 0 < unlabelled <= len(MORE)
