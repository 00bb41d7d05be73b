"""``vllm serve`` replaced by the script next door."""

from __future__ import annotations

import pytest

from tests.demo import stand_ins


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.fake_vllm(monkeypatch)
    monkeypatch.setattr("gem_vllm.machine.has_cuda", lambda: False)
