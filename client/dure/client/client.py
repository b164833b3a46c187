"""The client: one connection to a manager, and the groups of calls on it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from dure.client.admin import AdminGroup
from dure.client.agents import AgentGroup
from dure.client.call import Caller
from dure.client.catalog import Images, Presets, ResourceGroups
from dure.client.context import DEFAULT_PROJECT, Context, load_context
from dure.client.endpoints import EndpointGroup
from dure.client.folders import FolderGroup
from dure.client.models import ModelGroup
from dure.client.projects import ProjectGroup
from dure.client.registries import RegistryGroup
from dure.client.rules import RuleGroup
from dure.client.runtimes import RuntimeGroup
from dure.client.tokens import TokenGroup
from dure.client.users import KeyGroup, UserGroup
from dure.v1.scaling_pb2 import GetMeasurementsResponse


class Client:
    """Calls a manager as one API key, in one project. Use it as an async context manager.

    Wherever a call takes a name, the last part of it will do (`chat`), or all of it
    (`projects/default/endpoints/chat`).
    """

    def __init__(
        self,
        address: str,
        api_key: str,
        project: str = DEFAULT_PROJECT,
        *,
        timeout_s: float = 30.0,
        retry_s: float = 5.0,
    ) -> None:
        self._caller = Caller(address, api_key, timeout_s=timeout_s, retry_s=retry_s)
        self.address = address
        self.project = project
        self.endpoints = EndpointGroup(self._caller, project)
        self.folders = FolderGroup(self._caller, project)
        self.tokens = TokenGroup(self._caller, project)
        self.agents = AgentGroup(self._caller)
        self.admin = AdminGroup(self._caller)
        self.projects = ProjectGroup(self._caller, project)
        self.users = UserGroup(self._caller)
        self.keys = KeyGroup(self._caller)
        self.groups = ResourceGroups(self._caller)
        self.presets = Presets(self._caller)
        self.images = Images(self._caller)
        self.runtimes = RuntimeGroup(self._caller)
        self.registries = RegistryGroup(self._caller, project)
        self.models = ModelGroup(self._caller, project)
        self.rules = RuleGroup(self._caller, project)

    @classmethod
    def from_context(
        cls,
        context: Context | Path | None = None,
        *,
        project: str | None = None,
        timeout_s: float = 30.0,
        retry_s: float = 5.0,
    ) -> Client:
        """A client for `context`, or for the one in a file (by default the user's current one)."""
        if not isinstance(context, Context):
            context = load_context(context)
        return cls(
            context.manager, context.api_key, project or context.project, timeout_s=timeout_s, retry_s=retry_s
        )

    async def measurements(self) -> GetMeasurementsResponse:
        """What is measured now of the project's endpoints, and of the nodes."""
        return await self.rules.measurements()

    async def close(self) -> None:
        await self._caller.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
