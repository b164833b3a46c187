"""Who may call what: one table of every method that takes an API key, and what a key amounts to.

Roles are ordered: a viewer reads a project, a member also changes it, an administrator may do everything.
A method that has no row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from google.protobuf.message import Message

VIEWER, MEMBER, ADMIN = "viewer", "member", "admin"
_RANK = {"": 0, VIEWER: 1, MEMBER: 2, ADMIN: 3}


class Need(StrEnum):
    """What a method asks of its caller."""

    ANY = "any key"
    READ = "viewer of the project"
    WRITE = "member of the project"
    SELF = "the user, or an administrator"
    ADMIN = "administrator"


@dataclass(frozen=True)
class Rule:
    """`recorded`: each call, a refused one too, leaves a record in the audit trail."""

    need: Need
    recorded: bool = False


_ANY = Rule(Need.ANY)
_READ, _WRITE = Rule(Need.READ), Rule(Need.WRITE, recorded=True)
_SELF, _SELF_CHANGES = Rule(Need.SELF), Rule(Need.SELF, recorded=True)
_ADMIN_READS, _ADMIN = Rule(Need.ADMIN), Rule(Need.ADMIN, recorded=True)

_TABLE: dict[str, dict[str, Rule]] = {
    "EndpointService": {
        "CreateEndpoint": _WRITE,
        "GetEndpoint": _READ,
        "ListEndpoints": _READ,
        "UpdateEndpoint": _WRITE,
        "DeleteEndpoint": _WRITE,
        "RetryEndpoint": _WRITE,
        "WatchEndpoints": _READ,
        "ListRevisions": _READ,
        "RollbackEndpoint": _WRITE,
        "PauseRollout": _WRITE,
        "ResumeRollout": _WRITE,
        "ValidateEndpoint": _WRITE,
        "ExplainEndpoint": _READ,
        "ReadLogs": _READ,
        "ListReplicas": _READ,
        "ListEvents": _READ,
    },
    "FolderService": {
        "CreateFolder": _WRITE,
        "GetFolder": _READ,
        "ListFolders": _READ,
        "DeleteFolder": _WRITE,
        "ListFiles": _READ,
        "UploadFile": _WRITE,
        "DownloadFile": _READ,
        "DeleteFile": _WRITE,
        "CheckFolder": _READ,
    },
    "ModelService": {"GetModel": _READ, "ListModels": _READ, "RunModel": _WRITE},
    "ScalingService": {
        "CreateScalingRule": _WRITE,
        "GetScalingRule": _READ,
        "ListScalingRules": _READ,
        "UpdateScalingRule": _WRITE,
        "DeleteScalingRule": _WRITE,
        "ExplainScaling": _READ,
        "GetMeasurements": _READ,
    },
    # GetToken shows a secret, which lets its reader call the endpoint: as good as making a token.
    "TokenService": {
        "CreateToken": _WRITE,
        "GetToken": _WRITE,
        "ListTokens": _READ,
        "RevokeToken": _WRITE,
    },
    "RegistryService": {"SetRegistry": _WRITE, "ListRegistries": _READ, "DeleteRegistry": _WRITE},
    "ProjectService": {
        "CreateProject": _ADMIN,
        "GetProject": _READ,
        "ListProjects": _ANY,
        "UpdateProject": _ADMIN,
        "DeleteProject": _ADMIN,
        "GetUsage": _READ,
        "ListAuditRecords": _READ,
    },
    "UserService": {
        "CreateUser": _ADMIN,
        "GetUser": _SELF,
        "ListUsers": _ADMIN_READS,
        "UpdateUser": _ADMIN,
        "DeleteUser": _ADMIN,
        "GetCaller": _ANY,
        "CreateApiKey": _SELF_CHANGES,
        "ListApiKeys": _SELF,
        "DeleteApiKey": _SELF_CHANGES,
    },
    "ResourceGroupService": {
        "CreateResourceGroup": _ADMIN,
        "GetResourceGroup": _ANY,
        "ListResourceGroups": _ANY,
        "UpdateResourceGroup": _ADMIN,
        "DeleteResourceGroup": _ADMIN,
    },
    "PresetService": {
        "CreatePreset": _ADMIN,
        "GetPreset": _ANY,
        "ListPresets": _ANY,
        "UpdatePreset": _ADMIN,
        "DeletePreset": _ADMIN,
    },
    "ImageService": {
        "CreateImage": _ADMIN,
        "GetImage": _ANY,
        "ListImages": _ANY,
        "UpdateImage": _ADMIN,
        "DeleteImage": _ADMIN,
    },
    "RuntimeService": {
        "CreateRuntime": _ADMIN,
        "GetRuntime": _ANY,
        "ListRuntimes": _ANY,
        "UpdateRuntime": _ADMIN,
        "DeleteRuntime": _ADMIN,
    },
    "AgentService": {
        "GetAgent": _ANY,
        "ListAgents": _ANY,
        "DrainAgent": _ADMIN,
        "ResumeAgent": _ADMIN,
    },
    "AdminService": {"GetCluster": _ANY, "CreateJoinToken": _ADMIN},
}
RULES = {
    f"/dure.v1.{service}/{method}": rule for service, rows in _TABLE.items() for method, rule in rows.items()
}
# Not called with API keys, but worth a record: who joined the cluster.
JOINS = {"/dure.fleet.v1.FleetService/Join": "agent", "/dure.routing.v1.RoutingService/Join": "proxy"}


@dataclass(frozen=True)
class Grant:
    """A role in one project."""

    project_uid: str
    project: str
    role: str


@dataclass(frozen=True)
class Principal:
    """Who calls. `kind` is `user`, `agent`, `proxy` or `join`; `name` is for logs and messages.

    `uid` is the key's, the agent's, the proxy's or the join token's; `role` says who a join token lets in.
    The rest is set for users: `everywhere` is a role held in every project, `limited` whether the key allows
    less than its user may do.
    """

    kind: str
    uid: str
    name: str
    role: str = ""
    user_uid: str = ""
    admin: bool = False
    everywhere: str = ""
    grants: tuple[Grant, ...] = ()
    limited: bool = False
    expires_ms: int | None = None

    def role_in(self, project_uid: str) -> str:
        """Empty for none."""
        return self._role(grant.role for grant in self.grants if grant.project_uid == project_uid)

    def role_in_named(self, project: str) -> str:
        """Empty for none."""
        return self._role(grant.role for grant in self.grants if grant.project == project)

    def _role(self, granted: Iterable[str]) -> str:
        return ADMIN if self.admin else max([self.everywhere, *granted], key=_RANK.__getitem__)


def user(
    key_uid: str,
    name: str,
    user_uid: str,
    *,
    admin: bool,
    memberships: Sequence[Grant],
    cap: str,
    key_project: Grant | None,
    expires_ms: int | None,
) -> Principal:
    """What a user is by one key: `cap` is the most that it allows, `key_project` (its role is not looked
    at) the only project that it is good for, None for all."""
    whole = admin and cap == ADMIN and key_project is None
    everywhere = ""
    if admin and not whole:
        # An administrator may do in any project what a member may; a limited key reaches no further.
        role = _lower(MEMBER, cap)
        if key_project is None:
            everywhere, memberships = role, ()
        else:
            memberships = [Grant(key_project.project_uid, key_project.project, role)]
    grants = tuple(
        Grant(grant.project_uid, grant.project, _lower(grant.role, cap))
        for grant in memberships
        if key_project is None or grant.project_uid == key_project.project_uid
    )
    return Principal(
        "user",
        key_uid,
        name,
        user_uid=user_uid,
        admin=whole,
        everywhere=everywhere,
        grants=() if whole else grants,
        limited=cap != ADMIN or key_project is not None,
        expires_ms=expires_ms,
    )


def _lower(one: str, other: str) -> str:
    return min(one, other, key=_RANK.__getitem__)


def enough(role: str, need: Need) -> bool:
    """Whether a role in a project will do."""
    return _RANK[role] >= _RANK[MEMBER if need is Need.WRITE else VIEWER]


def refusal(project: str, role: str) -> str:
    """The sentence for one whose role in a project will not do. It is the same for a project that does not
    exist: who has no role in it learns nothing of it."""
    if role:
        return (
            f"you are a {role} of project `{project[:60]}` by this key, and may only read there; an "
            f"administrator can make you a member: dure project add-member {project[:60]} USER --role member"
        )
    return (
        f"there is no project `{project[:60]}` that you have a role in; "
        "`dure project list` shows yours, `dure user whoami` who you are"
    )


# Fields of requests that hold names of resources; any other text may look like one without being one.
_NAME_FIELDS = {"name", "parent", "folder", "model"}
_PROJECT = re.compile(r"projects/([^/]*)(?:/.*)?", re.DOTALL)


def projects_named(request: Message) -> set[str]:
    """Projects that a request's resource names are in, whatever their form is otherwise."""
    found = (project_of(name) for name in _names(request))
    return {project for project in found if project}


def project_of(name: str) -> str:
    """The project of a resource name, empty if it has none."""
    match = _PROJECT.fullmatch(name)
    return match[1] if match else ""


def _names(message: Message) -> Iterator[str]:
    for field, content in message.ListFields():
        if field.type == field.TYPE_STRING:
            if field.name in _NAME_FIELDS:
                yield from content if field.is_repeated else (content,)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for each in content if field.is_repeated else (content,):
                yield from _names(each)


def resource_of(request: Message) -> str:
    """Name of the resource that a request is about, as well as it says; empty if it does not."""
    fields = request.DESCRIPTOR.fields_by_name
    for direct in ("name", "folder"):
        # `folder` of CreateFolder is what is wanted, and no name.
        if isinstance(name := getattr(request, direct, None), str) and name:
            return name
    for field in fields.values():
        # `endpoint_id` of CreateEndpoint: the last part of the new name.
        if (
            field.name.endswith("_id")
            and field.name != "request_id"
            and (made := getattr(request, field.name))
        ):
            words = field.name.removesuffix("_id").split("_")
            collection = words[0] + "".join(word.title() for word in words[1:]) + "s"
            parent = getattr(request, "parent", "")
            return f"{parent}/{collection}/{made}" if parent else f"{collection}/{made}"
    for field, content in request.ListFields():
        # `endpoint.name` of UpdateEndpoint.
        kind = field.message_type
        if kind is not None and not field.is_repeated and "name" in kind.fields_by_name and content.name:
            return str(content.name)
    return str(getattr(request, "parent", ""))
