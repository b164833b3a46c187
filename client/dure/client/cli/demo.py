"""`dure demo`: a real model behind a permanent, authenticated address, on this machine."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from dure.client.cli import live
from dure.client.cli.dev import capacity, say
from dure.client.cli.folder import progress_bar
from dure.client.cli.options import Shell
from dure.client.demo import chat, steps
from dure.client.demo.model import fetch_model
from dure.client.dev.cluster import DevCluster
from dure.client.dev.foreground import in_foreground, make_plan
from dure.client.dev.ports import WantedPorts
from dure.client.transfer import Progress
from dure.wire import programs
from dure.wire.errors import DureError
from dure.wire.settings import default_data_dir


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--once", is_flag=True, help="Leave after the last step, and clean up.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where its state is kept; default `demo` in the default data folder.",
)
@click.option(
    "--model-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A GGUF file of your own instead of SmolLM2.",
)
def demo(once: bool, data_dir: Path | None, model_file: Path | None) -> None:
    """Serve a real model on this machine, step by step.

    Starts a cluster of its own (your context stays as it is), uploads SmolLM2-135M-Instruct, makes an
    endpoint with two replicas, and chats with it. Stays until Ctrl-C, when everything is stopped.
    """
    chat.check_installed()
    folder = (data_dir or default_data_dir() / "demo").resolve()
    made_here = not folder.exists()
    try:
        with programs.running(folder, "dev", folder / "dev"):
            whole = asyncio.run(_run(folder, once, model_file))
    except DureError:
        click.echo(f"\nthe logs are in {folder / 'logs'}", err=True)
        raise
    click.echo("\nstopped; nothing is left running", err=True)
    if once and not whole:
        raise click.Abort
    if once and made_here:
        shutil.rmtree(folder)


async def _run(folder: Path, once: bool, model_file: Path | None) -> bool:
    shell = Shell(output=None, quiet=False, no_color=False, project=None, context=None)
    display = steps.Display(bar=_bar(shell), waiting=lambda: live.wait_progress(shell))
    # Two replicas with a CPU each have to fit, on a machine with one core, too.
    cpus = 2 if (os.cpu_count() or 1) < 2 else None
    plan = make_plan(folder, WantedPorts(), 1, 2, cpus, say)
    cluster = DevCluster(plan, say)
    steps.step(f"Start a cluster: manager, agent, proxy; all state in {folder}")

    async def started(cluster: DevCluster) -> None:
        for agent in await cluster.agents():
            click.echo(f"  {agent.name.rsplit('/', 1)[-1]}: {capacity(agent)}")
        click.echo(f"  manager at {plan.manager_address}")

    async def body(cluster: DevCluster) -> None:
        steps.step("Get the model, SmolLM2-135M-Instruct" if model_file is None else f"Take {model_file}")
        model = model_file or await fetch_model()
        click.echo(f"  {model}")
        async with cluster.client() as client:
            await steps.run(client, model, display)
            if once:
                steps.step("Clean up")
                await steps.clean_up(client)
                return
        click.echo(f"\nto use `dure` here: export DURE_CONTEXT_FILE={folder / 'context.toml'}")
        click.echo("Ctrl-C stops everything.")
        await asyncio.Event().wait()

    return await in_foreground(cluster, [folder / "context.toml"], started, body)


def _bar(shell: Shell) -> steps.Bar:
    @contextmanager
    def bar(what: str, total_bytes: int) -> Iterator[Progress | None]:
        if not (shell.live and sys.stderr.isatty()):
            yield None
            return
        with progress_bar(what, total_bytes) as progress:
            yield progress

    return bar
