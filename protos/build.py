"""Generates the Python code of the protos: at install as hatch's build hook, or by `make proto`.

The code is not committed. Proto packages bear the names of Python packages, so that what protoc writes
needs no rewriting; it lands in `client/dure`, which every program installs.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(protos: Path, out: Path) -> None:
    """Writes `*_pb2.py`, `*_pb2_grpc.py` and their stubs for every proto below `protos` into `out`."""
    from grpc_tools import protoc

    spec = find_spec("grpc_tools")
    assert spec is not None and spec.origin is not None
    files = sorted(str(path.relative_to(protos)) for path in (protos / "dure").rglob("*.proto"))
    # protoc looks for its plug-ins on PATH; the build's own environment has them beside its Python,
    # or (pip's isolated builds) in a bin folder above the packages.
    arguments = ["protoc", f"-I{protos}", f"-I{Path(spec.origin).parent / '_proto'}"]
    arguments += [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
    for name in ("mypy", "mypy_grpc"):
        arguments += [f"--plugin=protoc-gen-{name}={_plugin(f'protoc-gen-{name}')}", f"--{name}_out={out}"]
    if protoc.main([*arguments, *files]) != 0:
        raise SystemExit("protoc failed")


def _plugin(name: str) -> str:
    import shutil
    import sysconfig

    places = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    for entry in sys.path:
        places += [str(Path(entry).parents[2] / "bin")] if len(Path(entry).parents) > 2 else []
    for place in places:
        found = shutil.which(name, path=place)
        if found:
            return found
    found = shutil.which(name)
    if found:
        return found
    raise SystemExit(f"{name} not found: install mypy-protobuf")


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, outside of a build
    pass
else:

    class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
        """Runs `generate` before a wheel (editable ones too) is made."""

        def initialize(self, version: str, build_data: dict[str, object]) -> None:
            generate(Path(self.root) / "protos", Path(self.root) / "client")


if __name__ == "__main__":
    generate(ROOT / "protos", ROOT / "client")
