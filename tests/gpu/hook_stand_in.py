"""Stand-ins for HAMi-core's library: one can be loaded, and keeps nobody within anything; one cannot."""

from __future__ import annotations

import subprocess
from pathlib import Path


def build(folder: Path) -> Path:
    target = folder / "libvgpu.so"
    _compile(folder, target, "int dure_hook_stand_in(void) { return 1; }\n")
    return target


def unloadable(folder: Path) -> Path:
    """It needs another library, which is not there: the loader says so on standard error, and goes on."""
    target, needed = folder / "libvgpu-unloadable.so", folder / "libneeded.so"
    _compile(folder, needed, "int dure_needed(void) { return 1; }\n")
    _compile(
        folder, target, "int dure_needed(void); int dure_hook(void) { return dure_needed(); }\n", str(needed)
    )
    needed.unlink()
    return target


def _compile(folder: Path, target: Path, text: str, *more: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    source = target.with_suffix(".c")
    source.write_text(text)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target), str(source), *more], check=True, timeout=60)
