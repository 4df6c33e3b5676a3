"""``ia2 predict`` and ``ia2 eval``."""

from __future__ import annotations

from pathlib import Path

import typer

from ia2.cli.options import BASE_MODEL, JSON, PARSER, QUIET, TRUST, option

_ADAPTER = typer.Option(..., help="Folder that ia2 train made.")
_SPLIT = option("Split of a hub data set or folder.")
_DATA_CONFIG = option("Configuration (subset) of a hub data set or folder.")
_DEVICE = option("cpu, cuda, mps.")


def predict(
    adapter: Path = _ADAPTER,
    data: str = typer.Option(..., help="Unlabelled rows, read as the training rows were."),
    output: Path | None = option("JSONL or CSV file to write (by its ending); stdout by default."),
    split: str | None = _SPLIT,
    data_config: str | None = _DATA_CONFIG,
    model: str | None = BASE_MODEL,
    device: str | None = _DEVICE,
    trust_remote_code: bool | None = TRUST,
    parser: str | None = PARSER,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Label new rows: label, confidence and label distribution of each."""
    from ia2.cli.output import print_json, start
    from ia2.utils.errors import ConfigError
    from ia2.utils.files import output_file, write_bytes

    start(quiet, files=[output])
    suffix = ".jsonl" if output is None else output.suffix
    if suffix not in (".jsonl", ".csv"):
        raise ConfigError(f"{output}: predictions are written to a .jsonl or a .csv file.")
    if output is not None:
        output_file(output, data, adapter, model)
    from ia2.experiment.predict import predict_blocks, prediction_text
    from ia2.utils.imports import for_one_forward_pass

    code = {"trust_remote_code": trust_remote_code, "parser": parser}
    with for_one_forward_pass():
        count, blocks = predict_blocks(
            adapter, data, split=split, data_config=data_config, device=device, base=model, code=code
        )
        if output is None and json:
            print_json([row for rows in blocks for row in rows])
            return
        texts = (prediction_text(rows, suffix, header=not n) for n, rows in enumerate(blocks))
        if output is None:
            for text in texts:
                print(text, end="", flush=True)
            return
        write_bytes(output, (text.encode("utf-8") for text in texts), listed=False)
    if json:
        print_json({"rows": count, "output": str(output)})
    else:
        print(f"{count} predictions: {output}")


def evaluate(
    adapter: Path = _ADAPTER,
    data: str = typer.Option(..., help="Labelled rows, read as the training rows were."),
    split: str | None = _SPLIT,
    data_config: str | None = _DATA_CONFIG,
    output: Path | None = option("Write per-example predictions to this JSONL file."),
    model: str | None = BASE_MODEL,
    device: str | None = _DEVICE,
    trust_remote_code: bool | None = TRUST,
    parser: str | None = PARSER,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Measure a trained adapter on labelled rows: accuracy and calibration, with intervals."""
    from ia2.cli.output import print_json, print_metrics, start

    start(quiet, files=[output])
    from ia2.utils.files import output_file

    if output is not None:
        output_file(output, data, adapter, model)
    from ia2.evaluation.scoring import write_predictions
    from ia2.experiment.predict import evaluate_adapter
    from ia2.utils.imports import for_one_forward_pass

    code = {"trust_remote_code": trust_remote_code, "parser": parser}
    with for_one_forward_pass():
        metrics, predictions = evaluate_adapter(
            adapter, data, split=split, data_config=data_config, device=device, base=model, code=code
        )
    if output is not None:
        write_predictions(output, predictions, listed=False)
    (print_json if json else print_metrics)(metrics)
