"""The steps of the demonstration, on a cluster that runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from pathlib import Path

import click

from dure.client.client import Client
from dure.client.demo import chat
from dure.client.transfer import Progress
from dure.client.tree import LocalFile
from dure.v1 import folder_pb2
from dure.v1.endpoint_pb2 import Endpoint
from dure.wire.errors import AlreadyExists, DureError, NotFound

FOLDER = ENDPOINT = "smollm2"
READY_S = 180.0
GONE_S = 60.0
TOKEN_LIFE = timedelta(days=1)
Bar = Callable[[str, int], AbstractContextManager[Progress | None]]
Waiting = Callable[[], AbstractContextManager[Callable[[Endpoint], None]]]


@dataclass(frozen=True)
class Display:
    """How progress is shown: a bar for bytes, the way of an endpoint to HEALTHY."""

    bar: Bar
    waiting: Waiting


def model_files(model: Path) -> list[LocalFile]:
    """What the model folder consists of: the model itself, and what ships with this package."""
    listed = [(model, "smollm2.gguf")]
    shipped = files("dure.client.demo") / "smollm2"
    listed += [(Path(str(shipped / name)), name) for name in ("model-definition.yaml", "serve.py")]
    return [LocalFile(source, path, source.stat().st_size, 0o644) for source, path in listed]


async def run(client: Client, model: Path, display: Display) -> None:
    """Folder, endpoint, token, a streamed chat, a refusal; prints each step. Raises DureError."""
    step(f"Upload the model to the folder `{FOLDER}`")
    await _clear(client)
    try:
        await client.folders.create(FOLDER, folder_pb2.FOLDER_USAGE_MODEL)
    except AlreadyExists:
        click.echo("  the folder is there from an earlier run: its files are written again")
    listed = model_files(model)
    with display.bar("uploading", sum(file.size_bytes for file in listed)) as progress:
        stored = await client.folders.upload(FOLDER, listed, progress=progress)
    for file in stored:
        click.echo(f"  {file.path:<24}{file.size_bytes:>12,} bytes")

    step(f"Create the endpoint `{ENDPOINT}`: 2 replicas, each with 1 CPU, 1 GiB and half a GPU; not public")
    slots = {"cpu": "1", "mem": "1g", "cuda.shares": "0.5"}
    await client.endpoints.create(ENDPOINT, model=FOLDER, replicas=2, resource_slots=slots)
    with display.waiting() as notify:
        endpoint = await client.endpoints.wait(ENDPOINT, timeout_s=READY_S, notify=notify)
    count = f"{endpoint.ready_replicas} of {endpoint.desired_replicas}"
    click.echo(f"  HEALTHY: {count} replicas serve at {endpoint.address}")
    for replica in endpoint.replicas:
        share = ", ".join(f"{part.amount} of {part.device}" for part in replica.devices)
        click.echo(f"  replica {replica.uid} on {replica.node} at {replica.target}, {share}")
    if not endpoint.address:
        raise DureError("the endpoint has no address: no proxy has joined")

    step("Issue a token, and hold a streamed chat with the OpenAI SDK")
    token = (await client.tokens.create(ENDPOINT, TOKEN_LIFE, "demo")).secret
    click.echo(f"  you:   {chat.QUESTION}\n  model: ", nl=False)
    result = await chat.stream(endpoint.address, token, _show)
    click.echo(
        f"\n  {result.pieces} pieces; the first after {result.first_piece_s:.2f} s, "
        f"all in {result.whole_s:.2f} s"
    )

    step("The same address without a token")
    status = await chat.status_without_token(endpoint.address)
    if status != 401:
        raise DureError(f"a request without a token was answered with {status}, not refused with 401")
    click.echo("  refused with 401")

    step("Yours to try")
    click.echo(f"address: {endpoint.address}\ntoken:   {token}\n")
    click.echo(chat.snippets(endpoint.address, token), nl=False)


async def clean_up(client: Client) -> None:
    """Deletes what `run` made."""
    await _clear(client)
    await client.folders.delete(FOLDER)


async def _clear(client: Client) -> None:
    try:
        await client.endpoints.delete(ENDPOINT)
    except NotFound:
        return
    await client.endpoints.wait_gone(ENDPOINT, timeout_s=GONE_S)


def step(text: str) -> None:
    click.echo(f"\n== {text}")


def _show(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()
