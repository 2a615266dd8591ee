"""Submits a command of `moeplace` to a Ray cluster as a job, follows its output, and returns its outcome."""

import asyncio
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from moeplace.launch.on_ray.cluster import import_ray, packaged
from moeplace.profiling.errors import MoeplaceError

AGENT_WAIT = 60.0
"""Seconds that a cluster is given to have an agent for jobs: its dashboard answers some seconds earlier."""


def submit_job(
    command: Sequence[str],
    *,
    address: str | None,
    python: str,
    working_dir: str | None,
    cpus: float | None,
    gpus: float | None,
    ship: bool,
    wait: bool,
) -> int:
    """Run `python -m moeplace.launch.cli COMMAND` on the cluster.

    Args:
        address: of the dashboard, `http://HOST:8265`; None = $RAY_ADDRESS, or the cluster of this machine.
        python: interpreter on the cluster.
        working_dir: folder that is uploaded and in which the command starts.
        cpus: reserved for the command itself, which then may run on any node; None = it runs on the head.
        gpus: likewise.
        ship: upload this package; else the cluster must have it.
        wait: follow the output and return the outcome.

    Returns:
        0 = done (without `wait`: submitted), 1 = failed or stopped.

    Raises:
        InputError: Ray is not installed.
        MoeplaceError: there is no cluster, or it refuses the job.
    """
    import_ray()
    from ray.job_submission import JobStatus, JobSubmissionClient

    entrypoint = shlex.join([python, "-m", "moeplace.launch.cli", *command])
    with packaged(ship) as environment:
        if working_dir is not None:
            environment["working_dir"] = working_dir
        try:
            client = JobSubmissionClient(address)
            logging.getLogger("ray").setLevel(logging.WARNING)  # the client has just set it to say every upload
            job = when_agents_are_up(
                lambda: client.submit_job(
                    entrypoint=entrypoint,
                    runtime_env=environment,
                    entrypoint_num_cpus=cpus,
                    entrypoint_num_gpus=gpus,
                )
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = "here" if address is None else f"at {address}"
            reason = " ".join(str(error).split())[:200]
            needed = "its dashboard must run, and the port of its dashboard agent, 52365 by default, must be free"
            raise MoeplaceError(f"no Ray cluster {where} takes jobs ({needed}): {reason}") from error
    print(f"submitted {job}: {entrypoint}", file=sys.stderr, flush=True)
    if not wait:
        print(job)
        return 0
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"the job goes on; `ray job stop {job}` ends it", file=sys.stderr)
        raise
    status = client.get_job_status(job)
    if status != JobStatus.SUCCEEDED:
        print(f"moeplace: the job {job} ended as {status.value.lower()}", file=sys.stderr)
    return 0 if status == JobStatus.SUCCEEDED else 1


def when_agents_are_up(submit: Callable[[], str], wait: float = AGENT_WAIT, pause: float = 0.5) -> str:
    """What `submit` returns, tried again while Ray answers that no agent takes jobs yet.

    Args:
        wait: seconds until that answer is taken for final.
        pause: seconds between two tries.

    Raises:
        RuntimeError: every other refusal at once, and this one in the end.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            return submit()
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() >= deadline:
                raise
        time.sleep(pause)


async def _follow(client: Any, job: str) -> None:
    """Print what the job prints, until it ends."""
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)
