# SPDX-License-Identifier: Apache-2.0
"""Keep an operator's arithmetic in the dtype of its tensors."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Context in which autocast does not run matrix products of this device in half precision."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
