"""Words as vectors, which stand beside a model's."""

from __future__ import annotations

import numpy as np
from bm25 import WordVectors


def test_rare_words_count_and_endings_do_not() -> None:
    vectors = WordVectors(["the wing", "the dog", "the sea", "the flow of air"]).embed(
        ["The wings.", "the wing", "the dog", "the air", "the airs"]
    )
    assert vectors.dtype == np.float32
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert cosines[0, 1] > 0.999
    assert cosines[3, 4] > 0.999
    # They share what every text has.
    assert 0.0 < cosines[1, 2] < 0.5
