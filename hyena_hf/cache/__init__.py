# SPDX-License-Identifier: Apache-2.0
"""What a Hyena model remembers between calls of `forward`.

One `HyenaCacheLayer` per block holds one history per operator that mixes along the sequence: the short convolution,
every long convolution, keys and values of attention, or the state of linear attention. All histories follow one rule:

    committed inputs are right-aligned:      every row's past ends at the same column
    new and pending inputs are left-aligned: every row's new tokens begin at the next column

so past and new are gapless in every row however unequal the rows are, answering needs no index and no mask, and only
`commit` takes counts: it shifts row b right by the columns in which it received nothing.

While a cache records its past (assisted decoding), the last inputs stay pending. `crop` drops some of them and commits
the rest: rollback is exact, and costs nothing else.

B batch, C channels of an operator, T committed columns, n new columns.
"""

from .history import AttentionHistory, ExactHistory, HeadHistory, History, NoMemory
from .layer import HyenaCacheLayer, adopt_cache, in_turn
from .linear import LinearHistory
from .modal import HeadModalState, ModalState
from .online import OnlineTiles
from .plan import DECODE_CACHES, Plan
from .taps import FrozenTaps, Taps
from .window import Window


__all__ = [
    "DECODE_CACHES",
    "AttentionHistory",
    "ExactHistory",
    "FrozenTaps",
    "HeadHistory",
    "HeadModalState",
    "History",
    "HyenaCacheLayer",
    "LinearHistory",
    "ModalState",
    "NoMemory",
    "OnlineTiles",
    "Plan",
    "Taps",
    "Window",
    "adopt_cache",
    "in_turn",
]
