"""Shared fixtures: a word-level tokenizer, tiny random models, the small trained model, shared data."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before transformers is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Whoever runs the tests may have mirrors of their own.
os.environ.pop("IA2_DATA_DIR", None)
# The models are tiny: a second thread only waits for the first.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
from helpers.words import make_word_tokenizer

from ia2.utils import logging as console

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


# The files that take longest, first: one that is begun last would keep a single process busy at the end.
_LONGEST = (
    "test_wrong_targets.py",
    "test_damage.py",
    "test_sweep_workers.py",
    "test_sweep_cluster.py",
    "test_finite.py",
    "test_contexts.py",
    "test_sweep_run.py",
    "test_wasted_work.py",
    "test_identity.py",
    "test_in_context_learner.py",
    "test_families.py",
    "test_launch.py",
    "test_resume.py",
    "test_startup.py",
    "test_sweep_failures.py",
    "test_selection.py",
    "test_unlabelled.py",
    "test_analyze.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; the order within a file stays."""
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True, scope="module")
def _imported_for_good() -> None:
    """What is imported by now is looked through no more: every stage of training ends with a collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _logging_as_imported() -> Iterator[None]:
    """Commands set up logging for themselves, in fixtures of a module too; tests read it through pytest."""
    _reset_logging()
    yield
    _reset_logging()


def _reset_logging() -> None:
    console.logger.handlers.clear()
    console.logger.propagate = True
    console.logger.disabled = False  # as logging.config leaves loggers that it does not know
    console.logger.setLevel(logging.NOTSET)
    logging.disable(logging.NOTSET)
    console.warn_once.cache_clear()


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer without special tokens around a text; its ids fit ``families``."""
    return make_word_tokenizer()


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """A fresh tiny random Llama (see ``families``), which the test may change."""
    from helpers.families import llama

    return llama()


@pytest.fixture(scope="session")
def tiny_icl_model_path() -> Path:
    """Folder of the small model, kept in the repository, that has learnt to learn in context."""
    path = Path(__file__).parent / "tiny_icl" / "model"
    if not (path / "config.json").is_file():
        pytest.skip(f"the small trained model is not in {path}")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the benchmarks' files: ``IA2_TEST_DATA``, else ``shared/data`` beside the repository."""
    given = os.environ.get("IA2_TEST_DATA")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no benchmark data in {path}; set IA2_TEST_DATA")
    return path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ia2 compare` leaves out its figure and its page: they take longer than what a tiny model does."""
    monkeypatch.setattr("ia2.report.figures.runs.try_summary_figure", lambda summary, folder: None)
    monkeypatch.setattr("ia2.report.page.try_report", lambda folder: None)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to lay data sets out in; `datasets` neither calls out nor writes elsewhere."""
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and benchmarks as files, for grids (see ``sweeping``), which no test may change."""
    from helpers.sweeping import write_files

    return write_files(tmp_path_factory.mktemp("files"))
