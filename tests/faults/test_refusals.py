"""What cannot work is refused before the work: one line that names the place, exit code 2, nothing written.

A table for each kind of input: the commands that read one, and bad ones, each with what the line must name.
The first bad input is given to every command, the others to the first command.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_files import MODELS, ROWS, UNREADABLE, YAML, write_world
from helpers.command_line import Ia2, names, tree
from helpers.sweeping import write_grid

LONG = "n" * 300  # names of files end at 255 bytes
DEEP = "a/" * 3000  # and whole paths at 4096
OUT = "--output-dir out --align-epochs 1 --sft-epochs 1"
MODEL, DATA = "--model model", "--data rows.jsonl"
TRAIN = f"train {MODEL} {DATA} {OUT}"
CURVE = f"curve --model model {OUT} --test-data test.jsonl --sizes 2,4"
RUN_COMMANDS = [
    "predict --data rows.jsonl --adapter",
    "eval --data rows.jsonl --adapter",
    "analyze",
    "doctor",
    "report",
]

# kind → commands, to which a value is appended; value → what the line names
TABLE: dict[str, tuple[list[str], dict[str, tuple[str, ...]]]] = {
    "rows": (
        [
            f"train --model model {OUT} --data", f"compare --model model {OUT} --data", f"{CURVE} --data",
            "probe --model model --data", f"{TRAIN} --test-data", f"{TRAIN} --unlabelled",
            "eval --adapter run --data", "predict --adapter run --data", "analyze run --data",
        ],
        {
            "cut.jsonl": ("cut.jsonl:2: invalid JSON",),
            "rws.jsonl": ("rws.jsonl: no such file", "Did you mean 'rows.jsonl'?"),
            **{f"{name}.jsonl": (f"{name}.jsonl",) for name in ROWS if name != "cut"},
            **{f"{name}.jsonl": (f"{name}.jsonl", reason) for name, reason in UNREADABLE.items()},
            "rows.docx": ("rows.docx", ".jsonl"),
            "owner/rows": ("owner/rows: ", "local file"),
            LONG: (LONG[:50],),
            "": ("--data: an empty text is no path",),
        },
    ),
    "rows to train on": (
        [f"train {MODEL} {OUT} --data", f"compare {MODEL} {OUT} --data", f"probe {MODEL} --data"],
        {
            "long.jsonl": ("long.jsonl:8: the prompt has 601 tokens", "512"),
            "one-label.jsonl": ("all rows have the completion ' L1'",),
            "same-tokens.jsonl": ("[' ja', ' nein'] are the same tokens",),
            "free.jsonl --task generation --max-answer-tokens 5": ("free.jsonl:6: the completion has 6 ",),
            "rows.jsonl --max-answer-tokens 100000": ("lower max_answer_tokens",),
        },
    ),
    "rows to evaluate on": (
        ["eval --adapter run --data", f"{TRAIN} --test-data", "analyze run --data"],
        {
            "other.jsonl": ("other.jsonl:13: the completion ' other' is not one of the labels",),
            "long.jsonl": ("long.jsonl:8: the prompt has 601 tokens",),
            "texts.jsonl": ("names the column 'prompt'; there are 'text', 'label'",),
        },
    ),
    "settings": (
        [f"{TRAIN} --config", "sweep", "benchmarks show", "benchmarks prepare"],
        {
            "syntax.yaml": ("syntax.yaml", "not YAML"),
            **{f"{name}.yaml": (f"{name}.yaml",) for name in YAML if name != "syntax"},
            **{f"{name}.yaml": (f"{name}.yaml", reason) for name, reason in UNREADABLE.items()},
            "missing.yaml": ("missing.yaml: no such file",),
            "folder.d": ("folder.d",),
            LONG: (LONG[:50],),
            DEEP: (DEEP[:50],),
        },
    ),
    "model": (
        [
            f"train --data rows.jsonl {OUT} --model", f"compare --data rows.jsonl {OUT} --model",
            f"{CURVE} --data rows.jsonl --model", "probe --data rows.jsonl --model",
            "demo --output-dir out --model",
        ],
        {
            "owner/name": ("'owner/name'", "neither as a local folder or .gguf file nor on the hub"),
            "./nothing": ("./nothing: no such file or folder",),
            "nothing.gguf": ("nothing.gguf: no such file",),
            "junk.gguf": ("junk.gguf",),
            "rows.jsonl": ("not a .jsonl file",),
            "dmeo": ("'dmeo' is unknown", "Did you mean 'demo'?"),
            **{f"model-{name}": (f"model-{name}",) for name in MODELS},
            "model-small": ("tokenizer has 73 tokens, its embedding 72 rows",),
            "~nobody-at-all": ("~nobody-at-all",),
            LONG: (LONG[:50],),
            "'\x1b[31m'": ("[31m",),
        },
    ),
    "run": (
        RUN_COMMANDS,
        {
            **dict.fromkeys(("missing", "rows.jsonl", "strangers", "fifo.jsonl", "loop.jsonl", "/proc"), ()),
            **dict.fromkeys(("model", LONG, DEEP), ()),
            "''": ("an empty text is no path",),
        },
    ),
    "output folder": (
        [
            f"train {MODEL} {DATA} --output-dir", f"compare {MODEL} {DATA} --output-dir",
            f"curve {MODEL} {DATA} --test-data rows.jsonl --output-dir", "demo --output-dir",
            "sweep grid.yaml --output-dir", "analyze run --output-dir", "analyze run --figures",
            "report compared --figures", "report compared --output-dir",
            "benchmarks prepare Intents --output-dir",
        ],
        {
            folder: (folder[:50], "Choose another folder")
            for folder in [
                "rows.jsonl/out", "rows.jsonl", "/proc/out", "/dev/full/out", "loop.jsonl/out", LONG,
                f"out/{LONG}", DEEP,
            ]
        },
    ),
    "output file": (
        [f"{command} --adapter run {DATA} --output" for command in ("predict", "eval")]
        + ["report compared --output"],
        {
            "rows.jsonl/x.csv": ("Choose another file",),
            f"{LONG}.csv": ("Choose another file",),
            "fifo.csv": ("Choose another file",),
            "folder.csv": ("Choose another file",),
            "x.txt": (".jsonl or a .csv",),
        },
    ),
    "device": (
        [f"predict --adapter run {DATA} --device", f"{TRAIN} --device", f"probe {MODEL} {DATA} --device"],
        {name: (f"device '{name}' is not available",) for name in ("gpu", "cuda:99", "meta", "mkldnn")},
    ),
    "option": (
        [TRAIN],
        {
            "--lerning-rates 1": ("--lerning-rates", "Did you mean '--learning-rates'?"),
            "--adapter-rank x": ("--adapter-rank", "integer"),
            "--adapter-rank 0": ("adapter.rank", "greater than or equal to 1"),
            "--adapter-rank 1000000000000": ("adapter.rank",),
            "--targets disk": ("targets", "'store'"),
            "--learning-rates 1e-3 -1e-3": ("learning_rates.1", "greater than 0"),
            "--learning-rates 1e-3 inf": ("learning_rates: ", "(at [1])",),
            "--learning-rates nan": ("learning_rates.0",),
            "--learning-rates 1e400": ("learning_rates", "inf"),
            "--align-temperature 0": ("align.temperature",),
            "--joint-betas nan": ("joint.betas",),
            "--batch-size 9223372036854775808": ("batch_size",),
            "--seed 4294967296": ("seed",),
            "--sft-patience 0": ("sft.patience",),
            """--adapter-peft '{"peft_type": "LORA", "x": {"y": [1, Infinity]}}'""": ("--adapter-peft",),
            """--adapter-peft '{"peft_type": "LORA", "r": 1180591620717411303424}'""": ("(at r)",),
            """--adapter-peft '{"r": 1}'""": ("peft_type",),
            "--recipe ia2sft": ("'ia2sft'", "Did you mean 'ia2-sft'?"),
            "--recipe icl": ("'icl' trains nothing", "sft, ia2, ia2-sft"),
            "--recipe pseudo-sft": ("its stage sft needs unlabelled rows", "--unlabelled"),
            "--unlabelled same.jsonl": ("at least two unlabelled rows are needed", "12 that are labelled"),
            "--batch-size 4 --micro-batch-size 3": ("3 does not divide batch_size 4",),
            "--adapter-type lora2": ("'lora2' is not one of lora, rslora", "Did you mean 'lora'?"),
            "--adapter-target-modules qq_proj": ("qq_proj",),
            "--attention-modules *.nothing": ("'*.nothing' matches no module",),
            """--activation-checkpointing-kwargs '{"use_reentrant": true}'""": ("use_reentrant",),
            "--parser hsah": ("'hsah'", "Did you mean 'hash'?"),
            "--parser no_such_module:f": ("cannot import 'no_such_module'",),
            "--context-function no_such_module:f": ("cannot import 'no_such_module'",),
            "--context-text ''": ("context_text is empty",),
            "--targets online --context-draws 2": ("permutation_targets to sample",),
            "--labels L1,L2 --task generation": ("labels are given, but task is generation",),
            """--labels '[" L1", " none"]'""": ("rows.jsonl:", "is not one of the labels"),
            "--labels '[[[['": ("--labels: not a JSON list",),
            """--label-map '{"a": "b", "a": "c"}'""": ("--label-map", "'a' is there twice"),
            "--label-map '0=a, 0 =b'": ("--label-map", "'0' is there twice"),
            "--label-map nonsense": ("--label-map", "0=negative"),
            "--label-map L1=a": ("not in the label map",),
            "--num-examples 30": ("asked for 30 examples, the data has 12 rows", "ask for at most 12"),
            "--max-context-tokens 8": ("no demonstration fits", "rows.jsonl:"),
            r"--prompt-template 'Text: {promt}\nLabel:'": ("'promt'", "Did you mean 'prompt'?"),
            "--split train": ("single file",),
            "--report-to nothing": ("report_to: 'nothing' is not installed",),
            "surplus": ("surplus",),
        },
    ),
    "comparison": (
        [f"compare --model model --data rows.jsonl {OUT}"],
        {
            "--recipes base,ia2sft": ("Did you mean 'ia2-sft'?",),
            "--recipes base,base": ("named twice",),
            "--folds 13": ("13 folds need at least 13 rows",),
            "--max-test 3": ("max_test",),
            "--seed 4294967295 --seeds 2": ("seeds", "4294967295"),
        },
    ),
    "anything": (
        [""],
        {
            "trian": ("'trian'", "Did you mean 'train'?"),
            "train --model model --output-dir out": ("--data",),
            "train --model model --data rows.jsonl": ("--output-dir",),
            "compare --model model --data rows.jsonl": ("--output-dir",),
            f"curve --model model --data rows.jsonl {OUT}": ("--test-data",),
            "predict --data rows.jsonl": ("--adapter",),
            "sweep grid.yaml --gpus-per-worker 1": ("--ray",),
            "sweep grid.yaml --ray local --gpus-per-worker nan": ("--gpus-per-worker",),
            "report compared --table 1": ("--table is about sweeps",),
            "predict --adapter run --data folder --split tset": ("no split 'tset'", "'train'"),
        },
    ),
}  # fmt: skip

# settings in a file: the line begins with the file's name, and names the key
IN_A_FILE = {
    "seeed: 1": ("unknown key 'seeed'", "Did you mean 'seed'?"),
    "align: {epoch: 3}": ("unknown key 'align.epoch'", "Did you mean 'epochs'?"),
    "batch_size: many": ("batch_size", "integer"),
    "align: 3": ("align",),
    "{seed: -1, batch_size: 0}": ("seed", "batch_size"),
    "learning_rates: [0.001, .inf]": (
        "learning_rates: ",
        "(at [1])",
    ),
    "learning_rates: ['nan']": ("learning_rates.0",),
    "max_answer_tokens: .nan": ("max_answer_tokens",),
    "batch_size: 1.0e+300": ("batch_size",),
    "schedules: {own: [{stage: sft, ia2_weight: .nan}]}": (
        "schedules: ",
        "(at own[0].ia2_weight)",
    ),
    "activation_checkpointing_kwargs: {a: {b: .inf}}": (
        "activation_checkpointing_kwargs: ",
        "(at a.b)",
    ),
    "adapter: {peft: {peft_type: LORA, r: .inf}}": (
        "adapter.peft: ",
        "(at r)",
    ),
    "activation_checkpointing_kwargs: {use_reentrant: true}": ("use_reentrant=True is not possible",),
}
IN_A_GRID = {
    "learning_rates: {sft: [.nan]}": ("learning_rates",),
    "betas: [.nan]": ("betas", "nan"),
    "settings: {align.temperature: .inf}": ("settings: ", "(at align.temperature)"),
    "axes: {align.temperature: [1.0, .nan]}": ("axes: ", "(at align.temperature[1])"),
    "variants: {hot: {align: {temperature: .inf}}}": ("variants: ", "(at hot.align.temperature)"),
    "parts: [{settings: {adapter.alpha: .nan}}]": ("parts.0.settings: ", "(at adapter.alpha)"),
    "seeds: [0, 4294967296]": ("seeds",),
    "seeds: 1000000000000": ("seeds",),
    "max_test: 0": ("max_test",),
    "{ood: true, benchmarks: [files/mixed.yaml]}": ("Mixed", "Free", "labels", "free text", "ood: false"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, finished: Path, tiny_icl_model_path: Path) -> Path:
    """Good and bad files of every kind, which no command here may change."""
    return write_world(tmp_path_factory.mktemp("world"), finished, tiny_icl_model_path)


@pytest.fixture
def refused(world: Path, ia2: Ia2, fits: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``ia2`` there is refused, names these texts, and neither trains nor writes."""
    monkeypatch.chdir(world)

    def command(words: Sequence[Any], *named: str) -> None:
        before = tree(world)
        line = ia2(*words).refusal()
        names(line, *named)
        assert len(line) < 1700
        assert fits == [] and tree(world) == before and not (world / "out").exists()

    return command


def cases() -> list[Any]:
    found = []
    for kind, (commands, values) in TABLE.items():
        first = next(iter(values))
        for command in commands:
            for value, named in values.items():
                if command is commands[0] or value is first:
                    found.append(
                        pytest.param(command, value, named, id=f"{kind}-{command.split(' ')[0]}-{value[:40]}")
                    )
    return found


@pytest.mark.parametrize(("command", "value", "named"), cases())
def test_refused(command: str, value: str, named: tuple[str, ...], refused: Callable[..., None]) -> None:
    refused([*shlex.split(command), *(shlex.split(value) or [""])], *named)


@pytest.mark.parametrize("text", IN_A_FILE)
def test_a_setting_in_a_file(text: str, tmp_path: Path, refused: Callable[..., None]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    refused([*TRAIN.split(), "--config", file], f"{file}: ", *IN_A_FILE[text])


@pytest.mark.parametrize("text", IN_A_GRID)
def test_a_setting_in_a_grid(text: str, world: Path, refused: Callable[..., None]) -> None:
    grid = {**yaml.safe_load((world / "grid.yaml").read_text()), **yaml.safe_load(text)}
    file = write_grid(world / "changed.yaml", grid)
    for options in ([], ["--dry-run"]):
        refused(["sweep", file, "--output-dir", "out", *options], *IN_A_GRID[text])


@pytest.mark.parametrize("variable", ["IA2_CACHE_DIR", "XDG_CACHE_HOME"])
def test_a_cache_folder_that_is_none(
    variable: str, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IA2_CACHE_DIR", raising=False)
    for folder in ("rows.jsonl", "/proc/cache", LONG):
        monkeypatch.setenv(variable, folder)
        refused([*TRAIN.split(), "--model", "junk.gguf"], folder[:50], "IA2_CACHE_DIR")
