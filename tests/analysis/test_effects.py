"""Side effects: perplexity, diversity, wordings, other benchmarks; what is made of them; plain texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benches import base_of, icl_base, icl_examples, word_examples, wordy_model

from ia2.analysis.sections.effects import Rows, accuracy, other_benchmark, summarise, wording_accuracy
from ia2.config import AdaptConfig
from ia2.data.examples import Example
from ia2.evaluation.plain_text import DIVERSITY
from ia2.evaluation.wordings import UNCHANGED, WORDINGS, wordings
from ia2.prompts.format import PromptFormat
from ia2.prompts.task import make_task
from ia2.utils.errors import DataError
from ia2.utils.statistics import t_interval


def rows(*texts: str) -> list[Example]:
    return [Example(text, " good", f"row {n}") for n, text in enumerate(texts, 1)]


def test_wordings_of_a_template() -> None:
    queries = rows("Text:a film\nLabel:", "Text:the food\nLabel:")
    found = wordings(queries, [" bad", " good"])
    assert {name: examples[0].query for name, examples in found.items()} == {
        "unchanged": "Text:a film\nLabel:",
        "opening": "Input:a film\nLabel:",
        "cue": "Text:a film\nAnswer:",
        "blank line": "Text:a film\n\nLabel:",
        "lower case": "text:a film\nlabel:",
        "blank": "Text: a film\nLabel:",
        "instruction": "Answer with one of: bad, good.\nText:a film\nLabel:",
    }
    assert list(found) == list(WORDINGS)
    assert all(
        [e.answer, e.source] == [" good", f"row {n}"] for x in found.values() for n, e in enumerate(x, 1)
    )
    assert wordings(queries, [" bad", " good"], "Text:{text}\nLabel:") == found
    assert wordings(queries, [" bad", " good"], "Review: {text}\nLabel:") == found  # of other data


def test_accuracy_is_that_of_the_evaluation(tiny_icl_model_path: Path) -> None:
    base = icl_base(tiny_icl_model_path)
    examples = icl_examples(24)
    task = make_task(examples, AdaptConfig(), base.tokenizer)
    rendering = PromptFormat(base.tokenizer)
    found = accuracy(base.model, base.tokenizer, task, examples, rendering, 64)
    for n, example in enumerate(examples):
        ids = torch.tensor([rendering.query_ids(example)])
        with torch.no_grad():
            logits = base.model(input_ids=ids).logits[0, -1]
        gold = task.label_ids[task.label_of(example)][0]
        assert found["vocabulary"][n] == (int(logits.argmax()) == gold)
        best = max(task.label_ids, key=lambda label: float(logits[label[0]]))
        assert found["labels"][n] == (best[0] == gold)
    worded = wordings(examples, task.labels)
    by_wording = wording_accuracy(base.model, base.tokenizer, task, worded, rendering, 64)
    np.testing.assert_array_equal(by_wording["wordings", UNCHANGED, "vocabulary"], found["vocabulary"])
    assert list(dict.fromkeys(key[1] for key in by_wording)) == [UNCHANGED, "instruction"]


def test_a_wording_that_does_not_fit_is_left_out_and_said(
    word_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    examples = word_examples(6)
    base = base_of(wordy_model(), word_tokenizer)
    task = make_task(examples, AdaptConfig(), word_tokenizer)
    rendering = PromptFormat(word_tokenizer)
    longest = max(len(rendering.query_ids(example)) for example in examples)
    worded = wordings(examples, task.labels)
    found = wording_accuracy(base.model, word_tokenizer, task, worded, rendering, longest + 2)
    kept = {key[1] for key in found}
    assert "instruction" not in kept and "The wording 'instruction' is left out" in caplog.text
    assert {"cue", "blank line"} <= kept
    with pytest.raises(DataError):
        wording_accuracy(base.model, word_tokenizer, task, worded, rendering, 3)


def test_another_benchmark(tmp_path: Path, word_tokenizer: Any) -> None:
    rendering = PromptFormat(word_tokenizer)
    with pytest.raises(DataError, match=r"^Intents: the labels .* are the same tokens"):
        other_benchmark("Intents", rendering)  # the tokenizer knows none of these words
    (tmp_path / "test.jsonl").write_text(
        '{"q": "cat", "a": 1}\n{"q": "dog", "a": 0}\n{"q": "the fish", "a": 1}\n'
    )
    (tmp_path / "own.yaml").write_text(
        "name: Own\npath: .\nprompt: 'Question:{q}\\nAnswer:'\nlabel: a\ntest: {split: test, rows: 3}\n"
        "verbalisers:\n  digits: {0: ' no', 1: ' yes'}\n"
    )
    task, found = other_benchmark(tmp_path / "own.yaml", rendering)
    assert task.labels == (" no", " yes") and len(found) == 3
    measured = accuracy(wordy_model(), word_tokenizer, task, found, rendering, 64)
    assert {scope: values.shape for scope, values in measured.items()} == {"vocabulary": (3,), "labels": (3,)}


def made(seed: int, better: float = 0.0, texts: int = 12, queries: int = 30) -> Rows:
    rng = np.random.default_rng(seed)
    tokens = np.arange(texts) + 20.0
    shares = {("benchmarks", "Own"): 0.4}
    shares |= {
        ("wordings", n): s for n, s in zip(WORDINGS, np.linspace(0.6, 0.3, len(WORDINGS)), strict=True)
    }
    rows: Rows = {("perplexity",): np.stack([(3 + rng.random(texts) + better) * tokens, tokens], axis=1)}
    rows |= {("diversity", name): rng.random(10) + better for name in DIVERSITY}
    for key, share in shares.items():
        correct = (rng.random(queries) < share + better).astype(float)
        rows[(*key, "vocabulary")] = correct
        rows[(*key, "labels")] = np.maximum(correct, rng.random(queries) < 0.3)
    return rows


def test_a_summary_of_one_trial() -> None:
    base, sft = made(0), made(1, 0.2)
    section = summarise([{"base": base, "sft": sft}])
    assert section["views"] == ["base", "sft"]
    own, its = base["perplexity",], sft["perplexity",]
    found = section["perplexity"]["views"]
    assert found["base"]["perplexity"]["value"] == pytest.approx(math.exp(own[:, 0].sum() / own[:, 1].sum()))
    ratio = math.exp((its[:, 0].sum() - own[:, 0].sum()) / own[:, 1].sum())
    assert found["sft"]["ratio"]["value"] == pytest.approx(ratio)
    assert found["sft"]["ratio"]["low"] is None  # no mean of rows, and one trial
    assert "ratio" not in found["base"]
    assert section["perplexity"]["tokens"] == own[:, 1].sum()

    entry = section["benchmarks"]["Own"]["scopes"]["labels"]["views"]["sft"]
    paired = t_interval(sft["benchmarks", "Own", "labels"] - base["benchmarks", "Own", "labels"])
    assert entry["difference"] == pytest.approx(paired.to_dict())
    leak = section["diversity"]["measures"]["leak"]["views"]
    assert leak["sft"]["mean"]["value"] == pytest.approx(sft["diversity", "leak"].mean())
    assert leak["sft"]["difference"]["value"] == pytest.approx(
        sft["diversity", "leak"].mean() - base["diversity", "leak"].mean()
    )
    worded = section["wordings"]["scopes"]["vocabulary"]["views"]["sft"]
    means = {name: sft["wordings", name, "vocabulary"].mean() for name in WORDINGS}
    assert {name: found["value"] for name, found in worded["accuracy"].items()} == pytest.approx(means)
    assert worded["spread"]["value"] == pytest.approx(max(means.values()) - min(means.values()))
    assert worded["worst"]["wording"] == min(means, key=lambda name: means[name])
    paired = t_interval(sft["wordings", "cue", "vocabulary"] - sft["wordings", UNCHANGED, "vocabulary"])
    assert worded["difference"]["cue"] == pytest.approx(paired.to_dict())
    theirs = section["wordings"]["scopes"]["vocabulary"]["views"]["base"]["spread"]["value"]
    assert worded["spread_difference"]["value"] == pytest.approx(worded["spread"]["value"] - theirs)
    json.dumps(section, allow_nan=False)


def test_a_summary_of_what_is_not_everywhere() -> None:
    base = made(0)
    less = {
        key: rows for key, rows in base.items() if key[:2] in (("wordings", UNCHANGED), ("wordings", "cue"))
    }
    plain = {("perplexity",): base["perplexity",]}
    section = summarise([{"base": base, "sft": less}, {"ia2": plain}])
    assert section["wordings"]["left_out"] == [n for n in WORDINGS if n not in (UNCHANGED, "cue")]
    assert set(section["diversity"]["measures"]["leak"]["views"]) == {"base"}
    assert "ratio" not in section["perplexity"]["views"]["ia2"]  # no base in its trial
    assert summarise([{"base": {}}]) == {"views": ["base"], "reference": "base"}
