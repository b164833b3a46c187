"""Server-sent events, and what servers say in them."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dure.client.chat import protocol, sse
from dure.client.chat.conversation import TURNS_MAX, Conversation
from dure.client.chat.protocol import Chunk
from dure.client.cli.chat_screen import split_blocks, visible

_texts = st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=5)


@given(_texts, st.sampled_from(("\n", "\r\n", "\r")), st.data(), st.booleans())
def test_events_come_out_whole_however_they_were_cut(
    texts: list[str], newline: str, data: st.DataObject, marked: bool
) -> None:
    stream = "".join(f": ping{newline}id: 7{newline}data: {text}{newline * 2}" for text in texts)
    content = (b"\xef\xbb\xbf" if marked else b"") + stream.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    reader = sse.EventReader()
    events: list[str] = []
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        events += reader.feed(content[start:end])
    assert events + reader.end() == texts


def test_lines_of_one_event_and_an_end_without_an_empty_line() -> None:
    reader = sse.EventReader()
    assert reader.feed(b"event: x\ndata: a\ndata:b\ndata\n\ndata: las") == ["a\nb\n"]
    assert reader.end() == ["las"]
    assert reader.end() == []


def test_an_event_has_a_bound() -> None:
    reader = sse.EventReader()
    with pytest.raises(sse.TooLong):
        for _ in range(200):
            reader.feed(b"data: " + b"x" * 10_000 + b"\n")
    with pytest.raises(sse.TooLong):
        sse.EventReader().feed(b"x" * (sse.EVENT_BYTES_MAX + 1))


@pytest.mark.parametrize(
    ("given_url", "bases"),
    [
        ("https://api.openai.com/v1", ["https://api.openai.com/v1"]),
        ("https://host/v1beta/openai/", ["https://host/v1beta/openai"]),
        ("host:8000", ["http://host:8000/v1", "http://host:8000"]),
        ("http://[::1]:7100/", ["http://[::1]:7100/v1", "http://[::1]:7100"]),
        (" http://h/api/v1/models ", ["http://h/api/v1"]),
    ],
)
def test_bases(given_url: str, bases: list[str]) -> None:
    assert protocol.bases(given_url) == bases


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://h/v1",
        "http://",
        "http://h:99999999/v1",
        "http://u:p@h/v1",
        "http://h/v1?key=1",
        "http://two words/v1",
        "http://[::1",
    ],
)
def test_what_is_no_base_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|host and path"):
        protocol.bases(url)


def test_chunks_in_all_forms() -> None:
    def read(**content: object) -> Chunk:
        return protocol.read_chunk(json.dumps(content))

    assert read(choices=[{"delta": {"content": "a"}}]) == Chunk("a")
    assert read(
        choices=[{"delta": {"content": [{"type": "text", "text": "a"}, {"type": "image"}]}}]
    ) == Chunk("a")
    assert read(choices=[{"delta": {"reasoning": "hm", "content": None}}]) == Chunk(thought="hm")
    assert read(choices=[{"delta": None, "finish_reason": "length"}]) == Chunk(finish="length")
    assert read(choices=[], usage={"completion_tokens": 3}) == Chunk(tokens=3)
    assert read(choices=None, usage=None) == Chunk()
    for nonsense in ("", "[]", "3", "<html>", '{"choices":', "[" * 100_000):
        with pytest.raises(protocol.Strange):
            protocol.read_chunk(nonsense)
    for error in ({"error": "x"}, {"error": {"message": "x"}}, {"object": "error", "message": "x"}):
        with pytest.raises(protocol.ServerError, match="x"):
            protocol.read_chunk(json.dumps(error))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda s: (
            st.lists(s)
            | st.dictionaries(
                st.sampled_from(
                    (
                        "error",
                        "message",
                        "detail",
                        "msg",
                        "loc",
                        "choices",
                        "delta",
                        "content",
                        "usage",
                        "data",
                        "id",
                    )
                ),
                s,
            )
        ),
    )
)
def test_no_json_makes_the_reader_fail(content: object) -> None:
    body = json.dumps(content).encode()
    assert isinstance(protocol.error_text(body), str)
    assert isinstance(protocol.code_of(body), str)
    for read in (protocol.read_whole, protocol.read_models, lambda b: protocol.read_chunk(b.decode())):
        try:
            read(body)
        except (protocol.Strange, protocol.ServerError):
            continue


def test_a_request_is_softened_by_what_the_server_named() -> None:
    body = protocol.request_body("m", [], protocol.Settings(0.1, 5))
    assert protocol.soften(body, "context length exceeded") is None
    without = protocol.soften(body, "Extra inputs are not permitted (body.stream_options)")
    assert without == {key: value for key, value in body.items() if key != "stream_options"}
    whole = protocol.soften(body, "Streaming is not supported")
    assert whole is not None and not whole["stream"] and "stream_options" not in whole
    assert protocol.soften(whole, "Streaming is not supported") is None
    renamed = protocol.soften(body, "use max_completion_tokens")
    assert renamed is not None and renamed["max_completion_tokens"] == 5 and "max_tokens" not in renamed


def test_a_conversation_is_bounded_and_keeps_its_beginning() -> None:
    talk = Conversation("be brief")
    for number in range(TURNS_MAX + 5):
        talk.answered(f"q{number}", f"a{number}")
    messages = talk.with_question("now")
    assert messages[0] == {"role": "system", "content": "be brief"}
    assert messages[1]["content"] == "q5" and messages[-1]["content"] == "now"
    assert len(messages) == 2 * TURNS_MAX + 2
    talk.clear()
    assert [m["content"] for m in talk.with_question("x")] == ["be brief", "x"]
    assert Conversation().with_question("x") == [{"role": "user", "content": "x"}]


def test_blocks_end_with_an_empty_line_outside_of_code() -> None:
    assert split_blocks("one\n\ntwo") == ("one\n\n", "two")
    assert split_blocks("one\n\n") == ("", "one\n\n")
    assert split_blocks("```py\na\n\nb\n") == ("", "```py\na\n\nb\n")
    assert split_blocks("```py\na\n\nb\n```\n\nend") == ("```py\na\n\nb\n```\n\n", "end")
    assert split_blocks("1. a\n\n2. b\n\nend") == ("1. a\n\n2. b\n\n", "end")
    assert visible("a\x1b[31mb\tc\nd\x07") == "a[31mb\tc\nd"


@given(st.text("ab \n`-", max_size=60))
def test_blocks_lose_nothing(text: str) -> None:
    done, rest = split_blocks(text)
    assert done + rest == text
