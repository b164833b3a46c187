"""`dure user`: who calls the API, and with which roles."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import click

from dure.client.cli import tables
from dure.client.cli.answers import show_list, show_one
from dure.client.cli.key import limits
from dure.client.cli.options import Shell, command
from dure.client.cli.output import dumps, to_value
from dure.client.cli.project import ROLES
from dure.client.cli.tables import Table
from dure.client.cli.text import age, clean, moment
from dure.v1.project_pb2 import Role, User


@click.group()
def user() -> None:
    """Users: who calls the API, and with which roles."""


_projects = click.option(
    "--project", "projects", multiple=True, metavar="NAME", help="Project to have a role in; repeatable."
)
_roles = click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice([*ROLES]),
    help="Role in the --project at the same place; one for all, or one each; default member.",
)
_description = click.option("--description", help="For people, such as a full name.")


@command(user, "create", output=True, scoped=False)
@click.argument("name")
@click.option("--admin", is_flag=True, help="An administrator, who may do everything.")
@_projects
@_roles
@_description
async def create(
    shell: Shell,
    name: str,
    admin: bool,
    projects: tuple[str, ...],
    roles: tuple[str, ...],
    description: str | None,
) -> None:
    """Make a user. It can call nothing before it has a key: `dure key create --user NAME`."""
    memberships = _memberships(projects, roles)
    async with shell.client() as client:
        item = await client.users.create(
            name, admin=admin, memberships=memberships, description=description or ""
        )
    shell.say(f"user {name} created")
    shell.say(f"next: `dure key create --user {name}`")
    show_one(shell, item, _table)


@command(user, "list", output=True, scoped=False)
async def list_(shell: Shell) -> None:
    """List users."""
    async with shell.client() as client:
        await show_list(shell, "users", client.users.list(), _table, "No users.")


@command(user, "get", output=True, scoped=False)
@click.argument("name")
async def get(shell: Shell, name: str) -> None:
    """Show a user."""
    async with shell.client() as client:
        item = await client.users.get(name)
    show_one(shell, item, _table, _facts(item))


@command(user, "update", output=True, scoped=False)
@click.argument("name")
@click.option("--admin/--no-admin", default=None, help="Whether an administrator.")
@click.option("--disable/--enable", "disabled", default=None, help="Whether its keys are refused for now.")
@_projects
@_roles
@click.option("--no-projects", is_flag=True, help="Take all roles in projects away.")
@_description
async def update(
    shell: Shell,
    name: str,
    admin: bool | None,
    disabled: bool | None,
    projects: tuple[str, ...],
    roles: tuple[str, ...],
    no_projects: bool,
    description: str | None,
) -> None:
    """Change a user. --project replaces all of its roles; `dure project add-member` adds one."""
    if no_projects and projects:
        raise click.UsageError("give --project or --no-projects, not both")
    memberships = _memberships(projects, roles) if projects or roles or no_projects else None
    if admin is None and disabled is None and memberships is None and description is None:
        raise click.UsageError(
            "nothing to change: give --admin, --no-admin, --disable, --enable, --project, --no-projects or "
            "--description"
        )
    async with shell.client() as client:
        item = await client.users.update(
            name, admin=admin, disabled=disabled, memberships=memberships, description=description
        )
    shell.say(f"user {name} changed")
    show_one(shell, item, _table)


@command(user, "delete", scoped=False)
@click.argument("name")
async def delete(shell: Shell, name: str) -> None:
    """Remove a user and all of its keys."""
    async with shell.client() as client:
        await client.users.delete(name)
    shell.say(f"user {name} deleted")


@command(user, "whoami", output=True, scoped=False)
async def whoami(shell: Shell) -> None:
    """Say who you are to the manager, and what your key allows."""
    async with shell.client() as client:
        response = await client.users.caller()
    if shell.output in ("json", "yaml"):
        click.echo(dumps(to_value(response), shell.output))
    elif shell.output == "name":
        click.echo(response.user.name)
    elif shell.quiet:
        click.echo(tables.last(response.user.name))
    elif shell.output:
        tables.show(_table([response.user], shell.output == "wide"), color=shell.color)
    else:
        key = response.key
        until = f", until {moment(key.expire_time)}" if key.HasField("expire_time") else ""
        label = f" `{key.label}`" if key.label else ""
        facts = [*_facts(response.user), ("Key", f"{tables.last(key.name)}{label}: {limits(key)}{until}")]
        for name, value in facts:
            if value:
                click.echo(f"{name + ':':<18}{clean(value)}")


def _memberships(projects: tuple[str, ...], roles: tuple[str, ...]) -> dict[str, Role.ValueType]:
    """Roles by project, as the options stand beside each other. Raises UsageError."""
    if len(roles) not in (0, 1, len(projects)) or (roles and not projects):
        raise click.UsageError("give one --role for all of --project, or one for each, in the same order")
    if len(set(projects)) < len(projects):
        raise click.UsageError("--project names a project twice")
    given = roles if len(roles) == len(projects) else (roles or ("member",)) * len(projects)
    return {project: ROLES[role] for project, role in zip(projects, given, strict=True)}


def _facts(item: User) -> list[tuple[str, str]]:
    return [
        ("Name", item.name),
        ("Description", item.description),
        ("Administrator", "yes" if item.admin else "no"),
        ("Disabled", "yes: its keys are refused" if item.disabled else ""),
        ("Projects", "all" if item.admin else _roles_text(item) or "none"),
        ("Created", moment(item.create_time)),
        ("UID", item.uid),
    ]


def _roles_text(item: User) -> str:
    return ", ".join(
        f"{each.project} ({tables.status_word(each, 'role').lower()})" for each in item.memberships
    )


def _table(items: Sequence[User], wide: bool) -> Table:
    now = datetime.now(UTC)
    header = ["NAME", "ADMIN", "STATE", "PROJECTS", "AGE"] + (["UID"] if wide else [])
    rows = []
    for item in items:
        row = [tables.last(item.name), "yes" if item.admin else "no"]
        row += ["disabled" if item.disabled else "enabled", "all" if item.admin else _roles_text(item)]
        rows.append([*row, age(item.create_time, now), *([item.uid] if wide else []), item.description])
    return Table([*header, "DESCRIPTION"], list(rows))
