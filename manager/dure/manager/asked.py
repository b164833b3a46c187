"""What an endpoint may ask for, as far as the request alone tells: every check that needs no store.

Each function returns the canonical value and adds what is wrong to `violations`.
"""

from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Mapping, Sequence

from dure.definitions.environ import too_large, wrong_variable
from dure.definitions.service import wrong_architecture, wrong_image
from dure.v1 import endpoint_pb2
from dure.wire import enforcement, quantities
from dure.wire.errors import InvalidInput, Violation
from dure.wire.quantities import DEVICES, MEM, MILLI, SHARES

MOUNT_DESTINATION = "/models"
HOME = "/home/work"
REPLICAS_MAX = 10_000
EXTRA_MOUNTS_MAX = 32
CLUSTER_SIZE_MAX = 64
PRIORITY_DEFAULT, PRIORITY_MAX = 10, 100
STEPS_MAX = 20
DURATION_S_MAX = 7 * 24 * 3600
PROGRESS_DEADLINE_S = 600
CANARY_WEIGHT = 10
METRICS_PATH = "/metrics"
SCALE_TO_ZERO_MS_MIN = 1_000
# The node's own folders; a mount that covers one of them would take its system away.
_SYSTEM = (
    "/", "/proc", "/sys", "/dev", "/etc", "/usr", "/bin", "/lib", "/lib64", "/sbin", "/run", HOME, "/root",
    "/tmp", "/var", "/opt", "/boot",
)  # fmt: skip
_NOT_BELOW = (
    "/proc", "/sys", "/dev", "/etc", "/bin", "/lib", "/lib64", "/sbin", "/run", "/boot",
    # The same four, where `/bin` and so on are links.
    "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/sbin",
)  # fmt: skip


def check_replica_count(count: int) -> Violation | None:
    if 0 <= count <= REPLICAS_MAX:
        return None
    return Violation("endpoint.replica_count", f"found {count}, expected 0 to {REPLICAS_MAX}")


def priority(wanted: endpoint_pb2.Endpoint, violations: list[Violation]) -> int:
    if not 0 <= wanted.priority <= PRIORITY_MAX:
        found = f"found {wanted.priority}, expected 1 to {PRIORITY_MAX} (default {PRIORITY_DEFAULT})"
        violations.append(Violation("endpoint.priority", found))
    return wanted.priority or PRIORITY_DEFAULT


def scale_to_zero_ms(wanted: endpoint_pb2.Endpoint, violations: list[Violation]) -> int:
    """0 for never."""
    after_ms = wanted.scale_to_zero_after.ToNanoseconds() // 1_000_000
    if after_ms and not SCALE_TO_ZERO_MS_MIN <= after_ms <= DURATION_S_MAX * 1000:
        limits = f"{SCALE_TO_ZERO_MS_MIN // 1000} s to {DURATION_S_MAX} s, or 0 for never"
        violations.append(Violation("endpoint.scale_to_zero_after", f"must be {limits}"))
    return after_ms


def metrics_path(wanted: endpoint_pb2.Endpoint, violations: list[Violation]) -> str:
    path = wanted.metrics_path or METRICS_PATH
    if not re.fullmatch(r"/[\x21-\x7e]{0,511}", path):
        found = f"`{path[:80]}` must begin with `/` and have no spaces"
        violations.append(Violation("endpoint.metrics_path", found))
    return path


def cluster(
    wanted: endpoint_pb2.Endpoint, violations: list[Violation]
) -> tuple[endpoint_pb2.ClusterMode.ValueType, int]:
    """Mode and size."""
    mode = wanted.cluster_mode or endpoint_pb2.CLUSTER_MODE_SINGLE_NODE
    if mode not in endpoint_pb2.ClusterMode.values():
        violations.append(
            Violation("endpoint.cluster_mode", f"found {mode}, expected SINGLE_NODE or MULTI_NODE")
        )
    if not 0 <= wanted.cluster_size <= CLUSTER_SIZE_MAX:
        found = f"found {wanted.cluster_size}, expected 1 to {CLUSTER_SIZE_MAX}"
        violations.append(Violation("endpoint.cluster_size", found))
    return mode, wanted.cluster_size or 1


def image(wanted: endpoint_pb2.Endpoint, violations: list[Violation]) -> None:
    if wanted.image and (wrong := wrong_image(wanted.image)):
        violations.append(Violation("endpoint.image", wrong))
    if wanted.architecture and (wrong := wrong_architecture(wanted.architecture)):
        violations.append(Violation("endpoint.architecture", wrong))


def containers(wanted: endpoint_pb2.Endpoint, violations: list[Violation]) -> None:
    """Pull policy and security profile."""
    if wanted.image_pull_policy not in endpoint_pb2.ImagePullPolicy.values():
        found = f"found {wanted.image_pull_policy}, expected IF_NOT_PRESENT, ALWAYS or NEVER"
        violations.append(Violation("endpoint.image_pull_policy", found))
    if wanted.security_profile not in endpoint_pb2.SecurityProfile.values():
        found = f"found {wanted.security_profile}, expected DEFAULT or STRICT"
        violations.append(Violation("endpoint.security_profile", found))


def require_enforcement(wanted: endpoint_pb2.Endpoint, violations: list[Violation]) -> str:
    """A mode; empty for any."""
    mode = wanted.require_enforcement.strip().lower()
    if mode in ("", enforcement.NONE):
        return ""
    if mode not in enforcement.MODES:
        near = difflib.get_close_matches(mode, enforcement.MODES, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"expected one of {', '.join(enforcement.MODES)}"
        violations.append(Violation("endpoint.require_enforcement", f"unknown mode `{mode[:40]}`; {hint}"))
        return ""
    return mode


def check_enforcement(mode: str, slots: Mapping[str, int], violations: list[Violation]) -> None:
    """Whether what is required makes sense for the slots that a kernel gets in the end."""
    field = "endpoint.require_enforcement"
    if not mode:
        return
    if DEVICES in slots:
        alone = f"a whole GPU has no neighbours: leave it out, or ask for `{SHARES}` in place of `{DEVICES}`"
        violations.append(Violation(field, alone))
    elif SHARES not in slots:
        violations.append(Violation(field, f"requires `{SHARES}`: no part of a GPU is asked for"))
    elif mode == enforcement.MIG and slots[SHARES] > MILLI:
        most = f"`mig` gives one part of one GPU: ask for at most 1.00 `{SHARES}`, or require `mps` or less"
        violations.append(Violation(field, most))


def shared_memory(text: str, violations: list[Violation]) -> int:
    """Bytes, 0 for the back end's default."""
    if not text:
        return 0
    try:
        return quantities.parse_slot(MEM, text) // MILLI
    except ValueError as error:
        violations.append(Violation("endpoint.shared_memory", str(error)))
        return 0


def slots(asked: Mapping[str, str], violations: list[Violation]) -> dict[str, int]:
    try:
        return quantities.parse_slots(asked, "endpoint.resource_slots")
    except InvalidInput as error:
        violations.extend(error.violations)
        return {}


def check_environ(environ: Mapping[str, str], violations: list[Violation]) -> None:
    if wrong := too_large(environ.items()):
        violations.append(Violation("endpoint.environ", wrong))
    for name, value in environ.items():
        if wrong := wrong_variable(name, value):
            violations.append(Violation(f"endpoint.environ[{name[:60]}]", wrong))


def mount_target(asked: str, field: str, violations: list[Violation]) -> str:
    """A normal absolute path that covers nothing of the system."""
    if not asked.startswith("/") or re.search(r"[\x00-\x1f\x7f:]", asked) or ".." in asked.split("/"):
        violations.append(Violation(field, f"`{asked[:120]}` is not an absolute path without `..` and `:`"))
        return ""
    target = posixpath.normpath(asked).replace("//", "/")
    covers = any(inside(path, target) for path in _SYSTEM)
    if covers or any(inside(target, path) for path in _NOT_BELOW):
        violations.append(Violation(field, f"`{target}` would cover a folder of the system; choose another"))
        return ""
    return target


def inside(path: str, folder: str) -> bool:
    """Whether a path is a folder, or below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def check_overlaps(targets: Sequence[tuple[str, str]], violations: list[Violation]) -> None:
    """`targets` are fields and paths, the model folder's first; none may lie in another."""
    for index, (field, target) in enumerate(targets):
        for other_field, other in targets[:index]:
            if target and other and (inside(target, other) or inside(other, target)):
                clash = f"`{target}` and `{other}` ({other_field}) overlap; choose another target"
                violations.append(Violation(field, clash))
                break


def rollout_policy(
    asked: endpoint_pb2.RolloutPolicy, violations: list[Violation]
) -> endpoint_pb2.RolloutPolicy:
    """The policy with its defaults filled in."""
    field = "endpoint.rollout_policy"
    policy = endpoint_pb2.RolloutPolicy()
    policy.CopyFrom(asked)
    policy.strategy = asked.strategy or endpoint_pb2.ROLLOUT_STRATEGY_ROLLING
    if policy.strategy not in endpoint_pb2.RolloutStrategy.values():
        found = f"found {policy.strategy}, expected ROLLING, BLUE_GREEN or CANARY"
        violations.append(Violation(f"{field}.strategy", found))
    policy.max_surge = _amount(asked.max_surge or "1", f"{field}.max_surge", violations)
    policy.max_unavailable = _amount(asked.max_unavailable or "0", f"{field}.max_unavailable", violations)
    blue_green = policy.strategy == endpoint_pb2.ROLLOUT_STRATEGY_BLUE_GREEN
    canary = policy.strategy == endpoint_pb2.ROLLOUT_STRATEGY_CANARY
    if not blue_green and all(int(a.rstrip("%")) == 0 for a in (policy.max_surge, policy.max_unavailable)):
        both = "must not be zero while max_unavailable is: nothing could ever be replaced"
        violations.append(Violation(f"{field}.max_surge", both))
    if asked.HasField("progress_deadline"):
        _check_duration(asked.progress_deadline.ToNanoseconds(), f"{field}.progress_deadline", violations)
    else:
        policy.progress_deadline.FromSeconds(PROGRESS_DEADLINE_S)
    if asked.manual_switch and not blue_green:
        violations.append(Violation(f"{field}.manual_switch", "is for the strategy BLUE_GREEN only"))
    if asked.steps and not canary:
        violations.append(Violation(f"{field}.steps", "are for the strategy CANARY only"))
    elif canary:
        if not asked.steps:
            policy.steps.add(weight=CANARY_WEIGHT)
        _check_steps(policy.steps, f"{field}.steps", violations)
    return policy


def _check_steps(steps: Sequence[endpoint_pb2.CanaryStep], field: str, violations: list[Violation]) -> None:
    if len(steps) > STEPS_MAX:
        violations.append(Violation(field, f"has {len(steps)} steps, expected at most {STEPS_MAX}"))
        return
    before = 0
    for index, step in enumerate(steps):
        at = f"{field}[{index}]"
        if not 1 <= step.weight <= 99:
            violations.append(Violation(f"{at}.weight", f"found {step.weight}, expected 1 to 99 (percent)"))
        elif step.weight <= before:
            grows = f"found {step.weight} after {before}; weights must grow from step to step"
            violations.append(Violation(f"{at}.weight", grows))
        before = max(before, step.weight)
        if step.HasField("hold"):
            _check_duration(step.hold.ToNanoseconds(), f"{at}.hold", violations)


def _amount(text: str, field: str, violations: list[Violation]) -> str:
    match = re.fullmatch(r"(\d{1,5})(%?)", text, re.ASCII)
    if match is None or int(match[1]) > (100 if match[2] else REPLICAS_MAX):
        found = f"`{text[:40]}` is neither a number from 0 to {REPLICAS_MAX} nor a percentage such as `25%`"
        violations.append(Violation(field, found))
        return "1"
    return f"{int(match[1])}{match[2]}"


def _check_duration(nanoseconds: int, field: str, violations: list[Violation]) -> None:
    if not 0 < nanoseconds <= DURATION_S_MAX * 10**9:
        found = f"found {nanoseconds / 1e9:g} s, expected more than 0 and at most 7 days"
        violations.append(Violation(field, found))
