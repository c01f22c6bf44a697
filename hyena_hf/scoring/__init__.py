# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods and embeddings of sequences: the same alone and in any batch, a million tokens in bounded memory."""

from .complement import reverse_complement
from .embedding import embed
from .likelihood import score
from .sequences import read_sequences


__all__ = ["embed", "read_sequences", "reverse_complement", "score"]
