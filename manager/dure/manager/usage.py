"""What of a project's quota its endpoints use, and whether one more change fits. Pure.

Wanted replicas count, not those that run: a quota says what may be asked for, whatever a rollout adds for
a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dure.wire.quantities import human_slot


@dataclass(frozen=True)
class Wanted:
    """What one endpoint wants: `slots` are milli-units of each kernel."""

    replica_count: int
    cluster_size: int
    slots: Mapping[str, int]

    def total(self) -> dict[str, int]:
        kernels = self.replica_count * self.cluster_size
        return {slot: kernels * amount for slot, amount in self.slots.items()}


def total(wanted: Iterable[Wanted]) -> dict[str, int]:
    """Milli-units of each slot, of all together."""
    used: dict[str, int] = {}
    for each in wanted:
        for slot, amount in each.total().items():
            used[slot] = used.get(slot, 0) + amount
    return used


def exceeded(
    quota: Mapping[str, int], others: Iterable[Wanted], before: Wanted | None, after: Wanted
) -> list[str]:
    """A sentence for each slot that would go over its quota by this change.

    What an endpoint holds already it keeps, and it may shrink, even if its project is over its quota.
    """
    used = total(others)
    held = before.total() if before is not None else {}
    sentences = []
    for slot, amount in sorted(after.total().items()):
        limit = quota.get(slot)
        if limit is None or amount <= held.get(slot, 0) or used.get(slot, 0) + amount <= limit:
            continue
        kernels = f" x {after.cluster_size} kernels" if after.cluster_size > 1 else ""
        sentences.append(
            f"{slot}: the quota is {human_slot(slot, limit)}, other endpoints use "
            f"{human_slot(slot, used.get(slot, 0))}, and this one wants {human_slot(slot, amount)} "
            f"({after.replica_count} replicas{kernels} x {human_slot(slot, after.slots[slot])})"
        )
    return sentences
