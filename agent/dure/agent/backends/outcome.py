"""What a kernel's folder tells about its end: exit.json and the log, in the words of `KernelExit`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from dure.agent.backends.base import Ended
from dure.agent.log_files import last_lines

# What shells say of a command that they could not run, and what a daemon leaves behind.
_CODES = {
    0: " (a service runs until it is stopped: keep it in the foreground)",
    126: " (to a shell: not executable)",
    127: " (to a shell: command not found)",
}


def read(record: dict[str, Any]) -> Ended:
    """The end that exit.json records."""
    code = int(record["code"])
    by_wish = bool(record.get("stopped"))
    if "reason" in record:
        return Ended(str(record["reason"]), code, str(record["message"]), by_wish)
    if record.get("stage") == "action":
        return Ended("ACTION_FAILED", code, str(record["message"]), by_wish)
    number = int(record["signal"])
    if record["oom"] and code != 0:
        return Ended("OOM", code, "it used more memory than it was granted (mem) and was killed", by_wish)
    if record.get("stage") == "setup":
        message = str(record["message"]) or f"it was ended by {_name(number)} before its command started"
        return Ended("START_FAILED", code, message, by_wish)
    if number:
        return Ended("SIGNALED", code, f"its main process was ended by {_name(number)}", by_wish)
    hint = _CODES.get(code, "")
    return Ended("EXITED", code, f"its main process exited with code {code}{hint}", by_wish)


def log_tail(folder: Path, bytes_max: int) -> str:
    """The end of the log, whole lines where there are several."""
    text = last_lines(folder, bytes_max).decode(errors="replace")
    # A replacement character is longer than the byte that it stands for.
    return text.encode()[-bytes_max:].decode(errors="ignore")


def without_message(tail: str, message: str) -> str:
    """The end of a log without the sentence at its very end that the message of the exit says already."""
    text = tail.removesuffix("\n")
    return text.removesuffix(message) if message and text.endswith(message) else tail


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
