"""What every test shares: shapes and types are checked at run time, and nothing reaches out."""

import functools
import os
import signal
import sys
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.pop("RAY_ADDRESS", None)
# Ray's workers would give way to the other test process, which computes, and most of the time is theirs.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - it is read so
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so; the programs under test are to be interruptible in any case.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes share the cores; threads that wait for each other in each of them would only take turns.
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
from jaxtyping import install_import_hook
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# Before any of these packages is imported: their public annotations are enforced in every test.
TYPED_PACKAGES = ("attribution", "sae", "statistics", "modes", "interventions", "visualization", "models")
install_import_hook([f"codec_dist.{package}" for package in TYPED_PACKAGES], "beartype.beartype")

sys.path.insert(0, str(Path(__file__).parent))

pytest_plugins = ["ray_fixture"]

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need Ray go first: they take the longest, and most of it is waiting."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """With several test processes: a file's tests share one, and so do all files that need Ray.

    So each file's fixtures are made once, and one Ray cluster serves the whole session.
    """
    return _RayTogether(config, log)


class _RayTogether(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if _needs_ray(self.config.rootpath / file) else file


@functools.cache
def _needs_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text(encoding="utf-8")
