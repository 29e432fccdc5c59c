"""A fold over tasks: many items, one accumulator."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import ray

from codec_dist.cluster_runtime.errors import ClusterError
from codec_dist.cluster_runtime.slots import worker_environment
from codec_dist.utils import Progress

ATTEMPTS = 3
# Results that may wait for an earlier one to be merged, per CPU slot: bounds the memory that they hold.
WINDOW_PER_SLOT = 3


class Mergeable(Protocol):
    """An accumulator that takes in another of its kind, in place."""

    def merge(self, other: Any, /) -> Any:
        """Take in ``other``."""


Item = TypeVar("Item")
Accumulator = TypeVar("Accumulator", bound=Mergeable)


def map_fold(
    items: Iterable[Item],
    function: Callable[[Item], Accumulator],
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
    progress: Progress | None = None,
) -> Accumulator:
    """Apply ``function`` to every item in Ray tasks and merge the results in the order of the items.

    The result equals ``first = function(items[0]); first.merge(function(items[1])); ...`` bit by bit,
    whichever task ends first. Idle workers pull the next item; a task whose worker dies is run again,
    up to three times. ``progress`` advances by one with each item.

    Args:
        items: at least one; each is sent to a worker, so prefer paths and numbers to arrays.
        function: runs in the worker with ``num_cpus`` threads; it must not depend on which one.
        num_cpus: CPUs of each task.
        num_gpus: GPUs of each task; without any, the task sees none.
        progress: shown to the person who waits.

    Raises:
        ClusterError: no session is open, the cluster has no room, or a worker died too often.
        Exception: whatever ``function`` raises.
    """
    todo = list(items)
    if not todo:
        raise ValueError("map_fold needs at least one item")
    if not ray.is_initialized():
        raise ClusterError("no Ray session is open: call map_fold inside `with ray_session(...)`")
    window = WINDOW_PER_SLOT * _slots(num_cpus, num_gpus)
    task = ray.remote(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_retries=ATTEMPTS - 1,
        runtime_env={"env_vars": worker_environment(num_cpus, num_gpus)},
    )(_apply)
    shared = ray.put(function)
    try:
        return _fold_in_order(todo, lambda item: task.remote(shared, item), window, progress)
    except ray.exceptions.RayTaskError as error:
        # The worker's own error, which callers know, rather than Ray's wrapping of it in a whole traceback.
        raise (error.cause if isinstance(error.cause, Exception) else error) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a worker was lost {ATTEMPTS} times: {' '.join(str(error).split())}") from error


def _fold_in_order(
    items: Sequence[Item], start: Callable[[Item], "ray.ObjectRef"], window: int, progress: Progress | None
) -> Any:
    started: list[ray.ObjectRef] = []
    finished: set[ray.ObjectRef] = set()
    accumulator: Any = None
    merged = 0
    try:
        while merged < len(items):
            while len(started) < min(len(items), merged + window):
                started.append(start(items[len(started)]))
            running = [reference for reference in started[merged:] if reference not in finished]
            ready, _ = ray.wait(running, num_returns=1)
            finished.update(ready)
            if progress is not None:
                progress.advance(len(ready))
            while merged < len(started) and started[merged] in finished:
                result = ray.get(started[merged])
                if accumulator is None:
                    # Arrays that Ray hands out are read-only: the one that grows must be our own.
                    accumulator = copy.deepcopy(result)
                else:
                    accumulator.merge(result)
                finished.discard(started[merged])
                started[merged] = None  # frees the result
                merged += 1
        return accumulator
    finally:
        for reference in started[merged:]:
            ray.cancel(reference, force=True)


def _apply(function: Callable[[Item], Accumulator], item: Item) -> Accumulator:
    return function(item)


def _slots(num_cpus: float, num_gpus: float) -> int:
    total = ray.cluster_resources()
    by_cpus = total.get("CPU", 0) / num_cpus if num_cpus else float("inf")
    by_gpus = total.get("GPU", 0) / num_gpus if num_gpus else float("inf")
    slots = min(by_cpus, by_gpus)
    if slots < 1:
        raise ClusterError(
            f"a task needs {num_cpus:g} CPUs and {num_gpus:g} GPUs, but the cluster has {total.get('CPU', 0):g} "
            f"and {total.get('GPU', 0):g}"
        )
    return int(min(slots, 1024))
