"""Side effects: perplexity, diversity, wordings, other benchmarks; what is made of them; plain texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapting import disturb, lora
from benches import base_of, icl_base, icl_examples, word_examples, wordy_model
from families import FAMILIES, HYBRIDS

from ia2.adapter_weights import attach, base_weights, detach
from ia2.adapters import peft_config
from ia2.analysis.diversity import DIVERSITY, begins_with_label, diversity, openings
from ia2.analysis.effects import (
    Effects,
    accuracy,
    other_benchmark,
    perplexity,
    summarise,
    wording_accuracy,
)
from ia2.analysis.texts import plain_texts
from ia2.analysis.wordings import UNCHANGED, WORDINGS, wordings
from ia2.config import AdaptConfig
from ia2.config_sections import AdapterConfig
from ia2.errors import DataError
from ia2.evaluation.statistics import t_interval
from ia2.examples import Example
from ia2.rendering import Rendering
from ia2.report.effect_figures import effect_figures
from ia2.task import make_task
from ia2.tokens import encode_prompt

TEXTS = [
    "the cat was not very good",
    "sun and moon .",
    "one two three ! the film was awful and the food great",
]


# ---------------------------------------------------------------------------------------- perplexity


def nlls(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return -log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_next"])
def test_perplexity_is_that_of_each_text_alone(name: str, word_tokenizer: Any) -> None:
    model = {**FAMILIES, **HYBRIDS}[name]()
    found = perplexity(model, word_tokenizer, TEXTS, 64)
    for text, (nll, tokens) in zip(TEXTS, found, strict=True):
        ids = encode_prompt(word_tokenizer, text)
        assert tokens == len(ids) - 1
        assert nll == pytest.approx(float(nlls(model, ids).sum()), rel=1e-4)


def test_long_texts_are_cut_and_no_token_counts_twice(word_tokenizer: Any) -> None:
    model = FAMILIES["llama"]()
    ids = encode_prompt(word_tokenizer, TEXTS[2])
    found = perplexity(model, word_tokenizer, TEXTS[2:], 4)
    expected = sum(float(nlls(model, ids[start : start + 5]).sum()) for start in range(0, len(ids) - 1, 4))
    np.testing.assert_allclose(found, [[expected, len(ids) - 1]], rtol=1e-5)
    assert perplexity(model, word_tokenizer, ["cat", "the cat"], 4).tolist()[0] == [0, 0]


def test_perplexity_sees_the_adapter(word_tokenizer: Any) -> None:
    model = lora(FAMILIES["llama"]().requires_grad_(False))
    disturb(model)
    with base_weights(model):
        before = perplexity(model, word_tokenizer, TEXTS, 64)
    assert (perplexity(model, word_tokenizer, TEXTS, 64)[:, 0] != before[:, 0]).all()
    np.testing.assert_allclose(perplexity(detach(model), word_tokenizer, TEXTS, 64), before)


# ----------------------------------------------------------------------------------------- diversity


def test_diversity_is_seeded_and_leaves_the_random_numbers_alone(word_tokenizer: Any) -> None:
    model = wordy_model()
    prompts = openings(word_tokenizer, TEXTS * 3, 3)
    assert {len(prompt) for prompt in prompts} == {3} and len(prompts) == 9
    torch.manual_seed(5)
    first = diversity(model, word_tokenizer, prompts, [" good"], seed=1, max_new_tokens=12)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn
    again = diversity(model, word_tokenizer, prompts, [" good"], seed=1, max_new_tokens=12)
    other = diversity(model, word_tokenizer, prompts, [" good"], seed=2, max_new_tokens=12)
    assert list(first) == list(DIVERSITY)
    for name, values in first.items():
        assert values.shape == (9,) and np.isfinite(values).all()
        np.testing.assert_array_equal(values, again[name])
    assert (first["length"] != other["length"]).any() or (first["entropy"] != other["entropy"]).any()
    assert "leak" not in diversity(model, word_tokenizer, prompts, [], max_new_tokens=2)


def constant(model: Any, token: int) -> Any:
    """A model that says one word whatever it reads."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
    model.lm_head.bias.data[token] = 50.0
    return model


def test_diversity_of_a_model_that_only_says_a_label(word_tokenizer: Any) -> None:
    label = word_tokenizer(" good")["input_ids"][0]
    model = constant(wordy_model(), label)
    prompts = openings(word_tokenizer, TEXTS, 3)
    found = diversity(model, word_tokenizer, prompts, [" bad", " good"], samples=2, max_new_tokens=8)
    expected = {"distinct_1": 1 / 8, "distinct_2": 1 / 7, "repeated_4": 4 / 5, "self_similarity": 1}
    expected |= {"entropy": 0, "length": 8, "leak": 1}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)
    # one that ends at once
    model.lm_head.bias.data.zero_()
    model.lm_head.bias.data[2] = 50.0
    found = diversity(model, word_tokenizer, prompts, [" good"], samples=2, max_new_tokens=8)
    expected = {
        "distinct_1": 1,
        "distinct_2": 1,
        "repeated_4": 0,
        "self_similarity": 1,
        "length": 0,
        "leak": 0,
    }
    assert {name: found[name].tolist() for name in expected} == {n: [v] * 3 for n, v in expected.items()}


def test_sampling_follows_the_distribution_not_the_models_own_settings(word_tokenizer: Any) -> None:
    model = constant(wordy_model(), 20)
    model.lm_head.bias.data[20:24] = 50.0  # four words, equally likely
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 9.0
    prompts = openings(word_tokenizer, TEXTS * 10, 3)
    found = diversity(model, word_tokenizer, prompts, [], samples=2, max_new_tokens=16)
    np.testing.assert_allclose(found["entropy"], math.log(4), atol=1e-4)
    # of four words in 16 draws 3.96 are expected
    assert found["distinct_1"].mean() * 16 == pytest.approx(4 * (1 - 0.75**16), abs=0.1)
    assert model.generation_config.top_k == 1


def test_diversity_of_unequal_openings_is_refused(word_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="one length"):
        diversity(wordy_model(), word_tokenizer, [(5, 6), (5, 6, 7)], [])
    with pytest.raises(ValueError, match="two samples"):
        diversity(wordy_model(), word_tokenizer, [(5, 6)], [], samples=1)


def test_what_begins_with_a_label() -> None:
    for text in (" Positive thoughts", "\npositive.", "positive"):
        assert begins_with_label(text, [" negative", " positive"])
    for text in ("positively", "", "the positive", "negatives"):
        assert not begins_with_label(text, [" negative", " positive"])


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt", "full"])
def test_every_kind_of_adapter(kind: str, word_tokenizer: Any) -> None:
    base = wordy_model().requires_grad_(False)
    model = attach(base, peft_config(base, AdapterConfig(type=kind)), 0)
    disturb(model, 0.3)
    ids = encode_prompt(word_tokenizer, TEXTS[0])
    found = perplexity(model, word_tokenizer, TEXTS[:1], 64)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -len(ids) + 1 :]
    expected = -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum()
    assert found[0, 0] == pytest.approx(float(expected), rel=1e-4)
    prompts = openings(word_tokenizer, TEXTS, 3)
    adapted = diversity(model, word_tokenizer, prompts, [], max_new_tokens=6)
    with base_weights(model):
        before = diversity(model, word_tokenizer, prompts, [], max_new_tokens=6)
    after = diversity(detach(model), word_tokenizer, prompts, [], max_new_tokens=6)
    np.testing.assert_allclose(before["entropy"], after["entropy"], rtol=1e-5)
    assert (adapted["entropy"] != before["entropy"]).all()


# ------------------------------------------------------------------------------------------ wordings


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


def test_wordings_touch_only_the_templates_own_words() -> None:
    queries = rows("Question: Text: what\nAnswer:", "Question: Text: who\nAnswer:")
    found = wordings(queries, [], "Question: {q}\nAnswer:")
    assert [examples[1].query for examples in found.values()] == [
        "Question: Text: who\nAnswer:",
        "Input: Text: who\nAnswer:",
        "Question: Text: who\nOutput:",
        "Question: Text: who\n\nAnswer:",
        "question: Text: who\nanswer:",
        "Question:Text: who\nAnswer:",
        "Answer the following.\nQuestion: Text: who\nAnswer:",
    ]


def test_wordings_of_bare_prompts() -> None:
    found = wordings(rows("z3 b2 z0", "a1 z2"), [" L1", " L2"])
    assert list(found) == [UNCHANGED, "instruction"]
    assert [e.query for e in found[UNCHANGED]] == ["z3 b2 z0", "a1 z2"]
    cue = wordings(rows("good film\nLabel:", "bad\nLabel:"), [" L1"])
    assert list(cue) == [UNCHANGED, "cue", "blank line", "lower case", "instruction"]
    alone = wordings(rows("Label:"), [])  # opening and cue would be the same words
    assert alone[UNCHANGED][0].query == "Label:"


def test_accuracy_is_that_of_the_evaluation(tiny_icl_model_path: Path) -> None:
    base = icl_base(tiny_icl_model_path)
    examples = icl_examples(24)
    task = make_task(examples, AdaptConfig(), base.tokenizer)
    rendering = Rendering(base.tokenizer)
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
    np.testing.assert_array_equal(by_wording[UNCHANGED]["vocabulary"], found["vocabulary"])
    assert list(by_wording) == [UNCHANGED, "instruction"]


def test_a_wording_that_does_not_fit_is_left_out_and_said(
    word_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    examples = word_examples(6)
    base = base_of(wordy_model(), word_tokenizer)
    task = make_task(examples, AdaptConfig(), word_tokenizer)
    rendering = Rendering(word_tokenizer)
    longest = max(len(rendering.query_ids(example)) for example in examples)
    worded = wordings(examples, task.labels)
    found = wording_accuracy(base.model, word_tokenizer, task, worded, rendering, longest + 2)
    assert "instruction" not in found and "The wording 'instruction' is left out" in caplog.text
    assert {"cue", "blank line"} <= set(found)
    with pytest.raises(DataError):
        wording_accuracy(base.model, word_tokenizer, task, worded, rendering, 3)


def test_another_benchmark(tmp_path: Path, word_tokenizer: Any) -> None:
    rendering = Rendering(word_tokenizer)
    with pytest.raises(DataError, match=r"^Intents: the labels .* are the same tokens"):
        other_benchmark("Intents", rendering, max_test=5)  # the tokenizer knows none of these words
    (tmp_path / "test.jsonl").write_text(
        '{"q": "cat", "a": 1}\n{"q": "dog", "a": 0}\n{"q": "the fish", "a": 1}\n'
    )
    (tmp_path / "own.yaml").write_text(
        "name: Own\npath: .\nprompt: 'Question:{q}\\nAnswer:'\nlabel: a\ntest: {split: test, rows: 3}\n"
        "verbalisers:\n  digits: {0: '0', 1: '1'}\n  words: {0: ' no', 1: ' yes'}\n"
    )
    assert other_benchmark(tmp_path / "own.yaml", rendering, verbaliser="none such")[0].labels == ("0", "1")
    task, found = other_benchmark(tmp_path / "own.yaml", rendering, verbaliser="words")
    assert task.labels == (" no", " yes") and len(found) == 3
    measured = accuracy(wordy_model(), word_tokenizer, task, found, rendering, 64)
    assert {scope: values.shape for scope, values in measured.items()} == {"vocabulary": (3,), "labels": (3,)}


# ---------------------------------------------------------------------------------------- summaries


def made(seed: int, better: float = 0.0, texts: int = 12, queries: int = 30) -> Effects:
    rng = np.random.default_rng(seed)
    tokens = np.arange(texts) + 20.0

    def right(share: float) -> dict[str, np.ndarray]:
        correct = (rng.random(queries) < share + better).astype(float)
        return {"vocabulary": correct, "labels": np.maximum(correct, rng.random(queries) < 0.3)}

    return Effects(
        np.stack([(3 + rng.random(texts) + better) * tokens, tokens], axis=1),
        {"Own": right(0.4)},
        {name: rng.random(10) + better for name in DIVERSITY},
        {
            name: right(share)
            for name, share in zip(WORDINGS, np.linspace(0.6, 0.3, len(WORDINGS)), strict=True)
        },
    )


def test_a_summary_of_one_trial() -> None:
    base, sft = made(0), made(1, 0.2)
    section = summarise([{"base": base, "sft": sft}])
    assert section["views"] == ["base", "sft"]
    own, its = base.perplexity, sft.perplexity
    assert own is not None and its is not None
    found = section["perplexity"]["views"]
    assert found["base"]["perplexity"]["value"] == pytest.approx(math.exp(own[:, 0].sum() / own[:, 1].sum()))
    ratio = math.exp((its[:, 0].sum() - own[:, 0].sum()) / own[:, 1].sum())
    assert found["sft"]["ratio"]["value"] == pytest.approx(ratio)
    assert found["sft"]["ratio"]["low"] is None  # no mean of rows, and one trial
    assert "ratio" not in found["base"]
    assert section["perplexity"]["tokens"] == own[:, 1].sum()

    entry = section["benchmarks"]["Own"]["scopes"]["labels"]["views"]["sft"]
    paired = t_interval(sft.benchmarks["Own"]["labels"] - base.benchmarks["Own"]["labels"])
    assert entry["difference"] == pytest.approx(paired.to_dict())
    leak = section["diversity"]["measures"]["leak"]["views"]
    assert leak["sft"]["mean"]["value"] == pytest.approx(sft.diversity["leak"].mean())
    assert leak["sft"]["difference"]["value"] == pytest.approx(
        sft.diversity["leak"].mean() - base.diversity["leak"].mean()
    )
    worded = section["wordings"]["scopes"]["vocabulary"]["views"]["sft"]
    means = {name: found["vocabulary"].mean() for name, found in sft.wordings.items()}
    assert {name: found["value"] for name, found in worded["accuracy"].items()} == pytest.approx(means)
    assert worded["spread"]["value"] == pytest.approx(max(means.values()) - min(means.values()))
    assert worded["worst"]["wording"] == min(means, key=lambda name: means[name])
    paired = t_interval(sft.wordings["cue"]["vocabulary"] - sft.wordings[UNCHANGED]["vocabulary"])
    assert worded["difference"]["cue"] == pytest.approx(paired.to_dict())
    theirs = section["wordings"]["scopes"]["vocabulary"]["views"]["base"]["spread"]["value"]
    assert worded["spread_difference"]["value"] == pytest.approx(worded["spread"]["value"] - theirs)
    json.dumps(section, allow_nan=False)


def test_a_summary_of_several_trials() -> None:
    trials = [{"base": made(0), "sft": made(10 + seed, 0.1 * seed)} for seed in range(3)]
    section = summarise(trials)
    runs = [[t["sft"].diversity["entropy"], t["base"].diversity["entropy"]] for t in trials]
    expected = t_interval([a.mean() - b.mean() for a, b in runs])
    found = section["diversity"]["measures"]["entropy"]["views"]["sft"]["difference"]
    assert found == pytest.approx(expected.to_dict())
    own = [t["sft"].wordings["cue"]["labels"] for t in trials]
    cue = section["wordings"]["scopes"]["labels"]["views"]["sft"]["accuracy"]["cue"]
    assert cue == pytest.approx(t_interval([rows.mean() for rows in own]).to_dict())


def test_a_summary_of_what_is_not_everywhere() -> None:
    base = made(0)
    less = Effects(wordings={name: base.wordings[name] for name in (UNCHANGED, "cue")})
    section = summarise([{"base": base, "sft": less}, {"ia2": Effects(perplexity=base.perplexity)}])
    assert section["wordings"]["left_out"] == [n for n in WORDINGS if n not in (UNCHANGED, "cue")]
    assert set(section["diversity"]["measures"]["leak"]["views"]) == {"base"}
    assert "ratio" not in section["perplexity"]["views"]["ia2"]  # no base in its trial
    assert summarise([{"base": Effects()}]) == {"views": ["base"], "reference": "base"}


# -------------------------------------------------------------------------------------- plain texts


def test_the_packaged_texts() -> None:
    texts = plain_texts()
    assert len(texts) == 40 and len(set(texts)) == 40
    assert all(60 <= len(text.split()) <= 100 and "\n" not in text for text in texts)


def test_texts_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("\ufeffone\nand more\n \n\n two \n", encoding="utf-8")
    assert plain_texts(file) == ["one\nand more", "two"]
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert plain_texts(file) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b" \n\n", "there is no text in it"),
        ("a.txt", b"caf\xe9", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}', "a.jsonl:2: no column 'text'; there are 'txt'"),
        ("a.jsonl", b'{"text": "  "}', "a.jsonl:1: 'text' is empty"),
        ("a.jsonl", b'{"text": null}\n[1]', "'text' is null; a.jsonl:2: not an object"),
        ("a.jsonl", b"{", "a.jsonl:1: invalid JSON"),
        ("a.jsonl", b"", "there is no text in it"),
    ],
)
def test_bad_texts_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said.replace("'", ".")) as error:
        plain_texts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_of_texts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        plain_texts(tmp_path / "none.txt")


# ------------------------------------------------------------------------------------------- figures


def test_figures(tmp_path: Path) -> None:
    trials = [{"base": made(0), "sft": made(5 + n, 0.1), "ia2-sft": made(9 + n, 0.2)} for n in range(2)]
    section = json.loads(json.dumps(summarise(trials)))
    figures = {figure.name: figure for figure in effect_figures(section, "tiny: 2 seeds")}
    assert list(figures) == ["perplexity", "benchmarks", "diversity", "wordings"]
    for figure in figures.values():
        assert figure.save(tmp_path / f"{figure.name}.svg").stat().st_size > 1000
        assert all(b"<svg" in picture.svg for picture in figure.pictures())
    table = {row[0].text: [entry.text for entry in row] for row in figures["perplexity"].numbers.rows}
    found = section["perplexity"]["views"]
    assert table["sft"][2].startswith(f"{found['sft']['ratio']['value']:.3f} [")
    assert table["base"][2] == "–"
    table = {row[0].text: [entry.text for entry in row] for row in figures["wordings"].numbers.rows}
    worded = section["wordings"]["scopes"]["labels"]["views"]["ia2-sft"]
    assert table["ia2-sft"][1].startswith(f"{worded['accuracy'][UNCHANGED]['value']:.3f} [")
    assert table["ia2-sft"][-1] == worded["worst"]["wording"]
    leaks = section["diversity"]["measures"]["leak"]["views"]["sft"]["difference"]["value"]
    [row] = [r for r in figures["diversity"].numbers.rows if [r[0].text, r[1].text] == ["leak", "sft"]]
    assert row[3].text.startswith(f"{leaks:+.3f}".replace("-", "−"))


def test_figures_of_little(tmp_path: Path) -> None:
    assert effect_figures(summarise([{"base": Effects()}]), "nothing") == []
    base = made(0, texts=1, queries=1)
    alone = summarise([{"base": base}])
    names = [figure.name for figure in effect_figures(alone, "base only")]
    assert names == ["benchmarks", "diversity", "wordings"]
    # e³ times the perplexity: a logarithmic axis
    worse = summarise([{"base": base, "sft": made(1, 3.0, texts=1, queries=1)}])
    effect_figures(worse, "worse")[0].save(tmp_path / "worse.svg")
    alone["benchmarks"]["Own"]["scopes"]["labels"]["views"]["base"]["accuracy"] |= {
        "value": None,
        "low": None,
    }
    for figure in effect_figures(alone, "base only"):
        figure.save(tmp_path / f"{figure.name}.svg")
