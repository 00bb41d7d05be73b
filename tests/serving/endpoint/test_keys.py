"""API keys: only their hashes are kept, and a file that changes is read again."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest

from gem_vllm.errors import GemError
from gem_vllm.serving.endpoint.keys import ApiKeys, KeyFile, new_key


def test_a_new_key_is_let_in_and_its_file_does_not_hold_it(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "api"
    keys = {name: new_key(file, name) for name in ("search", "chat.team-2")}
    assert len(set(keys.values())) == 2
    for name, key in keys.items():
        assert ApiKeys.read(file).name_of(key) == name
        assert key not in file.read_text()
        assert len(key) > 40
    for wrong in ("", "gem-", keys["search"][:-1], keys["search"] + "x", "\ud800"):
        assert ApiKeys.read(file).name_of(wrong) is None


def test_a_key_is_added_behind_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"secret").hexdigest()
    file.write_text(f"# ours\n\nold sha256:{digest}  # of 2024")
    key = new_key(file, "new")
    keys = ApiKeys.read(file)
    assert (keys.name_of("secret"), keys.name_of(key)) == ("old", "new")
    (tmp_path / "empty").write_text("# none yet\n")
    first = new_key(tmp_path / "empty", "first")
    assert ApiKeys.read(tmp_path / "empty").name_of(first) == "first"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search plain-text-key\n", "line 1 is no key"),
        (f"a sha256:{'0' * 64}\na sha256:{'1' * 64}\n", "line 2: there is a key a already"),
        (f"a sha256:{'0' * 63}\n", "line 1 is no key"),
    ],
)
def test_a_file_that_is_none_of_keys_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(GemError, match=message):
        ApiKeys.read(tmp_path / "keys")


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    new_key(tmp_path / "keys", "a")
    with pytest.raises(GemError, match="has a key a already"):
        new_key(tmp_path / "keys", "a")
    with pytest.raises(GemError, match="is no name"):
        new_key(tmp_path / "keys", "two words")
    with pytest.raises(GemError, match="cannot be read"):
        ApiKeys.read(tmp_path / "missing")
    with pytest.raises(GemError, match="cannot be"):
        new_key(tmp_path, "a")


def test_keys_come_and_go_while_the_file_is_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    first = new_key(file, "first")
    keys = KeyFile(file)
    second = new_key(file, "second")
    assert (keys.name_of(first), keys.name_of(second)) == ("first", "second")
    # A mounted secret changes by a rename.
    (tmp_path / "next").write_text(file.read_text().splitlines()[1] + "\n")
    os.replace(tmp_path / "next", file)
    assert (keys.name_of(first), keys.name_of(second)) == (None, "second")
    file.write_text("# nobody\n")
    assert keys.name_of(second) is None
    third = new_key(file, "third")
    assert keys.name_of(third) == "third"
    with caplog.at_level(logging.ERROR):
        file.write_text("torn")
        assert keys.name_of(third) == "third"
        file.unlink()
        assert keys.name_of(third) == "third"
    assert "line 1 is no key" in caplog.text
    assert "cannot be read" in caplog.text
