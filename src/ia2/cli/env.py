"""``ia2 env``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ia2.cli.options import Json


def env(
    json: Json = False,
    accelerate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Print where the configuration of accelerate of this name lies (ddp, fsdp2, zero3), and "
            "nothing else.",
        ),
    ] = None,
) -> None:
    """Versions, machine and caches: what to paste into a bug report.

    Several GPUs: accelerate launch --config_file "$(ia2 env --accelerate ddp)" --num_processes 8 -m ia2 …
    """
    if accelerate is not None:
        print(_accelerate_config(accelerate))
        return
    from ia2.cli.output import print_json, start
    from ia2.experiment.run_folder import machine, versions
    from ia2.models.gguf import installed_packaged_models
    from ia2.utils.files import cache_dir

    start(True)
    found = {
        "versions": versions(),
        "machine": machine(),
        "cache": str(cache_dir()),
        "packaged_models": installed_packaged_models(),
    }
    if json:
        print_json(found)
        return
    for section, values in found.items():
        print(f"{section}:")
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            print(f"  {name + ': ' if name else ''}{value}")


def _accelerate_config(name: str) -> Path:
    from ia2.utils.errors import ConfigError, suggest

    folder = Path(__file__).parents[1] / "accelerate_configs"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in names:
        hint = suggest(name, names)
        raise ConfigError(f"--accelerate: there is no configuration '{name}', only {', '.join(names)}.{hint}")
    return folder / f"{name}.yaml"
