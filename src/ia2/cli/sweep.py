"""``ia2 sweep``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ia2.cli.options import ContextFunctions, Json, Parsers, Quiet, TrustRemoteCode, named_code

Grid = Annotated[Path, typer.Argument(metavar="GRID", help="Grid file (YAML).", show_default=False)]


def sweep(
    grid: Grid,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for results; by default out/ and the file's name.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the grid's first so many cells.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Run one cell of each kind, and print how long the others will take."),
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes of this machine.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(help="Run on a Ray cluster: its address, auto, or local to start one here."),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each Ray worker; 0.25 puts four on one.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the benchmarks' files; else IA2_DATA_DIR, else the hub.")
    ] = None,
    trust_remote_code: TrustRemoteCode = None,
    parser: Parsers = None,
    context_function: ContextFunctions = None,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep adapters and teacher targets of finished cells.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a grid of benchmarks, models, recipes and settings; finished cells are never run twice.

    Start the same command again to go on after a stop. `ia2 report DIR` prints tables.
    """
    from ia2.cli.output import print_json, start
    from ia2.config.reading import settings_text
    from ia2.experiment.sweep.grid import load_grid
    from ia2.utils.errors import ConfigError

    start(quiet, folders=[output_dir])
    chosen = load_grid(grid, named_code(trust_remote_code, parser, context_function))
    if data_dir is not None:
        chosen = chosen.model_copy(update={"data_dir": str(data_dir)})
    folder = output_dir or Path("out") / grid.stem
    if gpus_per_worker is not None and not math.isfinite(gpus_per_worker):
        raise ConfigError(f"--gpus-per-worker: {gpus_per_worker} is not a finite number.")
    if ray is None and gpus_per_worker is not None:
        raise ConfigError("--gpus-per-worker does nothing without --ray.")
    if ray is not None and workers > 1 and ray != "local":
        raise ConfigError("--workers does nothing beside --ray with an address: the cluster has its own.")
    from ia2.experiment.sweep import execute as run
    from ia2.experiment.sweep import workers as ways

    def way(work: Path) -> ways.Run:
        if ray is not None:
            from ia2.experiment.sweep.cluster import on_ray

            return on_ray(work, ray, workers=workers, gpus=gpus_per_worker or 0.0, keep=keep_work)
        if workers > 1:
            return ways.processes(work, workers, keep=keep_work)
        return ways.in_process(work, keep=keep_work)

    done = run.sweep(chosen, folder, text=settings_text(grid), limit=limit, one_of_each=dry_run, run=way)
    if json:
        print_json(
            {
                "folder": str(done.folder),
                "total": done.total,
                "done": done.done,
                "run": done.trained,
                "failed": done.failed,
                **(done.left.to_dict() if dry_run else {}),
            }
        )
    else:
        print(f"{done.done} of {done.total} cells are done ({done.trained} run now): {done.folder}")
        for failure in done.failed:
            print(f"failed: {failure['spec']['benchmark']} {failure['spec']['recipe']}: {failure['error']}")
        if dry_run:
            print(f"\n{done.left.text(workers)}")
        elif done.done:
            print(f"Tables and figures: ia2 report {done.folder}")
    if done.failed:
        raise typer.Exit(1)
