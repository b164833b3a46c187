"""A container engine for tests, and the image that they run: made of Debian's packages, not fetched.

DOCKER_HOST names the engine, else it is at its usual place. Tests are skipped where there is none, but in CI
they fail.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import ImageNotFound, NotFound

__all__ = ["IMAGE", "URL", "NotFound"]
# A new number makes it anew where an older one is there.
IMAGE = "dure-test:3"
# `python` as models name it, a program that runs anywhere for images of other layers, what models link.
PACKAGES = "python3,python-is-python3,busybox-static,libgomp1"
# Other runs use the engine, too.
_MARK = secrets.token_hex(4)
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


def tag(name: str) -> str:
    """The name of an image that only this run knows."""
    return f"dure-test-variant:{name}-{_MARK}"


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
            repository, _, last = tag(name).partition(":")
            engine.commit(made, repository=repository, tag=last, changes=["CMD []", *none, *changes])
        finally:
            engine.remove_container(made, force=True)
        try:
            yield tag(name)
        finally:
            engine.remove_image(tag(name), force=True)


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


class OwnEngine:
    """An engine of a test's own, which it may stop and start. It is in a network namespace of its own, for an
    engine without a bridge removes the bridge of others. Without `networks` it has no bridge either:
    containers have the network of that namespace."""

    def __init__(self, folder: Path, *, live_restore: bool, networks: bool = False) -> None:
        self._folder = folder
        self.url = f"unix://{folder}/docker.sock"
        self._options = ["--live-restore"] if live_restore else []
        if not networks:
            self._options += ["--bridge=none", "--iptables=false", "--ip6tables=false"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        places = {
            "--data-root": self._folder / "data",
            "--exec-root": self._folder / "exec",
            "--pidfile": self._folder / "pid",
            "--host": self.url,
        }
        words = [f"{name}={value}" for name, value in places.items()]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    "unshare",
                    "--net",
                    "dockerd",
                    *words,
                    *self._options,
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(300):
            if _answers(self.url.removeprefix("unix://")):
                return
            time.sleep(0.1)
        raise AssertionError((self._folder / "log").read_text()[-2000:])

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(60)

    def copy_image(self) -> None:
        """Gives it a small image, `dure-test-small:1`, of one program of the tests' image."""
        with client() as one, client(self.url) as other:
            made = one.create_container(IMAGE, ["true"])
            try:
                pieces, _ = one.get_archive(made, "/usr/bin/busybox")
                other.import_image_from_data(b"".join(pieces), repository="dure-test-small", tag="1")
            finally:
                one.remove_container(made, force=True)


def _answers(path: str) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(5.0)
            probe.connect(path)
            probe.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in probe.recv(100)
    except OSError:
        return False


@contextlib.contextmanager
def own(folder: Path, *, live_restore: bool, networks: bool = False) -> Iterator[OwnEngine]:
    engine = OwnEngine(folder, live_restore=live_restore, networks=networks)
    engine.start()
    try:
        engine.copy_image()
        yield engine
    finally:
        engine.stop()
        # An engine that was killed in between leaves mounts, which would keep the folder.
        for line in reversed(Path("/proc/mounts").read_text(encoding="utf-8").splitlines()):
            where = line.split()[1]
            if where.startswith(f"{folder}/"):
                subprocess.run(["umount", "-l", where], check=False)
        shutil.rmtree(folder, ignore_errors=True)
