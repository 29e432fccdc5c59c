"""A stage as a Ray job on a cluster."""

import shutil
import tempfile
from pathlib import Path

from codec_dist.cluster_runtime import JobOutcome, submit_job
from codec_dist.config import Config, save_config
from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.stages import check_choices

NOT_SENT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "wandb", "runs", "*.zarr", "*.tar")


def submit_stage(
    stage: str, config: Config, address: str, *, code: Path | None = None, wait: bool = True
) -> JobOutcome:
    """Run a stage (or ``run``, all of them) on a cluster whose nodes reach the config's paths.

    The resolved config travels with the job, so the cluster needs no copy of the file.

    Args:
        stage: name of the command.
        config: the resolved config.
        address: URL of the cluster's job server.
        code: folder with the user's own modules (for ``module:`` models), sent along.
        wait: follow the job's log until it ends; else return once it is accepted.

    Raises:
        PipelineError: ``code`` is no folder.
        ClusterError: nothing answers at the address, or the job is refused.
    """
    check_choices(config)
    with tempfile.TemporaryDirectory(prefix="codec_dist-job-") as folder:
        sent = Path(folder) / "job"
        if code is None:
            sent.mkdir()
        elif not code.is_dir():
            raise PipelineError(f"the folder {code} that is to go with the job does not exist")
        else:
            shutil.copytree(code, sent, ignore=NOT_SENT)
        name = "codec_dist_config.yaml"
        # It is the job's own input: without them its nodes could not read what the config names.
        save_config(config, sent / name, with_credentials=True)
        return submit_job(address, stage, name, working_dir=sent, follow=wait)
