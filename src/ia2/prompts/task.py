"""What counts as an answer: labels of a fixed set, of one token or several, or free text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ia2.config import FREE_TEXT_TOKENS, AdaptConfig
from ia2.data.answers import load_parser
from ia2.data.examples import Example, Examples
from ia2.data.rows import bad_rows
from ia2.models.tokens import Ids, decode, encode_answer
from ia2.prompts.answer_checks import (
    Advice,
    check_label_reach,
    check_names,
    first_few,
    kept_escapes,
    near_key,
    near_labels,
    unlikely_joints,
    unreachable,
)
from ia2.prompts.format import PromptFormat
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.logging import logger, warn_once
from ia2.utils.wording import flat, names_of, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ids a generated label may run on for before the stop text is due.
_LABEL_SLACK = 8

# Ids that a prompt leaves free behind the answer, unless a stop text needs more.
_RESERVE = 16


@dataclass(frozen=True)
class Task:
    """How answers are made, scored and read.

    Attributes:
        kind: ``classification`` or ``generation``.
        labels: label texts (completions, verbatim), sorted; empty for generation.
        label_ids: their ids.
        names: what users call them: the raw label where a template made the completion, else the text.
        max_answer_tokens: G at most.
        append_end: end-of-sequence id that is appended to training answers, or None.
        terminators: ids with which a label can end, where one label is the beginning of another.
        stop_texts: what ends a generated answer.
        parser: how a free-form answer is read.
        separator: text between demonstrations.
        trimmed: answers are trained on without leading white space, as chat templates render them.
        stop_tokens: of the longest stop text.
        advice: what is unwise about labels, prompts and answers; said once.
    """

    kind: str
    labels: tuple[str, ...] = ()
    label_ids: tuple[Ids, ...] = ()
    names: tuple[Any, ...] = ()
    max_answer_tokens: int = FREE_TEXT_TOKENS
    append_end: int | None = None
    terminators: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    parser: str = "text"
    separator: str = "\n\n"
    trimmed: bool = False
    stop_tokens: int = 0
    advice: tuple[Advice, ...] = ()
    index: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def single_token(self) -> bool:
        """Every answer is one token."""
        return self.max_answer_tokens == 1

    @property
    def reserve(self) -> int:
        """Tokens of the context window that a prompt leaves free.

        Room for the answer, an end-of-sequence id and a stop text that is looked out for. A label of one
        token is scored, not generated.
        """
        if self.single_token and self.kind == "classification":
            return 1
        return self.max_answer_tokens + max(_RESERVE, self.stop_tokens + 1)

    def label_of(self, example: Example) -> int:
        """Index of an example's label.

        Raises:
            DataError: its answer is not among the labels.
        """
        self.check_labels([example])
        return self.index[example.answer or ""]

    def check_labels(self, *parts: Sequence[Example]) -> None:
        """That the answers of rows are labels, where the task has labels.

        Raises:
            DataError: some are not (all are counted, the first are named).
        """
        if self.kind != "classification":
            return
        reasons, files = [], []
        for part in parts:
            bad = [row for row in part if (row.answer or "") not in self.index]
            files += [getattr(part, "name", "rows")] if bad else []
            for row in bad:
                answer = quoted(row.answer or "")
                reasons.append(f"{row.source}: the completion {answer} {self._no_label(row)}")
        if not reasons:
            return
        shown = names_of(self.labels[:10])
        if len(self.labels) > 10:
            shown += f", … ({len(self.labels)} in all)"
        if len(reasons) == 1:
            joint = " " if reasons[0].endswith("not one of the labels") else ". The labels are "
            raise DataError(flat(f"{reasons[0]}{joint}{shown}."))
        raise DataError(flat(f"{bad_rows(' and '.join(files), reasons)}. The labels are {shown}."))

    def _no_label(self, example: Example) -> str:
        key = near_key(example.answer or "")
        near = next((label for label in self.labels if near_key(label) == key), None)
        if near is None:
            return "is not one of the labels"
        return f"differs from the label {quoted(near)} only by case, blanks or look-alike characters"

    def label_said(self, ids: Ids) -> int | None:
        """Index of the label that generated ids begin with, the longest where labels begin alike; or None."""
        begun = [i for i, label in enumerate(self.label_ids) if ids[: len(label)] == label]
        return max(begun, key=lambda i: len(self.label_ids[i]), default=None)

    def check(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], *, trained: bool) -> None:
        """Refuse answers that are no label, or free ones that no model can give or that never match.

        Of rows that are only evaluated on such free answers are said instead: they count as wrong.

        Raises:
            DataError: naming the first rows, and how many there are.
        """
        if self.kind == "classification":
            self.check_labels(rows)
            return
        bad = unreachable(self, tokenizer, rows, trained=trained)
        if not bad:
            return
        listed = first_few([f"{row.source}: the completion {reason}" for row, reason in bad], "more rows")
        if not trained:
            warn_once(
                f"{len(bad)} of {len(rows)} rows to evaluate on count as wrong whatever the model answers: "
                f"{listed}. Mend them, or train with a larger max_answer_tokens or another parser."
            )
            return
        texts = [row.answer for row, _ in bad if row.answer and row.answer.strip()]
        longest = max((len(encode_answer(tokenizer, text)) for text in texts), default=0)
        way_out = "Mend or leave out these rows, or choose another separator or parser."
        if longest > self.max_answer_tokens:
            way_out = f"Raise max_answer_tokens to at least {longest}, or mend these rows."
        raise DataError(f"{listed}: such an answer can never be given or matched. {way_out}")

    def target_ids(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> Ids:
        """Ids of the ground-truth answer as it is trained on.

        Raises:
            DataError: the answer is not among the labels, or longer than allowed.
        """
        if self.kind == "classification":
            ids = self.label_ids[self.label_of(example)]
        else:
            text = example.answer or ""
            ids = encode_answer(tokenizer, text.lstrip() if self.trimmed else text, example.source)
            if len(ids) > self.max_answer_tokens:
                raise DataError(
                    f"{example.source}: the completion has {len(ids)} tokens, max_answer_tokens is "
                    f"{self.max_answer_tokens}. Raise it to at least {len(ids)}."
                )
        return ids if self.append_end is None else (*ids, self.append_end)


def make_task(
    examples: Examples,
    config: AdaptConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt_template: str | None = None,
    test: Sequence[Example] | None = None,
) -> Task:
    """Settle what kind of task the labelled rows are, and say so.

    Args:
        examples: the rows to learn from, with those held out.
        config: settings.
        tokenizer: the model's.
        prompt_template: what the prompts were made with, if it is known.
        test: rows that are only evaluated on; their answers are checked too.

    Raises:
        ConfigError: labels that contradict the settings.
        DataError: an answer that is not among the given labels, or of several tokens where one was
            declared.
    """
    load_parser(config.parser)  # unknown ones are refused now, not after the training
    kind = config.task
    if kind == "auto":
        kind = "classification" if config.labels or _looks_like_labels(examples) else "generation"
    if kind == "generation" and config.labels:
        raise ConfigError("labels are given, but task is generation. Leave one of them out.")
    stop = stop_text(examples, config.separator, prompt_template)
    prompt_format = PromptFormat(tokenizer, config.separator, config.chat, config.thinking)
    # Without separator and opening literal nothing but the end of sequence ends an answer, and a chat model
    # ends its turn.
    stops = (stop,) if stop and config.chat == "off" else ()
    task = Task(
        kind,
        append_end=prompt_format.end_id,
        stop_texts=stops,
        separator=config.separator,
        trimmed=config.chat != "off",
        stop_tokens=max((len(encode_answer(tokenizer, text, "separator")) for text in stops), default=0),
    )
    if kind == "generation":
        limit = config.max_answer_tokens or FREE_TEXT_TOKENS
        end = None if limit == 1 else task.append_end
        task = replace(task, max_answer_tokens=limit, append_end=end, parser=config.parser)
        reading = f"read with the parser '{config.parser}'"
        logger.info("Task: free-form answers of up to %d tokens, %s.", limit, reading)
        task.check(tokenizer, examples, trained=True)
        task.check(tokenizer, test or (), trained=False)
    else:
        task = _with_labels(task, examples, config, prompt_format, stop)
        task.check_labels(examples, test or ())
        check_label_reach(task, tokenizer)
        several = max(map(len, task.label_ids))
        size = (
            f"up to {several} tokens, scored by summed log-probability" if several > 1 else "one token each"
        )
        shown = ", ".join(map(repr, task.labels[:8])) + (" …" if len(task.labels) > 8 else "")
        logger.info("Task: %d labels (%s), %s.", len(task.labels), shown, size)
    return _advised(task, tokenizer, examples, config, prompt_template)


def _with_labels(
    task: Task, examples: Examples, config: AdaptConfig, prompt_format: PromptFormat, stop: str
) -> Task:
    tokenizer = prompt_format.tokenizer
    labels = tuple(sorted(config.labels)) if config.labels else tuple(sorted(set(examples.answers)))
    if len(labels) < 2:
        raise DataError(
            f"{examples.name}: all rows have the completion {labels[0]!r}; at least two labels are needed."
        )
    raw = examples.raw_labels
    names = tuple(raw.get(label, label.strip()) for label in labels)
    check_names(labels, names, examples, bool(config.labels))
    ids = tuple(encode_answer(tokenizer, prompt_format.as_answer(label)) for label in labels)
    counts = Counter(ids)
    if same := [label for label, own in zip(labels, ids, strict=True) if counts[own] > 1]:
        raise DataError(
            f"the labels {same} are the same tokens to this model. Choose other texts with --label-map."
        )
    longest, label = max(zip(ids, labels, strict=True), key=lambda pair: len(pair[0]))
    limit = config.max_answer_tokens or (1 if len(longest) == 1 else len(longest) + _LABEL_SLACK)
    if limit < len(longest):
        raise DataError(
            f"max_answer_tokens is {limit}, but the label {label!r} has {len(longest)} tokens "
            f"({[decode(tokenizer, [t]) for t in longest]}). Raise it, leave it out, or choose one-token "
            "texts with --label-map."
        )
    # where one label's ids begin another's, the shorter would win by its length alone
    nested = any(a != b and b[: len(a)] == a for a in ids for b in ids)
    return replace(
        task,
        labels=labels,
        label_ids=ids,
        names=names,
        max_answer_tokens=limit,
        append_end=task.append_end if len(longest) > 1 else None,
        terminators=_terminators(tokenizer, stop, task.append_end) if nested else (),
        index={label: i for i, label in enumerate(labels)},
    )


def _advised(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    config: AdaptConfig,
    prompt_template: str | None,
) -> Task:
    """The task with what is unwise about it, which is said in one warning."""
    texts = [prompt_template or "", config.separator, config.context_text or "", *task.labels]
    for column in ([example.query for example in examples], examples.answers):
        if len(set(column)) > 1:  # what all have in common comes from a template
            texts += [common_beginning(column), common_beginning([text[::-1] for text in column])[::-1]]
    advice = near_labels(task.labels, task.names) + kept_escapes(texts)
    if config.chat == "off":
        advice += unlikely_joints(tokenizer, examples)
    if advice:
        sentences = (f"{what}: {evidence}; {way_out}." for what, evidence, way_out in advice)
        warn_once(f"{examples.name}: {' '.join(sentences)}")
    return replace(task, advice=tuple(advice))


def stop_text(examples: Sequence[Example], separator: str, prompt_template: str | None) -> str:
    """The separator and the prompt's opening literal (``"\\n\\n" + "Text:"``).

    The literal comes from the template, or is what all prompts begin with, up to the end of a line. A
    bare blank line would cut many worked solutions in the middle.
    """
    queries = {example.query for example in examples}
    if prompt_template is not None:
        literal = prompt_template.split("{", 1)[0]
    else:
        literal = common_beginning(list(queries)) if len(queries) > 1 else ""
    return separator + literal.split("\n", 1)[0][:40].rstrip()


def common_beginning(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)
    differing = (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differing, min(len(first), len(last)))]


def _looks_like_labels(examples: Examples) -> bool:
    """Few distinct answers, each seen again: at most half as many as there are rows."""
    answers = examples.answers
    # too few rows to see repeats: answers of one word are labels more often than not
    few = len(answers) <= 8 and all(len(answer.split()) == 1 for answer in answers)
    return few or len(set(answers)) <= len(answers) // 2


def _terminators(tokenizer: PreTrainedTokenizerBase, stop: str, end: int | None) -> tuple[int, ...]:
    """Ids that can follow a finished label: the end of sequence, or the start of what comes after."""
    blanks = stop[: len(stop) - len(stop.lstrip())]
    texts = [stop, (blanks or stop.rstrip()) if stop.strip() else ""]
    ids = {encode_answer(tokenizer, text)[0] for text in texts if text}
    return tuple(sorted(ids if end is None else ids | {end}))
