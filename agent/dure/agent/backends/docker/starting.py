"""What an engine says of a container that it could not start, in words that help."""

from __future__ import annotations

import re

from dure.agent.backends.base import Plan, StartFailed

# What the engine's own init (tini, or podman's catatonit) says of a command that it cannot run.
_INIT = re.compile(
    r"^(?:\[FATAL tini \(\d+\)\] exec (?P<name>.*) failed"
    r"|ERROR \(catatonit.*exec pid1): (?P<why>.*)$"
)
_INIT_CODES = (126, 127, 1)
_NOT_THERE = ("executable file not found", "no such file or directory", "exec format error", "is a directory")


def by_init(code: int, log_tail: str) -> str:
    """Why a container that ended at once never became its command; empty if it did."""
    lines = log_tail.strip().splitlines()
    found = _INIT.match(lines[-1]) if lines and code in _INIT_CODES else None
    if found is None:
        return ""
    name, why = found["name"], found["why"]
    if "no such file" in why.lower():
        why = "there is no such program in the image"
    elif "permission denied" in why.lower():
        why = "it is not executable (`chmod +x`, or name its interpreter)"
    return f"cannot start `{name}`: {why}" if name else f"cannot start the command: {why}"


def port_is_taken(said: str) -> bool:
    """Whether the engine says that a port of the node is somebody else's."""
    lower = said.lower()
    return "port is already allocated" in lower or "address already in use" in lower


def lacks_network(said: str, network: str) -> bool:
    """Whether the engine says that there is no such network, or not yet."""
    return network in said and "not found" in said.lower()


def failed(said: str, plan: Plan) -> StartFailed:
    """From the engine's whole sentence; its innermost words stay in what users read."""
    words = said.rpartition("caused: ")[2].removesuffix(": unknown").strip()
    lower = words.lower()
    if port_is_taken(words):
        return StartFailed(words, "PORT_FAILED")
    if "could not select device driver" in lower or "cdi device" in lower:
        return StartFailed(f"the container engine cannot attach its GPUs: {words}")
    if any(sign in lower for sign in _NOT_THERE):
        if plan.actions and "/bin/sh" in words:
            return StartFailed(f"pre-start actions need /bin/sh in the image: {words}")
        name = (plan.argv or (plan.shell,))[0]
        what = f"`{name}`: is it in the image?" if name else "the image's own command:"
        return StartFailed(f"cannot start {what} {words}")
    if "permission denied" in lower:
        return StartFailed(f"cannot start its command: {words}; is it executable (`chmod +x`)?")
    return StartFailed(f"the container engine could not run it: {words}")
