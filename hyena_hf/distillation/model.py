# SPDX-License-Identifier: Apache-2.0
"""Turn the long filters of a model into recurrences: `distill`.

LaughingHyena (Massaroli et al. 2023, arXiv 2310.18780) replaces every long filter of a trained model by a few decaying
exponentials; the model then generates in constant time and memory a token. The result is a model of the same class
with modal filters (`hyena_hf.filters.ModalFilter`), which saves, loads, trains and exports like any other.
"""

import copy
import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.initialization import no_init_weights

from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.filters import LongFilter, ModalFilter
from hyena_hf.mixers import HyenaMixer
from hyena_hf.modeling_hyena import HyenaForCausalLM, HyenaPreTrainedModel, check_stream
from hyena_hf.ops.modal import NO_POLE

from .certificates import errors_by_order
from .fit import FitReport, fit_modal
from .hankel import window_size
from .report import Calibration, DistillationReport, LayerReport, Sample
from .spectra import input_spectra


Model = TypeVar("Model", bound=HyenaPreTrainedModel)

# State sizes that are tried for a tolerance: a filter that needs more gains little from being a recurrence.
_SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64)
_VERSION = 2  # of the fits: layers that an older one has left in a work folder are fitted anew
_SHOWN = 64  # Hankel singular values in a report


@dataclass
class _Fit:
    """Modal filters (C, N) of one layer and what is known of them."""

    poles: Tensor
    residues: Tensor
    direct: Tensor
    report: FitReport


def distill(
    model: Model,
    *,
    state_size: int | Sequence[int] | None = None,
    tolerance: float | None = None,
    calibration: Tensor | Iterable[Tensor] | None = None,
    weighted: bool = False,
    work_dir: str | Path | None = None,
    progress: bool = False,
) -> tuple[Model, DistillationReport]:
    """Fit every long filter of a model by a small state-space model.

    Args:
        model: A causal Hyena model; layers of attention stay as they are, and so does the model itself.
        state_size: Real numbers that a filter may remember: one value (16 where nothing is said), or one a layer.
        tolerance: Relative error that every filter must keep (l2 of taps, or of outputs if `weighted`), in place of
            `state_size`; each layer gets the smallest size that keeps it. Where none does, up to 64, a warning names
            the filters.
        calibration: Token ids (B, L), or batches of them, on which both models are compared.
        weighted: Fit for the spectra that the inputs of convolutions have on the calibration set (`input_spectra`), in
            place of all frequencies alike. About ten times as slow; batches are held in memory.
        work_dir: Folder for finished layers: a call that was killed goes on there.
        progress: Show a progress bar (needs tqdm).

    Returns:
        A new model with modal filters on the same device, in the same dtype, and the report.

    Raises:
        TypeError: `model` is no Hyena model, or has no language-model head to calibrate.
        ValueError: It is bidirectional, distilled already or has no long filters, or arguments contradict each other.

    A filter is fitted over `max_position_embeddings` taps. One that ends before (`filter_length`) is followed by zeros
    there; its fit never ends.
    """
    layers = _layers_to_distil(model)
    _check_arguments(model, state_size, tolerance)
    if weighted and calibration is None:
        raise ValueError("weighted fits need the spectra of inputs; give a calibration set")
    sizes = dict.fromkeys(layers, 16) if state_size is None else _by_layer(state_size, layers)
    batches = None
    if calibration is not None:
        _check_head(model)  # before hours of work
        batches = _checked(calibration, model.config)
    folder = None if work_dir is None else Path(work_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    spectra: dict[int, Tensor] = {}
    if weighted and batches is not None:
        spectra = input_spectra(model, batches)
    fits, reports = {}, []
    for layer in _shown(layers, progress):
        h = _taps(model, layers[layer])
        choices = _choices(h) if tolerance is not None else (sizes[layer],)
        path = None if folder is None else folder / f"layer_{layer}"
        fit, size = _fit_layer(h, spectra.get(layer), choices, tolerance, path)
        fits[layer], sizes[layer] = fit, size
        reports.append(_report(layer, size, h, fit))
    student = _with_modal_filters(model, fits, sizes)
    calibrated = None if batches is None else compare(model, student, batches)
    report = DistillationReport(reports, tolerance, calibrated, weighted)
    if missed := report.missed():
        largest = max(one.state_size for one in reports)
        worst = max(float(one.filters.relative_output.max()) for one in reports)
        warnings.warn(
            f"{len(missed)} filters miss the tolerance of {tolerance:g} with up to {largest} states, the worst by "
            f"{worst:.3g}; see the report, and keep the original model where its logits matter",
            stacklevel=2,
        )
    return student, report


def _layers_to_distil(model: HyenaPreTrainedModel) -> dict[int, HyenaMixer]:
    """Mixers with a long filter by layer, after refusing models that have none to distil."""
    if not isinstance(model, HyenaPreTrainedModel):
        raise TypeError(
            f"distill takes a Hyena model, got {type(model).__name__}; merge adapters first (merge_and_unload)"
        )
    if not model.config.is_causal:
        raise ValueError("a bidirectional model sees later tokens, which no recurrence does; it cannot be distilled")
    body: Any = model.base_model
    mixers = {i: layer.mixer for i, layer in enumerate(body.layers) if isinstance(layer.mixer, HyenaMixer)}
    found = {i: mixer for i, mixer in mixers.items() if not isinstance(mixer.filter, ModalFilter)}
    if not found:
        reason = "its filters are modal already" if mixers else "it has no Hyena layer"
        raise ValueError(f"there is nothing to distil in this model: {reason}")
    return found


def _check_arguments(
    model: HyenaPreTrainedModel, state_size: int | Sequence[int] | None, tolerance: float | None
) -> None:
    if state_size is not None and tolerance is not None:
        raise ValueError(f"state_size ({state_size}) and tolerance ({tolerance}) both choose the sizes; give one")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance ({tolerance}) is a relative error, above 0 and below 1")
    if isinstance(state_size, Sequence) and len(state_size) != model.config.num_hidden_layers:
        raise ValueError(
            f"state_size has {len(state_size)} entries for {model.config.num_hidden_layers} layers; give one number, "
            f"or one a layer"
        )
    for size in state_size if isinstance(state_size, Sequence) else (state_size,):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"state_size ({size!r}) must be a whole number, at least 1")


def _by_layer(state_size: int | Sequence[int], layers: Iterable[int]) -> dict[int, int]:
    return {i: state_size[i] if isinstance(state_size, Sequence) else state_size for i in layers}


def _shown(layers: Iterable[int], progress: bool) -> Iterable[int]:
    if not progress:
        return layers
    from tqdm import tqdm

    return tqdm(layers, desc="layers")


@torch.no_grad()
def _taps(model: HyenaPreTrainedModel, mixer: HyenaMixer) -> Tensor:
    """All taps of a layer (C, L) in float64 on the CPU."""
    long_filter: LongFilter = mixer.filter
    return long_filter(model.config.max_position_embeddings).flatten(0, 1).double().cpu()


def _fit_layer(
    h: Tensor, spectrum: Tensor | None, sizes: Sequence[int], tolerance: float | None, path: Path | None
) -> tuple[_Fit, int]:
    """The fit of taps (C, L) with the smallest size that keeps the tolerance, from a file where there is one."""
    mark = _mark(h, spectrum, sizes, tolerance)
    if path is not None and (found := _read(path.with_suffix(".safetensors"), mark)) is not None:
        return found
    fit, size = _Fit(*fit_modal(h, state_size=min(sizes[0], _most(h)), spectrum=spectrum)), sizes[0]
    for size in sizes[1:]:
        short = (fit.report.relative_output > (tolerance or 0)).nonzero().flatten()
        if not len(short) or size > _most(h):
            break
        better = _Fit(*fit_modal(h[short], state_size=size, spectrum=None if spectrum is None else spectrum[short]))
        fit = _replaced(fit, short, better)
    size = max(1, int(fit.report.states.max()))
    if path is not None:
        _write(path.with_suffix(".safetensors"), fit, size, mark)
    return fit, size


def _mark(h: Tensor, spectrum: Tensor | None, sizes: Sequence[int], tolerance: float | None) -> str:
    """Digest of all that decides about a fit."""
    kept = [one.name for one in fields(FitReport)]  # another version keeps others
    digest = hashlib.sha256(h.numpy().tobytes() + repr((_VERSION, tuple(sizes), tolerance, kept)).encode())
    if spectrum is not None:
        digest.update(spectrum.numpy().tobytes())
    return digest.hexdigest()


def _choices(h: Tensor) -> tuple[int, ...]:
    """Sizes to try for a tolerance, the largest that these taps can use among them."""
    most = min(_most(h), _SIZES[-1])
    return (*(size for size in _SIZES if size < most), most)


def _most(h: Tensor) -> int:
    """States beyond which a filter of so many taps has nothing to fit."""
    return max(1, h.shape[1] - 1)


def _replaced(fit: _Fit, rows: Tensor, better: _Fit) -> _Fit:
    """`fit` with other filters in some rows."""

    def put(old: Tensor, new: Tensor) -> Tensor:
        if old.ndim == 2 and old.shape[1] != new.shape[1]:
            width = max(old.shape[1], new.shape[1])
            old, new = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (old, new))
        return old.index_copy(0, rows, new)

    report: dict[str, Any] = {
        key: put(old, getattr(better.report, key)) if isinstance(old, Tensor) else _named(old, rows, better, key)
        for key, old in vars(fit.report).items()
    }
    parts = (put(getattr(fit, key), getattr(better, key)) for key in ("poles", "residues", "direct"))
    return _Fit(*parts, report=FitReport(**report))


def _named(old: Sequence[str], rows: Tensor, better: _Fit, key: str) -> list[str]:
    names = list(old)
    for row, name in zip(rows.tolist(), getattr(better.report, key), strict=True):
        names[row] = name
    return names


def _write(path: Path, fit: _Fit, size: int, mark: str) -> None:
    """Whole or not at all."""
    tensors = {"poles": torch.view_as_real(fit.poles), "residues": torch.view_as_real(fit.residues)}
    tensors["direct"] = fit.direct
    metadata = {"mark": mark, "size": str(size)}
    for one in fields(FitReport):
        value = getattr(fit.report, one.name)
        if isinstance(value, Tensor):
            tensors[f"report.{one.name}"] = value
        else:
            metadata[f"report.{one.name}"] = "\n".join(value)
    unfinished = path.with_suffix(".unfinished")
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, unfinished, metadata)
        os.replace(unfinished, path)  # noqa: PTH105 (replaces on every system)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} cannot be written ({error}); make room or get the right to write there, then repeat the call: "
            f"layers that are finished are kept"
        ) from error


def _read(path: Path, mark: str) -> tuple[_Fit, int] | None:
    """A finished layer, unless the file is of another filter or other sizes."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("mark") != mark:
                return None
            # copies: tensors of an open file are views of it, and the file may be written again
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (FileNotFoundError, SafetensorError):
        return None
    report: dict[str, Any] = {
        one.name: tensors[f"report.{one.name}"]
        if f"report.{one.name}" in tensors
        else metadata[f"report.{one.name}"].split("\n")
        for one in fields(FitReport)
    }
    poles, residues = (torch.view_as_complex(tensors[key]) for key in ("poles", "residues"))
    return _Fit(poles, residues, tensors["direct"], FitReport(**report)), int(metadata["size"])


def _report(layer: int, size: int, h: Tensor, fit: _Fit) -> LayerReport:
    error = fit.report.relative_l2
    sigma = bounds = torch.zeros(len(h), 1, dtype=h.dtype)  # of a filter that is its tap at lag 0
    if h.shape[1] > 1:
        sigma, bounds = errors_by_order(h, min(_SHOWN, window_size(h.shape[1])))
    shares = sigma / sigma[:, :1].clamp(min=torch.finfo(sigma.dtype).tiny)
    chosen = error.argsort()[[len(error) // 2, -1]].tolist()
    samples = [Sample(c, h[c].float(), _response(fit, c, h.shape[1]).float()) for c in chosen]
    spectrum, bound = (x.median(dim=0).values for x in (shares, bounds))
    return LayerReport(layer, size, fit.report, spectrum, bound, samples)


def _response(fit: _Fit, channel: int, length: int) -> Tensor:
    """Taps (length,) of one fitted filter."""
    poles = torch.where(fit.poles[channel] == 0, 1, fit.poles[channel])  # 0^0 is no number; residues are 0 there
    powers = poles ** torch.arange(max(length - 1, 0)).unsqueeze(-1)
    return torch.cat([fit.direct[channel : channel + 1], (powers @ fit.residues[channel]).real])


def _with_modal_filters(model: Model, fits: dict[int, _Fit], sizes: dict[int, int]) -> Model:
    """A copy of the model with other filters in some layers."""
    config = copy.deepcopy(model.config)
    layers = range(config.num_hidden_layers)
    config.filter_types = ["modal" if i in fits else config.filter_types[i] for i in layers]
    old = [config.state_size] * len(layers) if isinstance(config.state_size, int) else config.state_size
    config.state_size = [sizes.get(i, old[i]) for i in layers]
    config.num_poles = [max(1, fits[i].poles.shape[1]) if i in fits else model.config.pole_count(i) for i in layers]
    with no_init_weights():
        student: Any = type(model)(config)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    filters = {i: f"{prefix}layers.{i}.mixer.filter." for i in fits}
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(tuple(filters.values()))}
    student.to(dtype=model.dtype).load_state_dict(kept, strict=False)
    for i, fit in fits.items():
        _fill(student.base_model.layers[i].mixer.filter, fit)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.to(model.device).train(model.training)


@torch.no_grad()
def _fill(modal: ModalFilter, fit: _Fit) -> None:
    """Set the parameters; the rounding of log-radius and angle leaves the canonical pole within one float32 step."""
    shape, width = modal.log_radius.shape, fit.poles.shape[1]
    modal.log_radius.fill_(NO_POLE)
    for parameter in (modal.angle, modal.residue_re, modal.residue_im):
        parameter.zero_()
    used = fit.poles != 0
    log_radius = torch.where(used, fit.poles.abs().log(), NO_POLE)
    values = log_radius, torch.where(used, fit.poles.angle(), 0), fit.residues.real, fit.residues.imag
    for parameter, value in zip(
        (modal.log_radius, modal.angle, modal.residue_re, modal.residue_im), values, strict=True
    ):
        parameter[..., :width] = value.view(*shape[:2], width).to(parameter.dtype)
    modal.direct.copy_(fit.direct.view(shape[:2]))


def _checked(calibration: Tensor | Iterable[Tensor], config: HyenaConfig) -> list[Tensor]:
    """Batches of token ids, all of them looked at before any work begins."""
    batches = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    if not batches:
        raise ValueError("the calibration set is empty; give token ids (B, L), or batches of them")
    for number, ids in enumerate(batches):
        try:
            _check_ids(ids, config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"batch {number} of the calibration set: {error}") from error
    return batches


def _check_ids(ids: Tensor, config: HyenaConfig) -> None:
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"a calibration batch is a tensor of token ids (B, L), got {got}")
    _, length, _ = check_stream(ids, None, config)
    if length < 2:
        raise ValueError(f"a calibration row of {length} token predicts nothing; give rows of at least 2")
    limited = config.beyond_trained_length == "refuse" or config.trainable_positional_features
    if limited and length > config.max_position_embeddings:
        raise ValueError(
            f"a row of {length} tokens exceeds max_position_embeddings ({config.max_position_embeddings}); cut it"
        )


def _check_head(model: HyenaPreTrainedModel) -> None:
    if not isinstance(model, HyenaForCausalLM):
        raise TypeError(f"a calibration set needs a HyenaForCausalLM, got {type(model).__name__}; leave it out")


@torch.no_grad()
def compare(teacher: HyenaPreTrainedModel, student: HyenaPreTrainedModel, batches: Iterable[Tensor]) -> Calibration:
    """Predictions of the next token by two language models.

    Args:
        teacher: The original.
        student: The distilled model.
        batches: Token ids (B, L).

    Raises:
        TypeError: The models have no language-model head.
    """
    _check_head(teacher)
    modes = [(model, model.training) for model in (teacher, student)]
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    try:
        for model, _ in modes:
            model.eval()
        for ids in batches:
            ids = ids.to(teacher.device)
            before, after = (
                model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1) for model in (teacher, student)
            )
            target = ids[:, 1:].unsqueeze(-1)
            kl = (before.exp() * (before - after)).sum()
            sums += torch.stack([kl, *(-x.gather(-1, target).sum() for x in (before, after))]).cpu()
            tokens += target.numel()
    finally:
        for model, training in modes:
            model.train(training)
    kl, before, after = (sums / tokens).tolist()
    return Calibration(tokens, kl, math.exp(before), math.exp(after))


__all__ = ["compare", "distill"]
