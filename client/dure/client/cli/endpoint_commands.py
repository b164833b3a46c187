"""`dure endpoint` with all of its commands: importing a file registers those in it."""

from dure.client.cli import endpoint_change, endpoint_logs, endpoint_rollout, endpoint_validate
from dure.client.cli.endpoint import endpoint

__all__ = ["endpoint", "endpoint_change", "endpoint_logs", "endpoint_rollout", "endpoint_validate"]
