"""A grid in YAML becomes cells: one benchmark, model, recipe, number of examples, seed and rate each.

A cell's key is a digest of everything that its result depends on, and of nothing else: a setting that a
recipe does not use makes no new cell of it. Cells that share a teacher form a :class:`Unit`, which is
what a worker is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ia2.config import AdaptConfig
from ia2.config.reading import load_config, refuse_code
from ia2.config.recipes import JOINT, RECIPES
from ia2.config.sections import MAX_SEEDS, Section
from ia2.experiment.sweep.cell_settings import (
    AXES,
    INCIDENTAL,
    KEPT,
    TRAINING,
    USUAL,
    flat,
    nested,
    planned,
    used_settings,
    validated,
)
from ia2.prompts.own_context import context_text
from ia2.training.stages import PlannedStage, fitted
from ia2.utils.errors import ConfigError, suggest
from ia2.utils.files import digest

if TYPE_CHECKING:
    from ia2.data.benchmarks import Benchmark

REST = "the rest of the pool"
"""Where unlabelled rows of a grid come from."""

FORMAT = 1
"""Of cells; bump when the meaning of a setting's default, or of a record, changes (a test watches)."""


class GridPart(Section):
    """Axes whose product is run; what a part leaves out it takes from the grid around it."""

    benchmarks: list[str] | None = Field(None, min_length=1, description="Names, or YAML files of one's own.")
    verbaliser: str | dict[str, str] | None = Field(
        None, description="Label words of every benchmark that has them, or benchmark → verbaliser."
    )
    models: list[str] | None = Field(None, min_length=1, description="As `--model` takes them.")
    recipes: list[str] | None = Field(None, min_length=1, description="Recipes, or names under `schedules`.")
    num_examples: list[int] | None = Field(None, min_length=1, description="Values of N.")
    unlabelled: int | list[int] | None = Field(
        None,
        description="How many unlabelled rows there are, drawn from the rest of the pool; one cell each for "
        "recipes that use them.",
    )
    seeds: int | list[int] | None = Field(None, description="How many (from 0), or which.")
    learning_rates: list[float] | dict[str, list[float]] | None = Field(
        None,
        description="Rates, one cell each, for all recipes or by recipe (`default` for the others); by "
        "default the adapter type's own.",
    )
    betas: list[float] | None = Field(
        None, min_length=1, description="β of the paper's ia2+sft, one cell each."
    )
    max_test: int | None = Field(None, ge=2, description="Evaluate on the first so many test rows.")
    hold_back: int | None = Field(
        None,
        ge=1,
        description="Draw no row from the pool's last so many, on which something was chosen beforehand.",
    )
    ood: bool | None = Field(None, description="Evaluate on the benchmark's OOD partners too (yes).")
    settings: dict[str, Any] = Field({}, description="Any settings of a run, nested or dotted.")
    axes: dict[str, list[Any]] = Field({}, description="Dotted setting → values; all combinations are run.")
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="Name → settings; one cell more for every recipe that the settings matter to."
    )
    plain: bool = Field(True, description="Run the recipes without a variant too.")

    @field_validator("seeds")
    @classmethod
    def _some(cls, value: int | list[int] | None) -> int | list[int] | None:
        if value == [] or (isinstance(value, int) and value < 1):
            raise ValueError("at least one seed is needed")
        if isinstance(value, int) and value > MAX_SEEDS:
            raise ValueError(f"at most {MAX_SEEDS} seeds are possible")
        if isinstance(value, list) and not 0 <= min(value) <= max(value) < 2**32:
            raise ValueError(f"seeds are 0 or greater, up to {2**32 - 1}")
        return value

    @field_validator("unlabelled")
    @classmethod
    def _none_or_some(cls, value: int | list[int] | None) -> int | list[int] | None:
        counts = value if isinstance(value, list) else [value or 0]
        if not counts or any(count < 0 or count == 1 for count in counts):
            raise ValueError("0 (none) or at least two rows, or a list of such numbers")
        return value

    @field_validator("num_examples")
    @classmethod
    def _enough(cls, value: list[int] | None) -> list[int] | None:
        if value and min(value) < 2:
            raise ValueError("at least two examples are needed")
        return value


class GridConfig(GridPart):
    """A grid file."""

    name: str = Field("sweep", description="Title of tables and figures.")
    description: str = Field("", description="What the grid is for.")
    parts: list[GridPart] = Field([], description="Several grids in one, each with axes of its own.")
    data_dir: str | None = Field(
        None, description="Folder of the benchmarks' files; else IA2_DATA_DIR, else the hub."
    )
    select: Literal["dev", "test"] = Field(
        "dev", description="What tables choose rates and β by (test: as the paper)."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Weights' type.")
    device: str | None = Field(None, description="As `--device`.")
    revision: str | None = Field(None, description="Hub branch, tag or commit of the models.")
    quantization: Literal["4bit", "8bit"] | None = Field(None, description="As `--quantization`.")
    trust_remote_code: bool = Field(False, description="Run code that comes with a model.")
    # that files of benchmarks may name; from the command, never from the grid's file
    _parsers: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _complete(self) -> GridConfig:
        for place, part in enumerate(self.resolved()):
            where = f"parts.{place}: " if self.parts else ""
            missing = [n for n in ("benchmarks", "models", "recipes") if not getattr(part, n)]
            if missing:
                raise ValueError(f"{where}{' and '.join(missing)} must be given")
        return self

    def resolved(self) -> list[GridPart]:
        """The parts, each with what it takes from the grid."""
        own = {name: getattr(self, name) for name in GridPart.model_fields}
        if not self.parts:
            return [GridPart(**own)]
        found = []
        for part in self.parts:
            given = part.model_dump(exclude_unset=True)
            # settings of a part come on top of the grid's
            given["settings"] = {**flat(self.settings), **flat(part.settings)}
            found.append(GridPart(**{**own, **given}))
        return found

    def model_options(self) -> dict[str, Any]:
        """What :func:`ia2.models.load.load_base` takes beside the name."""
        names = ("dtype", "device", "revision", "quantization", "trust_remote_code")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Cell:
    """One result of a grid.

    Attributes:
        key: digest of all that the result depends on, 16 hex digits.
        unit: digest of what cells share that have the same teacher.
        spec: what it is of, as its record says (see :mod:`ia2.experiment.sweep.records`).
        config: settings of the run.
    """

    key: str
    unit: str
    spec: dict[str, Any]
    config: AdaptConfig = field(repr=False)

    @property
    def title(self) -> str:
        """``SST2 demo ia2-sft N=8 seed 0``, for progress and messages."""
        spec = self.spec
        parts = [spec["benchmark"], spec["model"], spec["recipe"]]
        if spec["variant"]:
            parts[-1] += f"@{spec['variant']}"
        if spec["num_examples"] is not None:
            parts += [f"N={spec['num_examples']}", f"seed {spec['seed']}"]
        if spec["learning_rate"] is not None:
            parts.append(f"rate {spec['learning_rate']:g}")
        if spec["beta"] is not None:
            parts.append(f"β {spec['beta']:g}")
        return " ".join(parts)


@dataclass(frozen=True)
class Unit:
    """Cells that one worker does one after the other, since they share a teacher.

    Attributes:
        key: names its working folder.
        benchmarks: the benchmark and its OOD partners, with the verbaliser of each.
        model: as ``--model`` takes it.
        options: see :meth:`GridConfig.model_options`.
        data_dir: see :class:`GridConfig`.
        cells: what is to be done.
    """

    key: str
    benchmarks: tuple[tuple[Benchmark, str | None], ...]
    model: str
    options: dict[str, Any]
    data_dir: str | None
    cells: tuple[Cell, ...]

    @property
    def seed(self) -> int | None:
        """Of what is drawn; None where nothing is."""
        seed: int | None = self.cells[0].spec["seed"]
        return seed

    def only(self, keys: set[str]) -> Unit:
        """The same with some of its cells."""
        chosen = tuple(cell for cell in self.cells if cell.key in keys)
        return Unit(self.key, self.benchmarks, self.model, self.options, self.data_dir, chosen)


def load_grid(path: str | Path, code: Mapping[str, Any] | None = None) -> GridConfig:
    """Read a grid file.

    Args:
        path: the file.
        code: code that it, and files of benchmarks that it names, may name (see
            :func:`ia2.config.reading.refuse_code`): ``trust_remote_code``, lists of ``parser`` and of
            ``context_function``.

    Raises:
        DataError: it is missing.
        ConfigError: it is no grid, or names code that ``code`` does not. One line.
    """
    code = code or {}
    flags = {"trust_remote_code": code.get("trust_remote_code")}
    grid: GridConfig = load_config(GridConfig, path, flags)
    for part in grid.resolved():
        axes = [{name: value} for name, values in part.axes.items() for value in values]
        for settings in (part.settings, *part.variants.values(), *axes):
            refuse_code(flat(settings), path, code)
    grid._parsers = tuple(code.get("parser") or ())
    return grid


def expand(
    grid: GridConfig,
    fingerprints: Mapping[tuple[str, str | None], str] | None = None,
    models: Mapping[str, Any] | None = None,
) -> list[Unit]:
    """All cells of a grid, in its order, without repeats.

    Seeds come first of all axes, so that a grid cut short has every benchmark.

    Args:
        grid: the grid.
        fingerprints: of each (benchmark, verbaliser)'s rows; without them the keys are not those of a run,
            but their number is.
        models: what each model is (:func:`ia2.models.load.content_of`), by name; without it, as above.

    Raises:
        ConfigError: an unknown benchmark, verbaliser, recipe or setting.
    """
    _check_verbalisers(grid)
    found: dict[str, tuple[Cell, _Where]] = {}
    for place, part in enumerate(grid.resolved()):
        prefix = f"parts.{place}." if grid.parts else ""
        for cell, where in _cells(grid, part, prefix, fingerprints or {}, models or {}):
            found.setdefault(cell.key, (cell, where))
    units: dict[str, list[tuple[Cell, _Where]]] = {}
    for cell, where in found.values():
        units.setdefault(cell.unit, []).append((cell, where))
    return [
        Unit(
            key,
            members[0][1].benchmarks,
            members[0][1].model,
            grid.model_options(),
            grid.data_dir,
            # ICL first: its evaluation gives what the others are compared with
            tuple(sorted((cell for cell, _ in members), key=lambda cell: cell.spec["recipe"] != "icl")),
        )
        for key, members in units.items()
    ]


def evaluated_on(grid: GridConfig) -> list[tuple[Benchmark, str | None]]:
    """Every benchmark that is trained or evaluated on, with its verbaliser; each once."""
    _check_verbalisers(grid)
    found = {}
    for part in grid.resolved():
        for name in part.benchmarks or ():
            for benchmark, verbaliser in _evaluated(grid, part, name):
                found[benchmark.name, verbaliser] = benchmark
    return [(benchmark, verbaliser) for (_, verbaliser), benchmark in found.items()]


@dataclass(frozen=True)
class _Where:
    benchmarks: tuple[tuple[Benchmark, str | None], ...]
    model: str


def _cells(
    grid: GridConfig,
    part: GridPart,
    prefix: str,
    fingerprints: Mapping[tuple[str, str | None], str],
    models: Mapping[str, Any],
) -> Iterator[tuple[Cell, _Where]]:
    seeds = part.seeds if isinstance(part.seeds, list) else range(part.seeds or 1)
    evaluated = {name: _evaluated(grid, part, name) for name in part.benchmarks or ()}
    variants = list(_variants(part))
    for seed, count, model, name in product(
        seeds, part.num_examples or [8], part.models or (), part.benchmarks or ()
    ):
        where = _Where(evaluated[name], model)
        benchmark = evaluated[name][0][0]
        # what the benchmark itself settles is part of its contents, not of the settings
        defaults = {**flat(validated(benchmark.settings(where.benchmarks[0][1]), name).model_dump()), **KEPT}
        contents = [
            [b.name, v, fingerprints.get((b.name, v), ""), digest(b.settings(v))] for b, v in where.benchmarks
        ]
        for recipe, chosen in product(part.recipes or (), variants):
            config = _settings(part, where.benchmarks[0], chosen.changes, prefix)
            stages = planned(recipe, config, prefix)
            used = used_settings(recipe, stages, config, defaults)
            matters = partial(_matters, part, where.benchmarks[0], recipe, defaults, used)
            if chosen.name and not matters(chosen.axes):
                continue  # the variant changes nothing of this recipe
            variant = chosen.title(matters)
            for rate, beta in _rates(part, recipe, config, stages, prefix):
                held = {"hold_back": part.hold_back} if part.hold_back and recipe != "base" else {}
                spec = {
                    "benchmark": benchmark.name,
                    "verbaliser": where.benchmarks[0][1],
                    "model": model,
                    "recipe": recipe,
                    "variant": variant,
                    "num_examples": None if recipe == "base" else count,
                    "seed": None if recipe == "base" else seed,
                    "learning_rate": rate,
                    "beta": beta,
                    "max_test": part.max_test,
                    **held,
                    "settings": used,
                }
                # neither a variant's name nor where model and context lie is part of what a cell is
                told = _by_content(used, config)
                shared = {k: v for k, v in spec.items() if k != "variant"}
                shared |= {"model": models.get(model, [model, grid.revision]), "settings": told}
                about = {"format": FORMAT, "data": contents, "model_options": _essential(grid)}
                # made of what the key names alone, so that nothing else can play a part
                own = {
                    **flat(benchmark.settings(where.benchmarks[0][1])),
                    **KEPT,
                    **used,
                    **{name: getattr(config, name) for name in INCIDENTAL},
                    **({"recipe": recipe} if stages else {}),
                    **({"learning_rates": [rate]} if rate is not None else {}),
                    **({"joint.betas": [beta]} if beta is not None else {}),
                    "seed": seed,
                    "num_examples": count,
                }
                teacher = {
                    **{k: shared[k] for k in ("benchmark", "verbaliser", "model", "num_examples", "seed")},
                    "max_test": part.max_test,
                    **held,
                    "settings": {k: v for k, v in told.items() if not k.startswith(TRAINING)},
                }
                yield (
                    Cell(
                        digest({**about, **shared}),
                        digest({**about, **teacher}),
                        spec,
                        fitted(recipe, validated(nested(own), f"{prefix}settings")),
                    ),
                    where,
                )


def _by_content(used: Mapping[str, Any], config: AdaptConfig) -> dict[str, Any]:
    """Settings with the text of a context file in place of its path."""
    if not used.get("context_file"):
        return dict(used)
    return {**used, "context_file": digest(context_text(config))}


def _essential(grid: GridConfig) -> dict[str, Any]:
    # where a model runs is no part of what it computes; the rest is part of what the model is
    return {k: v for k, v in grid.model_options().items() if k in ("dtype", "quantization")}


def _evaluated(grid: GridConfig, part: GridPart, name: str) -> tuple[tuple[Benchmark, str | None], ...]:
    """The benchmark and, unless they are not wanted, its OOD partners."""
    from ia2.data.benchmarks import BENCHMARKS, load_benchmark

    benchmark = load_benchmark(name, grid._parsers)
    if benchmark.pool is None:
        trained = [b.name for b in map(load_benchmark, BENCHMARKS) if benchmark.name in b.ood]
        raise ConfigError(
            f"benchmarks: '{benchmark.name}' has no rows to train on; it is evaluated out of distribution by "
            f"{' and '.join(trained) or 'the benchmarks that name it'}."
        )
    asked = part.verbaliser.get(benchmark.name) if isinstance(part.verbaliser, dict) else part.verbaliser
    found = [(benchmark, _verbaliser(benchmark, asked, strict=isinstance(part.verbaliser, dict)))]
    if part.ood is not False:
        for other in (load_benchmark(o, grid._parsers) for o in benchmark.ood):
            if other.kind != benchmark.kind:
                # temperatures and measures of labels are none of free text
                words = {"classification": "labels", "generation": "free text"}
                raise ConfigError(
                    f"benchmarks: the answers of {benchmark.name} are {words[benchmark.kind]}, those of its "
                    f"OOD partner {other.name} are {words[other.kind]}. Take {other.name} out of its ood, or "
                    "set ood: false."
                )
            found.append((other, _verbaliser(other, asked, strict=False)))
    return tuple(found)


def _check_verbalisers(grid: GridConfig) -> None:
    """What a verbaliser is asked for must be there: a benchmark of that name, or one that has it."""
    from ia2.data.benchmarks import load_benchmark

    asked: list[tuple[str | dict[str, str], list[Benchmark]]] = []
    for part in grid.resolved():
        if part.verbaliser is None:
            continue
        own = [load_benchmark(name, grid._parsers) for name in part.benchmarks or ()]
        # several parts may have taken it from the grid
        for given, benchmarks in asked:
            if given == part.verbaliser:
                benchmarks += own
                break
        else:
            asked.append((part.verbaliser, own))
    for given, benchmarks in asked:
        if isinstance(given, dict):
            known = [b.name for b in benchmarks]
            for name in given:
                if name not in known:
                    raise ConfigError(
                        f"verbaliser: '{name}' is none of the grid's benchmarks.{suggest(name, known)}"
                    )
            continue
        labelled = [b for b in benchmarks if b.verbalisers]
        if labelled and not any(given in b.verbalisers for b in labelled):
            labelled[0].check_verbaliser(given)


def _verbaliser(benchmark: Benchmark, asked: str | None, *, strict: bool) -> str | None:
    # one name for the whole grid reaches those that have it; a benchmark's own must be right
    if asked is not None and not strict and asked not in benchmark.verbalisers:
        asked = None
    return benchmark.check_verbaliser(asked)


@dataclass(frozen=True)
class _Variant:
    """A named set of settings, or the plain one, with one value of each axis; all dotted."""

    name: str
    axes: dict[str, Any]
    settings: dict[str, Any]

    @property
    def changes(self) -> dict[str, Any]:
        return {**self.axes, **self.settings}

    def title(self, matters: Callable[[Mapping[str, Any]], bool]) -> str:
        """Its name, and the values of the axes that matter."""
        parts = [self.name] if self.name else []
        for key, value in self.axes.items():
            fewer = {name: given for name, given in self.changes.items() if name != key}
            if key not in self.settings and matters(fewer):
                parts.append(f"{key}={_short(value)}")
        return ",".join(parts)


def _variants(part: GridPart) -> Iterator[_Variant]:
    counts = part.unlabelled if isinstance(part.unlabelled, list) else [part.unlabelled or 0]
    every = {**part.axes, **({"unlabelled": counts} if any(counts) else {})}
    for values in product(*every.values()):
        axes = flat(dict(zip(every, values, strict=True)))
        if part.plain:
            yield _Variant("", axes, {})
        for name, settings in part.variants.items():
            yield _Variant(name, axes, flat(settings))


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(
    part: GridPart, benchmark: tuple[Benchmark, str | None], changes: Mapping[str, Any], prefix: str
) -> AdaptConfig:
    entry, verbaliser = benchmark
    count = changes.get("unlabelled")
    changes = {name: value for name, value in changes.items() if name != "unlabelled"}
    given = {**USUAL, **flat(entry.settings(verbaliser)), **flat(part.settings), **changes}
    for name in AXES:
        if name in given:
            raise ConfigError(f"{prefix}settings: '{name}' is an axis of the grid. Give it beside `recipes`.")
    if count:
        given |= {"unlabelled": REST, "max_unlabelled": count}
    return validated(nested(given), f"{prefix}settings")


def _matters(
    part: GridPart,
    benchmark: tuple[Benchmark, str | None],
    recipe: str,
    defaults: Mapping[str, Any],
    used: Mapping[str, Any],
    fewer: Mapping[str, Any],
) -> bool:
    """Whether a recipe's settings would be others than ``used`` with these changes only."""
    try:
        config = _settings(part, benchmark, fewer, "")
        return used != used_settings(recipe, planned(recipe, config, ""), config, defaults)
    except ConfigError:  # possible only together with what is left out
        return True


def _rates(
    part: GridPart, recipe: str, config: AdaptConfig, stages: Sequence[PlannedStage], prefix: str
) -> list[tuple[float | None, float | None]]:
    """Learning rate and β of each of a recipe's cells."""
    from ia2.adapters.types import default_learning_rate

    if not stages:
        return [(None, None)]
    rates = part.learning_rates
    if isinstance(rates, dict):
        unknown = [name for name in rates if name not in (*RECIPES, *config.schedules, "default")]
        if unknown:
            raise ConfigError(
                f"{prefix}learning_rates: '{unknown[0]}' is no recipe.{suggest(unknown[0], list(RECIPES))}"
            )
        rates = rates.get(recipe) or rates.get("default")
    rates = rates or [default_learning_rate(config.adapter)]
    joint = any(stage.kind == JOINT for stage in stages)
    betas: Sequence[float | None] = (part.betas or config.joint.betas or [None]) if joint else [None]
    return list(product(rates, betas))
