"""A chat template is a program that comes with a model: what it may use up is bounded, however it fails."""

from __future__ import annotations

import pytest
from helpers.words import make_word_tokenizer

from ia2.prompts import templates
from ia2.utils.errors import DataError

TOO_MUCH = {
    "repeated": "{{ 'a' * 10**10 }}",
    "padded": "{{ 'a'|center(10**10) }}",
    "formatted": "{{ '%10000000000d' % 1 }}",
    "doubled": "{% set n=namespace(x=1) %}{% for i in range(60) %}{% set n.x=n.x~n.x %}{% endfor %}{{ n.x }}",
    "list": "{{ (range(99999)|list) * 99999 }}",
    "replaced": "{{ 'a'|replace('', 'a' * 10**6)|replace('a', 'a' * 10**6) }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "texts": "{% for a in range(99999) %}{% for b in range(99999) %}aaaa{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "long": "{% for a in range(2000) %}{{ 'a' * 1000 }}{% endfor %}",
}
FAILS = {
    "raises": ("{{ raise_exception('no \x1b[31m\n' ~ messages[0].content) }}", "no"),
    "endless": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
    "zero": ("{{ 1 / 0 }}", "division by zero"),
    "attribute": ("{{ messages.a.b }}", "attribute"),
    "index": ("{{ messages[7].content.a }}", "no element 7"),
    "broken": ("{{", "unexpected"),
    "escape": ("{{ joiner.__init__.__globals__.os.system('true') }}", "unsafe"),
    "include": ("{% include '/etc/passwd' %}", "loader"),
    "huge message": ("{{ raise_exception('a' * 10**7) }}", "aaa"),
}


@pytest.mark.parametrize("name", list(TOO_MUCH))
def test_a_template_that_takes_too_much(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_SECONDS", 0.5)
    tokenizer = make_word_tokenizer()
    tokenizer.chat_template = TOO_MUCH[name]
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(DataError, match=r"chat template (makes too much|takes more than)") as error:
        templates.apply_template(tokenizer, [{"role": "user", "content": "a"}], "row 1")
    assert len(str(error.value)) < 400
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("name", list(FAILS))
def test_a_template_that_fails(name: str) -> None:
    template, expected = FAILS[name]
    tokenizer = make_word_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"refuses the messages \(user\)") as error:
        templates.apply_template(tokenizer, [{"role": "user", "content": "a"}], "row 1")
    assert expected in str(error.value)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_a_template_may_write_long_messages() -> None:
    tokenizer = make_word_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ messages[0].content }}"
    text = "good " * 500_000
    assert templates.apply_template(tokenizer, [{"role": "user", "content": text}], "row 1") == text * 2
