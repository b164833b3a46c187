"""An OpenAI-compatible server that behaves, and misbehaves as it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

SENTENCE = "Many hands make light work — 두레."


@dataclass
class FakeModel:
    """What it does next, and what it was asked. `prefix` is where its API begins."""

    prefix: str = "/v1"
    models: list[str] = field(default_factory=lambda: ["tiny"])
    token: str | None = None
    answer: str = SENTENCE
    streams: bool = True
    refuses_fields: tuple[str, ...] = ()
    cut_bytes: int = 0  # sizes of the pieces in which events are written; 0: one event at once
    newline: str = "\n"
    comments: bool = False
    done: bool = True
    usage: bool = True
    finish: str = "stop"
    fails_after: int | None = None  # words, then an error in the stream
    breaks_after: int | None = None  # words, then the connection
    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    thoughts: str = ""
    pause_after: int | None = None  # words, then wait for `go_on`
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    paused: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((request.method, request.path, request.headers.get("Authorization", "")))
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _error(401, "Incorrect API key provided")
        if self.status != 200:
            return web.Response(
                status=self.status, text=self.body, headers=self.headers, content_type=self.content_type
            )
        if (request.method, request.path) == ("GET", f"{self.prefix}/models"):
            data = [{"id": model, "object": "model"} for model in self.models]
            return web.json_response({"object": "list", "data": data})
        if (request.method, request.path) == ("POST", f"{self.prefix}/chat/completions"):
            return await self._complete(request)
        return web.json_response({"detail": "Not Found"}, status=404)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.asked.append(asked)
        for name in self.refuses_fields:
            if asked.get(name):
                hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                return _error(400, f"Unsupported parameter: '{name}'.{hint}")
        if asked["model"] not in self.models:
            return _error(404, f"The model `{asked['model']}` does not exist.")
        words = [word + " " for word in self.answer.split(" ")]
        words[-1] = words[-1].removesuffix(" ")
        usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
        if not (self.streams and asked.get("stream")):
            message = {"role": "assistant", "content": self.answer}
            whole = {"choices": [{"index": 0, "message": message, "finish_reason": self.finish}]}
            return web.json_response(whole | ({"usage": usage} if self.usage else {}))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            await self._stream(request, response, words, usage if self.usage else None)
        except (ConnectionError, asyncio.CancelledError):
            self.left.set()
            raise
        return response

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        words: list[str],
        usage: dict[str, int] | None,
    ) -> None:
        await self._event(response, _delta({"role": "assistant", "content": None}))
        if self.thoughts:
            await self._event(response, _delta({"reasoning_content": self.thoughts}))
        for number, word in enumerate(words):
            if number == self.fails_after:
                await self._event(response, {"error": {"message": "CUDA out of memory", "code": 500}})
                return
            if number == self.breaks_after:
                assert request.transport is not None
                await asyncio.sleep(0)
                request.transport.close()
                return
            if number == self.pause_after:
                self.paused.set()
                await self.go_on.wait()
            await self._event(response, _delta({"content": word}))
        await self._event(response, _delta({}, self.finish))
        if usage is not None:
            await self._event(response, {"choices": [], "usage": usage})
        if self.done:
            await self._write(response, "data: [DONE]")

    async def _event(self, response: web.StreamResponse, content: object) -> None:
        if self.comments:
            await self._write(response, ": keep-alive")
        await self._write(response, f"data: {json.dumps(content, ensure_ascii=False)}")

    async def _write(self, response: web.StreamResponse, line: str) -> None:
        data = (line + 2 * self.newline).encode()
        size = self.cut_bytes or len(data)
        for start in range(0, len(data), size):
            await response.write(data[start : start + size])
            if self.cut_bytes:
                await asyncio.sleep(0)


def _delta(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }


def _error(status: int, message: str) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return web.json_response({"error": error}, status=status)


@asynccontextmanager
async def serving(model: FakeModel) -> AsyncIterator[FakeModel]:
    """The model at a port of its own."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", model.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    model.port = runner.addresses[0][1]
    try:
        yield model
    finally:
        model.go_on.set()
        await runner.cleanup()
