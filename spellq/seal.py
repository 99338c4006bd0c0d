"""Values kept secret at rest: environment values are stored sealed with the installation's key."""

import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from spellq.files import write_private

_NONCE_BYTES: Final = 12
_KEY_BYTES: Final = 32


class UnusableKey(Exception):
    """The key file cannot be used; the message names it and the remedy."""


class Sealer:
    """Seals and opens values with one 256-bit key (ChaCha20-Poly1305, RFC 8439)."""

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)

    def seal(self, values: Mapping[str, str]) -> dict[str, str]:
        """Each value sealed and bound to its name."""
        sealed = {}
        for name, value in values.items():
            nonce = os.urandom(_NONCE_BYTES)
            box = self._cipher.encrypt(nonce, value.encode(), name.encode())
            sealed[name] = b64encode(nonce + box).decode()
        return sealed

    def open(self, sealed: Mapping[str, str]) -> dict[str, str]:
        """The values that were sealed.

        Raises:
            ValueError: sealed with another key, or changed since.
        """
        values = {}
        for name, text in sealed.items():
            box = b64decode(text)
            try:
                value = self._cipher.decrypt(box[:_NONCE_BYTES], box[_NONCE_BYTES:], name.encode())
            except InvalidTag as error:
                raise ValueError(
                    f"the value of {name} was sealed with another installation's key"
                ) from error
            values[name] = value.decode()
        return values


def make_key() -> bytes:
    """A fresh key for a new installation."""
    return ChaCha20Poly1305.generate_key()


def load_or_create_key(path: Path) -> bytes:
    """The key in the file at `path` (mode 0600), made when there is none.

    Only one process at a time may ask (a daemon holds its home's lock).

    Raises:
        UnusableKey: the file cannot be read or written, or is no key.
    """
    try:
        key = _read_key(path)
        if key is None:
            key = make_key()
            write_private(path, key)
    except OSError as error:
        raise UnusableKey(
            f"The key in {path} cannot be used: {error.strerror}. "
            "Make it a file that you can read and write."
        ) from error
    return key


def _read_key(path: Path) -> bytes | None:
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(key) != _KEY_BYTES:
        raise UnusableKey(
            f"{path} is damaged: a key has {_KEY_BYTES} bytes, this file {len(key)}. Restore it "
            "from a backup, or remove it: then a new key is made, and runs that wait with "
            "environment variables cannot start any more."
        )
    return key
