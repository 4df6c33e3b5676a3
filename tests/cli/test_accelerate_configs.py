"""The configurations of accelerate in the package, and the commands of the documentation that use them."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from ia2.cli import main
from ia2.utils import distributed
from ia2.utils.errors import ConfigError

KINDS = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}
FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
PAGES = [Path(__file__).parents[2] / "docs" / name for name in ("scale.md", "guide.md")]


def config(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    main(["env", "--accelerate", name])
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", list(KINDS))
def test_accelerate_reads_them(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found: Any = load_config_from_file(config(name, capsys))
    assert found.distributed_type == KINDS[name]
    assert found.num_processes == -1  # whoever launches says how many
    assert found.mixed_precision == "no"


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["env", "--accelerate", "fsdp"])
    assert caught.value.code == 2
    assert "there is no configuration 'fsdp', only ddp, fsdp2, zero3" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_documentations_commands(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text().replace("\\\n", " ").replace("$RANK", "0").replace("$FIRST", "127.0.0.1")
    lines = re.findall(r"^accelerate launch .*$", text, flags=re.MULTILINE)
    assert lines
    for line in lines:
        names = re.findall(r'--config_file "\$\(ia2 env --accelerate (\w+)\)"', line)
        assert len(names) == 1 and names[0] in KINDS, line
        words = shlex.split(re.sub(r'"\$\([^)]*\)"', config(names[0], capsys), line))
        given = launch.launch_command_parser().parse_args(words[2:])
        assert given.module and given.training_script == "ia2" and given.num_processes, line
        args, _, _ = launch._validate_launch_command(given)
        assert args.use_fsdp == (names[0] == "fsdp2") and args.use_deepspeed == (names[0] == "zero3")


@pytest.mark.parametrize(
    ("env", "shards"),
    [
        ({}, False),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}, True),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1 is not supported"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "not offloaded",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False),
        (
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
            },
            "not offloaded",
        ),
    ],
)
def test_what_a_launch_asks_for(
    env: dict[str, str], shards: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(name, "false")  # and as it was afterwards
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_shards", False)
    if isinstance(shards, str):
        with pytest.raises(ConfigError, match=shards):
            distributed._take_over()
        return
    distributed._take_over()
    assert distributed._shards == shards
    # accelerate is not to do it again
    assert {os.environ["ACCELERATE_USE_FSDP"], os.environ["ACCELERATE_USE_DEEPSPEED"]} == {"false"}
