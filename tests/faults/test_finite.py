"""NaN and infinity: named where they arise, and in no file. Where they enter, see test_refusals.py."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.benches import base_of, bench_of, icl_examples, trainer_of, word_examples, wordy_model
from helpers.command_line import Ia2, Ran, names, strict, tree
from helpers.sweeping import records, swept
from helpers.words import make_word_tokenizer
from safetensors.torch import load_file, save_file

from ia2.analysis.patching import patched_log_probs
from ia2.cli.output import print_json
from ia2.config import AdaptConfig
from ia2.data.examples import FewShotSplit
from ia2.evaluation.metrics import measure_labels, summarise
from ia2.evaluation.plain_text import diversity
from ia2.evaluation.scoring import LabelScorer, Prediction, write_predictions
from ia2.experiment.adapt import adapt
from ia2.experiment.predict import prediction_text
from ia2.models.capture import ActivationCapture
from ia2.models.forward import AnswerOutput, answer_pass
from ia2.prompts.task import Task
from ia2.training.losses import AnswerLoss
from ia2.utils.errors import ModelError
from ia2.utils.manifest import MANIFEST

NAN, INF = float("nan"), float("inf")
TEST = ("--test-data", "test.jsonl")


@pytest.fixture
def compare(here: Path, ia2: Ia2) -> Ia2:
    """``ia2 compare`` into out on one seed, two epochs a stage; later options win."""
    common = ["--model", "model", "--data", "rows.jsonl", "--output-dir", "out", *TEST, "--seeds", 1]
    brief = ["--align-epochs", 2, "--sft-epochs", 2]
    return lambda *options, command="compare": ia2(command, *common, *brief, *options)


def refused(ran: Ran) -> str:
    """The one line of a mistake, whatever was logged before it."""
    assert ran.status == 2 and "Traceback" not in ran.err, ran
    errors = [line for line in ran.err.splitlines() if line.startswith("ia2: error: ")]
    assert errors == ran.err.splitlines()[-1:]
    return errors[0]


def assert_finite(folder: Path) -> set[str]:
    """Every file below a folder holds finite numbers only; gives the kinds of files that were read."""

    def walk(value: Any, where: str) -> None:
        assert not isinstance(value, float) or abs(value) < INF, where
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner, where)

    for name, data in tree(folder).items():
        kind = Path(name).suffix
        if kind in (".json", ".jsonl"):
            documents = data.decode().splitlines() if kind == ".jsonl" else [data.decode()]
            walk([strict(document) for document in documents], name)
        elif kind == ".yaml":
            walk(yaml.safe_load(data), name)
        elif kind == ".safetensors":
            assert all(torch.isfinite(t.float()).all() for t in load_file(folder / name).values()), name
        elif kind in (".md", ".csv", ".html"):
            assert not set(re.split(r"[\s|,]+", data.decode().lower())) & {"nan", "inf"}, name
    return {Path(name).suffix for name in tree(folder)}


def damaged(source: Path, folder: Path, value: float, tensors: str) -> Path:
    """A copy of a model or run folder some of whose weights are ``value``."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        state = {n: torch.full_like(t, value) if tensors in n else t for n, t in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    (folder / MANIFEST).unlink(missing_ok=True)  # with it, the digest would tell first
    return folder


# ------------------------------------------------------------------------------- stages that diverge


def test_a_rate_that_diverges_stands_beside_those_that_do_not(train: Ia2, ia2: Ia2, here: Path) -> None:
    rates = ["--learning-rates", "1e30", "1e-3", "1e29"]
    brief = [*TEST, "--align-epochs", 2, "--sft-epochs", 2, "--recipe", "ia2-sft"]
    ran = train(*rates, *brief)
    assert ran.status == 0, ran.err
    metrics = strict((here / "out" / "metrics.json").read_text())
    tried = metrics["dev_loss_by_learning_rate"]
    assert list(tried) == ["1e+30", "0.001", "1e+29"] and metrics["learning_rate"] == 1e-3
    assert tried["1e+30"] is None and tried["1e+29"] is None and tried["0.001"] > 0
    # which of the first passes overflows depends on how the rows of a step are laid out
    assert list(metrics["diverged"]) == ["1e+30", "1e+29"]
    assert all(re.fullmatch(r"align at step [12]", where) for where in metrics["diverged"].values())
    # the stage by name; what follows is not trained, and its weights are not kept
    stage = strict((here / "out" / "align" / "lr-1e+30" / "stage.json").read_text())
    assert (stage["diverged"], stage["dev_loss"]) == (True, None) and stage["diverged_step"] in (1, 2)
    assert [path.name for path in (here / "out" / "align" / "lr-1e+30").iterdir()] == ["stage.json"]
    assert not (here / "out" / "sft" / "lr-1e+30").exists()
    # what reads the run names it, and every file is finite
    assert ia2("report", "out", "--output", "out/page.html").status == 0
    names((here / "out" / "page.html").read_text() + (here / "out" / "README.md").read_text(), "1e+30")
    found = ia2("doctor", "out", "--json").json["runs"][0]["findings"]
    (finding,) = [f for f in found if f["rule"] == "diverged"]
    assert "1e+30" in finding["evidence"] and "nan" not in finding["evidence"]
    for command, output in (("predict", "p.csv"), ("predict", "p.jsonl"), ("eval", "e.jsonl")):
        into = ["--adapter", "out", "--data", "test.jsonl", "--output", f"out/{output}"]
        assert ia2(command, *into).status == 0
    assert assert_finite(here / "out") >= {".json", ".jsonl", ".csv", ".yaml", ".safetensors", ".md", ".html"}
    # a resume reads what is there
    (here / "out" / "metrics.json").unlink()
    before = tree(here / "out")
    assert train(*rates, *brief).status == 0
    assert tree(here / "out")["align/lr-1e+30/stage.json"] == before["align/lr-1e+30/stage.json"]


@pytest.mark.parametrize("recipe", ["sft", "ia2-sft", "ia2+sft", "soft-sft"])  # each begins otherwise
def test_if_all_rates_diverge_one_line_says_so_at_once_and_again(
    recipe: str, train: Ia2, ia2: Ia2, here: Path, fits: list[str]
) -> None:
    options = ["--recipe", recipe, "--learning-rates", "1e30", "1e29", "--sft-epochs", 2]
    line = refused(train(*options))
    names(line, "1e+30", "1e+29", "diverged", "learning_rates", "--overwrite")
    assert not (here / "out" / "metrics.json").exists()
    assert not list((here / "out").rglob("adapter_model.safetensors"))
    assert_finite(here / "out")
    fits.clear()
    assert refused(train(*options)) == line and fits == []
    if recipe == "sft":
        # other commands do not say to start it again, which would diverge again
        for command in ["predict", "--data", "test.jsonl", "--adapter"], ["analyze"], ["report"]:
            line = refused(ia2(*command, "out"))
            assert "diverged in it; see what `ia2 doctor out` says" in line and "again" not in line
        # what it suggests is accepted
        assert train(*options[:2], "--learning-rates", "1e-3", "--overwrite").status == 0


def test_joint_training_over_betas_and_a_stage_of_its_own_rate(train: Ia2, here: Path) -> None:
    joint = ["--recipe", "ia2+sft", "--joint-epochs", 2, "--joint-betas", "0.2,0.8"]
    assert train(*joint, "--learning-rates", "1e30", "1e-3").status == 0
    metrics = strict((here / "out" / "metrics.json").read_text())
    assert list(metrics["diverged"]) == ["1e+30, β 0.2", "1e+30, β 0.8"]
    assert metrics["learning_rate"] == 1e-3 and metrics["beta"] in (0.2, 0.8)
    own = [
        "--sft-learning-rate",
        "1e30",
        "--sft-epochs",
        2,
        "--learning-rates",
        "1e-3",
        "1e-2",
        "--overwrite",
    ]
    line = refused(train(*own))
    for rate in ("0.001", "0.01"):
        assert re.search(rf"{re.escape(rate)} \(sft with its rate 1e\+30 at step [12]\)", line)
    # a loss that is not finite before any step is no rate's fault
    line = refused(train("--recipe", "sft", "--adapter-alpha", "1e300", "--overwrite"))
    names(line, "before the first step", "adapter.alpha")
    assert "learning_rates" not in line


def test_without_dev_rows_training_itself_tells(here: Path) -> None:
    rows = icl_examples(6)
    config = AdaptConfig(learning_rates=[1e30, 1e-3, 1e29], recipe="sft", sft={"epochs": 2})
    found = adapt("model", FewShotSplit(rows, rows[:0]), config, output_dir="out").metrics
    # the first that did not diverge
    assert (found["num_dev"], found["learning_rate"]) == (0, 1e-3)
    assert list(found["diverged"]) == ["1e+30", "1e+29"]
    assert_finite(here / "out")


@pytest.mark.parametrize("bad", [NAN, INF, "gradient"])
def test_what_is_not_finite_ends_the_stage(bad: Any, tmp_path: Path) -> None:
    rows = word_examples(9)
    bench = bench_of(base_of(wordy_model(), make_word_tokenizer()), rows[:6], rows[6:], tmp_path)
    stage = {"epochs": 5, "eval_every": 1}
    trainer = trainer_of(bench, AnswerLoss(), bench.sft_rows(), tmp_path, stage=stage, batch_size=2)
    step = trainer.training_step

    def spoil(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        if bad == "gradient" and trainer.state.global_step == 2:
            next(p for p in bench.model.parameters() if p.requires_grad).grad.fill_(INF)
        return loss

    scripted = iter([1.0, 0.9, 0.8, 0.7 if bad == "gradient" else bad, 0.1])  # the first before any step
    trainer.training_step = spoil  # type: ignore[method-assign]
    trainer._dev_loss = lambda dataset: next(scripted)  # type: ignore[method-assign]
    assert str(trainer.fit()) == "nan"
    assert (trainer.best.diverged, trainer.state.global_step) == (3, 3)


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_names_what_diverged(compare: Ia2, ia2: Ia2, here: Path) -> None:
    options = [
        "--recipes",
        "base,sft,ia2",
        "--align-learning-rate",
        "1e30",
        "--learning-rates",
        "1e30",
        "1e-3",
    ]
    ran = compare(*options)
    assert ran.status == 0, ran.err
    summary = strict((here / "out" / "compare.json").read_text())
    assert list(summary["recipes"]) == ["base", "sft"] and list(summary["diverged"]) == ["ia2"]
    (diverged,) = summary["recipes"]["sft"]["diverged"]
    assert re.fullmatch(r"1e\+30 \(sft at step [12]\)", diverged)
    for text in (ran.out, (here / "out" / "table.md").read_text()):
        names(text, "ia2 diverged at every learning rate", "sft diverged at 1e+30")
    # a resume reads what is there, and says the same
    assert compare(*options, "--json").json["diverged"] == summary["diverged"]
    assert ia2("report", "out", "--output", "out/page.html").status == 0
    names((here / "out" / "page.html").read_text(), "ia2 diverged at every learning rate")
    found = ia2("doctor", "out", "--json").json["runs"][0]
    assert found["finished"] is True
    # a stage's own rate is what is to be lowered
    advice = [f["advice"] for f in found["findings"] if f["rule"] == "diverged"]
    assert any("--align-learning-rate 1e+29" in each and "--learning-rates" not in each for each in advice)
    assert_finite(here / "out")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", ["compare", "curve"])
def test_a_comparison_in_which_all_diverges_is_one_line(
    command: str, compare: Ia2, ia2: Ia2, here: Path
) -> None:
    sizes = ["--sizes", "4,6"] if command == "curve" else []
    options = ["--recipes", "sft", "--learning-rates", "1e30", *sizes]
    line = refused(compare(*options, command=command))
    names(line, "diverged", "1e+30")
    assert refused(compare(*options, command=command)) == line
    names(refused(ia2("report", "out")), "see what `ia2 doctor out` says")
    (found,) = ia2("doctor", "out", "--json").json["runs"]
    assert "diverged" in [f["rule"] for f in found["findings"]]
    assert_finite(here / "out")


def test_a_cell_that_diverges_fails_by_name(files: Path, tmp_path: Path) -> None:
    grid: dict[str, Any] = {"recipes": ["sft"], "learning_rates": [1e30, 1e-3]}
    done = swept(files, tmp_path / "out", **grid)
    assert [record["spec"]["learning_rate"] for record in records(tmp_path / "out")] == [1e-3]
    (failure,) = done.failed
    assert (failure["spec"]["learning_rate"], failure["traceback"]) == (1e30, "")
    assert "diverged" in failure["error"] and "Error:" not in failure["error"]
    assert [f["error"] for f in swept(files, tmp_path / "out", **grid).failed] == [failure["error"]]
    assert_finite(tmp_path / "out")


# ----------------------------------------------------------------------------------- logits of NaN


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("probe", []),
        ("probe", ["--task", "generation", "--max-answer-tokens", 3]),
        ("train", ["--recipe", "ia2-sft"]),
        ("train", ["--recipe", "ia2-sft", "--task", "generation", "--max-answer-tokens", 3]),
        ("train", ["--recipe", "ia2-sft", "--targets", "online"]),
        ("train", ["--recipe", "soft-sft", "--targets", "memory"]),
        ("train", ["--recipe", "ia2-sft", "--demo-order", "nearest"]),
        ("train", ["--recipe", "ia2-sft", "--demo-order", "search"]),
        ("compare", ["--recipes", "icl", *TEST]),
    ],
    ids=str,
)
def test_logits_that_are_nan_are_an_error(
    command: str, options: list[Any], ia2: Ia2, here: Path, tiny_icl_model_path: Path
) -> None:
    damaged(tiny_icl_model_path, here / "bad", NAN, "norm")
    out = [] if command == "probe" else ["--output-dir", "out"]
    line = refused(ia2(command, "--model", "bad", "--data", "rows.jsonl", *out, *options))
    names(line, "bad", "not finite", "float32")


def test_weights_that_are_not_finite_or_too_large(
    train: Ia2, ia2: Ia2, here: Path, tiny_icl_model_path: Path
) -> None:
    damaged(tiny_icl_model_path, here / "bad", NAN, "norm")
    names(refused(train("--model", "bad", "--recipe", "sft")), "before the first step")
    assert train("--recipe", "sft", "--overwrite").status == 0
    for name, value in (("nan", NAN), ("huge", 1e30)):
        damaged(here / "out", here / name, value, "lora_B")
        for command in ("predict", "eval"):
            into = ["--adapter", name, "--data", "test.jsonl", "--output", "found.jsonl"]
            names(refused(ia2(command, *into)), "not finite", "rain it again")
    assert not (here / "found.jsonl").exists()
    # fine in float32, beyond 65504 in half precision
    large = damaged(tiny_icl_model_path, here / "large", 0.0, "none of them") / "model.safetensors"
    state = load_file(large)
    scaled = {n: t * 2000 if "v_proj" in n or "o_proj" in n else t for n, t in state.items()}
    save_file(scaled, large, metadata={"format": "pt"})
    assert ia2("probe", "--model", "large", "--data", "rows.jsonl", "--dtype", "float32").status == 0
    line = refused(train("--model", "large", "--dtype", "float16", "--recipe", "sft", "--overwrite"))
    names(line, "float16", "--dtype", "bfloat16", "float32")


def test_passes_are_checked_without_logits_too() -> None:
    tokenizer, rows = make_word_tokenizer(), [((5, 6), (7,))]
    spoilt, model = wordy_model(), wordy_model()
    with torch.no_grad():
        spoilt.model.layers[0].self_attn.o_proj.weight.fill_(INF)
        model.model.norm.weight.fill_(NAN)
    with ActivationCapture(spoilt) as capture, pytest.raises(ModelError, match="activations are not finite"):
        list(answer_pass(spoilt, tokenizer, rows, capture=capture, logits=False))
    with pytest.raises(ModelError, match="not finite"):
        patched_log_probs(model, [(5, 6, 7)], [(8,)], [{}], [()])
    with pytest.raises(ModelError, match="not finite"):
        diversity(model, tokenizer, [(5, 6), (6, 7)], ["a"])
    # some models rule tokens out by minus infinity
    fine = wordy_model()
    ruled_out = torch.arange(fine.config.vocab_size) >= 30
    fine.lm_head.register_forward_hook(lambda module, inputs, output: output.masked_fill(ruled_out, -INF))
    (output,) = answer_pass(fine, tokenizer, rows)
    assert output.logits is not None and output.logits.isneginf().any()


# ---------------------------------------------------------------------------------------- measures


def labelled(**fields: Any) -> Task:
    labels = fields.pop("labels")
    index = {label: i for i, label in enumerate(labels)}
    return Task("classification", labels=labels, names=tuple(map(str.strip, labels)), index=index, **fields)


def test_a_probability_never_exceeds_one_by_rounding() -> None:
    """The terminators' probabilities are summed: in float32 that may give a little more than 1."""
    terminators, generator = tuple(range(6, 40)), torch.Generator().manual_seed(0)
    task = labelled(
        labels=(" a", " a b"), label_ids=((4,), (4, 5)), max_answer_tokens=2, terminators=terminators
    )
    draws = [torch.randn(len(terminators), generator=generator) for _ in range(50)]
    most = max(draws, key=lambda draw: float(draw.log_softmax(-1).logsumexp(0)))
    assert float(most.log_softmax(-1).logsumexp(0)) > 0, "no draw shows the rounding"
    logits = torch.full((2, 40), -1000.0)
    logits[0, 4], logits[1, 6:] = 0.0, most
    scorer = LabelScorer(task, 1)
    scorer.add(AnswerOutput(0, torch.cat([logits, logits[1:]]), None))
    measured = measure_labels(scorer.finish(), np.array([0]), [4, 4], None)
    for rows in measured.plain.values():
        assert ((rows.confidence >= 0) & (rows.confidence <= 1)).all()
        assert (rows.brier >= 0).all() and np.isfinite(rows.nll).all()


def test_a_label_that_the_model_rules_out_has_a_finite_loss() -> None:
    scorer = LabelScorer(labelled(labels=(" a", " b"), label_ids=((0,), (1,)), max_answer_tokens=1), 1)
    scorer.add(AnswerOutput(0, torch.tensor([[0.0, -INF, 0.0]]), None))
    measured = measure_labels(scorer.finish(), np.array([1]), [0, 1], None)
    assert all(np.isfinite(column).all() for rows in measured.plain.values() for column in rows.arrays())
    assert summarise([measured])["vocabulary"]["nll"]["value"] > 700


@pytest.mark.usefixtures("undrawn")
def test_one_test_row_has_no_variance_and_no_nan(compare: Ia2, ia2: Ia2, here: Path) -> None:
    for _ in range(2):  # what is written is read back
        (here / "out" / "compare.json").unlink(missing_ok=True)
        assert compare("--max-test", 1, "--recipes", "base,icl,sft").status == 0
        summary = strict((here / "out" / "compare.json").read_text())
        assert summary["recipes"]["sft"]["similarity"]["variance_unexplained"] is None
    for command in ("report", "doctor"):
        assert ia2(command, "out").status == 0
    assert_finite(here / "out")


def test_every_writer_of_json_is_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_predictions(tmp_path / "p.jsonl", [Prediction("s", "q", "g", "p", True, NAN, {"x": [NAN]})])
    assert strict((tmp_path / "p.jsonl").read_text())["confidence"] is None
    rows = [{"source": "s", "label": "a", "confidence": NAN, "labels": {"a": INF}}]
    assert strict(prediction_text(rows, ".jsonl"))["labels"] == {"a": None}
    assert prediction_text(rows, ".csv").splitlines()[1] == '"s","a","",""'
    print_json({"a": [NAN]})
    assert strict(capsys.readouterr().out) == {"a": [None]}
