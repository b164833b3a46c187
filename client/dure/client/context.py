"""The client's context: which manager, as whom, in which project; one small TOML file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import tomli

from dure.wire.errors import DureError, InvalidInput
from dure.wire.settings import write_toml

DEFAULT_PROJECT = "default"
CONTEXT_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?")
_KEYS = ("manager", "api_key", "project")


@dataclass(frozen=True)
class Context:
    """`manager` is `host:port`; `api_key` the secret that every call carries."""

    manager: str
    api_key: str
    project: str = DEFAULT_PROJECT


def context_path() -> Path:
    """`$DURE_CONTEXT_FILE`, else `$XDG_CONFIG_HOME/dure/context.toml`, else below `~/.config`."""
    named = os.environ.get("DURE_CONTEXT_FILE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(home) / "dure" / "context.toml"


def saved_path(name: str) -> Path:
    """Where a context with a name is kept: in the folder `contexts` beside the current one."""
    return context_path().parent / "contexts" / f"{name}.toml"


def saved_contexts() -> dict[str, Path]:
    """Files of all contexts with a name, by name."""
    found = sorted((context_path().parent / "contexts").glob("*.toml"))
    return {path.stem: path for path in found if CONTEXT_NAME.fullmatch(path.stem)}


def load_context(path: Path | None = None) -> Context:
    """Raises DureError (reason NO_CONTEXT) when there is no file, InvalidInput when it is not right."""
    path = path or context_path()
    try:
        content = tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DureError(f"there is no context file {path}", reason="NO_CONTEXT") from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}", reason="BAD_CONTEXT") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", reason="BAD_CONTEXT") from error
    problems = [
        f"unknown key `{key}`; known: {', '.join(_KEYS)}" for key in sorted(content.keys() - set(_KEYS))
    ]
    problems += [f"`{key}` is missing" for key in ("manager", "api_key") if key not in content]
    problems += [f"`{key}` is not a string" for key in _KEYS if not isinstance(content.get(key, ""), str)]
    if problems:
        raise InvalidInput(f"{path}: " + "; ".join(problems), reason="BAD_CONTEXT")
    return Context(
        manager=content["manager"],
        api_key=content["api_key"],
        project=content.get("project") or DEFAULT_PROJECT,
    )


def save_context(path: Path, context: Context) -> None:
    """Writes it so that only its owner can read it."""
    write_toml(
        path,
        {"manager": context.manager, "api_key": context.api_key, "project": context.project},
        mode=0o600,
    )
