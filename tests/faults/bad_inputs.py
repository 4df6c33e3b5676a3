"""Generated bad inputs of every command, and what becomes of each.

``python tests/faults/bad_inputs.py --count 500 --seed 0`` counts them by command and by outcome. *Refused* is
as it should be: exit code 2, one line that begins with ``ia2: error:``, nothing printed or left behind, in
less than 20 seconds.

Each input is a command that would succeed, with one thing in it made bad, or two. It runs in a process of its
own, forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # the helpers of the tests lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    os.environ["TQDM_DISABLE"] = "1"

from faults.bad_world import DAMAGE, FILES, LABELS, MODELS, ROWS, RUN_FILES, TABLES, YAML, write_world

SECONDS = 20
MEMORY = 12 << 30  # bytes of address space; what asks for more gets a MemoryError
LONG = "n" * 300  # names of files end at 255 bytes
DEEP = "a/" * 3000  # and whole paths at 4096


@dataclass(frozen=True)
class Input:
    """One command line with its surroundings.

    Attributes:
        arguments: as a shell hands them over; of an option that is there twice, the last counts.
        stdout: a file that standard output goes to, ``closed``, or empty to capture it.
        environment: variables on top of the process's own.
    """

    arguments: tuple[str, ...]
    stdout: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    def shown(self) -> str:
        """For a shell, long arguments cut."""
        parts = [a if len(a) < 90 else f"{a[:40]}…({len(a)} characters)" for a in self.arguments]
        before = [f"{name}={value}" for name, value in self.environment]
        after = {"": "", "closed": " >&-"}.get(self.stdout, f" > {self.stdout}")
        return " ".join([*before, "ia2", *map(shlex.quote, parts)]) + after


@dataclass(frozen=True)
class Fault:
    """What makes an input bad.

    Attributes:
        more: further arguments, of which the last counts.
        place: the command's own argument, if it is another one.
        left_out: an option, or the command's own argument (``PLACE``), that is not given.
        stdout: see :class:`Input`.
        environment: see :class:`Input`.
    """

    more: tuple[str, ...] = ()
    place: str | None = None
    left_out: str = ""
    stdout: str = ""
    environment: tuple[tuple[str, str], ...] = ()


# ------------------------------------------------------------------------------------------ the inputs

_TRAINING = "--model model --data rows.jsonl --align-epochs 1 --sft-epochs 1"
GOOD = {
    "train": f"train {_TRAINING} --output-dir out",
    "compare": f"compare {_TRAINING} --output-dir out",
    "curve": f"curve {_TRAINING} --output-dir out --test-data test.jsonl --sizes 2,4",
    "probe": "probe --model model --data rows.jsonl",
    "eval": "eval --adapter run --data test.jsonl",
    "predict": "predict --adapter run --data test.jsonl",
    "analyze": "analyze PLACE --output-dir out",
    "doctor": "doctor PLACE",
    "report": "report PLACE --output page.html",
    "sweep": "sweep PLACE --output-dir out",
    "ls": "benchmarks ls",
    "show": "benchmarks show PLACE",
    "prepare": "benchmarks prepare PLACE",
    "env": "env",
    "demo": "demo --model model --output-dir out",
}
"""A command of each kind that would succeed."""

_PLACES = {
    "analyze": "run",
    "doctor": "run",
    "report": "compared",
    "sweep": "grid.yaml",
    "show": "files/two.yaml",
    "prepare": "files/two.yaml",
}

_SETTINGS = """
--batch-size 4 --micro-batch-size 3
--context-text a --context-file rows.jsonl
--context-text a --demo-order nearest
--targets online --context-draws 2
--labels L1,L2 --task generation
--chat turns
--balanced
--thinking
--demo-search-orders 4
--num-examples 1000000000
--num-examples 0
--num-examples -5
--max-context-tokens 8
--learning-rates 0
--learning-rates x
--learning-rates 1e-3 -1
--labels L1
--labels '[1, 2'
--label-map nonsense
--label-map {oops
--label-map [1]
--label-map '{"L1": {}}'
--prompt-template {nothing}
--prompt-template {
--prompt-template none
--completion-template {prompt.__class__}
--context-column nothing
--context-function os:nothing
--context-function no_such_module:f
--context-function ::
--parser no_such_module:f
--parser :
--attention-modules *.nothing
--attention-modules [[
--adapter-type lora2
--adapter-target-modules nothing
--adapter-target-modules ((
--adapter-peft {}
--adapter-peft '{"peft_type": "NOTHING"}'
--adapter-peft '{"peft_type": "LORA", "r": "x"}'
--adapter-peft '{"peft_type": 3}'
--activation-checkpointing-kwargs '{"use_reentrant": true}'
--activation-checkpointing-kwargs 3
--device meta
--device gpu
--device cuda:99
--device hpu
--device xla
--device mkldnn
--device ''
--dtype float8
--quantization 2bit
--attn-implementation nothing
--split test
"""
"""Settings of train, compare, curve and probe that these rows and this model cannot have, a line each."""

_TRAINED = """
--targets online --align-layers top-2
--align-layers 99
--align-layers nothing
--align-layers 1,x
--align-layers top-x
--report-to nothing
"""
"""The same of what a probe does not do."""

_ANY = "--no-such-flag", "--no-such-flag=3", "-x", "--json=3"
_MODELS = (
    *(f"model-{name}" for name in MODELS), "junk.gguf", "missing.gguf", "folder.html", "owner/name", "a/b/c",
    "./nothing", "", " ", "..", "/", "/proc", "/dev/null", "rows.jsonl", "fifo.txt", "loop.txt", LONG,
    f"owner/{LONG}", DEEP, "dmeo", "~nobody-at-all", "../../..", "owner/na me", "https://nothing.invalid/model",
    "\x1b[31m", "-",
)  # fmt: skip
_NO_RUNS = (
    "missing", "folder.txt", "strangers", "rows.jsonl", "/", "/proc", "/proc/self", "/dev/null", "fifo.txt",
    "loop.txt", "dangling.txt", LONG, DEEP, "", "~nobody-at-all", "rows.jsonl/run", "model", "run-strange",
)  # fmt: skip
_NO_FOLDERS = (
    "rows.jsonl", "rows.jsonl/out", "/proc/out", "/proc", "/dev/null", "/dev/full/out", LONG, f"out/{LONG}",
    DEEP, "fifo.txt", "loop.txt", "loop.txt/out", "/sys/out", "é" * 200,
)  # fmt: skip
_DEVICES = ("meta", "gpu", "cuda:99", "hpu", "mkldnn")


def _options(flag: str, values: Iterable[str]) -> list[Fault]:
    return [Fault((flag, value)) for value in values]


def _lines(text: str) -> list[Fault]:
    return [Fault(tuple(shlex.split(line))) for line in text.strip().splitlines()]


def _places(names: Iterable[str]) -> list[Fault]:
    return [Fault(place=name) for name in names]


def _files(suffix: str, *fine: str) -> list[str]:
    """Bad files of an ending, but for those that would do."""
    other = [
        f"missing.{suffix}",
        f"rows.jsonl/x.{suffix}",
        f"no/folder.{suffix}",
        f"{LONG}.{suffix}",
        f"{DEEP}x.{suffix}",
    ]
    other += ["/proc/self/mem", "/dev/null", f"~nobody-at-all/x.{suffix}", "", " ", "."]
    return [name for name in (*(f"{n}.{suffix}" for n in FILES if n not in fine), *other) if name not in fine]


def _data(rows: Iterable[str] = (*ROWS, *LABELS)) -> list[str]:
    found = [name for suffix in ("jsonl", "csv", "parquet") for name in _files(suffix)]
    found += [f"rows-{name}.jsonl" for name in rows]
    return [
        *dict.fromkeys(found),
        *(f"rows-{n}.csv" for n in TABLES),
        "rows.docx",
        "owner/rows",
        "strangers",
        "nothing",
    ]


def _outputs(suffix: str) -> list[str]:
    folders = [f for f in _NO_FOLDERS if f not in ("/proc", "fifo.txt")]
    return [
        *(f"{folder}/x.{suffix}" for folder in folders),
        f"{LONG}.{suffix}",
        f"folder.{suffix}",
        f"fifo.{suffix}",
    ]


def faults_of(command: str) -> list[Fault]:
    """Everything bad that is known of a command."""
    yaml = [f"yaml-{name}.yaml" for name in YAML]
    labelled = _data((*ROWS, "one-column", "unknown"))  # one row, or one label, can be evaluated on
    runs = [f"run-{file.partition('.')[0]}-{name}" for file in RUN_FILES for name in DAMAGE]
    found = [Fault((flag,)) for flag in _ANY]
    if command in ("train", "compare", "curve", "probe"):
        found += [
            *_of_settings(command),
            *_lines(_SETTINGS),
            *(_lines(_TRAINED) if command != "probe" else []),
        ]
        found += _options("--adapter-peft", ("[" * 3000, '{"a":' * 50_000))
        found += _options("--data", _data())
        found += _options("--config", (*_files("yaml", "empty", "blank", ".", ""), *yaml))
        found += _options("--context-file", _files("txt", "nul", "huge-line", ""))
        found += [Fault(left_out="--data")]
    if command in ("train", "compare", "curve", "probe", "demo"):
        found += _options("--model", _MODELS)
        for name in ("IA2_CACHE_DIR", "XDG_CACHE_HOME"):
            for value in ("rows.jsonl", "/proc/cache", f"/tmp/{LONG}", "loop.txt"):
                found.append(Fault(("--model", "junk.gguf"), environment=((name, value),)))
        found.append(Fault(("--model", "owner/name"), environment=(("HF_HOME", "rows.jsonl"),)))
    if command in ("train", "compare", "curve", "sweep", "demo"):
        found += _options("--output-dir", (*_NO_FOLDERS, "strangers", "compared"))
    if command in ("train", "compare", "curve"):
        found += [*_options("--test-data", labelled), Fault(left_out="--output-dir")]
    if command == "curve":
        found += [Fault(left_out="--test-data"), *_options("--sizes", ("1", "4,2", "x", "2", "4,100000"))]
    if command == "compare":
        found += _lines(
            "--folds 1\n--folds 99\n--max-test 3\n--seeds 0\n--recipes nothing\n--recipes base,base"
        )
    if command in ("eval", "predict"):
        found += _options("--adapter", (*_NO_RUNS, *runs, "compared", "curved"))
        found += _options("--data", labelled if command == "eval" else _data(ROWS))
        found += _options("--output", (*_outputs("csv" if command == "predict" else "jsonl"), "test.jsonl"))
        found += [*_options("--device", _DEVICES), Fault(left_out="--adapter"), Fault(left_out="--data")]
        found += _lines("--split test" + ("\n--output out.txt" if command == "predict" else ""))
    if command in ("analyze", "doctor", "report"):
        # what reads no weights does not miss them, and a run without metrics is one that goes on
        fine = {"analyze": "no such", "doctor": "adapter|metrics-gone", "report": "adapter"}[command]
        found += _places((*_NO_RUNS, *(run for run in runs if not re.search(fine, run)), "swept-text"))
        found += [Fault(left_out="PLACE")]
    else:
        found += [Fault(("surplus", "more"))] if command != "prepare" else []
    if command == "analyze":
        found += [*_options("--data", labelled), *_options("--device", _DEVICES)]
        found += [*_options("--output-dir", _NO_FOLDERS), *_options("--figures", _NO_FOLDERS)]
        found += _lines(
            "--parts nothing\n--adapters nothing\n--max-queries 1\n--parts effects --benchmarks nothing"
        )
        found += [
            Fault(("--parts", "effects", "--text", name))
            for name in _files("txt", "nul", "huge-line", "", "latin1")
        ]
        found += _places(("compared", "curved", "trained"))
    if command == "report":
        found += [*_options("--output", _outputs("html")), *_options("--figures", _NO_FOLDERS)]
        found += _options("--output-dir", _NO_FOLDERS)
        found += _lines("--table 99\n--select x\n--sizes x\n--models x")
        found += _places(
            (*(f"{k}-{n}" for k in ("compared", "curved") for n in DAMAGE), "swept-list", "swept-object")
        )
    if command == "sweep":
        found += [*_places((*_files("yaml"), *yaml)), Fault(left_out="PLACE")]
        found += [Fault(("--dry-run",), place=name) for name in yaml[::3]]
        found += _lines("--limit 0\n--limit x\n--workers 0\n--gpus-per-worker 1")
    if command in ("show", "prepare"):
        found += _places((*_files("yaml", *("",) * (command == "prepare")), *yaml, "SST3", "owner/name"))
        found += [
            Fault(("--data-dir", name), place="SST2")
            for name in ("missing", "rows.jsonl", "folder.txt", LONG)
        ]
        names = ("rows.jsonl", LONG, "loop.txt")
        found += [Fault(place="SST2", environment=(("IA2_DATA_DIR", name),)) for name in names]
    if command == "prepare":
        found += _options("--output-dir", [name for name in _NO_FOLDERS if name != "/proc"])
    if command == "demo":
        found += _options("--seeds", ("0", "x", "-1", "1.5"))
    found += [Fault(stdout="/dev/full"), Fault(stdout="closed")]
    return found


def _of_settings(command: str) -> Iterator[Fault]:
    """For every setting with a number or a choice, values that are none."""
    from ia2.cli.options import _options as settings_of
    from ia2.config import CompareConfig, CurveConfig, ProbeConfig, TrainConfig

    kind = {"train": TrainConfig, "compare": CompareConfig, "curve": CurveConfig, "probe": ProbeConfig}[
        command
    ]
    for dotted, entry, _ in settings_of(kind, ("recipe", "num_examples", "folds")).values():
        flag = "--" + dotted.replace(".", "-").replace("_", "-")
        kinds = {entry.annotation, *typing.get_args(entry.annotation)}
        if bool in kinds:
            yield Fault((f"{flag}=maybe",))
        elif kinds & {int, float} and str not in kinds:
            yield from _options(flag, ("x", "", "1e", "0x10", "１２x", "1 2", "9" * 5000 + "x"))
            yield Fault((flag,))
            yield from _options(flag, ("1.5", "1e3", "nan", "inf") if int in kinds else ())
            yield from _options(flag, ("-1",) if "Ge(" in str(entry.metadata) else ())
        elif any(typing.get_origin(each) is typing.Literal for each in kinds):
            yield from _options(flag, ("nothing", "", "x" * 10_000))


def generate(count: int, seed: int = 0) -> list[tuple[str, Input]]:
    """So many inputs with the name of their command; each fault of it comes once before any comes again.

    Args:
        count: how many.
        seed: of the draw.
    """
    rng = random.Random(seed)
    faults = {command: faults_of(command) for command in GOOD}
    weights = [len(known) ** 0.5 for known in faults.values()]  # else `env` is seldom, or `train` everything
    waiting: dict[str, list[Fault]] = {}
    found = []
    for command in rng.choices(list(GOOD), weights, k=count):
        if not waiting.get(command):
            waiting[command] = rng.sample(faults[command], len(faults[command]))
        chosen = [waiting[command].pop()]
        if rng.random() < 0.25:
            chosen.append(rng.choice(faults[command]))
        found.append((command, _input(command, chosen)))
    return found


def _input(command: str, faults: Sequence[Fault]) -> Input:
    words = GOOD[command].split()
    for fault in faults:
        if fault.left_out in words:
            at = words.index(fault.left_out)
            del words[at : at + (1 if fault.left_out == "PLACE" else 2)]
    place = next((fault.place for fault in faults if fault.place is not None), _PLACES.get(command, ""))
    good = [place if word == "PLACE" else word for word in words]
    more = [word for fault in faults for word in fault.more]
    variables = tuple(pair for fault in faults for pair in fault.environment)
    return Input((*good, *more), next((f.stdout for f in faults if f.stdout), ""), variables)


# --------------------------------------------------------------------------------------- running them


@dataclass(frozen=True)
class Outcome:
    """What became of an input: ``refused``, or what went wrong; its seconds, and what it said."""

    kind: str
    seconds: float
    said: str


def run_all(inputs: Iterable[Input], world: Path) -> Iterator[Outcome]:
    """Run inputs one after another in a world that none may change."""
    before = _listing(world)
    for given in inputs:
        outcome = _run(given, world)
        if changed := sorted(set(before.items()) ^ set(_listing(world).items())):
            if outcome.kind == "refused":
                outcome = replace(outcome, kind="left something", said=f"{outcome.said}\n{changed[:3]}")
            for name in {name for name, _ in changed} - set(before):
                shutil.rmtree(world / name, ignore_errors=True)
                (world / name).unlink(missing_ok=True)
            before = _listing(world)
        yield outcome


def _import_everything() -> None:
    """What commands import on first use, once for all that are forked."""
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401


def _run(given: Input, world: Path) -> Outcome:
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _be(given, world, out.fileno(), err.fileno())
        status = _wait(child, began + SECONDS)
        seconds = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        return _judged(status, out.read(), err.read().decode(errors="replace"), seconds)


def _be(given: Input, world: Path, out: int, err: int) -> typing.NoReturn:
    """The forked process: what the interpreter does around a command, and no more."""
    status = 1
    try:
        os.setsid()
        os.chdir(world)
        os.environ.update(given.environment)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if given.stdout == "closed":
            os.close(1)
            sys.stdout = None  # type: ignore[assignment]
        else:
            os.dup2(os.open(given.stdout, os.O_WRONLY) if given.stdout else out, 1)
        from ia2.cli import main

        main(list(given.arguments))
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        status = 120  # as the interpreter has it
    os._exit(status)


def _wait(child: int, until: float) -> int | None:
    while time.perf_counter() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _judged(status: int | None, out: bytes, err: str, seconds: float) -> Outcome:
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("ia2: error: ")]
    if status is None:
        kind = f"not done in {SECONDS} s"
    elif "Traceback" in err or "ia2: bug" in err:
        kind = "raw error"
    elif status != 2:
        kind = f"exit code {status}" if status else "accepted"
    elif errors != lines[-1:]:
        kind = "not one line"
    elif re.search(r"Warning:|^\s+warnings\.warn", err, re.MULTILINE):
        kind = "others' warnings"
    elif len(errors[0]) > 2000:
        kind = "a line without end"
    else:
        kind = "printed something" if out else "refused"
    return Outcome(kind, seconds, err[-3000:])


def _listing(world: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time, every folder."""
    found = {}
    for place, folders, files in os.walk(world):
        found.update({os.path.relpath(Path(place, name), world): (0, 0) for name in folders})
        for name in files:
            state = Path(place, name).lstat()
            found[os.path.relpath(Path(place, name), world)] = (state.st_size, state.st_mtime_ns)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run inputs; print those that were not refused, and the counts."""
    parser = argparse.ArgumentParser(description="Run generated bad inputs and count what becomes of them.")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=GOOD, help="Run only this one's.")
    parser.add_argument("--show", action="store_true", help="Print every input and what it said.")
    asked = parser.parse_args(arguments)
    inputs = [i for i in generate(asked.count, asked.seed) if asked.command in (None, i[0])]
    counts: dict[str, Counter[str]] = {}
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="ia2-bad-inputs-") as folder:
        _import_everything()
        write_world(Path(folder))
        outcomes = run_all([given for _, given in inputs], Path(folder))
        for (command, given), outcome in zip(inputs, outcomes, strict=True):
            counts.setdefault(command, Counter())[outcome.kind] += 1
            slowest = max(slowest, outcome.seconds)
            if outcome.kind != "refused" or asked.show:
                print(f"{outcome.kind.upper()} ({outcome.seconds:.1f} s): {given.shown()}\n{outcome.said}")
    total = sum(counts.values(), Counter())
    for command, found in [*counts.items(), ("all", total)]:
        print(f"{command + ':':10}", ", ".join(f"{n} {kind}" for kind, n in found.most_common()))
    print(f"slowest: {slowest:.1f} s")
    return int(set(total) != {"refused"})


if __name__ == "__main__":
    sys.exit(main())
