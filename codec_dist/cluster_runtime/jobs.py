"""Sending commands and stages to a cluster through Ray's Jobs API."""

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from codec_dist.cluster_runtime.errors import ClusterError
from codec_dist.cluster_runtime.session import check_jobs_server_answers

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Variables that would silently send the job elsewhere than to the address that was asked for.
ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
# Neither secrets nor bulk travel with a job.
EXCLUDED = [".git", ".venv", "__pycache__", "wandb", ".env", ".netrc", "*.pem", "*.key"]
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class JobOutcome:
    """What became of a job: ``status`` is Ray's (SUCCEEDED, FAILED, STOPPED; RUNNING or PENDING if not followed)."""

    job_id: str
    status: str
    message: str

    @property
    def succeeded(self) -> bool:
        """Whether the command ended with exit code 0."""
        return self.status == "SUCCEEDED"


def submit_job(
    address: str,
    stage: str,
    config_path: Path | str,
    overrides: Sequence[str] = (),
    *,
    working_dir: Path | str,
    follow: bool = True,
    write: Callable[[str], object] | None = None,
    python: str = "python",
) -> JobOutcome:
    """Run ``python -m codec_dist STAGE CONFIG`` on a cluster, joined to its Ray, and follow its log.

    Data and run directory must be reachable from the cluster's nodes under the paths in the config.

    Args:
        address: URL of the dashboard, ``http://HOST:8265``. ``RAY_ADDRESS`` does not override it.
        stage: name of the command, such as ``extract`` or ``run``.
        config_path: the config, inside ``working_dir`` (or an absolute path that the nodes can read).
        overrides: words such as ``--attribution.microbatch 32``.
        working_dir: folder that is sent along and in which the command runs.
        follow: wait for the end and pass the log to ``write``; interrupted, the job goes on.
        write: takes pieces of the log; default: standard output.
        python: the interpreter on the cluster's nodes.

    Raises:
        ClusterError: no jobs server answers, it refuses the job, the config is not in the folder, or the
            job is no longer followed (the connection was lost, or Ctrl-C) and runs on.
    """
    folder = Path(working_dir).resolve()
    config = (folder / config_path).resolve()
    if config.is_relative_to(folder):
        if not config.is_file():
            raise ClusterError(f"the config {config_path} is not in the folder {working_dir} that goes with the job")
        config = config.relative_to(folder)
    command = [python, "-m", "codec_dist", stage, str(config), *overrides, "--cluster.address", "auto"]
    return submit_command(address, command, working_dir=folder, follow=follow, write=write)


def submit_command(
    address: str,
    command: Sequence[str],
    *,
    working_dir: Path | str | None = None,
    follow: bool = True,
    write: Callable[[str], object] | None = None,
) -> JobOutcome:
    """Run any command as a Ray job. Arguments as for :func:`submit_job`.

    The environment of this process is not passed on: a secret that the job needs (an API key of W&B)
    belongs into the environment of the cluster's nodes, since Ray shows a job's settings to everyone.

    Raises:
        ClusterError: no jobs server answers, it refuses the job, or the job is no longer followed (the
            connection was lost, or Ctrl-C) and runs on.
    """
    url = check_jobs_server_answers(address)
    client = _client(url)
    runtime_env = {} if working_dir is None else {"working_dir": str(working_dir), "excludes": EXCLUDED}
    try:
        job_id = client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env)
    except (RuntimeError, OSError, ValueError) as error:
        raise ClusterError(f"the cluster at {address} refused the job: {' '.join(str(error).split())}") from error
    with _job_outlives_its_follower(job_id, url):
        if follow:
            _follow(client, job_id, write or _to_standard_output)
        info = client.get_job_info(job_id)
    # Ray appends the log, which was followed already, to the cause.
    cause = (info.message or "").partition(", last available logs")[0]
    return JobOutcome(job_id, str(info.status.value), " ".join(cause.split()))


def _client(url: str) -> "JobSubmissionClient":
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # The client reports every stream that it closes.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        with _without_variables(ADDRESS_VARIABLES):
            return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster at {url} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) to the cluster's"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray jobs server answers at {url}: {' '.join(str(error).split())}") from error


@contextmanager
def _job_outlives_its_follower(job_id: str, url: str) -> Iterator[None]:
    """Say that the job runs on, and how to reach it, when following it ends early."""
    import aiohttp

    look, stop = (f"`ray job {verb} {job_id} --address {url}`" for verb in ("logs", "stop"))
    try:
        yield
    except KeyboardInterrupt as error:
        raise ClusterError(f"interrupted, but job {job_id} runs on: {look} shows its log, {stop} ends it") from error
    except BrokenPipeError:
        raise  # the reader of the log left; broken connections come as other errors
    except (RuntimeError, OSError, ValueError, aiohttp.ClientError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(
            f"lost the connection to {url} ({reason}), but job {job_id} runs on there: {look} shows its log, "
            f"{stop} ends it"
        ) from error


def _follow(client: "JobSubmissionClient", job_id: str, write: Callable[[str], object]) -> None:
    """Pass on the log until the job has ended. A stream that breaks is taken up where it was."""
    written = 0
    while True:
        written = asyncio.run(_pass_on(client, job_id, write, written))
        if client.get_job_status(job_id).is_terminal():
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


async def _pass_on(client: "JobSubmissionClient", job_id: str, write: Callable[[str], object], skip: int) -> int:
    """Write what the log holds beyond its first ``skip`` characters; the number of characters seen."""
    seen = 0
    async for piece in client.tail_job_logs(job_id):
        fresh = piece[max(0, skip - seen) :]
        seen += len(piece)
        if fresh:
            write(fresh)
    return max(seen, skip)


def _to_standard_output(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _without_variables(names: Sequence[str]) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
