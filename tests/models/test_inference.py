"""Batches, shared prefixes and caches change nothing: everything equals the naive loop over single rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.families import (
    ALL,
    FAMILIES,
    HEADS,
    HYBRIDS,
    LAYERS,
    PACKED,
    VOCABULARY,
    WIDTH,
    attention_layers,
    build,
    counting_ids,
    lfm2,
    llama,
)
from helpers.words import make_word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts.test_context import awkward
from transformers import FalconConfig, PreTrainedModel, PreTrainedTokenizerFast, RecurrentGemmaConfig

from ia2.adapters.types import peft_config
from ia2.adapters.weights import attach, base_weights
from ia2.config.sections import AdapterConfig
from ia2.models import batching, generation, packing
from ia2.models import forward as inference
from ia2.models.batching import token_budget
from ia2.models.capture import ActivationCapture, eager_attention
from ia2.models.forward import AnswerOutput, answer_pass
from ia2.models.generation import Generated, cut_answer, generate_answers
from ia2.models.packing import packs
from ia2.models.tokens import Ids, common_prefix, fed_ids
from ia2.utils.logging import progress

family = pytest.mark.parametrize("name", list(ALL))
sharing = pytest.mark.parametrize("shared", [0, 20])
EOS = 2
FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "eos_token_id": EOS,
}


def prompts_of(shared: int, seed: int = 0, lengths: Sequence[int] = (5, 11, 2, 7, 11, 3)) -> list[Ids]:
    """Prompts of unequal length, with and without ids that all begin with."""
    draw = random.Random(seed)
    prefix = [draw.randint(4, 99) for _ in range(shared)]
    # the first id of each differs, so that no more than the prefix is shared
    return [
        (*prefix, 10 + place, *(draw.randint(4, 99) for _ in range(length - 1)))
        for place, length in enumerate(lengths)
    ]


def pairs_of(shared: int) -> list[tuple[Ids, Ids]]:
    draw = random.Random(1)
    return [
        (prompt, tuple(draw.randint(4, 99) for _ in range(size)))
        for prompt, size in zip(prompts_of(shared), (1, 3, 6, 1, 2, 4), strict=True)
    ]


# -------------------------------------------------------------------------------------- answer_pass


def naive(model: Any, pair: tuple[Ids, Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    prompt, answer = pair
    with torch.no_grad(), ActivationCapture(model) as capture:
        logits = model(input_ids=torch.tensor([fed_ids(prompt, answer)]), use_cache=False).logits
        activations = torch.stack(list(capture.take().values()))
    return logits[0, -len(answer) :], activations[:, 0, -len(answer) :]


def check(model: Any, pairs: list[tuple[Ids, Ids]], outputs: list[AnswerOutput]) -> None:
    assert sorted(output.index for output in outputs) == list(range(len(pairs)))
    for output in outputs:
        logits, activations = naive(model, pairs[output.index])
        assert output.logits is not None
        assert output.activations is not None
        torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.activations, activations, atol=1e-5, rtol=1e-5)


@family
@sharing
def test_answer_pass(name: str, shared: int, word_tokenizer: PreTrainedTokenizerFast) -> None:
    model, pairs = ALL[name](), pairs_of(shared)
    packed = packs(model)
    assert packed == (name in PACKED)
    with counting_ids(model) as fed, ActivationCapture(model) as capture:
        # a small budget, so that there are several batches
        outputs = list(answer_pass(model, word_tokenizer, pairs, capture=capture, batch_tokens=40))
        assert capture._stored == {}
    own = sum(len(fed_ids(*pair)) - shared for pair in pairs)
    if packed:
        assert len(fed) > 1 and sum(fed) == own + shared
    elif name not in HYBRIDS:  # the cache of a hybrid holds more than keys and values
        assert shared in (0, fed[0]) and sum(fed) >= own + shared
    check(model, pairs, outputs)


def last_spans(pairs: list[tuple[Ids, Ids]], reach: int) -> list[int]:
    """Spans that end with the row and begin at different places before its answer positions."""
    return [len(answer) + (place * 3) % reach for place, (_, answer) in enumerate(pairs)]


def naive_weights(model: Any, pair: tuple[Ids, Ids], span: int) -> torch.Tensor:
    """``[L, G, H, S]`` from transformers' own record of one row."""
    prompt, answer = pair
    ids = torch.tensor([fed_ids(prompt, answer)])
    with torch.no_grad():
        record = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    shares = torch.stack([layer[0, :, -len(answer) :, -span:] for layer in record]).transpose(1, 2)
    return shares / shares.sum(-1, keepdim=True)


@family
@sharing
def test_answer_pass_gives_attention_weights(
    name: str, shared: int, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Each row's over its own span, behind a cached prefix or not; some spans reach into the prefix."""
    model, pairs = ALL[name](), pairs_of(shared)
    spans = last_spans(pairs, reach=len(min(pairs)[0]) - 1)
    if shared:
        assert any(span > len(fed_ids(*pair)) - shared for span, pair in zip(spans, pairs, strict=True))
    else:
        spans = [min(span, len(fed_ids(*pair))) for span, pair in zip(spans, pairs, strict=True)]
    with eager_attention(model):
        with ActivationCapture(model, site="weights") as capture:
            outputs = list(
                answer_pass(
                    model, word_tokenizer, pairs, capture=capture, spans=spans, logits=False, batch_tokens=40
                )
            )
        assert sorted(output.index for output in outputs) == list(range(len(pairs)))
        for output in outputs:
            pair, span = pairs[output.index], spans[output.index]
            assert output.activations is not None
            assert output.activations.shape == (len(attention_layers(name)), len(pair[1]), HEADS, span)
            expected = naive_weights(model, pair, span)
            torch.testing.assert_close(output.activations, expected, atol=1e-5, rtol=1e-4)


def test_spans_that_do_not_fit(tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = pairs_of(0)
    for wrong in (0, len(fed_ids(*pairs[2])) + 1):
        spans = [1, 1, wrong, 1, 1, 1]
        with pytest.raises(ValueError, match="spans must be between 1 and"):
            list(answer_pass(tiny_llama, word_tokenizer, pairs, spans=spans))


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("capturing", [False, True])
def test_answer_pass_gives_what_is_asked_for(
    logits: bool, capturing: bool, tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = pairs_of(20)
    with ActivationCapture(tiny_llama) as capture:
        chosen = capture if capturing else None
        outputs = list(answer_pass(tiny_llama, word_tokenizer, pairs, capture=chosen, logits=logits))
    for output in outputs:
        length = len(pairs[output.index][1])
        assert (output.logits is None) == (not logits)
        assert (output.activations is None) == (not capturing)
        if output.logits is not None:
            assert output.logits.shape == (length, VOCABULARY)
            assert output.logits.dtype == torch.float32
        if output.activations is not None:
            assert output.activations.shape == (LAYERS, length, WIDTH)


def test_answer_pass_without_packing(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is found not to pack: rows are padded, behind what all begin with."""
    monkeypatch.setattr(inference, "packs", lambda model: False)
    pairs = pairs_of(20)
    with ActivationCapture(tiny_llama) as capture:
        check(tiny_llama, pairs, list(answer_pass(tiny_llama, word_tokenizer, pairs, capture=capture)))
        assert list(answer_pass(tiny_llama, word_tokenizer, [], capture=capture)) == []


def test_answer_pass_where_everything_is_shared(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Scoring several labels of one prompt: the answer positions stay outside the cached part."""
    prompt = prompts_of(30)[0]
    pairs = [(prompt, (40,)), (prompt, (40,)), (prompt, (41, 42)), (prompt, (41, 42, 43))]
    with ActivationCapture(tiny_llama) as capture:
        check(tiny_llama, pairs, list(answer_pass(tiny_llama, word_tokenizer, pairs, capture=capture)))


def test_answer_pass_leaves_no_trace(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama.train()
    with ActivationCapture(tiny_llama) as capture:
        passing = answer_pass(tiny_llama, word_tokenizer, pairs_of(0), capture=capture, batch_tokens=20)
        output = next(passing)
        # the caller's own tensors, between two batches, are ordinary ones
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert output.activations is not None
        assert output.logits is not None
        list(passing)
    assert tiny_llama.training
    # targets of a loss: autograd may keep them
    weight = torch.ones(WIDTH, requires_grad=True)
    (output.activations * weight).sum().backward()
    assert weight.grad is not None
    head = torch.ones(VOCABULARY, requires_grad=True)
    (output.logits * head).sum().backward()


def test_dropout_is_off(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["gpt2"]()
    pairs = pairs_of(0)
    model.train()
    with ActivationCapture(model) as capture:
        outputs = list(answer_pass(model, word_tokenizer, pairs, capture=capture))
    check(model.eval(), pairs, outputs)


@pytest.mark.parametrize("kind", ["LORA", "PROMPT_TUNING"])
def test_adapted_models(
    kind: str, tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    own = {"target_modules": ["q_proj", "o_proj"]} if kind == "LORA" else {"num_virtual_tokens": 3}
    given = {"peft_type": kind, **own}
    model: Any = attach(tiny_llama, peft_config(tiny_llama, AdapterConfig(peft=given)), 0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    pairs, prompts = pairs_of(20), prompts_of(20)
    with ActivationCapture(model) as capture:
        check(model, pairs, list(answer_pass(model, word_tokenizer, pairs, capture=capture)))
        answers, seen = seen_of(model, word_tokenizer, prompts, max_new_tokens=6, capture=capture)
        assert [a.ids for a in answers] == [greedy(model, p, 6) for p in prompts]
        check_seen(model, prompts, answers, seen)
        with base_weights(model):
            check(model, pairs, list(answer_pass(model, word_tokenizer, pairs, capture=capture)))
            answers = generate_answers(model, word_tokenizer, prompts, max_new_tokens=6)
            assert [a.ids for a in answers] == [greedy(model, p, 6) for p in prompts]


# --------------------------------------------------------------------------------------- generation


def greedy(model: Any, prompt: Ids, limit: int) -> Ids:
    """Argmax by argmax, each from the whole sequence."""
    answer: Ids = ()
    while len(answer) < limit:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, -1]
        best = logits.topk(2).values
        assert best[0] - best[1] > 1e-4, "a tie: choose another seed"
        answer += (int(logits.argmax()),)
        if answer[-1] == EOS:
            break
    return answer


@family
@sharing
def test_generation(name: str, shared: int, word_tokenizer: PreTrainedTokenizerFast) -> None:
    model, prompts = ALL[name](), prompts_of(shared)
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    for batch_tokens in (None, 80):
        answers = generate_answers(
            model, word_tokenizer, prompts, max_new_tokens=12, batch_tokens=batch_tokens
        )
        assert [answer.ids for answer in answers] == expected
        assert [answer.ended for answer in answers] == [ids[-1] == EOS for ids in expected]


def seen_of(
    model: Any, tokenizer: Any, prompts: list[Ids], **options: Any
) -> tuple[list[Generated], dict[int, torch.Tensor | None]]:
    """Answers, and what was handed out with each."""
    seen: dict[int, torch.Tensor | None] = {}

    def take(i: int, answer: Generated, tensor: torch.Tensor | None) -> None:
        given[i] = answer
        seen[i] = tensor

    given: dict[int, Generated] = {}
    answers = generate_answers(model, tokenizer, prompts, on_answer=take, **options)
    assert [given[i] for i in range(len(prompts))] == answers
    return answers, seen


def check_seen(
    model: Any, prompts: list[Ids], answers: list[Generated], seen: dict[int, torch.Tensor | None]
) -> None:
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tensor = seen[i]
        assert tensor is not None and tensor.shape[1] == len(answer.ids)
        torch.testing.assert_close(tensor, naive(model, (prompt, answer.ids))[1], atol=1e-5, rtol=1e-5)


@family
@sharing
def test_what_is_seen_while_writing_is_the_forward_pass(
    name: str, shared: int, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, prompts = ALL[name](), prompts_of(shared)
    plain = generate_answers(model, word_tokenizer, prompts, max_new_tokens=9)
    # one answer ends early, others elsewhere or not at all
    end = max(plain, key=lambda answer: len(answer.ids)).ids[4]
    with ActivationCapture(model) as capture:
        for options in ({"end_id": end}, {"batch_tokens": 80}):
            answers, seen = seen_of(
                model, word_tokenizer, prompts, max_new_tokens=9, capture=capture, **options
            )
            check_seen(model, prompts, answers, seen)
            assert capture._stored == {} and not capture._armed
    assert answers == plain


@pytest.mark.parametrize("site", ["heads", "residual", "neurons"])
def test_other_sites_are_seen_too(site: str, word_tokenizer: PreTrainedTokenizerFast) -> None:
    model, prompts = FAMILIES["opt"](), prompts_of(20)
    with ActivationCapture(model, site=site) as capture:
        answers, seen = seen_of(model, word_tokenizer, prompts, max_new_tokens=6, capture=capture)
        pairs = [(prompt, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
        for output in answer_pass(model, word_tokenizer, pairs, capture=capture, logits=False):
            torch.testing.assert_close(seen[output.index], output.activations, atol=1e-5, rtol=1e-5)


def test_what_is_kept_of_the_logits(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = prompts_of(20)
    answers, seen = seen_of(
        tiny_llama, word_tokenizer, prompts, max_new_tokens=6, keep=lambda logits: logits[None, :, :50]
    )
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = naive(tiny_llama, (prompt, answer.ids))[0]
        torch.testing.assert_close(seen[i], logits[None, :, :50], atol=1e-5, rtol=1e-5)


def test_an_answer_whose_ids_were_not_written_was_not_seen(tiny_llama: PreTrainedModel) -> None:
    """The stop text begins within a token, so the ids before it are others than those written."""
    tokenizer, prompts = make_word_tokenizer(), prompts_of(0)
    plain = generate_answers(tiny_llama, tokenizer, prompts, max_new_tokens=8)
    longest = max(plain, key=lambda answer: len(answer.text)).text
    stop = longest.split()[2][1:] + " "  # all but the first letter of a word
    with ActivationCapture(tiny_llama) as capture:
        answers, seen = seen_of(
            tiny_llama, tokenizer, prompts, max_new_tokens=8, stop_texts=[stop], capture=capture
        )
    assert None in seen.values()
    for i, tensor in seen.items():
        fed = answers[i].ids[:-1]
        assert (tensor is None) == (fed != plain[i].ids[: len(fed)])
        if tensor is not None:
            expected = naive(tiny_llama, (prompts[i], answers[i].ids))[1]
            torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-5)


def test_rows_that_have_ended_leave_the_batch(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = prompts_of(20)
    plain = generate_answers(tiny_llama, word_tokenizer, prompts, max_new_tokens=12)
    # ids that end some answers early
    long = [answer.ids for answer in plain if len(answer.ids) > 5]
    ends = [EOS, long[0][1], long[1][3]]
    tiny_llama.generation_config.eos_token_id = ends
    expected = [
        next((ids[:k] for k, token in enumerate(ids) if token in ends), ids)
        for ids in (answer.ids for answer in plain)
    ]
    widths: list[int] = []
    hook = tiny_llama.lm_head.register_forward_hook(lambda _m, inputs, _o: widths.append(len(inputs[0])))
    with ActivationCapture(tiny_llama) as capture:
        answers, seen = seen_of(tiny_llama, word_tokenizer, prompts, max_new_tokens=12, capture=capture)
    hook.remove()
    assert [a.ids[:-1] if a.ended else a.ids for a in answers] == expected
    assert len({len(ids) for ids in expected}) > 2
    check_seen(tiny_llama, prompts, answers, seen)
    writing = widths[2:]  # behind the prefix and the prompts
    assert writing == sorted(writing, reverse=True) and len(set(writing)) > 1
    for step, width in enumerate(writing):
        assert width < 2 * sum(len(answer.ids) > step for answer in answers) + 1


def test_prompts_are_read_in_small_batches_and_answered_in_a_wide_one(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(20)
    monkeypatch.setattr(generation, "token_budget", lambda model: 4 * 40)
    monkeypatch.setattr(generation, "writing_budget", lambda model, reach, captured: (10**6, reach))
    fed: list[tuple[int, ...]] = []
    hook = tiny_llama.model.embed_tokens.register_forward_hook(
        lambda _m, inputs, _o: fed.append(tuple(inputs[0].shape))
    )
    answers = generate_answers(tiny_llama, word_tokenizer, prompts, max_new_tokens=4)
    hook.remove()
    # each prompt but its last id is read once, then all answers are written side by side
    assert fed[:4] == [(1, 20), (4, 10), (2, 2), (6, 1)] and len(fed) == 3 + 4
    assert [answer.ids for answer in answers] == [greedy(tiny_llama, prompt, 4) for prompt in prompts]


def test_answers_are_handed_out_as_batches_finish(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a store can write them: what is in memory does not grow with the prompts."""
    prompts, order = prompts_of(0), []
    generate = tiny_llama.generate

    def noted(**inputs: Any) -> Any:
        order.append(-len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(tiny_llama, "generate", noted)
    generate_answers(
        tiny_llama,
        word_tokenizer,
        prompts,
        max_new_tokens=3,
        batch_tokens=30,
        on_answer=lambda i, answer, seen: order.append(i),
    )
    # rows 1 and 4 are the longest; generation goes on with one where the other has ended
    first = order.index(next(entry for entry in order if entry >= 0))
    assert set(order[first : first + 2]) == {1, 4} and min(order[first + 2 :]) < 0


def recurrent_gemma() -> PreTrainedModel:
    return build(
        RecurrentGemmaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            lru_width=WIDTH,
            attention_window_size=64,
            block_types=("recurrent", "attention"),
            eos_token_id=EOS,
            pad_token_id=0,
        )
    )


RECURRENT = {
    "qwen3_next": (HYBRIDS["qwen3_next"], False),
    "lfm2": (HYBRIDS["lfm2"], False),
    "lfm2 with biases": (lambda: lfm2(conv_bias=True), True),
    "recurrent_gemma": (recurrent_gemma, True),
}


@pytest.mark.parametrize("name", list(RECURRENT))
@sharing
def test_padding_on_the_left_of_recurrent_layers(
    name: str, shared: int, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unequal length share a batch only where the family silences padding."""
    make, disturbed = RECURRENT[name]
    model, prompts = make(), prompts_of(shared)
    # beside a full row, as in a batch: earlier releases of transformers silence nothing in a single row
    padded = torch.tensor([[0] * 4 + list(prompts[0]), [7] * 4 + list(prompts[0])])
    mask = (torch.arange(padded.shape[1]) >= torch.tensor([[4], [0]])).long()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1]
        behind = model(
            input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
        ).logits[0, -1]
    assert ((alone - behind).abs().max() > 1e-4) == disturbed
    generate, sizes = model.generate, []

    def counted(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", counted)
    answers = generate_answers(model, word_tokenizer, prompts, max_new_tokens=8)
    assert [answer.ids for answer in answers] == [greedy(model, prompt, 8) for prompt in prompts]
    assert sorted(sizes) == ([1, 1, 1, 1, 2] if disturbed else [6])


def test_generation_is_greedy_whatever_the_model_recommends(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Chat models come with sampling settings and penalties; the base's own greedy answer has none."""
    prompts = prompts_of(0)
    expected = [greedy(tiny_llama, prompt, 12) for prompt in prompts]
    recommended = tiny_llama.generation_config
    recommended.do_sample, recommended.temperature, recommended.top_k = True, 3.0, 5
    recommended.repetition_penalty = 8.0
    recommended.no_repeat_ngram_size = 1
    recommended.min_new_tokens = 12
    answers = generate_answers(tiny_llama, word_tokenizer, prompts, max_new_tokens=12)
    assert [answer.ids for answer in answers] == expected
    assert tiny_llama.generation_config is recommended
    assert recommended.repetition_penalty == 8.0


def test_end_ids_of_the_model_count_too(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = prompts_of(0)
    plain = generate_answers(tiny_llama, word_tokenizer, prompts, max_new_tokens=12)
    third = plain[0].ids[2]
    tiny_llama.generation_config.eos_token_id = [EOS, third]
    answer = generate_answers(tiny_llama, word_tokenizer, prompts[:1], max_new_tokens=12)[0]
    cut = plain[0].ids[: plain[0].ids.index(third)]
    assert (answer.ids, answer.ended) == ((*cut, EOS), True)


def test_generation_stops_before_the_stop_text(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = prompts_of(0)
    plain = generate_answers(tiny_llama, word_tokenizer, prompts, max_new_tokens=12)
    place = next(i for i, answer in enumerate(plain) if len(answer.text) > 12)
    stop = plain[place].text[5:9]  # from within a word to within another
    answers = generate_answers(
        tiny_llama, word_tokenizer, prompts, max_new_tokens=12, stop_texts=[stop, "never"]
    )
    for before, after in zip(plain, answers, strict=True):
        if stop in before.text:
            assert after.text == before.text[: before.text.index(stop)]
            assert after.ended
            assert after.ids[-1] == EOS
        else:
            assert after == before
    assert answers[place].ended


def test_nothing_to_generate(tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast) -> None:
    assert generate_answers(tiny_llama, word_tokenizer, [], max_new_tokens=3) == []


def answer_of(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_cut_answer() -> None:
    tokenizer = make_word_tokenizer()
    ids = answer_of(" good film", tokenizer)
    stop = "\n\nText:"
    rest = answer_of("\n\nText: bad", tokenizer)

    def cut(raw: list[int], limit: int = 10, stops: Sequence[str] = (stop,)) -> Generated:
        return cut_answer(tokenizer, raw, [EOS], stops, limit)

    assert cut([*ids, EOS]) == Generated((*ids, EOS), " good film", True)
    assert cut([*ids, EOS, 0, 0]) == Generated((*ids, EOS), " good film", True)
    assert cut([*ids, *rest]) == Generated((*ids, EOS), " good film", True)
    assert cut([*ids, *rest, EOS]) == Generated((*ids, EOS), " good film", True)
    # the earliest of several stop texts
    assert cut([*ids, *rest], stops=["bad", stop, "Text"]).text == " good film"
    # a stop text after the end of sequence is no part of the answer, one before it ends it
    assert cut([ids[0], EOS, *rest]) == Generated((ids[0], EOS), " good", True)
    # the limit: cut there, unless the answer ended by itself just after it
    assert cut([*ids, 20, 21], limit=2) == Generated(tuple(ids), " good film", False)
    assert cut(ids, limit=2) == Generated(tuple(ids), " good film", False)
    assert cut([*ids, *rest], limit=2) == Generated((*ids, EOS), " good film", True)
    assert cut([*ids, *rest], limit=1) == Generated((ids[0],), " good", False)
    # nothing before the end
    assert cut([EOS]) == Generated((EOS,), "", True)
    assert cut(rest) == Generated((EOS,), "", True)
    tokenizer.eos_token = None
    assert cut_answer(tokenizer, rest, [], [stop], 5) == Generated((0,), "", True)


def test_cut_answer_inside_a_token() -> None:
    """The stop text begins within a token: the text before it gets ids of its own."""
    tokenizer = awkward("unsplit")
    stop = "\n\nText:"
    text = "good\nLabel: positive" + stop
    ids = answer_of(text, tokenizer)
    starts = [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]
    assert text.index(stop) not in starts, "no token reaches across: the test is void"
    answer = cut_answer(tokenizer, ids, [1], [stop], 50)
    assert answer.text == "good\nLabel: positive"
    assert tokenizer.decode(answer.ids, skip_special_tokens=True) == answer.text
    assert answer.ids[-1] == 1
    assert answer.ended


def test_cut_answer_within_a_character() -> None:
    """Byte-level ids of which the last character is unfinished."""
    tokenizer = awkward("gpt2")
    ids = answer_of("é", tokenizer)
    assert len(ids) == 2
    answer = cut_answer(tokenizer, [*answer_of("a", tokenizer), ids[0]], [1], ["\n\n"], 50)
    assert not answer.ended
    assert len(answer.ids) == 2
    whole = cut_answer(tokenizer, answer_of("aéé\n\nb", tokenizer), [1], ["\n\n"], 50)
    assert (whole.text, whole.ended) == ("aéé", True)


# ------------------------------------------------------------------------------------------ batches


ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …"),
}


@pytest.mark.parametrize("kind", list(ERRORS))
@pytest.mark.parametrize("largest", [1, 2, 3])
def test_batches_are_halved_when_memory_runs_out(
    kind: str,
    largest: int,
    tiny_llama: PreTrainedModel,
    word_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "packs", lambda model: False)
    pairs = pairs_of(20)
    run, sizes = inference._run_batch, []

    def limited(model: Any, batch: Any, members: list[int], *rest: Any) -> Any:
        sizes.append(len(members))
        if len(members) > largest:
            raise ERRORS[kind]
        return run(model, batch, members, *rest)

    monkeypatch.setattr(inference, "_run_batch", limited)
    with ActivationCapture(tiny_llama) as capture:
        check(tiny_llama, pairs, list(answer_pass(tiny_llama, word_tokenizer, pairs, capture=capture)))
    assert sizes[0] == 6
    assert max(sizes[-2:]) <= largest


@pytest.mark.parametrize("kind", list(ERRORS))
@pytest.mark.parametrize("largest", [9, 17, 40])
def test_packs_are_halved_when_memory_runs_out(
    kind: str,
    largest: int,
    tiny_llama: PreTrainedModel,
    word_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was given out before is not given out again, and rows longer than a pack still come, alone."""
    pairs, run = pairs_of(0), packing._run
    assert packs(tiny_llama)
    assert max(len(fed_ids(*pair)) for pair in pairs) in (11, 12, 13)

    def limited(model: Any, nodes: Any, *rest: Any) -> Any:
        if sum(len(node.ids) for node in nodes) > largest and len(nodes) > 1:
            raise ERRORS[kind]
        return run(model, nodes, *rest)

    monkeypatch.setattr(packing, "_run", limited)
    with ActivationCapture(tiny_llama) as capture:
        check(tiny_llama, pairs, list(answer_pass(tiny_llama, word_tokenizer, pairs, capture=capture)))


def test_generation_is_halved_too(
    tiny_llama: PreTrainedModel, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(20)
    expected = generate_answers(tiny_llama, word_tokenizer, prompts, max_new_tokens=5)
    generate = tiny_llama.generate

    def limited(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise ERRORS["cuda"]
        return generate(**inputs)

    monkeypatch.setattr(tiny_llama, "generate", limited)
    assert generate_answers(tiny_llama, word_tokenizer, prompts, max_new_tokens=5) == expected


def test_other_errors_and_single_rows_are_not_swallowed() -> None:
    def fail(members: list[int]) -> list[int]:
        raise error

    for error, plan in ((ERRORS["cpu"], [[0]]), (ValueError("no"), [[0, 1]]), (RuntimeError("x"), [[0, 1]])):
        with progress("test", 2) as bar, pytest.raises(type(error)):
            list(batching.in_halves(plan, fail, bar))


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    largest=st.integers(1, 6),
    most=st.integers(1, 40),
)
@settings(deadline=None)
def test_halving_runs_each_row_once(sizes: list[int], largest: int, most: int) -> None:
    plan = batching.plan_batches([(1,) * n for n in sizes], [1] * len(sizes), most * 5, 0)

    def run(members: list[int]) -> list[int]:
        if len(members) > largest:
            raise ERRORS["cuda"]
        return members

    with progress("test", len(sizes)) as bar, pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.clear_device_cache", lambda **_: None)  # it takes long
        done = list(batching.in_halves(plan, run, bar))
    assert sorted(done) == list(range(len(sizes)))


@given(
    data=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=30),
    budget=st.integers(1, 200),
    vocabulary=st.sampled_from([0, 10**5, 10**6, 10**8]),
    grow=st.integers(0, 10),
    equal=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_plan(data: list[tuple[int, int]], budget: int, vocabulary: int, grow: int, equal: bool) -> None:
    lengths = [max(n, g) for n, g in data]
    answers = [g for _, g in data]
    rows = [(7,) * n for n in lengths]
    plan = batching.plan_batches(rows, answers, budget, vocabulary, grow=grow, equal_lengths=equal)
    assert sorted(i for batch in plan for i in batch) == list(range(len(rows)))
    widths = [max(lengths[i] for i in batch) for batch in plan]
    assert widths == sorted(widths, reverse=True)  # what may not fit in memory is met first
    for batch, width in zip(plan, widths, strict=True):
        keep = width - min(lengths[i] - answers[i] for i in batch)
        if len(batch) > 1:  # a single row has to run, whatever it needs
            assert len(batch) * (width + grow) <= budget
            assert len(batch) * keep * vocabulary <= batching.MAX_LOGITS
        if equal:
            assert len({lengths[i] for i in batch}) == 1


def test_token_budget() -> None:
    for make in FAMILIES.values():
        assert 512 <= token_budget(make()) <= 4096
    # attention weights that are kept leave room for fewer
    assert token_budget(llama(), keys=10**9) == 512


def test_writing_budget() -> None:
    for name, make in FAMILIES.items():
        model = make()
        tokens, row = batching.writing_budget(model, 10, captured=False)
        assert tokens >= token_budget(model) and row == 10
        # activations of every layer, twice, beside keys and values of as many heads or half of them
        grouped = getattr(model.config, "num_key_value_heads", None) or HEADS
        assert batching.writing_budget(model, 10, captured=True) == (tokens, 10 + 10 * HEADS // grouped), name
    # few heads of keys and values: a batch holds more rows than it could read
    wide, one = {"hidden_size": 576, "num_attention_heads": 9, "intermediate_size": 1536}, 1
    assert batching.writing_budget(llama(**wide, num_key_value_heads=one), 1, captured=False)[0] > 8192


def test_fixture_prompts_share_what_they_claim() -> None:
    assert common_prefix(prompts_of(20)) == 20
    assert common_prefix(prompts_of(0)) == 0


def test_rows_longer_than_the_window_of_a_sliding_model() -> None:
    """The prefix alone is longer than the window, so that the cache has dropped part of it."""
    model = FAMILIES["mistral"]()
    tokenizer = make_word_tokenizer()
    prompts = prompts_of(40, seed=3)
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=10)
    assert [answer.ids for answer in answers] == [greedy(model, prompt, 10) for prompt in prompts]


def test_alibi_of_falcon() -> None:
    model = build(FalconConfig(**FALCON, alibi=True, multi_query=False))
    prompts = prompts_of(20)
    answers = generate_answers(model, make_word_tokenizer(), prompts, max_new_tokens=8)
    assert [answer.ids for answer in answers] == [greedy(model, prompt, 8) for prompt in prompts]


def test_no_padding_token(tiny_llama: PreTrainedModel) -> None:
    tokenizer = make_word_tokenizer()
    tokenizer.pad_token = None
    prompts = prompts_of(20)
    answers = generate_answers(llama(), tokenizer, prompts, max_new_tokens=8)
    assert [answer.ids for answer in answers] == [greedy(tiny_llama, prompt, 8) for prompt in prompts]
