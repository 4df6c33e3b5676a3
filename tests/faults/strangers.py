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

    def run_with(self, **changes: Any) -> Path:
        """The run with other settings."""
        folder = self._copy(self.run, "run")
        edit_json(folder / "ia2_run.json", lambda facts: facts["config"].update(changes))
        code = bool(changes.get("trust_remote_code"))
        # strangers know how to make an identity fit
        if "model" in changes and (identity := folder_identity(Path(changes["model"]), code=code)):
            edit_json(folder / "ia2_run.json", lambda facts: facts["data"]["model"].update(identity))
        config = yaml.safe_load((folder / "ia2_config.yaml").read_text())
        (folder / "ia2_config.yaml").write_text(yaml.safe_dump({**config, **changes}))
        return folder

    def pickles(self, folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"weight": Pickled(self.marker)}, folder / name)

    def model_of_a_pickle(self) -> Path:
        folder = self._copy(self.model, "pickled")
        (folder / "model.safetensors").unlink()
        self.pickles(folder, "pytorch_model.bin")
        return folder

    def model_with_code(self, known: bool = False) -> Path:
        """Of a type that only its own code knows, or one that transformers knows too."""
        folder = self._copy(self.model, "coded")
        names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        kind = {} if known else {"model_type": "evil"}
        edit_json(folder / "config.json", lambda config: config.update(auto_map=names, **kind))
        (folder / "evil.py").write_text(
            f"{self.code}from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class Config(LlamaConfig):\n    model_type = 'evil'\n"
            "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        )
        return folder

    def model_with_tokenizer_code(self) -> Path:
        folder = self._copy(self.model, "tokenizer")
        changes = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        edit_json(folder / "tokenizer_config.json", lambda config: config.update(changes))
        (folder / "evil.py").write_text(f"{self.code}class Evil: pass\n")
        return folder

    def model_with_a_kernel(self) -> Path:
        folder = self._copy(self.model, "kernel")
        edit_json(folder / "config.json", lambda config: config.update(attn_implementation="evil/kernel"))
        return folder

    def model_with_an_adapter(self) -> Path:
        folder = self._copy(self.model, "adapted")
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": "evil/model",
            "target_modules": ["q_proj"],
            "auto_mapping": {"base_model_class": "Evil", "parent_library": EVIL},
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        self.pickles(folder, "adapter_model.bin")
        return folder

    def model_with_template(self, template: str) -> Path:
        folder = self._copy(self.model, "templated")
        (folder / "chat_template.jinja").write_text(template)
        return folder

    def data_script(self) -> Path:
        """A folder of data with a loading script of its name."""
        folder = self.root / "scripted"
        folder.mkdir()
        (folder / "scripted.py").write_text(self.code)
        (folder / "dataset_infos.json").write_text("{}")
        return folder

    def _copy(self, folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, self.root / name))


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
    # strangers know how to make a manifest fit
    if (root := root_of(file)) is not None:
        record(root, {relative(file, root): sha256(file)})
