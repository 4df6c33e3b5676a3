"""Grids: which cells there are, in what order, and what their keys depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.sweeping import cells_of, grid_of, write_files, write_grid, write_split
from transformers import PreTrainedModel

from ia2.adapters.types import ADAPTERS, peft_config
from ia2.config import AdaptConfig
from ia2.config.sections import AdapterConfig, AlignConfig
from ia2.experiment.sweep.cell_settings import KEPT, flat
from ia2.experiment.sweep.execute import cells_of as units_of
from ia2.experiment.sweep.execute import first_cells, read_benchmarks
from ia2.experiment.sweep.grid import FORMAT, Cell, GridConfig, evaluated_on, expand, load_grid
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.files import digest

ALL = ["base", "icl", "sft", "ia2", "ia2-sft", "sft-ia2", "ia2+sft", "soft-sft", "constant-sft"]


def keys(**values: Any) -> list[str]:
    return [cell.key for cell in cells_of(**values)]


def specs(name: str, **values: Any) -> list[Any]:
    return [cell.spec[name] for cell in cells_of(**values)]


def titles(**values: Any) -> list[str]:
    """Recipe and variant of each cell."""
    cells = cells_of(**values)
    return ["@".join(filter(None, (c.spec["recipe"], c.spec["variant"]))) for c in cells]


# ---------------------------------------------------------------------------------- which cells there are


def test_all_combinations_and_base_once_for_all_n_and_seeds() -> None:
    cells = cells_of(
        benchmarks=["SST2", "AGN"],
        models=["demo", "demo-gemma"],
        recipes=["base", "icl", "sft"],
        num_examples=[4, 8],
        seeds=3,
    )
    count = {r: sum(cell.spec["recipe"] == r for cell in cells) for r in ("base", "icl", "sft")}
    assert count == {"base": 2 * 2, "icl": 2 * 2 * 2 * 3, "sft": 2 * 2 * 2 * 3}
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in cells:
        base = cell.spec["recipe"] == "base"
        assert (cell.spec["num_examples"] is None, cell.spec["seed"] is None) == (base, base)
        assert (cell.spec["learning_rate"] is None) == (cell.spec["recipe"] != "sft")


def test_seeds_come_first_so_that_a_grid_cut_short_has_everything_else() -> None:
    values: dict[str, Any] = {"benchmarks": ["SST2", "AGN"], "num_examples": [4, 8], "seeds": 3}
    cells = cells_of(**values)
    assert [c.spec["seed"] for c in cells] == [0] * 4 + [1] * 4 + [2] * 4
    assert [(c.spec["num_examples"], c.spec["benchmark"]) for c in cells[:4]] == [
        (4, "SST2"),
        (4, "AGN"),
        (8, "SST2"),
        (8, "AGN"),
    ]
    grid = GridConfig(models=["demo"], recipes=["base", "sft"], **values)
    first = first_cells(expand(grid), 3)
    every = [cell.key for unit in expand(grid) for cell in unit.cells]
    assert [cell.key for unit in first for cell in unit.cells] == every[:3]


def test_seeds_are_counted_or_listed() -> None:
    assert specs("seed") == [0]
    assert specs("seed", seeds=2) == [0, 1]
    assert specs("seed", seeds=[5, 3, 5]) == [5, 3]
    assert keys(seeds=[1]) == keys(seeds=2)[1:]


def test_rates_for_all_recipes_and_by_recipe() -> None:
    assert specs("learning_rate") == [1e-3]  # the adapter type's own
    assert specs("learning_rate", settings={"adapter.type": "ia3"}) != [1e-3]
    assert specs("learning_rate", learning_rates=[1e-4, 1e-3], recipes=["icl", "sft"]) == [None, 1e-4, 1e-3]
    by_recipe = {"ia2": [0.01, 0.02], "default": [0.03]}
    assert specs("learning_rate", recipes=["sft", "ia2"], learning_rates=by_recipe) == [0.03, 0.01, 0.02]
    assert specs("learning_rate", learning_rates={"ia2": [0.01]}) == [1e-3]


def test_betas_are_of_the_joint_stage_only() -> None:
    values: dict[str, Any] = {"recipes": ["sft", "ia2+sft"], "betas": [0.2, 0.8]}
    assert specs("beta", **values) == [None, 0.2, 0.8]
    assert [c.config.joint.betas for c in cells_of(**values)[1:]] == [[0.2], [0.8]]
    # alignment is divided by its first value, and then there is no β
    assert specs("beta", recipes=["ia2+sft"]) == [None]
    rates = cells_of(recipes=["ia2+sft"], betas=[0.2, 0.8], learning_rates=[0.1, 0.2])
    assert [(c.spec["learning_rate"], c.spec["beta"]) for c in rates] == [
        (0.1, 0.2),
        (0.1, 0.8),
        (0.2, 0.2),
        (0.2, 0.8),
    ]


def test_axes_are_multiplied_and_named_where_they_matter() -> None:
    axes = {"align.objective": ["mse", "kl"], "adapter.rank": [4, 8]}
    assert titles(recipes=["icl", "sft", "ia2"], axes=axes) == [
        "icl",
        "sft@adapter.rank=4",
        "sft@adapter.rank=8",
        "ia2@adapter.rank=4",
        "ia2@adapter.rank=8",
        "ia2@align.objective=kl,adapter.rank=4",
        "ia2@align.objective=kl,adapter.rank=8",
    ]


def test_the_value_of_an_axis_that_is_the_default_is_the_plain_cell() -> None:
    with_axis = cells_of(recipes=["sft", "ia2"], axes={"align.objective": ["mse", "kl"]})
    assert [c.key for c in with_axis if not c.spec["variant"]] == keys(recipes=["sft", "ia2"])


def test_axes_of_whole_sections_and_of_lists() -> None:
    adapters = {"adapter": [{"type": "dora"}, {"type": "lora", "rank": 2}]}
    assert titles(axes=adapters, settings={"adapter": {"alpha": 4}}) == [
        "sft@adapter.type=dora",
        "sft@adapter.rank=2",
    ]
    assert all(c.config.adapter.alpha == 4 for c in cells_of(axes=adapters, settings={"adapter.alpha": 4}))
    layers = {"align.layers": [[0, 1], "first-third"]}
    assert titles(recipes=["ia2"], axes=layers) == ["ia2@align.layers=0+1", "ia2@align.layers=first-third"]


def test_an_axis_may_reach_into_a_peft_configuration() -> None:
    peft = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
    cells = cells_of(settings={"adapter.peft": peft}, axes={"adapter.peft.r": [2, 4]})
    assert [cell.config.adapter.peft["r"] for cell in cells if cell.config.adapter.peft] == [2, 4]
    assert peft["r"] == 8


def test_a_variant_is_one_cell_more_where_it_matters() -> None:
    values: dict[str, Any] = {
        "recipes": ["icl", "sft", "ia2"],
        "variants": {"cosine": {"align.objective": "cosine"}, "small": {"adapter": {"rank": 2}}},
    }
    assert titles(**values) == ["icl", "sft", "sft@small", "ia2", "ia2@cosine", "ia2@small"]
    assert titles(**values, plain=False) == ["sft@small", "ia2@cosine", "ia2@small"]
    with_axes = titles(**{**values, "recipes": ["ia2"]}, axes={"align.epochs": [5, 50]}, plain=False)
    assert with_axes == ["ia2@cosine,align.epochs=5", "ia2@small,align.epochs=5", "ia2@cosine", "ia2@small"]


def test_a_setting_that_is_possible_with_an_axis_only() -> None:
    assert titles(
        recipes=["soft-sft"], settings={"soft.remainder": "spread"}, axes={"soft.top_k": [2, 4]}
    ) == ["soft-sft@soft.top_k=2", "soft-sft@soft.top_k=4"]


def test_parts_take_from_the_grid_what_they_leave_out() -> None:
    grid = GridConfig(
        benchmarks=["SST2"],
        models=["demo"],
        seeds=2,
        num_examples=[4],
        settings={"align": {"epochs": 5}, "batch_size": 2},
        parts=[
            {"recipes": ["ia2"]},
            {"recipes": ["ia2"], "benchmarks": ["AGN"], "seeds": [7], "settings": {"align.epochs": 9}},
        ],
    )
    cells = [cell for unit in expand(grid) for cell in unit.cells]
    assert [(c.spec["benchmark"], c.spec["seed"]) for c in cells] == [("SST2", 0), ("SST2", 1), ("AGN", 7)]
    assert [c.config.align.epochs for c in cells] == [5, 5, 9]
    assert {(c.config.batch_size, c.spec["num_examples"]) for c in cells} == {(2, 4)}


def test_what_several_parts_name_is_one_cell() -> None:
    part = {"benchmarks": ["SST2"], "models": ["demo"], "recipes": ["sft"], "ood": False}
    assert keys(parts=[part, {**part, "seeds": 2}]) == keys(seeds=2)


def test_verbalisers_for_all_and_by_benchmark() -> None:
    assert specs("verbaliser", benchmarks=["SST2", "GSM8K"]) == ["digits", None]
    assert specs("verbaliser", benchmarks=["SST2", "GSM8K"], verbaliser="words") == ["words", None]
    assert specs("verbaliser", benchmarks=["SST2", "AGN"], verbaliser={"AGN": "words"}) == ["digits", "words"]
    parts = [{"benchmarks": [name], "models": ["demo"], "recipes": ["icl"]} for name in ("SST2", "AGN")]
    asked = {"SST2": "words", "AGN": "words"}
    assert specs("verbaliser", parts=parts, verbaliser=asked) == ["words", "words"]


def test_ood_partners_are_evaluated_on() -> None:
    def names(**values: Any) -> list[tuple[str, str | None]]:
        grid = GridConfig(benchmarks=["SST2"], models=["demo"], recipes=["sft"], **values)
        return [(benchmark.name, verbaliser) for benchmark, verbaliser in evaluated_on(grid)]

    assert names() == [("SST2", "digits"), ("FinS", "digits"), ("PoemS", "digits")]
    assert names(verbaliser="words") == [("SST2", "words"), ("FinS", "words"), ("PoemS", "words")]
    assert names(ood=False) == [("SST2", "digits")]
    assert keys(ood=True) != keys(ood=False)


def test_recipes_of_ones_own() -> None:
    schedules = {"twice": [{"stage": "sft"}, {"stage": "sft", "epochs": 3}], "other": [{"stage": "align"}]}
    (cell,) = cells_of(recipes=["twice"], settings={"schedules": schedules})
    assert cell.config.recipe == "twice"
    expected = {"balanced": True, "schedules": {"twice": schedules["twice"]}}  # others play no part
    assert cell.spec["settings"] == expected
    assert keys(recipes=["twice"], settings={"schedules": {"twice": schedules["twice"]}}) == [cell.key]


# ---------------------------------------------------------------------------------------- what keys depend on

# Setting, value, the recipes whose result depends on it.
SETTINGS: list[tuple[str, Any, set[str]]] = [
    ("separator", "\n", set(ALL)),
    ("chat", "turns", set(ALL)),
    ("max_context_tokens", 64, set(ALL)),
    ("max_answer_tokens", 3, set(ALL)),
    ("max_demonstrations", 2, set(ALL) - {"base"}),
    ("demo_order", "balanced", set(ALL) - {"base"}),
    ("selection", "last", set(ALL) - {"base"}),
    ("context_text", "Be brief.", set(ALL) - {"base"}),
    ("attention_modules", "*attn", set(ALL) - {"base"}),
    ("icl_demonstrations", "fresh", {"icl"}),
    ("context_draws", 2, {"ia2", "ia2-sft", "sft-ia2", "ia2+sft", "soft-sft", "constant-sft"}),
    ("batch_size", 2, set(ALL) - {"base", "icl"}),
    ("adapter.rank", 4, set(ALL) - {"base", "icl"}),
    ("align.objective", "kl", {"ia2", "ia2-sft", "sft-ia2"}),
    ("sft.epochs", 9, {"sft", "ia2-sft", "sft-ia2", "constant-sft"}),
    ("sft.ia2_weight", 1.0, {"sft", "ia2-sft", "sft-ia2", "constant-sft"}),
    ("joint.answers", "ground_truth", {"ia2+sft"}),
    ("soft.top_k", 5, {"soft-sft"}),
    ("constant.only_correct", True, {"constant-sft"}),
    ("checkpoint_every", 3, set()),
    ("report_to", ["tensorboard"], set()),
    ("targets", "memory", set()),
]


@pytest.mark.parametrize(("name", "value", "recipes"), SETTINGS, ids=[name for name, *_ in SETTINGS])
def test_a_setting_changes_the_cells_that_it_matters_to(name: str, value: Any, recipes: set[str]) -> None:
    plain = {c.spec["recipe"]: c for c in cells_of(recipes=ALL)}
    changed = {c.spec["recipe"]: c for c in cells_of(recipes=ALL, settings={name: value})}
    assert {r for r in ALL if plain[r].key != changed[r].key} == recipes
    # the record says so, and a value that is the default is none
    assert {r for r in ALL if _beside_the_draw(changed[r]) == {name: value}} == recipes
    default: Any = {**flat(AdaptConfig().model_dump()), **KEPT}[name]
    assert keys(recipes=ALL, settings={name: default}) == keys(recipes=ALL)
    # beside the plain ones there are as many cells more
    both = cells_of(recipes=ALL, variants={"changed": {name: value}})
    assert {c.spec["recipe"] for c in both if c.spec["variant"]} == recipes
    assert len(both) == len(ALL) + len(recipes)


def _beside_the_draw(cell: Cell) -> dict[str, Any]:
    return {name: value for name, value in cell.spec["settings"].items() if name != "balanced"}


def test_records_name_balanced_draws_and_keep_the_keys_of_random_ones() -> None:
    """Cells from before draws were balanced by default are random ones, and their records say nothing."""
    plain = {c.spec["recipe"]: c for c in cells_of(recipes=ALL)}
    random = {c.spec["recipe"]: c for c in cells_of(recipes=ALL, settings={"balanced": False})}
    assert all(c.spec["settings"] == {} and not c.config.balanced for c in random.values())
    for recipe in set(ALL) - {"base"}:
        assert plain[recipe].spec["settings"] == {"balanced": True} and plain[recipe].config.balanced
        assert plain[recipe].key != random[recipe].key
    assert plain["base"].key == random["base"].key  # nothing is drawn for it


def test_every_setting_is_known_to_matter_or_not() -> None:
    """A new setting belongs into the list above (or among the axes or the task's own)."""
    listed = {name.split(".")[0] for name, *_ in SETTINGS}
    axes = {"recipe", "seed", "num_examples", "learning_rates", "unlabelled", "max_unlabelled"}
    # of the task, as separator; of a context, as context_text; of the order, as demo_order; of training
    alike = {
        "balanced",  # has a test of its own
        *("task", "labels", "parser", "thinking"),
        *("context_file", "context_column", "context_function", "demo_search_orders"),
        *("permutation_targets", "micro_batch_size", "schedules"),
        *("activation_checkpointing", "activation_checkpointing_kwargs"),
    }
    new = set(AdaptConfig.model_fields) - listed - axes - alike
    assert not new, f"say in SETTINGS which recipes depend on {new}"


def test_a_kept_alignment_term_depends_on_how_alignment_is_measured() -> None:
    kept = {"sft.ia2_weight": 1.0}
    assert keys(settings=kept) != keys(settings={**kept, "align.objective": "kl"})


def test_axes_change_keys() -> None:
    everything = [
        *keys(learning_rates=[1e-3, 1e-4], seeds=2, num_examples=[8, 4]),
        *keys(max_test=100),
        *keys(hold_back=100),
        *keys(verbaliser="words"),
        *keys(models=["demo-gemma"]),
        *keys(benchmarks=["FinS"]),
        *keys(recipes=["ia2"]),
        *keys(dtype="bfloat16"),
        *keys(revision="main"),
        *keys(quantization="4bit"),
    ]
    assert len(everything) == len(set(everything)) == 8 + 9


def test_names_and_places_change_no_key() -> None:
    plain = keys(recipes=ALL)
    other = keys(
        recipes=ALL,
        name="x",
        description="y",
        select="test",
        device="cuda",
        data_dir="z",
        trust_remote_code=True,
    )
    assert plain == other
    # the same settings, however they are named and written
    named = {"a": {"align": {"objective": "kl"}}}, {"b": {"align.objective": "kl"}}
    first, second = (keys(recipes=["ia2"], variants=variant, plain=False) for variant in named)
    assert first == second == keys(recipes=["ia2"], settings={"align.objective": "kl"})
    assert first == keys(recipes=["ia2"], axes={"align.objective": ["kl"]})


def test_changed_rows_change_keys(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    values = {"recipes": ["base", "sft"], "benchmarks": [str(files / "two.yaml"), str(files / "free.yaml")]}
    grid = GridConfig(**grid_of(files, **values, ood=True))

    def found() -> dict[tuple[str, str], str]:
        cells = [cell for unit in units_of(grid, read_benchmarks(grid)) for cell in unit.cells]
        return {(cell.spec["benchmark"], cell.spec["recipe"]): cell.key for cell in cells}

    before = found()
    assert found() == before
    write_split(files, "three", "test", 8, seed=9, labels=3)  # of the OOD partner
    after = found()
    assert {name for name in before if before[name] != after[name]} == {("Two", "base"), ("Two", "sft")}
    write_split(files, "two", "train", 30, seed=9)
    assert found()["Two", "sft"] != after["Two", "sft"]
    assert found()["Free", "sft"] == before["Free", "sft"]


def test_changed_answers_of_a_verbaliser_change_keys(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    grid = GridConfig(**grid_of(files))
    (before,) = [cell.key for unit in expand(grid) for cell in unit.cells]
    entry = files / "two.yaml"
    entry.write_text(entry.read_text().replace("'1': '1'", "'1': '2'").replace("1: '1'", "1: '2'"))
    assert [cell.key for unit in expand(grid) for cell in unit.cells] != [before]


def test_a_cell_is_run_with_what_its_key_names() -> None:
    (cell,) = cells_of(
        recipes=["sft"],
        seeds=[3],
        num_examples=[16],
        learning_rates=[0.5],
        settings={"sft.epochs": 7, "align.epochs": 9, "targets": "memory"},
    )
    config = cell.config
    assert (config.recipe, config.seed, config.num_examples, config.learning_rates) == ("sft", 3, 16, [0.5])
    assert (config.sft.epochs, config.targets) == (7, "memory")
    assert config.align == AlignConfig(
        epochs=KEPT["align.epochs"]
    )  # plays no part, so it is not there either
    assert (config.task, config.labels) == ("classification", ["0", "1"])


_ADAPTER_DEFAULTS = (
    *("r", "lora_alpha", "lora_dropout", "vera_dropout", "use_dora", "use_rslora", "target_modules"),
    *("feedforward_modules", "num_virtual_tokens", "bottleneck_size", "placement"),
)


def test_the_defaults_are_those_that_finished_cells_were_run_with(tiny_llama: PreTrainedModel) -> None:
    adapters = {}
    for kind in ADAPTERS:
        made = peft_config(tiny_llama, AdapterConfig(type=kind))
        values = {name: getattr(made, name, None) for name in _ADAPTER_DEFAULTS}
        adapters[kind] = {k: sorted(v) if isinstance(v, (set, list)) else v for k, v in values.items()}
    known = digest([FORMAT, {**AdaptConfig().model_dump(), **KEPT}, adapters])
    assert known == "3c224e2616ad06ae", (
        "A default of AdaptConfig, or of an adapter type, is not what it was. Keys of cells leave defaults "
        "out: if a default changed (or what one means, or what a record holds), bump FORMAT in "
        "src/ia2/experiment/sweep/grid.py, so that no old cell passes for a new one. If a setting or a "
        f"type is new and its default is what was done before, do not. Either way, write {known} here."
    )


# ------------------------------------------------------------------------------------------------- units


def units(**values: Any) -> list[list[Cell]]:
    defaults = {"benchmarks": ["SST2"], "models": ["demo"], "ood": False}
    return [list(unit.cells) for unit in expand(GridConfig(**{**defaults, **values}))]


def test_cells_with_the_same_teacher_are_one_unit() -> None:
    variants = {"kl": {"align.objective": "kl"}, "small": {"adapter.rank": 2, "batch_size": 2}}
    found = units(recipes=ALL, learning_rates=[1e-3, 1e-4], betas=[0.1, 0.2], variants=variants)
    assert [{cell.spec["recipe"] for cell in unit} for unit in found] == [{"base"}, set(ALL) - {"base"}]


@pytest.mark.parametrize(
    "values",
    [
        {"seeds": 2},
        {"num_examples": [4, 8]},
        {"benchmarks": ["SST2", "AGN"]},
        {"models": ["demo", "demo-gemma"]},
        {"variants": {"orders": {"context_draws": 2}}},
        {"variants": {"line": {"separator": "\n"}}},
    ],
    ids=str,
)
def test_cells_with_another_teacher_are_another_unit(values: dict[str, Any]) -> None:
    assert len(units(recipes=["ia2"], **values)) == 2


def test_part_of_a_unit_keeps_its_name() -> None:
    (unit,) = expand(GridConfig(benchmarks=["SST2"], models=["demo"], recipes=["icl", "sft"]))
    part = unit.only({unit.cells[1].key})
    assert part.key == unit.key and part.cells == unit.cells[1:]


def test_titles() -> None:
    cells = cells_of(recipes=["base", "ia2+sft"], variants={"v": {"joint.objective": "kl"}}, seeds=[2])
    assert [cell.title for cell in cells] == [
        "SST2 demo base",
        "SST2 demo ia2+sft N=8 seed 2 rate 0.001",
        "SST2 demo ia2+sft@v N=8 seed 2 rate 0.001",
    ]


# --------------------------------------------------------------------------------------------- mistakes

_HERE = {"benchmarks": ["SST2"], "models": ["demo"], "recipes": ["sft"]}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"benchmark": ["SST2"]}, ["unknown key 'benchmark'", "Did you mean 'benchmarks'?"]),
        (
            {**_HERE, "parts": [{"recipe": ["sft"]}]},
            ["unknown key 'parts.0.recipe'", "Did you mean 'recipes'?"],
        ),
        ({**_HERE, "parts": [{}, {"name": "x"}]}, ["unknown key 'parts.1.name'"]),
        ({"models": ["demo"], "recipes": ["sft"]}, ["benchmarks must be given"]),
        ({}, ["benchmarks and models and recipes must be given"]),
        ({**_HERE, "models": None, "parts": [{"models": ["a"]}, {}]}, ["parts.1: models must be given"]),
        ({**_HERE, "recipes": []}, ["recipes: ", "at least 1 item"]),
        ({**_HERE, "seeds": 0}, ["seeds: at least one seed is needed"]),
        ({**_HERE, "seeds": []}, ["seeds: at least one seed is needed"]),
        ({**_HERE, "seeds": [0, -1]}, ["seeds: seeds are 0 or greater"]),
        ({**_HERE, "num_examples": [8, 1]}, ["num_examples: at least two examples are needed"]),
        ({**_HERE, "max_test": 1}, ["max_test: "]),
        ({**_HERE, "hold_back": 0}, ["hold_back: "]),
        ({**_HERE, "select": "best"}, ["select: ", "'dev' or 'test'"]),
        ({**_HERE, "parts": [{"seeds": 0}]}, ["parts.0.seeds: at least one seed is needed"]),
        (
            {**_HERE, "benchmarks": ["PoemS"]},
            ["'PoemS' has no rows to train on; it is evaluated out of distribution by SST2 and FinS."],
        ),
        ({**_HERE, "benchmarks": ["SST"]}, ["unknown benchmark 'SST'", "Did you mean 'SST2'?"]),
        ({**_HERE, "benchmarks": ["nowhere.yaml"]}, ["nowhere.yaml: no such file"]),
        (
            {**_HERE, "recipes": ["ia2-stf"]},
            ["recipes: 'ia2-stf' is not one of", "Did you mean 'ia2-sft'?"],
        ),
        (
            {**_HERE, "parts": [{}, {"recipes": ["lora"]}]},
            ["parts.1.recipes: 'lora' is not one of base, icl, sft"],
        ),
        (
            {**_HERE, "verbaliser": "wrds"},
            ["SST2: no verbaliser 'wrds'", "Did you mean 'words'?"],
        ),
        ({**_HERE, "verbaliser": {"SST2": "wrds"}}, ["SST2: no verbaliser 'wrds'"]),
        (
            {**_HERE, "verbaliser": {"SST": "words"}},
            ["verbaliser: 'SST' is none of the grid's benchmarks", "Did you mean 'SST2'?"],
        ),
        ({**_HERE, "settings": {"seed": 3}}, ["settings: 'seed' is an axis of the grid", "beside `recipes`"]),
        ({**_HERE, "settings": {"joint": {"betas": [0.1]}}}, ["'joint.betas' is an axis of the grid"]),
        ({**_HERE, "axes": {"num_examples": [2, 4]}}, ["'num_examples' is an axis of the grid"]),
        (
            {**_HERE, "parts": [{"variants": {"v": {"learning_rates": [1]}}}]},
            ["parts.0.settings: 'learning_rates' is an axis of the grid"],
        ),
        (
            {**_HERE, "settings": {"align.objectiv": "kl"}},
            ["settings: unknown key 'align.objectiv'", "Did you mean 'objective'?"],
        ),
        ({**_HERE, "variants": {"v": {"bach_size": 2}}}, ["unknown key 'bach_size'", "'batch_size'?"]),
        (
            {**_HERE, "axes": {"align.objective": ["mse", "l2"]}},
            ["settings: align.objective: 'l2' is not one of mse, kl"],
        ),
        (
            {**_HERE, "settings": {"adapter": "dora"}, "axes": {"adapter.rank": [2, 4]}},
            ["settings: 'adapter.rank' cannot be given beside adapter: 'dora'"],
        ),
        ({**_HERE, "settings": {"adapter": "dora"}}, ["settings: adapter: input should be a valid dict"]),
        (
            {**_HERE, "learning_rates": {"sfd": [1e-3]}},
            ["learning_rates: 'sfd' is no recipe", "Did you mean 'sft'?"],
        ),
        ({**_HERE, "learning_rates": [-1]}, ["settings: learning_rates.0: input should be greater than 0"]),
        ({**_HERE, "recipes": ["ia2+sft"], "betas": [1.5]}, ["joint.betas.0: β must lie between 0 and 1"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_line(values: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    file = write_grid(tmp_path / "grid.yaml", values)
    with pytest.raises((ConfigError, DataError)) as raised:
        expand(load_grid(file))
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_no_such_grid(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: no such file"):
        load_grid(tmp_path / "none.yaml")


# --------------------------------------------------------------------------------- the paper's own grids

GRIDS = [path for path in sorted(Path(__file__).parents[2].glob("paper/*.yaml")) if path.stem != "base"]
PAPER = [path for path in GRIDS if not path.stem.startswith("evidence")]


@pytest.mark.parametrize("path", PAPER, ids=[path.stem for path in PAPER])
def test_the_papers_grids_draw_at_random_and_show_its_labels(path: Path) -> None:
    grid = load_grid(path)
    cells = [cell for unit in expand(grid) for cell in unit.cells]
    assert not any(cell.config.balanced for cell in cells)
    if not path.stem.startswith("small"):
        # 0 and 1, apple and Friday: no blank before a label, neither in training nor out of distribution
        for unit in expand(grid):
            assert {words for _, words in unit.benchmarks} <= {"digits", "bare", None}


def test_arms_of_the_evidence_know_the_same() -> None:
    """The same labels for every arm of a draw, none of the rows that it was chosen on, and no dev rows."""
    (grid,) = (load_grid(path) for path in GRIDS if path.stem == "evidence")
    drawn = [c for unit in expand(grid) for c in unit.cells if c.spec["seed"] is not None]
    assert {cell.spec["recipe"] for cell in drawn} >= {"icl", "sft", "ia2", "ia2-sft", "ia2+sft", "soft-sft"}
    for cell in drawn:
        assert cell.config.balanced and cell.config.selection == "last"
        assert cell.spec["hold_back"] == 120 and cell.spec["seed"] != 100


def test_figure_6_is_of_one_model_over_n_on_both_multiple_choice_benchmarks() -> None:
    units = expand(load_grid(_paper("figure6")))
    assert {unit.model for unit in units} == {"meta-llama/Llama-3.2-3B"}
    assert {tuple(b.name for b, _ in unit.benchmarks) for unit in units} == {("SciQr", "QASCr")}
    assert {cell.spec["num_examples"] for unit in units for cell in unit.cells} == {2, 4, 8, 16, 32, 64, 128}


def test_table_8_has_every_n_and_out_of_distribution_pairs() -> None:
    units = expand(load_grid(_paper("table8")))
    for model in {unit.model for unit in units}:
        sizes = {cell.spec["num_examples"] for unit in units if unit.model == model for cell in unit.cells}
        assert sizes == {2, 4, 8, 16, 32, 64, 128}
    pairs = {(unit.benchmarks[0][0].name, other.name) for unit in units for other, _ in unit.benchmarks[1:]}
    assert {("SST2", "FinS"), ("AGN", "BBCN"), ("SciQr", "QASCr"), ("GSM8K", "GSM8Ks")} <= pairs


def _paper(name: str) -> Path:
    return next(path for path in PAPER if path.stem == name)
