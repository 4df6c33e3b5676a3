"""Where rows of the benchmarks may come from: mirrors and the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.benchmark_rows import (
    ROWS,
    mirror,
)
from helpers.command_line import names
from helpers.example_rows import said

from ia2.data.benchmarks import BENCHMARKS
from ia2.data.benchmarks.loading import mirror_notes
from ia2.utils.errors import DataError


def test_what_the_mirrors_say(tmp_path: Path, shared_data: Path) -> None:
    readme = "\n".join(
        [
            "| folder | hub id | differs from the hub? |",
            "|---|---|---|",
            "| `one` | a/b | **yes: other rows** (see below) |",
            "| `two` | a/c | no |",
            "| three | a/d | Cut, in part |",
            "",
            "| folder | fields |",
            "|---|---|",
            "| `two` | text |",
            "| `four` | text |",
        ]
    )
    (tmp_path / "README.md").write_text(readme)
    found = {name: mirror_notes(tmp_path, name) for name in ("one", "two", "three", "four")}
    start = "the mirror differs from the hub: "
    assert found == {"one": [start + "other rows"], "two": [], "three": [start + "Cut, in part"], "four": []}
    assert mirror_notes(tmp_path / "nowhere", "one") == []
    notes = {
        name: BENCHMARKS[name].load(shared_data).notes
        for name in ("SST2", "FinS", "PoemS", "GSM8Ks", "Intents")
    }
    assert start + "train is the first 20,000 of 67,349 rows" in notes["SST2"]
    assert start + "re-generated instances, not Apple's" in notes["GSM8Ks"]
    assert notes["FinS"] == notes["PoemS"] == notes["Intents"] == []


def test_the_environment_names_the_mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS["PoemS"][0]
    mirror(tmp_path / "here" / "poem_sentiment", train=[row])
    mirror(tmp_path / "there" / "poem_sentiment", train=[row, {**row, "id": 9, "verse_text": "another"}])
    monkeypatch.setenv("IA2_DATA_DIR", str(tmp_path / "here"))
    assert len(BENCHMARKS["PoemS"].load().test) == 1
    assert len(BENCHMARKS["PoemS"].load(tmp_path / "there").test) == 2


def test_missing_rows_name_both_ways(tmp_path: Path, offline: Path) -> None:
    sst, fins = BENCHMARKS["SST2"], BENCHMARKS["FinS"]
    for benchmark, folder, told in (
        (sst, tmp_path, (f"no file {tmp_path / 'sst2' / 'validation.jsonl'}", "stanfordnlp/sst2")),
        (sst, tmp_path / "nowhere", ("no folder", "from the hub")),
        (fins, None, ("hub cannot be reached", "financial_phrasebank/train.jsonl")),
    ):
        with pytest.raises(DataError, match=f"^{benchmark.name}: .*IA2_DATA_DIR") as info:
            benchmark.load(folder)
        names(said(info), *told)


def test_the_hub_and_a_mirror_are_read_alike(offline: Path) -> None:
    import datasets

    rows = [{"idx": n, "sentence": f"row {n} ", "label": n % 2} for n in range(60)]
    features = datasets.Features(
        {
            "idx": datasets.Value("int32"),
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
        }
    )
    (offline / "hub" / "data").mkdir(parents=True)
    for split, part in (("train", rows[:40]), ("validation", rows[40:])):
        data = datasets.Dataset.from_list(part, features=features)
        data.to_parquet(offline / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    mirror(offline / "mirrors" / "sst2", train=rows[:40], validation=rows[40:])
    hub = BENCHMARKS["SST2"].model_copy(update={"hub": "hub"}).load()
    mirrored = BENCHMARKS["SST2"].load(offline / "mirrors")
    assert hub.fingerprint == mirrored.fingerprint
    assert [e.source.rsplit(":")[-1] for e in hub.test] == [e.source.rsplit(":")[-1] for e in mirrored.test]
    assert hub.test[0].source.startswith("hub/data/validation-00000-of-00001.parquet:")


def test_data_sets_that_are_scripts(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, **given: Any) -> Any:
        asked.append((path, name, given.get("data_dir"), given.get("revision")))
        if given.get("revision") != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found financial_phrasebank.py")
        return [{"sentence": f"row {n}", "label": n % 3} for n in range(9)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    benchmark = BENCHMARKS["FinS"].model_copy(
        update={"test": BENCHMARKS["FinS"].test.model_copy(update={"rows": 2})}
    )
    data = benchmark.load()
    assert (len(data.pool), len(data.test)) == (4, 2)
    hub = "takala/financial_phrasebank"
    assert asked == [
        (hub, "sentences_50agree", None, None),
        (hub, None, "sentences_50agree", "refs/convert/parquet"),
    ]
