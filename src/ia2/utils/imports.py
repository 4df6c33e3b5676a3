"""Imports of other packages without what a command never uses: they cost more than the command itself.

Nothing is lost. What is left out is found again when it is used, or after the ``with`` block.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ia2.utils.errors import ConfigError, suggest

_BNB = "bitsandbytes"
_DYNAMO = "torch._dynamo"
_MASKS = "torch._dynamo._trace_wrapped_higher_order_op"
_MARKS = ("allow_in_graph", "assume_constant_result", "disable", "disallow_in_graph", "forbid_in_graph")
# transformers imports these packages wherever they are there, for shards of models and for detecting objects.
_CHECKS = ("is_torch_distributed_available", "is_scipy_available")


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """PEFT does not import bitsandbytes here, unless something else has already.

    PEFT asks whether the package is installed, not whether the model is quantised with it. A model that is
    has layers of bitsandbytes, which was then imported by whoever quantised it, and nothing is left out.

    Example:
        >>> import sys
        >>> before = "bitsandbytes" in sys.modules
        >>> with without_bitsandbytes():
        ...     import peft
        >>> before == ("bitsandbytes" in sys.modules)
        True
    """
    if _BNB in sys.modules or importlib.util.find_spec(_BNB) is None:
        yield
        return
    sys.modules[_BNB] = None  # type: ignore[assignment]  # Python's own way to say: not installed
    try:
        yield
    finally:
        del sys.modules[_BNB]
        # what was found out here must not be remembered
        for place in ("peft.import_utils", "transformers.utils.import_utils"):
            for name, check in list(vars(sys.modules.get(place, ModuleType(place))).items()):
                if name.startswith(("is_bnb", "is_bitsandbytes")) and hasattr(check, "cache_clear"):
                    check.cache_clear()
        helpers: Any = sys.modules.get("peft.helpers")
        if getattr(helpers, "bnb", helpers) is None:
            helpers.bnb = _WhenUsed(_BNB)


@contextmanager
def for_training() -> Iterator[None]:
    """Import transformers' trainer without bitsandbytes, and without the package datasets.

    The trainer asks whether what it trains on is a data set of that package. Where it has never been
    imported, nothing is.

    Example:
        >>> with for_training():
        ...     from transformers import Trainer
    """
    spec = None if "datasets" in sys.modules else importlib.util.find_spec("datasets")
    stand_in = _Datasets("datasets")
    if spec is not None:
        stand_in.__spec__ = spec
        sys.modules["datasets"] = stand_in
    try:
        with without_bitsandbytes():
            yield
    finally:
        if sys.modules.get("datasets") is stand_in:
            del sys.modules["datasets"]


@contextmanager
def for_one_forward_pass() -> Iterator[None]:
    """Import transformers without compiler, shards of models and detection of objects, until the block ends.

    For commands that feed rows to a model in one process and end. The compiler (``torch._dynamo``) is
    imported when something of it is called, other than marks for functions, which mean nothing where nothing
    is compiled. Where several processes were launched, everything is imported.

    Example:
        >>> with for_one_forward_pass():
        ...     from transformers import GPT2LMHeadModel
    """
    if _DYNAMO in sys.modules or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    import torch
    from transformers import utils
    from transformers.utils import import_utils

    changes: list[tuple[Any, str, Any]] = [
        (module, name, lambda: False)
        for name in _CHECKS
        for module in (utils, import_utils)
        if hasattr(module, name)
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    stand_ins: dict[str, ModuleType] = {_DYNAMO: _Compiler(_DYNAMO), _MASKS: _Masks(_MASKS)}
    stand_ins[_DYNAMO].__path__ = []  # a package, of which _MASKS is a part
    sys.modules.update(stand_ins)
    torch._dynamo = stand_ins[_DYNAMO]  # type: ignore[assignment]
    if not hasattr(torch.distributed, "tensor"):
        # It stays, since what was imported here relies on it. It is no entry of sys.modules: an import finds
        # the real module, which then takes this place.
        torch.distributed.tensor = _Shards(f"{torch.distributed.__name__}.tensor")  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        _give_way()


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage while so much is made that stays: imports and models.

    Example:
        >>> import gc
        >>> with uncollected():
        ...     assert not gc.isenabled()
        >>> gc.isenabled()
        True
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _give_way() -> None:
    """Take the stand-ins away; the next import finds the real modules."""
    import torch

    for name in (_DYNAMO, _MASKS):
        if isinstance(sys.modules.get(name), _WhenUsed):
            del sys.modules[name]
    if isinstance(vars(torch).get("_dynamo"), _WhenUsed):
        del torch._dynamo


class _WhenUsed(ModuleType):
    """A module that is imported when one of its names is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # what the import system and inspect ask
            raise AttributeError(name)
        _give_way()
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


class _Instances(type):
    """A class of a module that may not have been imported, in which case it has no instance."""

    def __instancecheck__(cls, instance: Any) -> bool:
        real = sys.modules.get(cls.__module__)
        return not isinstance(real, (_WhenUsed, type(None))) and isinstance(
            instance, getattr(real, cls.__name__)
        )


class _Datasets(_WhenUsed):
    """In place of ``datasets``, of whose classes the trainer asks for instances."""

    def __getattr__(self, name: str) -> Any:
        if name in ("Dataset", "IterableDataset"):
            return _Instances(name, (), {"__module__": self.__name__})
        return super().__getattr__(name)


class _Compiler(_WhenUsed):
    """In place of ``torch._dynamo``: nothing is compiled, so functions need no marks for the compiler."""

    def __getattr__(self, name: str) -> Any:
        return _unmarked if name in _MARKS else super().__getattr__(name)


def _unmarked(fn: Any = None, *args: Any, **options: Any) -> Any:
    return (lambda same: same) if fn is None else fn


class _Shards(_WhenUsed):
    """In place of ``torch.distributed.tensor``; PEFT asks whether weights are instances of its class."""

    def __getattr__(self, name: str) -> Any:
        if name == "DTensor":
            return _Instances(name, (), {"__module__": self.__name__})
        return super().__getattr__(name)


class _Masks(_WhenUsed):
    """In place of the compiler's module that transformers' attention masks import a name of."""

    def TransformGetItemToIndex(self, *args: Any) -> Any:
        _give_way()
        return importlib.import_module(_MASKS).TransformGetItemToIndex(*args)


def load_function(spec: str, setting: str) -> Any:
    """A function that the user names by its import path ``package.module:function``.

    Args:
        spec: the path.
        setting: which names it, for messages.

    Raises:
        ConfigError: the path is none, the module does not import, or it has no such function.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"{setting} '{spec}' is no import path such as package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:  # the last two: a relative or an empty name
        raise ConfigError(
            f"{setting} '{spec}': cannot import '{module_name}' ({error}). Install it, or put its folder on "
            "PYTHONPATH."
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{setting} '{spec}': importing '{module_name}' fails with {failure(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        raise ConfigError(
            f"{setting} '{spec}': '{module_name}' has no function '{function_name}'."
            f"{suggest(function_name, known)}"
        )
    return function


def failure(error: Exception) -> str:
    """An error of the user's own code in one line, with its line there."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):  # it names file and line itself
        return message
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{message} ({Path(frame.filename).name}, line {frame.lineno})"
