"""Folders that a stranger wrote: each trick would write a marker, did it run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from ia2.models.identity import folder_identity
from ia2.utils.manifest import record, relative, root_of, sha256

EVIL = "evil_of_a_stranger"
FUNCTION = f"{EVIL}:run"


class Pickled:
    """Writes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.marker)!r}, 'w')",)


class Stranger:
    """Writes folders into ``root``; what is run of them makes ``marker``.

    Args:
        root: an empty folder, on ``sys.path``: there is the module whose function tricks name.
        run: a finished run of ``ia2 train``, which is copied.
        model: its base model.
    """

    def __init__(self, root: Path, run: Path, model: Path) -> None:
        self.root, self.run, self.model = root, run, model
        self.marker = root / "marker"
        self.code = f"open({str(self.marker)!r}, 'w')\n"
        (root / f"{EVIL}.py").write_text(f"{self.code}def run(*_):\n    return 'a'\n")

    def run_with(self, task_parser: str | None = None, **changes: Any) -> Path:
        """The run with other settings, or a parser in its task."""
        folder = self._copy(self.run, "run")
        edit_json(folder / "ia2_run.json", lambda facts: facts["config"].update(changes))
        if task_parser is not None:
            edit_json(folder / "ia2_run.json", lambda facts: facts["task"].update(parser=task_parser))
        code = bool(changes.get("trust_remote_code"))
        # strangers know how to make an identity fit
        if "model" in changes and (identity := folder_identity(Path(changes["model"]), code=code)):
            edit_json(folder / "ia2_run.json", lambda facts: facts["data"]["model"].update(identity))
        config = yaml.safe_load((folder / "ia2_config.yaml").read_text())
        (folder / "ia2_config.yaml").write_text(yaml.safe_dump({**config, **changes}))
        return folder

    def pickles(self, folder: Path, *names: str) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"weight": Pickled(self.marker)}, folder / name)
        return folder

    def pickled_adapter(self) -> Path:
        folder = self.run_with()
        (folder / "adapter_model.safetensors").unlink()
        return self.pickles(folder, "adapter_model.bin", "pytorch_model.bin")

    def model_of(self, name: str, known: bool = False) -> str:
        """A copy of the model with a trick: ``pickle``, ``code``, ``tokenizer``, ``kernel`` or ``adapter``.

        Code is of a type that only itself knows, or (``known``) one that transformers knows too.
        """
        folder = self._copy(self.model, f"model-{name}")
        config = folder / "config.json"
        if name == "pickle":
            (folder / "model.safetensors").unlink()
            self.pickles(folder, "pytorch_model.bin")
        elif name == "code":
            names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
            kind = {} if known else {"model_type": "evil"}
            edit_json(config, lambda values: values.update(auto_map=names, **kind))
            (folder / "evil.py").write_text(
                f"{self.code}from transformers import LlamaConfig, LlamaForCausalLM\n"
                "class Config(LlamaConfig):\n    model_type = 'evil'\n"
                "class Model(LlamaForCausalLM):\n    config_class = Config\n"
            )
        elif name == "tokenizer":
            changes = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
            edit_json(folder / "tokenizer_config.json", lambda values: values.update(changes))
            (folder / "evil.py").write_text(f"{self.code}class Evil: pass\n")
        elif name == "kernel":
            edit_json(config, lambda values: values.update(attn_implementation="evil/kernel"))
        elif name == "adapter":
            adapter = {
                "peft_type": "LORA",
                "base_model_name_or_path": "evil/model",
                "target_modules": ["q_proj"],
                "auto_mapping": {"base_model_class": "Evil", "parent_library": EVIL},
            }
            (folder / "adapter_config.json").write_text(json.dumps(adapter))
            self.pickles(folder, "adapter_model.bin")
        return str(folder)

    def _copy(self, folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, self.root / name))


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
    # strangers know how to make a manifest fit
    if (root := root_of(file)) is not None:
        record(root, {relative(file, root): sha256(file)})
