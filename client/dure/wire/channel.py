"""gRPC channels and servers, set up the same way everywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence

# Silences a line on stderr for every subprocess; we exec, and never fork after gRPC has started.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import grpc.aio

# Snapshots are cut into pieces well below this; a larger message is a bug or an attack.
MESSAGE_BYTES_MAX = 1024 * 1024
# Content of files travels in pieces of at most this.
PIECE_BYTES = 256 * 1024
PIECE_BYTES_MAX = 512 * 1024

# A peer whose host vanished sends no FIN: pings find out within 20 s.
_KEEPALIVE: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_SIZES: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)
SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    *_KEEPALIVE,
    *_SIZES,
    # Without it two servers share a port in silence, and half of the calls go astray.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
# A manager that is back is found within a second, not after gRPC's default of up to two minutes.
CLIENT_OPTIONS: Sequence[tuple[str, int]] = (
    *_KEEPALIVE,
    *_SIZES,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
    # Channels of one process share connections otherwise: a new one would inherit another's backoff.
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to `host:port`. It connects when it is used, and again when it breaks."""
    return grpc.aio.insecure_channel(address, options=list(CLIENT_OPTIONS))


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    """Metadata that authenticates a call."""
    return (("authorization", f"Bearer {secret}"),)
