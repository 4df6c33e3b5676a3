"""Several processes of one launch: each takes a share of the rows, and the first one writes.

Training steps share the examples of a batch. The teacher pass and evaluations share their rows: each
process takes a run of neighbours (:func:`share`), and what they found comes together in all of them
(:func:`gathered`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

from ia2.utils.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

# Processes wait for the longest share of a teacher pass, which may take hours.
_PATIENCE = timedelta(days=2)


def process_state(*, on_cpu: bool = False) -> PartialState:
    """This process among those of its launch; the first call connects them.

    Args:
        on_cpu: the model is to be on the CPU, where there may be an accelerator as well.

    Raises:
        ConfigError: several processes were launched, and they cannot be connected.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    count = _launched()
    if count == 1:
        return PartialState(cpu=asked)
    _take_over()
    # accelerate connects processes without an accelerator only where it is told that there is none
    cpu = asked or on_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    if state.num_processes == 1:
        raise ConfigError(
            f"{count} processes were launched, and on {state.device.type} they cannot work together. "
            "Start one, or give --device cpu."
        )
    return state


def shards_model() -> bool:
    """Whether this launch asks for a model in shards: FSDP2 or ZeRO-3 (see :mod:`ia2.models.sharding`)."""
    if _launched() > 1:
        process_state()
    return _shards


_shards = False


def _take_over() -> None:
    """Note what the launch says of sharding, and hide it from accelerate.

    accelerate would shard the model when training begins. Here it is sharded when it is loaded, and must not
    be sharded twice.

    Raises:
        ConfigError: what is asked for is not done here.
    """
    from accelerate.utils import parse_flag_from_env

    global _shards
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "FSDP 1 is not supported. Set fsdp_version: 2 in the configuration of accelerate."
            )
        offload, _shards = os.environ.get("FSDP_OFFLOAD_PARAMS", "false"), True
    elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        # without ZeRO-3 the frozen base is whole everywhere, as in DDP
        _shards = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    else:
        return
    if offload.lower() not in ("false", "none"):
        raise ConfigError(
            "weights are not offloaded to the CPU. Leave that out of the configuration of accelerate, or "
            "take `ia2 env --accelerate fsdp2`."
        )
    os.environ["ACCELERATE_USE_FSDP"] = os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"


def _launched() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def several() -> bool:
    """Whether this process is one of several of a launch."""
    return _launched() > 1


def number() -> int:
    """Of this process among those of its launch, from 0."""
    return 0 if _launched() == 1 else int(process_state().process_index)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return number() == 0


def wait() -> None:
    """All processes meet here."""
    if _launched() > 1:
        process_state().wait_for_everyone()


def shares(weights: Sequence[float], count: int) -> list[range]:
    """Cut items into runs of neighbours of about the same total weight.

    Neighbours stay together, since they may share what is computed. An item belongs where the middle of
    its weight falls, so a share is off by at most half an item at either end.

    Args:
        weights: of n items; none negative.
        count: of shares.

    Returns:
        ``count`` ranges, one behind the other, which hold all n items; some are empty if there are few.

    Example:
        >>> shares([1, 1, 1, 3], 2)
        [range(0, 3), range(3, 4)]
    """
    total = sum(weights)
    ends = list(accumulate(weights))
    if not total:
        weights, ends, total = [1] * len(ends), list(range(1, len(ends) + 1)), len(ends)
    owners = [
        min(count - 1, int(count * (end - weight / 2) / total))
        for end, weight in zip(ends, weights, strict=True)
    ]
    bounds = [sum(owner < k for owner in owners) for k in range(count + 1)]
    return [range(bounds[k], bounds[k + 1]) for k in range(count)]


def share(count: int, weight: Callable[[int], float]) -> range:
    """The items that this process works on; all of them where it is alone (see :func:`shares`).

    Args:
        count: of items.
        weight: of each; not asked for where there is one process.
    """
    if _launched() == 1:
        return range(count)
    return shares([weight(i) for i in range(count)], process_state().num_processes)[number()]


def gathered(mine: T) -> list[T]:
    """What every process has, in the order of the processes; all of them must ask for it.

    It goes from one host's memory to the other's, whatever device the models are on.
    """
    if _launched() == 1:
        return [mine]
    import torch.distributed as dist

    found: list[Any] = [None] * process_state().num_processes
    dist.all_gather_object(found, mine, group=host_group())
    return found


def joined(mine: list[T]) -> list[T]:
    """The items of all shares as one list, in the order of :func:`shares`."""
    return [item for part in gathered(mine) for item in part]


_groups: dict[Any, Any] = {}


def host_group() -> Any:
    """All processes, connected through their hosts' memory; made when they first ask for it."""
    import torch.distributed as dist

    process_state()
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()
        _groups[world] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _groups[world]


def first_then_all(work: Callable[[], T]) -> T:
    """Run ``work`` in the first process, then in the others, which find its files."""
    if is_first():
        try:
            result = work()
        finally:
            wait()
        return result
    wait()
    return work()
