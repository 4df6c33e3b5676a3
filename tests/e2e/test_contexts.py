"""Every context that users can give, from the command to the predictions of the reloaded adapter.

Each run is checked for what matters: the teacher read the context, the student never did, the finished
run is not trained again, and the adapter in the folder predicts what the trained model predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.benches import rows_of
from helpers.command_line import names, run, write_rows
from helpers.families import gpt2
from helpers.words import make_word_tokenizer
from watching import (
    BRIEF,
    HINT,
    TASK,
    Runner,
    Watch,
    chat_rows,
    jsonl,
    plain,
    small_rows,
    taught,
    turn,
    used_again,
)

import ia2
from ia2.config import AdaptConfig, ProbeConfig
from ia2.data.examples import Example, Examples
from ia2.experiment.probe import probe
from ia2.models.load import BaseModel
from ia2.models.tokens import Ids

# ----------------------------------------------------------------------------------------- contexts

POOL = [{"prompt": q, "completion": a} for q, a in TASK.examples(12, 7)]
FUNCTION = """
def hint(example, others):
    return f'{len(others)} {example.query.split()[0]} L1'
"""


def written(demonstrations: list[dict[str, str]]) -> str:
    return "\n\n".join(f"{demo['prompt']}{demo['completion']}" for demo in demonstrations)


# kind → options, the column of hints, and the text before a row's prompt
CONTEXTS: dict[str, tuple[list[Any], Any, Callable[[dict[str, Any]], str]]] = {
    "text": (["--context-text", HINT], None, lambda row: HINT),
    "file": (["--context-file", "hint.txt"], None, lambda row: HINT),
    "texts": (["--context-column", "hint"], lambda i: f"a{i % 3} z{i % 5} L{i % 4}", lambda row: row["hint"]),
    "demonstrations": (
        ["--context-column", "hint"],
        lambda i: POOL[i : i + 1 + i % 3],
        lambda row: written(row["hint"]),
    ),
    "function": (
        ["--context-function", "contexts_of_mine:hint"],
        None,
        lambda row: f"5 {row['prompt'].split()[0]} L1",
    ),
}


@pytest.mark.parametrize("kind", CONTEXTS)
def test_context(
    kind: str, small: BaseModel, train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, hint, context = CONTEXTS[kind]
    (tmp_path / "hint.txt").write_text(f"{HINT}\n")
    (tmp_path / "contexts_of_mine.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = small_rows(9, hint=hint)
    prompts = train(small, rows, small_rows(4, 1, hint), *options)
    expected = {plain(small, r["prompt"]): plain(small, f"{context(r)}\n\n{r['prompt']}") for r in rows}
    assert len(prompts) == 6 and prompts.items() <= expected.items()


def test_column_of_messages(chats: Callable[[str], BaseModel], train: Runner) -> None:
    def messages(i: int) -> Any:
        system = {"role": "system", "content": f"Know {i}."}
        # a text is a system message
        return f"Know {i}." if i % 2 else [system, {"role": "user", "content": "A hint."}]

    base, rows = chats("chatml"), chat_rows(9, messages)
    options = ["--context-column", "hint", "--chat", "turns"]
    prompts = train(base, rows, chat_rows(4, messages), *options, bare=turn)
    expected = {}
    for i, row in enumerate(rows):
        text = row["prompt"] if i % 2 else f"A hint.\n\n{row['prompt']}"
        system = f"<|im_start|>system\nKnow {i}.<|im_end|>\n"
        expected[turn(base, row["prompt"])] = turn(base, text, system)
    assert len(prompts) == 6 and prompts.items() <= expected.items()


@pytest.mark.parametrize("broken", ["raise OSError('lost')\n", "def hint(:\n"])
def test_a_module_that_fails(
    broken: str, tmp_path: Path, small: BaseModel, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_contexts.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    data = write_rows(tmp_path / "rows.jsonl", small_rows(9))
    arguments = ["--model", small.path, "--data", data, "--output-dir", tmp_path / "out", "--quiet"]
    line = run(capsys, "train", *arguments, "--context-function", "broken_contexts:hint").refusal()
    names(line, "importing 'broken_contexts' fails with ", "(broken_contexts.py, line 1)")


def test_function_in_python(small: BaseModel, watch: Watch, tmp_path: Path, capsys: Any) -> None:
    """Demonstrations that a Python function chooses; what runs later does not need it."""
    rows, out = Examples.from_rows(small_rows(9)), tmp_path / "out"
    test = write_rows(tmp_path / "test.jsonl", small_rows(4, 1))
    config = AdaptConfig(learning_rates=[0.01], selection="dev", align={"epochs": 1}, sft={"epochs": 1})
    asked: list[tuple[str, int]] = []

    def context(example: Example, others: Sequence[Example]) -> list[Example]:
        asked.append((example.source, len(others)))
        return [others[-1], others[0]]

    def train() -> Any:
        tests = Examples.load(str(test))
        return ia2.adapt(small.path, rows, config, test=tests, output_dir=out, context=context)

    train()
    split = rows.split(seed=0)
    asked_without = [(e.source, 6) for e in [*split.dev, *Examples.load(str(test))]]
    assert sorted(asked) == sorted([(e.source, 5) for e in split.train] + asked_without)
    prompts = dict(taught(watch, small, [plain(small, row.query) for row in rows]))
    for i, example in enumerate(split.train):
        others = [e for e in split.train if e is not example]
        text = "".join(f"{e.query}{e.answer}\n\n" for e in (others[-1], others[0])) + example.query
        assert prompts[plain(small, example.query)] == watch.teacher[i] == plain(small, text)
    used_again(watch, train, out, test, capsys)


def test_rows_to_answer_need_no_privileged_context(small: BaseModel, caplog: Any) -> None:
    config = AdaptConfig(context_column="hint", align={"epochs": 1}, sft={"epochs": 1})
    train, test = (Examples.from_rows(r) for r in (small_rows(9, hint=lambda i: HINT), small_rows(4)))
    with caplog.at_level("INFO", logger="ia2"):
        found = ia2.adapt(small.path, train, config, test=test)
    assert "similarity_to_icl" not in found.metrics and found.metrics["test"]["n"] == 4
    assert "have no column 'hint': no similarity to the teacher is measured" in caplog.text


# --------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize(
    ("kind", "chat", "thinking"),
    [
        ("chatml", "turns", False),
        ("chatml", "single", False),
        ("qwen", "turns", False),
        ("qwen", "turns", True),
    ],
)
def test_chat_with_labels(
    kind: str, chat: str, thinking: int, chats: Callable[[str], BaseModel], train: Runner
) -> None:
    base, rows = chats(kind), chat_rows(9)
    thought = "<think>\n\n</think>\n\n" if kind == "qwen" and not thinking else ""
    options = ["--chat", chat, *(["--thinking"] if thinking else [])]
    prompts = train(
        base,
        rows,
        chat_rows(4),
        *options,
        bare=lambda b, text: turn(b, text, thought=thought),
        again=chat == "turns",
    )
    texts = {query: str(base.tokenizer.decode(list(ids))) for query, ids in prompts.items()}
    assert len(texts) == 6
    for query, text in texts.items():
        own = str(base.tokenizer.decode(list(query)))
        assert text.count("Label:") == 6 and text.count("<|im_start|>assistant") == (1, 6)[chat == "turns"]
        assert text.endswith(f"<|im_start|>assistant\n{thought}")
        answered = ("positive<|im_end|>" in text, "Label: positive\n\n" in text)
        assert answered == (chat == "turns", chat == "single")
        assert text.count("<think>") == bool(thought), "only the answer to come is thought about"
        assert own.removeprefix("<|im_start|>user\n") in text


@pytest.mark.parametrize("chat", ["turns", "single"])
def test_free_answers_end_their_turn(chat: str, chats: Callable[[str], BaseModel], train: Runner) -> None:
    base = chats("chatml")
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    # blanks before an answer are the template's to cut, and no part of what is learnt
    rows = [{**row, "completion": f" {row['prompt'].split()[1]} food"} for row in chat_rows(9)]
    options = ["--chat", chat, "--task", "generation", "--max-answer-tokens", 12, "--adapter-type", "full"]
    options += ["--sft-epochs", 30, "--sft-patience", 100, "--no-sft-restore-best"]
    train(base, rows, rows[:4], *options, bare=turn)
    for row in rows_of(train.watch.stages[1].train_dataset):
        assert row.answer[-1] == end and row.answer.count(end) == 1
        text = str(base.tokenizer.decode(list(row.answer)))
        assert text.endswith(" food<|im_end|>") and text == text.lstrip()
    found = jsonl(train.folder / "predictions.jsonl")
    # eleven tokens are left for more, had the turn not ended
    assert all(row["answer"].endswith(" food") for row in found), found


# -------------------------------------------------------------------------------- demonstrations


def shown(base: BaseModel, ids: Ids) -> list[str]:
    """The demonstrations of a plain prompt and the query, each as text."""
    text = str(base.tokenizer.decode(list(ids), skip_special_tokens=True))
    return [" ".join(part.split()) for part in text.split("\n\n")]


@pytest.mark.parametrize("order", ["random", "shared", "balanced", "nearest", "search"])
def test_orders(order: str, small: BaseModel, train: Runner) -> None:
    options = ["--demo-order", order, "--max-demonstrations", 4]
    # one order is as good as another to what reads the finished run; only the nearest are of the query
    prompts = train(small, small_rows(12), small_rows(4, 1), *options, again=order == "nearest")
    assert len(prompts) == 8
    for query, ids in prompts.items():
        *demos, last = shown(small, ids)
        assert [last] == shown(small, query) and len(demos) == 4
        assert all(demo.rsplit(" ", 1)[0] != last for demo in demos), "an example is its own demonstration"
        if order == "balanced":
            labels = [demo.split()[-1] for demo in demos]
            assert {labels.count(label) for label in labels} == {2}
    sets = {tuple(sorted(shown(small, ids)[:-1])) for ids in prompts.values()}
    assert len(sets) > 2, "each prompt has its own"


def test_more_rows_than_the_window_holds(small: BaseModel, train: Runner) -> None:
    rows = small_rows(45)
    whole = {" ".join((row["prompt"] + row["completion"]).split()) for row in rows}
    prompts = train(small, rows, small_rows(4, 1), "--max-context-tokens", 60)
    assert len(prompts) == 30
    missing, seen = 0, set()
    for query, ids in prompts.items():
        *demos, last = shown(small, ids)
        assert len(ids) <= 59 and set(demos) <= whole and len(set(demos)) == len(demos) >= 5
        assert [last] == shown(small, query)
        missing += 29 - len(demos)
        seen |= set(demos)
    assert len(seen) > 20, "prompts draw their own demonstrations"
    told = f"teacher contexts: {missing} demonstrations dropped, whole, from 30 of 30 prompts, to fit the"
    assert f"{told} context window of 60 tokens." in " ".join(train.said.split())


# ------------------------------------------------------------------------------- the other commands


@pytest.mark.usefixtures("undrawn")
def test_compare_with_chat(
    chats: Callable[[str], BaseModel], tmp_path: Path, capsys: Any, watch: Watch
) -> None:
    base = chats("chatml")
    data, test = (write_rows(tmp_path / f"{n}.jsonl", chat_rows(n)) for n in (9, 4))
    arguments = ["compare", "--model", base.path, "--device", "cpu", "--data", data, "--test-data", test]
    arguments += ["--output-dir", tmp_path / "out", "--quiet", "--json", "--chat", "turns", "--seeds", 1]
    ran = run(capsys, *arguments, "--recipes", "base,icl,ia2-sft", *BRIEF)
    assert ran.status == 0, ran.err
    taught(watch, base, [turn(base, row["prompt"]) for row in chat_rows(9)])
    for row in Examples.load(str(test)):
        text = str(base.tokenizer.decode(list(watch.others[row.source])))
        asked = f"<|im_start|>user\n{row.query}<|im_end|>\n<|im_start|>assistant\n"
        assert text.endswith(asked) and text.count("<|im_start|>assistant") == 7


@pytest.mark.parametrize(
    ("text", "verdict"), [(written(POOL + small_rows(8, 5)), "likely to help"), ("z1 z2", "unlikely")]
)
def test_probe_with_a_text(text: str, verdict: str, small: BaseModel, watch: Watch) -> None:
    """Demonstrations written out as a text: the small model reads the rule off them."""
    rows = small_rows(17)
    found = probe(small, Examples.from_rows(rows), ProbeConfig(context_text=text, sft={"epochs": 2}))
    assert watch.teacher[0] == plain(small, f"{text}\n\n{rows[0]['prompt']}")
    assert (found.facts["demonstrations"], found.facts["context"]) == (0, "the same text before it")
    assert found.verdict == verdict, found.reason
    assert "ICL" not in found.reason and "demonstration" not in found.reason


def test_a_new_row_must_leave_room_for_a_stop_text(tmp_path: Path, capsys: Any) -> None:
    """GPT-2 has a table of positions, and an answer goes on until its stop text would be complete."""
    gpt2().save_pretrained(tmp_path / "model")
    make_word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Text: {w} film", "completion": " good food"} for w in ("red", "blue", "a", "b", "c")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ["--model", tmp_path / "model", "--data", data, "--output-dir", tmp_path / "out", "--quiet"]
    arguments += ["--recipe", "sft", "--sft-epochs", 1, "--task", "generation", "--max-answer-tokens", 20]
    assert run(capsys, "train", *arguments).status == 0
    longest = 256 - 20 - 16
    for count in (longest, longest + 1):
        new = write_rows(tmp_path / "new.jsonl", [{"prompt": " ".join(["film"] * count)}])
        ran = run(capsys, "predict", "--adapter", tmp_path / "out", "--data", new, "--json", "--quiet")
        assert (ran.status == 0) == (count == longest)
    names(ran.refusal(), f"the prompt has {count} tokens; the context window holds 256, of which 36 are kept")
