"""Adapters that cannot work, and rows that one leaves no room for, are refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapting import INPUTS, disturb, logits
from helpers.benches import base_of, word_examples
from helpers.command_line import Ia2, names, tree, write_rows
from helpers.families import FAMILIES, build, llama
from helpers.sweeping import swept, write_files
from peft import PeftModel

from ia2.adapters.checks import check_adapter
from ia2.adapters.types import peft_config
from ia2.adapters.weights import attach, base_weights, detach, save_adapter
from ia2.config import AdaptConfig, CompareConfig, CurveConfig, ProbeConfig
from ia2.config.sections import AdapterConfig
from ia2.data.examples import Example, Examples
from ia2.experiment.adapt import adapt
from ia2.experiment.compare import compare
from ia2.experiment.curve import curve
from ia2.experiment.probe import probe
from ia2.models.families import takes_cache
from ia2.models.load import BaseModel
from ia2.utils.errors import ConfigError, DataError, ModelError
from ia2.utils.files import read_json

# ---------------------------------------------------------------------------------------- adapters

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    "kinds",
    [
        {"layers_block_type": ["mamba", "attention"]},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"layer_types": ["hybrid_sliding", "full_attention"]},
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**LORA, "task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({**LORA, "task_type": "causal_lm"}, "Set it to CAUSAL_LM"),
        ({**LORA, "peft_type": "LOAR"}, "Did you mean 'LORA'?"),
        ({**LORA, "peft_type": ["LORA"]}, "PEFT has no peft_type ['LORA']"),
        ({**LORA, "target_modules": ["q_proj", "v_prj"]}, "no module named 'v_prj'"),
        ({**LORA, "target_modules": "("}, "does not work with"),
        (
            {**LORA, "modules_to_save": ["classifier"]},
            "adapter.peft.modules_to_save: Llama",
        ),
        ({**LORA, "r": "a"}, "does not work with LlamaForCausalLM"),
        ({**LORA, "rr": 2}, "does not take this configuration"),
        ({**LORA, "init_lora_weights": "pissa"}, "changes the base model, which is the teacher"),
        ({**LORA, "layer_replication": [[0, 1], [0, 2]]}, "layer_replication cannot be taken off"),
        ({"peft_type": "ADAPTION_PROMPT", "adapter_len": 3, "adapter_layers": 1}, "cannot be taken off"),
        ({"peft_type": "ADALORA"}, "does not take this configuration"),
        ({"peft_type": "POLY"}, "task_ids"),
        ({"peft_type": "PROMPT_TUNING"}, "num_virtual_tokens must be"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": "3"}, "num_virtual_tokens must be"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": 5}, "does not work with"),
    ],
    ids=str,
)
def test_peft_configurations_that_make_no_adapter(
    given: dict[str, Any], message: str, tiny_llama: Any
) -> None:
    before, parameters = logits(tiny_llama), [name for name, _ in tiny_llama.named_parameters()]
    with pytest.raises(ConfigError) as caught:
        check_adapter(tiny_llama, AdapterConfig(peft=given))
    said = str(caught.value)
    assert said.startswith("adapter.peft") and message in said and "\n" not in said
    # the model is as before
    assert torch.equal(logits(tiny_llama), before)
    assert parameters == [name for name, _ in tiny_llama.named_parameters()]


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
    of_file = {"inference_mode": True, "base_model_name_or_path": "somebody/else", "revision": "abc"}
    of_file |= {"peft_version": "0.1", "auto_mapping": {"base_model_class": "x"}, "task_type": "CAUSAL_LM"}
    config = AdapterConfig(peft={**LORA, **of_file})
    check_adapter(tiny_llama, config)
    adapted = attach(tiny_llama, peft_config(tiny_llama, config), 0)
    disturb(adapted)
    save_adapter(adapted, tmp_path)
    written = read_json(tmp_path / "adapter_config.json")
    assert written["base_model_name_or_path"] != "somebody/else" and written["revision"] is None
    expected = logits(adapted)
    loaded = PeftModel.from_pretrained(detach(adapted), str(tmp_path))
    assert torch.allclose(logits(loaded), expected, atol=1e-6)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["mlp", "lm_head"]], ids=str)
def test_trained_copies_of_whole_modules_are_taken_off(saved: list[str], tiny_llama: Any) -> None:
    """They would stay in the base model, which is the teacher of the next adapter."""
    before, parameters = logits(tiny_llama), [name for name, _ in tiny_llama.named_parameters()]
    config = AdapterConfig(peft={**LORA, "modules_to_save": saved})
    check_adapter(tiny_llama, config)
    adapted = attach(tiny_llama, peft_config(tiny_llama, config), 0)
    disturb(adapted)
    assert not torch.allclose(logits(adapted), before)
    with base_weights(adapted):
        assert torch.equal(logits(adapted), before)
    base = detach(adapted)
    assert torch.equal(base(INPUTS).logits, before)
    assert parameters == [name for name, _ in base.named_parameters()]


# ---------------------------------------------------------------------------------- virtual tokens

LONG = Example("good " * 73 + "\nLabel:", " positive", "the long row")  # 75 tokens; 16 more are too many
SHORT, TEST = word_examples(14), word_examples(4, seed=5)
BRIEF: dict[str, Any] = {name: {"epochs": 1} for name in ("align", "sft", "joint", "soft")}
BRIEF |= {"max_context_tokens": 90, "selection": "dev"}
ADAPTERS: list[dict[str, Any]] = [{"type": kind} for kind in ("prompt", "prefix", "p-tuning")]
ADAPTERS.append({"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 16}})


@pytest.fixture
def base(word_tokenizer: Any) -> BaseModel:
    return base_of(build(llama().config, seed=3), word_tokenizer)


def with_long(rows: Examples) -> Examples:
    return Examples([*rows, LONG], name=rows.name)


def compared(base: BaseModel, rows: Examples, test: Examples, **changes: Any) -> None:
    config = CompareConfig(**{**BRIEF, "recipes": ["base", "sft"], "seeds": 1, **changes})
    compare(base, rows, config, test=test, output_dir="out")


def cross_fitted(base: BaseModel, rows: Examples, test: Examples, **changes: Any) -> None:
    config = CompareConfig(**{**BRIEF, "recipes": ["base", "sft"], "seeds": 2, "folds": 2, **changes})
    compare(base, Examples([*rows, *test]), config, output_dir="out")


def adapted(base: BaseModel, rows: Examples, test: Examples, **changes: Any) -> None:
    adapt(base, rows, AdaptConfig(**BRIEF, recipe="sft", **changes), test=test, output_dir="out")


def drawn(base: BaseModel, rows: Examples, test: Examples, **changes: Any) -> None:
    """A row that only the largest size draws is refused before the smallest is trained."""
    draws = [rows.split(num_examples=2, seed=seed, balanced=True) for seed in range(20)]
    seed = next(s for s, d in enumerate(draws) if LONG not in [*d.train, *d.dev])
    config = CurveConfig(**BRIEF, sizes=[2, 10], recipes=["sft"], seeds=1, seed=seed, **changes)
    curve(base, rows, config, test=test, output_dir="out")


def probed(base: BaseModel, rows: Examples, test: Examples, **changes: Any) -> None:
    probe(base, Examples([*rows, *test]), ProbeConfig(**BRIEF, **changes))


@pytest.mark.parametrize("way", [compared, cross_fitted, adapted, drawn, probed])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_rows_that_an_adapter_leaves_no_room_for(
    adapter: dict[str, Any], way: Any, base: BaseModel, fits: list[str], here: Path
) -> None:
    for rows, test in ((with_long(SHORT), TEST), (SHORT, with_long(TEST))):
        if (way, test) == (drawn, TEST) or way is not drawn:
            with pytest.raises(DataError) as caught:
                way(base, rows, test, adapter=adapter)
            names(
                str(caught.value), "the long row: the prompt has ", "16 taken by the adapter's virtual tokens"
            )
    assert fits == [] and not (here / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"adapters": ["lora", "prefix"], "recipes": ["base", "icl", "ia2+sft"]},
        {"adapters": ["p-tuning"], "recipes": ["soft-sft"]},
        {"recipes": ["mine"], "schedules": {"mine": [{"stage": "sft"}]}, "adapter": {"type": "prompt"}},
    ],
    ids=str,
)
def test_any_arm_of_a_comparison(
    changes: dict[str, Any], base: BaseModel, fits: list[str], here: Path
) -> None:
    with pytest.raises(DataError, match=r"the long row: .* virtual tokens"):
        compared(base, SHORT, with_long(TEST), **changes)
    assert fits == []
    # the same rows fit other adapters
    compared(base, SHORT, with_long(TEST), adapters=["lora"])
    assert len(fits) == 1


@pytest.mark.parametrize("problem", ["virtual tokens", "window"])
def test_sweep(problem: str, tmp_path: Path, fits: list[str]) -> None:
    """Out-of-distribution rows too, and those that are too long for any adapter."""
    files = write_files(tmp_path / "files")
    file = files / "three" / "test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2]["text"] = "good " * (95 if problem == "window" else 69)
    write_rows(file, rows)
    settings: dict[str, Any] = {**BRIEF, "adapter.type": "lora" if problem == "window" else "prompt"}
    (failure,) = swept(files, tmp_path / "out", recipes=["sft"], ood=True, settings=settings).failed
    assert "test.jsonl:3: the prompt has " in failure["error"] and fits == []
    assert ("virtual tokens" in failure["error"]) == (problem != "window")


def test_what_uses_the_adapter(train: Ia2, ia2: Ia2, here: Path) -> None:
    """Once it is trained: predictions, evaluation and analysis of other rows."""
    write_rows(here / "long.jsonl", [("a0 z1", " L1"), ("z0 " * 498, " L1")])
    assert train("--recipe", "sft", "--adapter-type", "prompt").status == 0
    before = tree(here / "out")
    for command in ("predict --adapter", "eval --adapter", "analyze"):
        line = ia2(*command.split(), "out", "--data", "long.jsonl").refusal()
        names(line, "long.jsonl:2: the prompt has ", "virtual tokens")
    assert tree(here / "out") == before
