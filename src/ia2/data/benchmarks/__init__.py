"""The twelve benchmarks of METHOD.md §6, the packaged intents, and one's own, all as data.

An entry is a YAML file (``entries/``) with the fields of :class:`Benchmark`; nothing else has to be written
for a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ia2.config.reading import load_config
from ia2.data.answers import load_parser
from ia2.data.benchmarks.entry import Benchmark
from ia2.data.benchmarks.loading import DATA_DIR, BenchmarkData
from ia2.utils.errors import ConfigError, suggest
from ia2.utils.user_files import user_path

__all__ = ["BENCHMARKS", "DATA_DIR", "Benchmark", "BenchmarkData", "load_benchmark"]

_ENTRIES = Path(__file__).parent / "entries"

# In the order of METHOD.md §6.
_NAMES = (
    *("SST2", "FinS", "PoemS", "AGN", "BBCN", "STF", "SciQr", "QASCr"),
    *("GSM8K", "GSM8Ks", "HMathA", "SciQ", "Intents"),
)


def _read(file: Path, parsers: Sequence[str] = ()) -> Benchmark:
    """The entry in a file; paths in it are relative to the file."""
    benchmark: Benchmark = load_config(Benchmark, file, {}, {"parser": parsers})
    if benchmark.parser:
        load_parser(benchmark.parser)  # one that is not there is refused now, not after the training
    ood = tuple(str(file.parent / name) if _is_file(name) else name for name in benchmark.ood)
    path = benchmark.path and (file.parent / user_path(benchmark.path)).resolve()
    return benchmark.model_copy(update={"ood": ood, "path": path})


def _is_file(name: str) -> bool:
    return name.lower().endswith((".yaml", ".yml"))


BENCHMARKS: dict[str, Benchmark] = {name: _read(_ENTRIES / f"{name}.yaml") for name in _NAMES}


def load_benchmark(name: str | Path, parsers: Sequence[str] = ()) -> Benchmark:
    """A benchmark by its name, or one's own by the path of its YAML file.

    Args:
        name: the name or path.
        parsers: those that the file may name as ``module:function``; it is data, and cannot run others.

    Raises:
        ConfigError: the name is unknown, or the file has an unknown key or a value that is not allowed.
        DataError: there is no such file.
    """
    text = str(name)
    if text in BENCHMARKS:
        return BENCHMARKS[text]
    if not _is_file(text):
        raise ConfigError(_unknown(text) + " One's own is the path of a YAML file.")
    benchmark = _read(user_path(text), parsers)
    for other in benchmark.ood:
        if not _is_file(other) and other not in BENCHMARKS:
            raise ConfigError(f"{text}: ood: {_unknown(other)}")
    return benchmark


def _unknown(name: str) -> str:
    other_case = [known for known in BENCHMARKS if known.lower() == name.lower()]
    near = f" Did you mean '{other_case[0]}'?" if other_case else suggest(name, list(BENCHMARKS))
    return f"unknown benchmark '{name}'.{near or ' There are ' + ', '.join(BENCHMARKS) + '.'}"
