"""Folders are written whole or not at all."""

from __future__ import annotations

import errno
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError

from gem_vllm import folders
from gem_vllm.checkpoint import load_checkpoint, save_checkpoint
from gem_vllm.errors import GemError
from gem_vllm.folders import check_writable, content_sha256, written_whole


def test_failed_write_leaves_the_last_checkpoint_whole(checkpoint_copy, monkeypatch):
    model, tokenizer, config = load_checkpoint(checkpoint_copy, dtype=torch.float32)
    before = {p: p.read_bytes() for p in checkpoint_copy.rglob("*") if p.is_file()}

    no_room = SafetensorError("Error while serializing: I/O error: No space (os error 28)")

    for error, says in (
        (OSError(errno.EDQUOT, "Disk quota exceeded"), r"has no room left for gem; make room"),
        (no_room, r"has no room left for gem; make room"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("gem_vllm.adapter.save_file", Mock(side_effect=error))
            with pytest.raises((GemError, OSError), match=says) as caught:
                save_checkpoint(checkpoint_copy, model, tokenizer, config)
        assert isinstance(caught.value, GemError) == ("room" in says)
    assert {p: p.read_bytes() for p in checkpoint_copy.rglob("*") if p.is_file()} == before
    assert [path.name for path in checkpoint_copy.parent.iterdir()] == ["gem"]
    save_checkpoint(checkpoint_copy, model, tokenizer, config)
    assert {p: p.read_bytes() for p in checkpoint_copy.rglob("*") if p.is_file()} == before


def test_interrupt_between_the_renames(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    with written_whole(folder) as new:
        (new / "gem_config.json").write_text("{}")

    rename = type(folder).rename

    def rename_once(self, target):
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", rename_once)
    with pytest.raises(KeyboardInterrupt), written_whole(folder) as new:
        (new / "gem_config.json").write_text("[]")
    assert (folder / "gem_config.json").read_text() == "{}"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(number, tmp_path):
    def write():
        with written_whole(tmp_path / "out") as new:
            (new / "gem_config.json").write_text("{}")
            signal.raise_signal(number)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_thread_may_write(tmp_path):
    def write():
        with written_whole(tmp_path / "out") as new:
            (new / "gem_config.json").write_text("{}")

    with ThreadPoolExecutor() as pool:
        pool.submit(write).result()
    assert (tmp_path / "out" / "gem_config.json").is_file()


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    elsewhere, link = tmp_path / "disk" / "model", tmp_path / "model"
    link.symlink_to(elsewhere)
    for text in ("{}", "[]"):  # at first the link points to nothing
        with written_whole(link) as new:
            (new / "gem_config.json").write_text(text)
        assert (elsewhere / "gem_config.json").read_text() == text
    assert link.is_symlink()
    assert list(elsewhere.parent.iterdir()) == [elsewhere]


def test_nothing_else_is_overwritten(checkpoint_copy, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(GemError, match=r"holds something else \(mine.txt\)"):
        check_writable(tmp_path / "notes")
    with pytest.raises(GemError, match="is a file"):
        check_writable(tmp_path / "notes" / "mine.txt")
    (checkpoint_copy / "additional_chat_templates").mkdir()
    check_writable(checkpoint_copy)
    (checkpoint_copy / "runs").mkdir()
    with pytest.raises(GemError, match=r"holds something else \(runs\)"):
        check_writable(checkpoint_copy)
    with pytest.raises(GemError, match="MiB are needed"):
        check_writable(tmp_path / "new" / "folder", weight_bytes=1 << 60)
    assert not (tmp_path / "new").exists()
    usage = shutil._ntuple_diskusage(1, 1, 0)
    asked = []
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: asked.append(path) or usage)
    (tmp_path / "new").mkdir()
    with pytest.raises(GemError, match="has 0 MiB free"):
        check_writable(tmp_path / "new")
    assert asked == [tmp_path], "where it is written, beside it"


def test_what_cannot_be_replaced_is_refused_before_long_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(GemError, match=r"nothing can be written in .*file"):
        check_writable(tmp_path / "file" / "new" / "gem")
    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "access", lambda path, mode: path != tmp_path)
        with pytest.raises(GemError, match="nothing can be written"):
            check_writable(tmp_path / "new" / "gem")
    (tmp_path / "mounted" / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(folders.os.path, "ismount", lambda path: path == tmp_path / "mounted")
    with pytest.raises(GemError, match=r"mounted is mounted, .* name a folder inside it"):
        check_writable(tmp_path / "mounted")
    check_writable(tmp_path / "mounted" / "gem")


def test_a_folders_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = content_sha256(tmp_path)
    (tmp_path / "a").write_text("2")
    second = content_sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, content_sha256(tmp_path)}) == 3
