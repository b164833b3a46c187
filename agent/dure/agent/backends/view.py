"""What a session of the process back end sees: its folders, its environment, the plan that its shim reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dure.agent.backends.base import HOME, ExtraMount, Plan, StartFailed
from dure.agent.shim.files import write_bytes
from dure.wire.quantities import human_bytes

ACTION_LIMIT_S = 600.0
SHARED_MEMORY = "/dev/shm"
ROOT = str(Path(__file__).parents[3])
# Hiding one of these would take the session's own shell, libraries or interpreter away.
_PROTECTED = ("/bin", "/sbin", "/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev", HOME)


def model_place(model: Path | None, target: str, maps: bool) -> str:
    """Where a session sees the model folder."""
    return target if maps or model is None else str(model)


def build(plan: Plan, home: Path, no_maps: str) -> dict[str, Any]:
    """The content of plan.json, but for control groups. `home` is the agent's folder; `no_maps` says why
    folders cannot be mapped on this node, empty if they can. Raises StartFailed, or OSError."""
    if not plan.argv and not plan.shell:
        raise StartFailed(
            "this back end runs no images, and the kernel has no command of its own: give the endpoint a "
            "start command, or a resource group whose agents run images"
        )
    if no_maps:
        _check_without_maps(plan, no_maps)
    folder = plan.handle.folder
    private_home = folder / "home"
    private_home.mkdir(mode=0o700, exist_ok=True)
    cwd, stage, hosts = plan.model_path, "", ""
    mounts: list[dict[str, Any]] = []
    if not no_maps:
        stage = str(folder / "stage")
        os.makedirs(stage, exist_ok=True)
        mounts = list(_mounts(plan, private_home, home))
        hosts = _write_cluster_files(plan, private_home)
    elif plan.model is not None and Path(cwd).is_relative_to(plan.model_target):
        cwd = os.path.normpath(plan.model / Path(cwd).relative_to(plan.model_target))
    env = dict(plan.environ)
    env["HOME"] = HOME if not no_maps else str(private_home)
    # A user's PATH stays in force, but `python` is the agent's own, which has what its venv has.
    path = env.get("PATH") or os.environ.get("PATH", os.defpath)
    env["PATH"] = f"{home / 'bin'}:{path}:{Path(sys.executable).parent}"
    return {
        "stage": stage,
        "mounts": mounts,
        "hosts": hosts,
        "shared_memory_bytes": plan.shared_memory_bytes,
        "cwd": cwd,
        "model": model_place(plan.model, plan.model_target, not no_maps),
        "env": env,
        "argv": list(plan.argv),
        "shell": plan.shell,
        "line": plan.line,
        # In an action or a command `{model_path}` is the definition's model_path, as the session sees it.
        "values": {"model_path": cwd, "port": str(plan.port)},
        "actions": list(plan.actions),
        "stop_grace_s": plan.stop_grace_s,
        "action_limit_s": ACTION_LIMIT_S,
    }


def _check_without_maps(plan: Plan, why: str) -> None:
    wanted = []
    if plan.cluster is not None:
        wanted.append("names for the kernels of its session")
    if plan.extra_mounts:
        wanted.append(f"the folder `{plan.extra_mounts[0].name}` at `{plan.extra_mounts[0].target}`")
    if plan.shared_memory_bytes:
        wanted.append(f"{human_bytes(plan.shared_memory_bytes)} of shared memory")
    if wanted:
        raise StartFailed(
            f"the session needs {' and '.join(wanted)}, and this node cannot give it a view of its own of "
            f"the file system: {why}"
        )


def _mounts(plan: Plan, private_home: Path, home: Path) -> Iterator[dict[str, Any]]:
    yield {"source": os.path.realpath(private_home), "target": HOME, "read_only": False, "subpath": ""}
    folders = list(plan.extra_mounts)
    if plan.model is not None:
        folders.insert(0, ExtraMount("", plan.model, "", plan.model_target, False))
    taken: dict[str, str] = {}
    for folder in folders:
        target = os.path.normpath(folder.target)
        _check_target(target, home)
        if target in taken:
            raise StartFailed(f"two folders have the mount destination `{target}`")
        taken[target] = folder.name
        yield {
            "source": os.path.realpath(folder.source),
            "target": target,
            "read_only": not folder.writable,
            "subpath": folder.subpath,
        }


def _check_target(target: str, home: Path) -> None:
    if not target.startswith("/"):
        raise StartFailed(f"mount destination `{target}` is not an absolute path")
    own = (sys.prefix, sys.base_prefix, ROOT, str(home.absolute()), os.path.realpath(sys.executable))
    for place in (*_PROTECTED, *own):
        if Path(place).is_relative_to(target):
            raise StartFailed(
                f"mount destination `{target}` would hide `{place}`, which sessions need; "
                "choose one such as /models"
            )
    if Path(target).is_relative_to("/proc") or Path(target).is_relative_to("/sys"):
        raise StartFailed(f"mount destination `{target}` lies in a file system of the kernel")


def _write_cluster_files(plan: Plan, private_home: Path) -> str:
    """Path of the table of host names, empty for a session of one."""
    if plan.cluster is None:
        return ""
    ssh = private_home / ".ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    for name, (content, mode) in plan.cluster.ssh(HOME).items():
        write_bytes(str(ssh / name), content.encode())
        (ssh / name).chmod(mode)
    hosts = plan.handle.folder / "hosts"
    write_bytes(str(hosts), plan.cluster.hosts.encode())
    # Programs of another user than the agent's resolve names too.
    hosts.chmod(0o644)
    return os.path.realpath(hosts)
