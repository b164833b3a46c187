"""How far the fetching of kernels' images is, as their agents said last. Kept in memory, never stored: it
moves twice a second for each kernel, decides nothing, and is said anew by an agent that comes back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from dure.fleet.v1 import fleet_pb2
from dure.v1 import endpoint_pb2

KERNELS_MAX = 20_000
LAYERS_MAX = 256
_ENDED = (endpoint_pb2.REPLICA_STATUS_TERMINATED, endpoint_pb2.REPLICA_STATUS_FAILED)


class Pulls:
    """The newest of each kernel that fetches its image, by the kernel's uid."""

    def __init__(self) -> None:
        self._kernels: OrderedDict[str, endpoint_pb2.ImagePull] = OrderedDict()

    def take(self, status: fleet_pb2.KernelStatus) -> bool:
        """Keeps what a report says of it; whether that is something new."""
        if not status.HasField("pull"):
            return self._kernels.pop(status.uid, None) is not None
        # The public message has the same fields.
        pull = endpoint_pb2.ImagePull.FromString(status.pull.SerializeToString())
        del pull.layers[LAYERS_MAX:]
        if self._kernels.get(status.uid) == pull:
            return False
        self._kernels[status.uid] = pull
        self._kernels.move_to_end(status.uid)
        # Those of agents that never came back are the oldest.
        if len(self._kernels) > KERNELS_MAX:
            self._kernels.popitem(last=False)
        return True

    def show(self, replicas: Iterable[endpoint_pb2.Replica]) -> None:
        """Puts it into the kernels of replicas that live."""
        for replica in replicas:
            for kernel in replica.kernels if replica.status not in _ENDED else ():
                if pull := self._kernels.get(kernel.uid):
                    kernel.pull.CopyFrom(pull)
