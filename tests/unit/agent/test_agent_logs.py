"""The log of a session: what is written, what is read back, what is kept."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from dure.agent import log_archive
from dure.agent.backends import outcome
from dure.agent.log_archive import Kept, LogArchive, surplus
from dure.agent.log_files import PIECE_BYTES, LogCursor
from dure.agent.shim.log import LINE_BYTES_MAX, LineLog


def clock(start: int = 1_700_000_000_000) -> Callable[[], int]:
    counter = itertools.count(start)
    return lambda: next(counter)


def everything(cursor: LogCursor) -> list[tuple[int, bytes]]:
    found = []
    while lines := cursor.read():
        found += lines
    return found + cursor.rest()


def read(folder: Path, **wanted: int) -> list[bytes]:
    cursor = LogCursor(lambda: folder)
    cursor.begin(**wanted)
    try:
        return [text for _, text in everything(cursor)]
    finally:
        cursor.close()


def test_each_line_has_the_time_at_which_it_began(tmp_path: Path) -> None:
    log = LineLog(str(tmp_path), clock_ms=clock(100))
    log.write(b"one\ntw")
    log.write(b"o\n")
    log.write(b"\nthree")
    cursor = LogCursor(lambda: tmp_path)
    cursor.begin()
    assert cursor.read() == [(100, b"one"), (100, b"two"), (102, b"")]
    assert cursor.read() == []
    log.write(b" more\n")
    assert cursor.has_more() and cursor.read() == [(102, b"three more")]
    assert not cursor.has_more() and cursor.rest() == []
    cursor.close()


def test_a_clock_that_is_set_back_does_not_turn_the_order_around(tmp_path: Path) -> None:
    times = iter([500, 400, 600])
    log = LineLog(str(tmp_path), clock_ms=lambda: next(times))
    for text in (b"a\n", b"b\n", b"c\n"):
        log.write(text)
    cursor = LogCursor(lambda: tmp_path)
    cursor.begin()
    assert [time_ms for time_ms, _ in everything(cursor)] == [500, 500, 600]
    cursor.close()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\r", b"")), max_size=40))
def test_nothing_is_lost_however_the_output_is_cut(tmp_path_factory, pieces: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = LineLog(str(folder), clock_ms=clock())
    for piece in pieces:
        log.write(piece)
    text = b"".join(pieces)
    expected = text.removesuffix(b"\n").split(b"\n") if text else []
    assert read(folder) == expected
    assert outcome.log_tail(folder, 100_000) == text.decode(errors="replace")
    for count in (1, 3, 1000):
        assert read(folder, tail_lines=count) == expected[-count:]


def test_long_lines_are_cut_and_binary_is_kept(tmp_path: Path) -> None:
    log = LineLog(str(tmp_path), clock_ms=clock())
    garbage = bytes(byte for byte in range(256) if byte not in b"\r\n") * 200
    for start in range(0, len(garbage), 7001):
        log.write(garbage[start : start + 7001])
    log.write(b"\nend")
    *cut, last = read(tmp_path)
    assert all(len(line) <= LINE_BYTES_MAX for line in cut) and last == b"end"
    assert b"".join(cut) == garbage


def test_the_log_keeps_the_newest_in_two_files(tmp_path: Path) -> None:
    log = LineLog(str(tmp_path), 1000, clock())
    for number in range(500):
        log.write(f"line {number}\n".encode())
    assert all((tmp_path / name).stat().st_size <= 1000 for name in ("log", "log.1"))
    tail = outcome.log_tail(tmp_path, 100)
    assert tail.endswith("line 498\nline 499\n") and tail.startswith("line ")
    assert len(tail) <= 100
    kept = read(tmp_path)
    assert kept[-1] == b"line 499" and len(kept) > 30
    assert kept == [f"line {number}".encode() for number in range(500 - len(kept), 500)]
    assert read(tmp_path, tail_lines=len(kept) - 2) == kept[2:]


def test_a_reader_goes_on_through_rotations(tmp_path: Path) -> None:
    log = LineLog(str(tmp_path), 1000, clock())
    cursor = LogCursor(lambda: tmp_path)
    cursor.begin()
    seen: list[bytes] = []
    for number in range(300):
        log.write(f"line {number}\n".encode())
        if number % 7 == 0:
            seen += [text for _, text in everything(cursor)]
    seen += [text for _, text in everything(cursor)]
    assert seen == [f"line {number}".encode() for number in range(300)] and cursor.notice == ""
    for number in range(300, 600):
        log.write(f"line {number}\n".encode())
    seen = [text for _, text in everything(cursor)]
    assert seen[-1] == b"line 599" and len(seen) < 300
    assert "left out" in cursor.notice
    cursor.close()


def test_a_reader_that_is_two_files_behind_loses_nothing(tmp_path: Path) -> None:
    log = LineLog(str(tmp_path), 4 * PIECE_BYTES, clock())
    cursor = LogCursor(lambda: tmp_path)
    texts = [b"%d " % number + b"x" * 1000 for number in range(600)]
    ends = [sum(len(text) + 15 for text in texts[:count]) // (4 * PIECE_BYTES) for count in range(601)]
    for text in texts[: ends.index(1) + 10]:
        log.write(text + b"\n")
    cursor.begin()
    seen = [text for _, text in cursor.read()]
    # The second file is full before the reader has come to the end of the first.
    for text in texts[ends.index(1) + 10 :]:
        log.write(text + b"\n")
    assert ends[-1] == 2
    seen += [text for _, text in everything(cursor)]
    assert seen == texts and cursor.notice == ""
    cursor.close()


def test_without_follow_it_ends_where_the_log_ended(tmp_path: Path) -> None:
    log = LineLog(str(tmp_path), 1000, clock())
    for number in range(60):
        log.write(f"line {number}\n".encode())
    cursor = LogCursor(lambda: tmp_path)
    cursor.begin(follow=False)
    log.write(b"later\n")
    assert [text for _, text in everything(cursor)][-1] == b"line 59"
    cursor.close()


def test_only_what_is_young_enough(tmp_path: Path) -> None:
    log = LineLog(str(tmp_path), clock_ms=clock(1000))
    for number in range(10):
        log.write(f"{number}\n".encode())
    assert read(tmp_path, not_before_ms=1007) == [b"7", b"8", b"9"]
    assert read(tmp_path, not_before_ms=1007, tail_lines=2) == [b"8", b"9"]


def test_a_full_disk_does_not_raise(tmp_path: Path) -> None:
    log = LineLog(str(tmp_path / "not-there"), clock_ms=clock())
    log.write(b"lost\n")
    (tmp_path / "not-there").mkdir()
    log.write(b"kept\n")
    assert read(tmp_path / "not-there") == [b"kept"]


def test_what_a_start_that_broke_off_left_is_a_line_of_its_own(tmp_path: Path) -> None:
    LineLog(str(tmp_path), clock_ms=clock()).write(b"half")
    LineLog(str(tmp_path), clock_ms=clock()).write(b"whole\n")
    assert read(tmp_path) == [b"half", b"whole"]


def test_kept_logs_are_bounded_by_age_number_and_size() -> None:
    assert surplus([Kept("old", 0, 1), Kept("new", log_archive.KEPT_S, 1)], log_archive.KEPT_S + 1) == ["old"]
    many = [Kept(f"k{n}", n, 1) for n in range(log_archive.KEPT_MAX + 3)]
    assert sorted(surplus(many, 300)) == ["k0", "k1", "k2"]
    half = log_archive.KEPT_BYTES_MAX // 2
    large = [Kept("a", 1, half), Kept("b", 2, half), Kept("c", 3, half + 1)]
    assert surplus(large, 3) == ["b", "a"]


def test_a_log_outlives_its_kernel(tmp_path: Path) -> None:
    archive = LogArchive(tmp_path)
    folder = tmp_path / "kernels" / "k1"
    folder.mkdir(parents=True)
    assert archive.locate("k1") == folder and archive.locate("k2") is None
    LineLog(str(folder), clock_ms=clock()).write(b"last words\n")
    cursor = LogCursor(lambda: archive.locate("k1"))
    cursor.begin()
    archive.keep("k1", folder)
    for name in os.listdir(folder):
        (folder / name).unlink()
    folder.rmdir()
    assert [text for _, text in everything(cursor)] == [b"last words"]
    cursor.close()
    kept = archive.locate("k1")
    assert kept is not None and read(kept) == [b"last words"]
    # One that never wrote leaves nothing.
    empty = tmp_path / "kernels" / "k3"
    empty.mkdir()
    archive.keep("k3", empty)
    assert sorted(os.listdir(tmp_path / "logs")) == ["k1"]
