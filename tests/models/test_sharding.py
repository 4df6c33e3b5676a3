"""Two processes train what one trains: each with the whole model, and each with half of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import icl_examples
from helpers.launching import together

import ia2.models.load
from ia2 import AdaptConfig, adapt
from ia2.adapters.types import peft_config
from ia2.adapters.weights import attach, detach
from ia2.config.recipes import ADAPTER_NAMES
from ia2.config.sections import AdapterConfig
from ia2.models.batching import in_halves
from ia2.models.forward import answer_pass
from ia2.models.generation import generate_answers
from ia2.models.load import load_base
from ia2.models.sharding import NEEDS_WHOLE
from ia2.training.dataset import AnswerDataset, AnswerRow, Collator
from ia2.training.trainer import ExampleTrainer
from ia2.utils import distributed
from ia2.utils.errors import ConfigError
from ia2.utils.logging import Progress

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def trained(path: Path, folder: Path, stop_after: int | None = None, **settings: Any) -> dict[str, Any]:
    """A recipe, stopped and taken up again if asked; in float64, since Adam makes rounding errors visible."""
    ia2.models.load.DTYPES = (*ia2.models.load.DTYPES, "float64")
    base = load_base(str(path), device="cpu", dtype="float64")
    rows = icl_examples(24)
    config = AdaptConfig(
        learning_rates=[0.002],
        selection="dev",
        align={"epochs": 3},
        sft={"epochs": 3},
        num_examples=7,
        checkpoint_every=1,
        **settings,
    )
    if stop_after is not None:
        plain, steps = ExampleTrainer.training_step, []

        def stopping(*given: Any, **named: Any) -> Any:
            if len(steps) == stop_after:
                raise KeyboardInterrupt
            steps.append(1)
            return plain(*given, **named)

        ExampleTrainer.training_step = stopping  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            adapt(base, rows[:12], config, test=rows[12:], output_dir=folder)
        ExampleTrainer.training_step = plain  # type: ignore[method-assign]
        assert list(folder.rglob("checkpoint-*/complete.json"))
        base = load_base(str(path), device="cpu", dtype="float64")
    result = adapt(base, rows[:12], config, test=rows[12:], output_dir=folder)
    own = [p.to_local() if hasattr(p, "to_local") else p for p in base.model.model.layers.parameters()]
    lora = {name: p.detach().numpy() for name, p in result.model.named_parameters() if "lora_" in name}
    return {
        "lora": lora,
        "loss": result.metrics["dev_loss_by_learning_rate"],
        "steps": result.metrics["steps"],
        "similarity": result.metrics["similarity_to_icl"]["asim"],
        "predictions": [(p.predicted, round(p.confidence, 6)) for p in result.predictions],
        "size": sum(p.numel() for p in own) - sum(p.size for p in lora.values()),
    }


@pytest.mark.parametrize("how", ["ddp", "sharded, stopped and recomputing", "sharded, joint"])
def test_two_processes_train_what_one_trains(how: str, tiny_icl_model_path: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"recipe": "ia2-sft"}
    if "joint" in how:
        settings = {"recipe": "ia2+sft", "joint": {"epochs": 3, "answers": "ground_truth"}}
        settings |= {"task": "generation", "max_answer_tokens": 3}
    alone = trained(tiny_icl_model_path, tmp_path / "alone", **settings)
    if "stopped" in how:
        settings |= {"activation_checkpointing": True, "stop_after": 3}
    env = {} if how == "ddp" else FSDP
    both = together(tmp_path / "logs", _trained, tiny_icl_model_path, tmp_path / "both", settings, **env)
    assert max(abs(p).max() for n, p in alone["lora"].items() if "lora_B" in n) > 1e-3
    for found in both:
        assert found["steps"] == alone["steps"] and min(alone["steps"].values()) > 4
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert found["similarity"] == pytest.approx(alone["similarity"], rel=1e-5)
        assert found["predictions"] == alone["predictions"]
        assert found["lora"].keys() == alone["lora"].keys()
        for name, weight in alone["lora"].items():
            assert found["lora"][name] == pytest.approx(weight, rel=1e-5, abs=1e-8)
        assert found["size"] == (alone["size"] if how == "ddp" else alone["size"] // 2)


def _trained(path: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return trained(path, folder, **settings)


@pytest.mark.parametrize("packed", [False, True])
def test_any_rows_take_as_many_passes(packed: bool) -> None:
    # a long and two short queries, answered rightly; two alike, answered wrongly
    one = [AnswerRow((5,) * n, (6, 2), (6, 2)) for n in (900, 20, 20)]
    other = [AnswerRow((5,) * 20, (6, 2), (7, 2)) for _ in range(2)]

    def passes(rows: list[AnswerRow], alike: bool) -> set[str]:
        dataset = AnswerDataset.of(rows)
        batch = Collator(0, packed, alike)([dataset[i] for i in range(len(rows))])
        return {"rows", "response"} & set(batch)

    assert passes(one, False) != passes(other, False)
    assert passes(one, True) == passes(other, True) == {"rows", "response"}


def unlike(path: Path, part: int | None = None) -> tuple[dict[int, Any], int]:
    """Answers to a part of four prompts and their logits, a row at a time; and how often a layer was run."""
    part = distributed.number() if part is None else part
    base = load_base(str(path), device="cpu", dtype="float32")
    prompts = [tuple(base.tokenizer(row.query)["input_ids"]) for row in icl_examples(4)]
    mine, limit = ((0, 1, 2), 9) if part == 0 else ((3,), 2)
    passes: list[int] = []
    base.model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    asked = [prompts[i] for i in mine]
    answers = generate_answers(base.model, base.tokenizer, asked, max_new_tokens=limit, batch_tokens=1)
    pairs = [(prompt, answer.ids) for prompt, answer in zip(asked, answers, strict=True)]
    found = {mine[o.index]: o.logits for o in answer_pass(base.model, base.tokenizer, pairs, batch_tokens=1)}
    return {i: (a.ids, found[i].numpy()) for i, a in zip(mine, answers, strict=True)}, len(passes)


def test_processes_with_shards_may_make_unlike_passes(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    (many, most), (few, least) = (unlike(tiny_icl_model_path, part) for part in (0, 1))
    (first, passes), (second, as_many) = together(tmp_path / "logs", unlike, tiny_icl_model_path, **FSDP)
    assert most > least and passes == as_many >= most
    for found, alone in ((first, many), (second, few)):
        assert found.keys() == alone.keys()
        for i, (answer, logits) in alone.items():
            assert found[i][0] == answer
            assert found[i][1] == pytest.approx(logits, rel=1e-5, abs=1e-5)


def refused(path: Path) -> list[str]:
    """What is said to adapters that train weights of the model itself."""
    base = load_base(str(path), device="cpu", dtype="float32")
    found = []
    for adapter in (AdapterConfig(type="full"), AdapterConfig(type="dora")):
        with pytest.raises(ConfigError) as caught:
            attach(base.model, peft_config(base.model, adapter), 0)
        found.append(str(caught.value))
    return found


def steps(path: Path) -> dict[str, Any]:
    """Loss of a row with each other adapter, and the sizes of its gradients."""
    base = load_base(str(path), device="cpu", dtype="float32")
    ids = torch.tensor([base.tokenizer(icl_examples(1)[0].query)["input_ids"]])
    found = {}
    for name in set(ADAPTER_NAMES) - {"full", "dora"}:
        model = attach(base.model, peft_config(base.model, AdapterConfig(type=name)), 0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        sizes = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
        found[name] = [loss.item(), *sizes]
        detach(model)
    return found


def test_other_adapters_learn_on_shards(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    alone = steps(tiny_icl_model_path)
    for found in together(tmp_path / "logs", steps, tiny_icl_model_path, **FSDP):
        assert found.keys() == alone.keys()
        for name, values in alone.items():
            assert len(values) > 1 and max(values[1:]) > 0
            assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-7), name


def test_a_pass_that_fails_is_not_made_again_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[int]] = []

    def run(members: list[int]) -> list[int]:
        tried.append(members)
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr("ia2.models.batching.stepping", lambda: True)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(in_halves([[0, 1]], run, Progress()))
    assert tried == [[0, 1]]


def test_quantised_weights_are_refused(tiny_icl_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ia2.models.load.shards_model", lambda: True)
    with pytest.raises(ConfigError, match="quantised weights cannot be sharded"):
        load_base(str(tiny_icl_model_path), device="cpu", quantization="4bit")


def test_adapters_that_need_whole_weights_are_refused(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    for found in together(tmp_path / "logs", refused, tiny_icl_model_path, **FSDP):
        assert found == [NEEDS_WHOLE, NEEDS_WHOLE]
