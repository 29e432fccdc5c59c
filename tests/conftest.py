"""What every test shares: shapes and types are checked at run time, and nothing reaches out."""

import os
import sys
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.pop("RAY_ADDRESS", None)

from jaxtyping import install_import_hook

# Before any of these rooms is imported: their public annotations are enforced in every test.
TYPED_ROOMS = ("attribution", "sae", "statistics", "modes", "interventions", "visualization", "models")
install_import_hook([f"codec_dist.{room}" for room in TYPED_ROOMS], "beartype.beartype")

sys.path.insert(0, str(Path(__file__).parent))

pytest_plugins = ["ray_fixture"]
