"""What a run with a context is watched for: what the teacher read, what the student did, what is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import rows_of
from helpers.command_line import run, tree, write_rows
from helpers.prompts import WORDS
from tiny_icl.tasks import sample_task

from ia2.models.capture import ActivationCapture
from ia2.models.forward import answer_pass
from ia2.models.load import BaseModel
from ia2.models.tokens import Ids
from ia2.training import trainer
from ia2.utils.files import read_json

TASK = sample_task(0, num_classes=2)
BRIEF = ["--align-epochs", 1, "--sft-epochs", 1, "--learning-rates", 0.01, "--selection", "dev"]

# what the small trained model can read: it knows few words
HINT = "a1 z2 z3 L1"


@dataclass
class Watch:
    """What a run did.

    Attributes:
        stages: what it trained, in order.
        teacher: prompts with context of the training examples, by their place.
        others: those of dev and test rows, by where the row comes from.
    """

    stages: list[trainer.ExampleTrainer] = field(default_factory=list)
    teacher: dict[int, Ids] = field(default_factory=dict)
    others: dict[str, Ids] = field(default_factory=dict)


def small_rows(count: int, seed: int = 0, hint: Callable[[int], Any] | None = None) -> list[dict[str, Any]]:
    """Rows of a task that the small model learns in context, with a hint each."""
    more = [{} if hint is None else {"hint": hint(i)} for i in range(count)]
    pairs = zip(TASK.examples(count, seed), more, strict=True)
    return [{"prompt": q, "completion": a, **columns} for (q, a), columns in pairs]


def chat_rows(count: int, hint: Callable[[int], Any] | None = None) -> list[dict[str, Any]]:
    """Rows whose labels have several tokens to the tokenizers with a chat template."""
    texts = [f"Text: {WORDS[i % 10]} {WORDS[i // 3 % 10]}\nLabel:" for i in range(count)]
    more = [{} if hint is None else {"hint": hint(i)} for i in range(count)]
    answers = (" negative", " positive")
    return [{"prompt": texts[i], "completion": answers[i % 2], **more[i]} for i in range(count)]


def plain(base: BaseModel, text: str) -> Ids:
    return tuple(base.tokenizer(text)["input_ids"])


def turn(base: BaseModel, text: str, before: str = "", thought: str = "") -> Ids:
    """A user turn that the assistant is to answer, written out."""
    whole = f"{before}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{thought}"
    return tuple(base.tokenizer(whole, add_special_tokens=False)["input_ids"])


def activations(base: BaseModel, prompts: Sequence[Ids], answers: Sequence[Ids]) -> list[torch.Tensor]:
    with ActivationCapture(base.model) as capture:
        pairs = list(zip(prompts, answers, strict=True))
        found = answer_pass(base.model, base.tokenizer, pairs, capture=capture, logits=False)
        by_index = {output.index: output.activations for output in found}
    return [by_index[i] for i in range(len(prompts))]  # type: ignore[misc]


def taught(watch: Watch, base: BaseModel, bare: Sequence[Ids]) -> list[tuple[Ids, Ids]]:
    """The teacher read contexts, and no student did; gives each training prompt without and with it.

    Args:
        watch: of one run.
        base: the same model, untouched.
        bare: the prompts of all rows as they must be without context.
    """
    assert [type(stage.loss).__name__ for stage in watch.stages] == ["AlignmentLoss", "AnswerLoss"]
    for stage in watch.stages:
        for rows in (rows_of(stage.train_dataset), rows_of(stage.eval_dataset)):
            assert rows and all(row.query in bare and row.context == () for row in rows)
    dataset = watch.stages[0].train_dataset
    rows, targets = rows_of(dataset), dataset.targets
    assert targets is not None
    prompts = [watch.teacher[i] for i in range(len(rows))]
    answers = [row.response or row.answer for row in rows]
    with_context = activations(base, prompts, answers)
    without = activations(base, [row.query for row in rows], answers)
    for i in range(len(rows)):
        target = targets.get(i)
        assert target is not None
        assert torch.allclose(target, with_context[i], atol=1e-4), "targets are of the prompt with context"
        assert not torch.allclose(target, without[i], atol=1e-2), "the context changes nothing"
    return [(row.query, prompt) for row, prompt in zip(rows, prompts, strict=True)]


def jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def used_again(watch: Watch, train: Callable[[], Any], out: Path, test: Path, capsys: Any) -> None:
    """The same command trains nothing, and the adapter in the folder predicts what the model did."""
    before, trained = tree(out), len(watch.stages)
    train()
    assert len(watch.stages) == trained and tree(out) == before
    watch.teacher.clear()
    watch.others.clear()
    known, file = jsonl(out / "predictions.jsonl"), out.parent / "predictions.jsonl"
    ran = run(capsys, "eval", "--adapter", out, "--data", test, "--output", file, "--json", "--quiet")
    assert ran.status == 0, ran.err
    figures, expected = ran.json["test"], read_json(out / "metrics.json")["test"]
    assert figures.keys() == expected.keys()
    for scope in {"vocabulary", "labels", "answer"} & figures.keys():
        assert figures[scope]["nll"]["value"] == pytest.approx(expected[scope]["nll"]["value"], rel=1e-4)
    # new rows have neither an answer nor a context
    new = write_rows(out.parent / "new.jsonl", [{"prompt": row["prompt"]} for row in jsonl(test)])
    ran = run(capsys, "predict", "--adapter", out, "--data", new, "--json", "--quiet")
    assert ran.status == 0, ran.err
    for found in (jsonl(file), ran.json):
        assert [row.get("predicted", row.get("label")) for row in found] == [
            row["predicted"] for row in known
        ]
        confidences = pytest.approx([row["confidence"] for row in known], rel=1e-4)
        assert [row["confidence"] for row in found] == confidences
    assert not watch.teacher and not watch.others, "predictions are made without context"


@dataclass
class Runner:
    """``ia2 train`` on rows, with everything asserted that holds for every context."""

    watch: Watch
    folder: Path
    capsys: Any

    def __call__(
        self,
        base: BaseModel,
        rows: Sequence[dict[str, Any]],
        test: Sequence[dict[str, Any]],
        *options: Any,
        bare: Callable[[BaseModel, str], Ids] = plain,
        again: bool = True,
    ) -> dict[Ids, Ids]:
        """Training prompts without context → with it; ``again`` uses the finished run too."""
        data, unseen = (
            write_rows(self.folder / f"{n}.jsonl", r) for n, r in (("rows", rows), ("test", test))
        )
        out = self.folder / "out"
        arguments = ["train", "--model", base.path, "--device", "cpu", "--data", data, "--test-data", unseen]
        arguments += ["--output-dir", out, "--quiet", *BRIEF, *options]

        def train() -> None:
            ran = run(self.capsys, *arguments)
            assert ran.status == 0, ran.err
            self.said = ran.err

        train()
        said = self.said
        prompts = dict(taught(self.watch, base, [bare(base, row["prompt"]) for row in rows]))
        if again:
            used_again(self.watch, train, out, unseen, self.capsys)
        self.said = said
        return prompts
