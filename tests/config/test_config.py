from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ia2.config import AdaptConfig, CompareConfig, ProbeConfig, TrainConfig
from ia2.config.reading import load_config, read_settings, settings_text, validate
from ia2.config.sections import SECTIONS
from ia2.config.yaml_reading import load_yaml
from ia2.utils.errors import ConfigError, DataError


def settings_file(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = settings_file(tmp_path, "seed: 3\nbatch_size: 8\nalign: {epochs: 7, patience: 2}\n")
    config = load_config(TrainConfig, file, {"seed": 4, "align.epochs": 9, "recipe": None})
    assert (config.seed, config.batch_size, config.recipe) == (4, 8, "auto")
    assert (config.align.epochs, config.align.patience, config.sft.epochs) == (9, 2, None)


def test_dotted_flags_make_sections() -> None:
    config = load_config(AdaptConfig, None, {"adapter.rank": 4, "align.objective": "kl"})
    assert (config.adapter.rank, config.align.objective) == (4, "kl")


def test_a_dumped_configuration_reads_back(tmp_path: Path) -> None:
    config = CompareConfig(
        recipes=["sft", "ia2"], label_map={"0": "no", "1": "yes"}, prompt_template="Q: {q}\nA:", labels=[" a"]
    )
    file = settings_file(tmp_path, yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
    assert load_config(CompareConfig, file, {}) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeed": 1}, "unknown key 'seeed'. Did you mean 'seed'?"),
        ({"zzz": 1}, "unknown key 'zzz'."),
        ({"align": {"epoch": 3}}, "unknown key 'align.epoch'. Did you mean 'epochs'?"),
        ({"align": {"zzz": 3}, "zzz": 1}, "unknown key 'align.zzz'; unknown key 'zzz'."),
        ({"soft": {"remainder": "drop"}}, "soft: remainder does nothing without top_k"),
        ({"joint": {"betas": [0.5, 1]}}, "joint.betas.1: β must lie between 0 and 1"),
        ({"sft": {"only_correct": True}}, "sft: only_correct does nothing to fine-tuning on true answers"),
        ({"sft": {"ia2_decay_epochs": 3}}, "sft: ia2_decay_epochs does nothing without ia2_weight"),
        ({"align": {"objective": "attention", "normalise": True}}, "align: normalise does nothing to"),
        ({"align": {"objective": "msee"}}, "align.objective: 'msee' is not one of mse, kl,"),
        ({"targets": "online", "align": {"layers": "top-2"}}, "need stored targets"),
        (
            {"context_text": "a", "context_column": "b"},
            "context_text and context_column are given; one context",
        ),
        ({"context_text": "a", "demo_order": "nearest"}, "demo_order do nothing beside context_text"),
        ({"thinking": True}, "thinking does nothing without chat"),
        ({"demo_search_orders": 4}, "demo_search_orders does nothing unless demo_order is search"),
        ({"learning_rates": [1e-3, 0]}, "learning_rates.1: input should be greater than 0."),
        (
            {"recipe": "ia2sft"},
            "recipe: 'ia2sft' is not one of base, icl, sft, ia2, ia2-sft,",
        ),
        ({"batch_size": 0}, "batch_size: input should be greater than or equal to 1."),
        ({"batch_size": 4, "micro_batch_size": 3}, "micro_batch_size 3 does not divide batch_size 4."),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True is not possible"),
        ({"targets": "online", "context_draws": 2}, "cannot be computed online"),
    ],
)
def test_what_is_not_allowed_is_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        validate(AdaptConfig, values)
    assert "\n" not in str(info.value)
    assert message in str(info.value)
    assert "?." not in str(info.value)


def test_reentrant_false_and_online_samples_are_fine() -> None:
    AdaptConfig(activation_checkpointing_kwargs={"use_reentrant": False})
    AdaptConfig(targets="online", context_draws=2, permutation_targets="sample")
    AdaptConfig(targets="online")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_config(TrainConfig, tmp_path / "none.yaml", {})
    with pytest.raises(DataError, match="is a folder, not a file"):
        load_config(TrainConfig, tmp_path, {})
    with pytest.raises(ConfigError, match="found str"):
        load_config(TrainConfig, settings_file(tmp_path, "seed"), {})
    with pytest.raises(ConfigError, match="align: expected keys and values, found int"):
        load_config(TrainConfig, settings_file(tmp_path, "align: 1"), {"align.epochs": 2})


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    file = settings_file(tmp_path, "# all defaults\n")
    assert load_config(TrainConfig, file, {"seed": 2}) == TrainConfig(seed=2)


def test_every_setting_is_described() -> None:
    for kind in (TrainConfig, CompareConfig, ProbeConfig):
        for name, field in kind.model_fields.items():
            if name not in ("adapter", *SECTIONS):
                assert field.description, name


def test_a_file_extends_another_and_says_what_differs(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "seeds: 5\nsettings: {sft: {epochs: 3}, batch_size: 2}\nmodels: [a, b]\n"
    )
    file = tmp_path / "grid.yaml"
    file.write_text("extends: base.yaml\nmodels: [c]\nsettings: {sft: {patience: 1}}\n")
    expected = {
        "seeds": 5,
        "settings": {"sft": {"epochs": 3, "patience": 1}, "batch_size": 2},
        "models": ["c"],
    }
    assert read_settings(file) == expected
    assert load_yaml(settings_text(file)) == expected  # what is kept beside results needs no other file
    (tmp_path / "base.yaml").write_text("extends: grid.yaml\n")
    with pytest.raises(ConfigError, match=r"base.yaml: extends: grid.yaml"):
        read_settings(file)
    file.write_text("extends: [base.yaml]\n")
    with pytest.raises(ConfigError, match=r"grid.yaml: extends: .*list"):
        read_settings(file)
    file.write_text("extends: none.yaml\n")
    with pytest.raises(DataError, match=r"none.yaml"):
        read_settings(file)
