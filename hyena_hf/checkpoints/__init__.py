# SPDX-License-Identifier: Apache-2.0
"""Load the weights that people own: safari, HyenaDNA, StripedHyena, Evo 1, Evo 2, M2-BERT.

`load_checkpoint` gives a model, `convert_checkpoint` (and `hyena convert`) writes one to disk without holding it in
memory, `export_checkpoint` writes a model in a published layout again. Only tensors are read: no code in a file runs.
"""

from .detection import LAYOUTS, detect_layout
from .export import EXPORTS, export_checkpoint
from .loading import load_checkpoint
from .writing import convert_checkpoint


__all__ = ["EXPORTS", "LAYOUTS", "convert_checkpoint", "detect_layout", "export_checkpoint", "load_checkpoint"]
