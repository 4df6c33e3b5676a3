"""The paper's tables: what they are of, and their figures (``paper.yaml`` beside this file)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

Kind = Literal["labels", "free", "both", "gaps", "tests"]


@dataclass(frozen=True)
class Figure:
    """One number pair of the paper; accuracies in percent, ``None`` where the text gives none."""

    accuracy: float
    accuracy_sd: float | None
    ece: float | None = None
    ece_sd: float | None = None


@dataclass(frozen=True)
class PaperRow:
    """One row of a table.

    Attributes:
        source: trained on.
        dataset: evaluated on.
        num_examples: N.
        model: hub id.
        adapter: ``r8 qko``, in the ablation of LoRA's settings; empty elsewhere.
        figures: recipe → figure.
    """

    source: str
    dataset: str
    num_examples: int
    model: str
    adapter: str
    figures: Mapping[str, Figure]


@dataclass(frozen=True)
class PaperTable:
    """What one of the paper's tables shows.

    Attributes:
        number: 1 to 20.
        kind: ``labels`` (accuracy and ECE), ``free`` (accuracy of free text), ``both``, ``gaps``
            (differences beside accuracy), ``tests`` (table 8).
        by: what rows differ in beside the benchmark: ``size``, ``adapter``, or nothing.
        adapter: type of the adapter.
        answers: what is fine-tuned on: ``ground_truth`` or ``icl_responses``.
        recipes: its columns.
        rows: with the paper's figures.
    """

    number: int
    kind: Kind
    by: Literal["", "size", "adapter"]
    adapter: str
    answers: str
    recipes: tuple[str, ...]
    rows: tuple[PaperRow, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Of its rows."""
        return tuple(dict.fromkeys(row.model for row in self.rows))

    def model_of(self, source: str) -> str | None:
        """The paper's model for what is trained on this benchmark; None where it trained none."""
        return next((row.model for row in self.rows if row.source == source), None)

    def find(
        self, source: str, dataset: str, model: str, num_examples: int | None, adapter: str = ""
    ) -> PaperRow | None:
        """The row of just this, if the paper has it."""
        wanted = (source, dataset, model, num_examples, adapter)
        of = attrgetter("source", "dataset", "model", "num_examples", "adapter")
        return next((row for row in self.rows if of(row) == wanted), None)


@lru_cache(maxsize=1)
def paper_tables() -> dict[int, PaperTable]:
    """All tables by number."""
    import yaml

    text = Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
    return {number: _table(number, entry) for number, entry in yaml.safe_load(text)["tables"].items()}


def _table(number: int, entry: dict[str, Any]) -> PaperTable:
    recipes = tuple(entry["recipes"])
    by = entry.get("by", "")
    rows = []
    for name, figures in entry["rows"].items():
        source, dataset, *more = name.split("/")
        count = int(more[0]) if by == "size" else _by_source(entry["num_examples"], source)
        rows.append(
            PaperRow(
                source,
                dataset,
                count,
                _by_source(entry["model"], source),
                more[0] if by == "adapter" else "",
                {recipe: Figure(*f) for recipe, f in zip(recipes, figures, strict=True)},
            )
        )
    return PaperTable(number, entry["kind"], by, entry["adapter"], entry["answers"], recipes, tuple(rows))


def _by_source(value: Any, source: str) -> Any:
    return value.get(source, value.get("*")) if isinstance(value, dict) else value
