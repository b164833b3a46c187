"""What the shim's child does before it becomes the model: cgroups, mounts, actions, exec."""

from __future__ import annotations

import errno
import json
import os
import signal
from typing import Any

from dure.agent.shim.templates import fill


class CannotStart(Exception):
    """Ends the start. `details` go into exit.json."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = {"stage": "setup", "message": message, **details}


def become(plan: dict[str, Any], progress: int) -> None:
    """Never returns. Tells its progress as lines of JSON; the end of the pipe says that exec worked."""
    try:
        _join_cgroups(plan["cgroup_procs"])
        os.setsid()
        os.umask(0o022)
        for number in (
            signal.SIGPIPE,
            signal.SIGINT,
            signal.SIGHUP,
            signal.SIGTERM,
            signal.SIGCHLD,
            signal.SIGUSR1,
        ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if plan["stage"]:
            _map(plan)
        os.environ.clear()
        os.environ.update(plan["env"])
        values = dict(plan["values"])
        if plan["actions"]:
            values = _run_actions(plan, progress)
        _change_to(plan["cwd"], plan["model"])
        _tell(progress, {"exec": True})
        _exec(plan, values)
    except CannotStart as error:
        os.write(1, f"{error}\n".encode(errors="replace"))
        _tell(progress, {"failed": error.details})
    except Exception as error:
        # The top of this process: whatever it is must reach the agent as a sentence.
        _tell(progress, {"failed": {"stage": "setup", "message": f"{type(error).__name__}: {error}"}})
    os._exit(127)


def _join_cgroups(files: list[str]) -> None:
    for path in files:
        with open(path, "w", encoding="ascii") as file:
            file.write("0")


def _map(plan: dict[str, Any]) -> None:
    from dure.agent.shim.namespace import View

    view, what = View(), "give the session its own view of the file system"
    try:
        view.enter(plan["stage"])
        if plan["shared_memory_bytes"]:
            what = "give the session shared memory"
            view.memory("/dev/shm", plan["shared_memory_bytes"])
        # Outer ones first, so that one destination may lie in another.
        for entry in sorted(plan["mounts"], key=lambda entry: entry["target"].count("/")):
            what = f"map a folder to {entry['target']}"
            view.bind(entry["source"], entry["target"], entry["read_only"], entry["subpath"])
        if plan["hosts"]:
            what = "give the session its table of host names"
            view.bind_file(plan["hosts"], "/etc/hosts")
        what = "complete the session's view of the file system"
        view.close()
    except OSError as error:
        raise CannotStart(f"cannot {what}: {error}") from error


def _run_actions(plan: dict[str, Any], progress: int) -> dict[str, str]:
    from dure.agent.shim.actions import ActionFailed, Runner

    _change_to(plan["model"], plan["model"])
    runner = Runner(plan["values"], plan["env"]["HOME"], plan["model"], plan["env"], plan["action_limit_s"])
    for index, action in enumerate(plan["actions"]):
        name = action["kind"]
        _tell(progress, {"message": f"pre-start action {index} ({name})"})
        try:
            runner.run(action)
        except ActionFailed as error:
            raise CannotStart(
                f"pre-start action {index} ({name}) failed: {error}", stage="action", index=index
            ) from error
    return runner.values


def _change_to(folder: str, model: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise CannotStart(
            f"model_path `{folder}` cannot be entered in the session ({error.strerror}); "
            f"the model folder appears at `{model}`"
        ) from error


def _exec(plan: dict[str, Any], values: dict[str, str]) -> None:
    if plan["shell"]:
        arguments = [plan["shell"], "-c", fill(plan["line"], values)]
    else:
        arguments = [fill(argument, values) for argument in plan["argv"]]
    try:
        os.execvpe(arguments[0], arguments, os.environ)
    except FileNotFoundError as error:
        where = "does not exist" if "/" in arguments[0] else f"is not on PATH ({os.environ.get('PATH', '')})"
        if os.path.lexists(arguments[0]) and "/" in arguments[0]:
            where = "is a script whose interpreter (its first line) does not exist"
        raise CannotStart(f"cannot start `{arguments[0]}`: it {where}") from error
    except PermissionError as error:
        kind = (
            "a folder"
            if os.path.isdir(arguments[0])
            else "not executable (`chmod +x`, or name its interpreter)"
        )
        raise CannotStart(f"cannot start `{arguments[0]}`: it is {kind}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        hint = "; is it a program for this machine?" if getattr(error, "errno", 0) == errno.ENOEXEC else ""
        raise CannotStart(f"cannot start `{arguments[0]}`: {reason}{hint}") from error


def _tell(progress: int, content: dict[str, Any]) -> None:
    os.write(progress, json.dumps(content).encode() + b"\n")
