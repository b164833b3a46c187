"""Which servicer serves which gRPC service, and reflection over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.routing.v1 import routing_pb2, routing_pb2_grpc
from dure.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    agent_pb2,
    agent_pb2_grpc,
    catalog_pb2,
    catalog_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
    folder_pb2,
    folder_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    project_pb2,
    project_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    scaling_pb2,
    scaling_pb2_grpc,
    token_pb2,
    token_pb2_grpc,
)

MODULES = (
    (admin_pb2, admin_pb2_grpc),
    (agent_pb2, agent_pb2_grpc),
    (catalog_pb2, catalog_pb2_grpc),
    (endpoint_pb2, endpoint_pb2_grpc),
    (folder_pb2, folder_pb2_grpc),
    (model_pb2, model_pb2_grpc),
    (project_pb2, project_pb2_grpc),
    (registry_pb2, registry_pb2_grpc),
    (scaling_pb2, scaling_pb2_grpc),
    (token_pb2, token_pb2_grpc),
    (fleet_pb2, fleet_pb2_grpc),
    (routing_pb2, routing_pb2_grpc),
    (health_pb2, health_pb2_grpc),
)


def register(server: grpc.aio.Server, servicers: Sequence[Any]) -> None:
    """Adds a servicer for each service that there is. Raises ValueError if one has none, or two."""
    names = [reflection.SERVICE_NAME]
    left = list(servicers)
    for messages, stubs in MODULES:
        for service in messages.DESCRIPTOR.services_by_name.values():
            base = getattr(stubs, f"{service.name}Servicer")
            mine = [servicer for servicer in left if isinstance(servicer, base)]
            if len(mine) != 1:
                raise ValueError(f"{service.full_name} has {len(mine)} servicers")
            left.remove(mine[0])
            add: Callable[[Any, grpc.aio.Server], None] = getattr(
                stubs, f"add_{service.name}Servicer_to_server"
            )
            add(mine[0], server)
            names.append(service.full_name)
    if left:
        raise ValueError(f"{left[0]} serves nothing that is known")
    reflection.enable_server_reflection(names, server)
