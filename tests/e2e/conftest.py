"""Models, and runs of them that are watched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.benches import icl_base
from helpers.families import llama
from helpers.prompts import chatty
from watching import Runner, Watch

from ia2.models.load import BaseModel
from ia2.models.tokens import Ids
from ia2.prompts.context import Contexts
from ia2.training import trainer


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    found = Watch()
    fit = trainer.ExampleTrainer.fit

    def fitting(self: Any) -> float:
        found.stages.append(self)
        return fit(self)

    def asked(original: Callable[..., Ids]) -> Callable[..., Ids]:
        def context_ids(self: Any, i: int, k: int = 0) -> Ids:
            ids = original(self, i, k)
            if self.name == "teacher contexts":
                found.teacher[i] = ids
            elif self.name == "ICL prompts":
                found.others[self.queries[i].source] = ids
            return ids

        return context_ids

    monkeypatch.setattr(trainer.ExampleTrainer, "fit", fitting)
    monkeypatch.setattr(Contexts, "context_ids", asked(Contexts.context_ids))
    return found


@pytest.fixture(scope="module")
def small(tiny_icl_model_path: Path) -> BaseModel:
    """The small trained model, without a chat template."""
    return icl_base(tiny_icl_model_path)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], BaseModel]:
    """Tiny random models with a chat template: ``chatml``, or ``qwen`` with its switch for thinking."""
    known: dict[str, BaseModel] = {}

    def named(kind: str) -> BaseModel:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            tokenizer = chatty(kind)
            ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
            model = llama(vocab_size=len(tokenizer), max_position_embeddings=1024, **ends)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            known[kind] = icl_base(folder)
        return known[kind]

    return named


@pytest.fixture
def train(watch: Watch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(watch, tmp_path, capsys)
