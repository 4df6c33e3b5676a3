"""Rows of the benchmarks: made up, or under a licence that allows it, in the fields of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.command_line import write_rows

from ia2.data.benchmarks import BENCHMARKS, Benchmark

ROOT = Path(__file__).parents[2]

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
        {"digits": "1", "words": " positive", "swapped": " negative", "neutral": " blue"},
    ),
    "FinS": (
        {"sentence": "Operating profit fell to EUR 3 mn .", "label": 0},
        "Text:Operating profit fell to EUR 3 mn .\nLabel:",
        {"digits": "0", "words": " negative", "swapped": " positive", "neutral": " red"},
    ),
    "PoemS": (
        {"id": 850, "verse_text": "radiant as moses from the mount, he stood", "label": 1},
        "Text:radiant as moses from the mount, he stood\nLabel:",
        {"digits": "1", "words": " positive", "swapped": " negative", "neutral": " blue"},
    ),
    "AGN": (
        {"text": "Chip maker opens plant The plant will employ 300 people.", "label": 3},
        "Text:Chip maker opens plant The plant will employ 300 people.\nLabel:",
        {"digits": "3", "words": " Technology", "swapped": " World", "neutral": " black"},
    ),
    "BBCN": (
        {"text": NEWS, "label": 4, "label_text": "politics"},
        "Text:the old harbour is to be dredged again this spring  the port authority said on monday. "
        "two ships ran aground there in march  and the pilots have refused to bring in larger ones since. "
        "the work is to take six weeks and to cost four million pounds  of\nLabel:",
        {"digits": "0", "words": " World", "swapped": " Sports", "neutral": " red"},
    ),
    "STF": (
        {"qid": "678cd91b0e940994a15f", "question": STRATEGY, "answer": True},
        f"Question:{STRATEGY}\nAnswer:",
        {"digits": "1", "words": " yes", "swapped": " no", "neutral": " blue"},
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
        {"words": " weather", "swapped": " music", "neutral": " red"},
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
