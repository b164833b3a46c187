"""The table and the convergence of kernels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.agent import kernel
from dure.agent.kernel import TABLE, Action, Event, IllegalTransition, Kernels, Phase, Step

UIDS = ("a", "b", "c")


class Node:
    """Does what `Kernels` says, at once, and checks that it makes sense."""

    def __init__(self) -> None:
        self.kernels = Kernels()
        self.running: set[str] = set()
        self.started: list[str] = []

    def do(self, steps: list[Step]) -> None:
        self._do(steps)
        self.check()

    def _do(self, steps: list[Step]) -> None:
        for step in steps:
            if step.action is Action.START:
                assert step.uid not in self.running
                self.running.add(step.uid)
                self.started.append(step.uid)
                self._do(self.kernels.saw(step.uid, Event.STARTED))
            elif step.action is Action.REMOVE:
                self.running.discard(step.uid)
                self._do(self.kernels.saw(step.uid, Event.REMOVED))

    def check(self) -> None:
        assert self.running == {
            uid for uid, entry in self.kernels.entries.items() if entry.phase is Phase.RUNNING
        }
        assert not set(self.kernels.entries) & set(self.kernels.gone)

    def crash(self, uid: str) -> None:
        if self.kernels.phase(uid) is Phase.RUNNING:
            self.running.discard(uid)
            self.do(self.kernels.saw(uid, Event.ENDED))


@st.composite
def wishes(draw: st.DrawFn) -> list[tuple[str, str, int]]:
    """What a manager may say over time: for each uid wants of growing generations, then perhaps a removal."""
    streams = []
    for uid in UIDS:
        count = draw(st.integers(0, 3))
        stream = [("want", uid, generation) for generation in range(1, count + 1)]
        if draw(st.booleans()):
            stream.append(("unwant", uid, count + 1))
        streams.append(stream)
    merged = []
    while any(streams):
        stream = draw(st.sampled_from([stream for stream in streams if stream]))
        merged.append(stream.pop(0))
    return merged


def apply(node: Node, wish: tuple[str, str, int]) -> None:
    verb, uid, generation = wish
    node.do(getattr(node.kernels, verb)(uid, generation))


def view(node: Node) -> dict[str, tuple[Phase, int]]:
    return {uid: (node.kernels.phase(uid), node.kernels.generation(uid)) for uid in UIDS}


@given(wishes(), st.data())
def test_replays_and_duplicates_change_nothing(said: list[tuple[str, str, int]], data: st.DataObject) -> None:
    once, again = Node(), Node()
    for wish in said:
        apply(once, wish)
    for index, wish in enumerate(said):
        apply(again, wish)
        # A reconnect can repeat anything that was said before.
        for repeated in data.draw(st.lists(st.sampled_from(said[: index + 1]), max_size=4)):
            apply(again, repeated)
    for wish in said:
        apply(again, wish)
    assert view(again) == view(once)
    assert len(again.started) == len(set(again.started))


@given(wishes(), st.lists(st.sampled_from(UIDS)))
def test_what_is_wanted_runs_or_exited_and_what_was_removed_is_gone(
    said: list[tuple[str, str, int]], crashes: list[str]
) -> None:
    node = Node()
    for index, wish in enumerate(said):
        apply(node, wish)
        if index < len(crashes):
            node.crash(crashes[index])
    for uid in UIDS:
        last = [verb for verb, about, _ in said if about == uid][-1:]
        if last == ["want"]:
            assert node.kernels.phase(uid) in (Phase.RUNNING, Phase.EXITED)
        elif last == ["unwant"]:
            assert node.kernels.phase(uid) is Phase.GONE
        else:
            assert node.kernels.phase(uid) is Phase.UNKNOWN


def test_a_snapshot_removes_what_it_leaves_out() -> None:
    node = Node()
    for uid in UIDS:
        apply(node, ("want", uid, 3))
    node.do(node.kernels.snapshot({"a": 3}, {"b": 4}))
    assert view(node) == {"a": (Phase.RUNNING, 3), "b": (Phase.GONE, 4), "c": (Phase.GONE, 3)}


def test_a_stale_wish_is_refused_and_answered() -> None:
    node = Node()
    apply(node, ("want", "a", 5))
    assert node.kernels.unwant("a", 4) == [Step("a", Action.REPORT)]
    assert node.kernels.phase("a") is Phase.RUNNING
    apply(node, ("unwant", "a", 6))
    assert node.kernels.want("a", 5) == [Step("a", Action.REPORT)]
    assert node.kernels.phase("a") is Phase.GONE


def test_a_newer_generation_is_reported() -> None:
    node = Node()
    apply(node, ("want", "a", 1))
    assert node.kernels.want("a", 1) == []
    assert node.kernels.want("a", 2) == [Step("a", Action.REPORT)]


def test_an_adopted_kernel_goes_on() -> None:
    node = Node()
    node.kernels.adopt("a", 7, Phase.PREPARING)
    node.running.add("a")
    node.do(node.kernels.saw("a", Event.STARTED))
    node.do(node.kernels.snapshot({"a": 7}, {}))
    assert view(node)["a"] == (Phase.RUNNING, 7) and node.started == []


def test_tombstones_are_bounded() -> None:
    kernels = Kernels()
    for number in range(kernel.TOMBSTONES_MAX + 10):
        kernels.unwant(f"k{number}", 1)
    assert len(kernels.gone) == kernel.TOMBSTONES_MAX
    assert kernels.phase("k0") is Phase.UNKNOWN


def test_what_cannot_happen_raises_with_the_history() -> None:
    kernels = Kernels()
    kernels.want("a", 1)
    kernels.saw("a", Event.STARTED)
    with pytest.raises(IllegalTransition, match="wanted -> PREPARING; started -> RUNNING"):
        kernels.saw("a", Event.REMOVED)


def test_every_phase_takes_every_wish() -> None:
    for phase in Phase:
        assert (phase, Event.WANTED) in TABLE and (phase, Event.UNWANTED) in TABLE
