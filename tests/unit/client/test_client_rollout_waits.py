"""When a wait for a revision is over, and what a plan says."""

from __future__ import annotations

import pytest

from dure.client.cli.plan import effect
from dure.client.notation import parse_steps
from dure.client.waiting import judge, rollout_summary
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import Endpoint


def endpoint(revision: int = 2, *replicas: int, **rollout: object) -> Endpoint:
    """HEALTHY, with replicas of these revisions; with a rollout if anything is said of one."""
    item = Endpoint(name="projects/p/endpoints/e", status=endpoint_pb2.ENDPOINT_STATUS_HEALTHY)
    item.revision, item.ready_replicas, item.desired_replicas = revision, 2, 2
    for number in replicas or (revision, revision):
        item.replicas.add(revision=number, status=endpoint_pb2.REPLICA_STATUS_HEALTHY)
    if rollout:
        item.status = endpoint_pb2.ENDPOINT_STATUS_UPDATING
        item.rollout.MergeFrom(endpoint_pb2.Rollout(**rollout))  # type: ignore[arg-type]
    return item


@pytest.mark.parametrize(
    ("item", "wanted", "done", "reason"),
    [
        (endpoint(), None, True, ""),
        (endpoint(), 2, True, ""),
        (endpoint(2, 1, 2), 2, False, ""),
        (endpoint(2, 1, 1), None, True, ""),
        (endpoint(1), 2, False, "ROLLED_BACK"),
        (endpoint(2, to_revision=2), 2, False, ""),
        (endpoint(2, to_revision=2), None, False, ""),
        (endpoint(2, to_revision=2, waits=True), 2, True, ""),
        (endpoint(2, to_revision=2, waits=True), None, False, "ROLLOUT_WAITS"),
        (endpoint(2, to_revision=2, paused=True, detail="why"), 2, False, "ROLLOUT_PAUSED"),
    ],
)
def test_when_a_wait_for_a_revision_is_over(
    item: Endpoint, wanted: int | None, done: bool, reason: str
) -> None:
    verdict = judge(item, wanted)
    assert (verdict.done, verdict.reason if verdict.failed else "") == (done, reason)


def test_a_stopped_endpoint_waits_for_no_rollout() -> None:
    item = endpoint(2, to_revision=2)
    item.status = endpoint_pb2.ENDPOINT_STATUS_STOPPED
    del item.replicas[:]
    assert judge(item, 2).done


def test_rollouts_in_a_line() -> None:
    item = endpoint(3, from_revision=2, to_revision=3, weight=10, waits=True)
    item.rollout.strategy = endpoint_pb2.ROLLOUT_STRATEGY_BLUE_GREEN
    assert (
        rollout_summary(item.rollout)
        == "revision 2 -> 3, blue-green, 10% of the requests, waits to be promoted"
    )


def test_what_a_plan_says() -> None:
    before, after = endpoint(1), endpoint(1)
    assert effect(before, after) == "nothing to change"
    assert effect(None, after) == "a new endpoint with 0 replicas"
    after.replica_count = 3
    assert effect(before, after) == "no new revision; replicas 0 -> 3"
    after.replica_count, after.revision = 0, 2
    assert effect(before, after).startswith("the files of the model changed; makes revision 2; replicas are")
    after.environ["A"] = "b"
    after.rollout_policy.max_surge = "50%"
    assert effect(before, after) == (
        "makes revision 2; replicas are replaced with at most 50% more and 0 fewer meanwhile"
    )
    after.rollout_policy.strategy = endpoint_pb2.ROLLOUT_STRATEGY_CANARY
    after.rollout_policy.steps.extend(parse_steps("5:1m,50"))
    assert effect(before, after).endswith(
        "it gets 5% (for 60s), then 50% (until it is promoted) of the requests, then all"
    )
    after.rollout_policy.strategy = endpoint_pb2.ROLLOUT_STRATEGY_BLUE_GREEN
    assert "as many new replicas start" in effect(before, after)
    before.desired_replicas = 0
    assert effect(before, after).endswith("it is started once replicas are wanted")
