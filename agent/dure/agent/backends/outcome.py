"""What a kernel's folder tells about its end: exit.json and the log, in the words of `KernelExit`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from dure.agent.backends.base import Ended


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
    return Ended("EXITED", code, f"its main process exited with code {code}", by_wish)


def log_tail(folder: Path, bytes_max: int) -> str:
    """The end of the log, whole lines where there are several."""
    data = b""
    for name in ("log.1", "log"):
        try:
            with open(folder / name, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - bytes_max - 1))
                data += file.read(bytes_max + 1)
        except FileNotFoundError:
            continue
    if len(data) > bytes_max:
        data = data[-bytes_max:]
        _, line_break, rest = data.partition(b"\n")
        data = rest if line_break and rest else data
    text = data.decode(errors="replace")
    # A replacement character is longer than the byte that it stands for.
    return text.encode()[-bytes_max:].decode(errors="ignore")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
