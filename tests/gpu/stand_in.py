"""A node's GPUs, as the stand-in for NVIDIA's library tells them: what tests build, change and break."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
GPU_USER = HERE / "gpu_user.py"
LIBRARY = "libnvidia-ml.so.1"
NOT_SUPPORTED, DRIVER_NOT_LOADED, GPU_IS_LOST = 3, 9, 15
# Four GPUs: two with NVLink between them, one beside, one in MIG mode.
FOUR_GPUS: dict[str, Any] = json.loads((HERE / "four_gpus.json").read_text())
_FLAGS = (
    "-std=gnu11",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-deprecated-declarations",
    "-shared",
    "-fPIC",
)

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (`cc`)")


def header() -> Path | None:
    """NVIDIA's nvml.h, where its package is installed."""
    try:
        files = importlib.metadata.files("nvidia-nvml-dev") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "nvml.h"), None)


@functools.cache
def functions() -> frozenset[str]:
    """The names of all functions of NVML: of the header, and those that Python's bindings call."""
    import pynvml

    found = set(re.findall(r'FunctionPointer\("(nvml\w+)"\)', Path(pynvml.__file__).read_text()))
    if (known := header()) is not None:
        found |= set(re.findall(r"\bDECLDIR\s+(nvml\w+)\(", known.read_text(errors="replace")))
    return frozenset(found)


def build(folder: Path) -> Path:
    """Makes the library in the folder. With NVIDIA's header the compiler checks every prototype."""
    source = HERE / "fake_nvml.c"
    told = frozenset(re.findall(r"^(?:nvmlReturn_t|const char \*)\s*(nvml\w+)\(", source.read_text(), re.M))
    rest = folder / "not_supported.c"
    names = sorted(functions() - told)
    rest.write_text("".join(f"int {name}(void) {{ return {NOT_SUPPORTED}; }}\n" for name in names))
    known = header()
    checked = () if known is None else ("-DUSE_NVML_H", f"-I{known.parent}")
    target = folder / LIBRARY
    command = ["cc", *_FLAGS, *checked, f"-Wl,-soname,{LIBRARY}", "-o", str(target), str(source), str(rest)]
    done = subprocess.run([*command, "-lpthread"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return target


class GpuNode:
    """`state` is what the library tells, once it is written: see fake_nvml.c."""

    def __init__(self, folder: Path, state: dict[str, Any] | None = None, driver: bool = True) -> None:
        self.library, self.ledger, self._file = folder / "nvml", folder / "ledger", folder / "nvml.json"
        self.library.mkdir(parents=True)
        self.ledger.mkdir(mode=0o777)
        self.state: dict[str, Any] = json.loads(json.dumps(state or FOUR_GPUS))
        for gpu in self.state["gpus"]:
            for one in [gpu, *gpu.get("parts", ())]:
                (self.ledger / one["uuid"]).mkdir()
        self.write()
        if driver:
            self.install()

    def install(self) -> None:
        """The driver's library, from now on."""
        build(self.library)

    def write(self) -> None:
        """What `state` says is so, from the next call on."""
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self.state))
        new.replace(self._file)

    def unload(self) -> None:
        """The driver is not loaded, until `write`."""
        self._file.unlink()

    @property
    def environ(self) -> dict[str, str]:
        """A program that is started with it sees the GPUs; one that runs already cannot be made to."""
        return {
            "LD_LIBRARY_PATH": str(self.library),
            "FAKE_NVML": str(self._file),
            "FAKE_NVML_LEDGER": str(self.ledger),
        }

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("env", *(f"{name}={value}" for name, value in self.environ.items()))

    def user(self, used_bytes: int, util: int = 0, flag: str = "", python: str = sys.executable) -> list[str]:
        """The command of a program that uses the GPUs that it is given."""
        return [
            python,
            str(GPU_USER),
            str(self.ledger),
            str(used_bytes),
            str(util),
            *([flag] if flag else []),
        ]
