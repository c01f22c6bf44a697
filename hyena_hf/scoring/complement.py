# SPDX-License-Identifier: Apache-2.0
"""The other strand of DNA."""

from __future__ import annotations


# IUPAC-IUB 1984: each letter stands for a set of bases, its complement for the complements of those
_LETTERS, _COMPLEMENTS = "ACGTRYSWKMBDHVN", "TGCAYRSWMKVHDBN"
_TABLE = str.maketrans(_LETTERS + _LETTERS.lower(), _COMPLEMENTS + _COMPLEMENTS.lower())
_KNOWN = set(_LETTERS + _LETTERS.lower())


def reverse_complement(sequence: str, name: str = "the sequence") -> str:
    """The opposite strand of a DNA sequence, read in its own direction; case is kept.

    Args:
        sequence: A, C, G, T, N and the IUPAC letters of ambiguous bases, in either case.
        name: Of the sequence, for messages.

    Raises:
        ValueError: Another letter, as in RNA or proteins.
    """
    others = sorted(set(sequence) - _KNOWN)
    if others:
        raise ValueError(
            f"{name} holds {others[0]!r} at position {sequence.index(others[0]) + 1}, which is no DNA letter "
            f"({_LETTERS}), so it has no reverse complement"
        )
    return sequence.translate(_TABLE)[::-1]
