"""How `dure dev` and the programs find one another in a data folder.

D/context.toml              the client's context: manager address, API key
D/run/NAME.pid              process ids
D/logs/NAME.log             logs of the programs that `dure dev` started
D/manager/                  settings.toml, dure.db, keys/, folders/, admin.key
D/agents/NAME/              settings.toml, identity.toml, kernels/, cache/
D/proxies/NAME/             settings.toml, identity.toml, table.pb
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dure.wire.errors import FailedPrecondition


def manager_dir(data_dir: Path) -> Path:
    return data_dir / "manager"


def agent_dir(data_dir: Path, name: str) -> Path:
    return data_dir / "agents" / name


def proxy_dir(data_dir: Path, name: str) -> Path:
    return data_dir / "proxies" / name


def recorded_members(data_dir: Path, kind: str) -> list[str]:
    """Names of the agents (`agents`) or proxies (`proxies`) that have lived in a data folder."""
    return sorted(path.parent.name for path in (data_dir / kind).glob("*/settings.toml"))


@contextlib.contextmanager
def running(data_dir: Path, name: str, home: Path) -> Iterator[None]:
    """Holds the lock of a program's own folder and keeps its pid in `run/NAME.pid`.

    Raises FailedPrecondition if another process holds the folder.
    """
    import fcntl

    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(home / "lock", "a+", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FailedPrecondition(
                f"another process already runs {name} on {home}; stop it first, or use another --data-dir"
            ) from error
        pid_file = data_dir / "run" / f"{name}.pid"
        pid_file.parent.mkdir(parents=True, exist_ok=True)
        pid_file.write_text(f"{os.getpid()}\n", encoding="ascii")
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                pid_file.unlink()
