"""Which layers are aligned: every way to say it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.families import HYBRIDS, attention_layers
from hypothesis import given
from hypothesis import strategies as st

from ia2.models.capture import ActivationCapture
from ia2.teacher.layer_choice import choose_layers, layer_shift
from ia2.utils.errors import ConfigError


def named(count: int) -> dict[int, str]:
    return {i: f"model.layers.{i}.self_attn" for i in range(count)}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", list(range(12))),
        ("first-third", [0, 1, 2, 3]),
        ("middle-third", [4, 5, 6, 7]),
        ("last-third", [8, 9, 10, 11]),
        (" 11 , 3,3", [3, 11]),
        ([6, 0, 6], [0, 6]),
        ("model.layers.1?.self_attn", [10, 11]),
        ("model.layers.1?", [10, 11]),
        ("*.7.*", [7]),
        ("model.layers.4.self_attn", [4]),
    ],
)
def test_choices(choice: str | list[int], expected: list[int]) -> None:
    assert choose_layers(choice, named(12), lambda: pytest.fail("the teacher was asked")) == expected


@given(count=st.integers(3, 80))
def test_thirds_are_a_partition_into_parts_as_equal_as_can_be(count: int) -> None:
    parts = [choose_layers(f"{part}-third", named(count)) for part in ("first", "middle", "last")]
    assert [layer for part in parts for layer in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes[0] == sizes[2]


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4])])
def test_top_k(k: int, expected: list[int]) -> None:
    """A tie goes to the earlier layer."""
    assert choose_layers(f"top-{k}", named(5), lambda: [0.2, 0.9, 0.1, 0.9, 0.5]) == expected


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_layers_of_a_hybrid_are_those_with_attention(name: str) -> None:
    names = dict(ActivationCapture(HYBRIDS[name]()))
    first, last = attention_layers(name)
    assert choose_layers("all", names) == [first, last]
    assert choose_layers("top-1", names, lambda: [1.0, 2.0]) == [last]
    assert choose_layers(f"model.layers.{first}.*", names) == [first]
    with pytest.raises(ConfigError, match=rf"layers: 0 not among .* There are {first}, {last}"):
        choose_layers("0", names)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("3,4,5", "layers: 4, 5 not among those with attention. There are 0, 1, 2, 3."),
        ("-1", "layers: -1 not among"),
        ([], "the list is empty"),
        ("model.layer.*", r"the glob 'model.layer.\*' matches no attention module.*model.layers.0.self_attn"),
        ("top-0", "top-0 is not possible; K is 1 to 4"),
        ("top-5", "top-5 is not possible; K is 1 to 4"),
        ("top-2", "needs the layers' shift under ICL"),
        ("first-quarter", "'first-quarter' is none of all, first-third"),
        ("0-3", "'0-3' is none of"),
        ("", "'' is none of"),
    ],
)
def test_refused(choice: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_layers(choice, named(4))


def test_shift_is_relative_and_the_mean_over_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    icl, base = ([torch.randn(3, g, 8, generator=generator) for g in (1, 4, 2)] for _ in range(2))
    expected = [
        sum(float((a[i] - b[i]).norm() ** 2 / a[i].norm() ** 2) for a, b in zip(icl, base, strict=True)) / 3
        for i in range(3)
    ]
    # neither the size of a layer's activations nor the dtype matters
    scales = torch.tensor([1.0, 100.0, 1e-4])[:, None, None]
    assert layer_shift([a * scales for a in icl], [b * scales for b in base]) == pytest.approx(
        expected, rel=1e-5
    )
    half = layer_shift([a.bfloat16() for a in icl], [b.bfloat16() for b in base])
    assert half == pytest.approx(expected, rel=0.02)
    silent = torch.zeros(2, 2, 4)
    assert layer_shift([silent], [silent.clone()]) == [0.0, 0.0] and layer_shift([], []) == []
