"""Secrets that must be read again are sealed in the store with a key that is not in it: who gets a copy of
the database alone has none of them."""

from __future__ import annotations

from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from dure.wire import errors
from dure.wire.settings import write_file


class Seal:
    """One key, in a file of mode 0600 that is made when something is sealed for the first time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fernet: Fernet | None = None

    def close(self, secret: str) -> bytes:
        """Raises FailedPrecondition if the key file holds no key."""
        if self._fernet is None and not self._path.exists():
            write_file(self._path, Fernet.generate_key() + b"\n", 0o600)
        return self._key().encrypt(secret.encode())

    def open(self, sealed: bytes) -> str:
        """Raises FailedPrecondition if the key is gone, or is another one."""
        try:
            return self._key().decrypt(sealed).decode()
        except InvalidToken as error:
            raise self._lost("holds another key") from error

    def _key(self) -> Fernet:
        if self._fernet is None:
            try:
                self._fernet = Fernet(self._path.read_bytes().strip())
            except FileNotFoundError as error:
                raise self._lost("is gone") from error
            except ValueError as error:
                raise self._lost("holds no key") from error
        return self._fernet

    def _lost(self, what: str) -> errors.FailedPrecondition:
        return errors.FailedPrecondition(
            f"secrets in the store cannot be read: {self._path.name} in the manager's data folder {what}; "
            "bring it back from a backup, or remove it and set all of them again (dure registry set)",
            reason="SEAL_LOST",
        )
