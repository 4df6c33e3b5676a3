"""What cannot work in the end is refused before anything is trained, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.adapting import INPUTS, disturb, logits
from helpers.command_line import run
from helpers.families import FAMILIES
from helpers.sweeping import grid_of, write_files, write_grid
from peft import PeftModel

from ia2.adapters.checks import check_adapter
from ia2.adapters.types import peft_config
from ia2.adapters.weights import attach, base_weights, detach, save_adapter
from ia2.config.sections import AdapterConfig
from ia2.models.families import takes_cache
from ia2.utils.errors import ConfigError, ModelError
from ia2.utils.files import read_json

# ------------------------------------------------------------------------- benchmarks of another kind


@pytest.mark.parametrize("trained", ["two", "free"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_partner_with_answers_of_another_kind(
    trained: str, parts: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_files(tmp_path / "files")
    entry = yaml.safe_load((files / f"{trained}.yaml").read_text())
    entry["ood"] = [{"two": "free.yaml", "free": "three.yaml"}[trained]]
    (files / f"{trained}.yaml").write_text(yaml.safe_dump(entry, sort_keys=False))
    grid = grid_of(files, benchmarks=[str(files / f"{trained}.yaml")], recipes=["icl", "sft"], ood=True)
    if parts:
        grid["parts"] = [{"ood": False}, {"seeds": 2}]
    file = write_grid(tmp_path / "grid.yaml", grid)
    for more in ([], ["--dry-run"]):
        said = run(capsys, "sweep", file, "--output-dir", tmp_path / "out", "--quiet", *more).refusal()
        names = {"two": ("Two", "Free"), "free": ("Free", "Three")}[trained]
        assert all(name in said for name in names) and "labels" in said and "free text" in said
        assert "ood: false" in said
        assert not (tmp_path / "out").exists()
    # the way out
    grid = {**grid, "ood": False, "parts": []}
    file = write_grid(tmp_path / "grid.yaml", grid)
    assert run(capsys, "sweep", file, "--output-dir", tmp_path / "out", "--quiet").status == 0


def test_a_partner_with_other_labels_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More labels, of more tokens: what is fitted and measured is the same for all labels."""
    files = write_files(tmp_path / "files")
    entry: dict[str, Any] = yaml.safe_load((files / "three.yaml").read_text())
    entry["verbalisers"] = {"long": {0: " good film", 1: " bad film", 2: " film"}}
    (files / "three.yaml").write_text(yaml.safe_dump(entry, sort_keys=False))
    file = write_grid(tmp_path / "grid.yaml", grid_of(files, recipes=["icl", "sft"], ood=True))
    ran = run(capsys, "sweep", file, "--output-dir", tmp_path / "out", "--quiet")
    assert (ran.status, ran.err) == (0, "")


# ---------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    "kinds",
    [
        {"layers_block_type": ["mamba", "attention"]},
        {"layers_block_type": ["recurrent", "attention"]},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"layer_types": ["hybrid_sliding", "full_attention"]},
        {"layer_types": ["compressed_sparse_attention", "full_attention"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter", [{"type": "prefix"}, {"peft": {"peft_type": "PREFIX_TUNING"}}], ids=str)
def test_prefix_tuning_where_a_layer_keeps_more_than_keys_and_values(
    adapter: dict[str, Any], kinds: dict[str, Any], tiny_llama: Any
) -> None:
    """What cannot be cached as keys and values cannot be tuned as such: one rule, whatever it is called."""
    for name, value in kinds.items():
        setattr(tiny_llama.config, name, value)
    assert not takes_cache(tiny_llama)
    with pytest.raises(ModelError, match="needs keys and values in every layer"):
        check_adapter(tiny_llama, AdapterConfig(**adapter))


LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**LORA, "task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({**LORA, "task_type": "FEATURE_EXTRACTION"}, "task_type is 'FEATURE_EXTRACTION'"),
        ({**LORA, "task_type": "causal_lm"}, "Set it to CAUSAL_LM"),
        ({**LORA, "task_type": 3}, "task_type is 3"),
        ({**LORA, "peft_type": "LOAR"}, "Did you mean 'LORA'?"),
        ({**LORA, "peft_type": ["LORA"]}, "PEFT has no peft_type ['LORA']"),
        ({"r": 2}, "needs the key peft_type"),
        ({**LORA, "target_modules": ["q_proj", "v_prj"]}, "no module named 'v_prj'"),
        ({**LORA, "target_modules": "("}, "does not work with"),
        (
            {**LORA, "modules_to_save": ["classifier"]},
            "adapter.peft.modules_to_save: LlamaForCausalLM has no",
        ),
        ({**LORA, "r": "a"}, "does not work with LlamaForCausalLM"),
        ({**LORA, "bias": "zzz"}, "does not work with LlamaForCausalLM"),
        ({**LORA, "runtime_config": {}}, "does not work with LlamaForCausalLM"),
        ({**LORA, "rr": 2}, "does not take this configuration"),
        ({**LORA, "init_lora_weights": "pissa"}, "changes the base model, which is the teacher"),
        ({**LORA, "init_lora_weights": "olora"}, "changes the base model, which is the teacher"),
        ({**LORA, "layer_replication": [[0, 1], [0, 2]]}, "layer_replication cannot be taken off"),
        ({"peft_type": "ADAPTION_PROMPT", "adapter_len": 3, "adapter_layers": 1}, "cannot be taken off"),
        ({"peft_type": "ADALORA"}, "does not take this configuration"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3, "num_tasks": 2}, "task_ids"),
        ({"peft_type": "POLY"}, "task_ids"),
        ({"peft_type": "PROMPT_TUNING"}, "num_virtual_tokens must be"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 0}, "num_virtual_tokens must be"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": "3"}, "num_virtual_tokens must be"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": 5}, "does not work with"),
    ],
    ids=str,
)
def test_peft_configurations_that_make_no_adapter(
    given: dict[str, Any], message: str, tiny_llama: Any
) -> None:
    before = tiny_llama(INPUTS).logits
    names = [name for name, _ in tiny_llama.named_parameters()]
    with pytest.raises(ConfigError) as caught:
        check_adapter(tiny_llama, AdapterConfig(peft=given))
    said = str(caught.value)
    assert said.startswith("adapter.peft") and message in said and "\n" not in said
    # the model is as before
    assert torch.equal(tiny_llama(INPUTS).logits, before)
    assert names == [name for name, _ in tiny_llama.named_parameters()]


def test_an_adapter_that_would_train_the_teacher() -> None:
    """As of ``bias``, in a model that has some."""
    model = FAMILIES["qwen2"]().requires_grad_(False)
    for bias in ("all", "lora_only"):
        with pytest.raises(ConfigError, match="of the base model would be trained"):
            check_adapter(model, AdapterConfig(peft={**LORA, "bias": bias}))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    check_adapter(model, AdapterConfig(peft={**LORA, "bias": "none"}))


def test_a_configuration_as_it_stands_in_a_file(tmp_path: Path, tiny_llama: Any) -> None:
    """Of a finished adapter of another base: what it says of them is no setting."""
    of_file = {
        "inference_mode": True,
        "base_model_name_or_path": "somebody/else",
        "revision": "abc",
        "peft_version": "0.1",
        "auto_mapping": {"base_model_class": "x"},
    }
    config = AdapterConfig(peft={**LORA, **of_file, "task_type": "CAUSAL_LM"})
    check_adapter(tiny_llama, config)
    adapted = attach(tiny_llama, peft_config(tiny_llama, config), 0)
    disturb(adapted)
    save_adapter(adapted, tmp_path)
    written = read_json(tmp_path / "adapter_config.json")
    assert written["base_model_name_or_path"] != "somebody/else" and written["revision"] is None
    assert written["task_type"] == "CAUSAL_LM"
    expected = logits(adapted)
    loaded = PeftModel.from_pretrained(detach(adapted), str(tmp_path))
    assert torch.allclose(logits(loaded), expected, atol=1e-6)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["mlp", "lm_head"]], ids=str)
def test_trained_copies_of_whole_modules_are_taken_off(saved: list[str], tiny_llama: Any) -> None:
    """They would stay in the base model, which is the teacher of the next adapter."""
    before = logits(tiny_llama)
    names = [name for name, _ in tiny_llama.named_parameters()]
    config = AdapterConfig(peft={**LORA, "modules_to_save": saved})
    check_adapter(tiny_llama, config)
    adapted = attach(tiny_llama, peft_config(tiny_llama, config), 0)
    disturb(adapted)
    assert not torch.allclose(logits(adapted), before)
    with base_weights(adapted):
        assert torch.equal(logits(adapted), before)
    base = detach(adapted)
    assert torch.equal(logits(base), before)
    assert names == [name for name, _ in base.named_parameters()]
