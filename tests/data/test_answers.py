"""Parsers of free-form answers and the comparison of answers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ia2.data.answers import PARSERS, exact_match, load_parser
from ia2.utils.errors import ConfigError

PARSED: list[tuple[str, str, str | None]] = [
    # text, first-line
    ("text", "  an  adult\n\tmammal ", "an adult mammal"),
    ("text", "", None),
    ("first-line", "\n\n  oxidants \nQuestion: what next?", "oxidants"),
    ("first-line", "\r\noxidants\r\nmore", "oxidants"),
    # last-number
    ("last-number", "She makes 9 * 2 = $<<9*2=18>>18 every day.", "18"),
    ("last-number", "a profit of 200,000-130,000=$<<200000-130000=70000>>70,000", "70000"),
    ("last-number", "It costs $1,234,567.89.", "1234567.89"),
    ("last-number", "It fell to -12 degrees", "-12"),
    ("last-number", "The account shows -$5", "-5"),
    ("last-number", "5-3", "3"),
    ("last-number", "(5)-3", "3"),
    ("last-number", "$5 - $3", "3"),
    ("last-number", "5\n-3", "-3"),
    ("last-number", "it gives $x=-4$", "-4"),
    ("last-number", "so x = -3.50.", "-3.50"),
    ("last-number", "about .5", ".5"),
    ("last-number", r"exactly $50\%$", "50"),
    ("last-number", "we need 3/4 of a cup", "3/4"),
    ("last-number", "we need 1 1/2 cups", "1 1/2"),
    ("last-number", r"we need \dfrac{3}{4} of it", "3/4"),
    ("last-number", r"so \$15,\!000 in all", "15000"),
    ("last-number", "1,2,3", "3"),
    ("last-number", "there are 12 molecules of H2O", "12"),
    ("last-number", "light travels 3e8 m", "3e8"),
    ("last-number", "no numbers", None),
    # hash
    ("hash", "It takes 2/2=<<2/2=1>>1 bolt\n#### 3", "3"),
    ("hash", "#### 3\nNo, wait.\n#### 4", "4"),
    ("hash", "#### 18\n\nQuestion: how many ducks?", "18"),
    ("hash", "reason\n####\n18", "18"),
    ("hash", "#### beta decay.", "beta decay."),
    ("hash", "We add. The answer is 18.", "18"),
    ("hash", "The answer is 3.5. That is all.", "3.5"),
    ("hash", "THE ANSWER IS: $18 per day!", "$18 per day"),
    ("hash", "The answer is 5. No: the answer is 6.", "6"),
    ("hash", "The sum of 2 and 3 makes 5", "5"),
    ("hash", "### 5 is a heading", "5"),
    ("hash", "I do not know", None),
    # boxed
    ("boxed", r"so $\boxed{2}$ is it", "2"),
    ("boxed", r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
    ("boxed", r"\boxed{1}, no: \boxed{2}", "2"),
    ("boxed", r"\boxed{1} and \fbox{7}", "7"),
    ("boxed", r"\boxed{\boxed{5}}", "5"),
    ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    ("boxed", r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    ("boxed", r"\boxed 5$", "5"),
    ("boxed", r"\boxed{3} and then \boxed{12", "3"),
    ("boxed", r"\boxed{}", None),
    ("boxed", r"\boxed{} so the answer is 4.", "4"),
    ("boxed", r"} \boxed{3} {", "3"),
    ("boxed", r"\boxedtext{3}", None),
    ("boxed", "The answer is $x^2$.", "$x^2$"),
    ("boxed", "It is 5", None),
    # what models and data sets write
    ("last-number", "3 1/2 or 7/2", "7/2"),
    ("last-number", "from 5%–10%", "10"),
    ("last-number", "½ of it", None),
    ("hash", "She has 3 + 4 = <<3+4=7>>7 pens.\n#### 7\n", "7"),
    ("hash", "#### $65,000", "$65,000"),
    ("hash", "#### 7 apples", "7 apples"),
    ("hash", "So the final answer is 12.5 hours.", "12.5 hours"),
    ("hash", "The answer isn't 5. It makes 6", "6"),
    ("hash", "#### ", None),
    ("boxed", r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
    ("boxed", r"\boxed{(-\infty, 2) \cup (3, \infty)}", r"(-\infty, 2) \cup (3, \infty)"),
    ("boxed", r"\boxed{x^{2}+{y^{2}}}", "x^{2}+{y^{2}}"),
    ("boxed", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("boxed", r"\framebox{3}", None),
]

SAME: list[tuple[str, str]] = [
    ("18", "18"),
    ("$18", "18"),
    (r"\$18", "18"),
    ("$1,234.00", "1234"),
    (r"\$15,\!000", "15000"),
    (r"\$ 1,657", "1657"),
    ("15{,}000", "15000"),
    ("3.0", "3"),
    (".5", "0.5"),
    ("-0", "0"),
    ("007", "7"),
    ("12345678901234567890123456789012345.0", "12345678901234567890123456789012345"),
    ("Beta Decay", "beta  decay."),
    ("Newton’s law", "newton's law"),
    ("**oxidants**", "oxidants"),
    ('"oxidants"', "oxidants"),
    ("co - op", "co-op"),
    ("about 1,000 people", "about 1000 people"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\frac12", r"\frac{1}{2}"),
    ("1/2", r"\frac{1}{2}"),
    ("-3/4", r"-\dfrac{3}{4}"),
    (r"\sqrt 2", r"\sqrt{2}"),
    (r"\left(1,\frac{9}{2}\right)", r"( 1, \frac{9}{2} )"),
    (r"(-\infty, -7)\cup(-7, 3)", r"(-\infty,-7) \cup (-7,3)"),
    ("$x + 1$", "x+1"),
    (r"\(x + 1\)", "x+1"),
    ("x = 5", "5"),
    ("44%", "44"),
    (r"20 \%", "20%"),
    ("50 percent", r"50\%"),
    (r"90^{\circ}", "90 degrees"),
    ("90°", r"90^\circ"),
    (r"81\text{ teachers}", "81"),
    (r"\frac{68}{3}\text{ pounds}", r"\frac{68}{3}"),
    (r"440\text{ cm}^2", "440"),
    (r"0.4\mbox{ miles}", "0.4"),
    ("18 dollars per day", "18"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"9\text{ a.m.}", "9 a.m."),
    (r"6, 8\text{, and }10", "6, 8, and 10"),
    ("$", "$"),
]

DIFFERENT: list[tuple[str | None, str | None]] = [
    (None, "18"),
    ("18", None),
    (None, None),
    ("18", "-18"),
    ("3.0", "30"),
    ("0.5", r"\frac{1}{2}"),
    ("1 1/2", "11/2"),
    ("2,3", "23"),
    ("(1,000)", "(1000)"),
    ("(2,300)", "2300"),
    ("5x", "5"),
    (r"5\pi", "5"),
    ("5 million", "5"),
    ("5 is wrong", "5"),
    ("5 cm", "5 km"),
    (r"440\text{ cm}^2", r"440\text{ cm}^3"),
    ("9 a.m.", "9 p.m."),
    ("x = 5", "y = 5"),
    ("x = 5", "x = 5 = y"),
    (r"\leftarrow", "arrow"),
    ("f'", "f"),
    ("12345678901234567890123456789012345", "12345678901234567890123456789012346"),
    ("carbon dioxide", "carbondioxide"),
    ("1.2.3", "1.2.30"),
    ("$", "€"),
]


@pytest.mark.parametrize(("parser", "text", "answer"), PARSED)
def test_parsers(parser: str, text: str, answer: str | None) -> None:
    assert load_parser(parser)(text) == answer


@pytest.mark.parametrize(("left", "right"), SAME)
def test_same(left: str, right: str) -> None:
    assert exact_match(left, right) and exact_match(right, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different(left: str | None, right: str | None) -> None:
    assert not exact_match(left, right) and not exact_match(right, left)


@given(st.text() | st.text(alphabet="\\{}$#box frac1230.,-/% \n"))
def test_any_text(text: str) -> None:
    for name in PARSERS:
        answer = PARSERS[name](text)
        assert answer is None or answer.strip()
    assert exact_match(text, text) == bool(text.strip())


LONG = [
    *(r"\boxed{" * 20_000, "1 " * 50_000, "9" * 50_000, "1,111" * 20_000, "answer is " * 20_000),
    *("answer is\n" * 20_000 + ".", "answer is. " * 20_000, "-" * 50_000, r"\text{" * 20_000),
    *("5" + " " * 50_000 + "-", "5 " + "ab " * 30_000 + "1", "1" + "}" * 30_000, "#" * 50_000),
    *("a=" + "b=" * 30_000, "5 " + "a " * 30_000, "{" * 50_000, " " * 100_000 + "x", "x=" * 30_000),
]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_long_texts_take_linear_time(text: str) -> None:
    start = time.perf_counter()
    for name in PARSERS:
        PARSERS[name](text)
    exact_match(text, text)
    assert time.perf_counter() - start < 3


def test_load_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(load_parser(name) is parser for name, parser in PARSERS.items())
    assert load_parser("string:capwords")("a b") == "A B"
    (tmp_path / "my_parsers.py").write_text("def empty(text): return ''\ndef count(text): return len(text)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_parser("my_parsers:empty")("ab") is None
    with pytest.raises(ConfigError, match=r"my_parsers:count.* returned int"):
        load_parser("my_parsers:count")("ab")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("boxd", "Did you mean 'boxed'"),
        ("nothing-like-it", "first-line"),
        ("", "Known: text"),
        (":f", "import path"),
        ("string:", "import path"),
        ("no_such_module_here:f", "PYTHONPATH"),
        (".relative:f", "cannot import"),
        ("string:capword", "Did you mean 'capwords'"),
        ("string:digits", "no function 'digits'"),
    ],
)
def test_load_parser_errors(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"(?i)answer parser") as error:
        load_parser(spec)
    assert message in str(error.value)
