# SPDX-License-Identifier: Apache-2.0
"""Tell which published layout a checkpoint has."""

from collections.abc import Callable
from pathlib import Path

from hyena_hf.configuration_hyena import HyenaConfig

from . import m2_bert, safari, striped
from .files import Source, open_source
from .layout import Conversion


_READERS: dict[str, Callable[[Source, str], Conversion]] = {
    "safari-lm": safari.read,
    "longsafari-seqlen": safari.read,
    "longsafari-hf": safari.read,
    "stripedhyena": striped.read,
    "evo1": striped.read,
    "evo2": striped.read,
    "m2-bert": m2_bert.read,
}
LAYOUTS = tuple(_READERS)
_DETECTORS = (safari.layout_of, striped.layout_of, m2_bert.layout_of)


def layout_of(source: Source, layout: str | None = None) -> str:
    """The layout of an open checkpoint, or the given one if it is known."""
    if layout is not None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is not known; choose from {', '.join(LAYOUTS)}, or leave it out")
        return layout
    if source.config.get("model_type") == HyenaConfig.model_type:
        raise ValueError(
            f"{source.name} is a model of this package already; load it with AutoModelForCausalLM.from_pretrained"
        )
    found = next((name for name in (detect(source) for detect in _DETECTORS) if name is not None), None)
    if found is None:
        names = source.tensors.names()
        kind = source.config.get("model_type")
        known = f", and its configuration has model_type {kind!r}" if kind else ""
        raise ValueError(
            f"{source.name} has a layout that is not known: it holds {len(names)} tensors, such as {names[:3]}{known}"
            f". Known layouts are {', '.join(LAYOUTS)}"
        )
    return found


def detect_layout(path_or_repo: str | Path, revision: str | None = None) -> str:
    """Name of the layout of a checkpoint on this disk or on the hub; arguments and errors as in `load_checkpoint`."""
    return layout_of(open_source(path_or_repo, revision))


def open_checkpoint(path_or_repo: str | Path, layout: str | None, revision: str | None) -> Conversion:
    """A checkpoint in our terms, of which no tensor was read yet but to compare it with formulas."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; choose from {', '.join(LAYOUTS)}, or leave it out")
    source = open_source(path_or_repo, revision)
    name = layout_of(source, layout)
    return _READERS[name](source, name)


__all__ = ["LAYOUTS", "detect_layout"]
