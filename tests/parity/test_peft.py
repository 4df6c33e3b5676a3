"""What a run leaves behind is an ordinary PEFT adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.benches import icl_examples
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ia2.config import TrainConfig
from ia2.experiment.adapt import adapt, load_adapter
from ia2.utils.locks import LOCK


@pytest.mark.parametrize("recipe", ["ia2-sft", "ia2", "sft"])
def test_plain_peft_loads_the_run_folder(recipe: str, tiny_icl_model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = TrainConfig(
        recipe=recipe, device="cpu", learning_rates=[3e-3], align={"epochs": 3}, sft={"epochs": 3}
    )
    result = adapt(str(tiny_icl_model_path), icl_examples(9), config, output_dir=folder)

    stages = {"ia2-sft": {"align", "sft"}, "ia2": {"align"}, "sft": {"sft"}}[recipe]
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "ia2_config.yaml", "metrics.json"} <= names
    assert names & {"align", "sft"} == stages
    assert ("teacher" in names) == ("align" in stages)
    leftovers = [p for p in folder.rglob("*") if p.name.startswith((".", "checkpoint-"))]
    assert [path.name for path in leftovers] == [LOCK]
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".pth")]

    fresh = AutoModelForCausalLM.from_pretrained(tiny_icl_model_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["z3 b2 z0 z7", "a1 z2 z5"], return_tensors="pt", padding=True)
    with torch.no_grad():
        before = fresh(**batch).logits
        plain = PeftModel.from_pretrained(fresh, folder)
        loaded = plain(**batch).logits
        own = result.model(**batch).logits
        ours = load_adapter(folder, device="cpu")[0].model(**batch).logits
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert torch.equal(loaded, own)
    assert torch.equal(ours, own)
    assert not torch.allclose(before, own, atol=1e-2), "training ought to have changed the model"
