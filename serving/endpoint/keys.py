"""API keys: a file of hashes, one a line, read again when it changes.

    # who         what the server keeps of the key
    search-team   sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08

Keys are random (256 bits, `new_key`), so that a plain hash of one cannot be turned round.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from gem_vllm.errors import GemError

logger = logging.getLogger(__name__)

PREFIX = "gem-"
_LINE = re.compile(r"(?P<name>\S+)\s+sha256:(?P<digest>[0-9a-f]{64})")
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class ApiKeys:
    """Names and SHA-256 digests of the keys that are let in."""

    digests: dict[str, bytes]

    @staticmethod
    def read(path: Path) -> ApiKeys:
        """The keys of a file.

        Raises:
            GemError: it cannot be read, has a line that is no key, or a name twice.
        """
        return ApiKeys(_read_digests(path))

    def name_of(self, key: str) -> str | None:
        """Whose ``key`` it is; None for nobody's. Takes as long whichever it is."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for name, known in self.digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def new_key(path: Path, name: str) -> str:
    """Add a key to a file; what is returned is nowhere kept.

    Raises:
        GemError: the file is no file of keys, or has the name already.
    """
    if not _NAME.fullmatch(name):
        raise GemError(f"{name!r} is no name; use letters, digits, '.', '_' and '-'")
    if path.exists() and name in _read_digests(path):
        raise GemError(f"{path} has a key {name} already; remove its line, or choose another name")
    key = PREFIX + secrets.token_urlsafe(32)
    line = f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            text = file.read()
            file.write(line if text.endswith("\n") or not text else f"\n{line}")
    except OSError as error:
        raise GemError(f"{path} cannot be written: {error}") from error
    return key


def _read_digests(path: Path) -> dict[str, bytes]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GemError(f"API keys {path} cannot be read: {error}") from error
    digests: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise GemError(
                f"{path} line {number} is no key; write NAME sha256:HASH, as 'gem-vllm key' does"
            )
        if match["name"] in digests:
            raise GemError(f"{path} line {number}: there is a key {match['name']} already")
        digests[match["name"]] = bytes.fromhex(match["digest"])
    return digests


class KeyFile:
    """A file of keys that may change while it is in use, as a mounted secret does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark, self._keys = self._find_mark(), ApiKeys.read(path)

    def name_of(self, key: str) -> str | None:
        """As `ApiKeys.name_of`, by what the file holds now.

        A file without a key lets nobody in. One that is broken, or gone, leaves the keys as they
        were, with a line in the log.
        """
        mark = self._find_mark()
        if mark != self._mark:
            self._mark = mark
            try:
                self._keys = ApiKeys.read(self._path)
            except GemError as error:
                logger.error("API keys stay as they were: %s", error)
        return self._keys.name_of(key)

    def _find_mark(self) -> tuple[int, int, int] | None:
        try:
            info = self._path.stat()
        except OSError:
            return None
        # The size too: what an editor empties and fills again may keep its time.
        return info.st_mtime_ns, info.st_ino, info.st_size
