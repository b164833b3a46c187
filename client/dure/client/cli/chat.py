"""`dure chat`: talk to a language model, an endpoint's or any other behind an OpenAI-compatible API."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from dure.client.chat.access import EndpointAccess
from dure.client.chat.conversation import Conversation
from dure.client.chat.protocol import Settings
from dure.client.chat.server import ChatServer
from dure.client.cli import live
from dure.client.cli.chat_screen import PlainScreen, Screen, TerminalScreen
from dure.client.cli.chat_turns import Chat, talk
from dure.client.cli.options import ContextFile, Duration, Shell
from dure.client.client import Client
from dure.wire.errors import DureError

MESSAGE_BYTES_MAX = 1024 * 1024


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("endpoint", required=False)
@click.option(
    "--base-url", metavar="URL", help="Another server, with its version: https://api.openai.com/v1."
)
@click.option("--token", envvar="DURE_CHAT_TOKEN", help="Token or key; or in DURE_CHAT_TOKEN.")
@click.option("--model", metavar="ID", help="Which model; otherwise the server's first.")
@click.option("--system", default="", help="What the model is told before the first question.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0: always the likeliest word.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.")
@click.option("-m", "--message", help="Ask this, print the answer, and leave; `-` reads it from stdin.")
@click.option(
    "--timeout",
    "timeout_s",
    type=Duration(),
    default=120.0,
    show_default="120s",
    help="How long to wait for a healthy replica at most.",
)
@click.option("-v", "--verbose", is_flag=True, help="How long answers took, on stderr.")
@click.option("-q", "--quiet", is_flag=True, help="Only the answers.")
@click.option("--no-color", is_flag=True, help="No colours.")
@click.option(
    "--project",
    metavar="NAME",
    envvar="DURE_PROJECT",
    help="Another project than the context's; also $DURE_PROJECT.",
)
@click.option("--context", "context_file", type=ContextFile(), help="Another context: its name, or its file.")
def chat(
    endpoint: str | None,
    base_url: str | None,
    token: str | None,
    model: str | None,
    system: str,
    temperature: float | None,
    max_tokens: int | None,
    message: str | None,
    timeout_s: float,
    verbose: bool,
    **options: Any,
) -> int:
    """Chat with the language model behind ENDPOINT, or behind any OpenAI-compatible API (--base-url).

    Waits until a replica is healthy, and makes a token for itself where one is needed, which is revoked at
    the end. Without a terminal, or with --message, it asks once and prints the answer.

    In a chat: /model shows the models and /model ID changes to another, /clear forgets what was said, /quit
    (or Ctrl-D) ends the chat, Ctrl-C ends an answer.
    """
    if (endpoint is None) == (base_url is None):
        raise click.UsageError(
            "give either ENDPOINT or --base-url: `dure endpoint list` shows the endpoints"
            if endpoint is None
            else "ENDPOINT and --base-url exclude each other: the endpoint's address is known"
        )
    shell = Shell(None, options["quiet"], options["no_color"], options["project"], options["context_file"])
    once = message
    if message == "-" or (message is None and not sys.stdin.isatty()):
        once = _read_stdin()
    if once is not None and not once.strip():
        raise click.UsageError("the message is empty: give it with --message or on stdin")
    settings = Settings(temperature, max_tokens)
    with asyncio.Runner() as runner, _ended_in_order():
        connection = Connection(shell, endpoint, base_url, token)
        try:
            server = runner.run(connection.open(timeout_s))
            talking = Chat(
                server,
                Conversation(system),
                settings,
                _screen(shell, interactive=once is None),
                timing=(verbose or (once is None and sys.stdout.isatty())) and not shell.quiet,
                model=model or "",
            )
            if once is not None:
                runner.run(talking.ask(once))
            else:
                talk(talking, runner, quiet=shell.quiet)
        finally:
            runner.run(connection.close())
    return 0


class Connection:
    """The way to a server: to an endpoint's, through the manager, or to one that was named."""

    def __init__(self, shell: Shell, endpoint: str | None, base_url: str | None, token: str | None) -> None:
        self._shell = shell
        self._endpoint = endpoint
        self._base_url = base_url
        self._given = token
        self._client: Client | None = None
        self._access: EndpointAccess | None = None
        self._server: ChatServer | None = None

    async def open(self, timeout_s: float) -> ChatServer:
        """Waits for an endpoint to serve. Raises DureError."""
        url = self._base_url or ""
        if self._endpoint is not None:
            self._client = self._shell.client()
            self._access = EndpointAccess(self._client, self._endpoint)
            with live.wait_progress(self._shell) as notify:
                url = (await self._access.wait(timeout_s, notify)).address
        self._server = ChatServer(url, self._token)
        return self._server

    async def _token(self) -> str:
        if self._given is not None or self._access is None:
            return self._given or ""
        return await self._access.token()

    async def close(self) -> None:
        """Revokes the token, if one was made."""
        if self._access is not None and (trouble := await self._access.close()):
            click.echo(f"warning: {trouble}", err=True)
        if self._server is not None:
            await self._server.close()
        if self._client is not None:
            await self._client.close()


def _screen(shell: Shell, *, interactive: bool) -> Screen:
    if sys.stdout.isatty() and not shell.quiet:
        return TerminalScreen(color=shell.color)
    return PlainScreen()


def _read_stdin() -> str:
    content = sys.stdin.buffer.read(MESSAGE_BYTES_MAX + 1)
    if len(content) > MESSAGE_BYTES_MAX:
        raise DureError(f"the message on stdin has more than {MESSAGE_BYTES_MAX} bytes")
    return content.decode("utf-8", "replace")


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """A closed terminal or a `kill` ends the chat as Ctrl-D would: the token is revoked."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
