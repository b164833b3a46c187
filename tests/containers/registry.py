"""A small registry of images on the loopback, where engines need no TLS: it behaves, and can be slow, or private."""

from __future__ import annotations

import socket


def closed_port() -> int:
    """One at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
