"""`dure agent conformance`: the command."""

from __future__ import annotations

import asyncio
import difflib
import json
import shutil
import signal
import sys
from collections.abc import Sequence

import click

from dure.agent.conformance import report, suite
from dure.agent.conformance.check import Check
from dure.agent.conformance.checks import CHECKS
from dure.agent.conformance.outcome import Outcome, Result
from dure.agent.options import known_backend

_NAME_WIDTH = max(len(check.name) for check in CHECKS)


class _AfterDashes(click.Command):
    """What stands after `--` is the program; nothing but options stands before."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        rest = super().parse_args(ctx, args[:at])
        if stray := ctx.params["program"]:
            raise click.UsageError(
                f"unexpected `{stray[0]}`: a PROGRAM and its arguments come after `--`", ctx
            )
        ctx.params["program"] = tuple(args[at + 1 :])
        if at < len(args) and not ctx.params["program"]:
            raise click.UsageError("name a PROGRAM after `--`", ctx)
        return rest


@click.command(name="conformance", cls=_AfterDashes, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--backend", default="", help="Back end of this package's own agent.")
@click.option("--image", default="", help="Image that the kernels run in, for agents that run images.")
@click.option("--only", multiple=True, metavar="CHECK", help="Only this check; may be repeated.")
@click.option("--list", "listing", is_flag=True, help="List the checks and run none.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A line for each check as it ends, or one document for programs.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1.0, 3600.0),
    default=30.0,
    show_default=True,
    help="Time limit of one check, in seconds.",
)
@click.argument("program", nargs=-1, type=click.UNPROCESSED, metavar="[-- PROGRAM ARG...]")
@click.pass_context
def conformance(
    context: click.Context,
    /,
    backend: str,
    image: str,
    only: Sequence[str],
    listing: bool,
    output: str,
    timeout: float,
    program: Sequence[str],
) -> None:
    """Check an agent against what a manager expects of it.

    Starts the agent of this package, or any PROGRAM, with a stand-in manager, runs kernels on it, breaks its
    stream and kills it. In the arguments of PROGRAM {manager}, {join_token}, {name} and {data_dir} are
    replaced; it finds the same in DURE_MANAGER, DURE_JOIN_TOKEN, DURE_AGENT_NAME and DURE_DATA_DIR.

    Kernels run in the image if the agent runs images: it needs /bin/sh, python3 with its standard library,
    and cat, df, grep, head, id, ls, sleep, stat, tail, touch. Put it on the node beforehand.

    Exit code 0 if no check failed, 1 if one did, 2 for wrong usage.
    """
    if program and backend:
        raise click.UsageError("--backend is for this package's own agent; a PROGRAM has options of its own")
    if backend:
        known_backend(backend)
    if program and shutil.which(program[0]) is None:
        raise click.UsageError(f"there is no program `{program[0]}`, or it cannot be executed")
    checks = _chosen(only)
    if listing:
        text = json.dumps(report.listing(checks), indent=2) if output == "json" else None
        click.echo(text if text is not None else "\n".join(report.listed(checks)))
        return
    own = not program
    wanted = suite.Wanted(
        arguments=_own_agent(backend) if own else list(program),
        # Our agent stops its sessions on SIGINT, if a check left any; to others SIGTERM says more.
        stop_signal=signal.SIGINT if own else signal.SIGTERM,
        image=image,
        limit_s=timeout,
    )

    def tell(result: Result) -> None:
        if output == "table":
            click.echo(report.line(result, _NAME_WIDTH))

    try:
        hello, results = asyncio.run(suite.run(wanted, checks, tell))
    except suite.NeedsImage as error:
        raise click.UsageError("this agent runs images: name one with --image, see --help") from error
    except OSError as error:
        raise click.UsageError(f"cannot start `{wanted.arguments[0]}`: {error.strerror or error}") from error
    if image and hello is not None and not hello.runs_images:
        click.echo("this agent runs no images: --image was not used", err=True)
    if output == "json":
        click.echo(json.dumps(report.document(hello, results), indent=2))
    else:
        click.echo(report.summary(results))
    if any(result.outcome is Outcome.FAILED for result in results):
        context.exit(1)


def _chosen(only: Sequence[str]) -> list[Check]:
    """Raises click.UsageError if there is no such check."""
    names = [check.name for check in CHECKS]
    for name in only:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean `{near[0]}`?" if near else "--list shows all"
            raise click.UsageError(f"there is no check `{name}`; {hint}")
    return [check for check in CHECKS if not only or check.name in only]


def _own_agent(backend: str) -> list[str]:
    places = ("--data-dir", "{data_dir}", "--name", "{name}", "--manager", "{manager}")
    chosen = ("--backend", backend) if backend else ()
    # Where there are no GPUs, grants are checked with simulated ones.
    return [sys.executable, "-m", "dure.agent.main", *places, *chosen, "--simulated-gpus", "2"]


if __name__ == "__main__":
    conformance(prog_name="dure agent conformance")
