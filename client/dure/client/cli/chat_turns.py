"""The turns of a chat: questions, answers, and the commands between them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from contextlib import aclosing
from dataclasses import dataclass, field

import click

from dure.client.chat.conversation import Conversation
from dure.client.chat.protocol import Settings
from dure.client.chat.server import ChatServer
from dure.client.cli import failures
from dure.client.cli.chat_screen import Screen, visible
from dure.wire.errors import DureError

PROMPT = "> "
_HELP = (
    "/model [ID]  show the models, or change to another",
    "/clear       forget what was said",
    "/quit        end the chat (or Ctrl-D)",
    "Ctrl-C       end an answer",
)


@dataclass
class Chat:
    """A conversation with a server. `model` empty: the first that the server lists."""

    server: ChatServer
    conversation: Conversation
    settings: Settings
    screen: Screen
    timing: bool
    model: str
    listed: list[str] = field(default_factory=list)

    async def choose_model(self) -> None:
        """Sets the model if none is set. Raises DureError."""
        if self.model:
            return
        self.listed = await self.server.models()
        if not self.listed:
            raise DureError("the server has no model yet", reason="CHAT_NO_MODELS")
        self.model = self.listed[0]

    async def ask(self, question: str) -> None:
        """Shows the answer to a question, and keeps both. Raises DureError."""
        await self.choose_model()
        clock = asyncio.get_running_loop().time
        began_s, first_s = clock(), 0.0
        answer, thoughts, pieces, finish = "", "", 0, ""
        tokens: int | None = None
        messages = self.conversation.with_question(question)
        whole = False
        self.screen.begin()
        try:
            async with aclosing(self.server.answer(self.model, messages, self.settings)) as chunks:
                async for chunk in chunks:
                    if chunk.text or chunk.thought:
                        first_s = first_s or clock()
                        pieces += 1
                        answer += chunk.text
                        thoughts += chunk.thought
                        self.screen.show(chunk.text, chunk.thought)
                    finish = chunk.finish or finish
                    tokens = chunk.tokens if chunk.tokens is not None else tokens
            whole = True
        except asyncio.CancelledError:
            whole = bool(answer)
            raise
        finally:
            self.screen.end()
            if whole:
                self.conversation.answered(question, answer)
        if not answer and not thoughts:
            raise DureError("the model answered with nothing", reason="CHAT_EMPTY")
        if finish == "length":
            note("(the answer was cut at the longest length; --max-tokens sets it)")
        if self.timing:
            note(timing_line(self.model, tokens, pieces, first_s - began_s, clock() - began_s))

    async def change_model(self, wanted: str) -> None:
        """`/model`: shows what there is, or changes. Raises DureError."""
        if wanted:
            self.model = wanted
            note(f"talking to {wanted} from now on")
            return
        self.listed = await self.server.models()
        for model in self.listed:
            note(f"{'*' if model == self.model else ' '} {visible(model)}")


def talk(chat: Chat, runner: asyncio.Runner, *, quiet: bool) -> None:
    """Questions and answers until the user ends it. What goes wrong is told, and the chat goes on."""
    with contextlib.suppress(ImportError):  # line editing and history, where Python has them
        import readline  # noqa: F401
    runner.run(chat.choose_model())
    if not quiet:
        others = f" (of {len(chat.listed)}; /model shows all)" if len(chat.listed) > 1 else ""
        note(f"Talking to {visible(chat.model)}{others} at {chat.server.base}. /help shows the commands.")
    while True:
        try:
            line = input(PROMPT).strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit ends the chat)")
            continue
        if line in ("/quit", "/exit"):
            return
        if line:
            _take(chat, runner, line)


def _take(chat: Chat, runner: asyncio.Runner, line: str) -> None:
    """One line that the user typed."""
    command, _, argument = line.partition(" ")
    try:
        if command == "/clear":
            chat.conversation.clear()
            note("(forgotten)")
        elif command == "/model":
            runner.run(chat.change_model(argument.strip()))
        elif command == "/help":
            for text in _HELP:
                note(text)
        elif command.startswith("/") and "/" not in command[1:]:
            note(f"there is no {command}; /help shows what there is")
        else:
            runner.run(chat.ask(line))
    except KeyboardInterrupt:
        note("(stopped)")
    except DureError as error:
        for text in failures.explain(error, ["chat"]):
            click.echo(text, err=True)


def timing_line(model: str, tokens: int | None, pieces: int, first_s: float, whole_s: float) -> str:
    """`smollm2: 42 tokens in 1.40 s, the first after 0.20 s, then 34.2 a second`."""
    count, unit = (pieces, "pieces") if tokens is None else (tokens, "tokens")
    line = f"{visible(model)}: {count} {unit} in {whole_s:.2f} s, the first after {first_s:.2f} s"
    following_s = whole_s - first_s
    if count > 1 and following_s > 0.001:
        line += f", then {(count - 1) / following_s:.1f} a second"
    return line


def note(text: str) -> None:
    """A line of ours between those of the model."""
    click.secho(text, dim=sys.stderr.isatty(), err=True)
