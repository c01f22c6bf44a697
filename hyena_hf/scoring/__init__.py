# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods and embeddings of sequences: the same alone and in any batch, a million tokens in bounded memory.

Effects of variants and of all substitutions of a region are differences of such likelihoods.
"""

from .complement import reverse_complement
from .embedding import embed
from .likelihood import score
from .mutagenesis import plot_mutagenesis, saturation_mutagenesis, write_mutagenesis
from .sequences import read_sequences
from .variants import VariantEffect, VariantSettings, annotate, score_variants, write_variant_effects
from .windows import WindowSettings


__all__ = [
    "VariantEffect",
    "VariantSettings",
    "WindowSettings",
    "annotate",
    "embed",
    "plot_mutagenesis",
    "read_sequences",
    "reverse_complement",
    "saturation_mutagenesis",
    "score",
    "score_variants",
    "write_mutagenesis",
    "write_variant_effects",
]
