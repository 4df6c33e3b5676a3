"""``ia2 benchmarks``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import typer

from ia2.cli.options import JSON, PARSERS, QUIET, option

if TYPE_CHECKING:
    from ia2.data.benchmarks import Benchmark, BenchmarkData

app = typer.Typer(help="The benchmarks of the paper, and one's own: list, show, fetch.", add_completion=False)

_SHOWN_CHARACTERS = 700
_OUTPUT_DIR = "Write the rows there too, as the columns prompt and completion, for the other commands."

_DATA_DIR = option("Folder of mirrors, <folder>/<split>.jsonl; else IA2_DATA_DIR, else the hub.")


@app.command("ls")
def ls(json: bool = JSON) -> None:
    """List the benchmarks."""
    from ia2.cli.output import print_json, print_table, start
    from ia2.data.benchmarks import BENCHMARKS

    start(True)
    if json:
        print_json([_facts(benchmark) for benchmark in BENCHMARKS.values()])
        return
    rows = [
        [
            b.name,
            b.kind,
            b.role,
            b.source if b.hub else "packaged",
            ", ".join(b.verbalisers),
            ", ".join(b.ood),
        ]
        for b in BENCHMARKS.values()
    ]
    print_table(["name", "kind", "role", "hub id", "verbalisers", "OOD"], rows, numbers=False)


@app.command("show")
def show(
    name: str = typer.Argument(..., help="A benchmark's name, or the YAML file of one's own."),
    data_dir: Path | None = _DATA_DIR,
    parser: list[str] | None = PARSERS,
    json: bool = JSON,
) -> None:
    """Show one benchmark and, if its rows are at hand, an example with every verbaliser."""
    from ia2.cli.output import print_json, start
    from ia2.data.benchmarks import DATA_DIR, load_benchmark

    start(True)
    benchmark = load_benchmark(name, parser or ())
    facts = _facts(benchmark)
    is_own = benchmark.path is not None or Path(benchmark.hub or "").is_dir()
    examples = {}
    if is_own or data_dir is not None or os.environ.get(DATA_DIR):
        examples = _examples(_load_all(benchmark, data_dir))
    if json:
        print_json({**facts, **({"examples": examples} if examples else {})})
        return
    verbalisers = facts.pop("verbalisers", {})
    for key, value in {**facts, **verbalisers}.items():
        if key in verbalisers or value not in (None, []):
            print(f"{key + ':':22}{_shown(value)}")
    if not examples:
        print(
            f"Its rows are not at hand: give a folder of mirrors (--data-dir or IA2_DATA_DIR), or run "
            f"`ia2 benchmarks prepare {name}` to fetch them from the hub."
        )
    _print_examples(examples)


@app.command("prepare")
def prepare(
    names: list[str] | None = typer.Argument(
        None, help="Names, or YAML files of one's own; all by default.", show_default=False
    ),
    data_dir: Path | None = _DATA_DIR,
    parser: list[str] | None = PARSERS,
    output_dir: Path | None = option(_OUTPUT_DIR),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Read benchmarks from mirrors or the hub (filling its cache); count rows, show one of each."""
    from ia2.cli.output import print_json, start
    from ia2.data.benchmarks import BENCHMARKS, load_benchmark
    from ia2.utils.errors import DataError

    start(quiet, folders=[output_dir])
    chosen = [load_benchmark(name, parser or ()) for name in names or BENCHMARKS]
    prepared: list[dict[str, Any]] = []
    failed: dict[str, DataError] = {}
    for benchmark in chosen:
        try:
            loaded = _load_all(benchmark, data_dir)
        except DataError as error:  # the others may be at hand
            failed[benchmark.name] = error
            continue
        prepared.append(_prepared(benchmark, loaded))
        if output_dir is not None:
            prepared[-1]["files"] = [str(path) for path in _write(loaded, output_dir)]
        if not json:
            _print_prepared(prepared[-1])
    if json:
        print_json(prepared)
    if failed:
        several = f"{', '.join(failed)} cannot be read; the first: " if len(failed) > 1 else ""
        raise DataError(f"{several}{next(iter(failed.values()))}")


def _load_all(benchmark: Benchmark, data_dir: Path | None) -> dict[str, BenchmarkData]:
    """The rows with every verbaliser, by its name."""
    names: list[str | None] = list(benchmark.verbalisers) or [None]
    return {name or "free text": benchmark.load(data_dir, name) for name in names}


def _write(loaded: dict[str, BenchmarkData], folder: Path) -> Iterator[Path]:
    """``SST2-words/pool.jsonl`` and ``test.jsonl``, for every verbaliser.

    Raises:
        ConfigError: a name that leads elsewhere, or a file with other rows is there.
    """
    from ia2.utils.errors import ConfigError
    from ia2.utils.files import json_lines, write_text

    for name, data in loaded.items():
        called = f"{data.benchmark.name}-{name.replace(' ', '-')}"
        if set(called) & set("/\\\0") or called.startswith("."):
            raise ConfigError(f"{called!r} cannot be a folder of its rows. Change the benchmark's names.")
        for part, rows in (("pool", data.pool), ("test", data.test)):
            if not len(rows):
                continue
            path = folder / called / f"{part}.jsonl"
            text = json_lines({"prompt": row.query, "completion": row.answer} for row in rows)
            if path.exists() and path.read_bytes() != text.encode():
                raise ConfigError(f"{path}: holds other rows. Move it, or choose another --output-dir.")
            write_text(path, text)
            yield path


def _facts(benchmark: Benchmark) -> dict[str, Any]:
    from ia2.prompts.task import stop_text

    return {
        **{"name": benchmark.name, "kind": benchmark.kind, "role": benchmark.role},
        **benchmark.model_dump(mode="json", exclude_unset=True, exclude_none=True),
        "default_verbaliser": benchmark.verbaliser,
        "stop": stop_text([], "\n\n", benchmark.prompt),
        "ood": list(benchmark.ood),
    }


def _shown(value: Any) -> str:
    """A fact on one line: line breaks and leading spaces must be seen."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, str) and (value != value.strip() or "\n" in value):
        return repr(value)
    return str(value)


def _examples(loaded: dict[str, BenchmarkData]) -> dict[str, dict[str, str | None]]:
    return {
        name: {"prompt": data.test[0].query, "answer": data.test[0].answer} for name, data in loaded.items()
    }


def _prepared(benchmark: Benchmark, loaded: dict[str, BenchmarkData]) -> dict[str, Any]:
    data = next(iter(loaded.values()))
    return {
        **{"name": benchmark.name, "kind": benchmark.kind, "role": benchmark.role},
        **{"source": benchmark.source, "pool": len(data.pool), "test": len(data.test)},
        "answers": {
            name: {part: _answers(rows, part) for part in ("pool", "test")} for name, rows in loaded.items()
        },
        "fingerprint": data.fingerprint,
        "notes": data.notes,
        "examples": _examples(loaded),
    }


def _answers(data: BenchmarkData, part: str) -> dict[str, int]:
    """How often each label occurs; of free text, how long it is."""
    answers = getattr(data, part).answers
    if data.verbaliser is not None or not answers:
        return dict(sorted(Counter(answers).items()))
    lengths = [len(answer) for answer in answers]
    return {"median characters": round(median(lengths)), "most characters": max(lengths)}


def _print_prepared(facts: dict[str, Any]) -> None:
    counts = [f"{facts[part]:,} {part} rows" for part in ("pool", "test") if facts[part]]
    print(f"{facts['name']} ({facts['role']}; {facts['source']}): {', '.join(counts)}")
    for name, answers in facts["answers"].items():
        for part, found in answers.items():
            if found:
                shares = ", ".join(f"{answer.strip()} {count:,}" for answer, count in found.items())
                print(f"  {part} answers, {name}: {shares}")
    for note in facts["notes"]:
        print(f"  note: {note}")
    _print_examples(facts["examples"])
    for file in facts.get("files", []):
        print(f"  written: {file}")
    print(flush=True)


def _print_examples(examples: dict[str, dict[str, str | None]]) -> None:
    for name, example in examples.items():
        print(f"  first test row, {name}:")
        text = f"{example['prompt']}{example['answer']}"
        cut = text[:_SHOWN_CHARACTERS]
        for line in (cut + "…" if cut != text else cut).splitlines():
            print(f"    | {line}")
