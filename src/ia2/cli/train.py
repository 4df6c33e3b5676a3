"""``ia2 train``."""

from __future__ import annotations

from ia2.cli.options import Json, Overwrite, Quiet, with_settings
from ia2.config import TrainConfig
from ia2.config.reading import code_flags


@with_settings(TrainConfig)
def train(
    config: TrainConfig, json: Json = False, quiet: Quiet = False, overwrite: Overwrite = False
) -> None:
    """Turn labelled examples into an adapter.

    Example: ia2 train --model Qwen/Qwen3-4B-Base --data reviews.jsonl --output-dir out/reviews
    """
    from ia2.cli.output import print_json, print_metrics, start
    from ia2.utils.distributed import is_first
    from ia2.utils.errors import ConfigError

    start(quiet, folders=[config.output_dir])
    if not config.output_dir:
        raise ConfigError("no output folder given. Name one with --output-dir.")
    from ia2.experiment.adapt import adapt, load_both, load_unlabelled

    examples, test = load_both(config)
    result = adapt(
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
    if json:
        print_json({**result.metrics, "output_dir": config.output_dir})
        return
    print_metrics(result.metrics)
    print(f"\nAdapter, model card and metrics: {config.output_dir}")
    code = code_flags({**config.model_dump(), "context_function": None})  # predicting shows no context
    again = "".join(f" {flag}" for flag in code.values())
    print(f"Next: ia2 predict --adapter {config.output_dir} --data new.jsonl{again}")
    print(f"Report: ia2 report {config.output_dir}")
