"""Scores of labels and free answers against sums over plain forward passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES, HYBRIDS

from ia2.config import AdaptConfig
from ia2.data.examples import Example, Examples
from ia2.evaluation.calibration import TEMPERATURES as TEMPERATURES_TRIED
from ia2.evaluation.evaluate import temperature_losses
from ia2.evaluation.metrics import label_temperature_losses
from ia2.evaluation.scoring import (
    LabelScorer,
    LabelScores,
    answer_freely,
    free_predictions,
    label_predictions,
    score_labels,
)
from ia2.models.forward import AnswerOutput, answer_pass
from ia2.models.tokens import Ids, encode_prompt
from ia2.prompts.task import Task, make_task

TEMPERATURES = (1.0, 0.5, 3.0)
MANY = (" good film", " good food", " good day song", " bad", " red fish song", " red fish day")


def task_of(tokenizer: Any, *labels: str, **settings: Any) -> Task:
    words = ["good", "bad", "great", "awful", "fine", "film", "food", "song"]
    rows = Examples(
        [Example(f"Text: {w}\nLabel:", labels[i % len(labels)], f"row {i}") for i, w in enumerate(words)]
    )
    return make_task(rows, AdaptConfig(**settings), tokenizer)


@pytest.fixture
def prompts(word_tokenizer: Any) -> list[Ids]:
    texts = ["Text: the film was fine\nLabel:", "Text: bad\nLabel:", "a b c d e f g h\nLabel:"]
    return [encode_prompt(word_tokenizer, text) for text in texts]


def log_p(model: Any, ids: Ids, temperature: float = 1.0) -> torch.Tensor:
    """``[T, V]`` of one unbatched, uncached pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return (logits.double() / temperature).log_softmax(-1)


def test_labels_of_one_token_are_the_softmax(
    tiny_llama: Any, word_tokenizer: Any, prompts: list[Ids]
) -> None:
    task = task_of(word_tokenizer, " yes", " no", " red")
    scores = score_labels(tiny_llama, word_tokenizer, task, prompts, temperatures=TEMPERATURES)
    assert scores.single_token
    assert scores.log_probability.shape == (3, 3, 3)
    for i, prompt in enumerate(prompts):
        for t, temperature in enumerate(TEMPERATURES):
            expected = log_p(tiny_llama, prompt, temperature)[-1]
            labels = [ids[0] for ids in task.label_ids]
            np.testing.assert_allclose(scores.log_probability[i, :, t], expected[labels], atol=1e-5)
            assert scores.top_probability[i, t] == pytest.approx(float(expected.exp().max()), abs=1e-6)
            assert scores.square_sum[i, t] == pytest.approx(float((2 * expected).exp().sum()), abs=1e-6)
        assert scores.top_token[i] == int(log_p(tiny_llama, prompt)[-1].argmax())


LONG = [
    "a b c d e f g h the film was fine",
    "one two three the food was bad",
    "a b c d e f g h a song and a day",
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("labels", [MANY, (*MANY, " good", " film food", " film food song and")])
def test_labels_that_share_beginnings_and_prompts_score_as_each_alone(
    name: str, labels: tuple[str, ...], word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one row a label, a softmax at every temperature; one batch or many, equal lengths or not."""
    model: Any = {**FAMILIES, **HYBRIDS}[name]().double()
    task = task_of(word_tokenizer, *labels, labels=list(labels), task="classification")
    assert bool(task.terminators) == (" good" in labels)
    texts = [f"Text: {'the night was ' * 5}{text}\nLabel:" for text in LONG]
    prompts = [encode_prompt(word_tokenizer, text) for text in texts]
    ends = (0,) if task.terminators else ()
    pairs = [(prompt, (*ids, *ends)) for prompt in prompts for ids in task.label_ids]
    expected = np.zeros((len(prompts), len(labels), len(TEMPERATURES)))
    for output in answer_pass(model, word_tokenizer, pairs):
        query, label = divmod(output.index, len(labels))
        ids = task.label_ids[label]
        assert output.logits is not None
        for t, temperature in enumerate(TEMPERATURES):
            log_p = (output.logits.double() / temperature).log_softmax(-1)
            expected[query, label, t] = log_p[range(len(ids)), ids].sum()
            if ends:
                expected[query, label, t] += log_p[len(ids), list(task.terminators)].logsumexp(0)
    for budget in (4096, 12):
        monkeypatch.setattr("ia2.models.forward.token_budget", lambda *_, budget=budget: budget)
        found = score_labels(model, word_tokenizer, task, prompts, temperatures=TEMPERATURES)
        np.testing.assert_allclose(found.log_probability, expected, atol=1e-6)
    # where only the truth is asked for beside temperature 1, the rest is not computed
    truth = np.array([2, 0, 5])
    some = score_labels(model, word_tokenizer, task, prompts, temperatures=TEMPERATURES, truth=truth)
    rows = np.arange(len(truth))
    np.testing.assert_allclose(some.log_probability[rows, truth], expected[rows, truth], atol=1e-6)
    np.testing.assert_allclose(some.log_probability[:, :, 0], expected[:, :, 0], atol=1e-6)
    np.testing.assert_allclose(some.top_probability, found.top_probability, atol=1e-6)
    assert np.isnan(some.log_probability[:, :, 1:]).sum() == 3 * (len(labels) - 1) * 2


def test_temperatures_cost_no_passes_and_labels_no_prompts(tiny_llama: Any, word_tokenizer: Any) -> None:
    """Ids that are fed: each prompt once, and of each label only what no other label's row has."""
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "cat", "dog", "bird", "fish", "sun"]
    labels = [f" {a} {b}" for a in words for b in words if a != b][:150]
    task = task_of(word_tokenizer, *labels, labels=labels, task="classification")
    rows = [
        Example(f"Text: {'the night was ' * 9}{w}\nLabel:", labels[i], "") for i, w in enumerate(words[:4])
    ]
    prompts = [encode_prompt(word_tokenizer, row.query) for row in rows]
    fed: list[int] = []
    hook = tiny_llama.register_forward_pre_hook(
        lambda _module, _given, named: fed.append(named["input_ids"].numel()), with_kwargs=True
    )
    found = temperature_losses(tiny_llama, word_tokenizer, task, rows, prompts)
    # a label's first token is fed behind the prompt's last
    assert sum(fed) <= sum(map(len, prompts)) + len(rows) * 2 * len(words)
    hook.remove()
    grid = [float(t) for t in TEMPERATURES_TRIED]
    scores = score_labels(tiny_llama, word_tokenizer, task, prompts, temperatures=grid)
    gold = np.array([task.label_of(row) for row in rows])
    expected = label_temperature_losses(scores, gold)
    assert found.keys() == expected.keys()
    for scope, losses in found.items():
        np.testing.assert_allclose(losses, expected[scope], rtol=1e-6)


def test_the_shorter_of_nested_labels_does_not_always_win(word_tokenizer: Any) -> None:
    """A model that goes on after the shorter label means the longer one."""
    task = task_of(word_tokenizer, " good", " good film")
    good, film = task.label_ids[1]
    end = word_tokenizer.eos_token_id

    def scores(goes_on: float) -> np.ndarray:
        vocabulary = len(word_tokenizer)

        def logits(**p: float) -> list[float]:
            row = np.full(vocabulary, 1e-9)
            for name, value in p.items():
                row[{"good": good, "film": film, "end": end}[name]] = value
            return np.log(row).tolist()

        steps = [logits(good=1.0), logits(film=goes_on, end=1 - goes_on), logits(end=1.0)]
        scorer = LabelScorer(task, 1)
        # the longer label's row holds the shorter one
        assert [len(answer) for answer in scorer.answers] == [3]
        scorer.add(AnswerOutput(0, torch.tensor(steps), None))
        return np.exp(scorer.finish().log_probability[0, :, 0])

    np.testing.assert_allclose(scores(0.9), [0.1, 0.9], atol=1e-6)
    np.testing.assert_allclose(scores(0.2), [0.8, 0.2], atol=1e-6)


def test_label_predictions(word_tokenizer: Any) -> None:
    task = dataclasses.replace(task_of(word_tokenizer, " yes", " no", " red"), names=("n", 0, True))
    scores = LabelScores(
        np.array([1.0]),
        np.log(np.array([[0.1, 0.2, 0.1], [0.02, 0.01, 0.01]]))[:, :, None],
        np.array([[0.6], [0.9]]),
        np.array([word_tokenizer.convert_tokens_to_ids(t) for t in (" cat", " dog")]),
        np.array([[0.5], [0.5]]),
        True,
    )
    labelled = [Example("a", " red", "s:1"), Example("b", None, "s:2")]
    first, second = label_predictions(word_tokenizer, task, labelled, scores)
    # labels are sorted: no, red, yes
    assert (first.gold, first.predicted, first.correct) == (0, 0, True)
    assert first.confidence == pytest.approx(0.5)
    assert first.details["labels"] == pytest.approx({"n": 0.25, "0": 0.5, "True": 0.25})
    assert (first.details["top_token"], first.details["top_token_probability"]) == (" cat", 0.6)
    assert (second.gold, second.predicted, second.correct) == (None, "n", None)
    assert sum(second.details["labels"].values()) == pytest.approx(1)
    assert second.to_dict()["source"] == "s:2"


def test_free_answers_are_greedy_and_their_confidence_is_the_model_s(
    tiny_llama: Any, word_tokenizer: Any, prompts: list[Ids]
) -> None:
    task = task_of(word_tokenizer, " a b", task="generation", max_answer_tokens=5)
    answers = answer_freely(tiny_llama, word_tokenizer, task, prompts)
    for i, prompt in enumerate(prompts):
        ids, total, first = prompt, 0.0, 0.0
        for _ in range(5):
            row = log_p(tiny_llama, ids)[-1]
            token = int(row.argmax())
            total += float(row[token])
            first = first or float(row[token].exp())
            ids = (*ids, token)
            text = word_tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
            if token == word_tokenizer.eos_token_id or task.stop_texts[0] in text:
                break
        assert len(ids) == len(prompt) + 5  # so that the text is the whole answer
        assert answers.texts[i] == text
        assert answers.parsed[i] == (" ".join(text.split()) or None)
        assert answers.first_probability[i] == pytest.approx(first, abs=1e-5)
        assert answers.sequence_log_probability[i] == pytest.approx(total, abs=1e-4)


def test_an_answer_that_ends_at_once(tiny_llama: Any, word_tokenizer: Any, prompts: list[Ids]) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()  # then all logits are equal, and a bias decides
    hook = tiny_llama.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits + 5 * (torch.arange(logits.shape[-1]) == 2)
    )
    task = task_of(word_tokenizer, " a b", task="generation", max_answer_tokens=3)
    answers = answer_freely(tiny_llama, word_tokenizer, task, prompts)
    hook.remove()
    assert answers.texts == [""] * 3
    assert answers.parsed == [None] * 3
    expected = np.exp(5) / (np.exp(5) + 127)
    np.testing.assert_allclose(answers.first_probability, expected, rtol=1e-5)
    np.testing.assert_allclose(answers.sequence_log_probability, np.log(expected), rtol=1e-4)
    rows = free_predictions(task, [Example("q", " a", "s")] * 3, answers)
    assert [row.correct for row in rows] == [False] * 3
