"""``ia2 compare``, ``ia2 curve`` and ``ia2 demo``."""

from __future__ import annotations

from pathlib import Path

import typer

from ia2.cli.options import JSON, OVERWRITE, QUIET, option, with_settings
from ia2.config import CompareConfig, CurveConfig
from ia2.config.packaged_models import PACKAGED_MODELS


@with_settings(CompareConfig, leave_out=("recipe",))
def compare(
    config: CompareConfig, json: bool = JSON, quiet: bool = QUIET, overwrite: bool = OVERWRITE
) -> None:
    """Compare recipes on the same examples, over several seeds.

    Without --test-data the rows given are cross-fitted: every row is predicted by models that did not
    see it.
    """
    from ia2.cli.output import start_run

    start_run(config, quiet)
    _compare(config, json, overwrite)


@with_settings(CurveConfig, leave_out=("recipe", "num_examples", "folds"))
def curve(config: CurveConfig, json: bool = JSON, quiet: bool = QUIET, overwrite: bool = OVERWRITE) -> None:
    """Draw accuracy and calibration over the number of training examples.

    Does alignment still help with more data? Give rows to draw from and --test-data.
    """
    from ia2.cli.output import print_json, start_run
    from ia2.utils.distributed import is_first
    from ia2.utils.errors import DataError

    folder = start_run(config, quiet)
    from ia2.experiment import curve as curves
    from ia2.experiment.adapt import load_both, load_unlabelled
    from ia2.report.figures.runs import try_summary_figure

    examples, test = load_both(config)
    if test is None:
        raise DataError("no test data given. A curve needs the same test rows at every size: --test-data.")
    more = load_unlabelled(config)
    result = curves.curve(
        config.model, examples, config, test=test, output_dir=folder, overwrite=overwrite, unlabelled=more
    )
    if not is_first():
        return
    figure = try_summary_figure(result.summary, result.folder)
    if json:
        print_json(result.summary)
        return
    print(result.table())
    print(f"Results: {result.folder / 'curve.json'}" + (f", {figure}" if figure else ""))
    print(f"Report: ia2 report {result.folder}")


def demo(
    output_dir: Path = typer.Option(Path("out/demo"), help="Folder for results."),
    model: str = typer.Option("demo", help=f"{', '.join(PACKAGED_MODELS)}, or any other model."),
    seeds: int = option("Repetitions, each with examples of its own.", default=1, min=1),
    json: bool = JSON,
    quiet: bool = QUIET,
    overwrite: bool = OVERWRITE,
) -> None:
    """See it work: a real model, real data, no network. A few minutes on two cores."""
    from ia2.cli.output import start

    start(quiet, folders=[output_dir])
    from ia2.experiment.demo import demo_config, demo_data

    _compare(demo_config(model=model, seeds=seeds, output_dir=str(output_dir)), json, overwrite)
    if json:
        return
    adapter = output_dir / "seed-0" / "align-sft" / "lr-0.001"
    print(f"Adapter of seed 0 (IA2 → SFT), loadable with peft: {adapter}")
    print(f"Data: {demo_data('train')}")
    if seeds == 1:
        print("One draw of examples proves little: ia2 demo --seeds 5 --output-dir out/demo5 takes five.")
    print("\nOn your own rows (JSONL or CSV with the columns prompt and completion):")
    print("  ia2 probe   --model HuggingFaceTB/SmolLM2-360M --data rows.jsonl   # will it help here?")
    print("  ia2 train   --model HuggingFaceTB/SmolLM2-360M --data rows.jsonl --output-dir out/mine")
    print("  ia2 predict --adapter out/mine --data new.jsonl")


def _compare(config: CompareConfig, json: bool, overwrite: bool) -> None:
    from ia2.cli.output import print_comparison, print_json
    from ia2.config.recipes import is_trained
    from ia2.experiment import compare as comparison
    from ia2.experiment.adapt import load_both, load_unlabelled
    from ia2.report.figures.runs import try_summary_figure
    from ia2.report.page import try_report
    from ia2.utils.distributed import is_first

    assert config.output_dir is not None
    examples, test = load_both(config)
    result = comparison.compare(
        config.model,
        examples,
        config,
        test=test,
        output_dir=config.output_dir,
        overwrite=overwrite,
        unlabelled=load_unlabelled(config),
    )
    if not is_first():
        return
    figure = try_summary_figure(result.summary, result.folder)
    page = try_report(result.folder)
    if json:
        print_json(result.summary)
        return
    print_comparison(result.summary)
    files = [result.folder / "compare.json", result.folder / "table.md", *([figure] if figure else [])]
    print(f"\nResults: {', '.join(map(str, files))}")
    print(f"Report: {page or f'ia2 report {result.folder}'}")
    if any(is_trained(recipe) for recipe in config.recipes):
        print(f"Look inside the adapters: ia2 analyze {result.folder}")
