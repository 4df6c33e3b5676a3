"""The page of an analysed run: the committed analysis beside a made-up comparison, with evil names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.finished_runs import EVIL, write_comparison
from test_html_report import OVERFLOW, PICTURE, Page, contrast

from ia2.report.analysis import analysis_figures, analysis_tables, analysis_verdict, read_analysis
from ia2.report.data import read_run
from ia2.report.page import page
from ia2.utils.errors import RunFolderError
from ia2.utils.files import read_json, write_json

COMMITTED = Path(__file__).parents[2] / "results" / "analysis"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    found: dict[str, Any] = read_json(COMMITTED / "analysis.json")
    # measured apart, on one seed
    found["effects"] = read_json(COMMITTED / "effects" / "analysis.json")["effects"]
    found["data"]["name"] = EVIL
    # tokens that a direction promotes are text of the vocabulary, whatever it holds
    view = next(iter(found["neurons"]["residual"]["views"].values()))
    view["tokens"][0]["promoted"][0]["token"] = EVIL
    return found


@pytest.fixture(scope="module")
def file(result: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysed") / "run"
    write_comparison(folder, evil=True)
    write_json(folder / "analysis.json", result)
    target = folder / "report.html"
    target.write_text(page([read_run(folder)]), encoding="utf-8")
    return target


def test_every_section_has_its_figures_and_sentences(result: dict[str, Any]) -> None:
    names = [figure.name for figure in analysis_figures(result)]
    assert len(set(names)) == len(names)
    for part in (
        "activations-layers", "activations-controls", "lens", "overlap", "heads", "attention", "neurons",
        "common-shift", "causal-heads", "causal-layers", "perplexity", "diversity", "wordings",
    ):  # fmt: skip
        assert part in names
    sentences = analysis_verdict(result)
    for words in ("nearer to ICL", "one constant", "Overlap", "logit lens", "Heads", "Causal", "Perplexity"):
        assert sum(words in line for line in sentences) >= 1, words
    for table in analysis_tables(result):
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_names_stay_text(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    found = Page(text)
    assert found.unclosed == []
    assert EVIL not in text
    assert sum(tag == "script" for tag, _ in found.elements) == 1
    assert all((a["src"] or "").startswith(PICTURE) for a in found.all("img"))
    assert "Inside run" in " ".join(found.inside["h2"])


def test_what_is_no_analysis(tmp_path: Path) -> None:
    assert read_analysis(tmp_path) is None
    write_json(tmp_path / "analysis.json", {"layers": []})
    with pytest.raises(RunFolderError, match=r"analysis\.json: no analysis of"):
        read_analysis(tmp_path)


@pytest.mark.slow
def test_in_a_browser(file: Path) -> None:
    from helpers.browser import browser

    with browser() as window:
        window.size(1280)
        window.open(file)
        assert window.run("return window.hacked === undefined")
        shown = "const r = e.getBoundingClientRect(); return r.width > 100 && r.height > 50"
        drawn = f"return [...document.querySelectorAll('#s1 img')].filter(e => {{ {shown} }}).length"
        assert window.run(drawn) >= 30
        assert window.run("return document.querySelectorAll('#s1 table').length") >= 10
        window.size(390, 800, phone=True)
        window.open(file)
        assert window.run(OVERFLOW) <= 0
        for dark in (False, True):
            window.media(dark=dark)
            for selector in ("#s1 p", "#s1 caption"):
                assert contrast(window, selector) >= 4.5, f"{selector}, dark: {dark}"
        window.media()
        assert window.pdf().startswith(b"%PDF-")
        assert window.messages() == []
