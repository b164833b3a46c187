"""A small registry of images on the loopback, where engines need no TLS; it can be slow, or private."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import platform
import tarfile
from collections.abc import AsyncIterator, Sequence
from typing import Any

from aiohttp import web
from containers import engines

PIECE_BYTES = 64 * 1024
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_UNKNOWN = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def tool() -> bytes:
    """A layer with one program, `busybox`, which runs without anything beside it. No two are the same: an
    engine that has one already would not fetch it."""
    with engines.client() as engine:
        made = engine.create_container(engines.IMAGE, ["true"])
        try:
            pieces, _ = engine.get_archive(made, "/usr/bin/busybox")
            data = io.BytesIO(b"".join(pieces))
        finally:
            engine.remove_container(made, force=True)
    with tarfile.open(fileobj=data) as archive:
        member = archive.next()
        assert member is not None
        file = archive.extractfile(member)
        assert file is not None
        program = file.read()
    return layer({"bin/busybox": program, "bin/sh": program, "layer": os.urandom(16)})


def layer(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def noise(size_bytes: int) -> bytes:
    """A layer of a size that no compression makes less."""
    return layer({f"noise-{os.urandom(4).hex()}": os.urandom(size_bytes)})


class Registry:
    """Lives on one event loop. `bytes_per_s` slows layers down, `user` makes it private, `pulls` are the
    manifests that were fetched, `begun` and `cut` count layers, all and those that nobody read to the end."""

    def __init__(self) -> None:
        self.bytes_per_s = 0
        self.user: tuple[str, str] | None = None
        self.pulls: list[str] = []
        self.begun = 0
        self.cut = 0
        self.at = ""
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[str, bytes] = {}

    def add(self, name: str, layers: Sequence[bytes], **config: Any) -> str:
        """An image; returns its full reference, with the tag 1."""
        packed = [gzip.compress(one, 1) for one in layers]
        made = json.dumps(
            {
                "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
                "os": "linux",
                "config": config,
                "rootfs": {"type": "layers", "diff_ids": [_digest(one) for one in layers]},
            }
        ).encode()
        for blob in (made, *packed):
            self._blobs[_digest(blob)] = blob
        kind = "application/vnd.docker.image.rootfs.diff.tar.gzip"
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _described("application/vnd.docker.container.image.v1+json", made),
            "layers": [_described(kind, blob) for blob in packed],
        }
        body = json.dumps(manifest).encode()
        self._manifests[f"{name}:1"] = self._manifests[f"{name}:{_digest(body)}"] = body
        return f"{self.at}/{name}:1"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self.user is not None:
            wanted = base64.b64encode(":".join(self.user).encode()).decode()
            if request.headers.get("Authorization") != f"Basic {wanted}":
                refusal = {"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}
                realm = {"WWW-Authenticate": 'Basic realm="test"'}
                return web.json_response(refusal, status=401, headers=realm)
        path = request.path.removeprefix("/v2/")
        name, _, last = path.rpartition("/")
        if not path:
            return web.json_response({})
        if name.endswith("/manifests"):
            name = name.removesuffix("/manifests")
            body = self._manifests.get(f"{name}:{last}")
            if body is None:
                return web.json_response(_UNKNOWN, status=404)
            if request.method == "GET":
                self.pulls.append(name)
            return web.Response(
                body=body, content_type=_MANIFEST, headers={"Docker-Content-Digest": _digest(body)}
            )
        return await self._send(request, self._blobs[last])

    async def _send(self, request: web.Request, blob: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(blob)
        await response.prepare(request)
        self.begun += 1
        try:
            for start in range(0, len(blob), PIECE_BYTES):
                await response.write(blob[start : start + PIECE_BYTES])
                if self.bytes_per_s and start + PIECE_BYTES < len(blob):
                    await asyncio.sleep(PIECE_BYTES / self.bytes_per_s)
        except (ConnectionError, asyncio.CancelledError):
            self.cut += 1
            raise
        return response


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Registry]:
    registry = Registry()
    app = web.Application()
    app.router.add_route("*", "/v2/{path:.*}", registry._answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        registry.at = f"127.0.0.1:{runner.addresses[0][1]}"
        yield registry
    finally:
        await runner.cleanup()
        with engines.client() as engine:
            tags = [tag for image in engine.images() for tag in image["RepoTags"] or ()]
            for tag in tags:
                if tag.startswith(f"{registry.at}/"):
                    engine.remove_image(tag, force=True)


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _described(kind: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "size": len(data), "digest": _digest(data)}
