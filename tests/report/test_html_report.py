"""The HTML page of runs: what it holds, that it is inert and accessible, and the command that writes it."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers.command_line import run
from helpers.finished_runs import EVIL, SKILL, write_comparison, write_curve, write_training
from helpers.sweep_records import record, rows, write_sweep

from ia2.report import page as html
from ia2.report.data import read_run
from ia2.report.doctor import diagnosis
from ia2.report.doctor.rules import Finding
from ia2.report.figures.comparison_figures import cost_figure, frontier
from ia2.report.figures.run_figures import run_figures, wilson
from ia2.report.page import page
from ia2.report.tables import INTERVALS
from ia2.report.verdict import comparison_verdict, curve_verdict
from ia2.utils.errors import RunFolderError
from ia2.utils.files import read_json, write_json

PICTURE = "data:image/svg+xml;base64,"
# elements without an end tag
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text inside each kind."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.unclosed: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.inside.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        last = self._open.pop()
        if last != tag:
            self.unclosed.append(f"{last} before {tag}")

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.inside[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    write_comparison(folder)
    return folder


@pytest.fixture(scope="module")
def text(comparison: Path) -> str:
    return page([read_run(comparison)])


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page on rows, names and labels that are markup."""
    folder = tmp_path_factory.mktemp("evil")
    write_comparison(folder / "a<b>&", evil=True)
    return html.write_report([read_run(folder / "a<b>&")], None, folder / "report.html")


# ------------------------------------------------------------------------------------------ structure


def test_everything_is_there(text: str) -> None:
    found = Page(text)
    assert found.inside["title"][0].strip() == "mine – ia2 report"
    headings = [words.strip() for words in found.inside["h3"]]
    assert headings == [
        "Verdict", "What was run", "Results", "Figures", "Predictions: where do the methods disagree?",
        "Doctor", "Environment",
    ]  # fmt: skip
    assert [words.strip() for words in found.inside["h4"][:6]] == [
        "Accuracy, NLL and similarity to ICL",
        "Reliability: is it right as often as it is confident?",
        "Similarity to ICL by layer",
        "Similarity to ICL against results",
        "What a query costs, and what it buys",
        "Training",
    ]
    verdict = found.inside["section"][1]
    assert "IA2 → SFT beats SFT: it is more accurate (+0.200 [+0.100, +0.300]) and better in NLL" in verdict
    assert "20 test rows, 95% t-intervals over 2 draws of training examples" in verdict
    everything = found.inside["body"][0]
    for expected in ("0123456789abcdef", "Linux x86_64, 2 cores", "torch 2.13.0", "0, 1", "adapter.type"):
        assert expected in everything


def test_it_is_well_formed_and_can_be_read_aloud(text: str) -> None:
    found = Page(text)
    assert found.unclosed == []
    counts = Counter(tag for tag, _ in found.elements)
    assert (counts["h1"], counts["main"], counts["header"], counts["nav"], counts["footer"]) == (
        1,
        1,
        1,
        1,
        1,
    )
    assert counts["table"] == counts["caption"] > 8
    assert all(attributes.get("scope") in ("col", "row") for attributes in found.all("th"))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.elements:
        named = (attributes.get("aria-labelledby") or "").split()
        assert set(named) <= set(ids)
        href = attributes.get("href") or ""
        assert not href.startswith("#") or href[1:] in ids
    pictures = found.all("img")
    assert len(pictures) == 3 + 5 + 1 + 2 + 2 + 3
    assert all(p["alt"] for p in pictures)
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert found.all("html")[0]["lang"] == "en"
    assert ("a", {"class": "skip", "href": "#main"}) in found.elements
    # what scrolls can be reached by the keyboard and has a name
    regions = [a for _, a in found.elements if "scroll" in (a.get("class") or "").split()]
    assert regions and all(
        a["tabindex"] == "0" and a["role"] == "region" and a["aria-labelledby"] for a in regions
    )


def test_nothing_is_fetched(text: str) -> None:
    found = Page(text)
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w", text)
    assert not re.search(r"url\((?!#)|@import|\bimport\(|fetch\(|XMLHttpRequest", text)
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in found.elements}
    sources = [attributes["src"] for _, attributes in found.elements if "src" in attributes]
    assert sources and all(source and source.startswith(PICTURE) for source in sources)
    policy = next(m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert (
        policy is not None
        and policy.startswith("default-src 'none'; img-src data:;")
        and "unsafe" not in policy
    )
    for tag in ("style", "script"):
        [content] = found.inside[tag]
        mark = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{mark}'" in policy
    # the policy would refuse them
    assert not [a for _, a in found.elements if "style" in a or any(name.startswith("on") for name in a)]


def test_markup_in_data_stays_text(evil: Path) -> None:
    text = evil.read_text(encoding="utf-8")
    found = Page(text)
    assert found.unclosed == []
    assert len(found.all("script")) == 1
    assert all((a["src"] or "").startswith(PICTURE) for a in found.all("img"))
    assert "hacked" not in found.inside["script"][0]
    assert EVIL not in text
    body = found.inside["body"][0]
    assert body.count(f"{EVIL} row 00") == 2
    assert "a<b>&" in body
    # inside figures too: the name of a model
    write_comparison(evil.parent / "b")
    summary = read_json(evil.parent / "b" / "compare.json")
    short = "<script>'&\""
    summary["recipes"][short] = summary["recipes"].pop("sft")
    write_json(evil.parent / "b" / "compare.json", summary)
    found = Page(page([read_run(evil.parent / "b")]))
    sources = [a["src"] or "" for a in found.all("img")]
    drawings = [base64.b64decode(source.removeprefix(PICTURE)) for source in sources]
    texts = [element.text or "" for drawing in drawings for element in ElementTree.fromstring(drawing).iter()]
    assert any(short in text for text in texts)
    assert len(found.all("script")) == 1


def test_rows_can_be_filtered_and_are_counted(text: str, comparison: Path) -> None:
    found = Page(text)
    marked = [a for a in found.all("tr") if "data-marks" in a]
    run_ = read_run(comparison)
    assert len(marked) == len(run_.rows) == 40
    for attributes, row in zip(marked, run_.rows, strict=True):
        expected = "".join(str(int(bool(row.answers[arm].correct))) for arm in SKILL)
        assert attributes["data-marks"] == expected
        assert ("data-differs" in attributes) == (len({a.predicted for a in row.answers.values()}) > 1)
    assert [words.strip() for words in found.inside["option"]][:6] == [
        "all rows", "the methods disagree", "some are right, some wrong", "all are wrong",
        "ia2-sft is right, sft wrong", "sft is right, ia2-sft wrong",
    ]  # fmt: skip
    # the count of rows that only one answers rightly is in the page without JavaScript
    only = sum(bool(r.answers["ia2-sft"].correct and not r.answers["sft"].correct) for r in run_.rows)
    cells = re.search(r'<th scope="row">sft</th><td>(\d+)</td><td>(\d+)</td>', text)
    assert cells is not None and int(cells[2]) == only > 0


def test_many_rows_are_left_out_and_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_comparison(tmp_path / "big", rows=300, recipes=("sft", "ia2-sft"))
    whole = page([read_run(tmp_path / "big")])
    assert "600 rows: every test row once for each seed." in whole
    assert "Only the first" not in whole and len(whole) < 900_000
    first, rest = whole.split('<tbody class="rest">')
    assert (first.count("data-marks"), rest.count("data-marks")) == (200, 400)
    monkeypatch.setattr("ia2.report.data.MAX_ROWS", 250)
    cut = page([read_run(tmp_path / "big")])
    assert cut.count("data-marks") == 250
    assert "Only the first 250 are in this file" in cut


def test_a_very_long_query_is_cut(tmp_path: Path) -> None:
    write_comparison(tmp_path / "r", seeds=1, rows=3, recipes=("sft",))
    file = tmp_path / "r" / "seed-0" / "evaluations" / "sft.predictions.jsonl"
    file.write_text(file.read_text().replace("Text: row 00", "y" * 5_000))
    text = page([read_run(tmp_path / "r")])
    assert "y" * 2_000 + " … (3,000 more characters)" in text and "y" * 2_001 not in text


def test_the_doctor_s_findings(comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ia2.report.doctor import diagnosis

    finding = Finding("problem", "It is ill.", f"0.1 {EVIL}", "Rest.", "sft, seed 0", rule="a-rule")
    told = ((finding,), ("b-rule",), {"c-rule": "no rows"})
    given = diagnosis.Diagnosis(comparison, "compare", True, (), *told)
    monkeypatch.setattr(diagnosis, "diagnose_all", lambda folder: [given])
    found = Page(page([read_run(comparison)]))
    [article] = found.inside["article"]
    for expected in ("problem:", "It is ill.", f"0.1 {EVIL}", "Rest.", "sft, seed 0", "a-rule"):
        assert expected in article
    assert "1 rule found nothing: b-rule. 1 could not be judged:" in found.inside["body"][0]
    given = diagnosis.Diagnosis(comparison, "compare", True, (), (), ("a-rule", "b-rule"), {})
    assert "No rule found anything wrong." in page([read_run(comparison)])


# -------------------------------------------------------------------------------------------- verdict


@pytest.mark.parametrize(
    ("accuracy", "nll", "expected"),
    [
        (
            (0.2, 0.1, 0.3),
            (-0.1, -0.2, -0.05),
            "beats SFT: it is more accurate (+0.200 [+0.100, +0.300]) and better",
        ),
        (
            (-0.2, -0.3, -0.1),
            (0.1, 0.05, 0.2),
            "loses to SFT: it is less accurate (−0.200 [−0.300, −0.100]) and worse",
        ),
        (
            (0.02, -0.1, 0.1),
            (-0.01, -0.1, 0.1),
            "cannot be told from SFT here: it is not distinguishably more",
        ),
        (
            (0.2, 0.1, 0.3),
            (0.1, -0.05, 0.2),
            "beats SFT in accuracy: it is more accurate (+0.200 [+0.100, +0.300]) but",
        ),
        ((0.0, -0.1, 0.1), (0.1, 0.05, 0.2), "loses to SFT in NLL: it is as accurate"),
        ((0.2, 0.1, 0.3), (0.1, 0.05, 0.2), "beats SFT in accuracy and loses to it in NLL"),
        (
            (0.2, None, None),
            (-0.1, None, None),
            "cannot be told from SFT here: it is not distinguishably more",
        ),
    ],
)
def test_the_verdict_says_what_the_intervals_say(
    accuracy: tuple[Any, ...], nll: tuple[Any, ...], expected: str
) -> None:
    found = {
        name: dict(zip(("value", "low", "high"), values, strict=True))
        for name, values in (("accuracy", accuracy), ("nll", nll))
    }
    summary = {
        "design": {"seeds": [0], "num_test": 1, "icl_demonstrations": "a text"},
        "recipes": {"sft": {}, "ia2-sft": {}},
        "differences": {"ia2-sft − sft": found},
        "intervals": INTERVALS,
    }
    first, second = comparison_verdict(summary)
    assert first.startswith(f"IA2 → SFT {expected}")
    assert first.endswith("; 1 test row, one draw of training examples: no intervals.")
    assert second.startswith("Without in-context learning in this comparison there is no verdict")


def test_the_verdict_on_a_curve_goes_by_size(tmp_path: Path) -> None:
    better = {
        "accuracy": {"value": 0.1, "low": 0.05, "high": 0.2},
        "nll": {"value": 0.1, "low": -0.1, "high": 0.2},
    }
    worse = {**better, "accuracy": {"value": -0.1, "low": -0.2, "high": -0.05}}
    lines = curve_verdict({"differences": {"4": worse, "8": better, "16": None}}, {})
    assert lines[0].startswith(
        "IA2 → SFT against SFT: more accurate at N = 8, less accurate at N = 4; neither better nor worse "
        "in NLL for certain at N = 4, 8"
    )
    assert "not both run" in lines[1]


# -------------------------------------------------------------------------------------------- figures


def test_figures_in_numbers(comparison: Path) -> None:
    run_ = read_run(comparison)
    figures = {figure.name: figure for figure in run_figures(run_)}
    assert list(figures) == ["compare", "reliability", "layers", "similarity", "cost", "training"]
    bins = [[entry.text for entry in row] for row in figures["reliability"].numbers.rows]
    own = [row for row in bins if row[0] == "sft"]
    assert sum(int(row[1]) for row in own) == 40
    right = sum(int(row[1]) * float(row[3].split()[0]) for row in own)
    assert right == pytest.approx(sum(e.correct.sum() for e in run_.evaluations["sft"]), abs=0.05)
    layers = figures["layers"].numbers
    assert [c.title for c in layers.columns] == ["layer", "base", "sft", "ia2", "ia2-sft"]
    assert [entry.text for entry in layers.rows[1]] == ["1", *["0.500"] * 4]
    assert len(figures["similarity"].numbers.rows) == 4 * 2
    assert [e.text for e in figures["training"].numbers.rows[0]][:6] == [
        "align",
        "seed 0",
        "lr-0.001",
        "4",
        "4",
        "0.35",
    ]


def test_wilson_intervals() -> None:
    # Wilson 1927; the values of R's binom.confint(8, 10, method = "wilson")
    assert wilson(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    low, high = wilson(1.0, 10)
    assert 0.7 < low < 0.75 and high == 1.0


def test_the_cheapest_way_to_each_value() -> None:
    points = [(12.0, 0.7), (12.0, 0.9), (120.0, 0.8), (200.0, 0.95)]
    assert frontier(points, higher=True) == [(12.0, 0.9), (200.0, 0.95)]
    assert frontier(points, higher=False) == [(12.0, 0.7)]


def test_a_page_comes_without_the_doctor(comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(folder: Path) -> None:
        raise KeyError("design")

    monkeypatch.setattr(diagnosis, "diagnose_all", stumble)
    assert "The doctor could not read this run" in page([read_run(comparison)])


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    summary = write_comparison(tmp_path / "old", seeds=1)
    for entry in summary["recipes"].values():
        del entry["tokens_per_query"]
    assert cost_figure(summary) is None
    kept = tmp_path / "kept"
    write_json(kept / "compare.json", summary)
    text = page([read_run(kept)])
    for expected in (
        "did not count tokens per query",
        "Only the summary was kept",
        "One draw of training examples",
    ):
        assert expected in text
    assert Page(text).inside["h4"][1].strip() == "Similarity to ICL by layer"


def test_without_matplotlib_there_is_a_page_without_figures(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ia2.report.page.matplotlib_is_there", lambda: False)
    ran = run(capsys, "report", comparison, "--output", tmp_path / "r.html")
    assert ran.err.splitlines() == ["No figures: pip install 'ia2[report]' brings matplotlib."]
    text = (tmp_path / "r.html").read_text()
    assert "<img" not in text and "No figures: pip install" in text
    assert html.try_report(comparison) is None and not (comparison / "report.html").exists()


def test_without_jinja_there_is_one_line(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = run(capsys, "report", comparison, "--output", tmp_path / "r.html")
    assert "pip install 'ia2[report]' brings it" in ran.refusal()
    assert html.try_report(comparison) is None


# ------------------------------------------------------------------------------------- other runs


def test_a_curve(tmp_path: Path) -> None:
    write_curve(tmp_path / "curve")
    text = page([read_run(tmp_path / "curve")])
    found = Page(text)
    assert text.count("data-marks") == 2 * 2 * 12
    assert {a.get("data-part") for a in found.all("tr") if "data-marks" in a} == {"N = 4", "N = 8"}
    assert any(a.get("name") == "part" for a in found.all("select"))
    assert "Accuracy and NLL over the number of training examples" in found.inside["body"][0]


def test_a_size_whose_comparison_is_gone_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_curve(tmp_path / "curve")
    (tmp_path / "curve" / "n-4" / "compare.json").unlink()
    assert list(read_run(tmp_path / "curve").parts) == [8]
    assert "n-4: no comparison is there any more; its rows are left out." in caplog.text


def test_an_adapter(tmp_path: Path) -> None:
    write_training(tmp_path / "run", note="dev rows also chose the weights")
    text = page([read_run(tmp_path / "run")])
    body = Page(text).inside["body"][0]
    for expected in (
        "reaches an accuracy among the labels of",
        "compare",
        "aa11",
        "Dev rows also chose the weights.",
        "Reliability",
    ):
        assert expected in body
    assert text.count("data-marks") == 20


def test_a_sweep_beside_a_run(comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [record(rows(5 + seed), recipe=r, seed=seed) for r in ("sft", "ia2-sft") for seed in (0, 1)]
    sweep = write_sweep(tmp_path / "sweep", cells)
    alone = run(capsys, "report", sweep, "--html", tmp_path / "s.html")
    assert alone.status == 0 and "sweep: 4 cells" in alone.out
    body = Page((tmp_path / "s.html").read_text()).inside["body"][0]
    assert "All results of sweep" in body and "there are no per-example predictions" in body
    both = run(capsys, "report", comparison, sweep, "--output", tmp_path / "b.html", "--json").json
    assert [entry["name"] for entry in both["runs"]] == ["mine"] and both["cells"] == 4
    found = Page((tmp_path / "b.html").read_text())
    assert [words.split()[0] for words in found.inside["h2"]] == ["mine", "sweep"]
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    # without a name of a file a sweep's output is what it was
    assert "Files:" not in run(capsys, "report", sweep).out
    assert not (sweep / "report.html").exists()


# ---------------------------------------------------------------------------------------- the command


def test_the_command_writes_beside_the_run(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "report", comparison)
    assert ran.out.startswith("mine: IA2 → SFT beats SFT")
    assert f"Files: {comparison / 'report.html'}" in ran.out
    first = (comparison / "report.html").read_bytes()
    run(capsys, "report", comparison)
    assert (comparison / "report.html").read_bytes() == first
    assert b"/somebody" not in first and str(comparison.parent).encode() not in first
    (comparison / "report.html").unlink()


def test_the_command_prints_tables_and_draws(
    comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(
        capsys, "report", comparison, "--latex", "--markdown", "--figures", tmp_path, "--output-dir", tmp_path
    )
    assert ran.out.index("| ia2-sft | ") < ran.out.index(r"\begin{table}")
    assert {path.name for path in tmp_path.iterdir()} == {
        "table-comparison.md", "table-comparison.tex", "compare.svg", "reliability.svg", "layers.svg",
        "similarity.svg", "cost.svg", "training.svg",
    }  # fmt: skip
    assert not (comparison / "report.html").exists()


def test_refusals(comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: Any) -> str:
        return run(capsys, "report", *arguments).refusal()

    started = tmp_path / "started"
    shutil.copytree(comparison, started)
    (started / "compare.json").unlink()
    assert (
        refusal(started)
        == f"{started}: the run has not finished; start the same command again to continue it."
    )
    (tmp_path / "curve" / "n-4").mkdir(parents=True)
    shutil.copy(comparison / "ia2_run.json", tmp_path / "curve" / "n-4")
    assert "has not finished" in refusal(tmp_path / "curve")
    (tmp_path / "empty").mkdir()
    assert "no run of ia2 there" in refusal(tmp_path / "empty")
    assert "--sizes is about sweeps" in refusal(comparison, "--sizes", "8")
    assert "it is a folder" in refusal(comparison, "--output", tmp_path)
    write_json(started / "compare.json", {"design": {}})
    assert "damaged or of another version" in refusal(started)
    shutil.copy(comparison / "compare.json", started)
    file = started / "seed-1" / "evaluations" / "sft.predictions.jsonl"
    file.write_text(file.read_text() + "{\n")
    assert f"{file}:21: damaged" in refusal(started)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(RunFolderError, match="differing numbers of rows"):
        read_run(started)


def test_a_report_needs_no_torch(comparison: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from ia2.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "report", str(comparison), "--output", str(tmp_path / "r.html")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


# ------------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def window() -> Any:
    from helpers.browser import browser

    with browser() as opened:
        yield opened


VISIBLE = (
    "return [...document.querySelectorAll('.predictions tbody tr')].filter(r => r.getClientRects().length)"
)
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.slow
def test_in_a_browser(window: Any, evil: Path) -> None:
    window.size(1280)
    window.open(evil)
    assert window.run("return document.readyState") == "complete"
    assert window.run("return window.hacked === undefined")
    shown = "const r = e.getBoundingClientRect(); return r.width > 100 && r.height > 50"
    for selector, least in (("table", 3), ("img", 16)):
        sizes = f"return [...document.querySelectorAll('{selector}')].filter(e => {{ {shown} }}).length"
        assert window.run(sizes) >= least
    # every row, then those on which sft is wrong where the method is right, then those of one seed
    assert window.run(f"{VISIBLE}.length") == 40
    pick = "const s = document.querySelector(arguments[0]); s.value = arguments[1]; "
    pick += "s.dispatchEvent(new Event('input', {bubbles: true}))"
    window.run(pick, "[name=choice]", "r:4:2")
    marks = window.run(f"{VISIBLE}.map(r => r.dataset.marks)")
    assert 0 < len(marks) < 40 and all(mark[4] == "1" and mark[2] == "0" for mark in marks)
    assert window.run("return document.querySelector('.count').textContent") == f"{len(marks)} of 40 rows"
    window.run(pick, "[name=seed]", "1")
    assert set(window.run(f"{VISIBLE}.map(r => r.dataset.seed)")) == {"1"}
    window.click("form button")
    window.type_into("[name=text]", "row 07")
    assert window.run(f"{VISIBLE}.length") == 2
    window.click("form button")
    assert window.run(f"{VISIBLE}.length") == 40
    # sorted by the confidence of sft, up and down
    values = f"{VISIBLE}.map(r => Number(r.cells[5].dataset.v))"
    for order in ("ascending", "descending"):
        window.click("thead th:nth-child(6) button")
        assert window.run("return document.querySelector('[aria-sort]').getAttribute('aria-sort')") == order
        found = window.run(values)
        assert found == sorted(found, reverse=order == "descending")
    assert window.messages() == []


@pytest.mark.slow
def test_on_a_phone_in_the_dark_and_on_paper(window: Any, evil: Path, text: str, tmp_path: Path) -> None:
    plain = tmp_path / "r.html"
    plain.write_text(text, encoding="utf-8")
    for file in (evil, plain):
        window.size(390, 800, phone=True)
        window.open(file)
        assert window.run(OVERFLOW) <= 0
        assert window.run("return window.innerWidth") == 390
    colour = "return getComputedStyle(document.body).backgroundColor"
    light = window.run(colour)
    window.media(dark=True)
    assert window.run(colour) != light == "rgb(255, 255, 255)"
    for selector in ("p", ".notes", ".confidence", ".right", ".wrong", "a", "caption", "summary"):
        assert contrast(window, selector) >= 4.5, f"{selector} in the dark"
    window.media()
    for selector in ("p", ".notes", ".confidence", ".right", ".wrong", "a", "caption", "summary"):
        assert contrast(window, selector) >= 4.5, selector
    window.media(dark=True, paper=True)
    assert window.run(colour) == light
    assert window.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    window.media()
    assert window.pdf().startswith(b"%PDF-")
    assert window.messages() == []


@pytest.mark.slow
def test_without_javascript_all_rows_are_there(window: Any, text: str, tmp_path: Path) -> None:
    plain = tmp_path / "r.html"
    plain.write_text(text, encoding="utf-8")
    window.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        window.size(1280)
        window.open(plain)
        root = window.devtools("DOM.getDocument", depth=0)["root"]["nodeId"]
        found = window.devtools("DOM.querySelectorAll", nodeId=root, selector=".predictions tbody tr")[
            "nodeIds"
        ]
        assert len(found) == 40
        assert window.devtools("DOM.getBoxModel", nodeId=found[-1])["model"]["height"] > 0
        form = window.devtools("DOM.querySelector", nodeId=root, selector="form")["nodeId"]
        with pytest.raises(AssertionError, match="box model"):
            window.devtools("DOM.getBoxModel", nodeId=form)
    finally:
        window.devtools("Emulation.setScriptExecutionDisabled", value=False)


def contrast(window: Any, selector: str) -> float:
    """WCAG 2.2's contrast ratio of an element's text and what is behind it."""
    ink, paper = window.run(
        """const e = document.querySelector(arguments[0]); let b = e;
        const clear = 'rgba(0, 0, 0, 0)';
        while (b.parentElement && getComputedStyle(b).backgroundColor === clear) b = b.parentElement;
        const own = getComputedStyle(e);
        return [own.color, getComputedStyle(b).backgroundColor]""",
        selector,
    )

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)
