"""The command `dure`.

Loads only what the command at hand needs: help, completion and mistakes answer at once, and a node that
has only the agent installed can still run it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from typing import NoReturn

import click

# Command -> where it is, and its line in the help. Programs come from entry points instead.
_COMMANDS = {
    "dev": ("dure.client.cli.dev:dev", "Run a whole cluster on this machine."),
    "demo": ("dure.client.cli.demo:demo", "Serve a real model on this machine, step by step."),
    "doctor": ("dure.client.cli.doctor:doctor", "Check the cluster of the current context."),
    "apply": ("dure.client.cli.apply:apply", "Make or change endpoints as files say."),
    "endpoint": (
        "dure.client.cli.endpoint_commands:endpoint",
        "Model services: create, update, scale, roll out, explain.",
    ),
    "logs": ("dure.client.cli.endpoint_logs:logs", "What the sessions of an endpoint wrote."),
    "folder": (
        "dure.client.cli.folder_check:folder",
        "Folders with models and data: upload, check, download.",
    ),
    "model": ("dure.client.cli.model:model", "Models, and what they need: list, run."),
    "runtime": ("dure.client.cli.runtime:runtime", "Baselines of services, such as vllm: list, add."),
    "chat": ("dure.client.cli.chat:chat", "Talk to a language model that an endpoint serves."),
    "rule": ("dure.client.cli.rule_commands:rule", "Scaling rules: add, explain, simulate."),
    "top": ("dure.client.cli.top:top", "What endpoints and nodes do now."),
    "token": ("dure.client.cli.token:token", "Tokens to call an endpoint with."),
    "join-token": ("dure.client.cli.join_token:join_token", "Let agents and proxies join."),
    "project": ("dure.client.cli.project:project", "Projects: quotas, usage, members, who changed what."),
    "user": ("dure.client.cli.user:user", "Users and their roles; `whoami`."),
    "key": ("dure.client.cli.key:key", "API keys."),
    "group": ("dure.client.cli.group:group", "Resource groups: sets of agents with a policy."),
    "preset": ("dure.client.cli.preset:preset", "Presets: named sets of slots."),
    "image": ("dure.client.cli.image:image", "Container images that endpoints may name."),
    "registry": ("dure.client.cli.registry:registry", "Credentials for registries of images."),
    "completion": ("dure.client.cli.completion:completion", "Complete commands in bash, zsh or fish."),
    "context": ("dure.client.cli.context:context", "Which manager to talk to, as whom."),
}
_PROGRAMS = {
    "manager": "Run the manager.",
    "agent": "Run an agent on this node; `list`, `get`, `drain` and `resume` manage all.",
    "proxy": "Run an app proxy.",
}
PROGRAMS_GROUP = "dure.programs"
_CLIENT_AGENT_WORDS = ("list", "get", "drain", "resume")


class Root(click.Group):
    """Finds commands by name, and imports them only when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS, *_PROGRAMS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            return load(_COMMANDS[cmd_name][0])
        if cmd_name in _PROGRAMS:
            return load_program(cmd_name)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # `dure agent --data-dir D` is the program, `dure agent list` asks the manager.
        if len(args) > 1 and args[0] == "agent" and args[1] in _CLIENT_AGENT_WORDS:
            return "agent", load("dure.client.cli.agent:agent"), args[1:]
        if args[:2] == ["agent", "conformance"]:
            return "agent conformance", load_program("agent-conformance"), args[2:]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])
        with formatter.section("Programs of a cluster"):
            formatter.write_dl([*_PROGRAMS.items()])


def load(where: str) -> click.Command:
    module, _, attribute = where.partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    return command


def load_program(name: str) -> click.Command:
    """The program's own command. Raises ClickException when that part is not installed."""
    line = f"dure {name.replace('-', ' ')}"
    for entry in importlib.metadata.entry_points(group=PROGRAMS_GROUP, name=name):
        try:
            command = entry.load()
        except ModuleNotFoundError as error:
            raise click.ClickException(f"`{line}` is not installed here: {error}") from error
        if not isinstance(command, click.Command):
            raise click.ClickException(f"`{line}` cannot be run: {entry.value} is not a command")
        if name == "agent":
            command.epilog = (
                "`dure agent list` and `dure agent get NAME` show the agents of the cluster, "
                "`dure agent drain NAME` empties one; `dure agent conformance` checks an agent against the "
                "protocol."
            )
        return command
    raise click.ClickException(f"`{line}` is not installed here")


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"dure {importlib.metadata.version('dure')}")
        ctx.exit()


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version."
)
def root() -> None:
    """Serve models from shared GPUs.

    Begin with `dure dev`, then `dure folder create`, `dure folder upload` and `dure endpoint create`.
    """


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; whatever goes wrong is told in words on stderr."""
    try:
        result = root.main(args=arguments, prog_name="dure", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. What is still buffered must not fail at exit again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, click.Abort):
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        from dure.client.cli import failures

        return failures.report(error, arguments)


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
