"""ia2: align an adapter with in-context activations, then fine-tune.

Public names are imported on first use, so that ``import ia2`` and ``ia2 --help`` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "ActivationCapture": "ia2.capture",
    "AdaptConfig": "ia2.config",
    "AdaptResult": "ia2.adaptation",
    "AdapterConfig": "ia2.config_sections",
    "AlignConfig": "ia2.config_sections",
    "AlignTrainer": "ia2.trainer",
    "AnalysisSettings": "ia2.analysis.analyze",
    "BaseModel": "ia2.models",
    "CompareConfig": "ia2.config",
    "CurveConfig": "ia2.config",
    "ConfigError": "ia2.errors",
    "DataError": "ia2.errors",
    "Example": "ia2.examples",
    "Examples": "ia2.examples",
    "FewShotSplit": "ia2.examples",
    "ModelError": "ia2.errors",
    "ProbeConfig": "ia2.config",
    "RowFormat": "ia2.examples",
    "RunFolderError": "ia2.errors",
    "SftConfig": "ia2.config_sections",
    "MixedTrainer": "ia2.trainer",
    "SftTrainer": "ia2.trainer",
    "SoftTrainer": "ia2.trainer",
    "StageSettings": "ia2.trainer",
    "Teacher": "ia2.teacher",
    "UserError": "ia2.errors",
    "adapt": "ia2.adaptation",
    "analyze": "ia2.analysis.analyze",
    "compare": "ia2.comparison",
    "curve": "ia2.curves",
    "diagnose": "ia2.analysis.signatures",
    "load_adapter": "ia2.adaptation",
    "load_base": "ia2.models",
    "probe": "ia2.probing",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from ia2.adaptation import AdaptResult, adapt, load_adapter
    from ia2.analysis.analyze import AnalysisSettings, analyze
    from ia2.analysis.signatures import diagnose
    from ia2.capture import ActivationCapture
    from ia2.comparison import compare
    from ia2.config import AdaptConfig, CompareConfig, CurveConfig, ProbeConfig
    from ia2.config_sections import AdapterConfig, AlignConfig, SftConfig
    from ia2.curves import curve
    from ia2.errors import ConfigError, DataError, ModelError, RunFolderError, UserError
    from ia2.examples import Example, Examples, FewShotSplit, RowFormat
    from ia2.models import BaseModel, load_base
    from ia2.probing import probe
    from ia2.teacher import Teacher
    from ia2.trainer import AlignTrainer, MixedTrainer, SftTrainer, SoftTrainer, StageSettings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ia2' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    # found directly from now on
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
