"""`dure project`: tenants, their quotas and members, and who changed what."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime

import click

from dure.client.cli import tables
from dure.client.cli.answers import amounts, changed, show_list, show_one
from dure.client.cli.options import Duration, Shell, command
from dure.client.cli.output import dumps, emit_list, to_value
from dure.client.cli.tables import Table
from dure.client.cli.text import age, moment
from dure.v1.project_pb2 import ROLE_MEMBER, ROLE_VIEWER, AuditRecord, Project
from dure.wire.errors import NotFound

AUDIT_SHOWN = 50
ROLES = {"member": ROLE_MEMBER, "viewer": ROLE_VIEWER}


@click.group()
def project() -> None:
    """Projects: the tenants, their quotas and members, and who changed what."""


_description = click.option("--description", help="For people.")
_quota = click.option(
    "--quota",
    "quota",
    multiple=True,
    metavar="SLOT=AMOUNT",
    help="Most that all its replicas may hold, such as cpu=64, mem=512g, cuda.shares=4; `SLOT-`: no limit.",
)
_endpoints = click.option(
    "--max-endpoints", type=click.IntRange(0, 100_000), help="Most endpoints; 0 for no limit."
)


@command(project, "create", output=True, scoped=False)
@click.argument("name")
@_description
@_quota
@_endpoints
async def create(
    shell: Shell, name: str, description: str | None, quota: tuple[str, ...], max_endpoints: int | None
) -> None:
    """Make a project."""
    async with shell.client() as client:
        item = await client.projects.create(
            name,
            description=description or "",
            quota_slots=changed({}, quota, "--quota"),
            quota_endpoints=max_endpoints or 0,
        )
    shell.say(f"project {name} created")
    shell.say(f"next: `dure project add-member {name} USER --role member`")
    show_one(shell, item, _table)


@command(project, "list", output=True, scoped=False)
async def list_(shell: Shell) -> None:
    """List the projects that you have a role in."""
    async with shell.client() as client:
        empty = "You have a role in no project; an administrator gives you one: `dure project add-member`."
        await show_list(shell, "projects", client.projects.list(), _table, empty)


@command(project, "get", output=True)
@click.argument("name", default="")
async def get(shell: Shell, name: str) -> None:
    """Show a project, by default the current one."""
    async with shell.client() as client:
        item = await client.projects.get(name)
    facts = [
        ("Name", item.name),
        ("Description", item.description),
        ("Quota", amounts(item.quota_slots) or "none"),
        ("Max endpoints", _limit(item.quota_endpoints)),
        ("Created", moment(item.create_time)),
        ("UID", item.uid),
    ]
    show_one(shell, item, _table, facts)


@command(project, "update", output=True, scoped=False)
@click.argument("name")
@_description
@_quota
@_endpoints
async def update(
    shell: Shell, name: str, description: str | None, quota: tuple[str, ...], max_endpoints: int | None
) -> None:
    """Change a project; slots that --quota does not name stay as they are."""
    if description is None and not quota and max_endpoints is None:
        raise click.UsageError("nothing to change: give --description, --quota or --max-endpoints")
    async with shell.client() as client:
        slots = None
        if quota:
            slots = changed((await client.projects.get(name)).quota_slots, quota, "--quota")
        item = await client.projects.update(
            name, description=description, quota_slots=slots, quota_endpoints=max_endpoints
        )
    shell.say(f"project {name} changed")
    show_one(shell, item, _table)


@command(project, "delete", scoped=False)
@click.argument("name")
async def delete(shell: Shell, name: str) -> None:
    """Remove a project that has no endpoints, folders and members any more."""
    async with shell.client() as client:
        await client.projects.delete(name)
    shell.say(f"project {name} deleted")


@command(project, "usage", output=True)
@click.argument("name", default="")
async def usage(shell: Shell, name: str) -> None:
    """Show what of its quota a project uses."""
    async with shell.client() as client:
        response = await client.projects.usage(name)
    if shell.output in ("json", "yaml"):
        click.echo(dumps(to_value(response), shell.output))
        return
    rows = [
        [
            slot.slot,
            tables.amount_text(slot.slot, slot.used),
            tables.amount_text(slot.slot, slot.quota) if slot.quota else "no limit",
        ]
        for slot in response.slots
    ]
    rows.append(["endpoints", str(response.endpoints), _limit(response.quota_endpoints)])
    tables.show(Table(["SLOT", "USED", "QUOTA"], list(rows)), color=shell.color)


@command(project, "add-member", output=True, scoped=False)
@click.argument("name")
@click.argument("user")
@click.option("--role", type=click.Choice([*ROLES]), default="member", show_default=True, help="Its role.")
async def add_member(shell: Shell, name: str, user: str, role: str) -> None:
    """Give a user a role in a project, or another one."""
    async with shell.client() as client:
        before = await client.users.get(user)
        memberships = {each.project: each.role for each in before.memberships} | {name: ROLES[role]}
        after = await client.users.update(user, memberships=memberships)
    shell.say(f"user {user} is a {role} of project {name}")
    if after.admin:
        click.echo(f"note: {user} is an administrator, and may do everything anyway", err=True)


@command(project, "remove-member", scoped=False)
@click.argument("name")
@click.argument("user")
async def remove_member(shell: Shell, name: str, user: str) -> None:
    """Take a user's role in a project away."""
    async with shell.client() as client:
        before = await client.users.get(user)
        memberships = {each.project: each.role for each in before.memberships}
        if name not in memberships:
            raise NotFound(f"user `{user}` has no role in project `{name}`", reason="MEMBER_NOT_FOUND")
        del memberships[name]
        await client.users.update(user, memberships=memberships)
    shell.say(f"user {user} has no role in project {name} any more")


@command(project, "audit", output=True)
@click.argument("name", default="")
@click.option("--all", "everything", is_flag=True, help="Of the whole cluster (administrators).")
@click.option("--since", "max_age_s", type=Duration(), help="Only younger ones, such as 1h.")
@click.option(
    "--limit", type=click.IntRange(1), default=AUDIT_SHOWN, show_default=True, help="Most records to show."
)
async def audit(shell: Shell, name: str, everything: bool, max_age_s: float | None, limit: int) -> None:
    """Show who changed what, newest first."""
    if everything and name:
        raise click.UsageError("give a project or --all, not both")
    async with shell.client() as client:
        asked = None if everything else name
        async with aclosing(client.projects.audit(asked, max_age_s=max_age_s)) as records:
            found = await _first(records, limit)
    if shell.output in ("json", "yaml"):
        emit_list("records", found, shell.output)
    elif shell.output == "name":
        for record in found:
            click.echo(record.resource)
    elif found or shell.output:
        tables.show(_audit_table(found, shell.output == "wide", everything), color=shell.color)
    else:
        click.echo("No records: nothing was changed in that time.", err=True)


async def _first(records: AsyncIterator[AuditRecord], limit: int) -> list[AuditRecord]:
    found = []
    async for record in records:
        found.append(record)
        if len(found) == limit:
            break
    return found


def _audit_table(items: Sequence[AuditRecord], wide: bool, everything: bool) -> Table:
    now = datetime.now(UTC)
    header = ["AGE", "WHO", *(["PROJECT"] if everything else []), "METHOD", "RESOURCE", "OUTCOME"]
    if wide:
        header += ["TIME", "KEY", "PEER"]
    rows = []
    for item in items:
        # The project is said once, above or beside.
        resource = item.resource.removeprefix(f"projects/{item.project}/") if item.project else item.resource
        row = [age(item.time, now), item.actor]
        row += [item.project] if everything else []
        row += [item.method, resource, item.outcome]
        row += [moment(item.time), item.key, item.peer] if wide else []
        rows.append([*row, item.detail])
    return Table([*header, "DETAIL"], list(rows))


def _table(items: Sequence[Project], wide: bool) -> Table:
    now = datetime.now(UTC)
    header = ["NAME", "QUOTA", "MAX ENDPOINTS", "AGE"] + (["UID"] if wide else [])
    rows = []
    for item in items:
        row = [tables.last(item.name), amounts(item.quota_slots) or "none", _limit(item.quota_endpoints)]
        row.append(age(item.create_time, now))
        rows.append(list(itertools.chain(row, [item.uid] if wide else [], [item.description])))
    return Table([*header, "DESCRIPTION"], list(rows))


def _limit(number: int) -> str:
    return str(number) if number else "no limit"
