"""How much of an answer is in its source's own words."""

from __future__ import annotations

from mas_batch.aggregate.extractive import terms


def fragment_coverage(answer: str, source: str) -> float | None:
    """Return the share of the answer's words that lie in fragments shared with the source.

    Extractive fragment coverage (Grusky, Naaman and Artzi, "Newsroom", NAACL 2018): fragments
    are found greedily, the longest shared run of words at each place of the answer. A single
    shared word is a fragment already, so a word lies in one exactly if the source has it
    anywhere, and no fragment needs to be found. In [0, 1]; None for an answer without a word.
    Words are those of `extractive.terms`. Cost: O(words of both).
    """
    said = terms(answer)
    if not said:
        return None
    known = set(terms(source))
    return sum(word in known for word in said) / len(said)
