"""Every method of every service, by everybody: the table of `access` holds on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from link.manager.inside import Inside, model_folder, with_inside

from dure.client import Client
from dure.fleet.v1 import fleet_pb2
from dure.manager import access, services
from dure.manager.access import Need
from dure.v1 import admin_pb2, endpoint_pb2, folder_pb2, project_pb2, scaling_pb2
from dure.wire.channel import bearer, open_channel

METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for module, _ in services.MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if service.full_name.startswith("dure.")
}
PUBLIC = {path: method for path, method in METHODS.items() if path.startswith("/dure.v1.")}
DENIED, NO_KEY = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
# What no call must end with, whoever makes it.
BROKEN = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)


@dataclass(frozen=True)
class Names:
    """What requests are about: resources of one project."""

    project: str
    endpoint: str = "e"
    folder: str = "m"
    token: str = "t"
    user: str = "carol"
    rule: str = "r"

    def request(self, method: MethodDescriptor) -> Message:
        """A request that would do something, if it may."""
        request: Any = message_factory.GetMessageClass(method.input_type)()
        fields = method.input_type.fields_by_name
        service, name = method.containing_service.name, method.name
        project = f"projects/{self.project}"
        endpoint, folder = f"{project}/endpoints/{self.endpoint}", f"{project}/folders/{self.folder}"
        match service:
            case "EndpointService":
                whole = name in ("CreateEndpoint", "ListEndpoints", "ValidateEndpoint")
                parent, resource = project if whole else endpoint, endpoint
            case "FolderService":
                parent, resource = folder if name == "ListFiles" else project, folder
            case "ModelService":
                parent, resource = project, folder
            case "TokenService":
                parent, resource = endpoint, f"{endpoint}/tokens/{self.token}"
            case "ScalingService":
                parent = project if name == "GetMeasurements" else endpoint
                resource = endpoint if name == "ExplainScaling" else f"{endpoint}/rules/{self.rule}"
            case "RegistryService":
                parent, resource = project, f"{project}/registries/example.com"
            case "ProjectService":
                parent, resource = project, project
            case "UserService":
                parent, resource = f"users/{self.user}", f"users/{self.user}"
                resource += "/keys/k" if "Key" in name else ""
            case _:
                parent, resource = "", f"{_COLLECTIONS[service]}/nope"
        if "parent" in fields:
            request.parent = parent
        if "name" in fields:
            request.name = resource
        for field in fields.values():
            if field.name.endswith("_id") and field.name != "request_id":
                setattr(request, field.name, "made")
            kind = field.message_type
            if name.startswith(("Update", "Set")) and kind is not None and "name" in kind.fields_by_name:
                getattr(request, field.name).name = resource
        if "update_mask" in fields:
            paths = {"EndpointService": "priority", "ScalingService": "threshold"}
            request.update_mask.paths.append(paths.get(service, "description"))
        match name:
            case "CreateEndpoint" | "ValidateEndpoint":
                request.endpoint.model, request.endpoint.replica_count = self.folder, 0
                if name == "ValidateEndpoint":
                    request.dry_run = True
            case "UpdateEndpoint":
                request.endpoint.priority = 20
            case "SetRegistry":
                request.registry.username, request.registry.password = "u", "p"
            case "CreateFolder":
                request.folder.usage = folder_pb2.FOLDER_USAGE_DATA
            case "UploadFile":
                request.header.folder, request.header.path = folder, "made"
            case "DownloadFile" | "DeleteFile":
                request.folder, request.path = folder, "model-definition.yaml"
            case "CreateScalingRule" | "UpdateScalingRule":
                request.rule.MergeFrom(RULE)
                request.rule.threshold = "7"
            case "CreateToken":
                request.ttl.FromSeconds(60)
        return request  # type: ignore[no-any-return]


_COLLECTIONS = {
    "ResourceGroupService": "resourceGroups",
    "PresetService": "presets",
    "ImageService": "images",
    "RuntimeService": "runtimes",
    "AgentService": "agents",
    "AdminService": "clusters",
}


async def call(
    channel: grpc.aio.Channel, path: str, request: Message | bytes, secret: str | None
) -> tuple[grpc.StatusCode, str]:
    """How a call ends (a watch: at its first answer); the wire is the same for all four kinds of methods."""
    content = request if isinstance(request, bytes) else request.SerializeToString()
    metadata = bearer(secret) if secret is not None else ()
    stream = channel.stream_stream(path)(iter([content]), metadata=metadata, timeout=10)
    try:
        async for _ in stream:
            if "/Watch" in path:
                stream.cancel()
                break
        return grpc.StatusCode.OK, ""
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""


async def everything_of(client: Client) -> Any:
    """All that a project has."""
    return (
        [endpoint async for endpoint in client.endpoints.list()],
        [folder async for folder in client.folders.list()],
        [file async for file in client.folders.ls("m")],
        [token async for token in client.tokens.list("e")],
        [rule async for rule in client.rules.list("e")],
        [registry async for registry in client.registries.list()],
        await client.projects.get(),
    )


RULE = scaling_pb2.ScalingRule(
    metric_source=scaling_pb2.METRIC_SOURCE_PROXY,
    metric_name="queue",
    comparator=scaling_pb2.COMPARATOR_GREATER_THAN,
    threshold="5",
    step_size=1,
)


class World:
    """Projects a and b, each with a folder, an endpoint, a token and a rule; and everybody who may call."""

    def __init__(self, running: Inside, admin: Client) -> None:
        self.running, self.admin = running, admin
        self.secrets: dict[str, str] = {"admin": running.key}
        self.token_b = ""

    async def build(self, folder: Path) -> None:
        admin, member, viewer = self.admin, project_pb2.ROLE_MEMBER, project_pb2.ROLE_VIEWER
        for name in "ab":
            await admin.projects.create(name)
        everybody: dict[str, dict[str, Any]] = {
            "outsider": {"a": member},
            "member": {"b": member},
            "viewer": {"b": viewer},
            "carol": {"b": viewer},
            "nobody": {},
        }
        for name, memberships in everybody.items():
            await admin.users.create(name, memberships=memberships)
            self.secrets[name] = (await admin.keys.create(user=name)).secret
        limited = await admin.keys.create(user="member", role=viewer)
        elsewhere = await admin.keys.create(project="a")
        self.secrets |= {"limited": limited.secret, "elsewhere": elsewhere.secret}
        for name, who in (("a", "outsider"), ("b", "member")):
            async with self.running.client(self.secrets[who], name) as client:
                await model_folder(client, folder / name)
                await client.endpoints.create("e", model="m", replicas=0)
                token = await client.tokens.create("e", timedelta(hours=1), "label")
                self.token_b = token.uid
                await client.rules.put("e", RULE, "r")
                await client.registries.set("example.com", "user", "password")

    async def call(self, path: str, request: Message, who: str | None) -> tuple[grpc.StatusCode, str]:
        async with open_channel(self.running.address) as channel:
            return await call(channel, path, request, self.secrets[who] if who is not None else None)


def with_world(tmp_path: Path, body: Any) -> None:
    async def run(running: Inside, admin: Client) -> None:
        world = World(running, admin)
        await world.build(tmp_path / "folders")
        await body(world)

    with_inside(tmp_path / "manager", run, timeout_s=90)


def of(*needs: Need) -> Iterable[tuple[str, MethodDescriptor, access.Rule]]:
    for path, method in PUBLIC.items():
        if access.RULES[path].need in needs:
            yield path, method, access.RULES[path]


def test_the_whole_matrix(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        async with world.running.client(world.secrets["member"], "b") as client:
            before = await everything_of(client)
        b = Names("b", token=world.token_b)
        # Nobody, and who has no role in the project: refused, and told the same as of what does not exist.
        for path, method in PUBLIC.items():
            assert (await world.call(path, b.request(method), None))[0] is NO_KEY, path
        for path, method, _ in of(Need.READ, Need.WRITE):
            for who in ("outsider", "nobody", "elsewhere"):
                code, text = await world.call(path, b.request(method), who)
                assert code is DENIED, (path, who, code, text)
                none, none_text = await world.call(path, Names("zz").request(method), who)
                assert (none, none_text.replace("`zz`", "`b`")) == (code, text), (path, who)
        for path, method, _ in of(Need.ADMIN):
            for who in ("outsider", "nobody", "elsewhere", "member", "viewer", "limited"):
                assert (await world.call(path, b.request(method), who))[0] is DENIED, (path, who)
        for path, method, _ in of(Need.SELF):
            for who in ("outsider", "nobody", "elsewhere", "member", "viewer", "limited"):
                assert (await world.call(path, b.request(method), who))[0] is DENIED, (path, who)
                unknown = Names("b", user="nope").request(method)
                assert (await world.call(path, unknown, who))[0] is DENIED, (path, who)
        # Who may read only.
        for path, method, _ in of(Need.WRITE):
            for who in ("viewer", "limited"):
                assert (await world.call(path, b.request(method), who))[0] is DENIED, (path, who)
        async with world.running.client(world.secrets["member"], "b") as client:
            assert await everything_of(client) == before
        for path, method, _ in of(Need.READ):
            for who in ("viewer", "limited", "member"):
                code, text = await world.call(path, b.request(method), who)
                assert code is grpc.StatusCode.OK, (path, who, code, text)
        for path, method, _ in of(Need.ANY):
            for who in world.secrets:
                code, text = await world.call(path, b.request(method), who)
                assert code not in (DENIED, NO_KEY, *BROKEN), (path, who, code, text)
        # Who may: on what does not exist, so that the next one finds the world as it was.
        gone = Names("b", endpoint="nope", folder="nope", token="nope", user="nope")
        for path, method, _ in of(Need.WRITE):
            for who in ("member", "admin"):
                code, text = await world.call(path, gone.request(method), who)
                assert code not in (DENIED, NO_KEY, *BROKEN), (path, who, code, text)
        for path, method, _ in of(Need.SELF, Need.ADMIN):
            code, text = await world.call(path, gone.request(method), "admin")
            assert code not in (DENIED, NO_KEY, *BROKEN), (path, code, text)
        for path, method, _ in of(Need.SELF):
            code, text = await world.call(path, b.request(method), "carol")
            assert code not in (DENIED, NO_KEY, *BROKEN), (path, code, text)

    with_world(tmp_path, body)


def test_every_rule_is_served() -> None:
    assert set(PUBLIC) == set(access.RULES)


def test_another_projects_resources_cannot_be_named_from_ones_own(tmp_path: Path) -> None:
    E = endpoint_pb2
    wanted = [
        E.Endpoint(model="projects/b/folders/m"),
        E.Endpoint(model="projects/zz/folders/m"),
        E.Endpoint(model="m", extra_mounts=[E.ExtraMount(folder="projects/b/folders/m")]),
        E.Endpoint(model="m", extra_mounts=[E.ExtraMount(folder="projects/zz/folders/m")]),
    ]

    async def body(world: World) -> None:
        service = "/dure.v1.EndpointService"
        for endpoint in wanted:
            create = E.CreateEndpointRequest(parent="projects/a", endpoint_id="x", endpoint=endpoint)
            validate = E.ValidateEndpointRequest(parent="projects/a", endpoint=endpoint, dry_run=True)
            update = E.UpdateEndpointRequest(endpoint=endpoint)
            update.endpoint.name = "projects/a/endpoints/e"
            update.update_mask.paths.append("extra_mounts")
            for method, request in (("Create", create), ("Validate", validate), ("Update", update)):
                code, _ = await world.call(f"{service}/{method}Endpoint", request, "outsider")
                assert code is DENIED, (method, endpoint)
        # A token of b, under an endpoint of a.
        token = Names("a", token=world.token_b)
        for name in ("GetToken", "RevokeToken"):
            path = f"/dure.v1.TokenService/{name}"
            for who in ("outsider", "admin"):
                code, _ = await world.call(path, token.request(PUBLIC[path]), who)
                assert code is grpc.StatusCode.NOT_FOUND

    with_world(tmp_path, body)


def test_credentials_of_one_kind_open_nothing_of_another(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        secrets = {"admin": running.key}
        async with open_channel(running.address) as channel:
            for kind, role in (("agent", admin_pb2.JOIN_ROLE_AGENT), ("proxy", admin_pb2.JOIN_ROLE_PROXY)):
                join = (await admin.admin.create_join_token(role)).token
                service = "fleet.v1.FleetService" if kind == "agent" else "routing.v1.RoutingService"
                stub = channel.unary_unary(
                    f"/dure.{service}/Join", response_deserializer=fleet_pb2.JoinResponse.FromString
                )
                request = fleet_pb2.JoinRequest(agent=f"{kind}-1").SerializeToString()
                answer = await stub(request, metadata=bearer(join), timeout=10)
                secrets |= {kind: answer.credential, f"{kind}-join": join}
            for path, method in METHODS.items():
                fits = {"/dure.v1.": "admin", "/dure.fleet.": "agent", "/dure.routing.": "proxy"}
                own = next(kind for prefix, kind in fits.items() if path.startswith(prefix))
                if path in access.JOINS:
                    own += "-join"
                for kind, secret in secrets.items():
                    if kind != own:
                        code, _ = await call(channel, path, b"", secret)
                        assert code is NO_KEY, (path, kind, method.full_name)
        # Both that joined are in the trail, by their own names.
        records = [record async for record in admin.projects.audit(None)]
        joined = [(record.actor, record.outcome) for record in records if record.method == "Join"]
        assert sorted(joined)[:2] == [("agent/agent-1", "OK"), ("proxy/proxy-1", "OK")]

    with_inside(tmp_path, body)
