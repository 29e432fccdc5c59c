"""Reading ahead in threads, in order and in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Result],
    *,
    budget: int,
    threads: int,
    weight: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Result]:
    """``read(item)`` of each item in order, read in threads while the caller works on earlier ones.

    Results in the caller's hands (the one given last), waiting and being read weigh at most ``budget`` together,
    or as much as the one in hand and the next, if that is more.
    """
    left = deque(items)
    waiting: deque[tuple[int, Future[Result]]] = deque()
    held = in_hand = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="store-reader") as pool:
        try:
            while left or waiting:
                while left and (not waiting or held + weight(left[0]) <= budget):
                    item = left.popleft()
                    held += weight(item)
                    waiting.append((weight(item), pool.submit(read, item)))
                taken, future = waiting.popleft()
                result = future.result()
                del future
                yield result
                # The caller let go of the one before when it took this one.
                del result
                held -= in_hand
                in_hand = taken
        finally:
            for _, future in waiting:
                future.cancel()
