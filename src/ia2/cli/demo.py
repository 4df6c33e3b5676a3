"""``ia2 demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ia2.cli.options import Json, Overwrite, Quiet
from ia2.config.packaged_models import PACKAGED_MODELS


def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for results.")] = Path("out/demo"),
    model: Annotated[str, typer.Option(help=f"{', '.join(PACKAGED_MODELS)}, or any other model.")] = "demo",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with examples of its own.")] = 1,
    json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """See it work: a real model, real data, no network. A few minutes on two cores."""
    from ia2.cli.output import start

    start(quiet, folders=[output_dir])
    from ia2.cli.compare import run_comparison
    from ia2.experiment.adapt import load_examples, load_test_examples
    from ia2.experiment.demo import demo_config, demo_data

    config = demo_config(model=model, seeds=seeds, output_dir=str(output_dir))
    run_comparison(config, load_examples(config), load_test_examples(config), json=json, overwrite=overwrite)
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
