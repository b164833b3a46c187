"""What is said between a chat and an OpenAI-compatible server: where to ask, and how to read the answers.

Lenient with what servers leave out or add, as there are many; what cannot be an answer raises `Strange`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

ERROR_TEXT_MAX = 500
_VERSION = re.compile(r"v[0-9]+[a-z0-9]*", re.IGNORECASE)
_PASTED = ("/chat/completions", "/completions", "/models")
DONE = "[DONE]"


class Strange(Exception):
    """Not what an OpenAI-compatible server says. The message tells what it was."""


class ServerError(Exception):
    """The server says in the middle of an answer that it failed, in these words."""


@dataclass(frozen=True)
class Chunk:
    """A part of an answer. `thought` is what a model thinks aloud before it answers."""

    text: str = ""
    thought: str = ""
    finish: str = ""
    tokens: int | None = None


@dataclass(frozen=True)
class Settings:
    """How a model is asked."""

    temperature: float | None = None
    max_tokens: int | None = None


def bases(url: str) -> list[str]:
    """The base URLs to try for what a user gave, best first. Raises ValueError with a sentence.

    The base contains a version (`http://host/v1`); where it is left out, `/v1` is tried, then none.
    """
    text = url.strip()
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"`{url}` is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() for c in text):
        raise ValueError(f"`{url}` is not a URL such as http://127.0.0.1:8000/v1")
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"`{url}` has more than host and path; give a key with --token")
    path = parts.path.rstrip("/")
    for ending in _PASTED:
        path = path.removesuffix(ending)
    base = urlunsplit((parts.scheme, parts.netloc, path.rstrip("/"), "", ""))
    if any(_VERSION.fullmatch(segment) for segment in path.split("/")):
        return [base]
    return [f"{base}/v1", base]


def request_body(model: str, messages: Sequence[Mapping[str, str]], settings: Settings) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if settings.max_tokens is not None:
        body["max_tokens"] = settings.max_tokens
    return body


def soften(body: Mapping[str, Any], refusal: str) -> dict[str, Any] | None:
    """The request without what a server named when it refused it; None if it named nothing that can go."""
    softer = dict(body)
    if "max_completion_tokens" in refusal and "max_tokens" in softer:
        softer["max_completion_tokens"] = softer.pop("max_tokens")
    elif "stream_options" in softer and ("stream_options" in refusal or "include_usage" in refusal):
        del softer["stream_options"]
    elif softer.get("stream") and "stream" in refusal.lower():
        softer.pop("stream_options", None)
        softer["stream"] = False
    else:
        return None
    return softer


def read_chunk(data: str) -> Chunk:
    """One event of a streamed answer. Raises ServerError, Strange."""
    content = _object(data.encode())
    _raise_error(content)
    choice = _first(content.get("choices"))
    delta = choice.get("delta")
    return _chunk(content, choice, delta if isinstance(delta, dict) else {})


def read_whole(body: bytes) -> Chunk:
    """An answer that was not streamed. Raises ServerError, Strange."""
    content = _object(body)
    _raise_error(content)
    choice = _first(content.get("choices"))
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Strange(f"it has no message: {_short(body.decode('utf-8', 'replace'))}")
    return _chunk(content, choice, message)


def read_models(body: bytes) -> list[str]:
    """Ids of the models that a server lists. Raises Strange."""
    content = _object(body)
    listed = content.get("data")
    if not isinstance(listed, list):
        raise Strange(f"it lists no models: {_short(body.decode('utf-8', 'replace'))}")
    return [item["id"] for item in listed if isinstance(item, dict) and isinstance(item.get("id"), str)]


def error_text(body: bytes) -> str:
    """What a server says went wrong, from any of the forms that are in use; short, on one line."""
    text = body.decode("utf-8", "replace").strip()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return "" if text.startswith("<") else _short(text)
    return _short(_said(content) or text)


def code_of(body: bytes) -> str:
    """The error's code, such as the proxy's `token_missing`; empty if there is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    error = content.get("error") if isinstance(content, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else ""


def _said(content: object) -> str:
    match content:
        case str():
            return content
        case {"error": {"message": str(message)}} | {"error": str(message)} | {"message": str(message)}:
            return message
        case {"detail": str(message)} | {"msg": str(message)}:
            return message
        case {"detail": [*problems]} if problems:
            where = [
                ".".join(map(str, problem["loc"]))
                for problem in problems
                if isinstance(problem, dict) and isinstance(problem.get("loc"), list)
            ]
            return "; ".join(filter(None, map(_said, problems))) + (f" ({', '.join(where)})" if where else "")
    return ""


def _object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Strange(f"it is not JSON: {_short(body.decode('utf-8', 'replace'))}") from None
    if not isinstance(content, dict):
        raise Strange(f"it is not a JSON object: {_short(body.decode('utf-8', 'replace'))}")
    return content


def _raise_error(content: Mapping[str, Any]) -> None:
    if content.get("error") or content.get("object") == "error":
        raise ServerError(_short(_said(content) or json.dumps(content)))


def _first(choices: object) -> dict[str, Any]:
    """The first choice; an empty one for the chunks that carry none, such as the one with the usage."""
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    return {}


def _chunk(content: Mapping[str, Any], choice: Mapping[str, Any], said: Mapping[str, Any]) -> Chunk:
    usage = content.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Chunk(
        text=_text(said.get("content")),
        thought=_text(said.get("reasoning_content") or said.get("reasoning")),
        finish=_text(choice.get("finish_reason")),
        tokens=tokens if isinstance(tokens, int) else None,
    )


def _text(value: object) -> str:
    """Content is text, or a list of parts of which some are text."""
    if isinstance(value, list):
        return "".join(_text(part.get("text")) for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= ERROR_TEXT_MAX else f"{line[:ERROR_TEXT_MAX]}..."
