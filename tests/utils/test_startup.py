"""What a command imports, and that each text is tokenised once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.adapting import predict_rows
from helpers.command_line import write_rows
from tiny_icl.tasks import sample_task
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ia2.config import TrainConfig
from ia2.data.examples import Examples
from ia2.experiment.adapt import adapt
from ia2.models.tokens import _KEPT_IDS, _Kept
from ia2.training.trainer import Trainer  # as it is imported for training

TASK = sample_task(0, num_classes=3)
ROOT = Path(__file__).parents[2]

# A run of the command line, then what it has imported.
RUN = """
import json, sys
from ia2.cli import main
main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)))
"""


def imported(*arguments: object) -> set[str]:
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_what_needs_no_model_imports_none() -> None:
    found = imported("env", "--json")
    assert "typer" in found
    assert not found & {"transformers", "peft", "scipy", "matplotlib", "datasets"}


def test_training_and_predicting_import_what_they_use(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", TASK.examples(8, 0))
    new = write_rows(tmp_path / "new.jsonl", [{"prompt": q} for q, _ in TASK.examples(2, 5)])
    trained = imported(
        *("train", "--model", tiny_icl_model_path, "--data", rows, "--recipe", "sft", "--sft-epochs", 1),
        *("--output-dir", tmp_path / "out", "--quiet", "--device", "cpu"),
    )
    unused = {"bitsandbytes", "kernels", "matplotlib", "datasets", "torchvision", "pandas"}
    assert not trained & unused
    predicted = imported("predict", "--adapter", tmp_path / "out", "--data", new, "--device", "cpu")
    assert {"torch", "transformers", "peft"} <= predicted
    assert not predicted & (
        unused | {"scipy.stats", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
    )


def test_bitsandbytes_is_found_after_it_was_left_out() -> None:
    pytest.importorskip("bitsandbytes")
    code = """
import sys, importlib.util
from ia2.utils.imports import without_bitsandbytes
with without_bitsandbytes():
    import peft.helpers
    from peft.import_utils import is_bnb_available
    assert not is_bnb_available()
assert "bitsandbytes" not in sys.modules
assert is_bnb_available() and importlib.util.find_spec("bitsandbytes")
assert peft.helpers.bnb.functional.dequantize_4bit
import bitsandbytes
with without_bitsandbytes():
    assert sys.modules["bitsandbytes"] is bitsandbytes
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_compiler_comes_when_it_is_used() -> None:
    code = """
import sys, torch
from ia2.utils.imports import for_one_forward_pass
with for_one_forward_pass():
    from transformers import GPT2LMHeadModel
    from transformers.masking_utils import TransformGetItemToIndex
    assert torch.compiler.disable(len) is len
    assert "torch._dynamo.eval_frame" not in sys.modules
    assert not torch._dynamo.is_compiling()
    assert "torch._dynamo.eval_frame" in sys.modules
    with TransformGetItemToIndex():
        pass
assert not isinstance(torch.ones(2), torch.distributed.tensor.DTensor)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
from torch.distributed.tensor import DTensor
assert torch.distributed.tensor.DTensor is DTensor
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_text_is_tokenised_once(
    tiny_icl_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[tuple[str, bool]] = Counter()
    real = PreTrainedTokenizerBase.__call__

    def counting(self: Any, text: Any, *args: Any, add_special_tokens: bool = True, **options: Any) -> Any:
        for each in [text] if isinstance(text, str) else text:
            asked[each, add_special_tokens] += 1
        return real(self, text, *args, add_special_tokens=add_special_tokens, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counting)
    rows = Examples.from_rows([{"prompt": q, "completion": f"{a} {a}"} for q, a in TASK.examples(9, 0)])
    test = Examples.from_rows([{"prompt": q, "completion": f"{a} {a}"} for q, a in TASK.examples(3, 5)])
    config = TrainConfig(
        recipe="ia2-sft",
        task="generation",
        max_answer_tokens=6,
        align={"epochs": 3},
        sft={"epochs": 3},
        targets="online",
    )
    adapt(str(tiny_icl_model_path), rows, config, test=test, output_dir=tmp_path / "out")
    assert len({text for text, _ in asked}) > 20
    assert asked.most_common(1)[0][1] == 1

    asked.clear()
    new = write_rows(tmp_path / "new.jsonl", [{"prompt": q} for q, _ in TASK.examples(3, 6)])
    predict_rows(tmp_path / "out", str(new))
    assert asked.most_common(1)[0][1] == 1


def test_ids_that_are_kept_are_the_newest() -> None:
    kept = _Kept()
    for n in range(9):
        kept.put(n, (n,) * (_KEPT_IDS // 4 - 1))
        assert kept.get(n) == (n,) * (_KEPT_IDS // 4 - 1)
    assert [n for n in range(9) if kept.get(n)] == [5, 6, 7, 8]
    kept.put(3, (1, 2))
    assert kept.get(3) == (1, 2)
    kept.put(4, (0,) * (_KEPT_IDS + 1))
    assert kept.get(4) is None
    kept.put(77, ())
    assert kept.get(77) == ()


def test_a_trainer_of_transformers_takes_data_sets_afterwards(
    tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    """One that had no package datasets when it was imported: it looks at the package's version too."""
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2, "labels": [[5, 6, 7]] * 2, "other": ["a", "b"]})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(tiny_llama, arguments, train_dataset=rows)
    assert next(iter(trainer.get_train_dataloader())).keys() == {"input_ids", "labels"}
    assert trainer.train().global_step == 1
