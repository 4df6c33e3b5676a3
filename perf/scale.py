"""What a model of a given shape needs on so many GPUs: memory, disk and hours, by arithmetic alone.

    python perf/scale.py                              # the tables of docs/scale.md
    python perf/scale.py --examples 16 --query-tokens 60 --answer-tokens 1
    python perf/scale.py --share .3 --memory 141      # another share of the matrix rate, another GPU

Nothing here was measured on a GPU. `--share` is assumed: the part of the GPU's matrix rate that passes reach.
Bytes of activations are those that torch keeps for the backward pass of a Llama with LoRA on q, k and o in
bfloat16 (tests/project/test_scale.py counts them on a small one).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

GPUS = (1, 2, 4, 8, 16, 32, 64)
HOST = 8
"""GPUs of one machine; beyond, shards come over the network."""


@dataclass(frozen=True)
class Shape:
    """Of a Llama: what its configuration says."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        attention = self.width * self.head * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.inner + 2 * self.width

    @property
    def rest(self) -> int:
        """Weights of embedding, head and last norm, which are whole on every GPU."""
        return 2 * self.vocabulary * self.width + self.width

    @property
    def weights(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.rest

    def adapter(self, rank: int = 8) -> int:
        """Weights of LoRA on q, k and o."""
        sides = 2 * (self.width + self.heads * self.head) + self.width + self.kv_heads * self.head
        return self.layers * rank * sides

    def activations(self) -> int:
        """Bytes of one token and layer that the backward pass needs."""
        return 25 * self.width + 6 * self.inner + 4 * self.kv_heads * self.head

    def cache(self) -> int:
        """Bytes of one token's keys and values, all layers."""
        return 2 * self.layers * self.kv_heads * self.head * 2

    def target(self) -> int:
        """Bytes of one answer token's targets: L·d numbers of two bytes."""
        return self.layers * self.width * 2


SHAPES = (
    Shape("8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Shape("70B", 80, 8192, 28672, 64, 8, 128, 128256),
    Shape("405B", 126, 16384, 53248, 128, 8, 128, 128256),
)


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        examples: training examples; half as many dev rows, at most 48.
        query: tokens of a query, and with its answer of a demonstration less the answer.
        answer: tokens of an answer.
        test: test rows, each answered once without demonstrations.
        epochs: of each of the two stages.
        batch: examples of an optimiser step.
    """

    examples: int = 64
    query: int = 150
    answer: int = 100
    test: int = 500
    epochs: int = 10
    batch: int = 16

    @property
    def dev(self) -> int:
        """Dev rows."""
        return min(self.examples // 2, 48)

    @property
    def row(self) -> int:
        """Tokens of a training row."""
        return self.query + self.answer

    @property
    def context(self) -> int:
        """Tokens of a leave-one-out context with its query."""
        return (self.examples - 1) * self.row + self.query


@dataclass(frozen=True)
class Machine:
    """A GPU: bytes of memory, matrix rate and the share of it that is reached, bytes a second.

    Attributes:
        memory: bytes.
        rate: multiplications and additions a second, in bfloat16.
        share: of the rate.
        bandwidth: of its memory.
        near: of the links in a machine.
        far: of the network, for each GPU.
    """

    memory: float = 80e9
    rate: float = 989e12
    share: float = 0.4
    bandwidth: float = 3.35e12
    near: float = 450e9
    far: float = 50e9


@dataclass(frozen=True)
class Need:
    """What one GPU needs, in bytes, and how long all of them take, in hours.

    Attributes:
        weights: of the model: whole, or shards, what is never sharded, and two layers that are gathered.
        adapter: LoRA in float32, its gradient and Adam's two moments.
        step: activations of its part of an optimiser step, every layer's.
        step_checkpointed: with activation checkpointing: each layer's input, and all of one layer.
        teacher: keys and values of one context, twice, and the pass over it.
        hours: teacher, training, evaluation.
    """

    weights: float
    adapter: float
    step: float
    step_checkpointed: float
    teacher: float
    hours: tuple[float, float, float]

    @property
    def training(self) -> float:
        """Peak of training, with activation checkpointing."""
        return self.weights + self.adapter + self.step_checkpointed

    @property
    def teaching(self) -> float:
        """Peak of the teacher pass."""
        return self.weights + self.adapter + self.teacher


def need(shape: Shape, gpus: int, job: Job, machine: Machine, sharded: bool) -> Need:
    """What a job needs of each of so many GPUs."""
    weights = 2.0 * shape.weights
    if sharded:
        weights = 2.0 * (shape.layers * shape.layer / gpus + shape.rest + 2 * shape.layer)
    rows = -(-job.batch // gpus)
    tokens = rows * job.row
    kept = tokens * shape.activations()
    # logits of the answers in float32, with their gradient
    head = 8.0 * rows * job.answer * shape.vocabulary
    teacher = 2 * job.context * shape.cache() + job.context * (25 * shape.width + 6 * shape.inner)
    return Need(
        weights,
        16.0 * shape.adapter(),
        shape.layers * kept + head,
        shape.layers * tokens * shape.width * 2 + kept + head,
        teacher,
        hours(shape, gpus, job, machine, sharded),
    )


def hours(shape: Shape, gpus: int, job: Job, machine: Machine, sharded: bool) -> tuple[float, float, float]:
    """Teacher, training (both stages, activation checkpointing) and evaluation."""
    speed = machine.rate * machine.share
    # what one GPU receives in a pass over a model in shards
    link = machine.near if gpus <= HOST else machine.far
    gather = 2 * shape.layers * shape.layer * (1 - 1 / gpus) / link if sharded else 0.0

    def passes(count: float, tokens: float, times: float, context: float) -> float:
        """Seconds of a share of `count` passes over `tokens`; times: forward passes that one is worth."""
        multiply = 2 * tokens * (shape.weights + shape.layers * shape.width * context)
        return count * times * max(multiply / speed, gather)

    def decode(count: float, batch: float) -> float:
        """Seconds to write a share of `count` answers, `batch` at once: every token reads all weights."""
        read = 2 * shape.weights / machine.bandwidth
        return -(-count // batch) * job.answer * max(read, gather)

    own = -(-job.examples // gpus)
    # with answers of several tokens: a pass to generate behind, and one that captures
    prefills = 2 if job.answer > 1 else 1
    dev, test = -(-job.dev // gpus), -(-job.test // gpus)
    teacher = passes(own * prefills, job.context, 1, job.context / 2)
    teacher += passes(prefills, job.context + dev * job.row, 1, job.context / 2)
    rows = -(-job.batch // gpus)
    steps = 2 * job.epochs * -(-job.examples // job.batch)
    # forward, again in the backward pass, and the gradient of the inputs; weights have none
    train = passes(steps, rows * job.row, 3, job.row / 2)
    train += passes(2 * job.epochs * 4, job.dev * job.row, 1, job.row / 2)
    evaluate = passes(1, (test + dev) * job.row, prefills, job.row / 2)
    if job.answer > 1:
        teacher += decode(own, 16) + decode(dev, 16)
        evaluate += decode(test + dev, 64)
    return teacher / 3600, train / 3600, evaluate / 3600


def disk(shape: Shape, job: Job) -> dict[str, float]:
    """Bytes in the run's folder: the teacher's targets, and adapters with a checkpoint's moments."""
    targets = (job.examples + job.dev) * job.answer * shape.target()
    return {"targets": targets, "adapters": 4.0 * shape.adapter() * (3 + 2 * 4)}


def tables(job: Job, machine: Machine, gpus: Sequence[int] = GPUS) -> str:
    """What is printed."""
    lines = [
        f"{job.examples} examples of {job.query} + {job.answer} tokens, {job.dev} dev, {job.test} test rows; "
        f"batch {job.batch}, {job.epochs} epochs;",
        f"GPUs of {machine.memory / 1e9:.0f} GB that are assumed to reach {machine.share:.0%} of "
        f"{machine.rate / 1e12:.0f} TFLOP/s",
        "",
        "       weights  adapter+Adam  KV cache/token  kept/token  recomputed/token   targets  adapters",
    ]
    for shape in SHAPES:
        space = disk(shape, job)
        kept, again = shape.layers * shape.activations(), shape.layers * shape.width * 2
        lines.append(
            f"{shape.name:<5}{gigabytes(2 * shape.weights)}{gigabytes(16 * shape.adapter(), 14)}"
            f"{shape.cache() / 1e3:>13.0f} kB{kept / 1e6:>9.1f} MB{again / 1e6:>15.2f} MB"
            f"{gigabytes(space['targets'], 10)}{gigabytes(space['adapters'], 10)}"
        )
    lines += ["", f"{'':<22}memory of one GPU{'':<20}hours"]
    lines += ["model  GPUs  how    weights  training   teacher  fits   teacher  training  evaluation"]
    for shape in SHAPES:
        for count in gpus:
            for name in ("ddp", "fsdp2") if count > 1 else ("one",):
                found = need(shape, count, job, machine, name == "fsdp2")
                peak = max(found.training, found.teaching)
                if name == "ddp" and peak > machine.memory:
                    continue
                fits = peak < 0.9 * machine.memory
                times = "".join(f"{value:>10.3f}" for value in found.hours) if fits else ""
                memory = "".join(gigabytes(v, 10) for v in (found.weights, found.training, found.teaching))
                lines.append(
                    f"{shape.name:<6}{count:>5}  {name:<5}{memory}  {'yes' if fits else 'no':<4}{times}"
                )
    return "\n".join(line.rstrip() for line in lines)


def gigabytes(value: float, width: int = 9) -> str:
    """In words, on the right of so many places."""
    return f"{f'{value / 1e9:.1f} GB':>{width}}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    job, machine = Job(), Machine()
    parser.add_argument("--examples", type=int, default=job.examples)
    parser.add_argument("--query-tokens", type=int, default=job.query)
    parser.add_argument("--answer-tokens", type=int, default=job.answer)
    parser.add_argument("--test", type=int, default=job.test)
    parser.add_argument("--epochs", type=int, default=job.epochs)
    parser.add_argument("--batch", type=int, default=job.batch)
    parser.add_argument("--memory", type=float, default=machine.memory / 1e9, help="GB of one GPU")
    parser.add_argument("--rate", type=float, default=machine.rate / 1e12, help="TFLOP/s of one GPU")
    parser.add_argument("--share", type=float, default=machine.share, help="of the rate that is reached")
    given = parser.parse_args()
    print(
        tables(
            Job(
                given.examples, given.query_tokens, given.answer_tokens, given.test, given.epochs, given.batch
            ),
            Machine(given.memory * 1e9, given.rate * 1e12, given.share),
        )
    )


if __name__ == "__main__":
    main()
