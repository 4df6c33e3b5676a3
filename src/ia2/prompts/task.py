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
    kept_escapes,
    listed,
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
        bad = [[row for row in rows if (row.answer or "") not in self.index] for rows in parts]
        reasons = [
            f"{row.source}: the completion {quoted(row.answer or '')} {self._no_label(row)}"
            for rows in bad
            for row in rows
        ]
        if not reasons:
            return
        shown = names_of(self.labels[:10])
        if len(self.labels) > 10:
            shown += f", … ({len(self.labels)} in all)"
        if len(reasons) == 1:
            joint = " " if reasons[0].endswith("not one of the labels") else ". The labels are "
            raise DataError(flat(f"{reasons[0]}{joint}{shown}."))
        places = [getattr(rows, "name", "rows") for rows, of in zip(parts, bad, strict=True) if of]
        raise DataError(flat(f"{bad_rows(' and '.join(places), reasons)}. The labels are {shown}."))

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

        Args:
            tokenizer: of the model.
            rows: labelled.
            trained: whether they are learnt from.

        Raises:
            DataError: naming the first rows, and how many there are.
        """
        if self.kind == "classification":
            self.check_labels(rows)
            return
        if not (found := unreachable(self, tokenizer, rows, trained=trained)):
            return
        if not trained:
            warn_once(
                f"{len(found)} of {len(rows)} rows to evaluate on count as wrong whatever the model answers: "
                f"{listed(found)}. Mend them, or train with a larger max_answer_tokens or another parser."
            )
            return
        texts = [row.answer for row, _ in found if row.answer and row.answer.strip()]
        longest = max((len(encode_answer(tokenizer, text)) for text in texts), default=0)
        way_out = "Mend or leave out these rows, or choose another separator or parser."
        if longest > self.max_answer_tokens:
            way_out = f"Raise max_answer_tokens to at least {longest}, or mend these rows."
        raise DataError(f"{listed(found)}: such an answer can never be given or matched. {way_out}")

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
    kind = config.task
    load_parser(config.parser)  # unknown ones are refused now, not after the training
    if kind == "auto":
        kind = "classification" if config.labels or _looks_like_labels(examples) else "generation"
    stop = stop_text(examples, config.separator, prompt_template)
    rendering = PromptFormat(tokenizer, config.separator, config.chat, config.thinking)
    end, chat = rendering.end_id, config.chat != "off"
    # without separator and opening literal nothing but the end of sequence ends an answer
    stops = (stop,) if stop and not chat else ()
    stop_tokens = max((len(encode_answer(tokenizer, text, "separator")) for text in stops), default=0)
    if kind == "generation":
        if config.labels:
            raise ConfigError("labels are given, but task is generation. Leave one of them out.")
        limit = config.max_answer_tokens or FREE_TEXT_TOKENS
        logger.info(
            "Task: free-form answers of up to %d tokens, read with the parser '%s'.",
            limit,
            config.parser,
        )
        task = Task(
            "generation",
            max_answer_tokens=limit,
            append_end=None if limit == 1 else end,
            # a chat model ends its turn
            stop_texts=stops,
            parser=config.parser,
            separator=config.separator,
            trimmed=chat,
            stop_tokens=stop_tokens,
        )
        task.check(tokenizer, examples, trained=True)
        task.check(tokenizer, test or (), trained=False)
        return _advised(task, tokenizer, examples, config, prompt_template)
    labels = tuple(sorted(config.labels)) if config.labels else tuple(sorted(set(examples.answers)))
    if len(labels) < 2:
        raise DataError(
            f"{examples.name}: all rows have the completion {labels[0]!r}; at least two labels are needed."
        )
    raw = examples.raw_labels
    names = tuple(raw.get(label, label.strip()) for label in labels)
    check_names(labels, names, examples, bool(config.labels))
    ids = tuple(encode_answer(tokenizer, rendering.as_answer(label)) for label in labels)
    twins = [label for label, count in Counter(ids).items() if count > 1]
    if twins:
        same = [label for label, i in zip(labels, ids, strict=True) if i in twins]
        raise DataError(
            f"the labels {same} are the same tokens to this model. Choose other texts with --label-map."
        )
    longest = max(len(i) for i in ids)
    limit = config.max_answer_tokens or (1 if longest == 1 else longest + _LABEL_SLACK)
    if limit < longest:
        label = labels[max(range(len(ids)), key=lambda j: len(ids[j]))]
        raise DataError(
            f"max_answer_tokens is {limit}, but the label {label!r} has {longest} tokens "
            f"({[decode(tokenizer, [t]) for t in ids[labels.index(label)]]}). Raise it, leave it out, or "
            "choose one-token texts with --label-map."
        )
    several = longest > 1
    task = Task(
        "classification",
        labels=labels,
        label_ids=ids,
        names=names,
        max_answer_tokens=limit,
        append_end=end if several else None,
        terminators=_terminators(tokenizer, stop, end) if _nested(ids) else (),
        stop_texts=stops,
        parser="text",
        separator=config.separator,
        trimmed=chat,
        stop_tokens=stop_tokens,
        index={label: i for i, label in enumerate(labels)},
    )
    task.check_labels(examples, test or ())
    check_label_reach(task, tokenizer)
    shown = ", ".join(repr(label) for label in labels[:8]) + (" …" if len(labels) > 8 else "")
    size = "one token each" if not several else f"up to {longest} tokens, scored by summed log-probability"
    logger.info("Task: %d labels (%s), %s.", len(labels), shown, size)
    return _advised(task, tokenizer, examples, config, prompt_template)


def _advised(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    config: AdaptConfig,
    prompt_template: str | None,
) -> Task:
    """The task with what is unwise about it, which is said in one warning."""
    texts = [prompt_template or "", config.separator, config.context_text or "", *task.labels]
    for columns in ([e.query for e in examples], examples.answers):
        if len(set(columns)) > 1:  # what all have in common comes from a template
            texts += [common_beginning(columns), common_beginning([text[::-1] for text in columns])[::-1]]
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
    if prompt_template is not None:
        literal = prompt_template.split("{", 1)[0]
    else:
        literal = common_beginning([example.query for example in examples])
        if len({example.query for example in examples}) < 2:
            literal = ""
    literal = literal.split("\n", 1)[0][:40].rstrip()
    return separator + literal


def common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return first[:same]


def _looks_like_labels(examples: Examples) -> bool:
    """Few distinct answers, each seen again: at most half as many as there are rows."""
    answers = examples.answers
    distinct = len(set(answers))
    if distinct <= len(answers) // 2:
        return True
    # too few rows to see repeats: answers of one word are labels more often than not
    return len(answers) <= 8 and all(len(answer.split()) == 1 for answer in answers)


def _nested(ids: Sequence[Ids]) -> bool:
    """Whether one label's ids begin another's; the shorter would win by its length alone."""
    return any(a != b and b[: len(a)] == a for a in ids for b in ids)


def _terminators(tokenizer: PreTrainedTokenizerBase, stop: str, end: int | None) -> tuple[int, ...]:
    """Ids that can follow a finished label: the end of sequence, or the start of what comes after."""
    found = {encode_answer(tokenizer, stop)[0]} if stop else set()
    if stripped := stop.rstrip():
        found.add(encode_answer(tokenizer, stop[: len(stop) - len(stripped.lstrip())] or stripped)[0])
    if end is not None:
        found.add(end)
    return tuple(sorted(found))
