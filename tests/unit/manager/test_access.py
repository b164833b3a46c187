"""Who may call what: the table is whole, and a key never does more than its user."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor
from hypothesis import given
from hypothesis import strategies as st

import dure.v1
from dure.manager import access
from dure.manager.access import ADMIN, MEMBER, VIEWER, Grant, Need, Principal
from dure.v1 import endpoint_pb2, folder_pb2, project_pb2, token_pb2

RANK = {"": 0, VIEWER: 1, MEMBER: 2, ADMIN: 3}
CAPS = st.sampled_from([VIEWER, MEMBER, ADMIN])
ROLES = st.sampled_from([VIEWER, MEMBER])
COLUMNS = (Need.ANY, Need.READ, Need.WRITE, Need.SELF, Need.ADMIN)


def public_services() -> list[ServiceDescriptor]:
    modules = [name for _, name, _ in pkgutil.iter_modules(dure.v1.__path__) if name.endswith("_pb2")]
    return [
        service
        for name in modules
        for service in importlib.import_module(f"dure.v1.{name}").DESCRIPTOR.services_by_name.values()
    ]


def test_every_public_method_has_a_row_and_every_row_a_method() -> None:
    methods = {
        f"/{service.full_name}/{method.name}" for service in public_services() for method in service.methods
    }
    assert len(methods) > 60
    assert methods == set(access.RULES)


def test_the_table_in_the_docs_is_this_one() -> None:
    text = (Path(__file__).parents[3] / "docs" / "tenancy.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    told = {row[0]: row[1:] for row in rows if len(row) == 1 + len(COLUMNS)}
    for service in public_services():
        cells = told[service.name.removesuffix("Service")]
        shown = {
            method: need
            for need, cell in zip(COLUMNS, cells, strict=True)
            for method in cell.split(", ")
            if method
        }
        path = f"/{service.full_name}"
        assert shown == {m.name: access.RULES[f"{path}/{m.name}"].need for m in service.methods}


def test_reading_is_not_recorded_and_changing_is() -> None:
    for path, rule in access.RULES.items():
        method = path.rpartition("/")[2]
        reads = method.startswith(("List", "Watch", "Read", "Download", "Explain", "Check", "Get"))
        assert rule.recorded == (not reads or method == "GetToken"), path
        if not reads:
            assert rule.need in (Need.WRITE, Need.ADMIN, Need.SELF), path


def user(
    memberships: dict[str, str], *, admin: bool = False, cap: str = ADMIN, project: str = ""
) -> Principal:
    grants = [Grant(f"uid-{name}", name, role) for name, role in memberships.items()]
    only = Grant(f"uid-{project}", project, "") if project else None
    return access.user(
        "key", "u", "uid", admin=admin, memberships=grants, cap=cap, key_project=only, expires_ms=None
    )


@pytest.mark.parametrize(
    ("principal", "in_a", "in_b", "whole"),
    [
        (user({"a": MEMBER}), MEMBER, "", False),
        (user({"a": MEMBER}, cap=VIEWER), VIEWER, "", False),
        (user({"a": VIEWER, "b": MEMBER}, cap=MEMBER), VIEWER, MEMBER, False),
        (user({"a": MEMBER, "b": MEMBER}, project="b"), "", MEMBER, False),
        (user({"a": MEMBER}, project="b"), "", "", False),
        (user({}, admin=True), ADMIN, ADMIN, True),
        (user({"a": VIEWER}, admin=True, cap=MEMBER), MEMBER, MEMBER, False),
        (user({}, admin=True, cap=VIEWER), VIEWER, VIEWER, False),
        (user({"a": VIEWER}, admin=True, project="a"), MEMBER, "", False),
        (user({}, admin=True, cap=VIEWER, project="b"), "", VIEWER, False),
        (user({}), "", "", False),
    ],
)
def test_what_a_key_amounts_to(principal: Principal, in_a: str, in_b: str, whole: bool) -> None:
    assert (principal.role_in("uid-a"), principal.role_in("uid-b")) == (in_a, in_b)
    assert (principal.role_in_named("a"), principal.role_in_named("b")) == (in_a, in_b)
    assert principal.admin is whole
    # What does not exist looks like what one has no role in, but for who has one everywhere.
    assert principal.role_in("") == principal.everywhere or whole


@given(
    memberships=st.dictionaries(st.sampled_from("abc"), ROLES),
    admin=st.booleans(),
    cap=CAPS,
    project=st.sampled_from(["", "a", "d"]),
)
def test_a_key_never_does_more_than_its_user(
    memberships: dict[str, str], admin: bool, cap: str, project: str
) -> None:
    whole = user(memberships, admin=admin)
    key = user(memberships, admin=admin, cap=cap, project=project)
    for name in "abcd":
        role = key.role_in(f"uid-{name}")
        assert RANK[role] <= min(RANK[whole.role_in(f"uid-{name}")], RANK[cap])
        assert not role or not project or name == project or key.admin
    assert not key.admin or (admin and cap == ADMIN and not project)
    assert key.limited == (cap != ADMIN or bool(project))


def test_roles_are_enough_for_what_they_say() -> None:
    for role, read, write in (("", False, False), (VIEWER, True, False), (MEMBER, True, True)):
        assert access.enough(role, Need.READ) is read
        assert access.enough(role, Need.WRITE) is write


def test_a_refusal_does_not_tell_whether_a_project_exists() -> None:
    assert access.refusal("x", "") == access.refusal("y", "").replace("`y`", "`x`")


def test_projects_are_found_wherever_a_request_names_them() -> None:
    E = endpoint_pb2
    mount = E.ExtraMount(folder="projects/c/folders/f")
    request = E.CreateEndpointRequest(
        parent="projects/a",
        endpoint=E.Endpoint(model="projects/b/folders/m", extra_mounts=[mount], environ={"X": "projects/no"}),
    )
    assert access.projects_named(request) == {"a", "b", "c"}
    assert access.projects_named(E.GetEndpointRequest(name="projects/a/x y/\n/z")) == {"a"}
    assert access.projects_named(E.CreateEndpointRequest(endpoint=E.Endpoint(model="bare"))) == set()
    # A label is for people, whatever it looks like.
    token = token_pb2.CreateTokenRequest(parent="projects/a/endpoints/e", label="projects/no/x")
    assert access.projects_named(token) == {"a"}


def test_the_resource_of_a_request() -> None:
    P, E, F = project_pb2, endpoint_pb2, folder_pb2
    for request, name in (
        (E.CreateEndpointRequest(parent="projects/a", endpoint_id="e"), "projects/a/endpoints/e"),
        (
            E.UpdateEndpointRequest(endpoint=E.Endpoint(name="projects/a/endpoints/e")),
            "projects/a/endpoints/e",
        ),
        (E.DeleteEndpointRequest(name="projects/a/endpoints/e"), "projects/a/endpoints/e"),
        (
            F.CreateFolderRequest(parent="projects/a", folder_id="f", folder=F.Folder(usage=1)),
            "projects/a/folders/f",
        ),
        (F.DeleteFileRequest(folder="projects/a/folders/f", path="p"), "projects/a/folders/f"),
        (P.CreateProjectRequest(project_id="a"), "projects/a"),
        (P.CreateApiKeyRequest(parent="users/u"), "users/u"),
        (P.CreateApiKeyRequest(), ""),
        (token_pb2.CreateTokenRequest(parent="projects/a/endpoints/e"), "projects/a/endpoints/e"),
    ):
        assert access.resource_of(request) == name
