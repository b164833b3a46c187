"""The route table: updates, checks, and its form on disk."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dure.appproxy.table import Assembler, Table, TableError, dump, load
from dure.routing.v1 import routing_pb2 as pb


def _route(number: int, version: int = 0) -> pb.Route:
    return pb.Route(
        endpoint_uid=f"e{number}",
        project="p",
        endpoint=f"name-{number}",
        port=7000 + number,
        label=f"label-{number}",
        targets=[
            pb.Target(
                replica_uid=f"r{i}", host="h", port=1 + i, weight=1, draining=i % 2 == 1, revision=version + i
            )
            for i in range(version % 4)
        ],
        pools=[pb.Pool(revision=version + i, weight=50 * i) for i in range(version % 3)],
        revoked_tokens=[f"t{version}"],
        scrape=pb.ScrapeSettings(path="/m", interval_ms=1000 + version) if version % 2 else None,
        hold_ms=1000 * (version % 3),
    )


def _key(version: int) -> pb.PublicKey:
    return pb.PublicKey(id=f"k{version}", key=bytes([version % 256]) * 32)


State = dict[int, int]
_states = st.lists(st.dictionaries(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=6)


def _pieces(update: pb.TableUpdate, sizes: list[int]) -> list[pb.TableUpdate]:
    """Cuts an update into pieces; only the last is complete and has the revision number."""
    pieces, routes = [], list(update.routes)
    for size in sizes:
        cut, routes = routes[:size], routes[size:]
        pieces.append(pb.TableUpdate(table_id=update.table_id, snapshot=update.snapshot, routes=cut))
    last = pb.TableUpdate.FromString(update.SerializeToString())
    del last.routes[:]
    last.routes.extend(routes)
    last.complete = True
    return [*pieces, last]


def _snapshot(state: State, revision: int) -> pb.TableUpdate:
    routes = [_route(number, version) for number, version in state.items()]
    return pb.TableUpdate(
        table_id="t", revision_number=revision, snapshot=True, routes=routes, keys=[_key(0)]
    )


def _apply(assembler: Assembler, pieces: list[pb.TableUpdate]) -> Table:
    for piece in pieces[:-1]:
        before = assembler.table
        assert assembler.apply(piece) is None
        assert assembler.table is before
    table = assembler.apply(pieces[-1])
    assert table is not None and table is assembler.table
    return table


@given(_states, st.lists(st.integers(0, 3), max_size=4))
def test_snapshot_and_deltas_equal_a_direct_snapshot(states: list[State], sizes: list[int]) -> None:
    stepwise = Assembler()
    _apply(stepwise, _pieces(_snapshot(states[0], 1), sizes))
    for revision, (old, new) in enumerate(itertools.pairwise(states), start=2):
        delta = pb.TableUpdate(
            table_id="t",
            revision_number=revision,
            routes=[_route(n, v) for n, v in new.items() if old.get(n) != v],
            removed=[f"e{n}" for n in old if n not in new],
        )
        _apply(stepwise, _pieces(delta, sizes))
    direct = Assembler()
    _apply(direct, _pieces(_snapshot(states[-1], len(states)), []))
    assert stepwise.table == direct.table
    assert load(dump(stepwise.table)) == direct.table
    for number in range(6):
        wanted = stepwise.table.routes.get(f"e{number}")
        assert stepwise.table.at_port(7000 + number) == wanted
        assert stepwise.table.at_label(f"LABEL-{number}") == wanted


@given(_states, st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_a_stream_that_breaks_off_changes_nothing(states: list[State], sizes: list[int]) -> None:
    assembler = Assembler()
    _apply(assembler, _pieces(_snapshot(states[0], 1), []))
    before = assembler.table
    for piece in _pieces(_snapshot(states[-1], 2), sizes)[:-1]:
        assembler.apply(piece)
    assembler.forget_pieces()
    assert assembler.table is before
    empty = pb.TableUpdate(table_id="t", revision_number=3, complete=True)
    table = assembler.apply(empty)
    assert table is not None and table.routes == before.routes


def test_keys_are_replaced_whole_and_kept_when_left_out() -> None:
    assembler = Assembler()
    _apply(assembler, _pieces(_snapshot({}, 1), []))
    assembler.apply(pb.TableUpdate(table_id="t", revision_number=2, complete=True, keys=[_key(1), _key(2)]))
    assert set(assembler.table.keys) == {"k1", "k2"}
    assembler.apply(pb.TableUpdate(table_id="t", revision_number=3, complete=True))
    assert set(assembler.table.keys) == {"k1", "k2"}


def test_members_are_replaced_whole_kept_when_left_out_and_never_on_disk() -> None:
    assembler = Assembler()
    snapshot = _snapshot({}, 1)
    snapshot.members.extend(["a", "b"])
    _apply(assembler, _pieces(snapshot, []))
    assert assembler.table.members == ("a", "b")
    assembler.apply(pb.TableUpdate(table_id="t", revision_number=2, complete=True))
    assert assembler.table.members == ("a", "b")
    # Members come and go without a change of routes.
    assembler.apply(pb.TableUpdate(table_id="t", revision_number=2, complete=True, members=["b"]))
    assert assembler.table.members == ("b",)
    assert load(dump(assembler.table)).members == ()
    _apply(assembler, _pieces(_snapshot({}, 3), []))
    assert assembler.table.members == ()


def test_a_port_may_move_between_endpoints_in_one_update() -> None:
    assembler = Assembler()
    _apply(assembler, _pieces(_snapshot({1: 0}, 1), []))
    moved = _route(2)
    moved.port = 7001
    assembler.apply(
        pb.TableUpdate(table_id="t", revision_number=2, complete=True, routes=[moved], removed=["e1"])
    )
    at = assembler.table.at_port(7001)
    assert at is not None and at.endpoint_uid == "e2"


def _changed(**fields: object) -> pb.Route:
    route = _route(9, 1)
    for name, value in fields.items():
        setattr(route, name, value)
    return route


def _update(*routes: pb.Route) -> pb.TableUpdate:
    return pb.TableUpdate(table_id="t", revision_number=9, complete=True, routes=routes)


@pytest.mark.parametrize(
    ("update", "says"),
    [
        (pb.TableUpdate(revision_number=9, complete=True), "without a table id"),
        (pb.TableUpdate(table_id="other", revision_number=9, complete=True), "changes to table other"),
        (pb.TableUpdate(table_id="t", revision_number=1, complete=True), "at 5"),
        (
            _update(_changed(port=7001)),
            "share port",
        ),
        (
            pb.TableUpdate(
                table_id="t", revision_number=9, complete=True, routes=[_changed(label="Label-1")]
            ),
            "label",
        ),
        (
            _update(_changed(port=70000)),
            "70000",
        ),
        (
            pb.TableUpdate(
                table_id="t", revision_number=9, complete=True, routes=[_changed(endpoint_uid="")]
            ),
            "uid",
        ),
        (
            pb.TableUpdate(
                table_id="t", revision_number=9, complete=True, keys=[pb.PublicKey(id="k", key=b"short")]
            ),
            "32 bytes",
        ),
        (
            pb.TableUpdate(
                table_id="t",
                revision_number=9,
                complete=True,
                routes=[pb.Route(endpoint_uid="x", targets=[pb.Target(replica_uid="r", host="h", port=0)])],
            ),
            "no usable address",
        ),
        (
            _update(pb.Route(endpoint_uid="x", pools=[pb.Pool(revision=3, weight=101)])),
            "pool 3 has weight 101",
        ),
        (
            _update(pb.Route(endpoint_uid="x", pools=[pb.Pool(revision=3), pb.Pool(revision=3)])),
            "the same revision",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_and_the_table_kept(update: pb.TableUpdate, says: str) -> None:
    assembler = Assembler()
    before = _apply(assembler, _pieces(_snapshot({1: 1}, 5), []))
    with pytest.raises(TableError, match=says):
        assembler.apply(update)
    assert assembler.table is before
    assembler.apply(pb.TableUpdate(table_id="t", revision_number=6, complete=True))
    assert assembler.table.revision_number == 6


@given(st.data())
def test_a_damaged_file_is_refused(data: st.DataObject) -> None:
    assembler = Assembler()
    content = dump(_apply(assembler, _pieces(_snapshot({1: 1, 2: 2}, 5), [])))
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        broken = content[:position]
    else:
        broken = content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :]
    with pytest.raises(TableError):
        load(broken)
