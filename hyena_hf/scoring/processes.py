# SPDX-License-Identifier: Apache-2.0
"""Shares of work for the processes that torchrun or accelerate started, and what they found in one place."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def processes(distributed: bool) -> tuple[int, int]:
    """Number of this process, and how many share the work: 0, 1 alone.

    `torchrun` and `accelerate launch` say so in the environment; where nobody has connected the processes yet, they
    are connected by gloo, which needs no accelerator.
    """
    if not distributed or not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return 0, 1
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def share(work: Callable[[], Any], world: int) -> list[Any]:
    """Do this process's share of the work; what every process found, in the order of their numbers.

    Raises:
        RuntimeError: Another process failed: all stop, in place of waiting for it forever. An error of this process is
            raised as it is.
    """
    if world == 1:
        return [work()]
    found: Any = None
    failed: Exception | None = None
    try:
        found = work()
    except Exception as error:  # noqa: BLE001 (raised below, when the others know)
        failed = error
    outcomes: list[Any] = [None] * world
    dist.all_gather_object(outcomes, (found, None if failed is None else f"{type(failed).__name__}: {failed}"))
    if failed is not None:
        raise failed
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise RuntimeError(f"process {rank} of {world} failed: {message}")
    return [outcome for outcome, _ in outcomes]
