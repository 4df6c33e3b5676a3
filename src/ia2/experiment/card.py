"""The model card (``README.md``) beside an adapter."""

from __future__ import annotations

from typing import Any

from ia2.config.packaged_models import PACKAGED_MODELS
from ia2.config.recipes import describe
from ia2.evaluation.tables import metrics_table
from ia2.prompts.task import Task
from ia2.utils.format import markdown

_CARD = """\
---
{front}---

# Adapter made by ia2 ({recipe})

{description}

| | |
|---|---|
| base model | `{model}` |
| recipe | `{recipe}` |
| training examples | {train} (and {dev} dev rows) |
{unlabelled}| data (SHA-256, first 16 digits) | train `{train_hash}`, dev `{dev_hash}` |
| learning rate | {rate:g}, chosen by {selected}{diverged} |
| seed | {seed} |
| answers | {answers} |

## Metrics

{metrics}
## How to load

```python
{load}
```

or `ia2 predict --adapter path/to/this/folder --data new.jsonl`.

## Method

*IA2: Alignment with ICL Activations Improves Supervised Fine-Tuning* (Mishra, Khashabi, Liu; ICLR 2026,
arXiv 2509.22621). Settings are in `ia2_config.yaml`, all metrics in `metrics.json`.
"""


def model_card(metrics: dict[str, Any], facts: dict[str, Any], task: Task) -> str:
    """Markdown with base model, data hashes, metrics and how to load."""
    config = facts["config"]
    model = config["model"]
    table = metrics_table(metrics)
    labels = ", ".join(f"`{label.strip()}`" for label in task.labels[:20])
    front = "library_name: peft\ntags: [ia2, few-shot, adapter]\n"
    if model not in PACKAGED_MODELS:
        front = f"base_model: {_yaml_text(model)}\n" + front
    return _CARD.format(
        front=front,
        recipe=metrics["recipe"],
        description=f"Trained by {describe(metrics['recipe'], config['schedules'])}." + _chosen(metrics),
        model=model,
        train=metrics["num_train"],
        dev=metrics["num_dev"],
        unlabelled=_unlabelled(metrics),
        train_hash=facts["data"]["train"],
        dev_hash=facts["data"]["dev"],
        rate=metrics["learning_rate"],
        selected=metrics["selected_by"],
        diverged="; diverged: " + "; ".join(diverged) if (diverged := metrics.get("diverged")) else "",
        seed=config["seed"],
        answers=f"one of {labels}" if task.labels else f"free text, up to {task.max_answer_tokens} tokens",
        metrics="Not evaluated: there were neither test nor dev rows.\n"
        if table is None
        else markdown(table),
        load=_loading(model, config["adapter"]),
    )


def _chosen(metrics: dict[str, Any]) -> str:
    return f" Why this recipe: {metrics['chosen_because']}" if "chosen_because" in metrics else ""


def _unlabelled(metrics: dict[str, Any]) -> str:
    if not metrics.get("num_unlabelled"):
        return ""
    return (
        f"| unlabelled rows | {metrics['num_unlabelled']} (and {metrics['num_unlabelled_dev']} held out) |\n"
    )


def _loading(model: str, adapter: dict[str, Any]) -> str:
    """Python that loads what lies beside the card."""
    here = '"path/to/this/folder"'
    if adapter["peft"] is None and adapter["type"] == "full":
        return (
            "from transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({here})"
        )
    kind = adapter["peft"]["peft_type"] if adapter["peft"] else adapter["type"]
    # PEFT learns of this type when it is imported
    first = "import ia2.adapters.bottleneck\n" if str(kind).lower() == "bottleneck" else ""
    if model in PACKAGED_MODELS:
        base = f'from ia2 import load_base\n\nbase = load_base("{model}").model'
    else:
        base = (
            "from transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({model!r})"
        )
    return f"{first}from peft import PeftModel\n{base}\nmodel = PeftModel.from_pretrained(base, {here})"


def _yaml_text(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
