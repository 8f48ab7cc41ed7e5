"""API keys: kept as hashes, compared in constant time; memories belong to the key that made them."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from longmem.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What names of keys and memories may be: no path can be made of them."""


@dataclass(frozen=True)
class Keys:
    """Who may use the server.

    Attributes:
        hashes: SHA-256 of each key in hexadecimal, by its name; empty lets everybody in, as one owner.
    """

    hashes: dict[str, str]

    @classmethod
    def read(cls, file: Path | None) -> Keys:
        """The keys in a file of lines ``name hash``; None is no keys.

        Raises:
            ConfigError: no file, no key, or a line that is none.
        """
        if file is None:
            return cls({})
        if not file.is_file():
            raise ConfigError(f"{file}: there is no such file; make it with longmem serve --keys {file} --new-key NAME")
        found: dict[str, str] = {}
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            name, _, digest = line.strip().partition(" ")
            if not line.strip() or line.startswith("#"):
                continue
            if NAME.fullmatch(name) is None or re.fullmatch(r"[0-9a-f]{64}", digest.strip()) is None:
                raise ConfigError(f"{file}:{number}: a line is a name and a hash, as longmem serve --new-key writes it")
            found[name] = digest.strip()
        if not found:
            raise ConfigError(f"{file}: no key in it; make one with longmem serve --keys {file} --new-key NAME")
        return cls(found)

    def owner(self, authorization: str | None) -> str | None:
        """Whose key an ``Authorization`` header carries; None: nobody's."""
        if not self.hashes:
            return "local"
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).hexdigest() if scheme.lower() == "bearer" else ""
        found = None
        for name, digest in self.hashes.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(given, digest):
                found = name
        return found


def new_key(file: Path, name: str) -> str:
    """Make a key, append its hash to the file, and return the key: nothing else ever shows it.

    Raises:
        ConfigError: the name is not one, or is taken.
    """
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"{name!r} is no name for a key; use letters, digits, '.', '_' and '-', at most 64")
    if file.exists() and name in Keys.read(file).hashes:
        raise ConfigError(f"{file} has a key named {name}; remove its line, or choose another name")
    key = f"lm-{secrets.token_urlsafe(32)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    with file.open("a", encoding="utf-8") as out:
        out.write(f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n")
    return key
