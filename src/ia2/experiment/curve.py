"""``curve``: the same comparison at several numbers of training examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia2.config import CompareConfig, CurveConfig
from ia2.data.examples import Examples
from ia2.data.splits import MAX_DEV
from ia2.evaluation.tables import INTERVALS, MEASURES, curve_table
from ia2.experiment.adapt import load_base_of
from ia2.experiment.compare import prepare
from ia2.experiment.run_folder import claimed, content_facts, stored_settings
from ia2.models.load import BaseModel
from ia2.utils.distributed import is_first, wait
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.files import write_json, write_text
from ia2.utils.format import markdown
from ia2.utils.logging import logger
from ia2.utils.statistics import main_scope
from ia2.utils.wording import counted


@dataclass
class Curve:
    """The result of :func:`curve`.

    Attributes:
        summary: what ``curve.json`` holds.
        folder: where it lies.
    """

    summary: dict[str, Any]
    folder: Path

    def table(self) -> str:
        """Markdown."""
        return markdown(curve_table(self.summary))


def curve(
    model: str | BaseModel,
    examples: Examples,
    config: CurveConfig,
    *,
    test: Examples,
    output_dir: str | Path,
    overwrite: bool = False,
    unlabelled: Examples | None = None,
) -> Curve:
    """Compare recipes at every size; draws of one seed contain each other.

    Args:
        model: what :func:`ia2.models.load.load_base` takes, or a loaded base model.
        examples: labelled rows to draw from.
        config: settings; ``sizes`` are the numbers of training examples.
        test: labelled test rows, the same for every size.
        output_dir: run folder, with one comparison a size in it; a killed run started again continues.
        overwrite: replace other runs in that folder.
        unlabelled: rows without answers (see :func:`ia2.adapt`), the same for every size.

    Raises:
        UserError: a mistake in data, settings or model; too few rows for the largest size.
    """
    if config.num_examples is not None:
        raise ConfigError("num_examples does nothing to a curve. Leave it out; sizes says how many.")
    largest = config.sizes[-1]
    needed = largest + min(largest // 2, MAX_DEV)
    if needed > len(examples):
        raise DataError(
            f"{examples.name}: the largest size, {largest}, needs {needed} rows with its dev rows; there are "
            f"{len(examples)}. Leave it out of --sizes, or give more rows."
        )
    folder = Path(output_dir)
    base = load_base_of(model, config)
    shared = {name: getattr(config, name) for name in CompareConfig.model_fields}
    data = {"data": examples.fingerprint, "test": test.fingerprint, **content_facts(base, config)}
    if unlabelled is not None:
        data["unlabelled"] = unlabelled.fingerprint
    settings = stored_settings(config.model_dump(), base)
    # what cannot work at one size is refused before anything is written or trained
    runs = {}
    for size in config.sizes:
        sized = CompareConfig(**{**shared, "num_examples": size, "output_dir": None})
        runs[size] = prepare(base, examples, sized, test, folder / f"n-{size}", overwrite, unlabelled)
    found = {}
    with claimed(folder, "curve", settings, data, overwrite):
        for size, run in runs.items():
            logger.info("Size %d of %s.", size, ", ".join(map(str, config.sizes)))
            found[size] = run().summary
        summary = _summary(found, config)
        if is_first():
            write_json(folder / "curve.json", summary)
            write_text(folder / "table.md", markdown(curve_table(summary)))
        wait()
    return Curve(summary, folder)


def _summary(found: dict[int, dict[str, Any]], config: CurveConfig) -> dict[str, Any]:
    first = found[config.sizes[0]]
    scope = main_scope(first["design"]["task"] == "classification")
    curves: dict[str, list[dict[str, Any]]] = {}
    nothing = dict.fromkeys(("value", "low", "high"))
    names = dict.fromkeys(name for s in found.values() for name in [*s["recipes"], *s["diverged"]])
    for size, summary in found.items():
        for recipe in names:
            # a recipe that diverged at this size has no figures there
            entry = summary["recipes"].get(recipe, {})
            scopes = entry.get("metrics", {})
            metrics = scopes.get(scope, {})
            point = {"num_train": size, "asim": entry.get("asim")}
            point |= {name: metrics.get(name, nothing) for name in MEASURES}
            if scope == "labels":
                point["accuracy_vocabulary"] = scopes.get("vocabulary", {}).get("accuracy", nothing)
            curves.setdefault(recipe, []).append(point)
    seeds = first["design"]["seeds"]
    return {
        "model": first["model"],
        "data": first["data"],
        "title": f"{first['data']['name']}, {counted(first['design']['num_test'], 'test row')}, "
        f"{counted(len(seeds), 'seed')}",
        "task": first["design"]["task"],
        "sizes": config.sizes,
        "curves": curves,
        "differences": {
            str(size): summary["differences"].get("ia2-sft − sft") for size, summary in found.items()
        },
        "headroom": {str(size): summary["headroom"].get("icl − sft") for size, summary in found.items()},
        "intervals": INTERVALS,
        "diverged": {str(size): s["diverged"] for size, s in found.items() if s["diverged"]},
        "seeds": seeds,
        "machine": first["machine"],
        "versions": first["versions"],
        "config": config.model_dump(exclude={"output_dir"}),
    }
