"""Messages as JSON, YAML and names: proto field names, default values too, enums without their prefix."""

from __future__ import annotations

import json
import re
from typing import Any

import click
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

# Never in an answer, where it would be empty and look as if it were not set.
_WRITE_ONLY = frozenset({"dure.v1.Registry.password"})


def to_value(message: Message) -> dict[str, Any]:
    """A message as plain values.

    64-bit integers are numbers, times RFC 3339 text, durations text such as `1.5s`; what has presence and is
    not set is None. What is only ever written is left out.
    """
    fields = (field for field in message.DESCRIPTOR.fields if field.full_name not in _WRITE_ONLY)
    return {field.name: _field(message, field) for field in fields}


def dumps(value: Any, form: str) -> str:
    """`json`: an indented document; `line`: one in a line; `yaml`."""
    if form == "yaml":
        import yaml

        return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).rstrip("\n")
    return json.dumps(value, ensure_ascii=False, indent=2 if form == "json" else None)


def emit(message: Message, form: str) -> None:
    """Prints one resource as `json`, `yaml` or `name`."""
    click.echo(_name(message) if form == "name" else dumps(to_value(message), form))


def emit_list(key: str, messages: list[Any], form: str) -> None:
    """Prints resources as one document, or their names."""
    if form == "name":
        for message in messages:
            click.echo(_name(message))
    else:
        click.echo(dumps({key: [to_value(message) for message in messages]}, form))


def enum_word(descriptor: EnumDescriptor, number: int) -> str:
    """`HEALTHY` for ENDPOINT_STATUS_HEALTHY; the number as text for a value that is newer than we are."""
    value = descriptor.values_by_number.get(number)
    if value is None:
        return str(number)
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", descriptor.name).upper() + "_"
    return str(value.name).removeprefix(prefix)


def _name(message: Message) -> str:
    return str(getattr(message, "name", None) or getattr(message, "path", ""))


def _field(message: Message, field: Any) -> Any:
    content = getattr(message, field.name)
    if field.is_repeated:
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            value_field = entry.fields_by_name["value"]
            return {str(key): _single(content[key], value_field) for key in sorted(content)}
        return [_single(item, field) for item in content]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _single(content, field)


def _single(content: Any, field: Any) -> Any:
    if field.enum_type is not None:
        return enum_word(field.enum_type, content)
    if isinstance(content, (Timestamp, Duration)):
        return content.ToJsonString()
    if isinstance(content, Message):
        return to_value(content)
    if isinstance(content, bytes):
        return content.hex()
    return content
