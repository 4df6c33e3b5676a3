"""The documentation's commands, settings, names and links exist."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement

import ia2
from ia2.cli import app, main
from ia2.cli import options as cli_options
from ia2.config.reading import load_config
from ia2.experiment.sweep.grid import expand, load_grid

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

# Flags in the text that are other programs'.
FOREIGN = {"--num_processes", "--cpu", "--multi_gpu", "--no-deps"}

COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def flags_of(command: Any) -> set[str]:
    """Flags of a command and, of a group, of those in it."""
    own = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
    return own.union(*(flags_of(part) for part in getattr(command, "commands", {}).values()))


FLAGS = {name: flags_of(command) for name, command in COMMANDS.items()}


def text_of(page: str) -> str:
    return re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a language; without one, of commands."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [block for kind, block in fenced if kind == language]


def inline(page: str) -> list[str]:
    """Code inside sentences."""
    sentences = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", sentences)]


def commands(page: str) -> list[list[str]]:
    """The arguments of each ``ia2`` command in a page's blocks."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("ia2 ")]
    return [words[1:] for words in found]


def fragments(page: str) -> Iterator[tuple[str, set[str], list[str]]]:
    """Commands and flags inside sentences: the code, the flags there may be, and those that there are."""
    every = set().union(*FLAGS.values()) | FOREIGN
    for code in inline(page):
        command = re.search(r"(?:^|-m )ia2 ([a-z]+)", code)
        if command is not None:
            assert command[1] in COMMANDS, code
        elif not code.startswith("--"):
            continue
        words = re.split(r"(?:^|-m )ia2 ", code)[-1].split() if command else code.split()
        # `--adapter-…` stands for all that begin so
        flags = [word for word in words if word.startswith("-") and not word.endswith(("…", "-"))]
        yield code, FLAGS[command[1]] if command else every, flags


class _Reached(BaseException):
    """The command line was understood; no error, which the command line would tell."""


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Parses a command, settings and all, and stops before it does anything; gives the settings."""
    read: list[Any] = []

    def stop(*_: Any, **__: Any) -> None:
        raise _Reached

    def load(*arguments: Any) -> Any:
        read.append(load_config(*arguments))
        return read[-1]

    monkeypatch.setattr("ia2.cli.output.start", stop)
    monkeypatch.setattr(cli_options, "load_config", load)

    def parse(words: list[str], files: dict[str, str]) -> Any:
        words = list(words)
        if "--config" in words:
            place = words.index("--config") + 1
            if words[place] in files:
                file = tmp_path / words[place]
                file.write_text(files[words[place]])
            else:
                file = ROOT / words[place]
            words[place] = str(file)
        read.clear()
        try:
            main(words)
        except _Reached:
            pass
        except SystemExit:  # its line is among the captured output
            pytest.fail(f"refused: ia2 {shlex.join(words)}")
        return read[0] if read else None

    return parse


def yaml_files(page: str) -> dict[str, str]:
    """YAML blocks by the name in their first line."""
    found = {}
    for block in blocks(page, "yaml"):
        name = re.match(r"# ([\w.-]+\.yaml)", block)
        assert name is not None, f"{page}: the block does not begin with the name of its file: {block[:60]}"
        assert isinstance(yaml.safe_load(block), dict), f"{page}: {name[1]} is no mapping"
        found[name[1]] = block
    return found


def test_there_is_something_to_check() -> None:
    assert sum(len(commands(page)) for page in NAMES) > 20
    assert sum(len(list(fragments(page))) for page in NAMES) > 40
    assert any(yaml_files(page) for page in NAMES)


@pytest.mark.parametrize("page", NAMES)
def test_commands_are_understood(page: str, understood: Any) -> None:
    files = yaml_files(page)
    for words in commands(page):
        config = understood(words, files)
        if words[0] in ("train", "compare", "curve", "probe"):
            shown = " ".join(words)
            assert config.data, f"no --data: {shown}"
            assert words[0] == "probe" or config.output_dir, f"no --output-dir: {shown}"
            assert words[0] != "curve" or config.test_data, f"no --test-data: {shown}"


def grids(page: str) -> set[str]:
    """Files that are given to ``ia2 sweep``."""
    return {words[1] for words in commands(page) if words[0] == "sweep"}


@pytest.mark.parametrize("page", NAMES)
def test_yaml_files_are_used_by_a_command(page: str) -> None:
    # by which their keys and values are checked
    used = {words[words.index("--config") + 1] for words in commands(page) if "--config" in words}
    assert set(yaml_files(page)) <= used | grids(page)


@pytest.mark.parametrize("page", NAMES)
def test_grids_are_grids(page: str, tmp_path: Path) -> None:
    written = yaml_files(page)
    for name in grids(page):
        file = ROOT / name
        if name in written:
            file = tmp_path / name
            file.write_text(written[name])
        units = expand(load_grid(file))
        # where a comment says how many cells there are
        for count in re.findall(
            rf"^ia2 sweep {re.escape(name)} .*# (\d+) cells", text_of(page), re.MULTILINE
        ):
            assert sum(len(unit.cells) for unit in units) == int(count)


@pytest.mark.parametrize("page", NAMES)
def test_flags_in_sentences_exist(page: str) -> None:
    for code, known, flags in fragments(page):
        for flag in flags:
            assert flag in known, f"{flag} in: {code}"


@pytest.mark.parametrize("page", NAMES)
def test_python_is_python_and_its_names_are_public(page: str) -> None:
    for block in blocks(page, "python"):
        for line in ast.walk(ast.parse(block)):
            if isinstance(line, ast.ImportFrom) and line.module == "ia2":
                assert {alias.name for alias in line.names} <= set(ia2.__all__)


@pytest.mark.parametrize("page", NAMES)
def test_links_and_files_exist(page: str) -> None:
    here = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (here / name) if name else ROOT / page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target
    for code in inline(page):
        for name in re.findall(r"(?<![\w/])(?:src|tests|perf|scripts)/[\w./]+\.(?:py|json|md)\b", code):
            assert (ROOT / name).is_file(), name


def lower_bounds() -> dict[str, str]:
    """The lowest release of each package that a user's installation needs or can ask for."""
    extras = ("", "quantized", "report", "gguf", "cluster")
    found = {}
    for line in importlib.metadata.requires("ia2") or []:
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            found[needed.name] = str(needed.specifier).removeprefix(">=")
    return found


def test_the_lowest_releases_are_those_that_are_allowed() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    allowed = lower_bounds()
    assert sorted(pinned) == sorted(allowed)
    for name, low in allowed.items():
        release = pinned[name].split(".")
        assert release[: low.count(".") + 1] == low.split("."), f"{name}: {pinned[name]}, allowed from {low}"
        assert not any(map(int, release[low.count(".") + 1 :])), f"{name}: {pinned[name]} is not the lowest"


def test_the_readme_names_the_lowest_releases() -> None:
    allowed = lower_bounds()
    found = re.search(r"Python ≥ ([\d.]+), torch ≥ ([\d.]+), transformers ≥ ([\d.]+)\.", text_of("README.md"))
    assert found
    python = str(importlib.metadata.metadata("ia2")["Requires-Python"]).removeprefix(">=")
    assert (found[1], found[2]) == (python, allowed["torch"])
    assert allowed["transformers"].startswith(f"{found[3]}.")


def test_one_version() -> None:
    assert f"\nversion: {ia2.__version__}\n" in text_of("CITATION.cff")
    assert re.findall(r"^## (\d\S*)", text_of("CHANGELOG.md"), flags=re.MULTILINE)[0] == ia2.__version__
