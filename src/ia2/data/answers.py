r"""Answers of several tokens: find the answer in a generated text, compare it with the gold one.

A *parser* turns a generated text into its answer, or None where there is none (which counts as
wrong). :func:`exact_match` compares two answers after normalisation. Both work on text only: nothing is
evaluated, so ``\frac{1}{2}`` is not 0.5. The LaTeX rules follow Hendrycks et al. 2021 (MATH), the
``####`` mark Cobbe et al. 2021 (GSM8K).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ia2.utils.errors import ConfigError, suggest
from ia2.utils.imports import load_function

Parser = Callable[[str], "str | None"]

CHARACTERS = str.maketrans("−‐‑–’‘“”⁄", "----''\"\"/", "\u200b\ufeff")
"""Signs that look alike but differ in code, and those that cannot be seen."""


# --- parsers -----------------------------------------------------------------------------------


def parse_text(text: str) -> str | None:
    """The whole text, stripped, with every run of white space as one space."""
    return " ".join(text.split()) or None


def parse_first_line(text: str) -> str | None:
    """The first line that is not blank."""
    return next((line for line in map(parse_text, text.splitlines()) if line), None)


_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_NUMBER = re.compile(
    # Digits inside a word (H2O) or after a decimal point are no number of their own.
    r"(?<![0-9A-Za-z_.])"
    r"(?:[0-9]+ [0-9]+/[0-9]+"  # 1 1/2
    r"|[0-9]+/[0-9]+"
    r"|(?:[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
    r"|\.[0-9]+)"
)


def parse_last_number(text: str) -> str | None:
    r"""The last number, without currency, percent sign and thousands commas.

    Knows negative numbers, decimals (``.5`` too), exponents, fractions (``3/4``, ``1 1/2``,
    ``\frac{3}{4}``) and thousands (``1,234``; in ``1,2,3`` the last number is 3). A minus between
    two numbers is a subtraction. Digits inside a word, as in H2O, do not count.
    """
    text = _LATEX_FRACTION.sub(r"\1/\2", text.translate(CHARACTERS))
    # LaTeX's thousands: 15,\!000 and 15{,}000.
    text = text.replace(",\\!", ",").replace("{,}", ",")
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    sign = "-" if _ends_in_sign(text[: last.start()]) else ""
    return sign + last.group().replace(",", "")


def _ends_in_sign(before: str) -> bool:
    """Whether the text before a number ends in its minus sign, and not in a subtraction."""
    head = before.rstrip("$\\ ")
    if not head.endswith("-"):
        return False
    left = head[:-1]
    operand = left.rstrip("$\\ ")[-1:]
    if operand.isalpha():  # "fell to -12" has a sign; "x-12" and "x - 12" do not
        return left.endswith((" ", "$")) and not before.endswith(" ")
    return not (operand.isdigit() or operand in tuple(")]}%-"))


def parse_hash(text: str) -> str | None:
    """The line after the last ``####``; without one "The answer is …", then the last number."""
    *before, after = re.split("#{4,}", text)
    answer = parse_first_line(after) if before else None
    return answer or _the_answer_is(text) or parse_last_number(text)


_ANSWER_IS = re.compile(r"\banswer\s+is\b\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def _the_answer_is(text: str) -> str | None:
    """What follows the last "the answer is", to the end of its sentence or line."""
    for after in reversed(_ANSWER_IS.split(text)[1:]):
        line = parse_first_line(after.split("\n", maxsplit=1)[0])
        if line and (answer := _SENTENCE_END.split(line, maxsplit=1)[0].strip()):
            return answer
    return None


_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?P<open>\{)?|\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"\s*([^\s${}\\]+)")


def parse_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{…}`` or ``\fbox{…}``; else "The answer is …".

    Braces may nest, a box in a box counts as the last, and ``\boxed 5`` is understood.
    """
    best_start, best = -1, ""  # of the box that opens last; one pass, so linear in time
    stack: list[tuple[bool, int]] = []
    for token in _BOX_TOKENS.finditer(text):
        mark = token.group()
        if _BOX.match(mark):
            if token["open"]:
                stack.append((True, token.end()))
            elif bare := _UNBRACED.match(text, token.end()):
                best_start, best = token.end(), bare[1].rstrip(".,;:")
        elif mark == "{":
            stack.append((False, token.end()))
        elif mark == "}" and stack:
            is_box, start = stack.pop()
            if is_box and start > best_start:
                best_start, best = start, text[start : token.start()]
    return parse_text(best) or _the_answer_is(text)


PARSERS: dict[str, Parser] = {
    "text": parse_text,
    "first-line": parse_first_line,
    "last-number": parse_last_number,
    "hash": parse_hash,
    "boxed": parse_boxed,
}


def load_parser(spec: str) -> Parser:
    """A parser by its name in `PARSERS`, or by its import path ``package.module:function``.

    Raises:
        ConfigError: the name is unknown, the module does not import, or it has no such function. The
            parser of an import path raises it where it returns neither text nor None.
    """
    if spec in PARSERS:
        return PARSERS[spec]
    if ":" not in spec:
        raise ConfigError(
            f"Unknown answer parser '{spec}'.{suggest(spec, list(PARSERS))} "
            f"Known: {', '.join(PARSERS)}, or an import path 'package.module:function'."
        )
    function = load_function(spec, "Answer parser")

    def parse(text: str) -> str | None:
        answer: Any = function(text)
        if answer is not None and not isinstance(answer, str):
            raise ConfigError(
                f"Answer parser '{spec}' returned {type(answer).__name__}: it must return the answer as "
                "text, or None where there is none."
            )
        return answer or None

    return parse


# --- comparison --------------------------------------------------------------------------------

# Applied in this order; all to lower-case text.
_CLEANED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\[,!]", ""),
        (r"\{,\}", ","),
        (r"(?<!\\)\\(?:[ ;:]|quad\b|qquad\b)|(?<!\\)~", " "),
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"\\\$", ""),
        (r"[$£€]", ""),
        (r"\\(?:left|right|bigl|bigr|big|displaystyle)(?![a-z])", ""),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\frac\s*([0-9a-z])\s*([0-9a-z])(?![a-z])", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*([0-9a-z])(?![a-z])", r"\\sqrt{\1}"),
        (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z])|\bdegrees?\b|\\degree\b", "°"),
    )
)
_SLASH_FRACTION = re.compile(r"(-?)([0-9]+)\s*/\s*([0-9]+)")
_TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_PLAIN_NUMBER = re.compile(r"(?<![0-9.])(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?!\.?[0-9])")
_ASSIGNMENT = re.compile(r"([a-z])\s*=\s*(?=[^=])(?!.*=)(.+)", re.DOTALL)
_NUMERAL = r"[-+]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+|[0-9]+\s*/\s*[0-9]+|\\frac\{[0-9]+\}\{[0-9]+\})"
_PLAIN_UNIT = re.compile(
    rf"({_NUMERAL})\s+([a-z][a-z'\-./]+(?: [a-z][a-z'\-./]+){{0,3}}(?:\^?\{{?[23]\}}?)?)"
)
_LATEX_UNIT = re.compile(
    r"(.*[0-9})\]])\s*\\(?:text|textrm|mbox|mathrm)\s*\{([^{}]*)\}\s*((?:\^\s*\{?[23]\}?)?)",
    re.DOTALL,
)
_SIGN_UNIT = re.compile(r"(.*[0-9})\]])\s*(\\?%|percent|°\s*[cfk]?)", re.DOTALL)
# Words behind a number that change it or begin a sentence: "5 million", "2 or more", "3 is wrong".
# fmt: off
_NOT_UNITS = {
    "and", "or", "not", "no", "to", "is", "was", "are", "were", "if", "but", "so", "than", "then",
    "plus", "minus", "over", "more", "less", "half", "hundred", "thousand", "million", "billion",
    "trillion", "dozen", "times", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod",
    "am", "pm", "a.m", "p.m", "a.m.", "p.m.",
}
# fmt: on


class _Answer(NamedTuple):
    """A normalised answer: ``x = 5 cm`` is value ``5``, unit ``cm``, variable ``x``."""

    value: str
    unit: str
    variable: str


def exact_match(predicted: str | None, gold: str | None) -> bool:
    r"""Whether two answers are the same after normalisation; None never matches.

    Ignored: case, white space except between words, a final period, currency signs, thousands
    commas (``1,000``, not those in ``(1,000)``, which may be a point), trailing zeros (``3.0`` is
    3), quotes or ``*`` around the whole, math marks, ``\left`` and ``\right``, the size of
    fractions (``\dfrac``), spacing commands, and ``a/b`` for ``\frac{a}{b}``. A unit
    (``5\text{ cm}``, ``5 cm``, ``50\%``, ``90^\circ``) or a variable (``x = 5``) may be missing
    on one side; two different ones are no match. Nothing is evaluated: ``\frac{1}{2}`` is not 0.5.
    """
    if predicted is None or gold is None or not predicted.strip() or not gold.strip():
        return False
    left, right = _split(predicted), _split(gold)
    return (
        left.value == right.value
        and (left.unit == right.unit or not left.unit or not right.unit)
        and (left.variable == right.variable or not left.variable or not right.variable)
    )


def _split(answer: str) -> _Answer:
    text = " ".join(answer.translate(CHARACTERS).casefold().split())
    for pattern, replacement in _CLEANED:
        text = pattern.sub(replacement, text)
    text = _strip_ends(text)
    variable = ""
    if match := _ASSIGNMENT.fullmatch(text):
        variable, text = match.groups()
    text, unit = _split_unit(text)
    value = _canonical(text)
    if not value:  # nothing but marks: compare them as they are
        return _Answer(" ".join(answer.split()), "", "")
    return _Answer(value, unit, variable)


def _strip_ends(text: str) -> str:
    previous = None
    while previous != text:
        previous = text
        text = text.strip().rstrip(".")
        # Marks count only in pairs: the prime of f' is no quote.
        if len(text) > 2 and text[0] == text[-1] and text[0] in "*\"'`":
            text = text[1:-1]
    return text


def _split_unit(text: str) -> tuple[str, str]:
    if match := _SIGN_UNIT.fullmatch(text):
        value, unit = match[1], match[2].replace("\\", "").replace(" ", "")
        return value, "%" if unit == "percent" else unit
    if (match := _LATEX_UNIT.fullmatch(text)) and _is_unit(match[2]):
        return match[1], " ".join(match[2].split()).rstrip(".") + _power(match[3])
    if (match := _PLAIN_UNIT.fullmatch(text)) and _is_unit(match[2]):
        words = re.fullmatch(r"(.*?)(\^?\{?[23]\}?)?", match[2])
        return match[1], (words[1] + _power(words[2] or "")) if words else match[2]
    return text, ""


def _is_unit(text: str) -> bool:
    words = text.split()
    return bool(words) and "," not in text and not _NOT_UNITS.intersection(words)


def _power(text: str) -> str:
    digits = text.strip("^{} ")
    return f"^{digits}" if digits else ""


def _canonical(text: str) -> str:
    text = " ".join(_TEXT.sub(r"\1", text).split())
    if not any(bracket in text for bracket in "([{"):
        # Inside brackets a comma separates: (1,000) may be a point or an interval.
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if match := _SLASH_FRACTION.fullmatch(text.strip()):
        text = f"{match[1]}\\frac{{{match[2]}}}{{{match[3]}}}"
    # A space matters only between words, or between two numbers.
    text = re.sub(r" *([^\w ]) *", r"\1", text)
    text = re.sub(r"(?<=[0-9]) (?=[a-z](?![a-z]))", "", text)
    text = _PLAIN_NUMBER.sub(lambda match: _plain(match[0]), _strip_ends(text))
    text = re.sub(r"(?<![\w)}\]])\+(?=[0-9\\])", "", text)
    return "0" if text == "-0" else text


def _plain(number: str) -> str:
    """``007.50`` as ``7.5``; on text, since floats and decimals would round long numbers."""
    whole, _, decimals = number.partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
