"""The client library of Dure.

    async with Client.from_context() as client:
        endpoint = await client.endpoints.wait("chat", timeout_s=120)

Everything returns the messages of `dure.v1` and raises the errors of `dure.wire.errors`, nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dure.client.client import Client
    from dure.client.context import Context

__all__ = ["Client", "Context"]


def __getattr__(name: str) -> object:
    # The command line lives below this package, and `dure --help` must not wait for gRPC to load.
    if name == "Client":
        from dure.client.client import Client

        return Client
    if name == "Context":
        from dure.client.context import Context

        return Context
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
