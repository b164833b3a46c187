"""What the gatekeeper does about servicers that forget to ask, and methods that have no row in the table."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
from link.manager.test_access_matrix import call

from dure.manager import auth, schema, scope
from dure.manager.audit import Trail
from dure.manager.auth import Gatekeeper
from dure.manager.store import Store, new_uid, now_ms
from dure.v1 import folder_pb2
from dure.wire import tokens
from dure.wire.channel import open_channel

SECRET = tokens.new_secret("key")


async def administrator(store: Store) -> None:
    async with store.write() as tx:
        uid, now = new_uid(), now_ms()
        tx.session.add(
            schema.User(uid=uid, name="admin", admin=True, disabled=False, description="", created_ms=now)
        )
        tx.session.add(schema.Project(uid=new_uid(), name="a", created_ms=now))
        tx.session.add(
            schema.ApiKey(
                uid=new_uid(),
                hash=tokens.hash_secret(SECRET),
                user_uid=uid,
                label="",
                role="admin",
                expires_ms=None,
                created_ms=now,
            )
        )


def test_what_forgets_to_ask_answers_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(tmp_path / "dure.db")
        await store.open()

        async def asks(request: Any, context: Any) -> folder_pb2.GetFolderResponse:
            assert auth.current().name == "admin"
            async with store.read() as session:
                await scope.project(session, "projects/a")
            return folder_pb2.GetFolderResponse()

        async def forgets(request: Any, context: Any) -> folder_pb2.GetFolderResponse:
            return folder_pb2.GetFolderResponse()

        methods = {"GetFolder": forgets, "ListFolders": asks, "NewMethod": asks}
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                method,
                request_deserializer=folder_pb2.GetFolderRequest.FromString,
                response_serializer=folder_pb2.GetFolderResponse.SerializeToString,
            )
            for name, method in methods.items()
        }
        server = grpc.aio.server(interceptors=[Gatekeeper(store, Trail(store))])
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("dure.v1.FolderService", handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            await administrator(store)
            ended = {}
            async with open_channel(f"127.0.0.1:{port}") as channel:
                for name in methods:
                    ended[name] = await call(channel, f"/dure.v1.FolderService/{name}", b"", SECRET)
            codes = {name: code for name, (code, _) in ended.items()}
            assert codes == {
                "GetFolder": grpc.StatusCode.INTERNAL,
                "ListFolders": grpc.StatusCode.OK,
                "NewMethod": grpc.StatusCode.PERMISSION_DENIED,
            }
            assert "reference" not in ended["GetFolder"][1] and "log has more" in ended["GetFolder"][1]
        finally:
            await server.stop(0.1)
            await store.close()

    asyncio.run(run())
