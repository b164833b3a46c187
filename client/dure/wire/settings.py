"""Settings of the programs: flag over `DURE_*` variable over TOML file over default.

Each program is a click command, and click does it: `auto_envvar_prefix` for the variables, `default_map`
for the file. `data_dir_option` reads `<data dir>/<folder>/settings.toml` before the other options are
looked at, so that `dure manager --data-dir D` takes up the ports and identities that were recorded there.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import tomli
import tomli_w

CONTEXT_SETTINGS = {"auto_envvar_prefix": "DURE", "help_option_names": ["-h", "--help"]}


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/dure`, by default `~/.local/share/dure`."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "dure"


def read_toml(path: Path) -> dict[str, Any]:
    """The file's content, {} if there is none. Raises click.ClickException if it is not TOML."""
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomli.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise click.ClickException(f"cannot read {path}: {error}") from error


def write_toml(path: Path, content: dict[str, Any], mode: int = 0o600) -> None:
    """Writes whole or not at all."""
    write_file(path, tomli_w.dumps({k: v for k, v in content.items() if v is not None}).encode(), mode)


def write_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replaces a file in one step: a reader, or a crash, sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def apply_recorded(context: click.Context, path: Path) -> None:
    """Makes the TOML file's values the defaults of the command's options."""
    recorded = read_toml(path)
    context.default_map = {**(context.default_map or {}), **recorded}
