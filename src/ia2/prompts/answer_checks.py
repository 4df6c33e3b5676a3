"""What is wrong with labels, prompts and answers before anything is trained, and what is merely unwise.

Refused: labels of one name, and answers that evaluation can neither produce nor match, since results would
be wrong in silence. Said once: labels that nearly match, and texts that a model hardly ever reads.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from ia2.data.answers import CHARACTERS, exact_match, load_parser
from ia2.models.generation import cut_answer
from ia2.models.tokens import Ids, encode_prompt, encode_texts
from ia2.utils.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia2.data.examples import Example, Examples
    from ia2.prompts.task import Task

Advice = tuple[str, str, str]
"""What is unwise, the evidence, and the way out, in words."""

_SHOWN = 5
# Letters of other scripts that look like Latin ones; case is folded afterwards.
_LATIN_TWINS = str.maketrans(
    "АВЕКМНОРСТУХІЈЅаеорсухіјѕΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABEKMHOPCTYXIJSaeopcyxijsABEZHIKMNOPTYXo"
)
# From here on scripts write words without blanks, or are so rare in prompts that nobody knows.
_LAST_SPACED_SCRIPT = "\u06ff"


def near_key(text: str) -> str:
    """The same for texts that differ by case, blanks, invisible or look-alike characters only."""
    plain = unicodedata.normalize("NFKC", text).translate(CHARACTERS).translate(_LATIN_TWINS).casefold()
    return "".join(c for c in plain if not (c.isspace() or unicodedata.category(c) == "Cf" or c == "\ufe0f"))


def _value(text: str) -> str:
    """The key of a text, the same for ``1``, ``01`` and ``1.0``, which columns of mixed types hold."""
    key = near_key(text)
    try:
        return str(Decimal(key).normalize())
    except InvalidOperation:
        return key


def _alike(labels: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    """Labels of one key, where there are several."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(key(label), []).append(label)
    return {of: group for of, group in groups.items() if len(group) > 1}


def first_few(items: Sequence[str], more: str = "more") -> str:
    """The first items, and how many others there are."""
    rest = [f"and {len(items) - _SHOWN} {more}"] if len(items) > _SHOWN else []
    return "; ".join([*items[:_SHOWN], *rest])


# ------------------------------------------------------------------------------------------- labels


def check_names(labels: Sequence[str], names: Sequence[Any], examples: Examples, given: bool) -> None:
    """Names are the keys of probabilities, columns and tables: each must stand for one label.

    Args:
        labels: as the model writes them.
        names: what users call each.
        examples: the labelled rows.
        given: the setting ``labels`` names them; they are not read off the rows.

    Raises:
        DataError: labels that differ by blanks at their ends only, or that have one name.
    """
    called = dict(zip(labels, map(str, names), strict=True))
    by_blanks, by_name = _alike(labels, str.strip), _alike(labels, called.__getitem__)
    if not by_blanks and not by_name:
        return
    same = next(la for la in labels if la.strip() in by_blanks or called[la] in by_name)
    alike = [la for la in labels if la.strip() == same.strip() or called[la] == called[same]]
    rows = {row.answer: f" ({row.source})" for row in reversed(examples)}
    shown = " and ".join(f"{label!r}{rows.get(label, '')}" for label in alike)
    why = "differ by blanks only" if same.strip() in by_blanks else f"would both be called {called[same]!r}"
    way_out = "write them alike in the rows, or give both one text with --label-map"
    if given:
        way_out = "leave one of them out of labels, and write completions as the other"
    elif all(e.fields.get("completion") == e.answer for e in examples) and len(labels) <= 8:
        counts = Counter(examples.answers)
        one = {key: max(group, key=lambda la: (counts[la], la)) for key, group in by_blanks.items()}
        written = json.dumps({label: one.get(label.strip(), label) for label in labels})
        way_out = f"write them alike in the rows, or give --label-map {shlex.quote(written)}"
    raise DataError(f"the labels {shown} {why}: {way_out}.")


def check_label_reach(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse labels that the model cannot write, or that cannot be told from the beginning of others.

    Raises:
        DataError: a label that holds a stop text or a special token, or goes on after another one with
            what ends an answer.
    """
    labels = list(zip(task.labels, task.label_ids, strict=True))
    reasons = [(label, _not_written(task, tokenizer, label, ids, len(ids))) for label, ids in labels]
    problems = [f"the label {label!r} {reason}" for label, reason in reasons if reason]
    for short, a in labels:
        for long, b in labels:
            if len(a) < len(b) and b[: len(a)] == a and b[len(a)] in task.terminators:
                problems.append(f"the label {long!r} goes on after {short!r} with what ends an answer")
    if problems:
        raise DataError(
            f"{first_few(problems)}: no answer can be read as such a label. Choose other texts in the rows "
            "or with --label-map."
        )


def near_labels(labels: Sequence[str], names: Sequence[Any]) -> list[Advice]:
    """Labels that differ by what is easily overlooked, or end in a blank."""
    alike = _alike(labels, _value)
    others = [str(name) for label, name in zip(labels, names, strict=True) if _value(label) not in alike]
    advice: list[Advice] = []
    if groups := [*alike.values(), *_alike(others, _value).values()]:
        advice.append(
            (
                "Some labels differ only by case, blanks, invisible or look-alike characters, or as numbers "
                "are written",
                first_few([", ".join(map(_with_escapes, group)) for group in groups]),
                "if they mean the same, write them alike in the rows or give them one text with --label-map",
            )
        )
    if ending := [label for label in labels if label.endswith(" ")]:
        advice.append(
            (
                "Some labels end in a blank, which the model has to predict too",
                ", ".join(map(repr, ending[:_SHOWN])),
                "leave the blank out in the rows, --completion-template, --labels or --label-map",
            )
        )
    return advice


def _with_escapes(text: str) -> str:
    return repr(text) if text.isascii() else f"{text!r} ({text!a})"


# ----------------------------------------------------------------------------- prompt and answer


def unlikely_joints(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> list[Advice]:
    """Prompts and answers that meet as texts hardly ever do: ``Label: `` + `` positive``."""
    bad: list[Example] = []
    judged: dict[tuple[str, str], tuple[str, str] | None] = {}
    for row in rows:
        # only what is near the joint matters
        query, answer = row.query[-40:], (row.answer or "")[:40]
        if (query[-3:], answer) not in judged:
            judged[query[-3:], answer] = _better_joint(tokenizer, query, answer)
        if judged[query[-3:], answer] is not None:
            bad.append(row)
    if not bad:
        return []
    query, answer = bad[0].query[-40:], (bad[0].answer or "")[:40]
    stem, body = judged[query[-3:], answer] or ("", "")
    more = f" and {len(bad) - 1} more rows" if len(bad) > 1 else ""
    return [
        (
            "Prompt and answer meet as texts hardly ever do",
            f"{query[-12:]!r} + {answer[:24]!r} ({bad[0].source}{more})",
            f"write {stem[-12:]!r} + {body[:24]!r} in the rows, or with --prompt-template, "
            "--completion-template and --label-map",
        )
    ]


def _better_joint(tokenizer: PreTrainedTokenizerBase, query: str, answer: str) -> tuple[str, str] | None:
    """End of the prompt and beginning of the answer as they should be; None where they are."""
    stem, body = query.rstrip(" \u00a0"), answer.lstrip(" \u00a0")
    if not stem or not body:
        return None
    gap = len(query) - len(stem) + len(answer) - len(body)
    # a word follows a word or a colon behind a blank; quotes, brackets, digits and other scripts need none
    word = body[0].isalpha() and body[0] <= _LAST_SPACED_SCRIPT
    spaced = word and stem[-1] <= _LAST_SPACED_SCRIPT and (stem[-1].isalnum() or stem[-1] in ":;,.?!")
    line = "\n" in (stem[-1], body[0])
    better = (stem, body if line or not (gap or spaced) else f" {body}")
    if spaced and not line and query == stem and gap < 2:
        # some tokenizers put a blank before every text, or drop them all
        whole, before = encode_prompt(tokenizer, f"{stem} {body}"), encode_prompt(tokenizer, stem)
        if whole == before + encode_texts(tokenizer, [answer])[0]:
            return None
        if whole == before + encode_texts(tokenizer, [body])[0]:
            better = (stem, body)
    return None if better == (query, answer) else better


def kept_escapes(texts: Iterable[str]) -> list[Advice]:
    r"""Texts of templates with a backslash and an ``n`` where a line break must be meant.

    The command line reads ``\n`` and ``\t`` in a text as line break and tab; YAML does so between double
    quotes only.
    """
    bad = [" ".join(text.splitlines()) for text in dict.fromkeys(texts) if re.search(r"\\[nt]", text)]
    if not bad:
        return []
    shown = ", ".join(text if len(text) < 60 else f"{text[:30]} … {text[-30:]}" for text in bad[:3])
    return [
        (
            r"Prompts or answers hold a backslash with an n or a t, not a line break or a tab",
            shown,
            "in YAML write the text between double quotes, in Python without the prefix r",
        )
    ]


# ------------------------------------------------------------------------------------- free answers


def unreachable(
    task: Task, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Example], *, trained: bool
) -> list[tuple[Example, str]]:
    """Free-form answers that the model cannot write, or that would not match when it wrote them, and why.

    Each answer is treated as if the model had generated just its ids: cut at the end of sequence, the stop
    text and the limit, then read by the parser and compared with itself. Of rows that are not ``trained`` on
    it is enough that what the parser reads can be written.
    """
    parse = load_parser(task.parser)
    found = []
    for row in rows:
        text = (row.answer or "").lstrip() if task.trimmed else row.answer or ""
        (ids,) = encode_texts(tokenizer, [text])
        # reasoning may be shorter than that of the row; an answer that is compared whole may not
        limited = trained or task.parser == "text"
        limit = task.max_answer_tokens if limited else max(task.max_answer_tokens, len(ids))
        reason = _not_written(task, tokenizer, text, ids, limit)
        if reason is None or not trained:
            written, wanted = parse(_written(task, tokenizer, ids, limit)), parse(text)
            if exact_match(written, wanted):
                reason = None
            elif not exact_match(wanted, wanted):
                reason = f"holds nothing that the parser '{task.parser}' reads as an answer"
            else:
                reason = reason or f"is read as {written!r}, not {wanted!r}, once the model has written it"
        if reason is not None:
            found.append((row, reason))
    return found


def _not_written(
    task: Task, tokenizer: PreTrainedTokenizerBase, text: str, ids: Ids, limit: int
) -> str | None:
    """Why a model that is as right as can be would not write this text; None where it would."""
    if not text.strip() or not ids:
        return "is empty"
    if len(ids) > limit:
        return f"has {len(ids)} tokens, max_answer_tokens is {limit}"
    if stop := next((stop for stop in task.stop_texts if stop in text), None):
        return f"holds {stop!r}, the text that ends an answer"
    special = [i for i in ids if i in tokenizer.all_special_ids and i != tokenizer.unk_token_id]
    if special:
        return f"holds {tokenizer.convert_ids_to_tokens(special[0])!r}, a special token of the model"
    written = _written(task, tokenizer, ids, limit)
    if near_key(written) != near_key(text):
        return f"is {written!r} once it has been through the model's tokenizer"
    return None


def _written(task: Task, tokenizer: PreTrainedTokenizerBase, ids: Ids, limit: int) -> str:
    """Text of the answer if the model generates these ids."""
    ends = [i for i in (tokenizer.eos_token_id, task.append_end) if i is not None]
    return cut_answer(tokenizer, ids, ends, task.stop_texts, limit).text
