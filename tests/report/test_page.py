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

from ia2.evaluation.tables import INTERVALS
from ia2.report.doctor import diagnosis
from ia2.report.doctor.facts import Finding
from ia2.report.page import page, try_report
from ia2.report.results import read_analysis, read_run
from ia2.report.verdict import comparison_verdict, curve_verdict
from ia2.utils.errors import RunFolderError
from ia2.utils.files import read_json, write_json

RESULTS = Path(__file__).parents[2] / "results" / "analysis"
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
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.inside[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def body(self) -> str:
        return self.inside["body"][0]


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
    """A page on an analysed run whose rows, names, labels and promoted tokens are markup."""
    folder = tmp_path_factory.mktemp("evil") / "a<b>&"
    summary = write_comparison(folder, evil=True)
    summary["recipes"]["<script>'&\""] = summary["recipes"]["sft"]
    write_json(folder / "compare.json", summary)
    analysis = read_json(RESULTS / "analysis.json")
    analysis["data"]["name"] = EVIL
    next(iter(analysis["neurons"]["residual"]["views"].values()))["tokens"][0]["promoted"][0]["token"] = EVIL
    write_json(folder / "analysis.json", analysis)
    found = try_report(folder)
    assert found is not None
    return found


def test_everything_is_there(text: str) -> None:
    found = Page(text)
    assert found.inside["title"][0].strip() == "mine – ia2 report"
    assert [words.split(":")[0].strip() for words in found.inside["h3"]] == [
        "Verdict", "What was run", "Results", "Figures", "Predictions", "Doctor", "Environment",
    ]  # fmt: skip
    assert [words.strip() for words in found.inside["h4"][:6]] == [
        "Accuracy, NLL and similarity to ICL", "Reliability: is it right as often as it is confident?",
        "Similarity to ICL by layer", "Similarity to ICL against results",
        "What a query costs, and what it buys", "Training",
    ]  # fmt: skip
    for expected in (
        "IA2 → SFT beats SFT: it is more accurate (+0.200 [+0.100, +0.300]) and better in NLL",
        "20 test rows, 95% t-intervals over 2 draws of training examples", "0123456789abcdef",
        "Linux x86_64, 2 cores", "torch 2.13.0", "0, 1", "adapter.type",
    ):  # fmt: skip
        assert expected in found.body


def test_it_can_be_read_aloud(text: str) -> None:
    found = Page(text)
    counts = Counter(tag for tag, _ in found.elements)
    assert [counts[tag] for tag in ("h1", "main", "header", "nav", "footer")] == [1] * 5
    assert counts["table"] == counts["caption"] > 8
    assert all(attributes.get("scope") in ("col", "row") for attributes in found.all("th"))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    used = [(a.get("aria-labelledby") or a.get("href", "")).lstrip("#") for _, a in found.elements]
    assert len(ids) == len(set(ids)) and {name for name in used if name} <= set(ids)
    assert len(found.all("img")) == 3 + 5 + 1 + 2 + 2 + 3 and all(p["alt"] for p in found.all("img"))
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    # what scrolls can be reached by the keyboard
    regions = [a for _, a in found.elements if "scroll" in (a.get("class") or "").split()]
    assert regions and all(a["tabindex"] == "0" and a["role"] == "region" for a in regions)


def test_nothing_is_fetched(text: str) -> None:
    found = Page(text)
    assert not re.search(
        r"(?:https?:)?//[\w.-]+\.\w|url\((?!#)|@import|\bimport\(|fetch\(|XMLHttpRequest", text
    )
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in found.elements}
    policy = next(m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        [content] = found.inside[tag]
        mark = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{mark}'" in policy
    # the policy would refuse them
    assert not [a for _, a in found.elements if "style" in a or any(name.startswith("on") for name in a)]


def test_markup_in_data_stays_text(evil: Path) -> None:
    text = evil.read_text(encoding="utf-8")
    found = Page(text)
    assert len(found.all("script")) == 1 and EVIL not in text
    assert found.body.count(f"{EVIL} row 00") == 2 and "Inside a<b>&" in found.body
    sources = [a["src"] or "" for a in found.all("img")]
    assert len(sources) > 40 and all(source.startswith(PICTURE) for source in sources)
    drawings = [base64.b64decode(source.removeprefix(PICTURE)) for source in sources]
    texts = [element.text or "" for drawing in drawings for element in ElementTree.fromstring(drawing).iter()]
    assert any("<script>'&\"" in text for text in texts)


def test_rows_can_be_filtered_and_are_counted(text: str, comparison: Path) -> None:
    found = Page(text)
    marked = [a for a in found.all("tr") if "data-marks" in a]
    given = read_run(comparison).rows
    assert len(given) == 40
    for attributes, row in zip(marked, given, strict=True):
        answers = row["answers"]
        assert attributes["data-marks"] == "".join(str(int(answers[arm]["correct"])) for arm in SKILL)
        assert ("data-differs" in attributes) == (len({a["predicted"] for a in answers.values()}) > 1)
    assert [words.strip() for words in found.inside["option"]][:6] == [
        "all rows", "the methods disagree", "some are right, some wrong", "all are wrong",
        "ia2-sft is right, sft wrong", "sft is right, ia2-sft wrong",
    ]  # fmt: skip
    # the count of rows that only one answers rightly is in the page without JavaScript
    only = sum(r["answers"]["ia2-sft"]["correct"] and not r["answers"]["sft"]["correct"] for r in given)
    cells = re.search(r'<th scope="row">sft</th><td>(\d+)</td><td>(\d+)</td>', text)
    assert cells is not None and int(cells[2]) == only > 0


def test_what_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_comparison(tmp_path / "big", rows=300, recipes=("sft", "ia2-sft"))
    file = tmp_path / "big" / "seed-0" / "evaluations" / "sft.predictions.jsonl"
    file.write_text(file.read_text().replace("Text: row 00", "y" * 5_000))
    whole = page([read_run(tmp_path / "big")])
    assert "600 rows: every test row once for each seed." in whole and "Only the first" not in whole
    assert "y" * 2_000 + " … (3,000 more characters)" in whole and "y" * 2_001 not in whole
    assert [part.count("data-marks") for part in whole.split('<tbody class="rest">')] == [200, 400]
    monkeypatch.setattr("ia2.report.results.MAX_ROWS", 250)
    assert page([read_run(tmp_path / "big")]).count("data-marks") == 250


def test_the_doctor_s_findings(comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding("problem", "It is ill.", f"0.1 {EVIL}", "Rest.", "sft, seed 0", rule="a-rule")
    told = ((finding,), ("b-rule",), {"c-rule": "no rows"})
    given = diagnosis.Diagnosis(comparison, "compare", True, (), *told)
    monkeypatch.setattr(diagnosis, "diagnose_all", lambda folder: [given])
    found = Page(page([read_run(comparison)]))
    for expected in ("problem:", "It is ill.", f"0.1 {EVIL}", "Rest.", "sft, seed 0", "a-rule"):
        assert expected in found.inside["article"][0]
    assert "1 rule found nothing: b-rule. 1 could not be judged:" in found.body
    monkeypatch.setattr(diagnosis, "diagnose_all", lambda folder: {}["design"])
    assert "The doctor could not read this run" in page([read_run(comparison)])


BETTER, WORSE, NEITHER, UNKNOWN = (0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.02, -0.1, 0.1), (0.2, None, None)


def ends(*values: float | None) -> dict[str, float | None]:
    return dict(zip(("value", "low", "high"), values, strict=True))


@pytest.mark.parametrize(
    ("accuracy", "nll", "expected"),
    [
        (BETTER, WORSE, "beats SFT: it is more accurate (+0.200 [+0.100, +0.300]) and better"),
        (WORSE, BETTER, "loses to SFT: it is less accurate (−0.200 [−0.300, −0.100]) and worse"),
        (NEITHER, (-0.01, -0.1, 0.1), "cannot be told from SFT here: it is not distinguishably more"),
        (BETTER, NEITHER, "beats SFT in accuracy: it is more accurate (+0.200 [+0.100, +0.300]) but"),
        ((0.0, -0.1, 0.1), BETTER, "loses to SFT in NLL: it is as accurate"),
        (BETTER, BETTER, "beats SFT in accuracy and loses to it in NLL"),
        (UNKNOWN, UNKNOWN, "cannot be told from SFT here: it is not distinguishably more"),
    ],
)
def test_the_verdict_says_what_the_intervals_say(accuracy: Any, nll: Any, expected: str) -> None:
    summary = {
        "design": {"seeds": [0], "num_test": 1, "icl_demonstrations": "a text"},
        "recipes": {"sft": {}, "ia2-sft": {}},
        "differences": {"ia2-sft − sft": {"accuracy": ends(*accuracy), "nll": ends(*nll)}},
        "intervals": INTERVALS,
    }
    first, second = comparison_verdict(summary)
    assert first.startswith(f"IA2 → SFT {expected}")
    assert first.endswith("; 1 test row, one draw of training examples: no intervals.")
    assert second.startswith("Without in-context learning in this comparison there is no verdict")


def test_the_verdict_on_a_curve_goes_by_size() -> None:
    better, worse = ({"accuracy": ends(*found), "nll": ends(*NEITHER)} for found in (BETTER, WORSE))
    lines = curve_verdict({"differences": {"4": worse, "8": better, "16": None}}, {})
    assert lines[0].startswith(
        "IA2 → SFT against SFT: more accurate at N = 8, less accurate at N = 4; neither better nor worse "
        "in NLL for certain at N = 4, 8"
    )
    assert "not both run" in lines[1]


# ----------------------------------------------------------------------------------------- other runs


def test_a_curve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_curve(tmp_path / "curve")
    found = Page(page([read_run(tmp_path / "curve")]))
    parts = [a["data-part"] for a in found.all("tr") if "data-marks" in a]
    assert Counter(parts) == {"N = 4": 24, "N = 8": 24}
    assert "Accuracy and NLL over the number of training examples" in found.body
    (tmp_path / "curve" / "n-4" / "compare.json").unlink()
    assert list(read_run(tmp_path / "curve").parts) == [8]
    assert "n-4: no comparison is there any more; its rows are left out." in caplog.text


def test_an_adapter_and_a_summary_alone(tmp_path: Path) -> None:
    write_training(tmp_path / "run", note="dev rows also chose the weights")
    text = page([read_run(tmp_path / "run")])
    for expected in ("reaches an accuracy among the labels of", "aa11", "Dev rows also chose the weights."):
        assert expected in Page(text).body
    assert text.count("data-marks") == 20
    summary = write_comparison(tmp_path / "old", seeds=1)
    for entry in summary["recipes"].values():
        del entry["tokens_per_query"]
    write_json(tmp_path / "kept" / "compare.json", summary)
    text = page([read_run(tmp_path / "kept")])
    for expected in ("did not count tokens", "Only the summary was kept", "One draw of training examples"):
        assert expected in text


def test_a_sweep_beside_a_run(comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [record(rows(5 + seed), recipe=r, seed=seed) for r in ("sft", "ia2-sft") for seed in (0, 1)]
    sweep = write_sweep(tmp_path / "sweep", cells)
    both = run(capsys, "report", comparison, sweep, "--output", tmp_path / "b.html", "--json").json
    assert [entry["name"] for entry in both["runs"]] == ["mine"] and both["cells"] == 4
    found = Page((tmp_path / "b.html").read_text())
    assert [words.split()[0] for words in found.inside["h2"]] == ["mine", "sweep"]
    assert "All results of sweep" in found.body and "there are no per-example predictions" in found.body
    # without a name of a file there is none of a sweep
    assert "Files:" not in run(capsys, "report", sweep).out and not (sweep / "report.html").exists()


# ---------------------------------------------------------------------------------------- the command


def test_the_command(comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = comparison / "report.html"
    options = ("--latex", "--markdown", "--figures", tmp_path, "--output-dir", tmp_path)
    ran = run(capsys, "report", comparison, *options)
    assert ran.out.index("| ia2-sft | ") < ran.out.index(r"\begin{table}")
    figures = ("compare", "reliability", "layers", "similarity", "cost", "training")
    expected = {"table-comparison.md", "table-comparison.tex", *(f"{name}.svg" for name in figures)}
    assert {path.name for path in tmp_path.iterdir()} == expected and not file.exists()
    ran = run(capsys, "report", comparison)
    assert ran.out.startswith("mine: IA2 → SFT beats SFT") and f"Files: {file}" in ran.out
    first = file.read_bytes()
    run(capsys, "report", comparison)
    assert file.read_bytes() == first
    assert b"/somebody" not in first and str(comparison.parent).encode() not in first
    file.unlink()


def test_without_matplotlib_and_jinja(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ia2.report.figures.style.matplotlib_is_there", lambda: False)
    ran = run(capsys, "report", comparison, "--output", tmp_path / "r.html")
    assert ran.err.splitlines() == ["No figures: pip install 'ia2[report]' brings matplotlib."]
    text = (tmp_path / "r.html").read_text()
    assert "<img" not in text and "No figures: pip install" in text
    assert try_report(comparison) is None and not (comparison / "report.html").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = run(capsys, "report", comparison, "--output", tmp_path / "r.html")
    assert "pip install 'ia2[report]' brings it" in ran.refusal()


def test_refusals(comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: Any) -> str:
        return run(capsys, "report", *arguments).refusal()

    started = tmp_path / "started"
    shutil.copytree(comparison, started)
    (started / "compare.json").unlink()
    assert refusal(started).startswith(f"{started}: the run has not finished")
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
    assert "differing numbers of rows" in refusal(started)
    assert read_analysis(started) is None
    write_json(started / "analysis.json", {"layers": []})
    with pytest.raises(RunFolderError, match=r"analysis\.json: no analysis of"):
        read_analysis(started)


def test_a_report_needs_no_torch(comparison: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from ia2.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "report", str(comparison), "--output", str(tmp_path / "r.html")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


# ------------------------------------------------------------------------------------------- a browser

VISIBLE = (
    "return [...document.querySelectorAll('.predictions tbody tr')].filter(r => r.getClientRects().length)"
)
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.slow
def test_in_a_browser(evil: Path) -> None:
    from helpers.browser import browser

    with browser() as window:
        window.size(1280)
        window.open(evil)
        assert window.run("return window.hacked === undefined")
        pick = "const s = document.querySelector(arguments[0]); s.value = arguments[1]; "
        pick += "s.dispatchEvent(new Event('input', {bubbles: true}))"
        # rows on which sft is wrong where the method is right, then those of one seed
        window.run(pick, "[name=choice]", "r:4:2")
        marks = window.run(f"{VISIBLE}.map(r => r.dataset.marks)")
        assert 0 < len(marks) < 40 and all(mark[4] == "1" and mark[2] == "0" for mark in marks)
        assert window.run("return document.querySelector('.count').textContent") == f"{len(marks)} of 40 rows"
        window.run(pick, "[name=seed]", "1")
        assert set(window.run(f"{VISIBLE}.map(r => r.dataset.seed)")) == {"1"}
        window.click("form button")
        assert window.run(f"{VISIBLE}.length") == 40
        for order in ("ascending", "descending"):  # by the confidence of sft
            window.click("thead th:nth-child(6) button")
            found = window.run(f"{VISIBLE}.map(r => Number(r.cells[5].dataset.v))")
            assert found == sorted(found, reverse=order == "descending")
        window.size(390, 800, phone=True)
        window.open(evil)
        assert window.run(OVERFLOW) <= 0
        for dark in (False, True):
            window.media(dark=dark)
            for selector in ("p", ".notes", ".confidence", ".right", ".wrong", "a", "caption", "summary"):
                assert contrast(window, selector) >= 4.5, f"{selector}, dark: {dark}"
        window.media()
        assert window.pdf().startswith(b"%PDF-") and window.messages() == []


def contrast(window: Any, selector: str) -> float:
    """WCAG 2.2's contrast ratio of an element's text and what is behind it."""
    ink, paper = window.run(
        """const e = document.querySelector(arguments[0]); let b = e;
        const clear = 'rgba(0, 0, 0, 0)';
        while (b.parentElement && getComputedStyle(b).backgroundColor === clear) b = b.parentElement;
        return [getComputedStyle(e).color, getComputedStyle(b).backgroundColor]""",
        selector,
    )

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)
