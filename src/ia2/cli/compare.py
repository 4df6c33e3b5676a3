"""``ia2 compare``."""

from __future__ import annotations

from ia2.cli.options import Json, Overwrite, Quiet, with_settings
from ia2.config import CompareConfig


@with_settings(CompareConfig, leave_out=("recipe",))
def compare(
    config: CompareConfig, json: Json = False, quiet: Quiet = False, overwrite: Overwrite = False
) -> None:
    """Compare recipes on the same examples, over several seeds.

    Without --test-data the rows given are cross-fitted: every row is predicted by models that did not
    see it.
    """
    from ia2.cli.output import start
    from ia2.utils.errors import ConfigError

    start(quiet, folders=[config.output_dir])
    if not config.output_dir:
        raise ConfigError("no output folder given. Name one with --output-dir.")
    from ia2.experiment.adapt import load_both, load_unlabelled

    examples, test = load_both(config)
    run_comparison(config, examples, test, load_unlabelled(config), json=json, overwrite=overwrite)


def run_comparison(
    config: CompareConfig,
    examples: object,
    test: object,
    unlabelled: object = None,
    *,
    json: bool,
    overwrite: bool,
) -> None:
    """Compare and print; what ``ia2 demo`` does too."""
    from ia2.cli.output import print_comparison, print_json
    from ia2.config.recipes import is_trained
    from ia2.experiment import compare as comparison
    from ia2.report.figures.comparison_figures import try_comparison_figure
    from ia2.report.page import try_report
    from ia2.utils.distributed import is_first

    assert config.output_dir is not None
    result = comparison.compare(
        config.model,
        examples,  # type: ignore[arg-type]
        config,
        test=test,  # type: ignore[arg-type]
        output_dir=config.output_dir,
        overwrite=overwrite,
        unlabelled=unlabelled,  # type: ignore[arg-type]
    )
    if not is_first():
        return
    figure = try_comparison_figure(result.summary, result.folder)
    page = try_report(result.folder)
    if json:
        print_json(result.summary)
        return
    print_comparison(result.summary)
    print(
        f"\nResults: {result.folder / 'compare.json'}, {result.folder / 'table.md'}"
        + (f", {figure}" if figure else "")
    )
    print(f"Report: {page or f'ia2 report {result.folder}'}")
    if any(is_trained(recipe) for recipe in config.recipes):
        print(f"Look inside the adapters: ia2 analyze {result.folder}")
