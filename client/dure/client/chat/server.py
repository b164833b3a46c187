"""An OpenAI-compatible server, over HTTP. Raises errors of `dure.wire.errors` only."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from dure.client.chat import protocol, sse
from dure.client.chat.protocol import DONE, Chunk, Settings
from dure.wire.errors import (
    DureError,
    InvalidInput,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    TimedOut,
    Unauthenticated,
    Violation,
)

CONNECT_MAX_S = 10.0
# A large model may think for minutes before its first word.
SILENCE_MAX_S = 600.0
MODELS_WAIT_S = 30.0
BODY_BYTES_MAX = 16 * 1024 * 1024
_ERROR_BYTES_MAX = 64 * 1024
_SOFTER_MAX = 3

GetToken = Callable[[], Awaitable[str]]


@dataclass(frozen=True)
class _Refused:
    """An answer with a status that is none of success."""

    url: str
    status: int
    body: bytes
    retry_after: str
    location: str


class ChatServer:
    """One server. `token` is asked before each request; an empty one is not sent.

    Use it as an async context manager.
    """

    def __init__(self, url: str, token: GetToken, *, silence_max_s: float = SILENCE_MAX_S) -> None:
        try:
            self._bases = protocol.bases(url)
        except ValueError as error:
            raise InvalidInput.of([Violation("base URL", str(error))]) from error
        self._token = token
        self._http = aiohttp.ClientSession(
            # A question comes minutes after the last: an idle connection would often be gone by then.
            connector=aiohttp.TCPConnector(force_close=True),
            timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_MAX_S, sock_read=silence_max_s),
            # An HTTP proxy of the environment has no part in traffic to this machine.
            trust_env=not _is_here(self._bases[0]),
        )

    async def __aenter__(self) -> ChatServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.close()

    @property
    def base(self) -> str:
        """The base URL that answered, or the first to be tried."""
        return self._bases[0]

    async def models(self) -> list[str]:
        """Ids of the models that it serves. Raises NotFound (CHAT_NO_MODELS) if it does not tell."""
        timeout = aiohttp.ClientTimeout(total=MODELS_WAIT_S, sock_connect=CONNECT_MAX_S)
        async with self._request("GET", "/models", timeout=timeout) as response:
            if isinstance(response, _Refused):
                if response.status in (404, 405, 501):
                    raise NotFound(
                        f"{response.url} answers {response.status}: the server does not say which models it "
                        "has, if it serves language models at all",
                        reason="CHAT_NO_MODELS",
                    )
                raise _error(response)
            body = await _body(response, BODY_BYTES_MAX)
            try:
                return protocol.read_models(body)
            except protocol.Strange as error:
                raise _strange(response, error) from error

    async def answer(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Settings
    ) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes, in pieces; close it (`contextlib.aclosing`) when leaving it early."""
        body = protocol.request_body(model, messages, settings)
        for left in reversed(range(_SOFTER_MAX + 1)):
            async with self._request("POST", "/chat/completions", json=body) as response:
                if not isinstance(response, _Refused):
                    async for chunk in _chunks(response):
                        yield chunk
                    return
                said = protocol.error_text(response.body)
                softer = protocol.soften(body, said) if response.status in (400, 422, 501) else None
                if softer is None or not left:
                    raise _error(response)
                body = softer

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, **more: Any
    ) -> AsyncIterator[aiohttp.ClientResponse | _Refused]:
        """The response if it is a success. Tries all bases until one is not answered with 404."""
        headers = {"Accept": "text/event-stream, application/json"}
        token = await self._token()
        if token:
            if not (token.isascii() and token.isprintable()):
                raise InvalidInput.of([Violation("token", "has characters that no token has")])
            headers["Authorization"] = f"Bearer {token}"
        refused: _Refused | None = None
        for base in list(self._bases):
            url = base + path
            async with self._sent(method, url, headers=headers, **more) as response:
                if response.status == 200:
                    self._bases = [base]
                    yield response
                    return
                again = _Refused(
                    url,
                    response.status,
                    await _body(response, _ERROR_BYTES_MAX, cut=True),
                    response.headers.get("Retry-After", ""),
                    response.headers.get("Location", ""),
                )
            if refused is None or again.status not in (404, 405):
                refused = again
            if again.status not in (404, 405):
                break
        assert refused is not None, "there is at least one base"
        yield refused

    @asynccontextmanager
    async def _sent(self, method: str, url: str, **more: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._http.request(method, url, allow_redirects=False, **more) as response:
                yield response
        except aiohttp.ClientSSLError as error:
            raise DureError(f"no secure connection to {url}: {error}", reason="CHAT_UNREACHABLE") from error
        except aiohttp.ClientConnectorError as error:
            why = error.os_error.strerror or str(error.os_error)
            raise DureError(f"nobody answers at {url}: {why}", reason="CHAT_UNREACHABLE") from error
        except TimeoutError as error:
            raise TimedOut(f"{url} did not answer in time", reason="CHAT_TIMED_OUT") from error
        except aiohttp.ClientPayloadError as error:
            raise DureError("the answer broke off in the middle", reason="CHAT_BROKEN_OFF") from error
        except aiohttp.ClientResponseError as error:
            raise DureError(
                f"{url} does not answer in HTTP: {error.message}", reason="CHAT_NOT_COMPATIBLE"
            ) from error
        except (aiohttp.ClientConnectionError, aiohttp.InvalidURL) as error:
            raise DureError(
                f"{url}: the connection was closed without an answer", reason="CHAT_UNREACHABLE"
            ) from error


async def _chunks(response: aiohttp.ClientResponse) -> AsyncGenerator[Chunk, None]:
    """An answer, streamed or whole: servers that cannot stream answer whole, whatever they were asked."""
    try:
        if response.content_type != "text/event-stream":
            yield protocol.read_whole(await _body(response, BODY_BYTES_MAX))
            return
        reader = sse.EventReader()
        size_bytes = 0
        async for piece in response.content.iter_any():
            size_bytes += len(piece)
            if size_bytes > BODY_BYTES_MAX:
                raise protocol.Strange(f"it is longer than {BODY_BYTES_MAX} bytes")
            for data in reader.feed(piece):
                if data.strip() == DONE:
                    return
                if data.strip():
                    yield protocol.read_chunk(data)
        for data in reader.end():
            if data.strip() not in ("", DONE):
                yield protocol.read_chunk(data)
    except protocol.ServerError as error:
        raise DureError(
            f"the server failed in the middle of its answer: {error}", reason="CHAT_FAILED"
        ) from error
    except sse.TooLong as error:
        raise _strange(response, protocol.Strange("an event of it is too long")) from error
    except protocol.Strange as error:
        raise _strange(response, error) from error


async def _body(response: aiohttp.ClientResponse, bytes_max: int, *, cut: bool = False) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > bytes_max:
            if cut:
                break
            raise DureError(
                f"{response.url} answers with more than {bytes_max} bytes", reason="CHAT_NOT_COMPATIBLE"
            )
    return bytes(body[:bytes_max])


def _strange(response: aiohttp.ClientResponse, error: protocol.Strange) -> DureError:
    kind = response.content_type
    return DureError(
        f"{response.url} does not look like an OpenAI-compatible API; of its answer ({kind}): {error}",
        reason="CHAT_NOT_COMPATIBLE",
    )


def _error(refused: _Refused) -> DureError:
    """A sentence for an answer that is none."""
    said = protocol.error_text(refused.body)
    colon = f": {said}" if said else ""
    match refused.status:
        case 401:
            return Unauthenticated(f"the server wants another token{colon}", reason="CHAT_TOKEN")
        case 403:
            return PermissionDenied(f"the server does not let this token in{colon}", reason="CHAT_TOKEN")
        case 404 | 405:
            if said and protocol.code_of(refused.body) != "no_such_endpoint" and "model" in said.lower():
                return NotFound(f"the server has no such model{colon}", reason="CHAT_NO_SUCH_MODEL")
            return NotFound(
                f"{refused.url} answers {refused.status}{colon}; is it a language model?",
                reason="CHAT_NOT_COMPATIBLE",
            )
        case 429:
            return ResourceExhausted(
                f"the server takes no more requests now{colon}{_again(refused)}", reason="CHAT_BUSY"
            )
        case 400 | 413 | 422:
            return InvalidInput(f"the server refuses the question{colon}", reason="CHAT_REFUSED")
        case 503:
            return DureError(f"the server cannot answer now{colon}{_again(refused)}", reason="CHAT_BUSY")
        case 504:
            return TimedOut(f"the server was too slow{colon}", reason="CHAT_TIMED_OUT")
        case status if 300 <= status < 400:
            return DureError(
                f"{refused.url} says that it has moved to {refused.location or 'somewhere else'}",
                reason="CHAT_MOVED",
            )
    return DureError(f"{refused.url} answers {refused.status}{colon}", reason="CHAT_FAILED")


def _again(refused: _Refused) -> str:
    return f"; try again in {refused.retry_after} s" if refused.retry_after.isdigit() else ""


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
