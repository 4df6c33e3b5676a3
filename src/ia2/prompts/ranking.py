"""What the base model says of demonstrations: embeddings of queries, and which order is best.

Both say what they cost before they run, and switch off the adapter that may be on the model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.adapters.weights import base_weights
from ia2.data.examples import Example
from ia2.models.batching import in_halves, plan_batches, token_budget
from ia2.models.capture import unwrap
from ia2.models.families import evaluating
from ia2.models.forward import answer_pass, check_finite
from ia2.models.tokens import Ids, encode_answer, pad_id, pad_rows
from ia2.prompts.context import Contexts
from ia2.prompts.demonstrations import Demonstrations, pool_orders
from ia2.prompts.format import PromptFormat
from ia2.utils.logging import logger, progress

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Examples that the search scores an order on; the mean over more would hardly rank orders otherwise.
SEARCH_EXAMPLES = 256


def embed_queries(model: nn.Module, prompt_format: PromptFormat, queries: Sequence[Example]) -> np.ndarray:
    """Embeddings of bare queries: the mean over tokens of the last hidden state, ``[n, d]`` float32."""
    import torch

    prompts = [prompt_format.query_ids(query) for query in queries]
    count, tokens = len(prompts), sum(map(len, prompts))
    logger.info("demo_order nearest: embedding %d prompts (%d tokens).", count, tokens)
    inner = unwrap(model)
    body = getattr(inner, "base_model", inner)  # without the head over the vocabulary
    body = inner.get_decoder() if body is inner else body
    device = inner.get_input_embeddings().weight.device
    plan = plan_batches(prompts, [1] * len(prompts), token_budget(model), 0)
    padding = pad_id(prompt_format.tokenizer)

    def run(members: list[int]) -> list[tuple[int, np.ndarray]]:
        batch = pad_rows([prompts[i] for i in members], [1] * len(members), padding)
        assert batch.attention_mask is not None
        mask = batch.attention_mask.to(device)
        output = body(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
        state = output.last_hidden_state.float()
        mask = mask.to(state.device)[:, :, None]
        # padding may hold anything, infinities too
        mean = state.masked_fill(mask == 0, 0).sum(1) / mask.sum(1)
        check_finite(model, mean, "hidden states")
        return list(zip(members, mean.cpu().numpy(), strict=True))

    means: dict[int, Any] = {}
    off = base_weights(model)
    with off, evaluating(model), torch.no_grad(), progress("embedding prompts", len(prompts)) as bar:
        means.update(in_halves(plan, run, bar))
    return np.stack([means[n] for n in range(len(prompts))])


def search_orders(
    model: nn.Module,
    prompt_format: PromptFormat,
    pool: Sequence[Example],
    *,
    window: int,
    reserve: int,
    tries: int,
    seed: int,
    most: int | None = None,
) -> list[list[int]]:
    """Random orders of a pool, the best first.

    An order is as good as the mean log-likelihood of an example's true answer, given the others in that
    order.
    """
    orders = pool_orders(len(pool), tries, seed)
    rows = list(range(len(pool)))
    if len(rows) > SEARCH_EXAMPLES:
        rows = sorted(random.Random(f"search {seed}").sample(rows, SEARCH_EXAMPLES))
    draw = Demonstrations("search", pool, pool, tries, seed, True, most, search=lambda: orders)
    contexts = Contexts(prompt_format, pool, window, reserve, "orders tried", draw)
    prompts = [[contexts.context_ids(i, r) for i in rows] for r in range(tries)]
    tokenizer = prompt_format.tokenizer
    texts = {i: prompt_format.as_answer(pool[i].answer or "") for i in rows}
    answers = [encode_answer(tokenizer, text, pool[i].source) for i, text in texts.items()]
    cost = f"{tries * len(rows)} forward rows, {sum(len(ids) for own in prompts for ids in own)} tokens"
    logger.info("demo_order search: %d orders on %d of %d examples (%s).", tries, len(rows), len(pool), cost)
    scores = []
    with base_weights(model):
        for r, of_order in enumerate(prompts, 1):
            pairs = list(zip(of_order, answers, strict=True))
            found = log_likelihoods(model, tokenizer, pairs, f"demonstration orders ({r}/{tries})")
            scores.append(sum(found) / len(found))
    ranks = sorted(range(tries), key=lambda r: -scores[r])
    likelihoods = f"{max(scores):.3f} in the best order, {min(scores):.3f} in the worst"
    logger.info("demo_order search: mean log-likelihood of an answer %s.", likelihoods)
    return [orders[r] for r in ranks]


def log_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Ids, Ids]],
    description: str = "log-likelihoods",
) -> list[float]:
    """Log-likelihood of each answer behind its prompt, in input order."""
    import torch

    values = [0.0] * len(pairs)
    for output in answer_pass(model, tokenizer, pairs, description=description):
        assert output.logits is not None
        ids = torch.tensor(pairs[output.index][1])
        scores = output.logits.log_softmax(-1)
        values[output.index] = float(scores.gather(1, ids[:, None]).double().sum())
    return values
