"""``L_IA2`` against a naive computation written straight from METHOD.md.

The reference knows nothing of the package: full forward passes of one row each, no cache, greedy
generation token by token, hooks of its own, the LoRA update added to the weights by hand.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import (
    align_rows,
    align_trainer,
    base_of,
    bench_of,
    icl_base,
    icl_examples,
    rows_of,
    word_examples,
    wordy_model,
)

SEPARATOR = "\n\n"


# ------------------------------------------------------------------------------------ the reference


def merged_by_hand(base: Any, state: dict[str, torch.Tensor], scale: float) -> Any:
    """``W + (α/r)·B·A`` for every adapted projection."""
    model = copy.deepcopy(base)
    for name, a in state.items():
        if "lora_A" in name:
            place = name.split("base_model.model.")[1].split(".lora_A")[0]
            b = state[name.replace("lora_A", "lora_B")]
            model.get_submodule(place).weight.data += scale * b @ a
    return model


@torch.no_grad()
def activations(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """``[L, G, d]`` of the context ``prompt ∘ answer`` at the answer positions."""
    heard: list[torch.Tensor] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda _, __, out: heard.append(out[0][0]))
        for layer in model.model.layers
    ]
    model(input_ids=torch.tensor([prompt + answer]), use_cache=False)
    for handle in handles:
        handle.remove()
    first = len(prompt) - 1
    return torch.stack([layer[first : first + len(answer)] for layer in heard])


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: list[int], limit: int, stop: str) -> list[int]:
    """``Ŷ``: ends at the end of sequence (kept), before the stop text (end appended), or at the limit."""
    end, ids = tokenizer.eos_token_id, []
    for _ in range(limit + len(tokenizer(stop, add_special_tokens=False)["input_ids"])):
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == end:
            return [*ids, end] if len(ids) <= limit else ids[:limit]
        ids.append(token)
        text = tokenizer.decode(ids)
        if stop in text:
            while tokenizer.decode(ids) != text[: text.index(stop)]:
                ids.pop()
            return [*ids, end] if len(ids) <= limit else ids[:limit]
    return ids[:limit]


def reference(
    base: Any, adapted: Any, tokenizer: Any, rows: list[dict[str, Any]], limit: int, stop: str
) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """For every row ``(Ŷ, A_ICL, A)``; a row has a query and the texts of its contexts."""
    found = []
    for row in rows:
        prompts = [tokenizer(text)["input_ids"] for text in row["contexts"]]
        if limit == 1:
            with torch.no_grad():
                heads = [base(input_ids=torch.tensor([p])).logits[0, -1].softmax(-1) for p in prompts]
            answer = [int(torch.stack(heads).mean(0).argmax())]
        else:
            answer = greedy(base, tokenizer, prompts[0], limit, stop)
        icl = torch.stack([activations(base, prompt, answer) for prompt in prompts]).mean(0)
        found.append((answer, icl, activations(adapted, tokenizer(row["query"])["input_ids"], answer)))
    return found


def losses(found: list[Any], objective: str, rms: torch.Tensor, tau: float) -> list[float]:
    """``L_IA2`` of each row: sum over layers, mean over its tokens and features."""
    values = []
    for _, icl, own in found:
        icl, own = icl.double(), own.double()
        if objective == "mse":
            by_layer = ((own - icl) ** 2).mean(dim=(1, 2))
        else:
            t = (tau * rms)[:, None, None]
            p, q = torch.softmax(icl / t, -1), torch.softmax(own / t, -1)
            by_layer = (tau * rms) ** 2 * (p * (p / q).log()).sum(-1).mean(-1)
        values.append(float(by_layer.sum()))
    return values


def root_mean_squares(found: list[Any]) -> torch.Tensor:
    """Of each layer, over all training targets."""
    return torch.cat([icl.double() for _, icl, _ in found], dim=1).pow(2).mean(dim=(1, 2)).sqrt()


# ------------------------------------------------------------------------------------- the library


def cases(case: str, word_tokenizer: Any, path: Path) -> dict[str, Any]:
    if case == "random, labels":
        base = base_of(wordy_model(), word_tokenizer)
        return {"base": base, "rows": word_examples(9), "settings": {}}
    if case == "random, free text":
        base = base_of(wordy_model(), word_tokenizer)
        rows = word_examples(9, label_words=4)
        return {"base": base, "rows": rows, "settings": {"task": "generation", "max_answer_tokens": 7}}
    if case == "trained, labels":
        return {"base": icl_base(path), "rows": icl_examples(9), "settings": {}}
    return {
        "base": icl_base(path),
        "rows": icl_examples(9),
        "settings": {"task": "generation", "max_answer_tokens": 3, "context_draws": 2},
    }


def chosen(contexts: Any) -> list[list[list[int]]]:
    """Demonstrations of each query, in each order."""
    return [[contexts.chosen(i, k) for k in range(contexts.permutations)] for i in range(len(contexts))]


@pytest.mark.parametrize("objective", ["mse", "kl"])
@pytest.mark.parametrize(
    "case", ["random, labels", "random, free text", "trained, labels", "trained, free text, two orders"]
)
def test_loss_is_the_methods(
    case: str, objective: str, word_tokenizer: Any, tiny_icl_model_path: Path, tmp_path: Path
) -> None:
    made = cases(case, word_tokenizer, tiny_icl_model_path)
    base, every = made["base"], made["rows"]
    train, dev = every[:6], every[6:]
    bare = copy.deepcopy(base.model)
    bench = bench_of(base, train, dev, tmp_path, randomise=True, targets="store", **made["settings"])
    targeted = {name.split(".")[-4] for name, _ in bench.model.named_parameters() if "lora_B" in name}
    assert targeted == {"q_proj", "k_proj", "o_proj"}
    from ia2.adapters.weights import adapter_state

    adapted = merged_by_hand(bare, adapter_state(bench.model), scale=8 / 8)

    def rows(examples: Any, orders: list[list[list[int]]]) -> list[dict[str, Any]]:
        demos = [f"{e.query}{e.answer}{SEPARATOR}" for e in train]
        return [
            {"query": e.query, "contexts": ["".join(demos[j] for j in o) + e.query for o in own]}
            for e, own in zip(examples, orders, strict=True)
        ]

    orders = chosen(bench.train_contexts)
    for i, own in enumerate(orders):
        assert all(sorted(order) == [j for j in range(6) if j != i] for order in own)  # leave one out
    limit, (stop,) = bench.task.max_answer_tokens, bench.task.stop_texts
    known = {
        "train": reference(bare, adapted, base.tokenizer, rows(train, orders), limit, stop),
        "dev": reference(
            bare,
            adapted,
            base.tokenizer,
            rows(dev, chosen(bench.teaching.contexts("dev"))),
            limit,
            stop,
        ),
    }
    rms = root_mean_squares(known["train"])
    tau = 0.7

    data = dict(zip(("train", "dev"), align_rows(bench), strict=True))
    align = {"objective": objective, "temperature": tau}
    trainer = align_trainer(bench, (data["train"], data["dev"]), tmp_path, align=align, batch_size=6)
    for part, dataset in data.items():
        assert [list(row.answer) for row in rows_of(dataset)] == [answer for answer, _, _ in known[part]]
        expected = losses(known[part], objective, rms, tau)
        batch = trainer._prepare_inputs(trainer.data_collator([dataset[i] for i in range(len(dataset))]))
        assert trainer.loss(bench.model, batch).tolist() == pytest.approx(expected, rel=1e-5)
        # the same again as one number, the way a training step and a dev evaluation ask for it
        mean = sum(expected) / len(expected)
        assert float(trainer.compute_loss(bench.model, batch)) == pytest.approx(mean, rel=1e-5)
        assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(mean, rel=1e-5)
    lengths = {len(answer) for answer, _, _ in known["train"]}
    if case == "random, free text":
        assert len(lengths) > 1, "the batch ought to have answers of unequal lengths"
    assert (lengths == {1}) == ("labels" in case)
