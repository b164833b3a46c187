"""Endpoint tokens: who signed them, and nothing else, is believed."""

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from dure.wire.tokens import Claims, TokenRefused, sign, verify

KEY = Ed25519PrivateKey.generate()
KEYS = {"k": KEY.public_key()}
CLAIMS = Claims("t", "e", 1_000, 2_000)


def test_the_same_claims_give_the_same_token() -> None:
    assert sign(CLAIMS, KEY, "k") == sign(CLAIMS, KEY, "k")
    assert verify(sign(CLAIMS, KEY, "k"), KEYS) == CLAIMS


def refused(token: str) -> str:
    with pytest.raises(TokenRefused) as caught:
        verify(token, KEYS)
    return caught.value.code


def part(content: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


def test_forgeries() -> None:
    head, payload, signature = sign(CLAIMS, KEY, "k").split(".")
    assert refused(sign(CLAIMS, Ed25519PrivateKey.generate(), "k")) == "bad_signature"
    assert refused(sign(CLAIMS, KEY, "other")) == "unknown_key"
    longer = {"iss": "dure", "aud": "e", "jti": "t", "iat": 1, "exp": 9_999_999_999}
    assert refused(f"{head}.{part(longer)}.{signature}") == "bad_signature"
    assert refused(f"{part({'alg': 'none', 'kid': 'k'})}.{payload}.") == "malformed"
    assert refused(f"{part({'alg': 'EdDSA', 'kid': ['k']})}.{payload}.{signature}") == "unknown_key"
    assert refused(f"{head}.{part({**longer, 'exp': float('inf')})}.{signature}") == "malformed"
    assert refused("x" * 5_000) == "malformed"


@given(st.text(max_size=300))
def test_any_text_is_refused_and_nothing_else_happens(text: str) -> None:
    assert refused(text) in ("malformed", "unknown_key", "bad_signature")
