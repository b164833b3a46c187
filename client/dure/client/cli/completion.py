"""`dure completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what completes `dure` in a shell.

    Put `eval "$(dure completion bash)"` into ~/.bashrc, the same with zsh into ~/.zshrc, or
    `dure completion fish | source` into ~/.config/fish/config.fish.
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "dure", "_DURE_COMPLETE").source())
