"""The model folder, folders beside it, and shared memory."""

from __future__ import annotations

from dure.agent.conformance import specs
from dure.agent.conformance.check import check
from dure.agent.conformance.outcome import Failed, NotApplicable, demand
from dure.agent.conformance.stage import Stage
from dure.fleet.v1 import fleet_pb2

_FILES = {"weights.txt": "weights\n", "deep/er/config.json": '{"layers": 2}\n'}
_LOOK = "cat {model_path}/weights.txt {model_path}/deep/er/config.json"
_CONTENT = ["weights", '{"layers": 2}']
# How a limitation in Hello names what such nodes cannot do.
_MOUNTS = "extra mounts"
_BIG_BYTES = 3 * 2**20


@check("7.1")
async def model_folder(stage: Stage) -> None:
    """The model folder is at its destination, with its content."""
    lines = await stage.lines(_LOOK, folder=stage.folder(_FILES))
    demand(lines == _CONTENT, "the files of the folder", lines)


@check("7.2")
async def model_folder_is_read_only(stage: Stage) -> None:
    """Nothing in the model folder can be changed by the kernel."""
    if not stage.hello.maps_mounts:
        raise NotApplicable("kernels see the real folder (Hello: maps_mounts = false)")
    folder = stage.folder(_FILES)
    line = "{ echo x >weights.txt; touch new deep/new; mkdir d; rm -rf deep; } 2>/dev/null; " + _LOOK + "; ls"
    lines = await stage.lines(line, folder=folder)
    demand(lines == [*_CONTENT, "deep", "weights.txt"], "the folder as it was", lines)
    kept = sorted(path.name for path in stage.stored(folder).iterdir())
    demand(kept == ["deep", "weights.txt"], "the folder on the storage as it was", kept)


@check("7.1", alone=True)
async def model_folder_is_fetched(stage: Stage) -> None:
    """Where the storage is not shared, files are fetched whole with FetchFile, and only once."""
    folder = stage.folder({**_FILES, "big.bin": "0123456789abcdef" * (_BIG_BYTES // 16)})
    stage.manager.storage_path = "/no/such/storage"
    try:
        await _reconnect(stage)
        line = f"{_LOOK}; stat -c %s {{model_path}}/big.bin"
        lines = await stage.lines(line, folder=folder)
        demand(lines == [*_CONTENT, str(_BIG_BYTES)], "the files of the folder, fetched", lines)
        fetched = sorted({path for uid, path, _ in stage.manager.fetched if uid == folder})
        demand(fetched == ["big.bin", "deep/er/config.json", "weights.txt"], "FetchFile of all", fetched)
        stage.manager.fetched.clear()
        await stage.lines(line, folder=folder)
        demand(not stage.manager.fetched, "no second FetchFile of the same content", stage.manager.fetched)
    finally:
        stage.manager.storage_path = str(stage.manager.storage)
        await _reconnect(stage)


@check("7.5")
async def missing_folder(stage: Stage) -> None:
    """A folder that is not there fails the kernel with FOLDER_FAILED and its name."""
    lost = fleet_pb2.Mount(folder_uid="no-such-folder", folder="lost", target=specs.MODEL_TARGET)
    status = await stage.refused(stage.spec(model=lost), "FOLDER_FAILED")
    demand("lost" in status.exit.message, "the folder's name in the message", status.exit.message)


@check("7.3")
async def extra_mounts(stage: Stage) -> None:
    """Folders beside the model folder: read-only unless writable, whole or a part of one."""
    data = stage.folder({"top.txt": "top\n", "sub/low.txt": "low\n"})
    line = (
        "cat /mnt/data/top.txt /mnt/part/low.txt; touch /mnt/data/new 2>/dev/null && echo writable; "
        "ls /mnt/part; ls /mnt/data"
    )
    mounts = [_mount(data, "/mnt/data"), _mount(data, "/mnt/part", subpath="sub")]
    lines = await stage.lines(line, unless=_MOUNTS, extra_mounts=mounts)
    demand(lines == ["top", "low", "low.txt", "sub", "top.txt"], "both folders, read-only", lines)


@check("7.3")
async def writable_mount(stage: Stage) -> None:
    """What a kernel writes to a writable mount is on the storage."""
    data = stage.folder({"top.txt": "top\n"})
    # A kernel need not run as the user who made the folder.
    stage.stored(data).chmod(0o777)
    spec = stage.spec("echo kept >/mnt/data/new", extra_mounts=[_mount(data, "/mnt/data", writable=True)])
    status = await stage.exited(spec)
    stage.not_if_limited(status, _MOUNTS)
    if status.exit.reason == "FOLDER_FAILED":
        raise NotApplicable(f"the agent does not share the manager's storage: {status.exit.message}")
    demand(status.exit.code == 0, "EXITED with code 0", specs.told(status))
    new = stage.stored(data) / "new"
    demand(new.exists() and new.read_text() == "kept\n", "the file on the storage", "it is not there")


@check("7.4")
async def links_lead_nowhere(stage: Stage) -> None:
    """A subpath that leads out of its folder is refused with FOLDER_FAILED."""
    data = stage.folder({"top.txt": "top\n"})
    (stage.stored(data) / "out").symlink_to("/etc")
    for subpath in ("out", "../"):
        spec = stage.spec(extra_mounts=[_mount(data, "/mnt/data", subpath=subpath)])
        stage.manager.want(spec)
        status = await stage.status(
            spec.uid,
            lambda s: s.phase in (fleet_pb2.KERNEL_PHASE_EXITED, fleet_pb2.KERNEL_PHASE_RUNNING),
            "EXITED with FOLDER_FAILED",
        )
        stage.not_if_limited(status, _MOUNTS)
        demand(
            status.exit.reason == "FOLDER_FAILED",
            f"FOLDER_FAILED for the subpath `{subpath}`",
            specs.told(status),
        )


@check("7.6")
async def shared_memory(stage: Stage) -> None:
    """/dev/shm has the size of the spec, and is writable."""
    wanted = 96 * 2**20
    line = "echo x >/dev/shm/x && cat /dev/shm/x; df -k /dev/shm | tail -n 1"
    lines = await stage.lines(line, unless="shared memory", shared_memory_bytes=wanted)
    demand(lines[0] == "x", "a writable /dev/shm", lines)
    size = int(lines[-1].split()[1]) * 1024
    demand(abs(size - wanted) <= 2**20, f"{wanted} bytes", f"{size} bytes")


def _mount(folder: str, target: str, **fields: object) -> fleet_pb2.Mount:
    return fleet_pb2.Mount(folder_uid=folder, folder="data", target=target, **fields)  # type: ignore[arg-type]


async def _reconnect(stage: Stage) -> None:
    before = stage.manager.stream
    stage.manager.hang_up()
    if before is None:
        raise Failed("a stream", "none")
    await stage.manager.until(lambda: before.ended_s > 0)
    await stage.connected(before)


CHECKS = (
    model_folder,
    model_folder_is_read_only,
    missing_folder,
    extra_mounts,
    writable_mount,
    links_lead_nowhere,
    shared_memory,
    model_folder_is_fetched,
)
