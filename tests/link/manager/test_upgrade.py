"""A database of the first release, opened by this one."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, select

from dure.fleet.v1 import fleet_pb2
from dure.manager import messages, schema
from dure.manager import store as module
from dure.manager.store import Store
from dure.v1 import endpoint_pb2

KERNEL = fleet_pb2.KernelSpec(port=8000, health_check=fleet_pb2.HealthCheck(path="/health"))
KERNEL.command.argv.args.extend(["serve", "{port}"])
SPEC = {
    "folder": "m",
    "runtime": "custom",
    "model_mount_destination": "/models",
    "model_definition_path": "",
    "resource_group": "default",
    "slots": {"cpu": 500, "mem": 128 * 2**20 * 1000},
    "environ": {"A": "1"},
}
ENDPOINT = {
    "uid": "e", "project_uid": "p", "name": "e", "living_name": "e", "request_id": None, "created_ms": 1,
    "updated_ms": 1, "deleting": 0, "deleted_ms": None, "replica_count": 1, "open_to_public": 0, "etag": "x",
    "revision": 1, "proxy_group": "default", "port": 7100, "address": "http://h:7100", "status": "HEALTHY",
    "status_reason": "", "desired_replicas": 1, "ready_replicas": 1, "conditions": "[]", "blocked": 0,
    "errors": "[]", "failures": 0, "failed_ms": 0,
}  # fmt: skip
REVISION = {
    "endpoint_uid": "e", "number": 1, "created_ms": 1, "folder_uid": "f", "spec": json.dumps(SPEC),
    "definition": "", "kernel": KERNEL.SerializeToString(),
}  # fmt: skip


def first_release(path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(module.__file__).parent / "migrations"))
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    database = sqlite3.connect(path)
    for table, row in (("endpoints", ENDPOINT), ("revisions", REVISION)):
        columns, places = ", ".join(row), ", ".join(f":{name}" for name in row)
        database.execute(f"INSERT INTO {table} ({columns}) VALUES ({places})", row)
    database.commit()
    database.close()


def test_an_endpoint_is_shown_as_it_runs(tmp_path: Path) -> None:
    first_release(tmp_path / "dure.db")

    async def run() -> None:
        store = Store(tmp_path / "dure.db")
        await store.open()
        try:
            async with store.read() as session:
                row = (await session.scalars(select(schema.Endpoint))).one()
                revision = (await session.scalars(select(schema.Revision))).one()
                shown = messages.endpoint(row, "default", revision)
        finally:
            await store.close()
        assert (shown.model, shown.resource_slots["mem"]) == ("projects/default/folders/m", str(128 * 2**20))
        assert shown.image_pull_policy == endpoint_pb2.IMAGE_PULL_POLICY_IF_NOT_PRESENT
        assert (shown.security_profile, shown.require_enforcement) == (
            endpoint_pb2.SECURITY_PROFILE_DEFAULT,
            "",
        )
        assert list(shown.resolved.start_command.args) == ["serve", "{port}"]
        assert (shown.resolved.port, shown.resolved.health_check_path) == (8000, "/health")
        assert (shown.revision, shown.stable_revision) == (1, 1)

    asyncio.run(run())
