"""YAML of settings, as it is written: nothing there twice, and label words that stay words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ia2.utils.wording import one_line, quoted

if TYPE_CHECKING:
    from yaml import MappingNode, Node

# Settings that hold words: what stands in them is a text, whatever YAML would make of it.
_WORDS = ("labels", "label_map", "verbalisers")

# Octal (010 is 8) and sexagesimal (1:30 is 90).
_ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[0-9_]+(:[0-9]+)+)")

_PREFIX = "tag:yaml.org,2002:"
_TEXT = _PREFIX + "str"
_TYPED = tuple(_PREFIX + name for name in ("int", "float", "bool", "timestamp"))


def load_yaml(text: str) -> Any:
    """The values of one YAML document.

    A key is the text that is written, so ``0: negative`` is the key ``"0"`` and ``01`` another. The same
    holds for everything under ``labels``, ``label_map`` and ``verbalisers``. ``yes``, ``no``, ``on`` and
    ``off`` without quotation marks are refused there: other readers of the file take them for true and false.

    Raises:
        ValueError: it is no YAML, a key is there twice, or a word needs quotation marks. One line.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, False, set())
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {one_line(error)}") from None
    except RecursionError:
        raise ValueError("not YAML of settings: it is nested too deep") from None
    try:
        return loader.construct_document(node)
    except Exception as error:  # its own, and whatever the makers of dates and numbers raise
        raise ValueError(f"not YAML: {one_line(error)}") from None


def _check(node: Node, words: bool, seen: set[tuple[int, bool]]) -> None:
    """Settle what scalars are texts; ``words`` says that all of them are."""
    import yaml

    if (id(node), words) in seen:  # an alias may even hold itself
        return
    seen.add((id(node), words))
    if isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            _check(inner, words, seen)
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        for key, value in node.value:
            # Keys of a mapping of settings are their names; those of words are labels.
            if key.tag != _PREFIX + "merge":
                _as_text(key)
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            _check(value, words or name in _WORDS, seen)
    elif words:
        _as_text(node)
    elif node.tag == _PREFIX + "int" and _ODD_NUMBER.fullmatch(node.value):
        raise ValueError(
            f"line {node.start_mark.line + 1}: {quoted(node.value)} is another number to YAML than it seems; "
            "write it without the zero before it or the colon, or a text in quotation marks"
        )


def _check_keys(node: MappingNode) -> None:
    seen: dict[Any, int] = {}
    for key, _ in node.value:
        if not isinstance(key.value, str):
            continue
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ValueError(
                f"line {line}: the key {quoted(key.value)} is there twice, in line {seen[key.value]} too"
            )
        seen[key.value] = line


def _as_text(node: Node | Any) -> None:
    if node.tag not in _TYPED or not isinstance(node.value, str):
        return
    if node.tag == _PREFIX + "bool" and node.value.lower() not in ("true", "false"):
        meaning = node.value.lower() in ("yes", "on")
        raise ValueError(
            f"line {node.start_mark.line + 1}: YAML takes {node.value} without quotation marks for "
            f"{str(meaning).lower()}; write '{node.value}'"
        )
    node.tag = _TEXT
