"""Speed of ia2 beside a naive reference, TRL's step and the floor: JSON and a table, by one command.

    python perf/run.py                                     # every row (more than an hour on one core)
    python perf/run.py --rows evaluation steps-short --repeat 1
    python perf/run.py --against ../old/src --rows demo predict memory      # and an older ia2 beside it

All is in CPU seconds of one thread (user and system; of whole commands: of the child process), so other
programs on the machine disturb little. Every row is a process of its own, in which the sides take turns; a
step is the median of several. Results are compared: a fast answer that is wrong does not count, and the
exit code is 1. `ours` is measured first: the peak memory is that of its first time.

naive: perf/naive.py. Where it says `every 16th`, only these units were timed, and multiplied.
TRL: SFTTrainer's step on the same ids, without activation checkpointing, in float32; else its defaults.
floor: perf/floor.py.

Rows of SST2 and GSM8K come from the mirrors in IA2_DATA_DIR; without it, short rows are the packaged Intents.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OLDER = ", older version"  # that of --against

ROOT = Path(__file__).resolve().parents[1]
if "IA2_PERF_SOURCE" not in os.environ:  # a child that measures another version has its own
    sys.path.insert(0, str(ROOT / "src"))

import resource  # noqa: E402

import torch  # noqa: E402
from floor import Floor, depths  # noqa: E402
from naive import Pair, answer_token, no_hooks, step, teach, train, watching  # noqa: E402

from ia2.adapters.types import peft_config  # noqa: E402
from ia2.adapters.weights import attach, base_weights  # noqa: E402
from ia2.config import AdaptConfig, CompareConfig  # noqa: E402
from ia2.config.sections import AdapterConfig  # noqa: E402
from ia2.data.benchmarks import DATA_DIR, load_benchmark  # noqa: E402
from ia2.data.examples import Example, Examples, FewShotSplit  # noqa: E402
from ia2.experiment.compare import compare  # noqa: E402
from ia2.experiment.rounds import rounds_of  # noqa: E402
from ia2.experiment.run_folder import machine, versions  # noqa: E402
from ia2.experiment.workbench import Workbench  # noqa: E402
from ia2.models.load import BaseModel, load_base  # noqa: E402
from ia2.models.tokens import Ids, decode, encode_answer, fed_ids  # noqa: E402
from ia2.prompts.builder import PromptBuilder  # noqa: E402
from ia2.prompts.context import Contexts  # noqa: E402
from ia2.prompts.task import make_task  # noqa: E402
from ia2.teacher.cache import TeacherCache  # noqa: E402
from ia2.teacher.targets import TargetStore, TeacherAnswer  # noqa: E402
from ia2.teacher.teacher import Teacher  # noqa: E402
from ia2.training.dataset import AnswerDataset, AnswerRow  # noqa: E402
from ia2.training.losses import AnswerLoss  # noqa: E402
from ia2.training.trainer import AlignTrainer, ExampleTrainer  # noqa: E402
from ia2.utils.errors import ModelError  # noqa: E402
from ia2.utils.files import read_json, write_json  # noqa: E402
from ia2.utils.logging import configure  # noqa: E402

GET_TRL = "pip install 'ia2[perf]' (or --no-deps --target DIR 'trl==1.16.*', and PYTHONPATH=DIR)"
EQUAL = 1e-3  # relative; losses and activations of two ways to compute the same in float32


class Skipped(Exception):
    """Why a row cannot be measured here."""


@dataclass
class Given:
    """What the command was asked for."""

    repeat: int
    threads: int
    against: Path | None


# ------------------------------------------------------------------------------------------- rows


def short_rows(count: int = 2000, tested: int = 1024) -> tuple[Examples, Examples]:
    """Training and test rows of one-token answers: SST2, or else the packaged Intents."""
    known = mirrored("sst2")
    data = load_benchmark("SST2" if known else "Intents").load(**({"verbaliser": "words"} if known else {}))
    pool = list(data.pool)
    # more test rows than a benchmark has are taken from the end of the pool
    test = [*data.test, *pool[::-1]][:tested]
    used = max(8, len(pool) - max(0, tested - len(data.test)))
    return Examples(pool[: min(count, used)], name=data.pool.name), Examples(test, name=data.pool.name)


def long_rows() -> Examples:
    """Rows of GSM8K, whose answers have many tokens.

    Raises:
        Skipped: there is no mirror.
    """
    if not mirrored("gsm8k"):
        raise Skipped(f"{DATA_DIR} names no folder with gsm8k")
    return load_benchmark("GSM8K").load().pool


def mirrored(name: str) -> bool:
    """Whether there is a mirror of a data set."""
    return bool(os.environ.get(DATA_DIR)) and (Path(os.environ[DATA_DIR]) / name).is_dir()


def joined_rows(base: BaseModel, count: int, context: int) -> Examples:
    """Labelled rows joined until ``count − 1`` of them make up about ``context`` tokens."""
    pool, test = short_rows()
    pieces = iter([*pool, *test] * 4)
    rows: list[Example] = []
    while len(rows) < count:
        text = ""
        while not text or len(encode_answer(base.tokenizer, text)) < context // (count - 1) - 6:
            text += next(pieces).query.removeprefix("Text:").removesuffix("\nLabel:").strip() + " "
        rows.append(Example(f"Text: {text.strip()}\nLabel:", " music", f"row:{len(rows) + 1}"))
    return Examples(rows, name="joined rows")


# -------------------------------------------------------------------------------------- measuring


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def peak_mb() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_turn(
    sides: dict[str, Callable[[], Any]], repeat: int
) -> tuple[dict[str, float], dict[str, Any], float]:
    """Median seconds of each side, its last result, and the peak memory when the first had run once."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    peak = 0.0
    for _ in range(repeat):
        for name, work in sides.items():
            took, results[name] = timed(work)
            peak = peak or peak_mb()
            seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}, results, peak


def whole(arguments: Sequence[str], source: Path | None = None, text: str | None = None) -> dict[str, Any]:
    """CPU and wall seconds and peak memory (MB) of a command; what it printed."""
    environment = {**os.environ, "PYTHONPATH": search_path(source), "IA2_PERF_SOURCE": str(source or "")}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            arguments, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {child.returncode}: {printed[-2000:]}")
    return {
        "seconds": used.ru_utime + used.ru_stime,
        "wall_seconds": time.perf_counter() - began,
        "peak_mb": used.ru_maxrss / 1024,
        "printed": printed,
    }


def search_path(source: Path | None) -> str:
    """PYTHONPATH of a child."""
    rest = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return os.pathsep.join([str(source or ROOT / "src"), *rest])


def agreement(ours: Sequence[Any], theirs: Sequence[Any], needed: float = 1.0) -> dict[str, Any]:
    """How many results are the same."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return {"same": f"{same} of {len(theirs)}", "right": same >= needed * len(theirs)}


def closeness(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The largest relative difference."""
    gap = max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs)
    return {"largest_relative_difference": gap, "right": gap <= EQUAL}


def line(work: str, ours: float, **others: Any) -> dict[str, Any]:
    """A line of the table."""
    found = {"work": work, "ours": ours, **others}
    if others.get("naive"):
        found["scripts_over_ours"] = others["naive"] / ours
    if others.get("trl"):
        found["ours_over_trl"] = ours / others["trl"]
    return found


def against_floor(found: dict[str, Any], floor: Floor, flops: float) -> dict[str, Any]:
    """The line with its share of the floor."""
    found |= {"floor": flops / floor.rate, "gflop": flops / 1e9, "gflop_per_second": floor.rate / 1e9}
    found["share_of_floor"] = found["floor"] / found["ours"]
    return found


# ---------------------------------------------------------------------------------------- teacher


def teacher_answers(given: Given) -> list[dict[str, Any]]:
    """Eight answers of 64 tokens behind contexts of about 1,200."""
    base = load_base("demo")
    count, tokens = 8, 64
    rows = joined_rows(base, count, 1200)
    # no end of sequence and no stop text, so that every answer has the same length on both sides
    base.model.generation_config.eos_token_id = None
    base.tokenizer.eos_token = None
    contexts = PromptBuilder(base, tokens + 16, base.max_length, rows, AdaptConfig()).train_contexts
    prompts = [contexts.context_ids(i) for i in range(count)]
    teacher = Teacher(base.model, base.tokenizer, max_answer_tokens=tokens)
    floor = Floor(base.model)
    floor.measure()
    ours, targets = timed(lambda: teacher.teach(contexts))
    peak = peak_mb()
    floor.measure()
    # one place of every other answer, spread over their length
    naive, same, gap = 0.0, 0, 0.0
    for i in range(1, count, 2):
        place = (2 * i + 1) * tokens // (2 * count)
        token, activations, seconds = teach(base.model, prompts[i], targets.answers[i].ids, place)
        naive += 2 * tokens * seconds
        same += token == targets.answers[i].ids[place]
        gap = max(gap, relative(targets.get(i)[:, place], activations))
    fed = [fed_ids(p, a.ids) for p, a in zip(prompts, targets.answers, strict=True)]
    lengths = [len(prompt) for prompt in prompts]
    work = f"teacher, {count} × {tokens} tokens, contexts of {min(lengths)} to {max(lengths)}"
    found = line(
        work, ours, naive=naive, naive_timed=f"one of {tokens} tokens of every other answer", peak_mb=peak,
        same=f"{same} of {count // 2} tokens", largest_relative_difference=gap,
        right=same == count // 2 and gap <= EQUAL,
    )  # fmt: skip
    return [against_floor(found, floor, floor.forward(fed, count * tokens))]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def demo_orders() -> list[str]:
    """Ways to order demonstrations that are measured."""
    known = getattr(AdaptConfig.model_fields["demo_order"].annotation, "__args__", ())
    return ["random", *(["shared"] if "shared" in known else [])]


def leave_one_out(base: BaseModel, count: int, order: str) -> tuple[Teacher, Contexts]:
    """The teacher of one-token answers, and as many short rows, each behind the others."""
    pool, _ = short_rows()
    config = AdaptConfig(demo_order=order, num_examples=count)
    task = make_task(pool, config, base.tokenizer)
    data = FewShotSplit(Examples(pool[:count], name="rows"), Examples([], name="dev"))
    with tempfile.TemporaryDirectory() as folder:
        teaching = TeacherCache(base, data, task, config, Path(folder))
        return teaching.teacher(), teaching.contexts("train")


def teacher_labels(given: Given) -> list[dict[str, Any]]:
    """One-token answers, N = 64, leave one out."""
    base = load_base("demo")
    count, every = 64, 16
    floor = Floor(base.model)
    found = []
    for order in reversed(demo_orders()):  # the one that needs most memory last
        teacher, contexts = leave_one_out(base, count, order)
        floor.measure()
        ours, targets = timed(lambda t=teacher, c=contexts: t.teach(c))
        peak = peak_mb()
        prompts = [contexts.context_ids(i) for i in range(count)]
        naive, same, gap = 0.0, 0, 0.0
        timed_rows = range(every // 2, count, every)
        for i in timed_rows:
            token, activations, seconds = teach(base.model, prompts[i], targets.answers[i].ids, 0)
            naive += every * seconds
            same += token == targets.answers[i].ids[0]
            gap = max(gap, relative(targets.get(i)[:, 0], activations))
        measured = line(
            f"teacher, one-token answers, N = {count}, leave one out, {order} orders", ours, naive=naive,
            naive_timed=f"every {every}th row", peak_mb=peak,
            tokens=sum(map(len, prompts)), distinct_tokens=len(depths(prompts)),
            same=f"{same} of {len(timed_rows)}", largest_relative_difference=gap,
            right=same == len(timed_rows) and gap <= EQUAL,
        )  # fmt: skip
        floor.measure()
        found.append(against_floor(measured, floor, floor.forward(prompts, count)))
    return found


class First:
    """The first of some contexts, in any version of ia2."""

    def __init__(self, contexts: Any, count: int) -> None:
        self.contexts, self.count = contexts, count

    def __len__(self) -> int:
        return self.count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.contexts, name)


def memory(given: Given) -> list[dict[str, Any]]:
    """Peak memory of the teacher at N = 128; of contexts that share little, only the first 16 are made."""
    base = load_base("demo")
    count, part = 128, 16
    order = demo_orders()[-1]
    teacher, contexts = leave_one_out(base, count, order)
    if order == "random":
        contexts = First(contexts, part)
    before = peak_mb()
    ours, _ = timed(lambda: teacher.teach(contexts))
    work = f"teacher, N = {count}, {order} orders, {len(contexts)} rows"
    return [line(work, ours, peak_mb=peak_mb(), peak_before_mb=before)]


# ------------------------------------------------------------------------------------- evaluation


def evaluation(given: Given) -> list[dict[str, Any]]:
    """200 queries, behind 16 shared demonstrations and without any."""
    base = load_base("demo")
    pool, test = short_rows(tested=200)
    config = AdaptConfig(num_examples=16)
    task = make_task(pool, config, base.tokenizer)
    floor = Floor(base.model)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        data = FewShotSplit(Examples(pool[:16], name="rows"), Examples([], name="dev"))
        bench = Workbench(base, data, task, config, Path(folder))
        for recipe, every, work in (
            ("icl", 10, f"ICL evaluation, {len(test)} queries, 16 shared demonstrations"),
            ("base", 4, f"evaluation without demonstrations, {len(test)} queries"),
        ):
            prompts = list(bench.prompts(test, demonstrations=recipe == "icl"))
            some = range(0, len(prompts), every)
            sides: dict[str, Callable[[], Any]] = {
                "ours": lambda r=recipe: bench.evaluate(r, test),
                "naive": lambda p=prompts, s=some: [answer_token(base.model, p[i]) for i in s],
                "eight": lambda p=prompts, s=some: in_eights(base, [p[i] for i in s]),
                "floor": floor.measure,
            }
            seconds, results, peak = in_turn(sides, given.repeat if recipe == "base" else 1)
            said = [row.details["top_token"] for row in results["ours"].predictions]
            naive = [decode(base.tokenizer, [token]) for token in results["naive"]]
            measured = line(
                work, seconds["ours"], naive=every * seconds["naive"],
                naive_timed=f"every {every}th query",
                naive_padded_batches_of_8=every * seconds["eight"], peak_mb=peak,
                **agreement([said[i] for i in some], naive),
            )  # fmt: skip
            found.append(against_floor(measured, floor, floor.forward(prompts, len(prompts))))
    return found


@torch.no_grad()
def in_eights(base: BaseModel, prompts: Sequence[Ids], size: int = 8) -> list[int]:
    """The other way that scripts go: left-padded batches, logits at every position."""
    found: list[int] = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        found += base.model(input_ids=ids, attention_mask=mask).logits[:, -1].argmax(-1).tolist()
    return found


# ------------------------------------------------------------------------------------------ steps


def adapted(name: str) -> tuple[BaseModel, Any, Floor]:
    """A model with a LoRA that is not zero: as after some steps, and the same each time."""
    base = load_base(name)
    adapter = peft_config(base.model, AdapterConfig())
    floor = Floor(base.model, adapter.r, tuple(adapter.target_modules))
    model = attach(base.model, adapter, seed=0)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator)
    return base, model, floor


def steps(name: str, rows: Examples, title: str, given: Given, batches: int = 2) -> list[dict[str, Any]]:
    """Alignment and SFT steps of four rows; the learning rate is 0, so all sides stay at the same weights."""
    base, model, floor = adapted(name)
    tokenizer = base.tokenizer
    totals: dict[str, float] = {}
    gaps: dict[str, list[tuple[float, float]]] = {"align": [], "sft": [], "trl": []}
    flops, peak, width = {"align": 0.0, "sft": 0.0}, 0.0, base.model.config.get_text_config().hidden_size
    count = floor.layers
    trl = trl_step(name, title)
    lengths: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(batches):
            part = [
                AnswerRow(
                    tuple(tokenizer(e.query)["input_ids"]),
                    answer_ids(tokenizer, e.answer or ""),
                )
                for e in rows[4 * number : 4 * number + 4]
            ]
            lengths += [len(row.query) + len(row.answer) for row in part]
            generator = torch.Generator().manual_seed(number)
            states = [torch.randn(count, len(row.answer), width, generator=generator) for row in part]
            targets = TargetStore(list(range(count)))
            for i, state in enumerate(states):
                targets.add(i, 0, state)
            targets.finish([TeacherAnswer(row.answer, "") for row in part])
            options: Any = {"output_dir": Path(folder), "learning_rate": 0.0}
            nothing = AnswerDataset.of([])
            trainable = [p for p in model.parameters() if p.requires_grad]
            align = AlignTrainer(model, AnswerDataset.of(part, targets), nothing, tokenizer, **options)
            for parameter in trainable:  # those that alignment does not reach; none with the default adapter
                parameter.requires_grad_(True)
            sft = ExampleTrainer(model, AnswerLoss(), AnswerDataset.of(part), nothing, tokenizer, **options)
            optimizer = torch.optim.Adam(trainable, lr=0.0)
            plain = [Pair(row.query, row.answer) for row in part]
            aligned = [Pair(row.query, row.answer, s) for row, s in zip(part, states, strict=True)]
            sides: dict[str, Callable[[], Any]] = {
                "align": one_step(align), "sft": one_step(sft),
                "naive align": lambda a=aligned, o=optimizer: naive_step(model, a, o),
                "naive sft": lambda p=plain, o=optimizer: naive_step(model, p, o),
            }  # fmt: skip
            if number == 0:
                sides["align"]()
                sides["sft"]()
                peak = peak_mb()
            sides["floor"] = floor.measure
            if trl is not None:
                sides["trl"] = trl(part)
            seconds, results, _ = in_turn(sides, given.repeat)
            for side, value in seconds.items():
                totals[side] = totals.get(side, 0.0) + value
            losses = results["naive sft"]
            gaps["align"].append((results["align"], statistics.mean(results["naive align"])))
            gaps["sft"].append((results["sft"], statistics.mean(losses)))
            if trl is not None:  # it weighs tokens alike, not rows
                weights = [len(row.answer) for row in part]
                mean = sum(x * w for x, w in zip(losses, weights, strict=True)) / sum(weights)
                gaps["trl"].append((results["trl"], mean))
            pairs = [(fed_ids(row.query, row.answer), len(row.answer)) for row in part]
            for kind in flops:
                flops[kind] += floor.step(pairs, align=kind == "align")
    extra: dict[str, Any] = {
        "peak_mb": peak,
        "rows": f"{batches} × 4 of {min(lengths)} to {max(lengths)} tokens",
    }
    if trl is not None:
        extra |= {"trl": totals["trl"], "trl_largest_difference": closeness(gaps["trl"])}
    found = []
    for kind, kind_name in (("align", "alignment"), ("sft", "SFT")):
        measured = line(
            f"{kind_name} step, {title}", totals[kind], naive=totals[f"naive {kind}"],
            naive_timed="all", **closeness(gaps[kind]), **extra,
        )  # fmt: skip
        found.append(against_floor(measured, floor, flops[kind]))
    return found


def answer_ids(tokenizer: Any, answer: str) -> Ids:
    """A long answer ends with the end of sequence."""
    ids = encode_answer(tokenizer, answer)
    return ids if len(ids) == 1 else (*ids, tokenizer.eos_token_id)


def naive_step(model: Any, pairs: Sequence[Pair], optimizer: Any) -> list[float]:
    """The reference's step."""
    model.train()
    with watching(model) if pairs[0].target is not None else no_hooks() as outputs:
        return step(model, pairs, optimizer, outputs)


def one_step(trainer: Any) -> Callable[[], float]:
    """One optimiser step of a Trainer as its own loop makes it, batch and all; returns the loss."""
    trainer.create_optimizer()

    def work() -> float:
        trainer.model.train()
        batches, count = trainer.get_batch_samples(
            iter(trainer.get_train_dataloader()),
            trainer.args.gradient_accumulation_steps,
            trainer.args.device,
        )
        trainer.current_gradient_accumulation_steps = len(batches)
        loss = sum(float(trainer.training_step(trainer.model, batch, count)) for batch in batches)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return loss

    return work


def trl_step(name: str, title: str) -> Callable[[Sequence[AnswerRow]], Callable[[], float]] | None:
    """Makes TRL's step on a batch of rows, on a model of its own; None without TRL."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        print(f"TRL is left out of '{title}' ({error}): {GET_TRL}", file=sys.stderr)
        return None
    made: list[Any] = []
    folder = tempfile.mkdtemp()

    def make(part: Sequence[AnswerRow]) -> Callable[[], float]:
        from datasets import Dataset

        made.append(made[0] if made else adapted(name))  # when all of ours has been measured once
        base, model, _ = made[0]
        ids = [[*row.query, *row.answer] for row in part]
        masks = [[0] * len(row.query) + [1] * len(row.answer) for row in part]
        config = SFTConfig(
            folder, per_device_train_batch_size=len(part), learning_rate=0.0, bf16=False, use_cpu=True,
            gradient_checkpointing=False, completion_only_loss=True, max_length=None, report_to=[],
            max_grad_norm=0.0, disable_tqdm=True,
        )  # fmt: skip
        rows = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
        return one_step(SFTTrainer(model, config, train_dataset=rows, processing_class=base.tokenizer))

    return make


def steps_short(given: Given) -> list[dict[str, Any]]:
    """Rows of a sentence."""
    rows, _ = short_rows()
    return steps("demo", rows, f"short rows ({rows.name})", given)


def steps_gsm8k(given: Given) -> list[dict[str, Any]]:
    """Rows of GSM8K."""
    return steps("demo", long_rows(), "GSM8K", given)


def steps_gemma(given: Given) -> list[dict[str, Any]]:
    """The same on another architecture with five times the vocabulary."""
    return steps("demo-gemma", long_rows(), "demo-gemma, GSM8K", given)


# ------------------------------------------------------------------------------------------- cell


def cell(given: Given) -> list[dict[str, Any]]:
    """N = 4, recipes sft, ia2 and ia2-sft, 100 queries; twelve epochs a stage on both sides."""
    base = load_base("demo")
    pool, test = short_rows(tested=100)
    epochs, rate = 12, 1e-3
    stage = {"epochs": epochs, "patience": 1000, "restore_best": False}
    config = CompareConfig(
        recipes=["sft", "ia2", "ia2-sft"], num_examples=4, seeds=1, learning_rates=[rate],
        align=stage, sft=stage, targets="memory",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours"
        ours, _ = timed(lambda: compare(base, pool, config, test=test, output_dir=path))
        peak = peak_mb()
        said = {recipe: top_tokens(path, recipe) for recipe in config.recipes}
        current = rounds_of(pool, test, config, Path(folder))[0]
        task = make_task(pool, config, base.tokenizer, None, test)
        bench = Workbench(base, current.data, task, config, Path(folder) / "naive")
        contexts = (bench.train_contexts, bench.teaching.contexts("dev"))
        prompts = list(bench.prompts(test))
        icl = list(bench.prompts(test, demonstrations=True))

        def naive() -> dict[str, list[int]]:
            model = attach(base.model, peft_config(base.model, config.adapter), config.seed)
            first = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
            with base_weights(model):
                taught = [[taught_pair(model, part, i) for i in range(len(part))] for part in contexts]
                for prompt in icl:  # the answers and activations that similarity is measured to
                    teach(model, prompt, (0,), 0)
            true = [
                [
                    Pair(part.query_ids(i), task.target_ids(base.tokenizer, e))
                    for i, e in enumerate(part.queries)
                ]
                for part in contexts
            ]
            answers: dict[str, list[int]] = {}
            for recipe in ("sft", "ia2", "ia2-sft"):
                if recipe != "ia2-sft":  # which goes on from ia2
                    with torch.no_grad():
                        for key, parameter in model.named_parameters():
                            if key in first:
                                parameter.copy_(first[key])
                train(model, *(taught if recipe == "ia2" else true), epochs, rate)
                model.eval()
                with watching(model):
                    answers[recipe] = [answer_token(model, prompt) for prompt in prompts]
            return answers

        theirs, answers = timed(naive)
    tokens = [decode(base.tokenizer, [t]) for recipe in config.recipes for t in answers[recipe]]
    mine = [token for recipe in config.recipes for token in said[recipe]]
    return [
        line(
            f"the paper's cell (N = 4, sft + ia2 + ia2-sft, {len(test)} queries, {epochs} epochs a stage)",
            ours, naive=theirs, naive_timed="all", peak_mb=peak, **agreement(mine, tokens, 0.98),
        )
    ]  # fmt: skip


def taught_pair(model: Any, contexts: Contexts, i: int) -> Pair:
    """An example with the naive teacher's one-token answer and activations."""
    token, activations, _ = teach(model, contexts.context_ids(i), (0,), 0)
    return Pair(contexts.query_ids(i), (token,), activations[:, None])


def top_tokens(folder: Path, recipe: str) -> list[str]:
    """What a recipe of a comparison said to each query."""
    (file,) = folder.rglob(f"evaluations/{recipe}.predictions.jsonl")
    return [json.loads(row)["top_token"] for row in file.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------- whole commands


def ia2(*arguments: Any) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "ia2", *map(str, arguments)]


def predict(given: Given) -> list[dict[str, Any]]:
    """`ia2 predict` of one row and of 1,000 short ones, start-up included."""
    pool, test = short_rows(tested=1000)
    found = []
    base = load_base("demo")
    floor = Floor(base.model)
    prompts = [tuple(base.tokenizer(e.query)["input_ids"]) for e in (list(test) * 1000)[:1000]]
    flops = floor.forward(prompts, 1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "train.jsonl", pool[:24])
        write_rows(folder / "one.jsonl", test[:1])
        write_rows(folder / "many.jsonl", (list(test) * 1000)[:1000])
        for number, (version, source) in enumerate(both(given)):
            run = folder / f"run-{number}"
            whole(
                ia2("train", "--quiet", "--data", folder / "train.jsonl", "--num-examples", 8,
                    "--recipe", "sft", "--sft-epochs", 1, "--output-dir", run),
                source,
            )  # fmt: skip
            command = ia2("predict", "--quiet", "--adapter", run, "--output", folder / "said.jsonl", "--data")
            ones = [whole([*command, str(folder / "one.jsonl")], source) for _ in range(given.repeat)]
            one = statistics.median(each["seconds"] for each in ones)
            floor.measure()
            many = whole([*command, str(folder / "many.jsonl")], source)
            floor.measure()
            right = len((folder / "said.jsonl").read_text().splitlines()) == 1000
            middle = statistics.median(each["wall_seconds"] for each in ones)
            found.append(
                line(f"predict of one row{version}", one, peak_mb=ones[0]["peak_mb"], wall_seconds=middle)
            )
            rate = line(
                f"predict of 1,000 short rows{version}", many["seconds"], peak_mb=many["peak_mb"],
                right=right, rows_per_second=1000 / many["seconds"],
            )  # fmt: skip
            found.append(against_floor(rate, floor, flops))
            rate["share_without_start"] = rate["floor"] / max(many["seconds"] - one, 1e-9)
    return found


def both(given: Given) -> list[tuple[str, Path | None]]:
    """This version, and the one it is held against."""
    return [("", None), *([(OLDER, given.against)] if given.against else [])]


def write_rows(path: Path, rows: Sequence[Example]) -> None:
    """As the columns prompt and completion."""
    lines = [json.dumps({"prompt": e.query, "completion": e.answer}) + "\n" for e in rows]
    path.write_text("".join(lines), encoding="utf-8")


def demo(given: Given) -> list[dict[str, Any]]:
    """`ia2 demo --seeds 1`, and the same of an older version beside it."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (version, source) in enumerate(both(given)):
            run = whole(
                ia2("demo", "--quiet", "--seeds", 1, "--output-dir", Path(folder) / str(number)), source
            )
            summary = read_json(Path(folder) / str(number) / "compare.json")["recipes"]
            values = {k: r["metrics"]["vocabulary"]["accuracy"]["value"] for k, r in summary.items()}
            found.append(
                line(f"ia2 demo --seeds 1{version}", run["seconds"], peak_mb=run["peak_mb"], accuracy=values)
            )
    if len(found) > 1:
        found[0]["over_older"] = found[0]["ours"] / found[1]["ours"]
    return found


# ----------------------------------------------------------------------------------------- slopes


def slope(points: dict[int, float]) -> float:
    """Of log seconds over log size, least squares over the upper half of the sizes."""
    upper = sorted(points)[len(points) // 2 :]
    x, y = [math.log(k) for k in upper], [math.log(points[k]) for k in upper]
    return statistics.linear_regression(x, y).slope


def shallow(layers: int = 4) -> BaseModel:
    """The demo model's first layers: growth is the same, and it takes an eighth of the time."""
    base = load_base("demo")
    base.model.model.layers = base.model.model.layers[:layers]
    base.model.config.num_hidden_layers = layers
    return BaseModel(base.model, base.tokenizer, "demo, 4 layers", base.path)


def grown(work: str, points: dict[int, float], most: float, **others: Any) -> dict[str, Any]:
    """A line of a series."""
    found = slope(points)
    return {"work": work, "seconds": points, "slope": found, "right": found <= most, **others}


def slope_n(given: Given) -> list[dict[str, Any]]:
    """The teacher over N.

    In random orders the tokens grow with its square, and what each of them attends to grows with N in any
    order: the products of distinct tokens say how much there is to do.
    """
    base, found = shallow(), []
    floor = Floor(base.model)
    for order in demo_orders():
        points, tokens, products = {}, {}, {}
        for count in (4, 8, 16, 32, 64, 128):
            teacher, contexts = leave_one_out(base, count, order)
            rows = [contexts.context_ids(i) for i in range(count)]
            tokens[count], products[count] = len(depths(rows)), floor.forward(rows, count)
            points[count], _ = timed(lambda t=teacher, c=contexts: t.teach(c))
        grows = slope(products)
        found.append(
            grown(
                f"teacher over N, {order} orders", points, 1.15 * grows, distinct_tokens=tokens,
                slope_of_products=grows,
            )
        )  # fmt: skip
    return found


def slope_length(given: Given) -> list[dict[str, Any]]:
    """The teacher over the length of its answers."""
    base = shallow()
    rows = joined_rows(base, 8, 300)
    base.model.generation_config.eos_token_id = None
    base.tokenizer.eos_token = None
    contexts = PromptBuilder(base, 160, base.max_length, rows, AdaptConfig()).train_contexts
    points = {}
    for length in (1, 2, 4, 8, 16, 32, 64, 128):
        teacher = Teacher(base.model, base.tokenizer, max_answer_tokens=length)
        points[length], _ = timed(lambda t=teacher: t.teach(contexts))
    return [grown("teacher over answer length, 8 contexts of 300 tokens", points, 1.1)]


def slope_queries(given: Given) -> list[dict[str, Any]]:
    """Evaluation over the number of queries."""
    base = shallow()
    pool, test = short_rows()
    config = AdaptConfig(num_examples=16)
    task = make_task(pool, config, base.tokenizer)
    points: dict[str, dict[int, float]] = {"icl": {}, "base": {}}
    with tempfile.TemporaryDirectory() as folder:
        data = FewShotSplit(Examples(pool[:16], name="rows"), Examples([], name="dev"))
        bench = Workbench(base, data, task, config, Path(folder))
        for count in (64, 128, 256, 512, 1024):
            if count <= len(test):
                for recipe, seconds in points.items():
                    seconds[count], _ = timed(lambda r=recipe, c=count: bench.evaluate(r, test[:c]))
    titles = {"icl": "ICL evaluation over queries, 16 demonstrations", "base": "evaluation over queries"}
    return [grown(titles[recipe], seconds, 1.1) for recipe, seconds in points.items()]


# ------------------------------------------------------------------------------------------- main


ROWS: dict[str, Callable[[Given], list[dict[str, Any]]]] = {
    "teacher-answers": teacher_answers,
    "teacher-labels": teacher_labels,
    "evaluation": evaluation,
    "steps-short": steps_short,
    "steps-gsm8k": steps_gsm8k,
    "steps-gemma": steps_gemma,
    "cell": cell,
    "predict": predict,
    "demo": demo,
    "memory": memory,
    "slope-n": slope_n,
    "slope-length": slope_length,
    "slope-queries": slope_queries,
}


def measured(name: str, given: Given, source: Path | None = None) -> dict[str, Any]:
    """One row, in a process of its own."""
    command = [
        sys.executable, __file__, "--child", name,
        "--repeat", str(given.repeat), "--threads", str(given.threads),
        *(["--against", str(given.against)] if given.against else []),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        whole([*command, "--output", str(file)], source)
        found: dict[str, Any] = read_json(file)
    return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| work | ours (CPU s) | scripts ÷ ours | ours ÷ TRL's | share of the floor | peak MB | right |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for each in lines:
        if "skipped" in each:
            rows.append(f"| {each['work']} | skipped: {each['skipped']} | | | | | |")
            continue
        if "slope" in each:
            points = ", ".join(f"{n}: {s:.2f}" for n, s in each["seconds"].items())
            rows.append(f"| {each['work']} | {points} | slope {each['slope']:.2f} | | | | {each['right']} |")
            continue
        cells = [
            f"{each['ours']:.2f}",
            shown(each, "scripts_over_ours", "{:.2f}"),
            shown(each, "ours_over_trl", "{:.2f}"),
            shown(each, "share_of_floor", "{:.0%}"),
            shown(each, "peak_mb", "{:.0f}"),
            str(each.get("right", "")),
        ]
        rows.append(f"| {each['work']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def shown(values: dict[str, Any], key: str, style: str) -> str:
    """A cell."""
    return style.format(values[key]) if values.get(key) is not None else ""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME",
                        help=f"of {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON file; rows it holds already are replaced or kept")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--against", type=Path, help="src folder of another ia2, for demo, predict and memory"
    )
    parser.add_argument("--child", choices=list(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = Given(options.repeat, options.threads, options.against and options.against.resolve())
    if options.child:
        configure(quiet=True)
        torch.set_num_threads(given.threads)
        try:
            lines = ROWS[options.child](given)
        except (Skipped, ModelError) as error:  # no data, or a demo model that is not installed
            lines = [{"work": options.child, "skipped": str(error)}]
        write_json(options.output, {"lines": lines})
        return 0
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(given.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    known = read_json(options.output) if options.output and options.output.is_file() else {}
    rows: dict[str, Any] = known.get("rows", {})
    for name in options.rows:
        lines = rows_of(name, given)
        rows[name] = {"machine": machine(), "versions": versions(), "threads": given.threads, "lines": lines}
        print("\n".join(table(lines).splitlines()[2:]), flush=True)
        if options.output:
            write_json(options.output, {"rows": {n: rows[n] for n in ROWS if n in rows}})
    every = [each for n in ROWS if n in rows for each in rows[n]["lines"]]
    print(f"\n{table(every)}")
    return int(any(each.get("right") is False for each in every))


def rows_of(name: str, given: Given) -> list[dict[str, Any]]:
    """The lines of a row; of one that cannot be measured, why."""
    sources = [None, given.against] if name == "memory" and given.against else [None]
    lines: list[dict[str, Any]] = []
    for source in sources:
        where = OLDER if source else ""
        try:
            found = measured(name, given, source)["lines"]
        except RuntimeError as error:
            why = f"failed: {' '.join(str(error).split())[-300:]}"
            lines.append({"work": f"{name}{where}", "skipped": why, "right": False})
        else:
            lines += [{**each, "work": f"{each['work']}{where}"} for each in found]
    return lines


if __name__ == "__main__":
    sys.exit(main())
