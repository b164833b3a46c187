"""Checks of a request that need no store."""

import pytest

from dure.manager import asked
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import CanaryStep, Endpoint, RolloutPolicy
from dure.wire.errors import Violation

ROLLING = endpoint_pb2.ROLLOUT_STRATEGY_ROLLING
BLUE_GREEN = endpoint_pb2.ROLLOUT_STRATEGY_BLUE_GREEN
CANARY = endpoint_pb2.ROLLOUT_STRATEGY_CANARY


def test_defaults_of_a_policy() -> None:
    violations: list[Violation] = []
    policy = asked.rollout_policy(RolloutPolicy(), violations)
    assert (policy.strategy, policy.max_surge, policy.max_unavailable) == (ROLLING, "1", "0")
    assert policy.progress_deadline.seconds == 600
    canary = asked.rollout_policy(RolloutPolicy(strategy=CANARY), violations)
    assert [step.weight for step in canary.steps] == [10]
    assert not canary.steps[0].HasField("hold")
    blue_green = RolloutPolicy(strategy=BLUE_GREEN, max_surge="0", manual_switch=True)
    assert asked.rollout_policy(blue_green, violations).manual_switch
    assert not violations


def steps(*weights: int) -> RolloutPolicy:
    return RolloutPolicy(strategy=CANARY, steps=[CanaryStep(weight=weight) for weight in weights])


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (RolloutPolicy(strategy=9), "strategy"),  # type: ignore[arg-type]
        (RolloutPolicy(max_surge="0", max_unavailable="0%"), "max_surge"),
        (RolloutPolicy(max_surge="-1"), "max_surge"),
        (RolloutPolicy(max_surge="1.5"), "max_surge"),
        (RolloutPolicy(max_unavailable="101%"), "max_unavailable"),
        (RolloutPolicy(max_unavailable="many"), "max_unavailable"),
        (RolloutPolicy(max_surge="10001"), "max_surge"),
        (RolloutPolicy(manual_switch=True), "manual_switch"),
        (RolloutPolicy(steps=[CanaryStep(weight=1)]), "steps"),
        (steps(0), "steps[0].weight"),
        (steps(100), "steps[0].weight"),
        (steps(10, 10), "steps[1].weight"),
        (steps(20, 10, 30), "steps[1].weight"),
        (steps(*range(1, 22)), "steps"),
    ],
)
def test_bad_policies(policy: RolloutPolicy, field: str) -> None:
    violations: list[Violation] = []
    asked.rollout_policy(policy, violations)
    assert [violation.field for violation in violations] == [f"endpoint.rollout_policy.{field}"]


def test_bad_durations() -> None:
    policy = steps(10)
    policy.steps[0].hold.seconds = 0
    policy.progress_deadline.seconds = -1
    violations: list[Violation] = []
    asked.rollout_policy(policy, violations)
    assert {violation.field.rsplit(".", 1)[1] for violation in violations} == {"hold", "progress_deadline"}


@pytest.mark.parametrize(
    ("target", "normal"),
    [
        ("/models", "/models"),
        ("/models/", "/models"),
        ("//a//b/", "/a/b"),
        ("/home/work/data", "/home/work/data"),
        ("/data/모델", "/data/모델"),
        ("/usr/local/share/x", "/usr/local/share/x"),
    ],
)
def test_good_targets(target: str, normal: str) -> None:
    violations: list[Violation] = []
    assert asked.mount_target(target, "f", violations) == normal
    assert not violations


@pytest.mark.parametrize(
    "target",
    ["", "models", "/", "/home", "/home/work", "/home/work/", "/etc", "/etc/ssl", "/usr", "/proc/1", "/sys/x",
     "/dev/shm", "/a/../b", "/a:b", "/a\nb", "/tmp", "/var", "/lib/x", "/run/x", "/usr/bin", "/usr/lib/x"],
)  # fmt: skip
def test_bad_targets(target: str) -> None:
    violations: list[Violation] = []
    assert asked.mount_target(target, "f", violations) == ""
    assert [violation.field for violation in violations] == ["f"]


def test_overlaps() -> None:
    violations: list[Violation] = []
    targets = [
        ("m", "/models"),
        ("a", "/models/a"),
        ("b", "/data"),
        ("c", "/data"),
        ("d", "/database"),
        ("e", ""),
    ]
    asked.check_overlaps(targets, violations)
    assert [violation.field for violation in violations] == ["a", "c"]


def test_containers() -> None:
    violations: list[Violation] = []
    asked.containers(Endpoint(), violations)
    never = endpoint_pb2.IMAGE_PULL_POLICY_NEVER
    strict = endpoint_pb2.SECURITY_PROFILE_STRICT
    asked.containers(Endpoint(image_pull_policy=never, security_profile=strict), violations)
    assert not violations
    asked.containers(Endpoint(image_pull_policy=9, security_profile=9), violations)  # type: ignore[arg-type]
    assert [(v.field, v.description) for v in violations] == [
        ("endpoint.image_pull_policy", "found 9, expected IF_NOT_PRESENT, ALWAYS or NEVER"),
        ("endpoint.security_profile", "found 9, expected DEFAULT or STRICT"),
    ]


@pytest.mark.parametrize(
    ("word", "mode", "wrong"),
    [
        ("", "", ""),
        ("none", "", ""),
        ("watchdog", "watchdog", ""),
        (" MIG ", "mig", ""),
        ("watchdogs", "", "unknown mode `watchdogs`; did you mean `watchdog`?"),
        ("hooks", "", "unknown mode `hooks`; did you mean `hook`?"),
        ("yes", "", "unknown mode `yes`; expected one of none, watchdog, hook, mps, mig"),
    ],
)
def test_required_enforcement(word: str, mode: str, wrong: str) -> None:
    violations: list[Violation] = []
    assert asked.require_enforcement(Endpoint(require_enforcement=word), violations) == mode
    assert [violation.description for violation in violations] == ([wrong] if wrong else [])


@pytest.mark.parametrize(
    ("mode", "slots", "part"),
    [
        ("", {}, ""),
        ("mps", {"cuda.shares": 1500}, ""),
        ("mig", {"cuda.shares": 1000}, ""),
        ("mig", {"cuda.shares": 1010}, "at most 1.00"),
        ("watchdog", {"cpu": 1}, "requires `cuda.shares`"),
        ("watchdog", {"cuda.device": 1000}, "a whole GPU has no neighbours"),
    ],
)
def test_what_enforcement_makes_sense_for(mode: str, slots: dict[str, int], part: str) -> None:
    violations: list[Violation] = []
    asked.check_enforcement(mode, slots, violations)
    assert len(violations) == bool(part)
    assert all(part in violation.description for violation in violations)


def test_numbers() -> None:
    violations: list[Violation] = []
    assert asked.priority(Endpoint(), violations) == 10
    assert asked.cluster(Endpoint(), violations) == (endpoint_pb2.CLUSTER_MODE_SINGLE_NODE, 1)
    assert asked.shared_memory("1g", violations) == 2**30
    assert not violations
    asked.priority(Endpoint(priority=101), violations)
    asked.priority(Endpoint(priority=-1), violations)
    asked.cluster(Endpoint(cluster_size=65), violations)
    asked.shared_memory("lots", violations)
    assert [violation.field for violation in violations] == [
        "endpoint.priority", "endpoint.priority", "endpoint.cluster_size", "endpoint.shared_memory"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "image", ["dure-test@sha256:12", "a/b:1@sha256:" + "G" * 64, "a@md5:1", "a@", "a@b@c"]
)
def test_a_digest_that_is_none_is_refused(image: str) -> None:
    violations: list[Violation] = []
    asked.image(endpoint_pb2.Endpoint(image=image), violations)
    assert [(violation.field, "64 hex" in violation.description) for violation in violations] == [
        ("endpoint.image", True)
    ]
    asked.image(endpoint_pb2.Endpoint(image="a/b:1@sha256:" + "0a" * 32), fine := [])
    assert not fine
