"""screen.py, peers.py and dials.py of scripts/, on tiny models: which rows they read, and what they write."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.sweeping import grid_of, records, swept, write_files
from helpers.words import make_word_tokenizer

from ia2.data.benchmarks import load_benchmark
from ia2.utils.files import read_json
from scripts import dials, evidence, peers, screen, verdicts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stand-in of a sentence encoder."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = make_word_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_grid(files: Path, folder: Path, **values: Any) -> Path:
    grid = folder / "grid.yaml"
    grid.write_text(yaml.safe_dump(grid_of(files, **values)), encoding="utf-8")
    return grid


# ---------------------------------------------------------------------------------------------- peers


def test_peers_learn_from_the_draws_of_a_grids_cells(files: Path, encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    chosen = {"recipes": ["icl"], "seeds": 2, "hold_back": 4, "max_test": 5}
    swept(files, tmp_path / "swept", **chosen)
    output = tmp_path / "peers.jsonl"
    command = [str(write_grid(files, tmp_path, **chosen)), "--output", str(output), "--encoder", str(encoder)]
    assert peers.main(command) == 0
    lines = lines_of(output)
    cells = records(tmp_path / "swept")
    assert [line["seed"] for line in lines] == [0, 1]
    pool = load_benchmark(files / "two.yaml").load(files).pool[:-4]
    for line, cell in zip(lines, cells, strict=True):
        assert line["pool"] == cell["data"]["pool"] == pool.fingerprint
        split = pool.split(num_examples=4, seed=line["seed"], balanced=line["balanced"])
        assert line["train"] == split.train.fingerprint
        (found,) = line["evaluations"].values()
        assert found["test"] == cell["evaluations"]["Two"]["test"]
        assert (found["n"], len(found["correct"])) == (5, 5)
        assert found["accuracy"] == found["correct"].count("1") / 5
    # what is there stays: a second run adds the new draw only
    before = output.read_text(encoding="utf-8")
    chosen["seeds"] = 3
    command[0] = str(write_grid(files, tmp_path, **chosen))
    assert peers.main(command) == 0
    after = output.read_text(encoding="utf-8")
    assert after.startswith(before)
    assert len(lines_of(output)) == 3


@pytest.mark.parametrize("dev", [2, 0])
def test_a_separable_rule_is_learnt(dev: int) -> None:
    pytest.importorskip("sklearn")
    rule = 3 * [("good", "1"), ("bad", "0")]
    rows = [SimpleNamespace(query=f"Text:{text}\nLabel:", answer=answer) for text, answer in rule]
    draw = SimpleNamespace(
        labels=["0", "1", "2"],
        split=SimpleNamespace(train=rows[:4], dev=rows[4 : 4 + dev]),
        tests=[SimpleNamespace(benchmark=SimpleNamespace(prompt="Text:{text}\nLabel:"))],
    )

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[float(text == "good"), float(text == "bad")] for text in texts])

    classifier, chosen = peers.on_embeddings(draw, embed)
    probabilities = classifier(["good", "bad"])
    assert probabilities.argmax(1).tolist() == [1, 0]
    assert probabilities[:, 2].tolist() == [0, 0]  # no row of the draw has it
    assert chosen["C"] == max(peers.STRENGTHS)  # rows that were held out follow the rule


# --------------------------------------------------------------------------------------------- screen


def test_a_screen_reads_what_grids_hold_back(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "screen.json"
    monkeypatch.setattr(screen, "HOLD_BACK", 16)
    monkeypatch.setattr(screen, "QUERIES", 6)
    command = ["--model", str(files / "model"), "--num-examples", "4", "--output", str(output)]
    command += ["--tasks", f"{files / 'two.yaml'}:words", f"{files / 'two.yaml'}:digits"]
    assert screen.main(command) == 0
    found = read_json(output)
    pool = load_benchmark(files / "two.yaml").load(files, "words").pool
    words, digits = found["tasks"].values()
    assert words["rows"] == pool[-16:-10].fingerprint  # so a grid with hold_back: 16 draws none of them
    assert (len(words["base"]), len(words["icl"])) == (1, 2)
    assert (words["labels"], digits["labels"]) == ([" negative", " positive"], ["0", "1"])
    for each in (*words["base"], *words["icl"]):
        assert 0 <= each["accuracy"] <= 1
        assert each["nll"] > 0
    capsys.readouterr()
    assert screen.main(["--table", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert f"| {100 * words['base'][0]['accuracy']:.1f} |" in lines[2]
    # finished tasks are not done again
    monkeypatch.setattr(screen, "screen", lambda *_: pytest.fail("done again"))
    assert screen.main(command) == 0
    assert screen.main([*command, "--draws", "3"]) == 2
    assert "is a screen with other settings" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- dials


def test_dials_pair_arms_by_rule(
    tiny_icl_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {arm: dials.ARMS[arm] for arm in ("icl", "sft", "loo-sft")}
    monkeypatch.setattr(dials, "ARMS", few)
    monkeypatch.setattr(dials, "TAUGHT_STEPS", 1)
    monkeypatch.setattr(dials, "TEST_ROWS", 8)
    monkeypatch.setitem(dials.DIALS, "wrong", [dials.Point(wrong=k) for k in (0, 8)])
    output = tmp_path / "learner.jsonl"
    command = ["--model", str(tiny_icl_model_path), "--output", str(output), "--dials", "wrong"]
    assert dials.main([*command, "--rules", "1"]) == 0
    before = output.read_text(encoding="utf-8")
    assert dials.main([*command, "--rules", "2"]) == 0
    after = output.read_text(encoding="utf-8")
    assert after.startswith(before)  # what is there is not done again
    lines = lines_of(output)
    assert [(line["rule"], line["point"]["wrong"]) for line in lines] == [(0, 0), (0, 8), (1, 0), (1, 8)]
    for right, wrong in (lines[:2], lines[2:]):
        assert list(right["arms"]) == list(few)
        assert right["arms"]["sft"] == wrong["arms"]["sft"]  # it learns from the right labels
        # the teacher reads the wrong ones: of eight rows two have each label, so that it could be right
        assert right["arms"]["icl"]["accuracy"] == 1.0
        assert wrong["arms"]["icl"]["accuracy"] < 0.5
        assert (right["teacher_right"], wrong["teacher_right"]["loo"] < 0.5) == ({"loo": 1.0}, True)
    assert dials.main([*command, "--study", "selection"]) == 2  # another study's file


def test_wrong_labels_are_nested() -> None:
    rows = dials.rows_of(dials.sample_task(0, 3), 6, 0, "train")
    labels = dials.sample_task(0, 3).answers
    wrong: set[str] = set()
    for count in range(7):
        read = dials.misread(rows, labels, count, 0)(rows[0], rows)
        now = {a.source for a, b in zip(rows, read, strict=True) if a.answer != b.answer}
        assert len(now) == count
        assert wrong <= now
        assert {row.answer for row in read} <= set(labels)
        wrong = now


def test_a_table_of_dials(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = []
    for rule, (sft, icl, loo, more) in enumerate([(0.5, 0.9, 0.4, 0.8), (0.7, 0.9, 0.8, 0.8)]):
        arms = {"sft": sft, "icl": icl, "loo-sft": loo, "more-sft": more}
        values = {arm: {"accuracy": value, "nll": 1 - value} for arm, value in arms.items()}
        lines.append({"study": "dials", "point": {"wrong": 0}, "rule": rule, "arms": values})
        lines[-1]["teacher_right"] = {"loo": 0.5}
    lines.append({**lines[-1], "rule": 2})  # a rule that the other point lacks is left out
    lines += [{**line, "point": {"wrong": 2}} for line in lines[:2]]
    (tmp_path / "learner.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    selected = {
        f"{recipe}/{chosen}": {"accuracy": 0.5 + 0.1 * (chosen == "folds"), "nll": 1.0}
        for recipe in dials.RECIPES
        for chosen in chain(*dials.SELECTIONS)
    }
    selection = [
        {"study": "selection", "point": {"n": 8}, "rule": rule, "arms": selected} for rule in range(2)
    ]
    (tmp_path / "selection.jsonl").write_text("".join(json.dumps(line) + "\n" for line in selection))
    assert dials.main(["--table", str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "## learner: 2 rules a point" in table
    differences = next(line for line in table.splitlines() if line.startswith("| wrong 2 | +"))
    # t of one degree of freedom at 97.5%: 12.706
    assert "| +30.0 [−97.1, +157.1] | +0.0 [−127.1, +127.1] | – | +20.0 [−107.1, +147.1] |" in differences
    assert "| SFT | 12 | folds | 60.0 [60.0, 60.0] | +10.0 [+10.0, +10.0] |" in table
    assert (tmp_path / "dials.svg").read_text(encoding="utf-8").count("gain over SFT") == 2
    assert dials.main(["--table", str(files_of_none := tmp_path / "none")]) == 2
    assert not files_of_none.exists()


# ------------------------------------------------------------------------------------------- evidence


def cell(recipe: str, seed: int | None, accuracy: float, rate: float | None = None, variant: str = "") -> Any:
    """A record with what the tables read."""
    spec = {
        **{"recipe": recipe, "variant": variant, "seed": seed, "learning_rate": rate, "model": "m"},
        **{"benchmark": "Two", "verbaliser": "words", "num_examples": None if seed is None else 8},
    }
    metrics = {"labels": {"accuracy": accuracy, "nll": 1 - accuracy}}
    return {"spec": spec, "evaluations": {"Two": {"metrics": metrics}}}


def test_the_rival_stands_at_its_best_rate_and_differences_are_paired() -> None:
    cells = [cell("base", None, 0.5)]
    for seed, sft in enumerate([0.6, 0.8]):
        cells += [cell("sft", seed, sft, 3e-4), cell("sft", seed, 0.1, 1e-3)]
        cells += [cell("ia2-sft", seed, sft + 0.1, 1e-4, "unlabelled=64")]
        cells += [cell("soft-sft", seed, sft - 0.1, 1e-4, "unlabelled=64")]
    ((setting, arms),) = evidence.arms_of(cells).items()
    assert setting == ("m", 8) and set(arms) == {
        *("base", "sft", "ia2-sft, unlabelled=64", "soft-sft, unlabelled=64")
    }
    assert [each["accuracy"] for each in arms["sft"].values()] == [0.6, 0.8]
    draws = list(arms["sft"])
    found = evidence.less(arms["ia2-sft, unlabelled=64"], arms["sft"], "accuracy", draws)
    assert found is not None and found.units == 2
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    lines = evidence.tables(arms, {})
    (row,) = (line for line in lines if line.startswith("| ia2-sft, unlabelled=64 | 2 |"))
    assert "| +10.0 [+10.0, +10.0] | −0.100 [−0.100, −0.100] | +20.0 [+20.0, +20.0] |" in row
    assert "| base | 50.0 (2) |" in lines and "| sft | 70.0 (2) |" in lines


# ----------------------------------------------------------------------------------------- verdicts


def test_verdicts_are_held_against_what_came_out(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(files, tmp_path, recipes=["sft", "ia2-sft"], num_examples=[6], seeds=[0, 1])
    output = tmp_path / "verdicts.jsonl"
    command = [str(grid), "--num-examples", "6", "--output", str(output)]
    assert verdicts.main(command) == 0
    (line,) = lines_of(output)  # one draw of the one pair
    assert (line["seed"], line["probe"]["rows"]) == (0, 6)
    assert line["probe"]["verdict"] in (verdicts.LIKELY, "unclear", verdicts.UNLIKELY)
    monkeypatch.setattr(verdicts, "probe", lambda *_: pytest.fail("probed again"))
    assert verdicts.main(command) == 0
    accuracy = {"icl": 0.9, "sft": 0.5, "base": 0.5}
    pairs = [
        {"model": "m", "benchmark": name, "verbaliser": "words", "num_examples": 8}
        | {"probe": {"verdict": verdict, "accuracy": accuracy}}
        for name, verdict in (("Two", verdicts.LIKELY), ("Three", verdicts.UNLIKELY))
    ]
    gained = {("m", "Two, words", 8): {"ia2-sft": [2.0, 4.0]}, ("m", "Three, words", 8): {"ia2-sft": [-1.0]}}
    table = verdicts.table(pairs, gained)
    assert "| m | Two, words | likely to help | 0.900 | 0.500 | 0.500 | +3.0 (2) |" in table
    assert table[-1] == "`ia2-sft`: the verdict is right in 2 of 2 pairs, always *likely* in 1."
    cells = [cell("sft", 0, 0.5), cell("ia2-sft", 0, 0.7)]
    assert verdicts.gains(cells) == {("m", "Two, words", 8): {"ia2-sft": [pytest.approx(20.0)]}}
