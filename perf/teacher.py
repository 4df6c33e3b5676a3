"""Speed of the teacher pass, of ICL evaluation and of a training step, against naive references.

    python perf/teacher.py                      # everything, on the demo model (about 30 minutes, 2 cores)
    python perf/teacher.py --part teacher evaluation step
    python perf/teacher.py --model PATH --examples 2 --answer-tokens 8 --queries 8 --demonstrations 4

The references do what a first script does: one full forward pass for each answer token, batch 1, no
cache; the full prompt again for each evaluated query. Both sides run in the same process with the same
threads, and their results are compared, so a fast answer that is wrong does not count. Ratios are
printed as JSON; `--output FILE` writes them with machine and versions.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ia2.adapter_weights import attach, base_weights
from ia2.adapters import peft_config
from ia2.batches import AnswerDataset, Row
from ia2.capture import ActivationCapture
from ia2.config_sections import AdapterConfig
from ia2.context import Contexts
from ia2.demo import COMPLETION_TEMPLATE, LABEL_MAP, PROMPT_TEMPLATE, demo_data
from ia2.evaluation.scoring import score_labels
from ia2.examples import Example, Examples, RowFormat
from ia2.files import read_json, write_json
from ia2.models import BaseModel, load_base
from ia2.runs import machine, versions
from ia2.targets import MemoryTargets, TeacherAnswer
from ia2.task import Task
from ia2.teacher import Teacher
from ia2.tokens import Ids, encode_answer
from ia2.trainer import AlignTrainer, SftTrainer, StageSettings


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


# ------------------------------------------------------------------------------------ teacher pass


@dataclass
class NaiveStep:
    """One full forward pass: of which example and answer token, what it says, how long it took."""

    example: int
    place: int
    token: int
    activations: torch.Tensor  # [L, d]
    seconds: float


def naive_teacher(model: Any, prompts: Sequence[Ids], answers: Sequence[Ids], stride: int) -> list[NaiveStep]:
    """Next token and attention outputs, one full forward pass for each (stride-th) answer token.

    What stands before a token is taken from ``answers``; where the tokens agree, that is what the
    reference itself would have written.
    """
    steps = []
    for example, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        for place in range(0, len(answer), stride):
            ids = torch.tensor([prompt + answer[:place]])
            began = time.perf_counter()
            with torch.no_grad(), ActivationCapture(model) as capture:
                output = model(input_ids=ids, use_cache=False)
                activations = torch.stack([layer[0, -1] for layer in capture.take().values()])
            token = int(output.logits[0, -1].argmax())
            steps.append(NaiveStep(example, place, token, activations, time.perf_counter() - began))
    return steps


def measure_teacher(base: BaseModel, examples: int, tokens: int, context: int, stride: int) -> dict[str, Any]:
    """Ours against naive: contexts of about ``context`` tokens, answers of exactly ``tokens``.

    With a stride, the reference is timed at every stride-th answer token and its time multiplied.
    """
    rows = long_examples(base, examples, context)
    # no end of sequence and no stop text, so that every answer has the same length on both sides
    base.model.generation_config.eos_token_id = None
    tokenizer = base.tokenizer
    eos, tokenizer.eos_token = tokenizer.eos_token, None
    contexts = Contexts.leave_one_out(tokenizer, rows, max_length=base.max_length, reserve=tokens + 16)
    lengths = [len(contexts.context_ids(i)) for i in range(len(rows))]
    teacher = Teacher(base.model, tokenizer, max_answer_tokens=tokens)
    ours, targets = timed(lambda: teacher.to_memory(contexts))
    prompts = [contexts.context_ids(i) for i in range(len(rows))]
    answers = [answer.ids for answer in targets.answers]
    naive = naive_teacher(base.model, prompts, answers, stride)
    theirs = stride * sum(step.seconds for step in naive)
    tokenizer.eos_token = eos
    same = sum(step.token == answers[step.example][step.place] for step in naive)
    gap = max(
        float(
            (targets.get(step.example)[:, step.place] - step.activations).abs().max()
            / step.activations.abs().max()
        )
        for step in naive
    )
    return {
        "examples": len(rows),
        "answer_tokens": tokens,
        "context_tokens": [min(lengths), max(lengths)],
        "seconds": ours,
        "naive_seconds": theirs,
        "ratio": theirs / ours,
        "naive_timed_every": stride,
        "same_tokens": f"{same} of {len(naive)}",
        "largest_relative_difference": gap,
    }


def long_examples(base: BaseModel, count: int, context: int) -> Examples:
    """Labelled rows joined until ``count − 1`` of them make up about ``context`` tokens."""
    texts = demo_rows("train") + demo_rows("test")
    per_example = context // (count - 1)
    rows: list[Example] = []
    pieces = iter(texts)
    while len(rows) < count:
        query = ""
        while not query or len(encode_answer(base.tokenizer, query)) < per_example - 8:
            query += next(pieces).fields["text"] + " "
        rows.append(Example(f"Text: {query.strip()}\nLabel:", " music", f"row:{len(rows) + 1}"))
    return Examples(rows, name="long rows")


def demo_rows(split: str) -> list[Example]:
    """The packaged rows as the demo renders them."""
    rows = RowFormat(PROMPT_TEMPLATE, COMPLETION_TEMPLATE, LABEL_MAP)
    return list(Examples.from_file(demo_data(split), format=rows))


# ---------------------------------------------------------------------------------- ICL evaluation


def measure_evaluation(base: BaseModel, queries: int, demonstrations: int) -> dict[str, Any]:
    """Ours against the full prompt for each query, batch 1."""
    shown = Examples(demo_rows("train")[:demonstrations])
    asked = Examples((demo_rows("test") + demo_rows("train")[demonstrations:])[:queries])
    labels = tuple(f" {word}" for word in sorted(LABEL_MAP.values()))
    ids = tuple(encode_answer(base.tokenizer, label) for label in labels)
    task = Task("classification", labels, ids, labels, max_answer_tokens=max(map(len, ids)))

    def ours() -> list[int]:
        contexts = Contexts.pool(base.tokenizer, asked, shown, max_length=base.max_length, reserve=1)
        prompts = [contexts.context_ids(i) for i in range(len(asked))]
        scores = score_labels(base.model, base.tokenizer, task, prompts)
        return [int(token) for token in scores.top_token]

    def naive() -> list[int]:
        contexts = Contexts.pool(base.tokenizer, asked, shown, max_length=base.max_length, reserve=1)
        found = []
        for i in range(len(asked)):
            with torch.no_grad():
                output = base.model(input_ids=torch.tensor([contexts.context_ids(i)]), use_cache=False)
            found.append(int(output.logits[0, -1].argmax()))
        return found

    seconds, tokens = timed(ours)
    naive_seconds, naive_tokens = timed(naive)
    return {
        "queries": len(asked),
        "demonstrations": len(shown),
        "seconds": seconds,
        "naive_seconds": naive_seconds,
        "ratio": naive_seconds / seconds,
        "same_answers": f"{sum(a == b for a, b in zip(tokens, naive_tokens, strict=True))} of {len(asked)}",
    }


# ----------------------------------------------------------------------------------- training step


def measure_step(base: BaseModel, steps: int) -> dict[str, Any]:
    """Median seconds of an alignment step and of an SFT step on the same batch, taken in turn."""
    model = attach(base.model, peft_config(base.model, AdapterConfig()), seed=0)
    examples = demo_rows("train")[:4]
    rows = [
        Row(tuple(base.tokenizer(e.query)["input_ids"]), encode_answer(base.tokenizer, e.answer or ""))
        for e in examples
    ]
    with base_weights(model), ActivationCapture(model) as capture:
        layers = capture.layers
    width = base.model.config.get_text_config().hidden_size
    targets = MemoryTargets(layers)
    for i, row in enumerate(rows):
        targets.add(i, 0, torch.randn(len(layers), len(row.answer), width))
    targets.finish([TeacherAnswer(row.answer, "") for row in rows])
    with tempfile.TemporaryDirectory() as scratch:
        settings = StageSettings(Path(scratch), batch_size=len(rows))
        nothing = AnswerDataset.of([])
        align = AlignTrainer(model, AnswerDataset.of(rows, targets), nothing, settings, base.tokenizer)
        sft = SftTrainer(model, AnswerDataset.of(rows), nothing, settings, base.tokenizer)
        seconds: dict[str, list[float]] = {"align": [], "sft": []}
        for trainer in (align, sft):
            trainer.create_optimizer()
        for step in range(steps + 2):
            for name, trainer in (("align", align), ("sft", sft)):
                batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])

                def one_step(trainer: Any = trainer, batch: Any = batch) -> None:
                    trainer.training_step(model, batch)
                    trainer.optimizer.step()
                    model.zero_grad()

                took, _ = timed(one_step)
                if step >= 2:  # the first steps allocate
                    seconds[name].append(took)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "rows": len(rows),
        "steps": steps,
        "align_seconds": median["align"],
        "sft_seconds": median["sft"],
        "ratio": median["align"] / median["sft"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", default=["teacher", "evaluation", "step"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--context-tokens", type=int, default=500)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--demonstrations", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--naive-stride", type=int, default=1, help="time every n-th naive pass (teacher)")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    results: dict[str, Any] = {"model": given.model, "machine": machine(), "versions": versions()}
    # each part on a model of its own: adapters and generation settings do not carry over
    if "evaluation" in given.part:
        results["evaluation"] = measure_evaluation(
            load_base(given.model), given.queries, given.demonstrations
        )
        print("evaluation", results["evaluation"], flush=True)
    if "step" in given.part:
        results["step"] = measure_step(load_base(given.model), given.steps)
        print("step", results["step"], flush=True)
    if "teacher" in given.part:
        results["teacher"] = measure_teacher(
            load_base(given.model),
            given.examples,
            given.answer_tokens,
            given.context_tokens,
            given.naive_stride,
        )
        print("teacher", results["teacher"], flush=True)
    if given.output:
        # parts that were measured by themselves come together in one file
        known = read_json(given.output) if given.output.is_file() else {}
        write_json(given.output, {**known, **results})


if __name__ == "__main__":
    main()
