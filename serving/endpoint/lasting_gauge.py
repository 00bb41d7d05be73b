"""A gauge that keeps its value on the page of metrics until it has another."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from ray.util.metrics import Gauge

AGAIN_SECONDS = 1.0


class LastingGauge:
    """Ray's gauge, which shows only what was set since its last report, set again and again.

    Without that, requests that are being answered for longer than a report takes would be missing
    from the page. As Ray's `Gauge`.
    """

    def __init__(self, name: str, description: str, tag_keys: Sequence[str] = ()) -> None:
        self._gauge = Gauge(name, description, tag_keys=tuple(tag_keys))
        self._values: dict[tuple[tuple[str, str], ...], float] = {}
        threading.Thread(target=self._set_again, name=name, daemon=True).start()

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """The value from now on, of these tags."""
        self._values[tuple((tags or {}).items())] = value
        self._gauge.set(value, dict(tags or {}))

    def _set_again(self) -> None:
        while True:
            time.sleep(AGAIN_SECONDS)
            for tags, value in tuple(self._values.items()):
                self._gauge.set(value, dict(tags))
