"""The teacher pass: its answers, its averages, what it leaves behind, how much memory it takes."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import base_of, bench_of, icl_base, icl_examples, word_examples, wordy_model
from helpers.families import llama
from helpers.launching import forkserver
from helpers.prompts import builder, leave_one_out

from ia2.models.generation import Generated
from ia2.prompts.context import Contexts
from ia2.teacher import targets
from ia2.teacher import teacher as module
from ia2.teacher.targets import OnlineTargets
from ia2.teacher.teacher import Teacher
from ia2.utils.errors import RunFolderError

ROWS = 7


@pytest.fixture(scope="module")
def trained(tiny_icl_model_path: Path) -> Any:
    return icl_base(tiny_icl_model_path)


@pytest.fixture(scope="module")
def wordy(word_tokenizer: Any) -> Any:
    return base_of(wordy_model(), word_tokenizer)


def contexts_of(base: Any, permutations: int = 1, rows: Any = None) -> Contexts:
    rows = rows or (icl_examples(ROWS) if base.name != "tiny" else word_examples(ROWS, label_words=4))
    return leave_one_out(base.tokenizer, rows, base.max_length, 24, permutations, seed=5)


def test_one_token_answers_are_the_argmax_after_the_whole_prompt(trained: Any) -> None:
    contexts = contexts_of(trained)
    found = Teacher(trained.model, trained.tokenizer, 1).teach(contexts)
    for i, answer in enumerate(found.answers):
        with torch.no_grad():
            logits = trained.model(input_ids=torch.tensor([contexts.context_ids(i)])).logits[0, -1]
        assert answer.ids == (int(logits.argmax()),) and answer.ended
        assert found.get(i).shape == (4, 1, 64)
    # it does learn in context: most of the answers are right
    gold = [trained.tokenizer(e.answer)["input_ids"][-1] for e in icl_examples(ROWS)]
    assert sum(a.ids == (g,) for a, g in zip(found.answers, gold, strict=True)) >= ROWS - 1


@pytest.mark.parametrize("limit", [1, 6])
def test_the_mean_over_orders_is_the_mean_of_each(limit: int, wordy: Any) -> None:
    contexts = contexts_of(wordy, permutations=3)
    options: dict[str, Any] = {"max_answer_tokens": limit, "stop_texts": ("\n\n",)}
    mean = Teacher(wordy.model, wordy.tokenizer, **options).teach(contexts)
    each = Teacher(wordy.model, wordy.tokenizer, **options, average=False).teach(contexts)
    assert (mean.permutations, each.permutations) == (1, 3)
    assert mean.answers == each.answers
    for i in range(ROWS):
        orders = torch.stack([each.get(i, k) for k in range(3)])
        torch.testing.assert_close(mean.get(i), orders.mean(0))
        assert not torch.allclose(orders[0], orders[1])
    if limit > 1:  # generated under the first order
        first = Teacher(wordy.model, wordy.tokenizer, **options).teach(contexts_of(wordy))
        assert first.answers == mean.answers
        assert all(torch.allclose(first.get(i), each.get(i, 0), atol=1e-6) for i in range(ROWS))
        assert len({len(a.ids) for a in mean.answers}) > 1


def test_averages_come_out_the_same_in_small_chunks(wordy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = contexts_of(wordy, permutations=2)
    teacher = Teacher(wordy.model, wordy.tokenizer, 6, ("\n\n",))
    whole, online = teacher.teach(contexts), teacher.teach(contexts, OnlineTargets)
    monkeypatch.setattr(module, "_CHUNK", 2)
    parts = teacher.teach(contexts)
    for each in (parts, online):
        assert (each.answers, each.layers) == (whole.answers, whole.layers)
        assert each.rms == pytest.approx(whole.rms, rel=1e-5)
    assert all(torch.allclose(parts.get(i), whole.get(i), atol=1e-5) for i in range(ROWS))


def test_the_teacher_is_the_base_model(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = icl_examples(ROWS)
    bare = Teacher(icl_base(tiny_icl_model_path).model, icl_base(tiny_icl_model_path).tokenizer, 1)
    bench = bench_of(
        icl_base(tiny_icl_model_path),
        rows,
        rows[:0],
        tmp_path,
        randomise=True,
        adapter={"dropout": 0.5},
        targets="memory",
    )
    bench.model.train()
    contexts = bench.train_contexts
    with_adapter, without = bench.teaching.teacher().teach(contexts), bare.teach(contexts)
    assert all(torch.equal(with_adapter.get(i), without.get(i)) for i in range(ROWS))
    assert bench.model.training
    assert {n for n, p in bench.model.named_parameters() if p.requires_grad} == {
        n for n, _ in bench.model.named_parameters() if "lora" in n
    }


# -------------------------------------------------------------------------------------- on disk


def test_a_store_is_reused_or_refused(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(trained.model, trained.tokenizer, 1)
    folder = tmp_path / "teacher" / "train"
    made = teacher.to_store(contexts_of(trained), folder, {"model": "a", "seed": 0, "data": "x"})

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "answer_pass", forbidden)
    again = teacher.to_store(contexts_of(trained), folder, {"model": "a", "seed": 0, "data": "x"})
    assert again.answers == made.answers and torch.equal(again.get(3), made.get(3))
    with pytest.raises(RunFolderError, match="these differ: data, model"):
        teacher.to_store(contexts_of(trained), folder, {"model": "b", "seed": 0, "data": "y"})


@pytest.mark.parametrize("end", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_dies_leaves_no_folder(
    end: type[BaseException], trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Teacher(trained.model, trained.tokenizer, 1)
    real = module.answer_pass

    def dying(*args: Any, **kwargs: Any) -> Any:
        for place, output in enumerate(real(*args, **kwargs)):
            if place == 3:
                raise end
            yield output

    monkeypatch.setattr("ia2.teacher.targets._SHARD_BYTES", 1)  # shards have been written by then
    with monkeypatch.context() as patch, pytest.raises(end):
        patch.setattr(module, "answer_pass", dying)
        teacher.to_store(contexts_of(trained), tmp_path / "teacher" / "train", {})
    assert list((tmp_path / "teacher").iterdir()) == []
    store = teacher.to_store(contexts_of(trained), tmp_path / "teacher" / "train", {})
    assert len(store.answers) == ROWS
    assert not any(m._forward_hooks for m in trained.model.modules())


# --------------------------------------------------------------------------------------- memory

_LAYERS, _WIDTH, _TOKENS = 16, 64, 128


def _peak(where: str, count: int, folder: str, out: Any) -> None:
    """Peak memory of a teacher pass over ``count`` examples with long answers, in bytes."""
    from helpers.words import make_word_tokenizer

    torch.set_num_threads(1)
    # freed tensors go back to the system at once, so that the peak is of what is held (M_MMAP_THRESHOLD)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    sizes = {"num_hidden_layers": _LAYERS, "hidden_size": _WIDTH, "intermediate_size": 32}
    model = llama(**sizes, num_attention_heads=1, num_key_value_heads=1)
    tokenizer = make_word_tokenizer(1024)
    rows = word_examples(count)
    contexts = builder(tokenizer, rows[:3], 1024, 256).pool_contexts(rows)

    # the answers do not matter here, their length does
    def generate(model: Any, tokenizer: Any, prompts: Any, *, on_answer: Any, **_: Any) -> list[Generated]:
        answers = [Generated((20,) * _TOKENS, "", False) for _ in prompts]
        for place, answer in enumerate(answers):
            on_answer(place, answer, None)
        return answers

    module.generate_answers = generate
    targets._SHARD_BYTES = 8 * 2**20
    teacher = Teacher(model, tokenizer, _TOKENS)
    if where == "store":
        found: Any = teacher.to_store(contexts, Path(folder), {})
    else:
        found = teacher.teach(contexts)
    assert found.get(count - 1).shape == (_LAYERS, _TOKENS, _WIDTH)
    out.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux and glibc report it")
def test_memory_does_not_grow_with_the_examples(tmp_path: Path) -> None:
    context = forkserver()
    peaks = {}
    for where, count in (("store", 20), ("store", 200), ("memory", 200)):
        out = context.SimpleQueue()
        process = context.Process(target=_peak, args=(where, count, str(tmp_path / str(count)), out))
        process.start()
        process.join()
        assert process.exitcode == 0
        peaks[where, count] = out.get()
    kept = 200 * _LAYERS * _WIDTH * _TOKENS * 4
    assert kept > 100e6
    written = sum(path.stat().st_size for path in (tmp_path / "200").glob("*.safetensors"))
    assert written >= kept
    assert peaks["store", 200] - peaks["store", 20] < 0.25 * kept
    # the measure does see what is kept
    assert peaks["memory", 200] - peaks["store", 20] > 0.75 * kept
