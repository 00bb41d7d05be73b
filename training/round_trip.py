"""Which questions lead back to the passage that they were written of (after arXiv 2209.11755)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import bm25s
import numpy as np

# A question is to find its passage among so many.
PASSAGES_AT_ONCE = 16_384


def found_again(pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Of pairs of a question and its passage, those whose words lead back to the passage.

    Left out is a question that was written of several passages, or for which BM25 puts another
    passage first, among ``PASSAGES_AT_ONCE`` at most. (Arxiv 2209.11755 searches with a retriever
    that it has trained; words need no training.)
    """
    pairs = list(dict.fromkeys(pairs))
    times = Counter(question for question, _ in pairs)
    passages = list(dict.fromkeys(text for _, text in pairs))
    for start in range(0, len(passages), PASSAGES_AT_ONCE):
        some = passages[start : start + PASSAGES_AT_ONCE]
        number = {text: index for index, text in enumerate(some)}
        asked = [pair for pair in pairs if times[pair[0]] == 1 and pair[1] in number]
        words = _words(some)
        if not asked or not any(words.ids):
            continue
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        questions = _words([question for question, _ in asked])
        found, scores = index.retrieve(questions, k=1, show_progress=False)
        first = np.where(scores[:, 0] > 0.0, found[:, 0], -1)
        yield from (pair for pair, row in zip(asked, first, strict=True) if number[pair[1]] == row)


def _words(texts: Sequence[str]) -> Any:
    # No list of stop words, which would be of one language; BM25 counts common words for little.
    return bm25s.tokenize(list(texts), stopwords=None, show_progress=False, allow_empty=True)
