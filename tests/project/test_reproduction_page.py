"""docs/reproduction.md says what the committed cells say."""

from __future__ import annotations

import re

import pytest

from ia2.report.sweep.printing import make_report, overview_lines
from ia2.utils.format import fill
from scripts.reproduction_tables import PAGE, SMALL, TABLES, main, rewritten

BLOCK = re.compile(r"<!-- (table: \w+|said before) -->.*?<!-- end -->", re.DOTALL)
INTERVAL = re.compile(r"[+−][\d.]+ \[[^\]]*\]")


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_cells(page: str) -> None:
    assert rewritten(page) == page, "python scripts/reproduction_tables.py"


def test_a_changed_table_is_noticed(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TABLES, "results", lambda: fill("results", "", [{"another": "1"}]))
    assert main(["--check"]) == 1
    assert "+| another |" in capsys.readouterr().out
    assert PAGE.read_text(encoding="utf-8") == page


def test_a_table_without_its_marks_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="table others is not marked once"):
        rewritten(page.replace("<!-- table: others -->", ""))


def test_every_interval_of_the_text_is_of_the_cells(page: str) -> None:
    """Each difference in a sentence stands in a table of the cells, or in what the overview pools."""
    printed = [path.read_text(encoding="utf-8") for path in sorted((SMALL / "tables").glob("*.md"))]
    printed += [found[0] for found in BLOCK.finditer(page) if found[1].startswith("table")]
    printed += overview_lines(make_report([SMALL]))
    known = set(INTERVAL.findall(" ".join(printed)))
    said = INTERVAL.findall(" ".join(BLOCK.sub("", page).split()).replace(" points [", " ["))
    assert len(said) > 10
    assert [one for one in said if one not in known] == []
