"""The keys that endpoint tokens are signed with: files of mode 0600 in the data folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dure.routing.v1 import routing_pb2
from dure.wire import errors, tokens
from dure.wire.settings import write_file


@dataclass(frozen=True)
class SigningKeys:
    """All keys by id; `current` signs new tokens, the others show and check older ones."""

    keys: dict[str, Ed25519PrivateKey]
    current: str

    @classmethod
    def load(cls, folder: Path, new_id: str) -> SigningKeys:
        """Reads `<id>.key` (32 raw bytes) in `folder`; makes one of id `new_id` if there is none."""
        files = sorted(folder.glob("*.key"))
        if not files:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            key = Ed25519PrivateKey.generate()
            write_file(folder / f"{new_id}.key", key.private_bytes_raw(), 0o600)
            return cls({new_id: key}, new_id)
        keys = {file.stem: Ed25519PrivateKey.from_private_bytes(file.read_bytes()) for file in files}
        # Ids are UUIDv7: the last is the newest.
        return cls(keys, files[-1].stem)

    def public(self) -> list[routing_pb2.PublicKey]:
        return [
            routing_pb2.PublicKey(id=key_id, key=key.public_key().public_bytes_raw())
            for key_id, key in sorted(self.keys.items())
        ]

    def sign(self, claims: tokens.Claims, key_id: str) -> str:
        """Raises FailedPrecondition if the key that signed a token is gone."""
        key = self.keys.get(key_id)
        if key is None:
            raise errors.FailedPrecondition(
                f"the key {key_id} that signed this token is no longer kept; issue another token"
            )
        return tokens.sign(claims, key, key_id)
