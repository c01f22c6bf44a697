# SPDX-License-Identifier: Apache-2.0
"""What every reader of a published layout produces: a config, and our tensors one at a time."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.modeling_hyena import HyenaForCausalLM, HyenaPreTrainedModel

from .files import Source


Read = Callable[[], Tensor]

# What parallel training and compilation put before the names of a state dict.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


@dataclass
class Conversion:
    """A published checkpoint in our terms.

    Attributes:
        layout: Name of the published layout.
        config: Config of the model.
        tensors: How to get each tensor, by our names; nothing is read before it is called.
        model_class: The class that takes them.
        tokenizer: Makes the tokenizer that the model was trained with; None where the files hold none.
        notes: What was done, a sentence each, for the model card.
        warnings: Where the model differs from the published one, or is dangerous, a sentence each.
        dtype: Of all tensors but filters.
    """

    layout: str
    config: HyenaConfig
    tensors: dict[str, Read]
    model_class: type[HyenaPreTrainedModel] = HyenaForCausalLM
    tokenizer: Callable[[], Any] | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the model, saved buffers included; of tied ones the first name."""
        with torch.device("meta"):
            model = self.model_class(self.config)
        tied = set(model.all_tied_weights_keys)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}

    def checked(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors one at a time, after checking that they make up the whole model.

        Raises:
            ValueError: A tensor is missing, belongs nowhere or has another shape.
        """
        expected = self.expected()
        missing, foreign = sorted(set(expected) - set(self.tensors)), sorted(set(self.tensors) - set(expected))
        if missing or foreign:
            raise ValueError(
                f"this {self.layout} checkpoint does not make up a model: {len(missing)} tensors are missing (first "
                f"{missing[:3]}), {len(foreign)} belong nowhere (first {foreign[:3]}); check that configuration and "
                f"weights come from the same model"
            )
        for name, read in self.tensors.items():
            tensor = read()
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} in this {self.layout} checkpoint, but its configuration "
                    f"asks for {expected[name]}; check that both come from the same model"
                )
            yield name, tensor


class Reader:
    """Published tensors by canonical names; remembers which were asked for.

    Args:
        source: The checkpoint.
        canonical: Canonical name of a published one; None drops it.
    """

    def __init__(self, source: Source, canonical: Callable[[str], str | None]) -> None:
        self.source = source
        self._names: dict[str, str] = {}
        for published in source.tensors.names():
            name = canonical(published)
            if name is not None and self._names.setdefault(name, published) != published:
                raise ValueError(
                    f"{source.name} holds {name} twice, as {self._names[name]} and {published}; keep one of them"
                )
        self._left = dict.fromkeys(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> list[str]:
        """Canonical names."""
        return list(self._names)

    def take(self, name: str) -> Tensor:
        """A tensor."""
        if name not in self._names:
            raise ValueError(f"{self.source.name} has no tensor {name}; check that the file is whole")
        self._left.pop(name, None)
        return self.source.tensors[self._names[name]]

    def lazily(self, name: str, change: Callable[[Tensor], Tensor] | None = None) -> Read:
        """How to get a tensor later, changed."""
        self.shape(name)
        self._left.pop(name, None)
        return (lambda: self.take(name)) if change is None else (lambda: change(self.take(name)))

    def drop(self, name: str) -> None:
        """Leave a tensor out on purpose; none of that name is no error."""
        self._left.pop(name, None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if name not in self._names:
            raise ValueError(f"{self.source.name} has no tensor {name}; check that the file is whole")
        return self.source.tensors.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self.source.tensors.dtype(self._names[name])

    def refuse_leftovers(self) -> None:
        """Raise where the file holds more than was asked for: nothing is lost silently."""
        if self._left:
            left = list(self._left)
            raise ValueError(
                f"{self.source.name} holds {len(left)} tensors that this layout has no place for (first {left[:3]}); "
                f"it is no checkpoint of this kind, or name its layout"
            )


def refuse_settings(config: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Raise where a published configuration asks for something that changes outputs and that we do not build."""
    for name, value in expected.items():
        if name in config and config[name] != value:
            raise ValueError(
                f"{where} has {name}={config[name]!r}, which no published checkpoint has and this reader does not "
                f"build; expected {value!r}"
            )


__all__ = ["Conversion", "Reader", "refuse_settings"]
