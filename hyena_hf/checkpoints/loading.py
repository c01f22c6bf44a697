# SPDX-License-Identifier: Apache-2.0
"""A model from a checkpoint in a published layout."""

import logging
from pathlib import Path
from typing import Any

from .detection import open_checkpoint


logger = logging.getLogger(__name__)


def load_checkpoint(path_or_repo: str | Path, layout: str | None = None, revision: str | None = None) -> Any:
    """Load published weights into a model of this package.

    Only tensors are read (`weights_only=True`, safetensors); no code in a file runs and none is fetched.

    Args:
        path_or_repo: A folder, a file of weights with its configuration beside it, or a repository of the hub
            (OWNER/NAME).
        layout: One of `LAYOUTS`; None: found from the files.
        revision: Branch, tag or commit of a repository; None: the one that its publishers recommend.

    Returns:
        A `HyenaForCausalLM` in evaluation mode (`HyenaForSequenceClassification` where the file holds a classifier; of
        M2-BERT a `HyenaForMaskedLM`, or a `HyenaForTextEncoding` where it holds a pooler), in the dtype of the file's
        embedding, filters in float32; ready for `save_pretrained`.

    Raises:
        ValueError: The layout is not known, files are missing, truncated or name code, or tensors do not make up the
            model that the configuration describes.
    """
    conversion = open_checkpoint(path_or_repo, layout, revision)
    for warning in conversion.warnings:
        logger.warning("%s: %s", path_or_repo, warning)
    # copies: a model must not live in a mapped file, which somebody may overwrite
    state = {name: tensor.clone() for name, tensor in conversion.checked()}
    model = conversion.model_class.from_pretrained(
        None, config=conversion.config, state_dict=state, dtype=conversion.dtype
    )
    return model.eval()


__all__ = ["load_checkpoint"]
