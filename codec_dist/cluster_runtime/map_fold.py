"""A fold over tasks: many items, one accumulator."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import ray

from codec_dist.cluster_runtime.errors import ClusterError
from codec_dist.cluster_runtime.losses import MEMORY, explain_loss
from codec_dist.cluster_runtime.slots import worker_environment
from codec_dist.utils import Progress

ATTEMPTS = 3
# Results that may wait for an earlier one to be merged, per CPU slot: bounds the memory that they hold.
WINDOW_PER_SLOT = 3
# What Ray raises where the process of a task is gone.
LOST_WORKERS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
)
# The same, and where a node went with the result that it held.
LOST = (*LOST_WORKERS, ray.exceptions.ObjectLostError)
MOST_SLOTS = 1024


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
    at_once: int | None = None,
    progress: Progress | None = None,
) -> Accumulator:
    """Apply ``function`` to every item in Ray tasks and merge the results in the order of the items.

    The result equals ``first = function(items[0]); first.merge(function(items[1])); ...`` bit by bit,
    whichever task ends first. Idle workers pull the next item. A task whose worker dies is run again, up to three
    times, and by itself where the node's memory was too small for it beside others. ``progress`` advances by one with
    each item.

    Args:
        items: at least one; each is sent to a worker, so prefer paths and numbers to arrays.
        function: runs in the worker with ``num_cpus`` threads; it must not depend on which one.
        num_cpus: CPUs of each task.
        num_gpus: GPUs of each task; without any, the task sees none.
        at_once: run at most so many tasks at the same time; default: as many as the cluster has room for.
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
    slots = _slots(num_cpus, num_gpus)
    window = WINDOW_PER_SLOT * slots if at_once is None else min(at_once, WINDOW_PER_SLOT * slots)
    task = ray.remote(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        # Lost tasks are run again here. Ray itself would do so for ever with those that it kills for memory.
        max_retries=0,
        runtime_env={"env_vars": worker_environment(num_cpus, num_gpus)},
    )(_apply)
    shared = ray.put(function)
    try:
        return _Fold(todo, lambda item: task.remote(shared, item), slots, window, progress).run()
    except ray.exceptions.RayTaskError as error:
        # The worker's own error, which callers know, rather than Ray's wrapping of it in a whole traceback.
        raise (error.cause if isinstance(error.cause, Exception) else error) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(_explain(error)) from error


class _Fold:
    """Tasks that run ahead of the merging of their results, which keeps the order of the items."""

    def __init__(
        self,
        items: Sequence[Any],
        start: Callable[[Any], "ray.ObjectRef"],
        slots: int,
        window: int,
        progress: Progress | None,
    ) -> None:
        self._items, self._start, self._slots, self._progress = items, start, slots, progress
        self._window = window
        # Tasks of the items from the first that is not merged yet.
        self._tasks: deque[ray.ObjectRef] = deque()
        self._finished: set[ray.ObjectRef] = set()
        self._losses = 0
        # Tasks that were shown as done, but have to be done once more.
        self._repeated = 0

    def run(self) -> Any:
        accumulator: Any = None
        merged = 0
        try:
            while merged < len(self._items):
                while len(self._tasks) < min(len(self._items) - merged, self._window):
                    self._tasks.append(self._start(self._items[merged + len(self._tasks)]))
                self._wait(1)
                while self._tasks and self._tasks[0] in self._finished:
                    try:
                        result = ray.get(self._tasks[0])
                    except LOST as error:
                        self._restart_first(self._items[merged], error)
                        continue
                    if accumulator is None:
                        # Arrays that Ray hands out are read-only: the one that grows must be our own.
                        accumulator = copy.deepcopy(result)
                    else:
                        accumulator.merge(result)
                    self._finished.discard(self._tasks.popleft())  # frees the result
                    merged, self._losses = merged + 1, 0
            return accumulator
        finally:
            for reference in self._tasks:
                ray.cancel(reference, force=True)

    def _wait(self, count: int) -> None:
        """Until so many of the tasks that run have ended."""
        running = [reference for reference in self._tasks if reference not in self._finished]
        ready, _ = ray.wait(running, num_returns=count)
        self._finished.update(ready)
        repeated = min(len(ready), self._repeated)
        self._repeated -= repeated
        if self._progress is not None:
            self._progress.advance(len(ready) - repeated)

    def _restart_first(self, item: Any, error: ray.exceptions.RayError) -> None:
        """Run the task that is to be merged next again; what was killed for memory by itself, and fewer afterwards."""
        self._losses += 1
        if self._losses == ATTEMPTS:
            raise error
        self._repeated += 1
        self._finished.discard(self._tasks.popleft())
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            self._window = max(1, min(self._window, self._slots) // 2)
            if others := sum(reference not in self._finished for reference in self._tasks):
                self._wait(others)
        self._tasks.appendleft(self._start(item))


def _apply(function: Callable[[Item], Accumulator], item: Item) -> Accumulator:
    return function(item)


def _explain(error: ray.exceptions.RayError) -> str:
    """Why a task could not be done, without the pages that Ray adds about processes and settings."""
    if not isinstance(error, LOST_WORKERS):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"Ray could not run a task: {lines[0] if lines else type(error).__name__}"
    loss = explain_loss(error)
    remedy = (
        ". Let fewer tasks share a node (fewer CPUs in `ray start --num-cpus`), or use nodes with more memory"
        if loss.cause == MEMORY
        else ""
    )
    return f"a worker was lost {ATTEMPTS} times: {loss.text}{remedy}"


def _slots(num_cpus: float, num_gpus: float) -> int:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = sum(tasks_on(node, num_cpus, num_gpus) for node in nodes)
    if slots < 1:
        cpus, gpus = (max((node.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU"))
        raise ClusterError(
            f"a task needs {num_cpus:g} CPUs and {num_gpus:g} GPUs of one node, but no node of the cluster has "
            f"them: the largest number of CPUs is {cpus:g}, and of GPUs {gpus:g}"
        )
    return min(slots, MOST_SLOTS)


def tasks_on(resources: Mapping[str, float], num_cpus: float, num_gpus: float) -> int:
    """How many tasks fit on a node with these resources at once; a task cannot be spread over nodes."""
    wanted = {"CPU": num_cpus, "GPU": num_gpus}
    return min((int(resources.get(name, 0) // each) for name, each in wanted.items() if each), default=MOST_SLOTS)
