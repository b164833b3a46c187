"""Masks, and what is told of a change."""

import pytest
from google.protobuf import json_format

from dure.manager.changes import apply_mask, canonical, describe_changes
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import Endpoint, ExtraMount, RolloutPolicy, ServiceOverride, StartCommand
from dure.wire.errors import InvalidInput

CURRENT = Endpoint(
    model="m",
    runtime="custom",
    replica_count=2,
    open_to_public=True,
    environ={"MODE": "a", "X": "1"},
    resource_slots={"cpu": "1", "cuda.shares": "0.50"},
    service=ServiceOverride(port=8000, start_command=StartCommand(args=["serve"])),
    rollout_policy=RolloutPolicy(max_surge="2"),
)


def changed(wanted: Endpoint, *paths: str) -> str:
    return describe_changes(CURRENT, apply_mask(CURRENT, wanted, paths))


@pytest.mark.parametrize(
    ("wanted", "paths", "says"),
    [
        (Endpoint(replica_count=5), ["replica_count"], "replica_count 2 -> 5"),
        (Endpoint(), ["replica_count"], "replica_count 2 -> 0"),
        (Endpoint(), ["open_to_public"], "open_to_public true -> false"),
        (Endpoint(replica_count=5), ["open_to_public"], "open_to_public true -> false"),
        (Endpoint(environ={"MODE": "b"}), ["environ"], "environ.MODE a -> b, environ.X 1 removed"),
        (Endpoint(environ={"MODE": "b"}), ["environ.MODE"], "environ.MODE a -> b"),
        (Endpoint(environ={"MODE": ""}), ["environ.MODE"], 'environ.MODE a -> ""'),
        (Endpoint(), ["environ.X"], "environ.X 1 removed"),
        (Endpoint(), ["environ.NONE"], ""),
        (
            Endpoint(resource_slots={"cuda.shares": "0.25"}),
            ["resource_slots.cuda.shares"],
            "resource_slots.cuda.shares 0.50 -> 0.25",
        ),
        (Endpoint(service=ServiceOverride(port=9000)), ["service.port"], "service.port 8000 -> 9000"),
        (
            Endpoint(service=ServiceOverride(port=9000)),
            ["service"],
            "service.start_command.args serve removed, service.port 8000 -> 9000",
        ),
        (
            Endpoint(rollout_policy=RolloutPolicy(max_surge="25%")),
            ["rollout_policy.max_surge"],
            "rollout_policy.max_surge 2 -> 25%",
        ),
        (
            Endpoint(rollout_policy=RolloutPolicy(strategy=endpoint_pb2.ROLLOUT_STRATEGY_BLUE_GREEN)),
            ["rollout_policy"],
            "rollout_policy.strategy ROLLING -> BLUE_GREEN, rollout_policy.max_surge 2 -> 1",
        ),
        (
            Endpoint(extra_mounts=[ExtraMount(folder="projects/p/folders/d", writable=True)]),
            ["extra_mounts"],
            "extra_mounts[0].folder d added, extra_mounts[0].target /home/work/d added, "
            "extra_mounts[0].writable true added",
        ),
        (
            Endpoint(
                image_pull_policy=endpoint_pb2.IMAGE_PULL_POLICY_ALWAYS,
                security_profile=endpoint_pb2.SECURITY_PROFILE_STRICT,
                require_enforcement="mps",
            ),
            ["image_pull_policy", "security_profile", "require_enforcement"],
            "image_pull_policy IF_NOT_PRESENT -> ALWAYS, require_enforcement mps added, "
            "security_profile DEFAULT -> STRICT",
        ),
        (Endpoint(require_enforcement="none"), ["require_enforcement", "security_profile"], ""),
        (Endpoint(resource_group="default", priority=10), ["runtime", "resource_group", "priority"], ""),
        (Endpoint(cluster_size=1, model_mount_destination="/models"), ["cluster_size"], ""),
    ],
)
def test_what_a_mask_changes(wanted: Endpoint, paths: list[str], says: str) -> None:
    assert changed(wanted, *paths) == says


def test_the_current_state_is_not_touched() -> None:
    before = json_format.MessageToDict(CURRENT)
    apply_mask(CURRENT, Endpoint(environ={"MODE": "b"}), ["environ.MODE", "service.port"])
    assert json_format.MessageToDict(CURRENT) == before


def test_every_bad_path_is_told() -> None:
    paths = ["model", "replicas", "status", "service.prt", "runtime.x", "replica_count", ""]
    with pytest.raises(InvalidInput) as caught:
        apply_mask(CURRENT, Endpoint(), paths)
    told = {violation.field: violation.description for violation in caught.value.violations}
    assert list(told) == [f"update_mask.paths[{index}]" for index in (0, 1, 2, 3, 4, 6)]
    assert "did you mean" not in told["update_mask.paths[2]"]
    assert told["update_mask.paths[3]"] == "`service.prt` leads to no field"
    with pytest.raises(InvalidInput, match="is required"):
        apply_mask(CURRENT, Endpoint(), [])


def test_long_and_odd_values_are_shown_in_one_short_line() -> None:
    after = apply_mask(CURRENT, Endpoint(environ={"MODE": "x\n" * 100}), ["environ.MODE"])
    text = describe_changes(CURRENT, after)
    assert "\n" not in text
    assert len(text) < 100


def test_canonical_is_stable() -> None:
    once = canonical(CURRENT)
    assert canonical(once) == once
    assert once.resource_group == "default"
    assert once.rollout_policy.progress_deadline.seconds == 600
