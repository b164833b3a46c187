"""Chatting with OpenAI-compatible servers of all sorts, through real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from link.chat.fake_model import SENTENCE, FakeModel, serving

from dure.client.chat.protocol import Chunk, Settings
from dure.client.chat.server import ChatServer
from dure.wire.errors import DureError

QUESTION = [{"role": "user", "content": "Why?"}]


def chat(
    model: FakeModel, body: Callable[[ChatServer], Awaitable[None]], path: str = "/v1", **more: Any
) -> None:
    async def run() -> None:
        async def token() -> str:
            return model.token or ""

        async with asyncio.timeout(10), serving(model):
            async with ChatServer(model.url + path, token, **more) as server:
                await body(server)

    asyncio.run(run())


async def said(server: ChatServer, name: str = "tiny", settings: Settings = Settings()) -> list[Chunk]:  # noqa: B008
    async with aclosing(server.answer(name, QUESTION, settings)) as chunks:
        return [chunk async for chunk in chunks]


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize(
    "model",
    [
        FakeModel(),
        FakeModel(cut_bytes=1),
        FakeModel(cut_bytes=7, newline="\r\n"),
        FakeModel(cut_bytes=3, comments=True),
        FakeModel(newline="\r"),
        FakeModel(done=False),
        FakeModel(done=False, usage=False),
        FakeModel(streams=False),
        FakeModel(refuses_fields=("stream_options",), usage=False),
        FakeModel(refuses_fields=("stream",)),
        FakeModel(refuses_fields=("stream_options", "stream", "max_tokens")),
        FakeModel(token="sk-secret"),
    ],
)
def test_answers_come_whole(model: FakeModel) -> None:
    async def body(server: ChatServer) -> None:
        chunks = await said(server, settings=Settings(0.5, 20))
        assert text(chunks) == SENTENCE
        finishes = [chunk.finish for chunk in chunks if chunk.finish]
        assert finishes == ["stop"]
        tokens = [chunk.tokens for chunk in chunks if chunk.tokens is not None]
        assert tokens == ([7] if model.usage else [])
        last = model.asked[-1]
        assert last["temperature"] == 0.5
        assert (last.get("max_tokens") or last.get("max_completion_tokens")) == 20

    chat(model, body)


@pytest.mark.parametrize(
    ("prefix", "given", "tried"),
    [
        ("/v1", "", ["/v1/models"]),
        ("/v1", "/", ["/v1/models"]),
        ("/v1", "/v1/", ["/v1/models"]),
        ("/v1", "/v1/chat/completions", ["/v1/models"]),
        ("", "", ["/v1/models", "/models"]),
        ("/openai/v2beta", "/openai/v2beta", ["/openai/v2beta/models"]),
        ("/api/v3", "/api/v3/models", ["/api/v3/models"]),
        ("/llm", "/llm", ["/llm/v1/models", "/llm/models"]),
    ],
)
def test_the_base_url_with_and_without_its_version(prefix: str, given: str, tried: list[str]) -> None:
    model = FakeModel(prefix=prefix, models=["a", "b"])

    async def body(server: ChatServer) -> None:
        assert await server.models() == ["a", "b"]
        assert [path for _, path, _ in model.seen] == tried
        assert server.base == model.url + prefix
        assert text(await said(server, "a")) == SENTENCE
        # What has answered once is not looked for again.
        assert len(model.seen) == len(tried) + 1

    chat(model, body, given)


def test_the_version_is_found_without_a_list_of_models() -> None:
    model = FakeModel(prefix="")

    async def body(server: ChatServer) -> None:
        assert text(await said(server)) == SENTENCE
        assert [path for _, path, _ in model.seen] == ["/v1/chat/completions", "/chat/completions"]

    chat(model, body, "")


@pytest.mark.parametrize(
    ("model", "reason", "says"),
    [
        (
            FakeModel(status=401, body='{"error": {"code": "token_expired", "message": "it is over"}}'),
            "CHAT_TOKEN",
            "over",
        ),
        (FakeModel(status=403, body='{"error": "other endpoint"}'), "CHAT_TOKEN", "other endpoint"),
        (
            FakeModel(status=429, body="slow down", headers={"Retry-After": "7"}),
            "CHAT_BUSY",
            "slow down; try again in 7 s",
        ),
        (
            FakeModel(status=503, body='{"message": "loading"}', headers={"Retry-After": "5"}),
            "CHAT_BUSY",
            "loading",
        ),
        (
            FakeModel(status=400, body='{"detail": [{"loc": ["body", "model"], "msg": "bad"}]}'),
            "CHAT_REFUSED",
            "bad (body.model)",
        ),
        (
            FakeModel(status=500, body="<html>oops</html>", content_type="text/html"),
            "CHAT_FAILED",
            "answers 500",
        ),
        (FakeModel(status=504, body="{}"), "CHAT_TIMED_OUT", "too slow"),
        (
            FakeModel(status=302, headers={"Location": "https://elsewhere/v1"}),
            "CHAT_MOVED",
            "https://elsewhere/v1",
        ),
        (FakeModel(models=["other"]), "CHAT_NO_SUCH_MODEL", "`tiny` does not exist"),
        (FakeModel(prefix="/somewhere"), "CHAT_NOT_COMPATIBLE", "answers 404"),
    ],
)
def test_refusals_are_told_in_a_sentence(model: FakeModel, reason: str, says: str) -> None:
    async def body(server: ChatServer) -> None:
        with pytest.raises(DureError) as error:
            await said(server)
        assert error.value.reason == reason
        assert says in error.value.message
        assert "\n" not in error.value.message and len(error.value.message) < 800

    chat(model, body)


def test_an_error_in_the_middle_comes_after_what_was_said() -> None:
    model = FakeModel(fails_after=3)

    async def body(server: ChatServer) -> None:
        got = ""
        with pytest.raises(DureError, match="CUDA out of memory"):
            async with aclosing(server.answer("tiny", QUESTION, Settings())) as chunks:
                async for chunk in chunks:
                    got += chunk.text
        assert got == "Many hands make "

    chat(model, body)


def test_a_connection_that_breaks_is_no_end() -> None:
    async def body(server: ChatServer) -> None:
        with pytest.raises(DureError) as error:
            await said(server)
        assert error.value.reason == "CHAT_BROKEN_OFF"

    chat(FakeModel(breaks_after=2), body)


def test_silence_has_a_limit() -> None:
    async def body(server: ChatServer) -> None:
        with pytest.raises(DureError) as error:
            await said(server)
        assert error.value.reason == "CHAT_TIMED_OUT"

    chat(FakeModel(pause_after=1), body, silence_max_s=0.2)


def test_leaving_early_ends_the_request() -> None:
    model = FakeModel(pause_after=1)

    async def body(server: ChatServer) -> None:
        async with aclosing(server.answer("tiny", QUESTION, Settings())) as chunks:
            async for chunk in chunks:
                if chunk.text:
                    break
        await model.left.wait()

    chat(model, body)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (FakeModel(prefix="/x"), "CHAT_NO_MODELS"),
        (FakeModel(status=405), "CHAT_NO_MODELS"),
        (FakeModel(token="sk", status=401), "CHAT_TOKEN"),
    ],
)
def test_no_list_of_models(model: FakeModel, reason: str) -> None:
    async def body(server: ChatServer) -> None:
        with pytest.raises(DureError) as error:
            await server.models()
        assert error.value.reason == reason

    chat(model, body)


def test_nobody_there_and_something_else_there() -> None:
    async def run() -> None:
        async def token() -> str:
            return ""

        async def talks_otherwise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
            await writer.drain()
            await reader.read(100)
            writer.close()

        server = await asyncio.start_server(talks_otherwise, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with ChatServer(f"127.0.0.1:{port}", token) as chat_server:
            with pytest.raises(DureError) as strange:
                await chat_server.models()
        server.close()
        async with ChatServer(f"http://127.0.0.1:{port}/v1", token) as chat_server:
            with pytest.raises(DureError) as nobody:
                await chat_server.models()
        assert strange.value.reason in ("CHAT_NOT_COMPATIBLE", "CHAT_UNREACHABLE")
        assert nobody.value.reason == "CHAT_UNREACHABLE"
        assert f"nobody answers at http://127.0.0.1:{port}/v1/models" in nobody.value.message

    asyncio.run(run())
