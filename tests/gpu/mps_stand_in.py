"""Stand-ins for `nvidia-cuda-mps-control` and `nvidia-smi`: programs that keep state as the real ones do."""

from __future__ import annotations

import sys
from pathlib import Path

CONTROL = """
import os, socket, sys, time
pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
path, pid_file = os.path.join(pipes, "control"), os.path.join(pipes, "nvidia-cuda-mps-control.pid")
folder = os.path.dirname(os.path.abspath(sys.argv[0]))

def connect():
    line = socket.socket(socket.AF_UNIX)
    line.connect(path)
    return line

if sys.argv[1:] != ["-d"]:
    try:
        line = connect()
    except OSError:
        sys.exit("Cannot find MPS control daemon process")
    line.sendall(sys.stdin.read().encode())
    print(line.recv(4096).decode())
    sys.exit(0)
while os.path.exists(os.path.join(folder, "hangs")):
    time.sleep(0.05)
if os.path.exists(os.path.join(folder, "broken")):
    sys.exit("An error occurred while starting the daemon")
try:
    connect()
    sys.exit("An instance of this daemon is already running")
except OSError:
    pass
if os.path.exists(path):
    os.unlink(path)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
if os.fork():
    os._exit(0)
os.setsid()
with open(pid_file, "w") as file:
    file.write(str(os.getpid()))
with open(os.path.join(folder, "started"), "a") as file:
    file.write(os.environ["CUDA_VISIBLE_DEVICES"] + "\\n")
while True:
    line, _ = listener.accept()
    command = line.recv(4096).decode().strip()
    if command == "quit":
        os.unlink(pid_file)
        line.sendall(b"bye")
        sys.exit(0)
    line.sendall(b"4711" if command == "get_server_list" else b"unknown command")
    line.close()
"""

SMI = """
import os, sys
folder = os.path.dirname(os.path.abspath(sys.argv[0]))
arguments = sys.argv[1:]
kept = os.path.join(folder, "mode-" + arguments[arguments.index("-i") + 1])
if "-c" in arguments:
    if os.path.exists(os.path.join(folder, "denied")):
        print("Unable to set the compute mode: Insufficient Permissions")
        sys.exit(4)
    with open(kept, "w") as file:
        file.write(arguments[arguments.index("-c") + 1])
else:
    mode = open(kept).read() if os.path.exists(kept) else "DEFAULT"
    print({"DEFAULT": "Default", "EXCLUSIVE_PROCESS": "Exclusive_Process"}[mode])
"""


class MpsNode:
    """A folder of programs for PATH. A file `broken` keeps daemons from starting, with `hangs` they never
    come so far, `denied` keeps compute modes from being set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir(parents=True)
        for name, text in (("nvidia-cuda-mps-control", CONTROL), ("nvidia-smi", SMI)):
            program = self.folder / name
            program.write_text(f"#!{sys.executable}{text}")
            program.chmod(0o755)

    def starts(self) -> list[str]:
        """The GPUs for which a daemon was started, in order."""
        started = self.folder / "started"
        return started.read_text().split() if started.exists() else []

    def compute_mode(self, gpu: str) -> str:
        kept = self.folder / f"mode-{gpu}"
        return kept.read_text() if kept.exists() else "DEFAULT"

    def set(self, flag: str) -> None:
        (self.folder / flag).touch()

    def clear(self, flag: str) -> None:
        (self.folder / flag).unlink()
