"""Logs, asked for on the stream."""

from __future__ import annotations

import functools

from dure.agent.conformance.check import check
from dure.agent.conformance.manager import LOG_BYTES_MAX, Answer
from dure.agent.conformance.outcome import demand
from dure.agent.conformance.stage import Stage

_LINES = 3_000
_COUNT = "import sys\nfor i in range(3000): print('line %05d ' % i + 'x' * 120)\nsys.stdout.write('no end')"


@check("11.1")
async def log_whole(stage: Stage) -> None:
    """A log is sent whole and in order, times never decrease, and messages keep to their bound."""
    spec = stage.spec(["python3", "-c", _COUNT])
    await stage.exited(spec)
    answer = await stage.log(spec.uid)
    texts = [text for _, text in answer.lines]
    demand(len(texts) == _LINES + 1, f"{_LINES + 1} lines", f"{len(texts)}, the last `{texts[-1:]}`")
    ordered = all(text.startswith(f"line {number:05d} ") for number, text in enumerate(texts[:-1]))
    demand(ordered and texts[-1] == "no end", "the lines as they were written", texts[:2] + texts[-2:])
    times = [time_ms for time_ms, _ in answer.lines]
    demand(times == sorted(times) and times[0] > 0, "times that never decrease", times[:3])
    demand(answer.largest_bytes <= LOG_BYTES_MAX, "messages of at most 256 KiB", answer.largest_bytes)


@check("11.2")
async def log_tail(stage: Stage) -> None:
    """`tail_lines` gives the last lines only."""
    spec = stage.spec("for i in 1 2 3 4 5; do echo $i; done; exit 1")
    await stage.exited(spec)
    texts = [text for _, text in (await stage.log(spec.uid, tail_lines=2)).lines]
    demand(texts == ["4", "5"], "the last 2 lines", texts)


@check("11.3")
async def log_follow(stage: Stage) -> None:
    """Who follows gets lines as they are written, and the end of the log when the kernel has ended."""
    spec = stage.spec()
    status = await stage.healthy(spec)
    answer = stage.manager.ask_log(spec.uid, follow=True)
    for word in ("first", "second"):
        await stage.ask(status, f"say/{word}")
        await stage.until(
            functools.partial(_has, answer, word),
            f"the line `{word}` soon after it was written",
            lambda: f"{[text for _, text in answer.lines][-3:]}",
        )
    demand(not answer.complete, "an answer that goes on", "complete = true")
    await stage.ask(status, "exit/0")
    await stage.until(lambda: answer.complete, "complete = true after the kernel's end", lambda: "nothing")


@check("11.4")
async def log_after_removal(stage: Stage) -> None:
    """The log of a kernel that is gone can still be read."""
    spec = stage.spec("echo remember me; exit 1")
    await stage.exited(spec)
    await stage.gone(spec.uid)
    texts = [text for _, text in (await stage.log(spec.uid)).lines]
    demand(texts == ["remember me"], "its log", texts)


@check("11.5")
async def log_of_nobody(stage: Stage) -> None:
    """A log that is not kept is answered with a notice, and complete."""
    answer = await stage.log("11111111-0000-4000-8000-000000000000")
    demand(not answer.lines and any(answer.notices), "a notice that says so", answer)


def _has(answer: Answer, line: str) -> bool:
    return any(text == line for _, text in answer.lines)


CHECKS = (log_whole, log_tail, log_follow, log_after_removal, log_of_nobody)
