"""The life of kernels on one agent: one table, and the convergence of what is wanted with what is seen.

    (unknown) ──wanted──> PREPARING ──started──> RUNNING
        │                     │  └──ended──┐        │ └──ended──┐
     unwanted              unwanted        v     unwanted       v
        │                     │         EXITED      │        EXITED ──unwanted──┐
        v                     v                     v                           v
      GONE <──removed──── STOPPING <────────────────┴───────────────────────────┘

Generations order the manager's wishes for one kernel; an older one than the newest seen is refused.
A removal is final: the uid of a kernel is never used again, so wanting a removed one only tells again
that it is gone. What was removed is remembered, up to a bound, so that a late wish cannot revive it.

Nothing here waits or does anything. Each call returns the steps that the supervisor must take.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

TOMBSTONES_MAX = 4096
HISTORY_MAX = 16


class Phase(enum.Enum):
    """Where a kernel is. The values are those of `KernelPhase` on the wire."""

    UNKNOWN = 0
    PREPARING = 1
    RUNNING = 2
    STOPPING = 3
    EXITED = 4
    GONE = 5


class Event(enum.Enum):
    """What can happen to a kernel: the first two from the manager, the others from this node."""

    WANTED = "wanted"
    UNWANTED = "unwanted"
    STARTED = "started"
    ENDED = "ended"
    REMOVED = "removed"


class Action(enum.Enum):
    """What the supervisor must do: `REMOVE` stops it and leaves nothing behind."""

    START = "start"
    REMOVE = "remove"
    REPORT = "report"


TABLE: Mapping[tuple[Phase, Event], tuple[Phase, tuple[Action, ...]]] = {
    (Phase.UNKNOWN, Event.WANTED): (Phase.PREPARING, (Action.START, Action.REPORT)),
    (Phase.UNKNOWN, Event.UNWANTED): (Phase.GONE, (Action.REPORT,)),
    (Phase.PREPARING, Event.WANTED): (Phase.PREPARING, ()),
    (Phase.PREPARING, Event.UNWANTED): (Phase.STOPPING, (Action.REMOVE, Action.REPORT)),
    (Phase.PREPARING, Event.STARTED): (Phase.RUNNING, (Action.REPORT,)),
    (Phase.PREPARING, Event.ENDED): (Phase.EXITED, (Action.REPORT,)),
    (Phase.RUNNING, Event.WANTED): (Phase.RUNNING, ()),
    (Phase.RUNNING, Event.UNWANTED): (Phase.STOPPING, (Action.REMOVE, Action.REPORT)),
    (Phase.RUNNING, Event.ENDED): (Phase.EXITED, (Action.REPORT,)),
    (Phase.EXITED, Event.WANTED): (Phase.EXITED, ()),
    (Phase.EXITED, Event.UNWANTED): (Phase.STOPPING, (Action.REMOVE, Action.REPORT)),
    (Phase.STOPPING, Event.WANTED): (Phase.STOPPING, ()),
    (Phase.STOPPING, Event.UNWANTED): (Phase.STOPPING, ()),
    # The news of a start or an end can be under way when the kernel is told to go.
    (Phase.STOPPING, Event.STARTED): (Phase.STOPPING, ()),
    (Phase.STOPPING, Event.ENDED): (Phase.STOPPING, ()),
    (Phase.STOPPING, Event.REMOVED): (Phase.GONE, (Action.REPORT,)),
    (Phase.GONE, Event.WANTED): (Phase.GONE, (Action.REPORT,)),
    (Phase.GONE, Event.UNWANTED): (Phase.GONE, (Action.REPORT,)),
}


class IllegalTransition(Exception):
    """A bug in the agent: an event that cannot happen in this phase. The message holds the history."""


@dataclass(frozen=True)
class Step:
    """One thing to do for one kernel."""

    uid: str
    action: Action


@dataclass
class Entry:
    """What is known of one kernel."""

    generation: int
    phase: Phase
    history: deque[str] = field(default_factory=lambda: deque(maxlen=HISTORY_MAX))


class Kernels:
    """All kernels of the agent. Single-threaded; every method returns the steps that follow."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.gone: OrderedDict[str, int] = OrderedDict()

    def phase(self, uid: str) -> Phase:
        if uid in self.entries:
            return self.entries[uid].phase
        return Phase.GONE if uid in self.gone else Phase.UNKNOWN

    def generation(self, uid: str) -> int:
        """The newest generation seen for the kernel, 0 if none."""
        return self.entries[uid].generation if uid in self.entries else self.gone.get(uid, 0)

    def adopt(self, uid: str, generation: int, phase: Phase) -> None:
        """Takes up a kernel that was found on the node when the agent started."""
        self.entries[uid] = Entry(generation, phase)
        self.entries[uid].history.append(f"adopted as {phase.name}")

    def want(self, uid: str, generation: int) -> list[Step]:
        return self._wish(uid, generation, Event.WANTED)

    def unwant(self, uid: str, generation: int) -> list[Step]:
        return self._wish(uid, generation, Event.UNWANTED)

    def snapshot(self, wanted: Mapping[str, int], removals: Mapping[str, int]) -> list[Step]:
        """All that the manager wants (uid to generation): whatever stands nowhere in it is not wanted."""
        steps: list[Step] = []
        for uid, generation in removals.items():
            steps += self.unwant(uid, generation)
        for uid, generation in wanted.items():
            steps += self.want(uid, generation)
        left_out = [uid for uid in self.entries if uid not in wanted and uid not in removals]
        for uid in left_out:
            steps += self.unwant(uid, self.entries[uid].generation)
        return _without_repeats(steps)

    def saw(self, uid: str, event: Event) -> list[Step]:
        """Takes in what happened on the node."""
        return self._move(uid, event)

    def _wish(self, uid: str, generation: int, event: Event) -> list[Step]:
        newest = self.generation(uid)
        if generation < newest:
            # The manager learns what the agent follows instead.
            return [Step(uid, Action.REPORT)]
        if uid in self.entries:
            self.entries[uid].generation = generation
        elif uid in self.gone:
            self.gone[uid] = generation
        steps = self._move(uid, event, generation)
        if generation > newest and not any(step.action is Action.REPORT for step in steps):
            steps.append(Step(uid, Action.REPORT))
        return steps

    def _move(self, uid: str, event: Event, generation: int = 0) -> list[Step]:
        phase = self.phase(uid)
        entry = self.entries.get(uid)
        found = TABLE.get((phase, event))
        if found is None:
            history = "; ".join(entry.history) if entry else "none"
            raise IllegalTransition(f"kernel {uid}: {event.value} while {phase.name} (history: {history})")
        after, actions = found
        if after is Phase.GONE:
            self._bury(uid, entry.generation if entry else max(generation, self.gone.get(uid, 0)))
        elif entry is None:
            self.entries[uid] = entry = Entry(generation, after)
            entry.history.append(f"{event.value} -> {after.name}")
        elif after is not phase:
            entry.phase = after
            entry.history.append(f"{event.value} -> {after.name}")
        return [Step(uid, action) for action in actions]

    def _bury(self, uid: str, generation: int) -> None:
        self.entries.pop(uid, None)
        self.gone[uid] = generation
        self.gone.move_to_end(uid)
        while len(self.gone) > TOMBSTONES_MAX:
            self.gone.popitem(last=False)


def _without_repeats(steps: Iterable[Step]) -> list[Step]:
    return list(dict.fromkeys(steps))
