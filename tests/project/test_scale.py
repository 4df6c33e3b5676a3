"""The arithmetic of perf/scale.py, its table in the documentation, and perf/gpu.py on a CPU."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture
def perf(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of perf/."""
    monkeypatch.syspath_prepend(str(ROOT / "perf"))
    return importlib.import_module


def llama(shape: Any, layers: int | None = None) -> Any:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def test_weights_are_those_of_the_models(perf: Any) -> None:
    scale = perf("scale")
    for shape, billions in zip(scale.SHAPES, (8.03, 70.55, 405.85), strict=True):
        assert shape.weights / 1e9 == pytest.approx(billions, abs=0.01)
        with torch.device("meta"):
            model = llama(shape, layers=2)
        small = replace(shape, layers=2)
        assert sum(p.numel() for p in model.parameters()) == small.weights
        with torch.device("meta"):
            lora = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "o_proj"]))
        assert sum(p.numel() for n, p in lora.named_parameters() if "lora" in n) == small.adapter()


@pytest.mark.parametrize(("width", "inner", "kv_heads"), [(128, 448, 2), (256, 896, 2), (128, 896, 8)])
def test_activations_are_those_that_torch_keeps(width: int, inner: int, kv_heads: int, perf: Any) -> None:
    shape = perf("scale").Shape("small", 1, width, inner, 8, kv_heads, width // 8, 100)
    tokens = 96

    def kept(layers: int) -> int:
        model = llama(shape, layers).to(torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "o_proj"]))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    assert (kept(3) - kept(2)) / tokens == pytest.approx(shape.activations(), rel=0.05)


def test_the_page_holds_what_the_script_prints(perf: Any) -> None:
    scale = perf("scale")
    table = scale.tables(scale.Job(), scale.Machine())
    assert f"```text\n{table}\n```" in (ROOT / "docs" / "scale.md").read_text()


def test_more_gpus_need_less_of_each_and_shards_have_a_price(perf: Any) -> None:
    scale = perf("scale")
    job, machine, big = scale.Job(), scale.Machine(), scale.SHAPES[1]
    needs = [scale.need(big, n, job, machine, True) for n in scale.GPUS[1:]]
    for few, many in pairwise(needs):
        assert few.weights > many.weights and few.training > many.training
    whole = scale.need(big, 8, job, machine, False)
    assert whole.weights == 2 * big.weights > needs[2].weights
    assert sum(scale.hours(big, 16, job, machine, True)) > sum(scale.hours(big, 8, job, machine, True))
    assert sum(scale.hours(big, 8, job, replace(machine, share=0.1), False)) > sum(whole.hours)
    assert scale.disk(big, job)["targets"] == (64 + 32) * 100 * 80 * 8192 * 2


def test_the_gpu_script_runs_on_a_cpu(perf: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "results" / "gpu.json"
    sizes = ["--rows", "2", "--query-tokens", "9", "--answer-tokens", "3", "--context-tokens", "30"]
    gpu = perf("gpu")
    gpu.main(["--tiny", "--repeat", "1", *sizes, "--output", str(file)])
    found = json.loads(file.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu" and found["matrix_flops"] > 0
    for name in ("align", "align, recomputed", "sft", "sft, recomputed"):
        assert found[name]["seconds"] > 0 and 0 < found[name]["share_of_rate"] < 1
        assert found[name]["predicted_bytes"] > 0 and found[name]["peak_bytes"] is None
    assert found["teacher"]["written_tokens_per_second"] > 0
    assert gpu.main(["--tiny", *sizes, "--stage-only"])["rows_per_second"] > 0
