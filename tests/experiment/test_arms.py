"""Which rows a comparison has, and which of them are compared with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.benches import icl_base, icl_examples

from ia2.config import CompareConfig
from ia2.config.reading import validate
from ia2.experiment.compare import compare
from ia2.experiment.methods import arms, rivals
from ia2.utils.errors import ConfigError
from ia2.utils.files import digest, finite


def names(**settings: Any) -> list[str]:
    return [arm.name for arm in arms(CompareConfig(**settings))]


def test_recipes_without_training_have_no_adapter_and_sft_no_objective() -> None:
    found = names(
        recipes=["base", "icl", "sft", "ia2-sft"], adapters=["lora", "ia3"], objectives=["mse", "kl"]
    )
    assert found == [
        "base",
        "icl",
        "sft@lora",
        "sft@ia3",
        "ia2-sft@lora-mse",
        "ia2-sft@lora-kl",
        "ia2-sft@ia3-mse",
        "ia2-sft@ia3-kl",
    ]
    assert names(recipes=["base", "ia2+sft"]) == ["base", "ia2+sft"]


def test_an_arm_has_its_settings() -> None:
    config = CompareConfig(
        recipes=["ia2-sft"], adapters=["lora", "prefix"], objectives=["kl"], adapter={"rank": 4}
    )
    lora, prefix = arms(config)
    assert (lora.config.adapter.type, lora.config.adapter.rank) == ("lora", 4)
    assert (prefix.config.adapter.type, prefix.config.adapter.rank) == ("prefix", None)
    assert lora.config.align.objective == lora.config.joint.objective == "kl"


def test_rivals() -> None:
    every = arms(
        CompareConfig(recipes=["base", "sft", "ia2-sft"], adapters=["lora", "ia3"], objectives=["mse", "kl"])
    )
    found = {arm.name: [other.name for other in rivals(arm, every)] for arm in every}
    assert found["sft@lora"] == []
    assert found["ia2-sft@lora-mse"] == ["base", "sft@lora"]
    assert found["ia2-sft@ia3-kl"] == ["base", "sft@ia3", "ia2-sft@lora-mse"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"adapters": ["lora", "pre"]}, "'pre' is not one of"),
        ({"adapters": ["prefix"], "adapter": {"rank": 4}}, "adapter.rank is a setting of none of prefix"),
        ({"objectives": ["mse", "attention"], "align": {"normalise": True}}, "normalise does nothing to"),
        ({"adapters": ["lora"], "adapter": {"peft": {"peft_type": "IA3"}}}, "both given"),
    ],
)
def test_refusals(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arms(validate(CompareConfig, settings))
    assert told in str(caught.value)


def test_comparing_adapters_and_objectives(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = icl_examples(24, task=1, num_classes=2)
    brief = {"epochs": 2}
    config = CompareConfig(
        recipes=["base", "sft", "ia2-sft"],
        adapters=["lora", "full"],
        objectives=["mse", "cosine"],
        seeds=1,
        num_examples=6,
        align=brief,
        sft=brief,
    )
    base = icl_base(tiny_icl_model_path)
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    found = compare(base, rows[:12], config, test=rows[12:], output_dir=tmp_path / "run").summary
    assert list(found["recipes"]) == [arm.name for arm in arms(config)]
    assert found["design"]["learning_rates"].keys() == {"lora", "full"}
    assert "ia2-sft@full-cosine − sft@full" in found["differences"]
    # the base model is as it was, and no weights of whole models are left behind
    assert all((weights[name] == value).all() for name, value in base.model.state_dict().items())
    assert not list((tmp_path / "run").rglob("*full*/**/*.safetensors"))
    assert list((tmp_path / "run").rglob("lora*/**/*.safetensors"))
    # finished before: nothing is trained again
    again = compare(base, rows[:12], config, test=rows[12:], output_dir=tmp_path / "run").summary
    assert digest(finite(again["recipes"])) == digest(finite(found["recipes"]))
