"""``ia2 curve``."""

from __future__ import annotations

from ia2.cli.options import Json, Overwrite, Quiet, with_settings
from ia2.config import CurveConfig


@with_settings(CurveConfig, leave_out=("recipe", "num_examples", "folds"))
def curve(
    config: CurveConfig, json: Json = False, quiet: Quiet = False, overwrite: Overwrite = False
) -> None:
    """Draw accuracy and calibration over the number of training examples.

    Does alignment still help with more data? Give rows to draw from and --test-data.
    """
    from ia2.cli.output import print_json, start
    from ia2.utils.errors import ConfigError, DataError

    start(quiet, folders=[config.output_dir])
    if not config.output_dir:
        raise ConfigError("no output folder given. Name one with --output-dir.")
    from ia2.experiment import curve as curves
    from ia2.experiment.adapt import load_both, load_unlabelled
    from ia2.report.figures.comparison_figures import try_curve_figure
    from ia2.utils.distributed import is_first

    examples, test = load_both(config)
    if test is None:
        raise DataError("no test data given. A curve needs the same test rows at every size: --test-data.")
    result = curves.curve(
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
    figure = try_curve_figure(result.summary, result.folder)
    if json:
        print_json(result.summary)
        return
    print(result.table())
    print(f"Results: {result.folder / 'curve.json'}" + (f", {figure}" if figure else ""))
    print(f"Report: ia2 report {result.folder}")
