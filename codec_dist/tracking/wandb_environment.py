"""Which of W&B's environment variables are heeded: those that say how to reach it, not those that say what a run is.

The config says what a run is called and where it goes, and every stage is a run of its own; a WANDB_RUN_ID or
WANDB_PROJECT that another program has left in the environment is not for these. The one exception is the agent of
a sweep, which starts a command for one run of the sweep: that run is the training.
"""

import os
import secrets
import string
from pathlib import Path

from codec_dist.config import TrackingSection

SWEEP_STAGE = "train"
# What an agent of a sweep sets for the command that it starts.
SWEEP = (
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
    "WANDB_RUN_ID",
    "WANDB_PROJECT",
    "WANDB_ENTITY",
)
# Servers, credentials, places of W&B's own files, patience, and who it is that runs.
HEEDED = {
    "WANDB_API_KEY",
    "WANDB_APP_URL",
    "WANDB_ARTIFACT_DIR",
    "WANDB_BASE_URL",
    "WANDB_CACHE_DIR",
    "WANDB_CONFIG_DIR",
    "WANDB_CORE_DEBUG",
    "WANDB_CREDENTIALS_FILE",
    "WANDB_DATA_DIR",
    "WANDB_DEBUG",
    "WANDB_ERROR_REPORTING",
    "WANDB_FILE_PUSHER_TIMEOUT",
    "WANDB_HTTP_PROXY",
    "WANDB_HTTP_TIMEOUT",
    "WANDB_HTTPS_PROXY",
    "WANDB_IDENTITY_TOKEN_FILE",
    "WANDB_INIT_TIMEOUT",
    "WANDB_INSECURE_DISABLE_SSL",
    "WANDB_NOTES",
    "WANDB_SERVICE",
    "WANDB_USERNAME",
    "WANDB_USER_EMAIL",
}


def wandb_environment(directory: Path, section: TrackingSection, *, in_sweep: bool = False) -> dict[str, str | None]:
    """The variables of W&B for the length of a run: set, or (None) not there.

    Args:
        directory: the run's folder.
        section: mode and entity.
        in_sweep: whether this is the run that the agent of a sweep has asked for.
    """
    heeded = HEEDED | ({"WANDB_ENTITY"} if section.entity is None else set()) | (set(SWEEP) if in_sweep else set())
    # Those that begin with WANDB_X_ or WANDB__ are for experts, who know why they set them.
    values: dict[str, str | None] = {
        name: None
        for name in os.environ
        if name.startswith("WANDB_") and not name.startswith(("WANDB_X_", "WANDB__")) and name not in heeded
    }
    values |= {"WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true"}
    if section.mode == "offline":
        folder = directory.resolve() / "wandb"
        values |= {
            # Beside `init(mode="offline")`: without these two, W&B reports about itself when Python exits.
            "WANDB_MODE": "offline",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_DATA_DIR": str(folder / "data"),
            "WANDB_CACHE_DIR": str(folder / "cache"),
        }
    return values


def sweep_environment() -> dict[str, str]:
    """What the agent of a sweep has set for this command; empty without one. For the process that trains."""
    if not (os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")):
        return {}
    return {name: os.environ[name] for name in SWEEP if name in os.environ}


def generate_id() -> str:
    """A new id of a run, in W&B's form."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
