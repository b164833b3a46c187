"""Secrets: endpoint tokens (Ed25519 JWT), and API keys, join tokens and credentials (random, stored hashed).

The manager signs endpoint tokens; proxies hold the public keys only. Ed25519 is deterministic and the
claims are built in one order, so the same claims give the same token again.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from base64 import urlsafe_b64decode
from dataclasses import dataclass

import jwt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ISSUER = "dure"
# Real tokens have about 400 characters; a longer one is not ours and not worth decoding.
TOKEN_LENGTH_MAX = 2048


@dataclass(frozen=True)
class Claims:
    """What a token says. `expires_at` and `issued_at` are Unix seconds."""

    uid: str
    endpoint_uid: str
    issued_at: int
    expires_at: int


class TokenRefused(Exception):
    """A token that cannot be believed; `code` is `malformed`, `unknown_key` or `bad_signature`."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def sign(claims: Claims, key: Ed25519PrivateKey, key_id: str) -> str:
    """The token of `claims`."""
    payload = {
        "iss": ISSUER,
        "aud": claims.endpoint_uid,
        "jti": claims.uid,
        "iat": claims.issued_at,
        "exp": claims.expires_at,
    }
    return jwt.encode(payload, key, algorithm="EdDSA", headers={"kid": key_id})


def verify(token: str, keys: dict[str, Ed25519PublicKey]) -> Claims:
    """Checks form and signature, not time, audience or revocation: those change, and this may be memoised.

    Raises TokenRefused.
    """
    if len(token) > TOKEN_LENGTH_MAX:
        raise TokenRefused("malformed")
    try:
        head_text, payload_text, signature_text = token.encode("ascii").split(b".")
        head = json.loads(_decode(head_text))
        payload = json.loads(_decode(payload_text))
        signature = _decode(signature_text)
        if head["alg"] != "EdDSA" or payload["iss"] != ISSUER:
            raise TokenRefused("malformed")
        key_id = head["kid"]
        claims = Claims(
            uid=str(payload["jti"]),
            endpoint_uid=str(payload["aud"]),
            issued_at=int(payload["iat"]),
            expires_at=int(payload["exp"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise TokenRefused("malformed") from error
    key = keys.get(key_id) if isinstance(key_id, str) else None
    if key is None:
        raise TokenRefused("unknown_key")
    try:
        key.verify(signature, head_text + b"." + payload_text)
    except InvalidSignature as error:
        raise TokenRefused("bad_signature") from error
    return claims


def _decode(part: bytes) -> bytes:
    return urlsafe_b64decode(part + b"=" * (-len(part) % 4))


def new_secret(kind: str) -> str:
    """A random secret of 256 bits, such as `dure_key_...`: the prefix tells people what they found."""
    return f"dure_{kind}_{secrets.token_urlsafe(32)}"


def hash_secret(secret: str) -> str:
    """What is stored of a secret. It has 256 random bits, so a plain SHA-256 is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()
