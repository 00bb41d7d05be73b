"""Texts by their words: which of a batch share how many, for an embedding to be taught that, too.

The cosine of words, weighted by how rare they are (tf-idf), is a teacher that needs no labels; a
dense model that learns from it finds what shares rare words with a query (Chen et al., arXiv
2110.06918, of BM25). A batch is made of neighbourhoods: texts drawn at random share next to none.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import regex
import Stemmer
import torch
from scipy import sparse

NO_STEMMER = "none"
STEMMERS = (NO_STEMMER, *Stemmer.algorithms())
# A neighbourhood: a text, and of those that share most words with it some.
NEIGHBOURHOOD = 8
NEIGHBOURS = 40
# Scripts without spaces between words; of a text in one, each two characters in a row are a word,
# as search engines have it.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNSPACED_RUN = regex.compile(f"[{_UNSPACED}]+")
_WORD = regex.compile(rf"{_UNSPACED_RUN.pattern}|[[\w\p{{M}}]--[{_UNSPACED}]]+", regex.VERSION1)


class WordVectors:
    """A text as its words, each weighted by how rare it is: tf-idf, as scikit-learn has it.

    Words are in lower case and stemmed, or two characters each where there are no spaces; of a
    word's count the logarithm counts; words that none of ``texts`` has are passed over.

    Args:
        texts: in which to count how many have a word.
        stemmer: of ``STEMMERS``: Snowball's, by language, or none.
    """

    def __init__(self, texts: Sequence[str], stemmer: str) -> None:
        self._stemmer = None if stemmer == NO_STEMMER else Stemmer.Stemmer(stemmer)
        seen_in: Counter[str] = Counter()
        for text in texts:
            seen_in.update(set(self._words(text)))
        self._column = {word: column for column, word in enumerate(seen_in)}
        counts = np.fromiter(seen_in.values(), dtype=np.float32, count=len(seen_in))
        self._rarity = np.log((1 + len(texts)) / (1 + counts)) + 1.0

    def vectors(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """float32 [n, words], rows of length 1, or 0 where a text has no known word."""
        values: list[float] = []
        columns: list[int] = []
        starts = [0]
        for text in texts:
            known = (word for word in self._words(text) if word in self._column)
            counts = Counter(self._column[word] for word in known)
            seen = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
            row = (1.0 + np.log(seen)) * self._rarity[list(counts)]
            values.extend(row / max(float(np.linalg.norm(row)), 1.0))
            columns.extend(counts)
            starts.append(len(columns))
        shape = (len(texts), len(self._column))
        return sparse.csr_matrix((np.array(values, dtype=np.float32), columns, starts), shape=shape)

    def _words(self, text: str) -> list[str]:
        words: list[str] = []
        for word in _WORD.findall(text.lower()):
            if len(word) > 2 and _UNSPACED_RUN.fullmatch(word):
                words += [word[start : start + 2] for start in range(len(word) - 1)]
            else:
                words.append(word)
        return words if self._stemmer is None else self._stemmer.stemWords(words)


class Neighbourhoods:
    """Texts, and which of them share words.

    Args:
        texts: two at least.
        stemmer: as `WordVectors` takes it.
    """

    def __init__(self, texts: Sequence[str], stemmer: str) -> None:
        self.texts = texts
        self._words = WordVectors(texts, stemmer)
        self._vectors = self._words.vectors(texts)

    def draw(self, count: int, rng: random.Random) -> list[str]:
        """``count`` texts: neighbourhoods of random ones, none of which has a text twice."""
        drawn: list[str] = []
        while len(drawn) < count:
            centre = rng.randrange(len(self.texts))
            near = self._vectors @ self._vectors[centre].toarray()[0]
            near[centre] = -1.0
            most = min(NEIGHBOURS, len(self.texts) - 1)
            others = rng.sample(_largest(near, most), min(NEIGHBOURHOOD - 1, most))
            drawn += [self.texts[number] for number in (centre, *others)]
        return drawn[:count]

    def similarities(self, texts: Sequence[str]) -> torch.Tensor:
        """Cosines of the texts' words: float32 [n, n]."""
        vectors = self._words.vectors(texts)
        return torch.from_numpy((vectors @ vectors.T).toarray())


def _largest(values: np.ndarray, count: int) -> list[int]:
    """Where the ``count`` largest are, by size and then by place, whatever processor sorts them.

    All processes of a run draw the same, and so does a run that goes on elsewhere.
    """
    least = np.partition(values, -count)[-count]
    found = np.flatnonzero(values >= least)
    return found[np.argsort(-values[found], kind="stable")][:count].tolist()
