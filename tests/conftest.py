"""What every test shares: shapes and types are checked at run time, and nothing reaches out."""

import os
import sys
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.pop("RAY_ADDRESS", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes share the cores; threads that wait for each other in each of them would only take turns.
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Before any of these rooms is imported: their public annotations are enforced in every test.
TYPED_ROOMS = ("attribution", "sae", "statistics", "modes", "interventions", "visualization", "models")
install_import_hook([f"codec_dist.{room}" for room in TYPED_ROOMS], "beartype.beartype")

sys.path.insert(0, str(Path(__file__).parent))

pytest_plugins = ["ray_fixture"]

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several test processes: a file's tests share one, and so do all that need Ray, which goes first.

    So each file's fixtures are made once, and one Ray cluster serves the whole session.
    """
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        on_ray = item.get_closest_marker("ray") is not None
        item.add_marker(pytest.mark.xdist_group("ray" if on_ray else item.location[0]))
