"""A benchmark of one's own is one YAML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.benchmark_rows import (
    ROOT,
    ROWS,
    mirror,
    own,
    some_rows,
)
from helpers.example_rows import said

from ia2.data.benchmarks import BENCHMARKS, load_benchmark
from ia2.utils.errors import ConfigError, DataError


def test_ones_own_benchmark(tmp_path: Path) -> None:
    mirror(tmp_path, train=some_rows(0, 30), test=some_rows(30, 20))
    benchmark = load_benchmark(own(tmp_path / "own.yaml", ood=["PoemS", "other.yaml"]))
    assert benchmark.ood == ("PoemS", str(tmp_path / "other.yaml"))
    data = benchmark.load("nowhere", max_test=5)  # its files are its own
    assert (len(data.pool), len(data.test)) == (30, 5)
    assert data.pool.raw_labels == {" no": 0, " yes": 1}
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"Own: no file train\.jsonl in .*\.csv"):
        benchmark.load()
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.csv").write_text('text,label\n"a, b",1\nc,0\n')
    data = load_benchmark(own(tmp_path / "own.yaml", pool=None)).load()
    assert sorted(e.query for e in data.test) == ["Text:a, b\nLabel:", "Text:c\nLabel:"]
    assert len(data.pool) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "x"}, "unknown key 'promt'. Did you mean 'prompt'?"),
        ({"test": {"spilt": "a", "rows": 3}}, "unknown key 'test.spilt'. Did you mean 'split'?"),
        ({"hub": "a/b"}, "give hub"),
        ({"path": None}, "give hub"),
        ({"label": None, "verbalisers": None}, "give one of label, choices and answer, not none"),
        ({"answer": "{text}"}, "give one of label, choices and answer, not label and answer"),
        ({"verbalisers": None}, "labels need verbalisers"),
        ({"parser": "hash"}, "for free text"),
        ({"prompt": "Text:{text"}, "is malformed"),
        ({"prompt": "Text:"}, "names no column"),
        (
            {"verbalisers": {"words": {0: " no", 1: " yes"}, "digits": {0: "0"}}},
            "verbalisers.digits: its labels are 0, where 0, 1 are expected",
        ),
        ({"label": None, "verbalisers": None, "answer": "{label}", "parser": "hsh"}, "Did you mean 'hash'?"),
        ({"ood": ["poems"]}, "ood: unknown benchmark 'poems'. Did you mean 'PoemS'?"),
        ({"filter": {"label": "all"}}, "filter.label"),
        (
            {"label": None, "choices": {"labels": ["a", "b"], "right": "x"}},
            "give right and wrong, or texts, keys and answer",
        ),
        (
            {"label": None, "choices": {"labels": ["a", "b", "c"], "right": "x", "wrong": ["y"]}},
            "2 choices and 3 labels",
        ),
        (
            {"label": None, "choices": {"labels": ["0", "1"], "right": "x", "wrong": ["y"]}},
            "prompt: write {choices} where the choices come",
        ),
        (
            {
                "label": None,
                "choices": {"labels": ["0", "1"], "right": "x", "wrong": ["y"], "line": "{choice}"},
            },
            "line: write {label} and {choice}",
        ),
    ],
)
def test_entries_that_are_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as info:
        load_benchmark(own(tmp_path / "own.yaml", **changes))
    assert "own.yaml: " in said(info)
    assert message in said(info)


def test_files_that_are_wrong(tmp_path: Path) -> None:
    entry = own(tmp_path / "own.yaml", pool=None)
    (tmp_path / "test.jsonl").write_text('{"text": "a"\n[1]\n')
    with pytest.raises(DataError, match=r"Own \(test\): 2 bad rows: test\.jsonl:1: .*; test\.jsonl:2: "):
        load_benchmark(entry).load()
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"^Own \(test\): "):
        load_benchmark(entry).load()
    mirror(tmp_path, test=[{"text": "a", "label": 7}])
    with pytest.raises(DataError, match=r"label '7', which is not in the label map"):
        load_benchmark(entry).load()
    mirror(tmp_path, test=some_rows(0, 4))
    filtered = own(entry, pool=None, filter={"label": [5]})
    with pytest.raises(DataError, match=r"Own \(test\): .*4 rows .*filter"):
        load_benchmark(filtered).load()
    with pytest.raises(DataError, match=r"4 bad rows: test\.jsonl:1: .*'lable'"):
        load_benchmark(own(entry, pool=None, filter={"lable": [1]})).load()


def test_choices_that_are_wrong(tmp_path: Path) -> None:
    row = ROWS["QASCr"][0]
    texts = row["choices"]
    for bad, message in [
        ({**row, "answerKey": "J"}, "the right choice 'J' is not among A, B"),
        ({**row, "answerKey": None}, "the column 'answerKey' is missing"),
        (
            {**row, "choices": {"text": texts["text"][:4], "label": texts["label"][:4]}},
            "4 choices, where there are 8",
        ),
    ]:
        mirror(tmp_path / "qasc", validation=[bad])
        with pytest.raises(DataError, match=r"QASCr: 1 bad row: validation\.jsonl:1: ") as info:
            BENCHMARKS["QASCr"].load(tmp_path)
        assert message in said(info)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown benchmark 'sst2'\. Did you mean 'SST2'\?"):
        load_benchmark("sst2")
    with pytest.raises(ConfigError, match=r"There are SST2, .*, Intents.* path of a YAML file"):
        load_benchmark("nothing like it")
    with pytest.raises(DataError, match=r"missing\.yaml: no such file"):
        load_benchmark(tmp_path / "missing.yaml")


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```ya?ml\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        name = re.match(r"# (\S+\.yaml)", block)
        assert name is not None, block
        (tmp_path / name[1]).write_text(block)
        benchmark = load_benchmark(tmp_path / name[1])
        assert benchmark.path is not None
        rows = [
            {"text": f"my order number {n}", "label": list(benchmark.verbalisers["words"])[n % 3]}
            for n in range(30)
        ]
        mirror(benchmark.path, train=rows[:20], test=rows[20:])
        data = benchmark.load()
        assert (len(data.pool), len(data.test)) == (20, 10)
