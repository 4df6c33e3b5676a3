"""``ia2 predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ia2.cli.options import BaseModelNow, Json, Parser, Quiet, TrustRemoteCode


def predict(
    adapter: Annotated[Path, typer.Option(help="Folder that ia2 train made.")],
    data: Annotated[str, typer.Option(help="Unlabelled rows, read as the training rows were.")],
    output: Annotated[
        Path | None,
        typer.Option(help="JSONL or CSV file to write (by its ending); stdout by default."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set or folder.")] = None,
    data_config: Annotated[
        str | None, typer.Option(help="Configuration (subset) of a hub data set or folder.")
    ] = None,
    model: BaseModelNow = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.")] = None,
    trust_remote_code: TrustRemoteCode = None,
    parser: Parser = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Label new rows: label, confidence and label distribution of each."""
    from ia2.cli.output import print_json, start
    from ia2.utils.errors import ConfigError
    from ia2.utils.files import output_file, write_bytes

    start(quiet, files=[output])
    code = {"trust_remote_code": trust_remote_code, "parser": parser}
    if output is not None and output.suffix not in (".jsonl", ".csv"):
        raise ConfigError(f"{output}: predictions are written to a .jsonl or a .csv file.")
    if output is not None:
        output_file(output, data, adapter, model)
    from ia2.experiment.predict import predict_blocks, prediction_text
    from ia2.utils.imports import for_one_forward_pass

    with for_one_forward_pass():
        count, blocks = predict_blocks(
            adapter, data, split=split, data_config=data_config, device=device, base=model, code=code
        )
        if output is not None:
            suffix = output.suffix
            texts = (prediction_text(rows, suffix, header=not n) for n, rows in enumerate(blocks))
            write_bytes(output, (text.encode("utf-8") for text in texts), listed=False)
        elif json:
            print_json([row for rows in blocks for row in rows])
        else:
            for rows in blocks:
                print(prediction_text(rows, ".jsonl"), end="", flush=True)
    if output is not None and json:
        print_json({"rows": count, "output": str(output)})
    elif output is not None:
        print(f"{count} predictions: {output}")
