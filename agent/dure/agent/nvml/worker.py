"""The worker: answers each line on its standard input, the name of a question, with a line of JSON.

It imports nothing of the agent but its neighbour: it starts in a moment, and stays small.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

from dure.agent.nvml.reading import Reader


def main() -> None:
    # One question waits for its answer at a time; the client sees to that.
    questions: queue.Queue[str] = queue.Queue(maxsize=1)
    threading.Thread(target=_answer, args=(questions,), daemon=True).start()
    for line in sys.stdin:
        questions.put(line.strip())
    # The agent's end of the pipe is closed: this process goes too, even if the driver holds the other thread.
    os._exit(0)


def _answer(questions: queue.Queue[str]) -> None:
    reader = Reader()
    known: dict[str, Callable[[], dict[str, Any]]] = {"devices": reader.devices, "uses": reader.uses}
    try:
        while True:
            print(json.dumps(known[questions.get()]()), flush=True)
    finally:
        # Without an answer the client would wait for its whole time limit.
        os._exit(1)


if __name__ == "__main__":
    main()
