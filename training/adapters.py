"""What of a pretrained model is trained: low-rank adapters on chosen layers, the head alone, or everything.

LoRA: Hu et al. 2021, arXiv:2106.09685, through PEFT. Heads are trained in full beside an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hyena_hf.mixers.attention import HyenaAttention
from hyena_hf.mixers.hyena import HyenaMixer
from hyena_hf.modeling_hyena import HyenaMLP


# the linear layers of each part of a block; filters and short convolutions stay as they are
LORA_PARTS: dict[str, tuple[str, ...]] = {
    "hyena": ("in_proj", "out_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
MAPS = "linear_attention"  # what converted attention calls its feature maps and window factor
_MODULES = {"hyena": HyenaMixer, "attention": HyenaAttention, "mlp": HyenaMLP}
_PEFT_TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "lm": "CAUSAL_LM"}


def lora_targets(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Full names of the linear layers of the named parts of a Hyena model, for `LoraConfig(target_modules=...)`.

    Args:
        model: a Hyena model with any head.
        parts: some of `hyena`, `attention`, `mlp`.

    Raises:
        ValueError: an unknown part, or a model that has no layer of these parts.
    """
    unknown = [part for part in parts if part not in LORA_PARTS]
    if unknown or not parts:
        raise ValueError(f"LoRA parts must be some of {', '.join(LORA_PARTS)}, got {', '.join(unknown) or 'none'}")
    targets = []
    for name, module in model.named_modules():
        for part in parts:
            if isinstance(module, _MODULES[part]):
                children = dict(module.named_children())
                targets += [f"{name}.{layer}" for layer in LORA_PARTS[part] if layer in children]
    if not targets:
        raise ValueError(f"{type(model).__name__} has no {' or '.join(parts)} layers; name other LoRA parts")
    return targets


def add_lora(model: PreTrainedModel, task: str, rank: int, parts: Sequence[str] = tuple(LORA_PARTS)) -> Any:
    """Put LoRA adapters into a model; only they and a classifier's head are trained.

    `lora_alpha` is twice the rank, so that the product of the two factors counts double; there is no dropout. A model
    of another family is adapted in all its linear layers; the feature maps of a converted one (`convert_attention`)
    are trained whole beside them, in float32 at least.

    Args:
        model: with its head; changed in place.
        task: `sequence`, `token` or `lm`.
        rank: at least 1.
        parts: of Hyena models, see `lora_targets`.

    Returns:
        The `PeftModel` around it.

    Raises:
        ImportError: PEFT is missing.
        ValueError: a rank below 1, or parts that the model does not have.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, got {rank}")
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs PEFT; install it with: pip install 'hyena-hf[train]'") from error
    targets: Any = "all-linear"
    if model.config.model_type == "hyena":
        targets = lora_targets(model, parts)
    maps = [module for name, module in model.named_modules() if name.endswith(f".{MAPS}")]
    for parameter in (p for module in maps for p in module.parameters()):
        # as PEFT keeps adapters: steps of 1e-3 vanish in bfloat16
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    config = peft.LoraConfig(
        task_type=_PEFT_TASKS[task],
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=targets,
        modules_to_save=[MAPS] if maps else None,
    )
    return peft.get_peft_model(model, config)


def freeze_backbone(model: PreTrainedModel) -> None:
    """Leave only the head to train; dropout of the body goes on as configured.

    Raises:
        ValueError: the model has nothing outside its body, as where the output matrix is the embedding.
    """
    model.base_model.requires_grad_(requires_grad=False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no parameter outside its body (its output matrix is the embedding); a frozen "
            "backbone leaves nothing to train; use --lora, or a classification task"
        )
