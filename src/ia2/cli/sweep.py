"""``ia2 sweep``."""

from __future__ import annotations

import math
from pathlib import Path

import typer

from ia2.cli.options import CONTEXT_FUNCTIONS, JSON, PARSERS, QUIET, TRUST, named_code, option

_DRY_RUN = "Run one cell of each kind, and print how long the others will take."
_RAY = "Run on a Ray cluster: its address, auto, or local to start one here."
_DATA_DIR = "Folder of the benchmarks' files; else IA2_DATA_DIR, else the hub."
_KEEP_WORK = "Keep adapters and teacher targets of finished cells."


def sweep(
    grid: Path = typer.Argument(..., metavar="GRID", help="Grid file (YAML).", show_default=False),
    output_dir: Path | None = option("Folder for results; by default out/ and the file's name."),
    limit: int | None = option("Only the grid's first so many cells.", min=1),
    dry_run: bool = option(_DRY_RUN, "--dry-run", default=False),
    workers: int = option("Processes of this machine.", default=1, min=1),
    ray: str | None = option(_RAY),
    gpus_per_worker: float | None = option("GPUs of each Ray worker; 0.25 puts four on one.", min=0),
    data_dir: Path | None = option(_DATA_DIR),
    trust_remote_code: bool | None = TRUST,
    parser: list[str] | None = PARSERS,
    context_function: list[str] | None = CONTEXT_FUNCTIONS,
    keep_work: bool = option(_KEEP_WORK, "--keep-work", default=False),
    json: bool = JSON,
    quiet: bool = QUIET,
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
    from ia2.experiment.sweep import execute
    from ia2.experiment.sweep import workers as ways

    def way(work: Path) -> ways.Run:
        if ray is not None:
            from ia2.experiment.sweep.cluster import on_ray

            return on_ray(work, ray, workers=workers, gpus=gpus_per_worker or 0.0, keep=keep_work)
        if workers > 1:
            return ways.processes(work, workers, keep=keep_work)
        return ways.in_process(work, keep=keep_work)

    done = execute.sweep(chosen, folder, text=settings_text(grid), limit=limit, one_of_each=dry_run, run=way)
    if json:
        counts = {"folder": str(done.folder), "total": done.total, "done": done.done, "run": done.trained}
        print_json({**counts, "failed": done.failed, **(done.left.to_dict() if dry_run else {})})
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
