"""How an answer is shown: as Markdown on a terminal, as it comes elsewhere."""

from __future__ import annotations

import shutil
import sys
from typing import Protocol

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

# Drawing costs more than tokens do: no more often than people can see.
_DRAWS_PER_S = 12


class Screen(Protocol):
    """Shows one answer after the other."""

    def begin(self) -> None: ...
    def show(self, text: str, thought: str) -> None: ...
    def end(self) -> None: ...


class PlainScreen:
    """What the model said, byte for byte, and nothing else."""

    def __init__(self) -> None:
        self._at_line_start = True

    def begin(self) -> None:
        self._at_line_start = True

    def show(self, text: str, thought: str) -> None:
        if text:
            click.echo(text, nl=False)
            sys.stdout.flush()
            self._at_line_start = text.endswith("\n")

    def end(self) -> None:
        if not self._at_line_start:
            click.echo()


class TerminalScreen:
    """Renders Markdown while it comes.

    What is finished is printed and scrolls away; only the block that still grows is drawn again and again,
    and of one that is higher than the terminal its end.
    """

    def __init__(self, *, color: bool) -> None:
        self._console = Console(highlight=False, no_color=not color)
        self._live: Live | None = None
        self._text = ""
        self._thought = ""

    def begin(self) -> None:
        self._text = self._thought = ""
        self._live = Live(
            Text(""),
            console=self._console,
            transient=True,
            refresh_per_second=_DRAWS_PER_S,
            vertical_overflow="crop",
        )
        self._live.start()

    def show(self, text: str, thought: str) -> None:
        assert self._live is not None
        if thought:
            self._thought += visible(thought)
        if text:
            if self._thought:
                self._print(Text(self._thought.strip(), style="dim italic"))
                self._thought = ""
            self._text += visible(text)
            done, self._text = split_blocks(self._text)
            if done:
                self._print(Markdown(done))
        self._live.update(self._tail())

    def end(self) -> None:
        if self._live is None:
            return
        live, self._live = self._live, None
        live.update(Text(""))
        live.stop()
        if self._thought:
            self._console.print(Text(self._thought.strip(), style="dim italic"))
        if self._text.strip():
            self._console.print(Markdown(self._text))
        self._text = self._thought = ""

    def _print(self, block: RenderableType) -> None:
        assert self._live is not None
        # First the block leaves the part that is redrawn, or it would be seen twice.
        self._live.update(Text(""), refresh=True)
        self._console.print(Group(block, Text("")))

    def _tail(self) -> RenderableType:
        lines = max(shutil.get_terminal_size().lines - 2, 1)
        if self._thought:
            return Text("\n".join(self._thought.split("\n")[-lines:]), style="dim italic")
        columns = self._console.width
        rows = sum(1 + len(line) // columns for line in self._text.split("\n"))
        if rows > lines // 2:  # Markdown adds borders and margins
            return Text("\n".join(self._text.split("\n")[-(lines // 2) :]))
        return Markdown(self._text)


def visible(text: str) -> str:
    """Without control characters: what a model says must not steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def split_blocks(text: str) -> tuple[str, str]:
    """The Markdown blocks that are complete, and the rest: blocks end with an empty line outside of code.

    A list goes on after an empty line, so it is complete only with the next block.
    """
    fence = ""
    cut = position = 0
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1]):
        position += len(line) + 1
        stripped = line.strip()
        if fence:
            if stripped.startswith(fence) and not stripped.strip(fence[0]):
                fence = ""
        elif stripped.startswith(("```", "~~~")):
            fence = stripped[0] * (len(stripped) - len(stripped.lstrip(stripped[0])))
        elif not stripped and position:
            following = lines[number + 1]
            if following.strip() and not _goes_on(following):
                cut = position
    return text[:cut], text[cut:]


def _goes_on(line: str) -> bool:
    """Whether a line after an empty one may belong to the list before it."""
    start = line.lstrip()
    return line[:1] in " \t" or start[:1] in "-*+" or start[:1].isdigit()
