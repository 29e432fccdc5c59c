"""A fold over tasks equals the fold in one process, whatever happens to the workers."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from codec_dist.cluster_runtime import ClusterError, Session, map_fold
from codec_dist.cluster_runtime.map_fold import tasks_on
from codec_dist.utils import CodecError

ITEMS = list(range(12))


def _load_folding():
    # Workers unpickle by value what they cannot import by name: the module is registered for that.
    import ray.cloudpickle

    path = Path(__file__).with_name("folding.py")
    spec = importlib.util.spec_from_file_location("cluster_runtime_folding", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    return module


folding = _load_folding()


def _serial():
    total = folding.trace(ITEMS[0])
    for item in ITEMS[1:]:
        total.merge(folding.trace(item))
    return total


@pytest.mark.ray
def test_fold_over_tasks_equals_the_serial_fold_bit_by_bit(ray_cluster: Session) -> None:
    result = map_fold(ITEMS, folding.trace)
    assert result.order == ITEMS
    assert result.total.tobytes() == _serial().total.tobytes()


@pytest.mark.ray
def test_tasks_have_the_threads_they_asked_for_and_no_gpu(ray_cluster: Session) -> None:
    assert map_fold([0], folding.trace, num_cpus=2).environment == ("2", "")


@pytest.mark.ray
def test_no_more_tasks_than_allowed_run_at_once(ray_cluster: Session, tmp_path: Path) -> None:
    result = map_fold(ITEMS, folding.RefuseCompany(tmp_path), at_once=1)
    assert result.total.tobytes() == _serial().total.tobytes()


@pytest.mark.ray
def test_fold_survives_a_killed_worker(ray_cluster: Session, tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    result = map_fold(ITEMS, folding.DieOnce(marker, item=5))
    assert marker.exists()
    assert result.order == ITEMS
    assert result.total.tobytes() == _serial().total.tobytes()


@pytest.mark.ray
def test_error_of_the_function_arrives_as_it_was(ray_cluster: Session) -> None:
    with pytest.raises(CodecError, match=r"^item 2 is bad: repair it$"):
        map_fold(ITEMS, folding.refuse)


@pytest.mark.ray
def test_any_error_of_the_function_arrives_in_its_own_words(ray_cluster: Session) -> None:
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file or directory: '/data/gone\.tar'$") as found:
        map_fold([0], folding.raise_own_error)
    assert found.value.filename == "/data/gone.tar"
    with pytest.raises(RuntimeError, match=r"^item 1 has no values$"):
        map_fold([1], folding.raise_own_error)


@pytest.mark.ray
def test_worker_that_always_dies_is_a_clear_error(ray_cluster: Session) -> None:
    with pytest.raises(ClusterError, match="lost 3 times"):
        map_fold([0], folding.die)


@pytest.mark.ray
def test_task_larger_than_the_cluster_is_refused(ray_cluster: Session) -> None:
    with pytest.raises(ClusterError, match=r"needs 64 CPUs .* CPUs is 4"):
        map_fold([0], folding.trace, num_cpus=64)


@pytest.mark.ray
def test_accumulator_is_writable_and_its_own(ray_cluster: Session) -> None:
    result = map_fold([3], folding.trace)
    result.total += np.float32(1)
    assert np.array_equal(result.total, folding.trace(3).total + np.float32(1))


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "expected"),
    [
        ({"CPU": 4.0, "memory": 1e9}, 1, 0, 4),
        ({"CPU": 4.0}, 8, 0, 0),  # two of these have eight, but no task can be on both
        ({"CPU": 4.0, "GPU": 2.0}, 1, 1, 2),
        ({"CPU": 4.0, "GPU": 2.0}, 8, 1, 0),
        ({"CPU": 64.0}, 1, 1, 0),
        ({"CPU": 3.0}, 0.5, 0, 6),
        ({}, 1, 0, 0),
    ],
)
def test_a_task_takes_place_on_one_node(resources: dict[str, float], cpus: float, gpus: float, expected: int) -> None:
    assert tasks_on(resources, cpus, gpus) == expected


def test_empty_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        map_fold([], folding.trace)
