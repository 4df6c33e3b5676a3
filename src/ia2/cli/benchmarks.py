"""``ia2 benchmarks``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia2.cli.options import Json, Parsers, Quiet

if TYPE_CHECKING:
    from ia2.data.benchmarks import Benchmark, BenchmarkData

app = typer.Typer(help="The benchmarks of the paper, and one's own: list, show, fetch.", add_completion=False)

_SHOWN_CHARACTERS = 700

DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder of mirrors, <folder>/<split>.jsonl; else IA2_DATA_DIR, else the hub.", show_default=False
    ),
]
Name = Annotated[str, typer.Argument(help="A benchmark's name, or the YAML file of one's own.")]
Names = Annotated[
    list[str] | None,
    typer.Argument(help="Names, or YAML files of one's own; all by default.", show_default=False),
]


@app.command("ls")
def ls(json: Json = False) -> None:
    """List the benchmarks."""
    from ia2.cli.output import print_json, print_wide, start
    from ia2.data.benchmarks import BENCHMARKS

    start(True)
    if json:
        print_json([_facts(benchmark) for benchmark in BENCHMARKS.values()])
        return
    from rich.table import Table

    table = Table()
    for title in ("name", "kind", "role", "hub id", "verbalisers", "OOD"):
        table.add_column(title, no_wrap=title == "name")
    for benchmark in BENCHMARKS.values():
        source = benchmark.source if benchmark.hub else "packaged"
        lists = [", ".join(names) for names in (benchmark.verbalisers, benchmark.ood)]
        table.add_row(benchmark.name, benchmark.kind, benchmark.role, source, *lists)
    print_wide(table)


@app.command("show")
def show(name: Name, data_dir: DataDir = None, parser: Parsers = None, json: Json = False) -> None:
    """Show one benchmark and, if its rows are at hand, an example with every verbaliser."""
    from ia2.cli.output import print_json, start
    from ia2.data.benchmarks import load_benchmark

    start(True)
    benchmark = load_benchmark(name, parser or ())
    facts = _facts(benchmark)
    local = _is_local(benchmark, data_dir)
    if local:
        facts["examples"] = _examples(_load_all(benchmark, data_dir))
    if json:
        print_json(facts)
        return
    for key, value in facts.items():
        if key == "verbalisers":
            for verbaliser, texts in value.items():
                print(f"{verbaliser + ':':22}{_shown(texts)}")
        elif key != "examples" and value not in (None, []):
            print(f"{key + ':':22}{_shown(value)}")
    if not local:
        print(
            f"Its rows are not at hand: give a folder of mirrors (--data-dir or IA2_DATA_DIR), or run "
            f"`ia2 benchmarks prepare {name}` to fetch them from the hub."
        )
        return
    for verbaliser, example in facts["examples"].items():
        _print_example(verbaliser, example)


@app.command("prepare")
def prepare(
    names: Names = None,
    data_dir: DataDir = None,
    parser: Parsers = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Write the rows there too, as the columns prompt and completion, for the other commands.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read benchmarks from mirrors or the hub (filling its cache); count rows, show one of each."""
    from ia2.cli.output import print_json, start
    from ia2.data.benchmarks import BENCHMARKS, load_benchmark
    from ia2.utils.errors import DataError

    start(quiet, folders=[output_dir])
    chosen = [load_benchmark(name, parser or ()) for name in names or BENCHMARKS]
    found: list[dict[str, Any]] = []
    failed: dict[str, DataError] = {}
    for benchmark in chosen:
        try:
            loaded = _load_all(benchmark, data_dir)
        except DataError as error:  # the others may be at hand
            failed[benchmark.name] = error
            continue
        found.append(_prepared(benchmark, loaded))
        if output_dir is not None:
            found[-1]["files"] = [str(path) for path in _write(loaded, output_dir)]
        if not json:
            _print_prepared(found[-1])
    if json:
        print_json(found)
    if failed:
        first = next(iter(failed.values()))
        several = f"{', '.join(failed)} cannot be read; the first: " if len(failed) > 1 else ""
        raise DataError(several + str(first))


def _is_local(benchmark: Benchmark, data_dir: Path | None) -> bool:
    """Whether its rows can be had without the hub."""
    import os

    from ia2.data.benchmarks import DATA_DIR

    own = benchmark.path is not None or Path(benchmark.hub or "").is_dir()
    return own or data_dir is not None or bool(os.environ.get(DATA_DIR))


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

    facts: dict[str, Any] = {"name": benchmark.name, "kind": benchmark.kind, "role": benchmark.role}
    facts.update(benchmark.model_dump(mode="json", exclude_unset=True, exclude_none=True))
    facts["default_verbaliser"] = benchmark.verbaliser
    facts["stop"] = stop_text([], "\n\n", benchmark.prompt_template)
    facts["ood"] = list(benchmark.ood)
    return facts


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
        "name": benchmark.name,
        "kind": benchmark.kind,
        "role": benchmark.role,
        "source": benchmark.source,
        "pool": len(data.pool),
        "test": len(data.test),
        "answers": {
            name: {"pool": _answers(rows, "pool"), "test": _answers(rows, "test")}
            for name, rows in loaded.items()
        },
        "fingerprint": data.fingerprint,
        "notes": data.notes,
        "examples": _examples(loaded),
    }


def _answers(data: BenchmarkData, part: str) -> dict[str, int]:
    """How often each label occurs; of free text, how long it is."""
    from collections import Counter
    from statistics import median

    answers = getattr(data, part).answers
    if not answers:
        return {}
    if data.verbaliser is not None:
        return dict(sorted(Counter(answers).items()))
    lengths = [len(answer) for answer in answers]
    return {"median characters": round(median(lengths)), "most characters": max(lengths)}


def _print_prepared(found: dict[str, Any]) -> None:
    counts = [f"{found[part]:,} {part} rows" for part in ("pool", "test") if found[part]]
    print(f"{found['name']} ({found['role']}; {found['source']}): {', '.join(counts)}")
    for name, answers in found["answers"].items():
        for part in ("pool", "test"):
            if answers[part]:
                shares = ", ".join(f"{answer.strip()} {count:,}" for answer, count in answers[part].items())
                print(f"  {part} answers, {name}: {shares}")
    for note in found["notes"]:
        print(f"  note: {note}")
    for name, example in found["examples"].items():
        _print_example(name, example)
    for file in found.get("files", []):
        print(f"  written: {file}")
    print(flush=True)


def _print_example(name: str, example: dict[str, str | None]) -> None:
    print(f"  first test row, {name}:")
    for line in _lines(f"{example['prompt']}{example['answer']}"):
        print(f"    | {line}")


def _lines(text: str) -> Iterator[str]:
    cut = text[:_SHOWN_CHARACTERS]
    yield from (cut + "…" if cut != text else cut).splitlines()
