"""One benchmark as data: where its rows are, which of them count, and how they are rendered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ia2.config.sections import Section
from ia2.data.answers import load_parser
from ia2.data.rows import RowFormat, Template
from ia2.utils.errors import ConfigError, DataError, suggest

if TYPE_CHECKING:
    from ia2.data.benchmarks.loading import BenchmarkData

NOT_EMPTY = "not empty"


class Drawn(Section):
    """Rows that are drawn from a split."""

    model_config = ConfigDict(frozen=True)

    split: str = Field(description="Split of the hub data set, or stem of the file.")
    rows: int = Field(ge=1, description="Rows drawn at most.")


class Choices(Section):
    """How the columns ``{choices}`` and ``{label}`` of a multiple-choice row are made.

    Either ``right`` and ``wrong`` name a column for each choice, or ``texts``, ``keys`` and ``answer``
    name the lists of choices and of their keys and the right key; a dot reaches inside a column.
    """

    model_config = ConfigDict(frozen=True)

    labels: tuple[str, ...] = Field(min_length=2, description="Labels of the choices, in order.")
    line: str = Field("[{label}]{choice}\n", description="How one choice is written.")
    shuffle: bool = Field(False, description="Shuffle the choices of each row, the same way every time.")
    right: str | None = Field(None, description="Column of the right choice.")
    wrong: tuple[str, ...] = Field((), description="Columns of the wrong choices.")
    texts: str | None = Field(None, description="Column with the list of choices.")
    keys: str | None = Field(None, description="Column with the list of their keys.")
    answer: str | None = Field(None, description="Column with the key of the right choice.")

    @model_validator(mode="after")
    def _one_way(self) -> Choices:
        columns, lists = (self.right, self.wrong), (self.texts, self.keys, self.answer)
        if not (all(columns) and not any(lists)) and not (all(lists) and not any(columns)):
            raise ValueError("give right and wrong, or texts, keys and answer")
        if self.right is not None and len(self.wrong) + 1 != len(self.labels):
            raise ValueError(f"{len(self.wrong) + 1} choices and {len(self.labels)} labels")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label is there twice")
        try:
            columns_used = set(Template.parse(self.line, "line").columns)
        except DataError as error:
            raise ValueError(str(error)) from None
        if columns_used != {"label", "choice"}:
            raise ValueError("line: write {label} and {choice}, and no other column")
        return self


class Benchmark(Section):
    """A benchmark of METHOD.md §6, or one's own.

    Answers are labels (``label`` and ``verbalisers``, or ``choices`` and ``verbalisers``) or free text
    (``answer`` and ``parser``). Without a ``pool`` nothing is trained on it: it is an OOD test set.
    """

    model_config = ConfigDict(frozen=True)

    name: str = Field(min_length=1, description="What tables call it.")
    about: str = Field("", description="One line on what is asked.")
    hub: str | None = Field(None, description="Hub id, or a folder in hub layout.")
    config: str | None = Field(None, description="Configuration (subset) of the hub data set.")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub data set.")
    folder: str | None = Field(
        None, description="Its folder among mirrors; by default the last part of the hub id."
    )
    path: Path | None = Field(
        None, description="Folder of <split>.jsonl (.csv, .parquet) files; instead of hub and mirror."
    )
    pool: Drawn | None = Field(None, description="Where training and dev rows are drawn from.")
    test: Drawn = Field(description="Where test rows are drawn from; never the same rows.")
    filter: dict[str, Literal["not empty"] | list[bool | int | str]] = Field(
        {}, description="Column to the values that are kept, or `not empty`."
    )
    shorten: dict[str, int] = Field(
        {}, description="Column to a number of characters: its beginning, less the last word."
    )
    prompt: str = Field(description=r"Template, such as 'Text:{text}\nLabel:'.")
    label: str | None = Field(None, description="Column of the label.")
    choices: Choices | None = Field(None, description="Multiple choice: how `{choices}` is made.")
    verbalisers: dict[str, dict[str, str]] = Field(
        {}, description="Name to raw label to answer, verbatim. The first is the default."
    )
    answer: str | None = Field(None, description="Template of a free-text answer.")
    parser: str | None = Field(None, description="How a free-text answer is read.")
    max_answer_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest free-text answer (200). Pool rows that may be longer are left out, and counted.",
    )
    ood: tuple[str, ...] = Field((), description="Benchmarks that what is trained here is tried on.")

    @field_validator("verbalisers", mode="before")
    @classmethod
    def _texts_of_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            name: {label_key(raw): text for raw, text in texts.items()}
            if isinstance(texts, Mapping)
            else texts
            for name, texts in value.items()
        }

    @model_validator(mode="after")
    def _whole(self) -> Benchmark:
        if (self.hub is None) == (self.path is None):
            raise ValueError("give hub (a hub id or a folder in hub layout) or path (a folder of files)")
        ways = [way for way in ("label", "choices", "answer") if getattr(self, way) is not None]
        if len(ways) != 1:
            raise ValueError(f"give one of label, choices and answer, not {' and '.join(ways) or 'none'}")
        if (self.answer is None) != bool(self.verbalisers):
            raise ValueError("labels need verbalisers, and free text has none")
        if self.answer is None and (self.parser or self.max_answer_tokens):
            raise ValueError("parser and max_answer_tokens are for free text. Leave them out")
        raw = set(self.choices.labels) if self.choices else None
        for name, texts in self.verbalisers.items():
            raw = raw or set(texts)
            if set(texts) != raw:
                raise ValueError(
                    f"verbalisers.{name}: its labels are {', '.join(texts)}, where {', '.join(sorted(raw))} "
                    "are expected"
                )
        try:
            RowFormat(self.prompt, self.answer)
            if self.parser and ":" not in self.parser:  # others are code, which nobody has named yet
                load_parser(self.parser)
        except (DataError, ConfigError) as error:
            raise ValueError(str(error)) from None
        if self.choices is not None and "choices" not in self.prompt_columns:
            raise ValueError("prompt: write {choices} where the choices come")
        return self

    @property
    def kind(self) -> str:
        """``classification`` or ``generation``."""
        return "classification" if self.verbalisers else "generation"

    @property
    def role(self) -> str:
        """``train, eval`` or, without a pool, ``OOD eval``."""
        return "OOD eval" if self.pool is None else "train, eval"

    @property
    def verbaliser(self) -> str | None:
        """The default verbaliser, None for free text."""
        return next(iter(self.verbalisers), None)

    @property
    def source(self) -> str:
        """Hub id and configuration, or the folder of one's own files."""
        if self.hub is None:
            return str(self.path)
        return f"{self.hub} ({self.config})" if self.config else self.hub

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """Columns that the prompt is made of."""
        return Template.parse(self.prompt, "prompt").columns

    @property
    def mirror(self) -> str | None:
        """Folder among mirrors."""
        return self.folder or (Path(self.hub).name if self.hub else None)

    def check_verbaliser(self, name: str | None) -> str | None:
        """The verbaliser to use: the one asked for, or the default.

        Raises:
            ConfigError: there is no such verbaliser.
        """
        if name is None or name in self.verbalisers:
            return name or self.verbaliser
        if not self.verbalisers:
            raise ConfigError(
                f"{self.name}: answers are free text, so there is no verbaliser '{name}'. Leave it out."
            )
        known = list(self.verbalisers)
        raise ConfigError(
            f"{self.name}: no verbaliser '{name}'.{suggest(name, known)} There are {', '.join(known)}."
        )

    def settings(self, verbaliser: str | None = None) -> dict[str, Any]:
        """What this benchmark asks of :class:`ia2.AdaptConfig`; defaults are left out.

        Raises:
            ConfigError: there is no such verbaliser.
        """
        name = self.check_verbaliser(verbaliser)
        if name is not None:
            return {"task": self.kind, "labels": list(dict.fromkeys(self.verbalisers[name].values()))}
        asked = {"task": self.kind, "parser": self.parser, "max_answer_tokens": self.max_answer_tokens}
        return {key: value for key, value in asked.items() if value is not None}

    def row_format(self, verbaliser: str | None = None) -> RowFormat:
        """How a row (with its derived columns) becomes an example.

        Raises:
            ConfigError: there is no such verbaliser.
        """
        name = self.check_verbaliser(verbaliser)
        if name is None:
            return RowFormat(self.prompt, self.answer)
        column = "label" if self.choices else self.label
        return RowFormat(self.prompt, f"{{{column}}}", self.verbalisers[name])

    def load(
        self,
        data_dir: str | Path | None = None,
        verbaliser: str | None = None,
        max_test: int | None = None,
        max_answer_tokens: int | None = None,
    ) -> BenchmarkData:
        """Read, filter, draw and render the rows.

        The rows depend on the benchmark alone: not on verbaliser, seed or number of examples.

        Args:
            data_dir: folder of mirrors (``<folder>/<split>.jsonl``); None: ``IA2_DATA_DIR``, else the hub.
            verbaliser: name of a verbaliser; None: the default.
            max_test: only the first so many test rows.
            max_answer_tokens: free text: instead of the entry's own limit, for which pool rows with
                longer answers are left out.

        Raises:
            ConfigError: there is no such verbaliser.
            DataError: the rows cannot be had (both ways are named), or are bad.
        """
        from ia2.data.benchmarks.loading import load

        return load(self, data_dir, verbaliser, max_test, max_answer_tokens)


def label_key(value: Any) -> str:
    """A raw label as text: JSON's and YAML's ``true`` are ``true``, whatever Python calls them."""
    return str(value).lower() if isinstance(value, bool) else str(value)
