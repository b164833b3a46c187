"""One control daemon of NVIDIA's MPS, for one GPU: starting it, finding it again, asking it, ending it.

It belongs to the GPU and not to the agent: it stays when the agent ends, and the next agent takes it up. All
that is needed for that stands in its folder, which holds its pipes and logs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from dure.agent.shim.files import read_json, write_bytes, write_json

PROGRAM, SMI = "nvidia-cuda-mps-control", "nvidia-smi"
EXCLUSIVE, DEFAULT = "EXCLUSIVE_PROCESS", "DEFAULT"
CALL_LIMIT_S = 10.0
QUIT_LIMIT_S, APPEAR_LIMIT_S, POLL_S = 5.0, 5.0, 0.05
# A socket's path has 107 bytes; MPS' longest name in there is `control_privileged`.
PIPE_PATH_BYTES_MAX = 107 - len("/control_privileged")
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "LANG")
_MODES = {"Default": DEFAULT, "Exclusive_Process": EXCLUSIVE, "Prohibited": "PROHIBITED"}


class DaemonFailed(Exception):
    """It does not do what it should; the message is for people."""


def folders(home: Path) -> list[Path]:
    """Of daemons that were started in the agent's folder, now or earlier."""
    return sorted((home / "mps").glob("*")) if (home / "mps").is_dir() else []


class Daemon:
    """`gpu` is a UUID."""

    def __init__(self, folder: Path, gpu: str) -> None:
        self.folder = folder
        self.gpu = gpu
        self.pipes = folder / "pipe"
        # Why the GPU can be used by programs that are no clients; empty if it cannot.
        self.not_exclusive = ""

    @staticmethod
    def of(home: Path, gpu: str) -> Daemon:
        """For the GPU; its folder's name is short, for the sake of sockets in it."""
        return Daemon(home / "mps" / hashlib.sha256(gpu.encode()).hexdigest()[:8], gpu)

    @staticmethod
    def at(folder: Path) -> Daemon | None:
        """What was started there."""
        known = read_json(str(folder / "daemon.json"))
        return None if known is None else Daemon(folder, str(known["gpu"]))

    def was_started(self) -> bool:
        return (self.folder / "daemon.json").exists()

    def impossible(self) -> str:
        """Empty if it can be started on this node, as far as that shows without doing it."""
        if shutil.which(PROGRAM) is None:
            return f"the program `{PROGRAM}` is not on this node"
        if len(os.fsencode(os.path.realpath(self.pipes))) > PIPE_PATH_BYTES_MAX:
            return f"{self.pipes} is too long a path for the sockets of MPS: choose a shorter --data-dir"
        return ""

    def pid(self) -> int:
        """Of the daemon that runs, 0 if none does."""
        try:
            pid = int((self.pipes / f"{PROGRAM}.pid").read_text(encoding="ascii"))
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return 0
        # The pid of a daemon that is gone may be another process by now, that of another GPU included.
        ours = f"CUDA_MPS_PIPE_DIRECTORY={os.path.realpath(self.pipes)}".encode()
        return pid if PROGRAM.encode() in line and ours in environ and state != "Z" else 0

    async def start(self) -> None:
        """Raises DaemonFailed."""
        log = self.folder / "log"
        for folder in (self.folder, self.pipes, log):
            folder.mkdir(parents=True, exist_ok=True)
        # First: what may run from here on can be found again.
        if not self.was_started():
            write_json(
                str(self.folder / "daemon.json"),
                {"gpu": self.gpu, "compute_mode": await self._compute_mode()},
            )
        await self._set_exclusive()
        # To a file: the daemon inherits it and would hold a pipe open.
        said = log / "start"
        with open(said, "wb") as out:
            code = await self._run([PROGRAM, "-d"], out.fileno(), {"CUDA_VISIBLE_DEVICES": self.gpu})
        if code != 0:
            text = said.read_text(encoding="utf-8", errors="replace").strip()
            raise DaemonFailed(
                f"its control daemon did not start (code {code}){': ' if text else ''}{text[:300]}"
            )
        await self.ask("get_server_list")
        await self._until(lambda: self.pid() > 0, APPEAR_LIMIT_S)
        if not self.pid():
            raise DaemonFailed("its control daemon ended at once, or does not tell its process id")

    async def ask(self, command: str) -> str:
        """Its answer. Raises DaemonFailed, also if it does not answer in time."""
        answer = self.folder / "answer"
        write_bytes(str(self.folder / "question"), command.encode() + b"\n")
        with open(answer, "wb") as out, open(self.folder / "question", "rb") as question:
            code = await self._run([PROGRAM], out.fileno(), {}, question.fileno())
        text = answer.read_text(encoding="utf-8", errors="replace").strip()
        if code != 0:
            raise DaemonFailed(f"its control daemon does not answer{': ' if text else ''}{text[:300]}")
        return text

    async def stop(self) -> None:
        """Quits it, by force if it must be, and gives the GPU the compute mode back that it had: an exclusive
        one without a daemon would serve one program only."""
        if self.pid():
            with contextlib.suppress(DaemonFailed):
                await self.ask("quit")
            await self._until(lambda: not self.pid(), QUIT_LIMIT_S)
        if pid := self.pid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            await self._until(lambda: not self.pid(), QUIT_LIMIT_S)
        known = read_json(str(self.folder / "daemon.json")) or {}
        before = str(known.get("compute_mode", ""))
        if before and before != EXCLUSIVE:
            with contextlib.suppress(DaemonFailed):
                await self._smi("-c", before)

    async def end(self) -> None:
        """Leaves nothing of it."""
        await self.stop()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    async def _set_exclusive(self) -> None:
        try:
            await self._smi("-c", EXCLUSIVE)
            self.not_exclusive = ""
        except DaemonFailed as error:
            self.not_exclusive = str(error)

    async def _compute_mode(self) -> str:
        """Empty if it cannot be told."""
        try:
            said = await self._smi("--query-gpu=compute_mode", "--format=csv,noheader")
        except DaemonFailed:
            return ""
        return _MODES.get(said, "")

    async def _smi(self, *arguments: str) -> str:
        answer = self.folder / "smi"
        with open(answer, "wb") as out:
            code = await self._run([SMI, "-i", self.gpu, *arguments], out.fileno(), {})
        text = answer.read_text(encoding="utf-8", errors="replace").strip()
        if code != 0:
            raise DaemonFailed(f"nvidia-smi failed (code {code}){': ' if text else ''}{text[:200]}")
        return text

    async def _until(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Or the time is over."""
        for _ in range(round(limit_s / POLL_S)):
            if condition():
                return
            await asyncio.sleep(POLL_S)

    async def _run(
        self, line: list[str], out: int, extra: dict[str, str], question: int = asyncio.subprocess.DEVNULL
    ) -> int:
        """Exit code. Raises DaemonFailed if it cannot be run, or does not end in time."""
        environ = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environ |= {
            "CUDA_MPS_PIPE_DIRECTORY": os.path.realpath(self.pipes),
            "CUDA_MPS_LOG_DIRECTORY": os.path.realpath(self.folder / "log"),
            **extra,
        }
        try:
            process = await asyncio.create_subprocess_exec(
                *line, stdin=question, stdout=out, stderr=out, env=environ, start_new_session=True
            )
        except OSError as error:
            raise DaemonFailed(f"`{line[0]}` cannot be run: {error.strerror}") from error
        try:
            async with asyncio.timeout(CALL_LIMIT_S):
                return await process.wait()
        except TimeoutError as error:
            raise DaemonFailed(f"`{line[0]}` did not end within {CALL_LIMIT_S:g} s") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
