"""What it costs an agent to measure containers: real ones of the node's engine, idle.

As `measuring`, with the Docker back end. Bound: 50 containers every 5 s under 1% of a core. DURE_BENCH_IMAGE names an
image with `sleep` that is on the node.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from dure.agent.backends.base import Container, Handle, Plan
from dure.agent.backends.docker.backend import DockerBackend
from dure.fleet.v1 import fleet_pb2
from dure.wire import identity

from bench.measuring import cost

IMAGE = "dure-test:2"
CONTAINERS, INTERVAL_MS, SPAN_S, BOUND_PERCENT = 50, 5_000, 20.0, 1.0
STARTS_AT_ONCE = 4
