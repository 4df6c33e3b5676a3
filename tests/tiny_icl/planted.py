"""Train the tiny model in ``planted_model/``, in which one known head carries all that demonstrations say.

The command that made the weights, from the root of the repository::

    python -m tests.tiny_icl.planted --out tests/tiny_icl/planted_model

What is planted.  Head ``HEAD`` of layer ``LAYER`` alone can bring anything from the demonstrations to the
position that answers, by construction and not by training:

- Queries have ``QUERY_LENGTH`` tokens, and ``SEPARATOR`` stands between demonstrations. The layer before
  ``LAYER`` sees ``WINDOW`` positions: a label sees its whole query, and the last token of a query sees its
  own query and the separator before it, which says nothing.
- From ``LAYER`` on every head sees everything, but all heads except the planted one are *bystanders*: they
  write only into the last ``RESERVED`` features of the residual stream, which nothing reads any more. Their
  outputs change a lot when demonstrations come, and change nothing (but what the norms divide by, a little).

The heads of the first layer gather the class, in labels and at the end of queries: they work hard at the
answer position, and do nearly the same there with and without demonstrations.

Training.  In the model in ``model/``, this head with the first layer answers nearly all queries when all
others are silent (head 0 of the layer does so too); a few steps with the construction in place mend the
rest. Half of the batches are computed without one of the first layer's heads, drawn at random, so that no
single one of them is needed afterwards. The weights are rounded to bfloat16.

Result.  On 300 tasks of 3 classes with 12 demonstrations: accuracy 1.0, also without any one of the other
heads; without the planted head what it is without demonstrations, about 1 in 6.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, MinistralConfig, MinistralForCausalLM

from tests.tiny_icl.tasks import (
    BOS,
    NUM_CLASSES_IN_USE,
    SEPARATOR,
    SURFACE_PER_CLASS,
    balanced,
    sample_task,
)
from tests.tiny_icl.train import IDS, Batch, Stage, label_steps, make_batch, settings

LAYER, HEAD = 1, 3
QUERY_LENGTH = 4
WINDOW = QUERY_LENGTH + 1
RESERVED = 8
BYSTANDERS = 0.1  # standard deviation of what they write with

STAGE = Stage(NUM_CLASSES_IN_USE, SURFACE_PER_CLASS, (QUERY_LENGTH,), 1.0, 2.0)


def build_model(source: Path) -> MinistralForCausalLM:
    """The model of ``source`` with windows in its first layers (Ministral is Llama with windows by layer)."""
    given = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    old = given.config
    kinds = ["sliding_attention" if i < LAYER else "full_attention" for i in range(old.num_hidden_layers)]
    config = MinistralConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        rms_norm_eps=old.rms_norm_eps,
        max_position_embeddings=old.max_position_embeddings,
        tie_word_embeddings=False,
        sliding_window=WINDOW,
        layer_types=kinds,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    model = MinistralForCausalLM(config)
    model.load_state_dict(given.state_dict())
    return model


def head_columns(model: Any, head: int) -> slice:
    """Where a head's output stands in the input of its layer's output projection."""
    width = model.config.hidden_size // model.config.num_attention_heads
    return slice(head * width, (head + 1) * width)


def bystanders(model: Any) -> list[torch.Tensor]:
    """What the bystanders of each layer from ``LAYER`` on write with: fixed random columns."""
    generator = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    count = model.config.num_hidden_layers - LAYER
    return [torch.randn(RESERVED, width, generator=generator) * BYSTANDERS for _ in range(count)]


@torch.no_grad()
def hold(model: Any, written: Sequence[torch.Tensor]) -> None:
    """Put the construction back after a step of training."""
    for layer, fixed in zip(model.model.layers[LAYER:], written, strict=True):
        projection = layer.self_attn.o_proj.weight
        planted = layer is model.model.layers[LAYER]
        keep = torch.zeros(projection.shape[1], dtype=torch.bool)
        if planted:
            keep[head_columns(model, HEAD)] = True
        projection[:-RESERVED, ~keep] = 0
        projection[-RESERVED:] = fixed
        projection[-RESERVED:, keep] = 0
        for reader in (layer.mlp.gate_proj, layer.mlp.up_proj):
            reader.weight[:, -RESERVED:] = 0
        if not planted:
            for reader in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                reader.weight[:, -RESERVED:] = 0
    model.lm_head.weight[:, -RESERVED:] = 0


@contextmanager
def without_head(model: Any, layer: int, head: int) -> Iterator[None]:
    """One head writes nothing, at any position."""
    columns = head_columns(model, head)

    def silence(module: Any, args: Any) -> Any:
        changed = args[0].clone()
        changed[..., columns] = 0
        return (changed,)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def train(model: Any, *, steps: int, batch_size: int, lr: float, decay: float, seed: int) -> None:
    """Train in place; see the module's text."""
    rng = random.Random(f"planted {seed}")
    written = bystanders(model)
    hold(model, written)
    running, start = 0.0, time.perf_counter()

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        dropped = rng.randrange(2 * model.config.num_attention_heads)
        with without_head(model, 0, dropped // 2) if dropped % 2 else nullcontext():
            states: torch.Tensor = model.model(input_ids=tokens).last_hidden_state
        return states

    def rate(step: int) -> float:
        return lr * min(1.0, step / 20, (steps - step + 1) / (decay * steps))

    def batch() -> Batch:
        return make_batch(rng, STAGE, batch_size)

    for step, loss, right in label_steps(model, steps, rate, batch, hidden):
        hold(model, written)
        running = 0.95 * running + 0.05 * right
        if step % 25 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}  loss {loss:.4f}  accuracy {running:.3f}  {seconds:.0f} s", flush=True)
    model.eval()


def planted_examples(count: int, seed: int, task: int = 0, num_classes: int = 3) -> list[tuple[str, str]]:
    """``count`` pairs of query and answer text of a task, as the planted model was trained on."""
    rng = random.Random(f"planted examples {task} {seed}")
    drawn = sample_task(task, num_classes)
    return [
        (" ".join(drawn.query(which, rng, lengths=(QUERY_LENGTH,))), drawn.answers[which])
        for which in balanced(num_classes, count, rng)
    ]


@torch.no_grad()
def accuracy(model: Any, *, demonstrations: int = 12, tasks: int = 300, num_classes: int = 3) -> float:
    """Share of queries answered right (argmax over the vocabulary), one query a task."""
    rows, answers = [], []
    for task in range(1_000_000, 1_000_000 + tasks):
        demos = planted_examples(demonstrations, 1, task, num_classes)
        query, answer = planted_examples(1, 2, task, num_classes)[0]
        words = [BOS]
        for x, y in demos:
            words += [*x.split(), y.strip(), SEPARATOR]
        rows.append([IDS[word] for word in [*words, *query.split()]])
        answers.append(IDS[answer.strip()])
    found = model(input_ids=torch.tensor(rows), logits_to_keep=1).logits[:, -1].argmax(-1)
    return float((found == torch.tensor(answers)).float().mean())


def main() -> None:
    """Train, report, save."""
    source = Path(__file__).parent / "model"
    args = settings(__doc__ or "", steps=300, lr=5e-4, decay=0.5, threads=1)
    model = build_model(source)
    train(model, steps=args.steps, batch_size=args.batch_size, lr=args.lr, decay=args.decay, seed=args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(source).save_pretrained(args.out)
    model.to(torch.float32)
    print(f"accuracy {accuracy(model):.3f}; without demonstrations {accuracy(model, demonstrations=0):.3f}")
    for layer in range(model.config.num_hidden_layers):
        cells = []
        for head in range(model.config.num_attention_heads):
            with without_head(model, layer, head):
                cells.append(f"{accuracy(model):.3f}")
        print(f"layer {layer} without head 0 … : " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
