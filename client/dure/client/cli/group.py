"""`dure group`: resource groups."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import click

from dure.client.cli import tables
from dure.client.cli.answers import show_list, show_one
from dure.client.cli.options import Shell, command
from dure.client.cli.tables import Table
from dure.client.cli.text import age, moment
from dure.client.wanted import PROFILES
from dure.v1.catalog_pb2 import PLACEMENT_POLICY_PACK, PLACEMENT_POLICY_SPREAD, ResourceGroup

_POLICIES = {"spread": PLACEMENT_POLICY_SPREAD, "pack": PLACEMENT_POLICY_PACK}


@click.group()
def group() -> None:
    """Resource groups: sets of agents with a policy."""


_policy = click.option(
    "--policy",
    type=click.Choice([*_POLICIES]),
    help="spread: replicas on as many agents as possible (the default); pack: the fullest agent first.",
)
_allow = click.option(
    "--allow", multiple=True, metavar="PROJECT", help="Only these projects may use it; repeatable."
)
_proxy_group = click.option(
    "--proxy-group", metavar="NAME", help="Proxies that serve its endpoints; default `default`."
)
_profile = click.option(
    "--profile",
    type=click.Choice([*PROFILES]),
    help="Least that its containers are held to, whatever an endpoint asks for; default `default`.",
)
_description = click.option("--description", help="For people.")


@command(group, "create", output=True, scoped=False)
@click.argument("name")
@_policy
@_allow
@_proxy_group
@_profile
@_description
async def create(
    shell: Shell,
    name: str,
    policy: str | None,
    allow: tuple[str, ...],
    proxy_group: str | None,
    profile: str | None,
    description: str | None,
) -> None:
    """Make a resource group."""
    async with shell.client() as client:
        item = await client.groups.create(
            name,
            policy=_POLICIES[policy or "spread"],
            allowed_projects=allow,
            proxy_group=proxy_group or "",
            description=description or "",
            security_profile=PROFILES[profile or "default"],
        )
    shell.say(f"resource group {name} created")
    shell.say(f"next: start agents with `dure agent --resource-group {name}`")
    show_one(shell, item, _table)


@command(group, "list", output=True, scoped=False)
async def list_(shell: Shell) -> None:
    """List the resource groups that your projects may use."""
    async with shell.client() as client:
        await show_list(shell, "resource_groups", client.groups.list(), _table, "No resource groups.")


@command(group, "get", output=True, scoped=False)
@click.argument("name")
async def get(shell: Shell, name: str) -> None:
    """Show a resource group."""
    async with shell.client() as client:
        item = await client.groups.get(name)
    facts = [
        ("Name", item.name),
        ("Description", item.description),
        ("Policy", tables.status_word(item, "policy").lower()),
        ("Projects", ", ".join(item.allowed_projects) or "all"),
        ("Proxy group", item.proxy_group),
        ("Profile", tables.status_word(item, "security_profile").lower()),
        ("Agents", str(item.agents)),
        ("Created", moment(item.create_time)),
    ]
    show_one(shell, item, _table, facts)


@command(group, "update", output=True, scoped=False)
@click.argument("name")
@_policy
@_allow
@click.option("--allow-all", is_flag=True, help="All projects may use it.")
@_proxy_group
@_profile
@_description
async def update(
    shell: Shell,
    name: str,
    policy: str | None,
    allow: tuple[str, ...],
    allow_all: bool,
    proxy_group: str | None,
    profile: str | None,
    description: str | None,
) -> None:
    """Change a resource group. --allow replaces the list of projects."""
    if allow and allow_all:
        raise click.UsageError("give --allow or --allow-all, not both")
    given = (policy, allow or None, allow_all or None, proxy_group, profile, description)
    if all(value is None for value in given):
        options = "--policy, --allow, --allow-all, --proxy-group, --profile or --description"
        raise click.UsageError(f"nothing to change: give {options}")
    async with shell.client() as client:
        item = await client.groups.update(
            name,
            policy=_POLICIES[policy] if policy is not None else None,
            allowed_projects=allow if allow or allow_all else None,
            proxy_group=proxy_group,
            description=description,
            security_profile=PROFILES[profile] if profile is not None else None,
        )
    shell.say(f"resource group {name} changed")
    show_one(shell, item, _table)


@command(group, "delete", scoped=False)
@click.argument("name")
async def delete(shell: Shell, name: str) -> None:
    """Remove a resource group without agents and endpoints."""
    async with shell.client() as client:
        await client.groups.delete(name)
    shell.say(f"resource group {name} deleted")


def _table(items: Sequence[ResourceGroup], wide: bool) -> Table:
    now = datetime.now(UTC)
    profiles = [tables.status_word(item, "security_profile").lower() for item in items]
    told = wide or any(profile != "default" for profile in profiles)
    header = ["NAME", "POLICY", "AGENTS", "PROJECTS", "AGE"] + (["PROXY GROUP"] if wide else [])
    header += ["PROFILE"] if told else []
    rows = []
    for item, profile in zip(items, profiles, strict=True):
        row = [tables.last(item.name), tables.status_word(item, "policy").lower(), str(item.agents)]
        row += [", ".join(item.allowed_projects) or "all", age(item.create_time, now)]
        row += [item.proxy_group] if wide else []
        rows.append([*row, *([profile] if told else []), item.description])
    return Table([*header, "DESCRIPTION"], list(rows))
