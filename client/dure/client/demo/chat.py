"""Talking to the served model as any program would: through its address, with the OpenAI SDK."""

from __future__ import annotations

import asyncio
import importlib.util
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from dure.wire.errors import DureError

MODEL = "smollm2"
QUESTION = "In one sentence: why do villagers share their work at harvest time?"
TOKENS_MAX = 80
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Chat:
    """How a streamed chat went."""

    pieces: int
    first_piece_s: float
    whole_s: float


def check_installed() -> None:
    """Raises DureError when the demo's extra is missing."""
    missing = [name for name in ("openai", "xllamacpp") if importlib.util.find_spec(name) is None]
    if missing:
        raise DureError(
            f"the demo needs {' and '.join(missing)}: run `make demo`, or `pip install 'dure[demo]'`"
        )


async def stream(address: str, token: str, show: Callable[[str], None]) -> Chat:
    """Asks the question and shows the answer as it comes. Raises DureError."""
    import openai

    began = time.monotonic()
    first: float | None = None
    pieces = 0
    # An HTTP proxy of the environment has no part in traffic to this machine.
    http_client = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=f"{address.rstrip('/')}/v1",
        api_key=token,
        timeout=TIMEOUT_S,
        max_retries=0,
        http_client=http_client,
    ) as client:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": QUESTION}],
                    max_tokens=TOKENS_MAX,
                    temperature=0.2,
                    stream=True,
                )
                async for chunk in answer:
                    text = chunk.choices[0].delta.content if chunk.choices else None
                    if text:
                        first = first if first is not None else time.monotonic() - began
                        pieces += 1
                        show(text)
        except (openai.OpenAIError, TimeoutError) as error:
            raise DureError(f"the chat through {address} failed: {error or 'it took too long'}") from error
    if first is None:
        raise DureError(f"the model behind {address} answered with nothing")
    return Chat(pieces, first, time.monotonic() - began)


async def status_without_token(address: str) -> int:
    """The HTTP status that a request without a token is answered with."""
    return await asyncio.to_thread(_status, f"{address.rstrip('/')}/v1/models")


def _status(url: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError as error:
        raise DureError(f"cannot reach {url}: {error}") from error


def snippets(address: str, token: str) -> str:
    """A curl command and a Python program, ready to paste."""
    base = f"{address.rstrip('/')}/v1"
    return f"""\
curl -N {base}/chat/completions \\
  -H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' \\
  -d '{{"model": "{MODEL}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'

from openai import OpenAI
client = OpenAI(base_url="{base}", api_key="{token}")
for chunk in client.chat.completions.create(
    model="{MODEL}", stream=True, messages=[{{"role": "user", "content": "Hello!"}}]
):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
"""
