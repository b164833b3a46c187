"""Tokens, lines, answers."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode

import hypothesis.strategies as st
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given

from dure.appproxy.admission import (
    ANSWERS,
    TOKENS_MEMO_MAX,
    Grant,
    Refusal,
    TokenCheck,
    WaitingLine,
    refusal,
    unavailable,
)
from dure.appproxy.answers import prefers_html
from dure.appproxy.table import Route
from dure.wire.tokens import Claims, sign

_KEY = Ed25519PrivateKey.generate()
_HEAD = {"alg": "EdDSA", "kid": "k"}


def _route(uid: str = "e", *, public: bool = False, revoked: tuple[str, ...] = (), why: int = 0) -> Route:
    return Route(uid, "p", "n", 7100, "", public, (), why, "a sentence" if why else "", frozenset(revoked))


def _check() -> TokenCheck:
    check = TokenCheck()
    check.use_keys({"k": _KEY.public_key().public_bytes_raw()})
    return check


def _token(uid: str = "t", audience: str = "e", expires_at: int = 1000) -> str:
    return sign(Claims(uid, audience, 0, expires_at), _KEY, "k")


def _code(outcome: Grant | Refusal) -> str:
    return outcome.code if isinstance(outcome, Refusal) else outcome.name


def test_time_audience_and_revocation_are_looked_at_every_time() -> None:
    check, value = _check(), [f"Bearer {_token()}"]
    assert check.check(_route(), value, 999.9) is Grant.TOKEN
    assert _code(check.check(_route(), value, 1000)) == "token_expired"
    assert _code(check.check(_route(revoked=("t",)), value, 0)) == "token_revoked"
    assert _code(check.check(_route("other"), value, 0)) == "token_other_endpoint"
    assert check.check(_route(), value, 0) is Grant.TOKEN
    check.use_keys({})
    assert _code(check.check(_route(), value, 0)) == "token_bad_signature"


def _jwt(head: object, payload: object) -> str:
    parts = [urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (head, payload)]
    return ".".join([*parts, "AAAA"])


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a",
        "a.b",
        "a.b.c.d",
        "\u00e9.b.c",
        _jwt([], {}),
        _jwt({"alg": "none", "kid": "k"}, {"iss": "dure", "aud": "e", "jti": "t", "iat": 0, "exp": 9999}),
        _jwt(
            {"alg": "EdDSA", "kid": "k"},
            {"iss": "dure", "aud": "e", "jti": "t", "iat": 0, "exp": float("inf")},
        ),
        _jwt({"alg": "EdDSA", "kid": "k"}, {"iss": "dure", "aud": "e", "jti": "t", "iat": 0, "exp": []}),
    ],
)
def test_nonsense_is_malformed(token: str) -> None:
    assert _code(_check().check(_route(), [f"BackendAI {token}"], 0)) == "token_malformed"
    assert _check().check(_route(public=True), [f"Bearer {token}"], 0) is Grant.OPEN


def test_only_verified_tokens_are_remembered_and_not_without_bound() -> None:
    check = _check()
    for number in range(50):
        check.check(_route(), [f"Bearer {number}.b.c"], 0)
    assert len(check._memo) == 0
    check.check(_route(), [f"Bearer {_token()}"], 0)
    assert len(check._memo) == 1
    for number in range(TOKENS_MEMO_MAX):
        check._memo[str(number)] = Claims("t", "e", 0, 0)
    check.check(_route(), [f"Bearer {_token('u')}"], 0)
    assert len(check._memo) <= TOKENS_MEMO_MAX + 1


@given(st.lists(st.text(max_size=30), max_size=3), st.booleans())
def test_no_authorization_header_crashes_it(values: list[str], public: bool) -> None:
    outcome = _check().check(_route(public=public), values, 0)
    assert isinstance(outcome, Grant) if public else isinstance(outcome, Refusal)


def test_every_answer_has_a_sentence_and_the_headers_of_its_status() -> None:
    for code, (status, _, _) in ANSWERS.items():
        made = refusal(code)
        names = {name for name, _ in made.headers}
        assert made.message and made.status == status
        assert ("WWW-Authenticate" in names) == (status == 401)
        assert ("Retry-After" in names) == (status in (503, 429))
    assert [unavailable(_route(why=why)).code for why in range(6)] == [
        "starting",
        "starting",
        "unhealthy",
        "blocked",
        "stopped",
        "terminating",
    ]
    assert unavailable(_route(why=2)).message == "a sentence"


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        ("", False),
        ("*/*", False),
        ("text/html", True),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("application/json, text/html;q=0.9", False),
        ("application/json, text/html", False),
        ("text/html;q=x, application/json;q=0.1", False),
    ],
)
def test_who_gets_html(accept: str, html: bool) -> None:
    assert prefers_html(accept) is html


def test_the_line_is_first_come_first_served_and_bounded() -> None:
    line = WaitingLine(2)
    first, second = line.join(), line.join()
    assert first is not None and second is not None
    assert line.join() is None
    assert line.first() == first
    line.leave(first)
    line.leave(first)
    assert line.first() == second
    assert line.join() is not None
    assert len(line) == 2
