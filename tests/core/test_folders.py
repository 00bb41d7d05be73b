"""Folders are written whole or not at all."""

from __future__ import annotations

import errno
import shutil

import pytest
import torch

from gem_vllm import folders
from gem_vllm.checkpoint import load_checkpoint, save_checkpoint
from gem_vllm.errors import GemError
from gem_vllm.folders import check_writable, content_sha256, written_whole


def test_failed_write_leaves_the_last_checkpoint_whole(checkpoint_copy, monkeypatch):
    model, tokenizer, config = load_checkpoint(checkpoint_copy, dtype=torch.float32)
    before = {p: p.read_bytes() for p in checkpoint_copy.rglob("*") if p.is_file()}

    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gem_vllm.adapter.save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(checkpoint_copy, model, tokenizer, config)
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


def test_nothing_else_is_overwritten(checkpoint_copy, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(GemError, match=r"holds something else \(mine.txt\)"):
        check_writable(tmp_path / "notes")
    with pytest.raises(GemError, match="is a file"):
        check_writable(tmp_path / "notes" / "mine.txt")
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
