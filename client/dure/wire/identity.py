"""Who an agent or a proxy is: what it got when it joined, kept in a file that only it can read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dure.wire.settings import read_toml, write_toml


@dataclass(frozen=True)
class Identity:
    """Uid, and the secret that proves it."""

    uid: str
    credential: str


def load(home: Path) -> Identity | None:
    """The identity kept in a program's own folder, None before it has joined."""
    content = read_toml(home / "identity.toml")
    if not content:
        return None
    return Identity(uid=str(content["uid"]), credential=str(content["credential"]))


def save(home: Path, identity: Identity) -> None:
    write_toml(home / "identity.toml", {"uid": identity.uid, "credential": identity.credential}, mode=0o600)
