"""The environment of a session: what images made for Backend.AI expect, and ours with the prefix `DURE_`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dure.agent import clusters
from dure.fleet.v1 import fleet_pb2

# All that a session gets of the agent's own environment; join tokens and keys may stand in the rest.
INHERITED = ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PATH")


def build(
    spec: fleet_pb2.KernelSpec,
    *,
    agent: str,
    port: int,
    model_place: str,
    devices: Mapping[str, fleet_pb2.Device],
    inherited: Mapping[str, str],
) -> dict[str, str]:
    """The user's variables win over ours, but for PORT, `DURE_*` and what keeps a session to its GPUs."""
    granted = [devices[grant.device] for grant in spec.devices]
    given = _given(spec, model_place, granted)
    enforced = _enforced(spec, agent, port, granted, list(devices.values()))
    base = {name: inherited[name] for name in INHERITED if name in inherited}
    return {**base, **given, **spec.environ, **enforced}


def _given(
    spec: fleet_pb2.KernelSpec, model_place: str, granted: Sequence[fleet_pb2.Device]
) -> dict[str, str]:
    return {
        "BACKENDAI_SESSION_ID": spec.session_uid,
        "BACKENDAI_SESSION_NAME": spec.session_name or f"{spec.endpoint}-{spec.replica_uid[-12:]}",
        "BACKENDAI_KERNEL_ID": spec.uid,
        "BACKENDAI_KERNEL_IMAGE": spec.image,
        **clusters.variables(spec),
        "BACKENDAI_SERVICE_PORTS": f"{spec.model_name or 'model'}:inference:{spec.port}",
        "BACKENDAI_USER_UUID": "",
        "BACKENDAI_USER_EMAIL": "",
        "BACKENDAI_USER_NAME": "",
        "BACKENDAI_ACCESS_KEY": "",
        "BACKEND_MODEL_NAME": spec.model_name,
        "BACKEND_MODEL_PATH": model_place,
        "GPU_TYPE": granted[0].accelerator if granted else "",
        "GPU_MODEL_NAME": granted[0].model if granted else "",
        "GPU_COUNT": str(len(granted)),
        "N_GPUS": str(len(granted)),
    }


def _enforced(
    spec: fleet_pb2.KernelSpec,
    agent: str,
    port: int,
    granted: Sequence[fleet_pb2.Device],
    devices: Sequence[fleet_pb2.Device],
) -> dict[str, str]:
    enforced = {
        "PORT": str(port),
        "DURE_KERNEL_UID": spec.uid,
        "DURE_SESSION_UID": spec.session_uid,
        "DURE_REPLICA_UID": spec.replica_uid,
        "DURE_ENDPOINT": spec.endpoint,
        "DURE_PROJECT": spec.project,
        "DURE_AGENT": agent,
        "DURE_DEVICES": ",".join(device.id for device in granted),
        "DURE_DEVICE_AMOUNTS": ",".join(f"{grant.amount / 1000:g}" for grant in spec.devices),
    }
    if any(device.accelerator == "cuda" for device in devices):
        # Empty hides all GPUs from a session that was granted none.
        enforced["CUDA_VISIBLE_DEVICES"] = ",".join(d.id for d in granted if d.accelerator == "cuda")
    return enforced
