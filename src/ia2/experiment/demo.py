"""The demo: a packaged data set on which the demo model's ICL is clearly above chance."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ia2.config import CompareConfig
from ia2.config.reading import validate

# One-word labels: small models cannot read digits as labels.
LABEL_MAP = {
    "get_weather": "weather",
    "play_music": "music",
    "book_restaurant": "restaurant",
    "rate_book": "rating",
}
PROMPT_TEMPLATE = "Text: {text}\nLabel:"
COMPLETION_TEMPLATE = " {label}"


def demo_data(split: str) -> Path:
    """Path of the packaged rows, ``train`` or ``test``."""
    return Path(str(files("ia2") / "data" / "intents" / f"{split}.jsonl"))


def demo_config(**changes: object) -> CompareConfig:
    """What ``ia2 demo`` compares: two examples of each of four intents, 60 test queries.

    Epochs are fewer than the defaults: a seed then takes about two minutes on two cores.
    """
    values = {
        "model": "demo",
        "data": str(demo_data("train")),
        "test_data": str(demo_data("test")),
        "prompt_template": PROMPT_TEMPLATE,
        "completion_template": COMPLETION_TEMPLATE,
        "label_map": LABEL_MAP,
        "num_examples": 8,
        "selection": "dev",
        "seeds": 1,
        "max_test": 60,
        "learning_rates": [1e-3],
        "align": {"epochs": 25},
        "sft": {"epochs": 12},
        **changes,
    }
    config: CompareConfig = validate(CompareConfig, values)
    return config
