"""Where leave-one-out targets are wrong, unlabelled rows are what alignment needs.

Four classes and four labelled rows: left out of its own context, a row's label is in it no more, so that the
teacher cannot say it. Behind all four it answers every unlabelled row rightly. Ten hidden rules, paired.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.benches import bench_of, icl_base
from tiny_icl.tasks import sample_task

from ia2 import Examples
from ia2.data.examples import Example
from ia2.utils.statistics import t_interval

RULES = 10
FINE_TUNING = {"epochs": 24, "learning_rate": 3e-3, "eval_every": 4}


def rows(pairs: list[tuple[str, str]], name: str) -> Examples:
    return Examples([Example(q, a, f"{name} {i}") for i, (q, a) in enumerate(pairs)], name=name)


@pytest.mark.slow
def test_alignment_on_unlabelled_rows_beats_fine_tuning_and_leave_one_out(
    tiny_icl_model_path: Path, tmp_path: Path
) -> None:
    base = icl_base(tiny_icl_model_path)
    found: dict[str, list[float]] = {"sft": [], "leave one out": [], "unlabelled": []}
    nll: dict[str, list[float]] = {name: [] for name in found}
    right = 0
    for seed in range(RULES):
        rule = sample_task(seed + 100, num_classes=4)
        train, dev = rows(rule.examples(4, seed), "train"), rows(rule.examples(4, seed + 50), "dev")
        test, more = (
            rows(rule.examples(40, seed + 1000), "test"),
            rows(rule.examples(20, seed + 2000), "more"),
        )
        for name, recipe in (("sft", "sft"), ("leave one out", "ia2-sft"), ("unlabelled", "ia2-sft")):
            bench = bench_of(
                base,
                train,
                dev,
                tmp_path / name / str(seed),
                unlabelled=more if name == "unlabelled" else (),
                batch_size=32,
                align={"epochs": 24, "learning_rate": 1e-2, "eval_every": 12},
                sft=FINE_TUNING,
                targets="memory",
            )
            bench.train(recipe)
            measured = bench.evaluate(recipe, test).measured.plain["labels"]
            found[name].append(float(measured.correct.mean()))
            nll[name].append(float(measured.nll.mean()))
            if name == "leave one out":
                right += len(bench.teaching.correct())
            elif name == "unlabelled":
                said = [f" {answer.text}" for answer in bench.teaching.answers("unlabelled")]
                true = {example.query: example.answer for example in more}
                assert said == [true[example.query] for example in bench.data.unlabelled]
            bench.close()
    assert right <= RULES  # of four a rule
    print({name: round(float(np.mean(values)), 3) for name, values in found.items()})
    for other in ("sft", "leave one out"):
        gains = np.array(found["unlabelled"]) - np.array(found[other])
        interval = t_interval(gains)
        print(f"unlabelled − {other}: {interval}")
        assert interval.low > 0.05, (other, gains)
        assert np.mean(nll["unlabelled"]) < np.mean(nll[other])
