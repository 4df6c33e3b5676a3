"""Which learning rate each adapter type should have by default: a small study on the demo model.

    python scripts/learning_rates.py --output-dir out/learning_rates

For every type and rate: `sft` and `ia2-sft` on the packaged intents with a seed that no other result
uses. What is finished is not run again. Writes results/adapters/learning_rates.{json,md}; the defaults in
src/ia2/adapters/types.py are the rates whose negative log-likelihood is lowest there, averaged over both
recipes. DoRA, rsLoRA and p-tuning were not studied: the first two take LoRA's rate, p-tuning a guess.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from ia2.config import CompareConfig
from ia2.config.reading import load_config
from ia2.experiment.adapt import load_base_of, load_examples, load_test_examples
from ia2.experiment.compare import compare
from ia2.experiment.run_folder import machine, versions
from ia2.utils.files import finite, write_json, write_text
from ia2.utils.logging import configure

SEED = 100
GRID = {
    "lora": [3e-4, 1e-3, 3e-3],
    "vera": [3e-3, 1e-2, 3e-2],
    "ia3": [1e-2, 3e-2],
    "prefix": [1e-2, 3e-2],
    "prompt": [3e-2, 1e-1],
    "bottleneck": [1e-3, 3e-3],
    "full": [1e-5, 3e-5],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("out/learning_rates"))
    parser.add_argument("--types", nargs="+", default=list(GRID), choices=list(GRID))
    parser.add_argument("--results", type=Path, default=Path("results/adapters"))
    given = parser.parse_args()
    configure(quiet=True)
    settings: CompareConfig = load_config(CompareConfig, "results/intents.yaml", {})
    examples, test = load_examples(settings), load_test_examples(settings)
    base = load_base_of(settings.model, settings)
    found = []
    for kind in given.types:
        for rate in GRID[kind]:
            changes = {
                "recipes": ["sft", "ia2-sft"],
                "adapters": [kind],
                "learning_rates": [rate],
                "seeds": 1,
                "seed": SEED,
                "max_test": 40,
            }
            config = CompareConfig(**{**settings.model_dump(), **changes})
            folder = given.output_dir / f"{kind}-{rate:g}"
            summary = compare(base, examples, config, test=test, output_dir=folder).summary
            row: dict[str, Any] = {"type": kind, "learning_rate": rate}
            for name, entry in summary["recipes"].items():
                metrics = entry["metrics"]["vocabulary"]
                row[entry["recipe"]] = {
                    "accuracy": metrics["accuracy"]["value"],
                    "nll": metrics["nll"]["value"],
                    "asim": entry["asim"]["value"],
                    "seconds": entry["seconds"],
                }
                assert name.endswith(kind)
            found.append(row)
            print(kind, rate, {r: row[r]["accuracy"] for r in ("sft", "ia2-sft")}, flush=True)
            shutil.rmtree(folder / f"seed-{SEED}" / kind, ignore_errors=True)
    given.results.mkdir(parents=True, exist_ok=True)
    facts = {"seed": SEED, "rows": found, "machine": machine(), "versions": versions()}
    write_json(given.results / "learning_rates.json", finite(facts))
    write_text(given.results / "learning_rates.md", table(found))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the best rate of each type marked."""
    lines = [
        "| adapter | rate | `sft` accuracy | NLL | `ia2-sft` accuracy | NLL | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [_score(other) for other in rows if other["type"] == row["type"]]
        best = "best" if _score(row) == min(same) else ""
        cells = [f"{row[r][m]:.3f}" for r in ("sft", "ia2-sft") for m in ("accuracy", "nll")]
        lines.append(f"| `{row['type']}` | {row['learning_rate']:g} | " + " | ".join(cells) + f" | {best} |")
    return "\n".join(lines) + "\n"


def _score(row: dict[str, Any]) -> float:
    return float(row["sft"]["nll"] + row["ia2-sft"]["nll"]) / 2


if __name__ == "__main__":
    main()
