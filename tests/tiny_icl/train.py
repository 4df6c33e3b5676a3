"""Train the tiny causal language model in ``model/`` that learns in context.

The command that made the weights, from the root of the repository::

    python -m tests.tiny_icl.train --out tests/tiny_icl/model

Task.  Every training sequence is a fresh task of ``tasks.py``: a random map from 2 to 4 classes to
labels, then ``query label [separator] query label [separator] ...``.  The partition of surface
tokens into classes never changes, so the weights learn it; the map changes with every sequence,
so it has to be inferred from the earlier pairs.  The loss is on the label positions only.

Curriculum.  From a fresh start on the full task the model stays on the plateau of guessing among
the labels.  So the stages go from queries of one token with one surface token a class (where
matching a query with an earlier one is an exact repeat) to more surface tokens, then to longer
queries with fillers, and last to the separator token.  The early stages use more classes a task
(4 to 8), so that guessing pays less.  A stage ends when the running accuracy on predictable
labels (those whose class came up before in the sequence) passes a bar.  The last stage mixes
sequences with and without the separator token (both work afterwards), and the learning rate falls
to zero over the last part of the run.  In single trials, rates of 7e-4 and 1e-3 got
through; 1.5e-3 and 3e-3 were still on the first stage after a thousand steps.

Result.  On 300 tasks a cell, accuracy is 1.0 (2, 3 and 4 classes, argmax over the whole
vocabulary) with 4, 8, 12 and 16 demonstrations.  Without any, the eight labels are about equally
likely.  The model never emits EOS, so generate one token.

The run is deterministic for a given seed, machine and number of threads.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny_icl.tasks import (
    BOS,
    EOS,
    NUM_CLASSES_IN_USE,
    PAD,
    QUERY_LENGTHS,
    SEPARATOR,
    SURFACE_PER_CLASS,
    UNK,
    VOCABULARY,
    balanced,
    draw_task,
    sample_task,
)

IDS = {token: i for i, token in enumerate(VOCABULARY)}
MAX_DEMONSTRATIONS = 16
IGNORE = -100

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum."""

    num_classes: tuple[int, ...]  # a task uses one of these numbers of classes
    surface: int  # surface tokens a class
    lengths: tuple[int, ...]  # tokens a query
    separator_share: float  # share of sequences with the separator token
    bar: float  # running accuracy that ends the stage


EARLY = (4, 5, 6, 7, 8)  # with many classes, guessing pays less and matching more
STAGES = (
    Stage(EARLY, 1, (1,), 0.0, 0.90),
    Stage(EARLY, 2, (1,), 0.0, 0.90),
    Stage(EARLY, SURFACE_PER_CLASS, (1,), 0.0, 0.93),
    Stage(EARLY, SURFACE_PER_CLASS, (1, 2), 0.0, 0.93),
    Stage(EARLY, SURFACE_PER_CLASS, (2, 3), 0.0, 0.93),
    Stage(NUM_CLASSES_IN_USE, SURFACE_PER_CLASS, QUERY_LENGTHS, 0.0, 0.93),
    Stage(NUM_CLASSES_IN_USE, SURFACE_PER_CLASS, QUERY_LENGTHS, 0.75, 2.0),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; ``SEPARATOR`` is a token of its own; BOS is put in front."""
    tokenizer = Tokenizer(WordLevel(IDS, unk_token=UNK))
    tokenizer.pre_tokenizer = PreTokenizers([Split(Regex(r"\n+"), "isolated"), Split(Regex(" +"), "removed")])
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, IDS[BOS])])
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, model_max_length=512)


def build_model(hidden_size: int = 64) -> LlamaForCausalLM:
    """A fresh model; its weights come from torch's global generator. 128: about a million of them."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            initializer_range=0.08,
            tie_word_embeddings=False,
            bos_token_id=IDS[BOS],
            eos_token_id=IDS[EOS],
            pad_token_id=IDS[PAD],
        )
    )


def make_batch(rng: random.Random, stage: Stage, batch_size: int) -> Batch:
    """Inputs, targets at the label positions, and which of those labels are predictable."""
    rows: list[tuple[list[int], list[int], list[bool]]] = []
    pairs = MAX_DEMONSTRATIONS + 1
    for _ in range(batch_size):
        task = draw_task(rng, rng.choice(stage.num_classes))
        separator = [IDS[SEPARATOR]] if rng.random() < stage.separator_share else []
        count = len(task.classes)
        if rng.random() < 0.5:
            order = balanced(count, pairs, rng)
        else:
            order = [rng.randrange(count) for _ in range(pairs)]
        tokens, targets, known = [IDS[BOS]], [IGNORE], [False]
        seen: set[int] = set()
        for which in order:
            query = task.query(which, rng, surface=stage.surface, lengths=stage.lengths)
            label = IDS[task.labels[which]]
            tokens += [IDS[token] for token in query] + [label] + separator
            targets += [IGNORE] * (len(query) - 1) + [label] + [IGNORE] * (1 + len(separator))
            known += [False] * (len(query) - 1) + [which in seen] + [False] * (1 + len(separator))
            seen.add(which)
        rows.append((tokens, targets, known))
    width = max(len(tokens) for tokens, _, _ in rows)
    fills = (IDS[PAD], IGNORE, False)
    columns = zip(*rows, strict=True)
    tensors = [
        torch.tensor([row + [fill] * (width - len(row)) for row in column])
        for column, fill in zip(columns, fills, strict=True)
    ]
    return tensors[0], tensors[1], tensors[2]


def label_steps(
    model: Any,
    steps: int,
    rate: Callable[[int], float],
    batch: Callable[[], Batch],
    hidden: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[int, float, float]]:
    """Steps of AdamW on the labels of batches: number, loss, share of predictable labels that were right."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        tokens, targets, known = batch()
        at_label = targets != IGNORE
        logits, labels = model.lm_head(hidden(tokens)[at_label]), targets[at_label]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step, loss.item(), (logits.argmax(-1) == labels)[known[at_label]].float().mean().item()


def train(model: Any, *, steps: int, batch_size: int, lr: float, decay: float, seed: int) -> None:
    """Train ``model`` in place, with the curriculum in ``STAGES``."""
    rng = random.Random(f"training {seed}")
    stage, running, start = 0, 0.0, time.perf_counter()
    model.train()

    def rate(step: int) -> float:
        return lr * min(1.0, step / 100, (steps - step + 1) / (decay * steps))

    def batch() -> Batch:
        return make_batch(rng, STAGES[stage], batch_size)

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = model.model(input_ids=tokens).last_hidden_state
        return states

    for step, loss, right in label_steps(model, steps, rate, batch, hidden):
        running = 0.95 * running + 0.05 * right
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}  stage {stage}  loss {loss:.4f}  accuracy {running:.3f}  {seconds:.0f} s")
        if running > STAGES[stage].bar:
            stage, running = stage + 1, 0.0
            print(f"step {step}: on to stage {stage}", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, num_classes: int, demonstrations: int, separator: str) -> float:
    """Share of 300 queries answered right (argmax over the vocabulary), one query a task, as text."""
    right = 0
    for seed in range(300):
        task = sample_task(1_000_000 + seed, num_classes)
        demos = task.examples(demonstrations, 2 * seed)
        query, answer = task.examples(1, 2 * seed + 1)[0]
        text = "".join(x + y + separator for x, y in demos) + query
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        target = tokenizer(answer, add_special_tokens=False)["input_ids"]
        right += int(model(input_ids=ids).logits[0, -1].argmax().item() == target[0])
    return right / 300


def settings(about: str, **defaults: Any) -> argparse.Namespace:
    """The command line of a training script; torch is set up as it says."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    for name, value in {**defaults, "batch_size": 64, "seed": 0}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options


def main() -> None:
    """Train, report, save."""
    options = settings(__doc__ or "", hidden_size=64, steps=2000, lr=7e-4, decay=0.4, threads=2)
    tokenizer, model = build_tokenizer(), build_model(options.hidden_size)
    how = {"steps": options.steps, "lr": options.lr, "decay": options.decay, "seed": options.seed}
    train(model, batch_size=options.batch_size, **how)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    for separator in (SEPARATOR, " "):
        print(f"accuracy by number of demonstrations, separator {separator!r}")
        for classes in NUM_CLASSES_IN_USE:
            found = {n: accuracy(model, tokenizer, classes, n, separator) for n in (0, 2, 4, 8, 12, 16)}
            cells = "  ".join(f"{n}: {value:.3f}" for n, value in found.items())
            print(f"  {classes} classes  {cells}", flush=True)


if __name__ == "__main__":
    main()
