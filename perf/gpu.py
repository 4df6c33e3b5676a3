"""Speed and memory on a GPU, of a model of the 1B shape with random weights in bfloat16.

    python perf/gpu.py --output perf/results/gpu.json      # where a GPU is; minutes
    python perf/gpu.py --tiny                              # two small layers, also on a CPU

Shares are of the rate that products of the model's own matrices reach in the same run, with the FLOPs of
perf/floor.py. The peak of memory stands beside what perf/scale.py predicts. With two GPUs or more, also rows
a second of an alignment stage on one and on two processes (DDP). Weights are random: nothing need be fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from floor import Floor
from scale import Job, Machine, Shape, need
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ia2.adapters.types import peft_config
from ia2.adapters.weights import attach, base_weights
from ia2.config import AdaptConfig
from ia2.config.sections import AdapterConfig, AlignConfig, SftConfig
from ia2.experiment.run_folder import machine, versions
from ia2.models.capture import ActivationCapture
from ia2.models.forward import answer_pass
from ia2.models.generation import generate_answers
from ia2.teacher.targets import TargetStore, TeacherAnswer
from ia2.training.dataset import AnswerDataset, AnswerRow
from ia2.training.losses import AnswerLoss
from ia2.training.trainer import AlignTrainer, ExampleTrainer, checkpoint_activations
from ia2.utils.distributed import is_first, process_state
from ia2.utils.files import write_json
from ia2.utils.manifest import begin

ADAPTED = ["q_proj", "k_proj", "o_proj"]
RANK = 8
ONE_B = Shape("1B", 16, 2048, 8192, 32, 8, 64, 128256)
TINY = Shape("tiny", 2, 64, 128, 4, 2, 16, 512)


class Bench:
    """The model, with an adapter, and what is fed to it."""

    def __init__(self, shape: Shape, rows: int, query: int, answer: int) -> None:
        self.shape, self.rows, self.query, self.answer = shape, rows, query, answer
        self.device = torch.device(process_state(on_cpu=not torch.cuda.is_available()).device)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head,
            max_position_embeddings=32768,
            eos_token_id=None,
        )
        with torch.device(self.device):
            base = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
        self.floor = Floor(base, RANK, ADAPTED)
        self.model = attach(base, peft_config(base, AdapterConfig(rank=RANK, target_modules=ADAPTED)), 0)
        words = {f"w{i}": i for i in range(256)} | {"<pad>": 256}
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="<pad>"
        )

    def ids(self, count: int, seed: int) -> tuple[int, ...]:
        """Random ids."""
        draw = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(0, 256, (count,), generator=draw).tolist())

    def data(self, targets: bool) -> AnswerDataset:
        """Training rows; targets are random."""
        rows = [AnswerRow(self.ids(self.query, i), self.ids(self.answer, 1000 + i)) for i in range(self.rows)]
        if not targets:
            return AnswerDataset.of(rows)
        found = TargetStore(list(range(self.shape.layers)))
        for i, row in enumerate(rows):
            size = (self.shape.layers, len(row.answer), self.shape.width)
            found.add(i, 0, torch.randn(size, dtype=torch.bfloat16))
        found.finish([TeacherAnswer(row.answer, "") for row in rows])
        return AnswerDataset.of(rows, found)

    def trainer(self, kind: str, folder: Path, epochs: int, recompute: bool) -> Any:
        """Of one stage, on batches of all rows."""
        config = AdaptConfig(batch_size=self.rows, activation_checkpointing=recompute)
        rows = (self.data(kind == "align"), AnswerDataset.of([]))
        if kind == "align":
            align = AlignConfig(epochs=epochs)
            return AlignTrainer(
                self.model, *rows, self.tokenizer, align=align, config=config, output_dir=folder
            )
        stage = SftConfig(epochs=epochs)
        return ExampleTrainer(
            self.model, AnswerLoss(), *rows, self.tokenizer, stage=stage, config=config, output_dir=folder
        )

    # ------------------------------------------------------------------------------- measured

    def seconds(self, work: Callable[[], Any], repeat: int) -> float:
        """Median; the first time allocates."""
        took = []
        for _ in range(repeat + 1):
            self._wait()
            began = time.perf_counter()
            work()
            self._wait()
            took.append(time.perf_counter() - began)
        return statistics.median(took[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self, work: Callable[[], Any]) -> int | None:
        """Bytes of the GPU in use at most; None on a CPU."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return int(torch.cuda.max_memory_allocated(self.device))

    def rate(self, repeat: int) -> float:
        """FLOP a second in products of the model's layers with 4,096 rows."""
        flops = seconds = 0.0
        for name, module in self.model.get_base_model().model.layers[0].named_modules():
            if isinstance(module, torch.nn.Linear) and "lora" not in name:
                weight = module.weight
                rows = torch.randn(4096, weight.shape[1], device=self.device, dtype=weight.dtype)
                with torch.no_grad():
                    seconds += self.seconds(lambda r=rows, w=weight: r @ w.T, repeat)
                flops += 2.0 * rows.shape[0] * weight.numel()
        return flops / seconds

    def step(self, kind: str, recompute: bool, rate: float, repeat: int) -> dict[str, Any]:
        """An optimiser step: seconds, share of the rate, peak of memory and what was predicted."""
        with tempfile.TemporaryDirectory() as scratch:
            trainer = self.trainer(kind, Path(scratch), 1, recompute)
            trainer.create_optimizer()
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(self.rows)])

            def once() -> None:
                trainer.training_step(self.model, dict(batch))
                trainer.optimizer.step()
                self.model.zero_grad()

            took, peak = self.seconds(once, repeat), self.peak(once)
            if recompute:
                checkpoint_activations(self.model, None)
            for parameter in getattr(trainer, "_pathless", ()):
                parameter.requires_grad_(True)
        fed = [(self.ids(self.query + self.answer - 1, i), self.answer) for i in range(self.rows)]
        flops = self.floor.step(fed, align=kind == "align")
        job = Job(self.rows, self.query, self.answer, batch=self.rows)
        expected = need(self.shape, 1, job, Machine(), False)
        activations = expected.step_checkpointed if recompute else expected.step
        return {
            "seconds": took,
            "share_of_rate": flops / took / rate,  # with recomputation the FLOPs are those without
            "peak_bytes": peak,
            "predicted_bytes": expected.weights + expected.adapter + activations,
        }

    def teacher(self, context: int, rate: float, repeat: int) -> dict[str, Any]:
        """Activations at the answers behind contexts, and tokens a second of answers that are written."""
        pairs = [(self.ids(context, i), self.ids(self.answer, 1000 + i)) for i in range(self.rows)]

        def capture() -> None:
            with base_weights(self.model), ActivationCapture(self.model) as watching:
                for _ in answer_pass(self.model, self.tokenizer, pairs, capture=watching, logits=False):
                    pass

        def write() -> None:
            with base_weights(self.model):
                prompts = [prompt for prompt, _ in pairs]
                generate_answers(self.model, self.tokenizer, prompts, max_new_tokens=self.answer)

        took, peak = self.seconds(capture, repeat), self.peak(capture)
        flops = self.floor.forward([prompt + answer[:-1] for prompt, answer in pairs], 0)
        return {
            "context_tokens": context,
            "seconds": took,
            "share_of_rate": flops / took / rate,
            "peak_bytes": peak,
            "written_tokens_per_second": self.rows * self.answer / self.seconds(write, 1),
        }


def stage(bench: Bench, epochs: int) -> float:
    """Rows a second of a whole alignment stage, on all processes of the launch."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "stage"
        if is_first():
            begin(folder)
        trainer = bench.trainer("align", folder, epochs, False)
        began = time.perf_counter()
        trainer.fit()
        return epochs * bench.rows / (time.perf_counter() - began)


def two_processes(given: Sequence[str]) -> dict[str, float]:
    """Rows a second on one process and on two."""
    found = {}
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "rows.json"
            launch = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={count}",
            ]
            command = [*launch, __file__, *given, "--stage-only", "--output", str(file)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found[str(count)] = json.loads(file.read_text())["rows_per_second"]
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="two small layers")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--query-tokens", type=int, default=150)
    parser.add_argument("--answer-tokens", type=int, default=100)
    parser.add_argument("--context-tokens", type=int, default=4000)
    parser.add_argument("--stage-only", action="store_true", help="rows a second of an alignment stage alone")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    bench = Bench(TINY if given.tiny else ONE_B, given.rows, given.query_tokens, given.answer_tokens)
    result: dict[str, Any]
    if given.stage_only:
        result = {"rows_per_second": stage(bench, 20)}
    else:
        rate = bench.rate(given.repeat)
        device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
        result = {
            "device": device,
            "machine": machine(),
            "versions": versions(),
            "shape": bench.shape.__dict__,
            "matrix_flops": rate,
            "rows": given.rows,
            "tokens": [given.query_tokens, given.answer_tokens],
        }
        for kind in ("align", "sft"):
            for recompute in (False, True):
                name = f"{kind}{', recomputed' if recompute else ''}"
                result[name] = bench.step(kind, recompute, rate, given.repeat)
        result["teacher"] = bench.teacher(given.context_tokens, rate, max(1, given.repeat // 3))
        if torch.cuda.device_count() > 1:
            plain = ["--rows", str(given.rows), *(["--tiny"] if given.tiny else [])]
            result["ddp_rows_per_second"] = two_processes(plain)
    if is_first():
        print(json.dumps(result, indent=2))
        if given.output:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(given.output, result)
    return result


if __name__ == "__main__":
    main()
