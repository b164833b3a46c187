"""Resource names: `projects/{p}/endpoints/{e}` and their like, parsed and checked in one place."""

from __future__ import annotations

import re
import uuid

from dure.wire.errors import InvalidInput, Violation

ENDPOINT_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
FOLDER_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
PROJECT_ID = ENDPOINT_ID
MEMBER_ID = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")

_RULES = {
    ENDPOINT_ID: "1 to 63 lower-case letters, digits and hyphens; a letter first, no hyphen last",
    FOLDER_ID: "1 to 64 letters, digits, `.`, `_` and `-`; begins and ends with a letter or digit",
    MEMBER_ID: "1 to 63 lower-case letters, digits, `.` and `-`; begins and ends with a letter or digit",
}


def check_id(value: str, pattern: re.Pattern[str], field: str) -> Violation | None:
    """What is wrong with the last part of a name, or None."""
    if pattern.fullmatch(value):
        return None
    found = f"`{value[:80]}` is not a name" if value else "a name is required"
    return Violation(field, f"{found}: {_RULES[pattern]}")


def parse(name: str, template: str, field: str = "name") -> tuple[str, ...]:
    """Takes `projects/p/endpoints/e` apart by `projects/{}/endpoints/{}`.

    Raises InvalidInput when it has another form.
    """
    pattern = re.escape(template).replace(r"\{\}", r"([^/\s]{1,128})")
    match = re.fullmatch(pattern, name)
    if match is None:
        wanted = template.replace("{}", "NAME")
        raise InvalidInput.of([Violation(field, f"`{name[:200]}` does not have the form `{wanted}`")])
    return match.groups()


def project(project_id: str) -> str:
    return f"projects/{project_id}"


def endpoint(project_id: str, endpoint_id: str) -> str:
    return f"projects/{project_id}/endpoints/{endpoint_id}"


def folder(project_id: str, folder_id: str) -> str:
    return f"projects/{project_id}/folders/{folder_id}"


def registry(project_id: str, host: str) -> str:
    return f"projects/{project_id}/registries/{host}"


def token(project_id: str, endpoint_id: str, uid: str) -> str:
    return f"projects/{project_id}/endpoints/{endpoint_id}/tokens/{uid}"


def replica(project_id: str, endpoint_id: str, uid: str) -> str:
    return f"projects/{project_id}/endpoints/{endpoint_id}/replicas/{uid}"


def revision(project_id: str, endpoint_id: str, number: int) -> str:
    return f"projects/{project_id}/endpoints/{endpoint_id}/revisions/{number}"


def rule(project_id: str, endpoint_id: str, rule_id: str) -> str:
    return f"projects/{project_id}/endpoints/{endpoint_id}/rules/{rule_id}"


def event(project_id: str, endpoint_id: str, uid: str) -> str:
    return f"projects/{project_id}/endpoints/{endpoint_id}/events/{uid}"


def agent(agent_id: str) -> str:
    return f"agents/{agent_id}"


def proxy(proxy_id: str) -> str:
    return f"proxies/{proxy_id}"


def user(user_id: str) -> str:
    return f"users/{user_id}"


def api_key(user_id: str, uid: str) -> str:
    return f"users/{user_id}/keys/{uid}"


def resource_group(group_id: str) -> str:
    return f"resourceGroups/{group_id}"


def preset(preset_id: str) -> str:
    return f"presets/{preset_id}"


def image(image_id: str) -> str:
    return f"images/{image_id}"


def new_uid(now_ms: int, random_bits: int) -> str:
    """A UUIDv7 (RFC 9562): 48 bits of milliseconds, then 74 of `random_bits`. Sorts by time."""
    rand_a, rand_b = (random_bits >> 62) & 0xFFF, random_bits & ((1 << 62) - 1)
    value = (now_ms & ((1 << 48) - 1)) << 80 | 0x7 << 76 | rand_a << 64 | 0b10 << 62 | rand_b
    return str(uuid.UUID(int=value))
