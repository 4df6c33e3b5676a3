"""Every context that users can give, from the command to the predictions of the reloaded adapter.

Each run is checked for what matters: the teacher read the context, the student never did, the finished
run is not trained again, and the adapter in the folder predicts what the trained model predicted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import icl_base, rows_of
from helpers.command_line import run, tree, write_rows
from helpers.families import gpt2, llama
from helpers.prompts import chatty
from helpers.words import make_word_tokenizer
from tiny_icl.tasks import sample_task

import ia2
from ia2.config import AdaptConfig, CurveConfig, ProbeConfig
from ia2.data.examples import Example, Examples
from ia2.experiment.curve import curve
from ia2.experiment.probe import probe
from ia2.models.capture import ActivationCapture
from ia2.models.forward import answer_pass
from ia2.models.load import BaseModel
from ia2.models.tokens import Ids
from ia2.prompts.context import Contexts
from ia2.training import trainer
from ia2.utils.files import read_json

TASK = sample_task(0, num_classes=2)
BRIEF = ["--align-epochs", 1, "--sft-epochs", 1, "--learning-rates", 0.01]

# what the small trained model can read: it knows few words
HINT = "a1 z2 z3 L1"


@dataclass
class Watch:
    """What a run did.

    Attributes:
        stages: what it trained, in order.
        teacher: prompts with context of the training examples, by their place.
        others: those of dev and test rows, by where the row comes from.
    """

    stages: list[trainer.ExampleTrainer] = field(default_factory=list)
    teacher: dict[int, Ids] = field(default_factory=dict)
    others: dict[str, Ids] = field(default_factory=dict)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    found = Watch()
    fit = trainer.ExampleTrainer.fit

    def fitting(self: Any) -> float:
        found.stages.append(self)
        return fit(self)

    def asked(original: Callable[..., Ids]) -> Callable[..., Ids]:
        def context_ids(self: Any, i: int, k: int = 0) -> Ids:
            ids = original(self, i, k)
            if self.name == "teacher contexts":
                found.teacher[i] = ids
            elif self.name == "ICL prompts":
                found.others[self.queries[i].source] = ids
            return ids

        return context_ids

    monkeypatch.setattr(trainer.ExampleTrainer, "fit", fitting)
    monkeypatch.setattr(Contexts, "context_ids", asked(Contexts.context_ids))
    return found


@pytest.fixture(scope="module")
def small(tiny_icl_model_path: Path) -> BaseModel:
    """The small trained model, without a chat template."""
    return icl_base(tiny_icl_model_path)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], BaseModel]:
    """Tiny random models with a chat template: ``chatml``, or ``qwen`` with its switch for thinking."""
    known: dict[str, BaseModel] = {}

    def named(kind: str) -> BaseModel:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            tokenizer = chatty(kind)
            ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
            model = llama(vocab_size=len(tokenizer), max_position_embeddings=1024, **ends)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            known[kind] = icl_base(folder)
        return known[kind]

    return named


# ------------------------------------------------------------------------------------ what is asserted


def small_rows(count: int, seed: int = 0, **columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Rows of a task that the small model learns in context, with columns of their own."""
    return [
        {"prompt": q, "completion": a, **{name: make(i) for name, make in columns.items()}}
        for i, (q, a) in enumerate(TASK.examples(count, seed))
    ]


def chat_rows(count: int, **columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Rows whose labels have several tokens to the tokenizers with a chat template."""
    words = ["good", "bad", "film", "food", "cat", "dog", "red", "blue", "one", "two"]
    return [
        {
            "prompt": f"Text: {words[i % 10]} {words[i // 3 % 10]}\nLabel:",
            "completion": (" negative", " positive")[i % 2],
            **{name: make(i) for name, make in columns.items()},
        }
        for i in range(count)
    ]


def plain(base: BaseModel, text: str) -> Ids:
    return tuple(base.tokenizer(text)["input_ids"])


def turn(base: BaseModel, text: str, before: str = "", thought: str = "") -> Ids:
    """A user turn that the assistant is to answer, written out."""
    whole = f"{before}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{thought}"
    return tuple(base.tokenizer(whole, add_special_tokens=False)["input_ids"])


def activations(base: BaseModel, prompts: Sequence[Ids], answers: Sequence[Ids]) -> list[torch.Tensor]:
    with ActivationCapture(base.model) as capture:
        pairs = list(zip(prompts, answers, strict=True))
        found = answer_pass(base.model, base.tokenizer, pairs, capture=capture, logits=False)
        by_index = {output.index: output.activations for output in found}
    return [by_index[i] for i in range(len(prompts))]  # type: ignore[misc]


def taught(watch: Watch, base: BaseModel, bare: Sequence[Ids]) -> list[tuple[Ids, Ids]]:
    """The teacher read contexts, and no student did; gives each training prompt without and with it.

    Args:
        watch: of one run.
        base: the same model, untouched.
        bare: the prompts of all rows as they must be without context.
    """
    assert [type(stage.loss).__name__ for stage in watch.stages] == ["AlignmentLoss", "AnswerLoss"]
    for stage in watch.stages:
        for rows in (rows_of(stage.train_dataset), rows_of(stage.eval_dataset)):
            assert rows and all(row.query in bare and row.context == () for row in rows)
    dataset = watch.stages[0].train_dataset
    rows, targets = rows_of(dataset), dataset.targets
    assert targets is not None
    prompts = [watch.teacher[i] for i in range(len(rows))]
    answers = [row.response or row.answer for row in rows]
    with_context = activations(base, prompts, answers)
    without = activations(base, [row.query for row in rows], answers)
    for i in range(len(rows)):
        target = targets.get(i)
        assert target is not None
        assert torch.allclose(target, with_context[i], atol=1e-4), "targets are of the prompt with context"
        assert not torch.allclose(target, without[i], atol=1e-2), "the context changes nothing"
    return [(row.query, prompt) for row, prompt in zip(rows, prompts, strict=True)]


def jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def used_again(watch: Watch, train: Callable[[], Any], out: Path, test: Path, capsys: Any) -> None:
    """The same command trains nothing, and the adapter in the folder predicts what the model did."""
    before, trained = tree(out), len(watch.stages)
    train()
    assert len(watch.stages) == trained and tree(out) == before
    watch.teacher.clear()
    watch.others.clear()
    known, file = jsonl(out / "predictions.jsonl"), out.parent / "predictions.jsonl"
    ran = run(capsys, "eval", "--adapter", out, "--data", test, "--output", file, "--json", "--quiet")
    assert ran.status == 0, ran.err
    figures, expected = ran.json["test"], read_json(out / "metrics.json")["test"]
    assert figures.keys() == expected.keys()
    for scope in {"vocabulary", "labels", "answer"} & figures.keys():
        assert figures[scope]["nll"]["value"] == pytest.approx(expected[scope]["nll"]["value"], rel=1e-4)
    # new rows have neither an answer nor a context
    new = write_rows(out.parent / "new.jsonl", [{"prompt": row["prompt"]} for row in jsonl(test)])
    ran = run(capsys, "predict", "--adapter", out, "--data", new, "--json", "--quiet")
    assert ran.status == 0, ran.err
    for found in (jsonl(file), ran.json):
        assert [row.get("predicted", row.get("label")) for row in found] == [
            row["predicted"] for row in known
        ]
        confidences = pytest.approx([row["confidence"] for row in known], rel=1e-4)
        assert [row["confidence"] for row in found] == confidences
    assert not watch.teacher and not watch.others, "predictions are made without context"


@dataclass
class Runner:
    """``ia2 train`` on rows, with everything asserted that holds for every context."""

    watch: Watch
    folder: Path
    capsys: Any

    def __call__(
        self,
        base: BaseModel,
        rows: Sequence[dict[str, Any]],
        test: Sequence[dict[str, Any]],
        *options: Any,
        bare: Callable[[BaseModel, str], Ids] = plain,
        again: bool = True,
    ) -> dict[Ids, Ids]:
        """Training prompts without context → with it; ``again`` uses the finished run too."""
        data, unseen = (
            write_rows(self.folder / f"{n}.jsonl", r) for n, r in (("rows", rows), ("test", test))
        )
        out = self.folder / "out"
        arguments = ["train", "--model", base.path, "--device", "cpu", "--data", data, "--test-data", unseen]
        arguments += ["--output-dir", out, "--quiet", *BRIEF, *options]

        def train() -> None:
            ran = run(self.capsys, *arguments)
            assert ran.status == 0, ran.err
            self.said = ran.err

        train()
        said = self.said
        prompts = dict(taught(self.watch, base, [bare(base, row["prompt"]) for row in rows]))
        if again:
            used_again(self.watch, train, out, unseen, self.capsys)
        self.said = said
        return prompts


@pytest.fixture
def train(watch: Watch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(watch, tmp_path, capsys)


# ------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("way", ["--context-text", "--context-file"])
def test_text(way: str, small: BaseModel, train: Runner, tmp_path: Path) -> None:
    (tmp_path / "hint.txt").write_text(f"{HINT}\n")
    given = HINT if way == "--context-text" else tmp_path / "hint.txt"
    rows = small_rows(9)
    prompts = train(small, rows, small_rows(4, 1), way, given)
    expected = {plain(small, r["prompt"]): plain(small, f"{HINT}\n\n{r['prompt']}") for r in rows}
    assert len(prompts) == 6 and prompts.items() <= expected.items()


def test_a_file_that_has_changed_is_noticed(
    small: BaseModel, train: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hint.txt"
    file.write_text(HINT)
    train(small, small_rows(9), small_rows(4, 1), "--context-file", file)
    file.write_text("a1 z2 z3 L2")
    arguments = ["--model", small.path, "--device", "cpu", "--data", tmp_path / "rows.jsonl", "--test-data"]
    arguments += [tmp_path / "test.jsonl", "--output-dir", tmp_path / "out", "--quiet", *BRIEF]
    line = run(capsys, "train", *arguments, "--context-file", file).refusal()
    assert "holds another run (data of context differ)" in line


# ------------------------------------------------------------------------------------------ columns


def test_column_of_texts(small: BaseModel, train: Runner) -> None:
    """TRL's name for it, and a template beside it."""
    hints = {"privileged_context": lambda i: f"a{i % 3} z{i % 5} L{i % 4}"}
    rows = small_rows(9, **hints)
    prompts = train(small, rows, small_rows(4, 1, **hints), "--context-column", "privileged_context")
    expected = {
        plain(small, r["prompt"]): plain(small, f"{r['privileged_context']}\n\n{r['prompt']}") for r in rows
    }
    assert len(set(prompts.values())) == 6 and prompts.items() <= expected.items()


def test_column_of_messages(chats: Callable[[str], BaseModel], train: Runner) -> None:
    def messages(i: int) -> Any:
        system = {"role": "system", "content": f"Know {i}."}
        # a text is a system message
        return f"Know {i}." if i % 2 else [system, {"role": "user", "content": "A hint."}]

    base, rows = chats("chatml"), chat_rows(9, privileged_context=messages)
    arguments = ["--context-column", "privileged_context", "--chat", "turns"]
    prompts = train(base, rows, chat_rows(4, privileged_context=messages), *arguments, bare=turn)
    expected = {}
    for i, row in enumerate(rows):
        system = f"<|im_start|>system\nKnow {i}.<|im_end|>\n"
        text = row["prompt"] if i % 2 else f"A hint.\n\n{row['prompt']}"
        expected[turn(base, row["prompt"])] = turn(base, text, system)
    assert len(prompts) == 6 and prompts.items() <= expected.items()


def test_column_of_demonstrations(small: BaseModel, train: Runner) -> None:
    pool = [{"prompt": q, "completion": a} for q, a in TASK.examples(12, 7)]

    def own(i: int) -> list[dict[str, str]]:
        return pool[i : i + 1 + i % 3]

    rows = small_rows(9, shown=own)
    prompts = train(small, rows, small_rows(4, 1, shown=own), "--context-column", "shown")
    expected = {}
    for row in rows:
        shown = "".join(f"{demo['prompt']}{demo['completion']}\n\n" for demo in row["shown"])
        expected[plain(small, row["prompt"])] = plain(small, shown + row["prompt"])
    assert len(prompts) == 6 and prompts.items() <= expected.items()


# ---------------------------------------------------------------------------------------- functions


def test_function_by_its_import_path(
    small: BaseModel, train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = (
        "def hint(example, others):\n    return f'{others[0].query} L1' if len(others) == 5 else 'a1 L1'\n"
    )
    (tmp_path / "contexts_of_mine.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    prompts = train(small, small_rows(9), small_rows(4, 1), "--context-function", "contexts_of_mine:hint")
    split = Examples.load(str(tmp_path / "rows.jsonl")).split(seed=0)
    for i, example in enumerate(split.train):
        other = split.train[int(i == 0)]
        assert prompts[plain(small, example.query)] == plain(small, f"{other.query} L1\n\n{example.query}")


@pytest.mark.parametrize("broken", ["raise OSError('lost')\n", "def hint(:\n"])
def test_a_module_that_fails(
    broken: str,
    tmp_path: Path,
    small: BaseModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "broken_contexts.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    data = write_rows(tmp_path / "rows.jsonl", small_rows(9))
    arguments = ["--model", small.path, "--data", data, "--output-dir", tmp_path / "out", "--quiet"]
    line = run(capsys, "train", *arguments, "--context-function", "broken_contexts:hint").refusal()
    assert "importing 'broken_contexts' fails with " in line
    assert "(broken_contexts.py, line 1)" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--context-text", "--context-file", "--context-column"])
def test_an_empty_option_is_no_context(
    option: str, tmp_path: Path, small: BaseModel, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", small_rows(9))
    arguments = ["--model", small.path, "--data", data, "--output-dir", tmp_path / "out", "--quiet"]
    line = run(capsys, "train", *arguments, option, "").refusal()
    if option == "--context-file":
        assert line == "--context-file: an empty text is no path: leave it out, or name a file or folder."
    else:
        assert line == f"{option[2:].replace('-', '_')} is empty. Leave it out to show demonstrations."


def test_function_in_python(
    small: BaseModel, watch: Watch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Demonstrations that a Python function chooses; what runs later does not need it."""
    rows, out = small_rows(9), tmp_path / "out"
    test = write_rows(tmp_path / "test.jsonl", small_rows(4, 1))
    config = AdaptConfig(learning_rates=[0.01], align={"epochs": 1}, sft={"epochs": 1})
    asked: list[tuple[str, int]] = []

    def context(example: Example, others: Sequence[Example]) -> list[Example]:
        asked.append((example.source, len(others)))
        return [others[-1], others[0]]

    def train() -> Any:
        return ia2.adapt(
            small.path,
            Examples.from_rows(rows),
            config,
            test=Examples.load(str(test)),
            output_dir=out,
            context=context,
        )

    found = train()
    split = Examples.from_rows(rows).split(seed=0)
    assert sorted(asked) == sorted(
        [(e.source, 5) for e in split.train]
        + [(e.source, 6) for e in [*split.dev, *Examples.load(str(test))]]
    )
    prompts = dict(taught(watch, small, [plain(small, row["prompt"]) for row in rows]))
    for i, example in enumerate(split.train):
        others = [e for e in split.train if e is not example]
        text = "".join(f"{e.query}{e.answer}\n\n" for e in (others[-1], others[0])) + example.query
        assert prompts[plain(small, example.query)] == watch.teacher[i] == plain(small, text)
    assert [p.predicted for p in found.predictions] == [
        row["predicted"] for row in jsonl(out / "predictions.jsonl")
    ]
    used_again(watch, train, out, test, capsys)


# --------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize(
    ("kind", "chat", "thinking"),
    [
        ("chatml", "turns", False),
        ("chatml", "single", False),
        ("qwen", "turns", False),
        ("qwen", "turns", True),
        ("qwen", "single", False),
    ],
)
def test_chat_with_labels(
    kind: str, chat: str, thinking: bool, chats: Callable[[str], BaseModel], train: Runner
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
    return str(base.tokenizer.decode(list(ids), skip_special_tokens=True)).split("\n\n")


@pytest.mark.parametrize("order", ["random", "shared", "balanced", "nearest", "search"])
def test_orders(order: str, small: BaseModel, train: Runner) -> None:
    rows = small_rows(12)
    options = ["--demo-order", order, "--max-demonstrations", 4]
    # one order is as good as another to what reads the finished run; only the nearest are of the query
    prompts = train(small, rows, small_rows(4, 1), *options, again=order == "nearest")
    assert len(prompts) == 8
    for query, ids in prompts.items():
        *demos, last = (part.split() for part in shown(small, ids))
        assert last == shown(small, query)[0].split() and len(demos) == 4
        assert all(demo[:-1] != last for demo in demos), "an example is not its own demonstration"
        if order == "balanced":
            labels = [demo[-1] for demo in demos]
            assert {labels.count(label) for label in labels} == {2}
    sets = {tuple(sorted(shown(small, ids)[:-1])) for ids in prompts.values()}
    assert len(sets) > 2, "each prompt has its own"


def test_more_rows_than_the_window_holds(
    small: BaseModel, train: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = small_rows(45)
    whole = {" ".join((row["prompt"] + row["completion"]).split()) for row in rows}
    prompts = train(small, rows, small_rows(4, 1), "--max-context-tokens", 60)
    assert len(prompts) == 30
    missing, seen = 0, set()
    for query, ids in prompts.items():
        *demos, last = (" ".join(part.split()) for part in shown(small, ids))
        assert len(ids) <= 59 and set(demos) <= whole and len(set(demos)) == len(demos) >= 5
        assert last == " ".join(shown(small, query)[0].split())
        missing += 29 - len(demos)
        seen |= set(demos)
    # two prompts may read the same
    assert len(seen) > 20, "prompts draw their own demonstrations"
    said = " ".join(train.said.split())
    told = f"teacher contexts: {missing} demonstrations dropped, whole, from 30 of 30 prompts, to fit the"
    assert f"{told} context window of 60 tokens." in said


def test_rows_to_answer_need_no_privileged_context(
    small: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    config = AdaptConfig(context_column="hint", align={"epochs": 1}, sft={"epochs": 1})
    train = Examples.from_rows(small_rows(9, hint=lambda i: HINT))
    with caplog.at_level("INFO", logger="ia2"):
        found = ia2.adapt(small.path, train, config, test=Examples.from_rows(small_rows(4)))
    assert "similarity_to_icl" not in found.metrics and found.metrics["test"]["n"] == 4
    assert "have no column 'hint': no similarity to the teacher is measured" in caplog.text


# ------------------------------------------------------------------------------- the other commands


@pytest.mark.usefixtures("undrawn")
def test_compare_with_chat(
    chats: Callable[[str], BaseModel], tmp_path: Path, capsys: pytest.CaptureFixture[str], watch: Watch
) -> None:
    base = chats("chatml")
    data, test = (write_rows(tmp_path / f"{n}.jsonl", chat_rows(count)) for n, count in (("a", 9), ("b", 4)))
    arguments = ["compare", "--model", base.path, "--device", "cpu", "--data", data, "--test-data", test]
    arguments += ["--output-dir", tmp_path / "out", "--quiet", "--json", "--chat", "turns", "--seeds", 1]
    arguments += ["--recipes", "base,icl,ia2-sft", *BRIEF]
    ran = run(capsys, *arguments)
    assert ran.status == 0, ran.err
    assert set(ran.json["recipes"]) == {"base", "icl", "ia2-sft"}
    taught(watch, base, [turn(base, row["prompt"]) for row in chat_rows(9)])
    for row in Examples.load(str(test)):
        text = str(base.tokenizer.decode(list(watch.others[row.source])))
        asked = f"<|im_start|>user\n{row.query}<|im_end|>\n<|im_start|>assistant\n"
        assert text.endswith(asked) and text.count("<|im_start|>assistant") == 7
    stages = len(watch.stages)
    assert run(capsys, *arguments).json["recipes"] == ran.json["recipes"] and len(watch.stages) == stages


def test_curve_with_a_column(small: BaseModel, tmp_path: Path, watch: Watch) -> None:
    rows = Examples.from_rows(small_rows(12, hint=lambda i: f"a{i % 3} L{i % 4}"))
    config = CurveConfig(
        context_column="hint",
        sizes=[2, 4],
        seeds=1,
        recipes=["icl", "ia2-sft"],
        align={"epochs": 1},
        sft={"epochs": 1},
    )
    found = curve(small, rows[:8], config, test=rows[8:], output_dir=tmp_path / "out")
    assert [point["num_train"] for point in found.summary["curves"]["icl"]] == [2, 4]
    for example in rows[8:]:
        assert watch.others[example.source] == plain(small, f"{example.fields['hint']}\n\n{example.query}")


@pytest.mark.parametrize("answers", ["read off the text", "not in the text"])
def test_probe_with_a_text(answers: str, small: BaseModel, watch: Watch) -> None:
    """Demonstrations written out as a text: the small model reads the rule off them."""
    text = "\n\n".join(f"{q}{a}" for q, a in TASK.examples(16, 5))
    rows = small_rows(17)
    if answers == "not in the text":
        text = "z1 z2"
    found = probe(small, Examples.from_rows(rows), ProbeConfig(context_text=text, sft={"epochs": 2}))
    assert watch.teacher[0] == plain(small, f"{text}\n\n{rows[0]['prompt']}")
    assert (found.facts["demonstrations"], found.facts["context"]) == (0, "the same text before it")
    verdict = "likely to help" if answers == "read off the text" else "unlikely"
    assert found.verdict == verdict, found.reason
    assert found.reason.startswith("The context is ") and "(the context " in found.reason
    assert "ICL" not in found.reason and "demonstration" not in found.reason


def test_probe_says_how_many_demonstrations(small: BaseModel) -> None:
    rows = Examples.from_rows(small_rows(9))

    def context(**settings: Any) -> Any:
        return probe(small, rows, ProbeConfig(sft={"epochs": 1}, **settings)).facts["context"]

    assert context() == "the 8 others shown before it"
    assert context(max_demonstrations=3) == "3 of the others shown before it"


# --------------------------------------------------------------------------------------- new rows


def test_a_new_row_must_leave_room_for_a_stop_text(tmp_path: Path, capsys: Any) -> None:
    """GPT-2 has a table of positions, and an answer goes on until its stop text would be complete."""
    model, tokenizer = gpt2(), make_word_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Text: {w} film", "completion": " good food"} for w in ("red", "blue", "a", "b", "c")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ["--model", tmp_path / "model", "--data", data, "--output-dir", tmp_path / "out", "--quiet"]
    arguments += ["--recipe", "sft", "--sft-epochs", 1, "--task", "generation", "--max-answer-tokens", 20]
    assert run(capsys, "train", *arguments).status == 0
    longest = 256 - 20 - 16
    for count, fits in ((longest, True), (longest + 1, False)):
        new = write_rows(tmp_path / "new.jsonl", [{"prompt": " ".join(["film"] * count)}])
        ran = run(capsys, "predict", "--adapter", tmp_path / "out", "--data", new, "--json", "--quiet")
        if fits:
            assert ran.status == 0 and len(ran.json) == 1
        else:
            told = f"the prompt has {count} tokens; the context window holds 256, of which 36 are kept"
            assert told in ran.refusal()
