"""Calls about runtimes, and the files that describe one."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

import tomli
import yaml
from google.protobuf import json_format

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.definitions.problems import shown, unknown
from dure.v1 import catalog_pb2, catalog_pb2_grpc
from dure.v1.catalog_pb2 import Runtime
from dure.wire.errors import InvalidInput, Violation

FILE_BYTES_MAX = 256 * 1024
_OUTPUT_ONLY = ("name", "builtin", "create_time")


class RuntimeGroup:
    """`client.runtimes`. Changing them takes an administrator's key."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = catalog_pb2_grpc.RuntimeServiceStub(caller.channel)

    async def create(self, name: str, runtime: Runtime) -> Runtime:
        request = catalog_pb2.CreateRuntimeRequest(runtime_id=name, runtime=runtime)
        return (await self._caller.unary(self._stub.CreateRuntime, request, idempotent=False)).runtime

    async def get(self, name: str) -> Runtime:
        request = catalog_pb2.GetRuntimeRequest(name=_full(name))
        return (await self._caller.unary(self._stub.GetRuntime, request)).runtime

    async def update(self, name: str, runtime: Runtime, fields: Sequence[str]) -> Runtime:
        """Changes `fields`; one that `runtime` does not have goes back to nothing."""
        request = catalog_pb2.UpdateRuntimeRequest()
        request.runtime.CopyFrom(runtime)
        request.runtime.name = _full(name)
        request.update_mask.paths.extend(fields)
        return (await self._caller.unary(self._stub.UpdateRuntime, request)).runtime

    async def delete(self, name: str) -> None:
        request = catalog_pb2.DeleteRuntimeRequest(name=_full(name))
        await self._caller.unary(self._stub.DeleteRuntime, request, idempotent=False)

    # Below it, `list` in an annotation would mean this.
    def list(self) -> AsyncGenerator[Runtime, None]:
        """By name."""

        async def fetch(token: str) -> tuple[list[Runtime], str]:
            request = catalog_pb2.ListRuntimesRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._caller.unary(self._stub.ListRuntimes, request)
            return [*page.runtimes], page.next_page_token

        return all_pages(fetch)


def read_runtime(text: str, file: str) -> tuple[Runtime, list[str]]:
    """A runtime of a YAML, JSON or TOML text (by the end of the file's name), and which fields it has.

    What `-o yaml` prints can be read again: fields that the manager says are left out. Raises InvalidInput
    with everything that is wrong.
    """
    value = _load(text, file)
    if not isinstance(value, Mapping) or not value:
        raise InvalidInput.of([Violation(file, "expected the fields of a runtime, such as `start_command`")])
    given = {key: inner for key, inner in value.items() if key not in _OUTPUT_ONLY and inner is not None}
    violations = [Violation(f"{file}: {path}", what) for path, what in _wrong_keys(given, Runtime.DESCRIPTOR)]
    if violations:
        raise InvalidInput.of(violations)
    try:
        return json_format.ParseDict(given, Runtime()), [str(key) for key in given]
    except json_format.ParseError as error:
        raise InvalidInput.of([Violation(file, shown_error(error))]) from error


def shown_error(error: Exception) -> str:
    """What the JSON mapping says, in one line."""
    return " ".join(str(error).removeprefix("Failed to parse ").split())[:300]


def _load(text: str, file: str) -> Any:
    try:
        if file.endswith(".toml"):
            return tomli.loads(text)
        if file.endswith(".json"):
            return json.loads(text)
        return yaml.safe_load(text)
    except (tomli.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InvalidInput.of([Violation(file, f"cannot be read: {shown_error(error)}")]) from error


def _wrong_keys(value: Mapping[Any, Any], message: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Keys that no field has."""
    fields = {field.name: field for field in message.fields}
    for key, inner in value.items():
        at = f"{path}.{key}" if path else str(key)
        field = fields.get(key)
        if field is None:
            yield shown(at), f"unknown key; {unknown(str(key), [n for n in fields if n not in _OUTPUT_ONLY])}"
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for item in inner if isinstance(inner, list) else [inner]:
                if isinstance(item, Mapping):
                    yield from _wrong_keys(item, field.message_type, at)


def _full(name: str) -> str:
    return name if "/" in name else f"runtimes/{name}"
