"""Calls about what administrators prepare for everybody: resource groups, presets and images."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.v1 import catalog_pb2, catalog_pb2_grpc, endpoint_pb2
from dure.v1.catalog_pb2 import Image, PlacementPolicy, Preset, ResourceGroup
from dure.v1.endpoint_pb2 import SecurityProfile
from dure.wire import names


class ResourceGroups:
    """`client.groups`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = catalog_pb2_grpc.ResourceGroupServiceStub(caller.channel)

    async def create(
        self,
        name: str,
        *,
        policy: PlacementPolicy.ValueType = catalog_pb2.PLACEMENT_POLICY_SPREAD,
        allowed_projects: Sequence[str] = (),
        proxy_group: str = "",
        description: str = "",
        security_profile: SecurityProfile.ValueType = endpoint_pb2.SECURITY_PROFILE_DEFAULT,
    ) -> ResourceGroup:
        """Without `allowed_projects` all may use it."""
        wanted = ResourceGroup(
            policy=policy,
            allowed_projects=allowed_projects,
            proxy_group=proxy_group,
            description=description,
            security_profile=security_profile,
        )
        request = catalog_pb2.CreateResourceGroupRequest(resource_group_id=name, resource_group=wanted)
        response = await self._caller.unary(self._stub.CreateResourceGroup, request, idempotent=False)
        return response.resource_group

    async def get(self, name: str) -> ResourceGroup:
        request = catalog_pb2.GetResourceGroupRequest(name=_full(name, names.resource_group(name)))
        return (await self._caller.unary(self._stub.GetResourceGroup, request)).resource_group

    def list(self) -> AsyncGenerator[ResourceGroup, None]:
        """Those that the caller's projects may use, by name."""

        async def fetch(token: str) -> tuple[list[ResourceGroup], str]:
            request = catalog_pb2.ListResourceGroupsRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._caller.unary(self._stub.ListResourceGroups, request)
            return [*page.resource_groups], page.next_page_token

        return all_pages(fetch)

    async def update(
        self,
        name: str,
        *,
        policy: PlacementPolicy.ValueType | None = None,
        allowed_projects: Sequence[str] | None = None,
        proxy_group: str | None = None,
        description: str | None = None,
        security_profile: SecurityProfile.ValueType | None = None,
    ) -> ResourceGroup:
        """Changes what is given; `allowed_projects` replaces all of them."""
        request = catalog_pb2.UpdateResourceGroupRequest()
        wanted, paths = request.resource_group, request.update_mask.paths
        wanted.name = _full(name, names.resource_group(name))
        if policy is not None:
            wanted.policy = policy
            paths.append("policy")
        if allowed_projects is not None:
            wanted.allowed_projects.extend(allowed_projects)
            paths.append("allowed_projects")
        if proxy_group is not None:
            wanted.proxy_group = proxy_group
            paths.append("proxy_group")
        if description is not None:
            wanted.description = description
            paths.append("description")
        if security_profile is not None:
            wanted.security_profile = security_profile
            paths.append("security_profile")
        return (await self._caller.unary(self._stub.UpdateResourceGroup, request)).resource_group

    async def delete(self, name: str) -> None:
        """Refused while agents or endpoints belong to it."""
        request = catalog_pb2.DeleteResourceGroupRequest(name=_full(name, names.resource_group(name)))
        await self._caller.unary(self._stub.DeleteResourceGroup, request, idempotent=False)


class Presets:
    """`client.presets`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = catalog_pb2_grpc.PresetServiceStub(caller.channel)

    async def create(
        self,
        name: str,
        resource_slots: Mapping[str, str],
        *,
        shared_memory: str = "",
        resource_group: str = "",
        description: str = "",
    ) -> Preset:
        """Without a `resource_group` it is offered in all."""
        wanted = Preset(
            resource_slots=resource_slots,
            shared_memory=shared_memory,
            resource_group=resource_group,
            description=description,
        )
        request = catalog_pb2.CreatePresetRequest(preset_id=name, preset=wanted)
        return (await self._caller.unary(self._stub.CreatePreset, request, idempotent=False)).preset

    async def get(self, name: str) -> Preset:
        request = catalog_pb2.GetPresetRequest(name=_full(name, names.preset(name)))
        return (await self._caller.unary(self._stub.GetPreset, request)).preset

    def list(self) -> AsyncGenerator[Preset, None]:
        """By name."""

        async def fetch(token: str) -> tuple[list[Preset], str]:
            request = catalog_pb2.ListPresetsRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._caller.unary(self._stub.ListPresets, request)
            return [*page.presets], page.next_page_token

        return all_pages(fetch)

    async def update(
        self,
        name: str,
        *,
        resource_slots: Mapping[str, str] | None = None,
        shared_memory: str | None = None,
        resource_group: str | None = None,
        description: str | None = None,
    ) -> Preset:
        """Changes what is given; `resource_slots` replaces all of them."""
        request = catalog_pb2.UpdatePresetRequest()
        wanted, paths = request.preset, request.update_mask.paths
        wanted.name = _full(name, names.preset(name))
        if resource_slots is not None:
            wanted.resource_slots.update(resource_slots)
            paths.append("resource_slots")
        if shared_memory is not None:
            wanted.shared_memory = shared_memory
            paths.append("shared_memory")
        if resource_group is not None:
            wanted.resource_group = resource_group
            paths.append("resource_group")
        if description is not None:
            wanted.description = description
            paths.append("description")
        return (await self._caller.unary(self._stub.UpdatePreset, request)).preset

    async def delete(self, name: str) -> None:
        request = catalog_pb2.DeletePresetRequest(name=_full(name, names.preset(name)))
        await self._caller.unary(self._stub.DeletePreset, request, idempotent=False)


class Images:
    """`client.images`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = catalog_pb2_grpc.ImageServiceStub(caller.channel)

    async def create(
        self,
        name: str,
        reference: str,
        architecture: str,
        *,
        runtimes: Sequence[str] = (),
        min_slots: Mapping[str, str] | None = None,
        description: str = "",
    ) -> Image:
        """Without `runtimes` it is for all."""
        wanted = Image(
            reference=reference,
            architecture=architecture,
            runtimes=runtimes,
            min_slots=min_slots,
            description=description,
        )
        request = catalog_pb2.CreateImageRequest(image_id=name, image=wanted)
        return (await self._caller.unary(self._stub.CreateImage, request, idempotent=False)).image

    async def get(self, name: str) -> Image:
        request = catalog_pb2.GetImageRequest(name=_full(name, names.image(name)))
        return (await self._caller.unary(self._stub.GetImage, request)).image

    def list(self) -> AsyncGenerator[Image, None]:
        """By name."""

        async def fetch(token: str) -> tuple[list[Image], str]:
            request = catalog_pb2.ListImagesRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._caller.unary(self._stub.ListImages, request)
            return [*page.images], page.next_page_token

        return all_pages(fetch)

    async def update(
        self,
        name: str,
        *,
        reference: str | None = None,
        architecture: str | None = None,
        runtimes: Sequence[str] | None = None,
        min_slots: Mapping[str, str] | None = None,
        description: str | None = None,
    ) -> Image:
        """Changes what is given; `runtimes` and `min_slots` replace all of theirs."""
        request = catalog_pb2.UpdateImageRequest()
        wanted, paths = request.image, request.update_mask.paths
        wanted.name = _full(name, names.image(name))
        if reference is not None:
            wanted.reference = reference
            paths.append("reference")
        if architecture is not None:
            wanted.architecture = architecture
            paths.append("architecture")
        if runtimes is not None:
            wanted.runtimes.extend(runtimes)
            paths.append("runtimes")
        if min_slots is not None:
            wanted.min_slots.update(min_slots)
            paths.append("min_slots")
        if description is not None:
            wanted.description = description
            paths.append("description")
        return (await self._caller.unary(self._stub.UpdateImage, request)).image

    async def delete(self, name: str) -> None:
        request = catalog_pb2.DeleteImageRequest(name=_full(name, names.image(name)))
        await self._caller.unary(self._stub.DeleteImage, request, idempotent=False)


def _full(name: str, built: str) -> str:
    return name if "/" in name else built
