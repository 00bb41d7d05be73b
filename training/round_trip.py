"""Which questions lead back to the passage that they were written of (after arXiv 2209.11755)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

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
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as search:
        for start in range(0, len(passages), PASSAGES_AT_ONCE):
            some = passages[start : start + PASSAGES_AT_ONCE]
            number = {text: index for index, text in enumerate(some)}
            asked = [pair for pair in pairs if times[pair[0]] == 1 and pair[1] in number]
            first = search.submit(_first_of, [question for question, _ in asked], some).result()
            found = zip(asked, first, strict=True)
            yield from (pair for pair, row in found if number[pair[1]] == row)


def _first_of(questions: list[str], passages: list[str]) -> list[int]:
    """The index of the passage that BM25 finds first for each question, -1 where it finds none.

    To be run in a process of its own: bm25s imports numba and, with it, llvmlite, and in a process
    that has imported it vLLM 0.32 starts no engine on the CPU (its ``_rebind_kernels`` asks every
    object of every module for its ``__dict__``, and llvmlite's library answers with a function).
    """
    import bm25s

    def words(texts: list[str]) -> bm25s.tokenization.Tokenized:
        # No stop words, which would be of one language; BM25 counts common words for little.
        return bm25s.tokenize(texts, stopwords=None, show_progress=False, allow_empty=True)

    index_of = words(passages)
    if not questions or not any(index_of.ids):
        return [-1] * len(questions)
    index = bm25s.BM25()
    index.index(index_of, show_progress=False)
    found, scores = index.retrieve(words(questions), k=1, show_progress=False)
    return [int(row) for row in np.where(scores[:, 0] > 0.0, found[:, 0], -1)]
