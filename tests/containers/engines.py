"""A container engine for tests, and the image that they run: made of Debian's packages, not fetched.

DOCKER_HOST names the engine, else it is at its usual place. Tests are skipped where there is none, but in CI
they fail.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import ImageNotFound, NotFound

__all__ = ["IMAGE", "URL", "NotFound"]
# A new number makes it anew where an older one is there.
IMAGE = "dure-test:2"
# `python` as models name it, a shell, and a program that runs anywhere for images of other layers.
PACKAGES = "python3,python-is-python3,busybox-static"
URL = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"


def path() -> str:
    """Of the engine's socket."""
    return URL.removeprefix("unix://")


@contextlib.contextmanager
def client(url: str = URL, timeout_s: float = 60.0) -> Iterator[docker.APIClient]:
    made = docker.APIClient(url, version="auto", timeout=timeout_s)
    try:
        yield made
    finally:
        made.close()


def problem() -> str:
    """Why there can be no containers here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root: limits, control groups and networks of containers are looked at from outside"
    try:
        with client(timeout_s=10.0) as engine:
            engine.ping()
            if not engine.images(IMAGE) and shutil.which("debootstrap") is None:
                return "needs debootstrap, to make an image of Debian's packages"
    except Exception as error:
        return f"no container engine answers at {URL}: {error}"
    return ""


def provide() -> str:
    """The image of the tests, made if this engine does not have it; skips the test where that cannot be."""
    why = problem()
    if why:
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    number = hashlib.sha256(URL.encode()).hexdigest()[:12]
    # Workers of one run, and other runs, look for it at once.
    with open(Path(tempfile.gettempdir()) / f"dure-test-image-{number}.lock", "a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with client(timeout_s=300.0) as engine:
            try:
                engine.inspect_image(IMAGE)
            except ImageNotFound:
                _make(engine)
    return IMAGE


def _make(engine: docker.APIClient) -> None:
    with tempfile.TemporaryDirectory(prefix="dure-test-image-") as folder:
        # /dev of the node stands in for the devices that a base would make, which some file systems forbid.
        line = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", _suite(), folder]
        done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"debootstrap failed: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        left_out = [f"--exclude=./{name}" for name in ("dev/*", "proc/*", "sys/*", "var/cache/apt/*")]
        with subprocess.Popen(["tar", "-C", folder, "-c", *left_out, "."], stdout=subprocess.PIPE) as packing:
            name, _, tag = IMAGE.partition(":")
            changes = ["ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"]
            engine.import_image_from_stream(packing.stdout, repository=name, tag=tag, changes=changes)
        assert packing.returncode == 0


def _suite() -> str:
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    return "stable"


def variant(name: str, *changes: str) -> contextlib.AbstractContextManager[str]:
    """The image with other settings, such as `USER 1234`; gone afterwards."""
    return changed(name, "true", *changes)


@contextlib.contextmanager
def changed(name: str, script: str, *changes: str) -> Iterator[str]:
    """The same after a script of the shell."""
    with client() as engine:
        made = engine.create_container(IMAGE, ["/bin/sh", "-c", script], network_disabled=True)
        try:
            if script != "true":
                engine.start(made)
                assert engine.wait(made, timeout=60)["StatusCode"] == 0
            none = ["ENTRYPOINT []"] if not any(one.startswith("ENTRYPOINT") for one in changes) else []
            engine.commit(made, repository="dure-test-variant", tag=name, changes=["CMD []", *none, *changes])
        finally:
            engine.remove_container(made, force=True)
        try:
            yield f"dure-test-variant:{name}"
        finally:
            engine.remove_image(f"dure-test-variant:{name}", force=True)


def containers_of(home: Path, url: str = URL) -> list[dict[str, Any]]:
    """Containers of the agent whose folder it is, whatever their state."""
    with client(url) as engine:
        found: list[dict[str, Any]] = engine.containers(
            all=True, filters={"label": [f"dure.home={home.absolute()}"]}
        )
        return found


def left_behind(home: Path, url: str = URL) -> list[str]:
    """What stands on the engine with the labels of an agent; removed, so that one broken test is one."""
    found = []
    with client(url) as engine:
        label = [f"dure.home={home.absolute()}"]
        for container in engine.containers(all=True, filters={"label": label}):
            found.append(f"container {container['Names']} ({container['State']})")
            engine.remove_container(container["Id"], force=True, v=True)
        for network in engine.networks(filters={"label": label}):
            found.append(f"network {network['Name']}")
            engine.remove_network(network["Id"])
    return found
