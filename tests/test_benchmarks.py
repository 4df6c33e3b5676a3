"""The benchmarks: how a row of each is rendered, which rows are drawn, where they may come from."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command_line import run, write_rows

from ia2.benchmarks import BENCHMARKS, Benchmark, load_benchmark
from ia2.benchmarks.loading import mirror_notes, tokens_at_most
from ia2.config import AdaptConfig
from ia2.config_reading import validate
from ia2.errors import ConfigError, DataError, UserError
from ia2.evaluation.answers import parse
from ia2.examples import Examples
from ia2.files import cache_dir

ROOT = Path(__file__).parents[1]

NEWS = (  # its first 256 characters end in "which"
    "the old harbour is to be dredged again this spring  the port authority said on monday. two ships ran "
    "aground there in march  and the pilots have refused to bring in larger ones since. the work is to take "
    "six weeks and to cost four million pounds  of which the town is to pay half."
)

# Questions and solutions of StrategyQA, GSM8K and MATH (all MIT).
STRATEGY = (
    "At a presentation about post traumatic stress disorder, would Ariana Grande be a topic of relevance?"
)
MILES = (
    "Amber, Micah, and Ahito ran 52 miles in total. Amber ran 8 miles. Micah ran 3.5 times what Amber ran. "
    "How many miles did Ahito run?"
)
MILES_SOLVED = (
    "Amber ran <<8=8>>8 miles.\nMicah ran 3.5 * 8 miles = <<3.5*8=28>>28 miles\n"
    "Ahito ran the rest = 52 - 8 - 28 = <<52-8-28=16>>16 miles\nAhito ran <<16=16>>16 miles.\n#### 16"
)
GYM = (
    "The doctor has told Cal O'Ree that during his ten weeks of working out at the gym, he can expect each "
    "week's weight loss to be $1\\%$ of his weight at the end of the previous week. His weight at the "
    "beginning of the workouts is $244$ pounds. How many pounds does he expect to weigh at the end of the "
    "ten weeks? Express your answer to the nearest whole number."
)
GYM_SOLVED = (
    "Each week, his weight becomes $.99$ times that of the previous week. Therefore, after 10 weeks, his "
    "weight is $244 \\times (.99)^{10} \\approx 220.6$, so the answer is $\\boxed{221}$."
)
PLANTS = {
    "question": "What do plants take in from the air?",
    "distractor3": "helium",
    "distractor1": "iron",
    "distractor2": "salt",
    "correct_answer": "carbon dioxide",
    "support": "Plants make sugar of carbon dioxide and water.",
}
FORESTS = ["small breezes", "movement", "wildfire", "it increases", "feedback", "light rain", "homeostasis"]
FORESTS.append("road bends")

# Made-up rows, or rows whose licence allows it (beside those above PoemS and QASC, CC BY 4.0, and the
# intents, Apache 2.0), in the fields of the hub; the prompt; the answer with each verbaliser.
ROWS: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    "SST2": (
        {"idx": 7, "sentence": "a slow but rewarding film ", "label": 1},
        "Text:a slow but rewarding film \nLabel:",
        {"digits": "1", "words": " positive"},
    ),
    "FinS": (
        {"sentence": "Operating profit fell to EUR 3 mn .", "label": 0},
        "Text:Operating profit fell to EUR 3 mn .\nLabel:",
        {"digits": "0", "words": " negative"},
    ),
    "PoemS": (
        {"id": 850, "verse_text": "radiant as moses from the mount, he stood", "label": 1},
        "Text:radiant as moses from the mount, he stood\nLabel:",
        {"digits": "1", "words": " positive"},
    ),
    "AGN": (
        {"text": "Chip maker opens plant The plant will employ 300 people.", "label": 3},
        "Text:Chip maker opens plant The plant will employ 300 people.\nLabel:",
        {"digits": "3", "words": " Technology"},
    ),
    "BBCN": (
        {"text": NEWS, "label": 4, "label_text": "politics"},
        "Text:the old harbour is to be dredged again this spring  the port authority said on monday. "
        "two ships ran aground there in march  and the pilots have refused to bring in larger ones since. "
        "the work is to take six weeks and to cost four million pounds  of\nLabel:",
        {"digits": "0", "words": " World"},
    ),
    "STF": (
        {"qid": "678cd91b0e940994a15f", "question": STRATEGY, "answer": True},
        f"Question:{STRATEGY}\nAnswer:",
        {"digits": "1", "words": " yes"},
    ),
    "SciQr": (
        PLANTS,
        "Question:What do plants take in from the air?\nChoices:\n[apple]iron\n[Friday]salt\n"
        "[banana]carbon dioxide\n[Saturday]helium\n\nAnswer:",
        {"remapped": " banana", "bare": "banana"},
    ),
    "QASCr": (
        {
            "id": "336KAV9KYQRILF5T71II5LPWA532YC",
            "question": "What changes forests?",
            "choices": {"text": FORESTS, "label": list("ABCDEFGH")},
            "answerKey": "C",
        },
        "Question:What changes forests?\nChoices:\n[apple]small breezes\n[Friday]movement\n"
        "[banana]wildfire\n[Saturday]it increases\n[Thursday]feedback\n[Sunday]light rain\n"
        "[Wednesday]homeostasis\n[Monday]road bends\n\nAnswer:",
        {"remapped": " banana", "bare": "banana"},
    ),
    "GSM8K": (
        {"question": MILES, "answer": MILES_SOLVED},
        f"Question:{MILES}\nAnswer:",
        {"free text": MILES_SOLVED},
    ),
    "GSM8Ks": (
        {"id": 3, "question": "Ann has 3 pens and buys 4. How many?", "answer": "3 + 4 = 7\n\n#### 7"},
        "Question:Ann has 3 pens and buys 4. How many?\nAnswer:",
        {"free text": "3 + 4 = 7\n\n#### 7"},
    ),
    "HMathA": (
        {"problem": GYM, "level": "Level 5", "type": "Algebra", "solution": GYM_SOLVED},
        f"Question:{GYM}\nAnswer:",
        {"free text": GYM_SOLVED},
    ),
    "SciQ": (
        PLANTS,
        "Question:What do plants take in from the air?\nAnswer:",
        {"free text": "Plants make sugar of carbon dioxide and water.\n#### carbon dioxide"},
    ),
    "Intents": (
        {"text": "Is it going to get chillier near Hocking State Forest?", "label": "get_weather"},
        "Text: Is it going to get chillier near Hocking State Forest?\nLabel:",
        {"words": " weather"},
    ),
}

# SHA-256 of the first test row's prompt and answer, default verbaliser, on the mirrors.
FIRST_ROWS = {
    "SST2": "c95f475d6a00ac3a",
    "FinS": "08d7659c0299b8c0",
    "PoemS": "413c9ce876f478da",
    "AGN": "9b2f0c41c87b2077",
    "BBCN": "42441ad6f3c173ef",
    "STF": "84255d8b46c942d3",
    "SciQr": "e37f016b3b2f283c",
    "QASCr": "10a8b98ee4b5e6b9",
    "GSM8K": "8b59464e7abad457",
    "GSM8Ks": "01afe628a0c1440d",
    "HMathA": "47057b2a8e046abd",
    "SciQ": "4c4431a4cc0d03bf",
    "Intents": "61ff12c094d72df5",
}
# Those of ROWS that are real: the very rows that are drawn first.
REAL = ("PoemS", "STF", "QASCr", "GSM8K", "HMathA", "Intents")

# METHOD.md §6: rows to train on and to test on. HMathA has 1,744 less those with long answers.
SIZES = {
    **{"SST2": (2000, 500), "FinS": (1467, 500), "PoemS": (0, 288), "AGN": (2000, 500), "BBCN": (0, 500)},
    **{"STF": (1790, 500), "SciQr": (2000, 500), "QASCr": (0, 500), "GSM8K": (2000, 500)},
    **{"GSM8Ks": (0, 500), "HMathA": (1060, 500), "SciQ": (2000, 500), "Intents": (181, 180)},
}

NAMES = list(BENCHMARKS)


@pytest.fixture(autouse=True)
def _no_mirrors_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IA2_DATA_DIR", raising=False)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to lay data sets out in; `datasets` neither calls out nor writes elsewhere."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(info: pytest.ExceptionInfo[UserError]) -> str:
    message = str(info.value)
    assert "\n" not in message
    return message


def mirror(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """A folder of files, one for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def verbalisers(benchmark: Benchmark) -> list[str | None]:
    return list(benchmark.verbalisers) or [None]


def own(file: Path, **changes: Any) -> Path:
    """A benchmark of one's own; a key that is None is left out."""
    import yaml

    values = {
        "name": "Own",
        "path": ".",
        "pool": {"split": "train", "rows": 100},
        "test": {"split": "test", "rows": 100},
        "prompt": "Text:{text}\nLabel:",
        "label": "label",
        "verbalisers": {"words": {0: " no", 1: " yes"}},
        **changes,
    }
    file.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False))
    return file


def some_rows(first: int, count: int) -> list[dict[str, Any]]:
    return [{"text": f"row {number}", "label": number % 2} for number in range(first, first + count)]


# The entries


def test_the_twelve_and_the_intents() -> None:
    assert list(ROWS) == NAMES
    assert [name for name in NAMES if BENCHMARKS[name].role == "OOD eval"] == [
        "PoemS",
        "BBCN",
        "QASCr",
        "GSM8Ks",
    ]
    assert {name: b.ood for name, b in BENCHMARKS.items() if b.ood} == {
        "SST2": ("FinS", "PoemS"),
        "FinS": ("SST2", "PoemS"),
        "AGN": ("BBCN",),
        "SciQr": ("QASCr",),
        "GSM8K": ("GSM8Ks",),
    }
    for benchmark in BENCHMARKS.values():
        for other in benchmark.ood:
            # what is trained with a verbaliser is tried with the same
            assert list(BENCHMARKS[other].verbalisers) == list(benchmark.verbalisers)
            assert BENCHMARKS[other].kind == benchmark.kind


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_settings(name: str) -> None:
    benchmark = BENCHMARKS[name]
    for verbaliser in verbalisers(benchmark):
        settings = benchmark.settings(verbaliser)
        assert validate(AdaptConfig, settings).task == benchmark.kind
        if verbaliser:
            assert sorted(settings["labels"]) == sorted(set(benchmark.verbalisers[verbaliser].values()))
    assert BENCHMARKS["HMathA"].settings() == {"task": "generation", "parser": "boxed"}


def test_verbalisers() -> None:
    words = BENCHMARKS["BBCN"].settings("words")["labels"]
    assert sorted(words) == sorted(BENCHMARKS["AGN"].settings("words")["labels"])
    assert BENCHMARKS["SST2"].check_verbaliser(None) == "digits"
    assert BENCHMARKS["SciQr"].check_verbaliser(None) == "remapped"
    assert BENCHMARKS["GSM8K"].check_verbaliser(None) is None
    with pytest.raises(ConfigError, match=r"SST2: no verbaliser 'word'\. Did you mean 'words'\?"):
        BENCHMARKS["SST2"].settings("word")
    with pytest.raises(ConfigError, match=r"GSM8K: answers are free text, .* Leave it out\."):
        BENCHMARKS["GSM8K"].check_verbaliser("digits")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from ia2.cli import main; main(['benchmarks', 'ls', '--json']); "
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# Rendering


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_answer(name: str, tmp_path: Path) -> None:
    row, prompt, answers = ROWS[name]
    benchmark = BENCHMARKS[name]
    folder = mirror(tmp_path / (benchmark.mirror or "rows"), **{benchmark.test.split: [row]})
    changes: dict[str, Any] = {"pool": None}  # one row is no pool, too
    if benchmark.path is not None:
        changes["path"] = folder
    alone = benchmark.model_copy(update=changes)
    for verbaliser in verbalisers(benchmark):
        (example,) = alone.load(tmp_path, verbaliser).test
        assert example.query == prompt
        assert example.answer == answers[verbaliser or "free text"]
    assert len(answers) == len(verbalisers(benchmark))


@pytest.mark.parametrize("name", NAMES)
def test_first_test_row(name: str, shared_data: Path) -> None:
    first = BENCHMARKS[name].load(shared_data, max_test=1).test[0]
    assert first.answer is not None
    assert hashlib.sha256((first.query + first.answer).encode()).hexdigest()[:16] == FIRST_ROWS[name]
    if name in REAL:
        _, prompt, answers = ROWS[name]
        assert (first.query, first.answer) == (prompt, next(iter(answers.values())))


def test_the_parser_finds_the_answers(shared_data: Path) -> None:
    for name in ("GSM8K", "GSM8Ks", "HMathA", "SciQ"):
        benchmark = BENCHMARKS[name]
        for example in benchmark.load(shared_data).test:
            found = parse(benchmark.parser or "text", example.answer or "")
            assert found is not None, example.source
            if name == "SciQ":
                assert found == " ".join(example.fields["correct_answer"].split())


def test_choices_are_shuffled_by_the_row_alone(tmp_path: Path) -> None:
    rows = [{**ROWS["SciQr"][0], "question": f"Which is number {number}?"} for number in range(200)]
    alone = BENCHMARKS["SciQr"].model_copy(update={"pool": None, "folder": "sciq"})
    mirror(tmp_path / "one" / "sciq", test=rows)
    mirror(tmp_path / "other" / "sciq", test=rows[::-1][:150])
    one = {e.fields["question"]: (e.query, e.answer) for e in alone.load(tmp_path / "one").test}
    other = {e.fields["question"]: (e.query, e.answer) for e in alone.load(tmp_path / "other").test}
    assert other.items() <= one.items()
    places = Counter(answer for _, answer in one.values())
    assert len(places) == 4
    assert min(places.values()) > 30
    for query, answer in one.values():
        assert f"[{(answer or '').strip()}]carbon dioxide\n" in query


@pytest.mark.parametrize(
    ("text", "shortened"),
    [("a" * 250 + " bcd efg", "a" * 250 + " bcd"), ("short enough", "short enough"), ("x" * 300, "x" * 256)],
)
def test_shortened_columns(text: str, shortened: str, tmp_path: Path) -> None:
    mirror(tmp_path / "bbc_news", test=[{"text": text, "label": 2}])
    (example,) = BENCHMARKS["BBCN"].load(tmp_path).test
    assert example.query == f"Text:{shortened}\nLabel:"


# Rows


@pytest.mark.parametrize("name", NAMES)
def test_rows_on_the_mirrors(name: str, shared_data: Path) -> None:
    benchmark = BENCHMARKS[name]
    data = benchmark.load(shared_data)
    assert (len(data.pool), len(data.test)) == SIZES[name]
    assert not {e.query for e in data.pool} & {e.query for e in data.test}
    sources = [(e.source, e.query) for part in (data.pool, data.test) for e in part]
    assert len(set(sources)) == len(sources)
    again = benchmark.load(shared_data, max_test=7)
    assert again.fingerprint["pool"] == data.fingerprint["pool"]
    assert list(again.test) == list(data.test)[:7]
    if benchmark.kind == "classification":
        labels = set(benchmark.settings()["labels"])
        for part in filter(len, (data.pool, data.test)):
            assert set(part.answers) == labels
            # none is more than twice as frequent as it would be in equal shares, none has less than half
            shares = [count * len(labels) / len(part) for count in Counter(part.answers).values()]
            assert min(shares) > 0.5
            assert max(shares) < 2
        for verbaliser in verbalisers(benchmark):
            other = benchmark.load(shared_data, verbaliser)
            assert [e.source for e in other.test] == [e.source for e in data.test]
            assert [e.source for e in other.pool] == [e.source for e in data.pool]
    else:
        assert all(tokens_at_most(answer) <= 200 for answer in data.pool.answers)
        assert len({e.answer for e in data.test}) > 490


def test_draws_of_training_rows_fit(shared_data: Path) -> None:
    for name in ("SST2", "GSM8K"):
        split = BENCHMARKS[name].load(shared_data).pool.split(num_examples=128, seed=4)
        assert (len(split.train), len(split.dev)) == (128, 48)


def test_repeated_test_rows_leave_the_pool(tmp_path: Path) -> None:
    mirror(tmp_path, train=some_rows(0, 10), test=some_rows(7, 5))
    data = load_benchmark(own(tmp_path / "own.yaml")).load()
    assert sorted(e.query for e in data.pool) == [f"Text:row {number}\nLabel:" for number in range(7)]
    assert data.notes == ["3 of 10 rows of train are left out of the pool: they repeat a test row"]


def test_one_split_for_both(tmp_path: Path) -> None:
    mirror(tmp_path, train=[*some_rows(0, 40), *some_rows(0, 40)])
    entry = own(tmp_path / "own.yaml", test={"split": "train", "rows": 20})
    data = load_benchmark(entry).load()
    assert len(data.test) == 20
    assert not {e.query for e in data.pool} & {e.query for e in data.test}
    assert len({e.query for e in [*data.pool, *data.test]}) == 40
    with pytest.raises(
        DataError, match=r"no row is left for training: all are test rows\. Lower test\.rows \(80\)\."
    ):
        load_benchmark(own(entry, test={"split": "train", "rows": 80})).load()


def test_long_answers_leave_the_pool(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"{'so ' * (30 * n)}\n#### {n}"} for n in range(8)]
    mirror(tmp_path / "gsm8k", train=rows, test=[{"question": "t", "answer": "so " * 900 + "#### 1"}])
    benchmark = BENCHMARKS["GSM8K"]
    data = benchmark.load(tmp_path)
    assert (
        sorted(e.fields["question"] for e in data.pool)
        == ["q0", "q1", "q2", "q3", "q4", "q5"][: len(data.pool)]
    )
    why = "are left out of the pool: their answers can have more than 200 tokens"
    assert data.notes == [f"{8 - len(data.pool)} of 8 rows of train {why}"]
    # test rows are never chosen by their answers
    assert len(data.test) == 1
    fewer = benchmark.load(tmp_path, max_answer_tokens=60)
    assert 0 < len(fewer.pool) < len(data.pool)
    assert "more than 60 tokens" in fewer.notes[0]
    with pytest.raises(
        DataError, match=r"GSM8K: no row is left for training: 8 of 8 rows .* more than 3 tokens"
    ):
        benchmark.load(tmp_path, max_answer_tokens=3)


def test_rows_without_support_are_left_out_and_counted(tmp_path: Path) -> None:
    full, empty = PLANTS, {**PLANTS, "support": ""}
    train = [{**full, "question": "another"}, {**empty, "question": "a third"}, {**empty, "support": "  "}]
    mirror(tmp_path / "sciq", train=train, test=[full, empty])
    data = BENCHMARKS["SciQ"].load(tmp_path)
    assert (len(data.pool), len(data.test)) == (1, 1)
    assert data.notes == [
        "1 of 2 rows of test are left out: support is empty",
        "2 of 3 rows of train are left out: support is empty",
    ]
    # as multiple choice they are used
    assert len(BENCHMARKS["SciQr"].model_copy(update={"pool": None}).load(tmp_path).test) == 2


DEMO_MODELS = ["demo", "demo-gemma"]


def demo_tokenizer(name: str) -> Any:
    found = sorted((cache_dir() / "models").glob(f"{name}-[0-9a-f]*/tokenizer.json"))
    if not found:
        pytest.skip(
            f"the model {name} has not been converted to {cache_dir()} yet; run `ia2 probe --model {name}`"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(found[-1].parent)


@pytest.mark.slow
@pytest.mark.parametrize("model", DEMO_MODELS)
def test_labels_are_one_token(model: str) -> None:
    tokenizer = demo_tokenizer(model)
    several = {
        (name, verbaliser)
        for name, benchmark in BENCHMARKS.items()
        for verbaliser in benchmark.verbalisers
        for label in benchmark.settings(verbaliser)["labels"]
        if len(tokenizer(label, add_special_tokens=False)["input_ids"]) > 1
    }
    # without its space `banana` is two on one of them
    assert several <= {("SciQr", "bare"), ("QASCr", "bare")}


@pytest.mark.slow
@pytest.mark.parametrize("model", DEMO_MODELS)
def test_the_estimate_of_tokens_is_an_upper_one(model: str, shared_data: Path) -> None:
    tokenizer = demo_tokenizer(model)
    for name in ("GSM8K", "HMathA", "SciQ"):
        answers = BENCHMARKS[name].load(shared_data, max_answer_tokens=10**6).pool.answers
        for answer, ids in zip(
            answers, tokenizer(answers, add_special_tokens=False)["input_ids"], strict=True
        ):
            assert len(ids) <= tokens_at_most(answer), answer


# Mirrors and the hub


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


def test_missing_mirrors_name_both_ways(tmp_path: Path) -> None:
    with pytest.raises(DataError) as info:
        BENCHMARKS["SST2"].load(tmp_path)
    message = said(info)
    assert f"no file {tmp_path / 'sst2' / 'validation.jsonl'}" in message
    assert "stanfordnlp/sst2" in message
    assert "leave --data-dir and IA2_DATA_DIR out to read them from the hub" in message
    with pytest.raises(DataError) as info:
        BENCHMARKS["SST2"].load(tmp_path / "nowhere")
    assert "no folder" in said(info)
    assert "from the hub" in said(info)


def test_no_hub_names_both_ways(offline: Path) -> None:
    with pytest.raises(DataError) as info:
        BENCHMARKS["FinS"].load()
    message = said(info)
    assert message.startswith("FinS: takala/financial_phrasebank: the hub cannot be reached")
    assert "--data-dir or IA2_DATA_DIR" in message
    assert "financial_phrasebank/train.jsonl" in message


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
    assert hub.test[0].source.startswith("hub[validation]:")


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


# One's own


def test_ones_own_benchmark(tmp_path: Path) -> None:
    mirror(tmp_path, train=some_rows(0, 30), test=some_rows(30, 20))
    benchmark = load_benchmark(own(tmp_path / "own.yaml", ood=["PoemS", "other.yaml"]))
    assert benchmark.ood == ("PoemS", str(tmp_path / "other.yaml"))
    data = benchmark.load("nowhere", max_test=5)  # its files are its own
    assert (len(data.pool), len(data.test)) == (30, 5)
    assert set(data.pool.answers) == {" no", " yes"}
    assert data.pool.raw_labels == {" no": 0, " yes": 1}
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"Own: no file train\.jsonl in .*\.csv"):
        benchmark.load()


def test_other_files_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text('text,label\n"a, b",1\nc,0\n')
    data = load_benchmark(own(tmp_path / "own.yaml", pool=None)).load()
    assert sorted(e.query for e in data.test) == ["Text:a, b\nLabel:", "Text:c\nLabel:"]
    assert len(data.pool) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "x"}, "unknown key 'promt'. Did you mean 'prompt'?"),
        ({"test": {"spilt": "a", "rows": 3}}, "unknown key 'test.spilt'. Did you mean 'split'?"),
        ({"hub": "a/b"}, "give hub (a hub id or a folder in hub layout) or path (a folder of files)"),
        ({"path": None}, "give hub (a hub id or a folder in hub layout) or path (a folder of files)"),
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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a", "label": 1}, "names the column 'text'"),
        ({"text": "a", "label": 7}, "has the label '7', which is not in the label map"),
        ({"text": None, "label": 1}, "column 'text' is missing (null)"),
    ],
)
def test_rows_that_are_wrong(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    mirror(tmp_path, test=[row])
    with pytest.raises(DataError) as info:
        load_benchmark(own(tmp_path / "own.yaml", pool=None)).load()
    assert message in said(info)


def test_files_that_are_wrong(tmp_path: Path) -> None:
    entry = own(tmp_path / "own.yaml", pool=None)
    (tmp_path / "test.jsonl").write_text('{"text": "a"\n[1]\n')
    with pytest.raises(
        DataError, match=r"Own \(test\): 2 bad rows: test.jsonl:1: invalid JSON .*; test.jsonl:2: not an"
    ):
        load_benchmark(entry).load()
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"Own \(test\): there is not a single row"):
        load_benchmark(entry).load()
    mirror(tmp_path, test=some_rows(0, 4))
    filtered = own(entry, pool=None, filter={"label": [5]})
    with pytest.raises(DataError, match=r"Own \(test\): none of 4 rows passes the filter"):
        load_benchmark(filtered).load()
    with pytest.raises(DataError, match="filters by the column 'lable'; there are text, label"):
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


# The command line


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "benchmarks", "ls").out.splitlines()
    for name, benchmark in BENCHMARKS.items():
        (line,) = [line for line in lines if line.replace("│", " ").split()[:1] == [name]]
        for words in (benchmark.kind, benchmark.role, benchmark.hub or "packaged", *benchmark.ood):
            assert words in line
        assert ", ".join(benchmark.verbalisers) in line
    listed = run(capsys, "benchmarks", "ls", "--json").json
    assert [facts["name"] for facts in listed] == NAMES


def test_show(capsys: pytest.CaptureFixture[str], shared_data: Path) -> None:
    shown = run(capsys, "benchmarks", "show", "SST2", "--data-dir", shared_data).out
    assert r"'\n\nText:'" in shown
    assert "stanfordnlp/sst2" in shown
    assert "    | Label:0\n" in shown
    assert "    | Label: negative\n" in shown
    facts = run(capsys, "benchmarks", "show", "QASCr", "--json").json
    assert facts["stop"] == "\n\nQuestion:"
    assert "examples" not in facts
    elsewhere = run(capsys, "benchmarks", "show", "QASCr").out
    assert "`ia2 benchmarks prepare QASCr`" in elsewhere
    assert "IA2_DATA_DIR" in elsewhere
    assert "Label: weather" in run(capsys, "benchmarks", "show", "Intents").out


def test_prepare(capsys: pytest.CaptureFixture[str], shared_data: Path) -> None:
    found = run(capsys, "benchmarks", "prepare", "--data-dir", shared_data)
    assert (found.status, found.err) == (0, "")
    for name, (pool, test) in SIZES.items():
        benchmark = BENCHMARKS[name]
        counts = [f"{count:,} {part} rows" for part, count in (("pool", pool), ("test", test)) if count]
        assert f"{name} ({benchmark.role}; {benchmark.source}): {', '.join(counts)}\n" in found.out
    assert found.out.count("first test row, ") == sum(len(verbalisers(b)) for b in BENCHMARKS.values())
    assert "  test answers, words: no 268, yes 232\n" in found.out
    assert "  note: the mirror differs from the hub: train is the first 20,000 of 67,349 rows\n" in found.out
    assert "    | Answer: yes\n" in found.out
    (facts,) = run(capsys, "benchmarks", "prepare", "PoemS", "--json", "--data-dir", shared_data).json
    assert facts["test"] == 288
    assert facts["answers"]["words"]["test"] == {" negative": 155, " positive": 133}
    assert facts["examples"]["digits"]["prompt"] == ROWS["PoemS"][1]


def test_prepare_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mirror(tmp_path, train=some_rows(0, 30), test=some_rows(30, 20))
    found = run(capsys, "benchmarks", "prepare", own(tmp_path / "own.yaml"))
    assert "Own (train, eval; " in found.out
    assert "30 pool rows, 20 test rows" in found.out


def test_prepare_writes_rows_for_other_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "rows"
    found = run(capsys, "benchmarks", "prepare", "Intents", "--output-dir", out)
    assert f"  written: {out / 'Intents-words' / 'pool.jsonl'}\n" in found.out
    data = BENCHMARKS["Intents"].load()
    for part, rows in (("pool", data.pool), ("test", data.test)):
        read = Examples.from_file(out / "Intents-words" / f"{part}.jsonl")
        assert [(row.query, row.answer) for row in read] == [(row.query, row.answer) for row in rows]
    (facts,) = run(capsys, "benchmarks", "prepare", "Intents", "--output-dir", out, "--json").json
    assert facts["files"] == [str(out / "Intents-words" / f"{part}.jsonl") for part in ("pool", "test")]


def test_prepare_fills_the_cache(
    capsys: pytest.CaptureFixture[str], offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror(offline / "rows", train=some_rows(0, 30), test=some_rows(30, 20))
    entry = own(offline / "own.yaml", path=None, hub="rows")
    assert "20 test rows" in run(capsys, "benchmarks", "prepare", entry).out
    assert list((offline / "cache").rglob("*.arrow"))


def test_prepare_reads_what_it_can(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mirror(tmp_path / "poem_sentiment", train=[ROWS["PoemS"][0]])
    found = run(capsys, "benchmarks", "prepare", "SST2", "PoemS", "AGN", "--data-dir", tmp_path)
    assert found.status == 2
    assert "PoemS (OOD eval" in found.out
    (line,) = found.err.splitlines()
    assert line.startswith("ia2: error: SST2, AGN cannot be read; the first: SST2: no file ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "sst2"], "unknown benchmark 'sst2'. Did you mean 'SST2'?"),
        (["show", "none.yaml"], "none.yaml: no such file."),
        (["show", "SST2", "--data-dir", "nowhere"], "SST2: no folder nowhere."),
        (["prepare", "SST2", "--data-dir", "nowhere"], "SST2: no folder nowhere."),
        (["prepare", "Intent"], "Did you mean 'Intents'?"),
        (["lst"], "Did you mean 'ls'?"),
        (["ls", "--jsn"], "Did you mean '--json'?"),
        ([], "Missing command. See ia2 benchmarks --help."),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run(capsys, "benchmarks", *arguments).refusal()


def test_entries_are_packaged() -> None:
    """They are files beside the code, which the wheel takes whole (`packages` in pyproject.toml)."""
    folder = ROOT / "src" / "ia2" / "benchmarks" / "entries"
    assert sorted(file.stem for file in folder.iterdir()) == sorted(NAMES)
    assert all(json.dumps(benchmark.model_dump(mode="json")) for benchmark in BENCHMARKS.values())
