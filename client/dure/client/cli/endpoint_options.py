"""The options that say what an endpoint is, for create, update and validate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dure.client.cli.options import Duration
from dure.client.manifest import STRATEGIES
from dure.client.notation import CANARY_FORM, MOUNT_FORM
from dure.client.wanted import CLUSTER_MODES, PROFILES, PULL_POLICIES
from dure.wire import enforcement

_OPTIONS = (
    click.option("--runtime", metavar="NAME", help="How the model is served; default `custom`."),
    click.option("--replicas", type=click.IntRange(0, 10_000), help="How many; default 1."),
    click.option(
        "-r",
        "--resource",
        "resources",
        metavar="SLOT=AMOUNT",
        multiple=True,
        help="Slots of each kernel: cpu=1, mem=512m, cuda.shares=0.25 (of one GPU) or cuda.device=1.",
    ),
    click.option("--preset", metavar="NAME", help="Named set of slots; -r says otherwise slot by slot."),
    click.option("--shm", metavar="SIZE", help="Size of /dev/shm, such as 1g."),
    click.option("-e", "--env", "environ", metavar="KEY=VALUE", multiple=True, help="Environment variables."),
    click.option(
        "--env-file",
        "env_files",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        multiple=True,
        help="File with a KEY=VALUE on each line; -e wins over it.",
    ),
    click.option("--public/--private", default=None, help="Whether requests need no token."),
    click.option("--no-public", "private", is_flag=True, hidden=True),
    click.option("--group", "--resource-group", "group", metavar="NAME", help="Resource group."),
    click.option("--image", metavar="IMAGE", help="Container image, in full or by its short name."),
    click.option("--architecture", metavar="NAME", help="CPU architecture: x86_64 or aarch64."),
    click.option(
        "--pull-policy",
        type=click.Choice(list(PULL_POLICIES)),
        help="When a node fetches the image; default if-not-present.",
    ),
    click.option(
        "--profile",
        type=click.Choice(list(PROFILES)),
        help="What its containers may do; strict: no capabilities, a read-only root, never the superuser.",
    ),
    click.option(
        "--require-enforcement",
        type=click.Choice(list(enforcement.MODES)),
        help="Least that must keep sessions within their shares of a GPU; others are no place.",
    ),
    click.option(
        "--mount",
        "mounts",
        metavar=MOUNT_FORM,
        multiple=True,
        help="Another folder beside the model's, read-only unless `:rw`; default target /home/work/FOLDER.",
    ),
    click.option(
        "--mount-destination",
        "--model-mount",
        "mount_destination",
        metavar="PATH",
        help="Where the model folder appears; default /models.",
    ),
    click.option("--definition", metavar="PATH", help="Definition file; default model-definition.yaml."),
    click.option(
        "--cluster-mode", type=click.Choice(list(CLUSTER_MODES)), help="Whether kernels share a node."
    ),
    click.option("--cluster-size", type=click.IntRange(1, 64), help="Kernels of each replica; default 1."),
    click.option(
        "--scale-to-zero-after",
        type=Duration(),
        help="Without a request for so long go to zero replicas, until one comes; 0: never (the default).",
    ),
    click.option("--metrics-path", metavar="PATH", help="Where replicas show metrics; default /metrics."),
    click.option("--priority", type=click.IntRange(1, 100), help="Who gets a place first; default 10."),
    click.option("--command", "line", metavar="LINE", help="Command as a shell line; or a list after `--`."),
    click.option("--shell", "shell_path", metavar="PATH", help="Shell for --command; default /bin/bash."),
    click.option("--port", type=click.IntRange(1, 65535), help="Port that the service listens on."),
    click.option("--health-path", metavar="PATH", help="HTTP path that is probed."),
    click.option("--health-interval", type=Duration(), help="Time between probes."),
    click.option("--health-timeout", type=Duration(), help="Time limit of a probe."),
    click.option("--health-retries", type=click.IntRange(1, 10_000), help="Failed probes that are borne."),
    click.option("--health-status", type=click.IntRange(100, 599), help="HTTP status of a healthy answer."),
    click.option("--health-delay", type=Duration(), help="Time from the start without decisive probes."),
    click.option("--health-early/--no-health-early", default=None, help="Whether to probe during that time."),
    click.option("--no-health-check", is_flag=True, help="Healthy as soon as the port accepts a connection."),
    click.option("--strategy", type=click.Choice(list(STRATEGIES)), help="How new revisions are rolled out."),
    click.option("--max-surge", metavar="N|N%", help="Replicas above the wanted number; default 1."),
    click.option("--max-unavailable", metavar="N|N%", help="Replicas that may be missing; default 0."),
    click.option("--progress-deadline", type=Duration(), help="A rollout has failed after; default 600s."),
    click.option(
        "--canary", metavar=CANARY_FORM, help="Steps in percent of the requests: 10:60s,50:2m or 10,50."
    ),
    click.option(
        "--manual-switch/--automatic-switch",
        "manual_switch",
        default=None,
        help="Blue-green: whether to wait for `rollout promote`.",
    ),
    click.option(
        "--auto-rollback/--no-auto-rollback",
        "auto_rollback",
        default=None,
        help="Whether a rollout that fails goes back by itself; default yes.",
    ),
)


class TakesCommand(click.Command):
    """A command that takes a list of arguments after `--`, as the parameter `args`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own, rest = args, None
        if "--" in args:
            at = args.index("--")
            own, rest = args[:at], args[at + 1 :]
        left = super().parse_args(ctx, own)
        if rest == [] and not ctx.resilient_parsing:
            raise click.UsageError("nothing stands after `--`: expected a program and its arguments", ctx)
        ctx.params["args"] = tuple(rest or ())
        return left

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- PROGRAM [ARG]...]"]


def settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options. They come as keyword arguments: see `endpoint_fields.fields_of`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
