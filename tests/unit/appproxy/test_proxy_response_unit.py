"""Reading responses, and cleaning heads."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dure.appproxy.headers import Edge, origin_form, request_head, response_head, trailer_lines
from dure.appproxy.response import Cut, End, Event, Head, Malformed, ResponseReader


def _read(data: bytes, cuts: list[int], method: str = "GET") -> tuple[list[Event], ResponseReader]:
    reader, events, at = ResponseReader(method), [], 0
    for cut in sorted({min(cut, len(data)) for cut in cuts} | {len(data)}):
        if cut > at:
            events += reader.feed(data[at:cut])
            at = cut
    return events, reader


def _summary(events: list[Event]) -> tuple[list[int], bytes, list[End]]:
    heads = [event.status for event in events if isinstance(event, Head)]
    return (
        heads,
        b"".join(e for e in events if isinstance(e, bytes)),
        [e for e in events if isinstance(e, End)],
    )


_CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
    b"5;a=b\r\nhello\r\n00A \r\n0123456789\r\n0\r\nX: y\r\nZ:\r\n\r\nmore"
)
_LENGTH = b"HTTP/1.1 200\r\ncontent-length: 5\r\nContent-Length: 5\r\n\r\nhello"


@given(st.lists(st.integers(0, 300)))
def test_it_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    events, reader = _read(_CHUNKED, cuts)
    assert _summary(events) == ([100, 200], b"hello0123456789", [End([(b"X", b"y"), (b"Z", b"")])])
    assert reader.done
    events, reader = _read(_LENGTH, cuts)
    assert _summary(events) == ([200], b"hello", [End([])])
    assert reader.done and not reader.excess


def test_bytes_behind_the_end_are_kept_apart() -> None:
    _, reader = _read(_CHUNKED, [])
    assert reader.excess == b"more"
    _, reader = _read(b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\n\r\n\x81\x05hello", [])
    assert reader.done and reader.excess == b"\x81\x05hello"


@pytest.mark.parametrize(
    ("data", "method", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "HEAD", True),
        (b"HTTP/1.1 204 No\r\n\r\n", "GET", True),
        (b"HTTP/1.1 304 Not\r\nContent-Length: 9\r\nConnection: close\r\n\r\n", "GET", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", "GET", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive\r\n\r\n", "GET", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: x, CLOSE\r\n\r\n", "GET", False),
    ],
)
def test_no_body(data: bytes, method: str, keep_alive: bool) -> None:
    events, reader = _read(data, [], method)
    assert isinstance(events[0], Head) and events[0].keep_alive is keep_alive
    assert reader.done


def test_until_close() -> None:
    events, reader = _read(b"HTTP/1.1 200 OK\r\n\r\nabc", [25])
    assert not reader.done
    assert _summary(events + reader.feed_eof()) == ([200], b"abc", [End([])])


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 2", _LENGTH[:-1], _CHUNKED[:-9], _CHUNKED[:-5]])
def test_cut_off(data: bytes) -> None:
    _, reader = _read(data, [])
    with pytest.raises(Cut):
        reader.feed_eof()
    assert reader.started is bool(data)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\nA: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\nC: d\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\rC: d\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: \x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-3\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 5000,
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000,
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        _read(data, [])


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_no_bytes_crash_it(data: bytes, cuts: list[int]) -> None:
    for start in (b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"):
        try:
            _, reader = _read(start + data, cuts)
            reader.feed_eof()
        except (Malformed, Cut):
            continue


_EDGE = Edge("10.0.0.1", "http", "rid", "00-1-2-00")


@given(
    st.lists(
        st.tuples(
            st.sampled_from((b"Connection", b"A", b"b", b"Host", b"TE", b"X-Request-Id", b"Content-Length")),
            st.sampled_from((b"a", b"A, b", b"close", b"host", b"1")),
        )
    )
)
def test_a_cleaned_head_is_framed_once_and_names_no_hop(headers: list[tuple[bytes, bytes]]) -> None:
    head = request_head(
        "POST",
        b"/",
        headers,
        _EDGE,
        drop_authorization=True,
        body_length=7,
        chunked=False,
        upgrade=False,
        default_host="x",
    )
    names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:-2]]
    assert names.count(b"content-length") == 1 and b"Content-Length: 7\r\n" in head
    assert names.count(b"x-request-id") == 1 and b"X-Request-Id: rid\r\n" in head
    assert names.count(b"host") == max(1, sum(name == b"Host" for name, _ in headers))
    assert not {b"connection", b"te", b"transfer-encoding"} & set(names)
    hop = {t.strip().lower() for n, v in headers if n == b"Connection" for t in v.split(b",")}
    assert not (hop - {b"host"}) & set(names)


def test_response_heads_and_trailers() -> None:
    head = Head(200, b"OK", [(b"Content-Length", b"3"), (b"content-length", b"3"), (b"TE", b"x")], 3, True)
    made = response_head(head, request_id="r", chunked=False, connection=b"")
    assert made == b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nX-Request-Id: r\r\n\r\n"
    assert trailer_lines([]) == b"0\r\n\r\n"
    assert trailer_lines([(b"A", b"b"), (b"Transfer-Encoding", b"x")]) == b"0\r\nA: b\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "target"),
    [
        ("/a%2F?b#c", b"/a%2F?b#c"),
        ("//evil/x", b"//evil/x"),
        ("*", b"*"),
        ("http://u:p@host:1/p?q", b"/p?q"),
        ("HTTP://host", b"/"),
        ("https://host?q", b"/?q"),
        ("/\udcff", b"/\xff"),
        ("host:80", None),
        ("ftp://host/", None),
        ("", None),
    ],
)
def test_request_targets(raw: str, target: bytes | None) -> None:
    assert origin_form(raw) == target
