"""ia2: align an adapter with in-context activations, then fine-tune.

Public names are imported on first use, so that ``import ia2`` and ``ia2 --help`` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "ActivationCapture": "ia2.models.capture",
    "AdaptConfig": "ia2.config",
    "AdaptResult": "ia2.experiment.adapt",
    "AdapterConfig": "ia2.config.sections",
    "AlignConfig": "ia2.config.sections",
    "AlignTrainer": "ia2.training.trainer",
    "AnalysisSettings": "ia2.analysis.analyze",
    "BaseModel": "ia2.models.load",
    "CompareConfig": "ia2.config",
    "CurveConfig": "ia2.config",
    "ConfigError": "ia2.utils.errors",
    "DataError": "ia2.utils.errors",
    "Example": "ia2.data.examples",
    "Examples": "ia2.data.examples",
    "FewShotSplit": "ia2.data.examples",
    "ModelError": "ia2.utils.errors",
    "ProbeConfig": "ia2.config",
    "RowFormat": "ia2.data.examples",
    "RunFolderError": "ia2.utils.errors",
    "SftConfig": "ia2.config.sections",
    "Teacher": "ia2.teacher.teacher",
    "UserError": "ia2.utils.errors",
    "adapt": "ia2.experiment.adapt",
    "analyze": "ia2.analysis.analyze",
    "compare": "ia2.experiment.compare",
    "curve": "ia2.experiment.curve",
    "diagnose": "ia2.report.doctor.diagnosis",
    "load_adapter": "ia2.experiment.adapt",
    "load_base": "ia2.models.load",
    "probe": "ia2.experiment.probe",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from ia2.analysis.analyze import AnalysisSettings, analyze
    from ia2.config import AdaptConfig, CompareConfig, CurveConfig, ProbeConfig
    from ia2.config.sections import AdapterConfig, AlignConfig, SftConfig
    from ia2.data.examples import Example, Examples, FewShotSplit, RowFormat
    from ia2.experiment.adapt import AdaptResult, adapt, load_adapter
    from ia2.experiment.compare import compare
    from ia2.experiment.curve import curve
    from ia2.experiment.probe import probe
    from ia2.models.capture import ActivationCapture
    from ia2.models.load import BaseModel, load_base
    from ia2.report.doctor.diagnosis import diagnose
    from ia2.teacher.teacher import Teacher
    from ia2.training.trainer import AlignTrainer
    from ia2.utils.errors import ConfigError, DataError, ModelError, RunFolderError, UserError


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ia2' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    # found directly from now on
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
