"""Short notations that people write and read: mounts, canary steps, amounts, durations. Pure."""

from __future__ import annotations

import re
import shlex
from decimal import Decimal

from google.protobuf.duration_pb2 import Duration

from dure.v1.endpoint_pb2 import CanaryStep, ExtraMount, StartCommand
from dure.wire.quantities import MEM, format_slot, parse_duration_s, parse_slot

MOUNT_FORM = "FOLDER[/SUBPATH][:TARGET][:rw]"
CANARY_FORM = "WEIGHT[:HOLD],..."
_UNITS = ((1024**4, "t"), (1024**3, "g"), (1024**2, "m"), (1024, "k"))


def parse_mount(text: str) -> ExtraMount:
    """`data`, `data/train:/data`, `data:rw`, `data:/data:rw`. Raises ValueError with a sentence."""
    folder, *rest = text.split(":")
    mount = ExtraMount()
    if rest and rest[-1] in ("rw", "ro"):
        mount.writable = rest.pop() == "rw"
    if len(rest) > 1 or (rest and not rest[0].startswith("/")) or not folder or folder.startswith("/"):
        raise ValueError(
            f"`{text[:120]}` does not have the form {MOUNT_FORM}, such as `data`, `data:/data` or "
            "`data/train:/data:rw`; TARGET begins with `/`"
        )
    mount.target = rest[0] if rest else ""
    parts = folder.split("/")
    # The folder may be a full name: projects/P/folders/F, then the path in it.
    end = 4 if len(parts) >= 4 and parts[0] == "projects" and parts[2] == "folders" else 1
    mount.folder, mount.subpath = "/".join(parts[:end]), "/".join(parts[end:])
    return mount


def mount_source(mount: ExtraMount) -> str:
    """`data/train`: folder and path in it."""
    folder = mount.folder.rsplit("/", 1)[-1]
    return f"{folder}/{mount.subpath}" if mount.subpath else folder


def mount_target(mount: ExtraMount) -> str:
    """Where it appears, the default included."""
    return mount.target or f"/home/work/{mount.folder.rsplit('/', 1)[-1]}"


def parse_steps(text: str) -> list[CanaryStep]:
    """`10:60s,50:2m` or `10,50`: percent of the requests, and for how long. Raises ValueError."""
    steps = []
    for part in text.split(","):
        weight, colon, hold = part.strip().partition(":")
        if not re.fullmatch(r"\d{1,3}%?", weight) or (colon and not hold):
            raise ValueError(
                f"`{part[:40]}` does not have the form WEIGHT[:HOLD], such as 10:60s "
                "(percent of the requests, and for how long; without a time until it is promoted)"
            )
        step = CanaryStep(weight=int(weight.rstrip("%")))
        if hold:
            set_duration(step.hold, parse_duration_s(hold))
        steps.append(step)
    return steps


def steps_text(steps: list[CanaryStep]) -> str:
    return ",".join(
        f"{step.weight}" + (f":{duration_text(step.hold)}" if step.HasField("hold") else "") for step in steps
    )


def set_duration(duration: Duration, seconds: float) -> None:
    """Sets it, zero included (a message that was not touched would not be there)."""
    duration.FromNanoseconds(round(seconds * 1e9))
    duration.SetInParent()


def duration_text(duration: Duration) -> str:
    """`60s`, `1.5s`."""
    seconds = (Decimal(duration.ToNanoseconds()) / 10**9).normalize()
    return f"{seconds:f}s"


def amount(slot: str, text: str) -> str:
    """An amount in its shortest exact form (`8g`); one that is none stays as it is."""
    try:
        milli = parse_slot(slot, text)
    except ValueError:
        return text
    if slot != MEM:
        return format_slot(slot, milli)
    size_bytes = milli // 1000
    for unit_bytes, unit in _UNITS:
        if size_bytes % unit_bytes == 0:
            return f"{size_bytes // unit_bytes}{unit}"
    return str(size_bytes)


def command_text(command: StartCommand) -> str:
    """As one would type it."""
    return shlex.join(command.args) if command.args else command.line
