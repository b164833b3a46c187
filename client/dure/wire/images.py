"""Which registry an image comes from, by Docker's rule, and how a registry is named."""

from __future__ import annotations

import re

# Of images that name no registry.
DEFAULT_REGISTRY = "docker.io"
HOST_MAX = 128

_ALIASES = frozenset({"index.docker.io", "registry-1.docker.io"})
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*(:[0-9]{{1,5}})?")


def registry_of(reference: str) -> str:
    """The host of an image's registry, as `registry_host` writes it.

    The first of several components is a host if it has a dot, a colon or an upper-case letter, or is
    `localhost`; else the image is one of `docker.io`.
    """
    first, slash, _ = reference.partition("/")
    if slash and (_is_host(first) or first != first.lower()):
        return _one_name(first.lower())
    return DEFAULT_REGISTRY


def registry_host(text: str) -> str:
    """The one form of a registry's host. Raises ValueError with a sentence."""
    host = text.strip().lower()
    # What stands before an @ may be a password, which no error repeats.
    shown = host.rpartition("@")[2][:80]
    if "://" in host or "/" in host:
        bare = shown.split("://")[-1].split("/")[0]
        raise ValueError(f"`{shown}` is an address; give only the host and port that images name: {bare}")
    port = int(host.partition(":")[2] or 1) if len(host) <= HOST_MAX and _HOST.fullmatch(host) else 0
    if not 1 <= port <= 65535:
        raise ValueError(f"`{shown}` is not a host; write it such as ghcr.io or registry.example.com:5000")
    if not _is_host(host):
        raise ValueError(
            f"`{shown}` at the beginning of an image is not read as a registry: that takes a dot or a "
            f"port, such as {shown}:5000; docker.io is for images that name none"
        )
    return _one_name(host)


def _is_host(component: str) -> bool:
    return "." in component or ":" in component or component == "localhost"


def _one_name(host: str) -> str:
    return DEFAULT_REGISTRY if host in _ALIASES else host
