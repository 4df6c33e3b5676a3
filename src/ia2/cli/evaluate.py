"""``ia2 eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ia2.cli.options import BaseModelNow, Json, Parser, Quiet, TrustRemoteCode


def evaluate(
    adapter: Annotated[Path, typer.Option(help="Folder that ia2 train made.")],
    data: Annotated[str, typer.Option(help="Labelled rows, read as the training rows were.")],
    split: Annotated[str | None, typer.Option(help="Split of a hub data set or folder.")] = None,
    data_config: Annotated[
        str | None, typer.Option(help="Configuration (subset) of a hub data set or folder.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write per-example predictions to this JSONL file.")
    ] = None,
    model: BaseModelNow = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.")] = None,
    trust_remote_code: TrustRemoteCode = None,
    parser: Parser = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a trained adapter on labelled rows: accuracy and calibration, with intervals."""
    from ia2.cli.output import print_json, print_metrics, start

    start(quiet, files=[output])
    from ia2.utils.files import output_file

    if output is not None:
        output_file(output, data, adapter, model)
    code = {"trust_remote_code": trust_remote_code, "parser": parser}
    from ia2.evaluation.scoring import write_predictions
    from ia2.experiment.predict import evaluate_adapter
    from ia2.utils.imports import for_one_forward_pass

    with for_one_forward_pass():
        metrics, predictions = evaluate_adapter(
            adapter, data, split=split, data_config=data_config, device=device, base=model, code=code
        )
    if output is not None:
        write_predictions(output, predictions, listed=False)
    if json:
        print_json(metrics)
    else:
        print_metrics(metrics)
