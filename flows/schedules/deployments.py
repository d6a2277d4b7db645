"""Schedules as Prefect's own page shows them: a deployment each, with its schedule and its runs.

What is run when is decided by `flows.schedules.timing`; here that is told to Prefect, and what people ask for on its
page is learned. Errors are Prefect's and httpx' own.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, DeploymentFilterTags
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Cron, Interval
from prefect.states import Cancelled, Crashed, Failed, Scheduled

from flows.batch import batch
from flows.jobs import save_job
from flows.schedules.files import Schedule
from flows.schedules.timing import next_due

TAG: Final = "scanscribe"
BY_SCHEDULE: Final = "by-schedule"  # a run that Prefect did not foresee, and that no person asked for
_SAME_S: Final = 1.0  # two times that are the same


@dataclass(frozen=True, slots=True)
class Due:
    """A run that Prefect has for a time that has come."""

    id: UUID
    due: float
    asked: bool  # by a person, not by the schedule


def put(schedule: Schedule, now: float) -> UUID:
    """Make or change the deployment of a schedule."""
    timing = schedule.timing
    if timing.cron is not None:
        when: Any = Cron(timing.cron, timezone=timing.zone)
    else:
        assert timing.every_s is not None
        # Prefect's daily intervals are right until clocks change; it is told anew at each start.
        anchor = datetime.fromtimestamp(next_due(timing, now), UTC)
        when = Interval(timedelta(seconds=timing.every_s), anchor_date=anchor, timezone=timing.zone)
    rules = [f"overlap: {timing.overlap}", f"catch-up: {timing.catch_up}"]
    rules += [f"only within {timing.window}"] if timing.window else []
    deployment: Any = batch.to_deployment(
        name=schedule.name,
        schedules=[when],
        parameters={"job": save_job(schedule.job)},
        description=f"{timing.words} ({timing.zone}); {'; '.join(rules)}. `scanscribe schedule serve` starts the runs.",
        tags=[TAG],
        paused=schedule.paused,
    )
    return UUID(str(deployment.apply()))


def is_paused(deployment: UUID) -> bool:
    """Whether it is, as people can change on Prefect's page."""
    with get_client(sync_client=True) as client:
        return bool(client.read_deployment(deployment).paused)


def due(deployment: UUID, now: float) -> list[Due]:
    """The runs whose time has come and that nobody has started."""
    with get_client(sync_client=True) as client:
        runs = client.get_scheduled_flow_runs_for_deployments(
            [deployment], scheduled_before=datetime.fromtimestamp(now, UTC)
        )
    return [
        Due(
            run.id,
            run.expected_start_time.timestamp() if run.expected_start_time else now,
            not run.auto_scheduled and BY_SCHEDULE not in run.tags,
        )
        for run in runs
    ]


def run_of(deployment: UUID, time: float, known: list[Due]) -> UUID:
    """The run that is due at `time`: the one that Prefect has, or a new one."""
    for each in known:
        if abs(each.due - time) < _SAME_S:
            return each.id
    with get_client(sync_client=True) as client:
        when: Any = Scheduled(scheduled_time=datetime.fromtimestamp(time, UTC))
        try:
            return client.create_flow_run_from_deployment(deployment, state=when, tags=[BY_SCHEDULE]).id
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.NOT_FOUND:
                raise ObjectNotFound(error) from error
            raise


def cancel(flow_run: UUID, why: str) -> None:
    """Say of a run that it does not start, or was stopped."""
    _end(flow_run, Cancelled(message=why))


def crash(flow_run: UUID, why: str) -> None:
    """Say of a run that its process is gone."""
    _end(flow_run, Crashed(message=why))


def fail(flow_run: UUID, why: str) -> None:
    """Say of a run that it failed, where it has not said so itself: its process ended before, or without, its flow."""
    with contextlib.suppress(ObjectNotFound), get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run).state
        if state is None or not state.is_final():
            client.set_flow_run_state(flow_run, Failed(message=why), force=True)


def _end(flow_run: UUID, state: Any) -> None:
    # People can delete runs on Prefect's page, and of those nothing is to be said.
    with contextlib.suppress(ObjectNotFound), get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run, state, force=True)


def remove_others(names: set[str]) -> None:
    """Delete the deployments of schedules that are no more."""
    with get_client(sync_client=True) as client:
        mine = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]), name=DeploymentFilterName())
        for deployment in client.read_deployments(deployment_filter=mine):
            if deployment.name not in names:
                try:
                    client.delete_deployment(deployment.id)
                except ObjectNotFound:
                    continue
