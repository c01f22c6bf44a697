"""What whole models cost over length: Hyena beside GPT-2, Llama, Mamba-2, LFM2 and the published operator.

    python -m benchmarks.bench_forward                     (--smoke: tiny models, 2 rounds, page in runs/smoke)
    python -m benchmarks.bench_forward --only crossover    (that section alone; the others stay on the page)

CPU time of one thread, batch 1, float32, random weights, in shuffled rounds; every ratio is the time of GPT-2 over
that of another model within one round. Prefill gives the logits of the last token without gradients, training the
gradients of the language-model loss. All have the same width, a vocabulary of 256 tied to the head, heads of width 64
and, where their classes allow it, the same MLP (four times the width, tanh-approximated GELU, layer norm). The
published operator stands in the very same block as ours; so does a mixer that does nothing between its two
projections, whose ratio is the bound for all. Slow rows have fewer rounds, as their column says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, Lfm2Config, LlamaConfig, Mamba2Config
from transformers.modeling_utils import PreTrainedModel

from benchmarks.published import PublishedOperator
from benchmarks.report import markdown_table
from benchmarks.timing import (
    Call,
    Comparison,
    Ratio,
    Settings,
    memory_plot,
    ratio_plot,
    ratio_table,
    run_sections,
)
from hyena_hf import HyenaConfig, HyenaForCausalLM


Page = tuple[list[str], dict[str, Figure]]

VOCABULARY, HEAD = 256, 64
GPT2, LLAMA, MAMBA2, LFM2, PUBLISHED = "GPT-2", "Llama", "Mamba-2", "LFM2", "published operator"
FROZEN, HYENA, BOUND = "Hyena, frozen filters", "Hyena", "projections alone"
PREFILL = {2048: 1.45, 8192: 3.8, 16384: 5.5, 65536: 16.0}  # goals
TRAINING = {2048: 1.6, 8192: 3.8, 16384: 5.2}
PREFILL_LENGTHS = (512, 1024, 2048, 8192, 16384, 65536)
PEER_LENGTHS = {"Prefill": (512, 2048, 8192), "Forward and backward": (512, 2048)}
CROSSOVER_LENGTHS = (64, 128, 256, 512, 1024)
MEMORY_LENGTHS = {"Prefill": (2048, 8192, 16384, 65536), "Forward and backward": (2048, 8192, 16384)}
ONCE = 20_000  # beyond this length the reference is measured once a round


def hyena(width: int, layers: int, length: int) -> HyenaForCausalLM:
    """Ours."""
    config = HyenaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        max_position_embeddings=length,
    )
    return HyenaForCausalLM(config)


def published(width: int, layers: int, length: int) -> HyenaForCausalLM:
    """Ours with another mixer in each block."""
    model = hyena(width, layers, length)
    for layer in model.model.layers:
        layer.mixer = PublishedOperator(width, length)
    return model


class Projections(nn.Module):
    """A mixer that drops all but its first projection: what is left of a block when mixing costs nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """Rows of tokens (B, L, D)."""
        return self.out_proj(self.in_proj(hidden_states)[..., : self.out_proj.in_features])


def projections_alone(width: int, layers: int, length: int) -> HyenaForCausalLM:
    """Ours without mixing."""
    model = hyena(width, layers, length)
    for layer in model.model.layers:
        layer.mixer = Projections(width)
    return model


def gpt2(width: int, layers: int, length: int) -> PreTrainedModel:
    """With torch's fused attention."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // HEAD),
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def llama(width: int, layers: int, length: int) -> PreTrainedModel:
    """Its MLP is gated: two thirds of the inner width for as many parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def mamba2(width: int, layers: int, length: int) -> PreTrainedModel:  # noqa: ARG001 (the signature of all)
    """It has no MLP: twice as many layers for about as many parameters."""
    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=2 * layers,
        state_size=64,
        head_dim=HEAD,
        num_heads=2 * width // HEAD,
        n_groups=1,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def lfm2(width: int, layers: int, length: int) -> PreTrainedModel:
    """Convolutions of three taps and attention in turn; its MLP is gated."""
    config = Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=layers,
        layer_types=[("conv", "full_attention")[index % 2] for index in range(layers)],
        num_attention_heads=max(1, width // HEAD),
        num_key_value_heads=max(1, width // HEAD),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


MODELS: Mapping[str, Callable[[int, int, int], PreTrainedModel]] = {
    GPT2: gpt2,
    LLAMA: llama,
    MAMBA2: mamba2,
    LFM2: lfm2,
    PUBLISHED: published,
    BOUND: projections_alone,
    FROZEN: hyena,
    HYENA: hyena,
}


def random_tokens(length: int) -> Tensor:
    """One row."""
    return torch.randint(0, VOCABULARY, (1, length))


def prefill_call(model: nn.Module, ids: Tensor) -> Call:
    """Logits of the last token."""

    def call() -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1).logits

    model.eval()
    return call


def training_call(model: nn.Module, ids: Tensor) -> Call:
    """Gradients of the loss."""

    def call() -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    model.train()
    return call


CALLS = {"Prefill": prefill_call, "Forward and backward": training_call}


def compare_models(
    settings: Settings, what: str, names: Sequence[str], sizes: tuple[int, int, int], *, control: bool = True
) -> Comparison:
    """Models of width, layers and length."""
    torch.manual_seed(0)
    length, call = sizes[-1], CALLS[what]
    ids, cases = random_tokens(length), {}
    with ExitStack() as stack:
        for name in names:
            model = MODELS[name](*sizes)
            if name == FROZEN and isinstance(model, HyenaForCausalLM):
                stack.enter_context(model.frozen_filters())
            cases[name] = call(model, ids)
        return settings.compare(cases, control=control)


def over_lengths(
    settings: Settings, what: str, names: Sequence[str], sizes: tuple[int, int], lengths: Iterable[int]
) -> dict[tuple, Comparison]:
    """A comparison for each length, of models of width and layers."""
    return {
        (length,): compare_models(settings, what, names, (*sizes, length), control=length < ONCE)
        for length in tqdm(lengths, desc=what)
    }


def goal_table(found: Mapping[tuple, Comparison], goals: Mapping[int, float], name: str) -> list[str]:
    """What was reached beside what was asked for; nothing where no length has a goal."""
    rows = [(length, str(found[length,].ratio(name)), goal) for length, goal in goals.items() if (length,) in found]
    return ["", *markdown_table(["length", f"{GPT2} / {name}", "goal"], rows)] if rows else []


def curves(found: Mapping[tuple, Comparison], names: Sequence[str]) -> dict[str, dict[int, Ratio]]:
    """Ratios by name and length."""
    return {name: {key[0]: one.ratio(name) for key, one in found.items()} for name in names}


def prefill(settings: Settings) -> Page:
    """One layer each."""
    names = (GPT2, PUBLISHED, BOUND, FROZEN, HYENA)
    width, lengths = (64, (32, 64)) if settings.smoke else (256, PREFILL_LENGTHS)
    found = over_lengths(settings, "Prefill", names, (width, 1), lengths)
    note = f"Width {width}, one layer each. With frozen filters they are evaluated and transformed once, otherwise in "
    lines = ["## Prefill", f"{note}every call, as the published operator does.", ""]
    lines += [*ratio_table(["length"], found, means=False), *goal_table(found, PREFILL, FROZEN)]
    figure = ratio_plot(curves(found, names[1:]), "Prefill, one layer", f"{GPT2} / other, CPU time")
    return lines, {"prefill": figure}


def training(settings: Settings) -> Page:
    """Two layers each."""
    names = (GPT2, PUBLISHED, BOUND, HYENA)
    width, lengths = (64, (32, 64)) if settings.smoke else (256, TRAINING)
    found = over_lengths(settings, "Forward and backward", names, (width, 2), lengths)
    lines = ["## Training", f"Forward and backward of the loss, width {width}, two layers each.", ""]
    lines += [*ratio_table(["length"], found, means=False), *goal_table(found, TRAINING, HYENA)]
    figure = ratio_plot(curves(found, names[1:]), "Forward and backward, two layers", f"{GPT2} / other, CPU time")
    return lines, {"training": figure}


def peers(settings: Settings) -> Page:
    """Two layers each, more models, shorter inputs."""
    lines = [
        "## Other models",
        "Two layers each. Llama and LFM2 have gated MLPs of two thirds of the inner width and RMS norms; LFM2 has one "
        "layer of short convolution and one of attention; Mamba-2 has no MLP, so twice as many layers, and runs "
        "transformers' path without kernels of its own.",
    ]
    for what, lengths in PEER_LENGTHS.items():
        left_out = (BOUND,) if what == "Prefill" else (BOUND, FROZEN)
        names = [name for name in MODELS if name not in left_out]
        sizes, chosen = ((64, 2), (32,)) if settings.smoke else ((256, 2), lengths)
        found = over_lengths(settings, what, names, sizes, chosen)
        lines += ["", f"{what}:", "", *ratio_table(["length"], found, means=False)]
    return lines, {}


def crossover(settings: Settings) -> Page:
    """Short inputs, where attention is cheap."""
    names = (GPT2, PUBLISHED, FROZEN, HYENA)
    lines, found = ["## Crossover", "Prefill, one layer each. Goal: at or below 512 at width 256."], {}
    lengths = (16, 32) if settings.smoke else CROSSOVER_LENGTHS
    for width in (64,) if settings.smoke else (256, 768):
        own = over_lengths(settings, "Prefill", names, (width, 1), lengths)
        found |= {(width, *key): one for key, one in own.items()}
        for name in (FROZEN, HYENA):
            slower = [length for length in lengths if own[length,].ratio(name).median <= 1]
            behind = [length for length in lengths if length > max(slower, default=0)]
            where = f"from {behind[0]} tokens on" if behind else f"nowhere up to {lengths[-1]} tokens"
            lines += ["", f"Width {width}: {name} is faster than {GPT2} {where}."]
    return [*lines, "", *ratio_table(["width", "length"], found, means=False)], {}


def prepare_model(what: str, name: str, width: int, layers: int, length: int) -> Call:
    """A model and its input, for `peak_memory`."""
    transformers.logging.set_verbosity_error()
    CALLS[what](MODELS[name](width, layers, 64), random_tokens(64))()  # what a first call loads
    return CALLS[what](MODELS[name](width, layers, length), random_tokens(length))


def memory(settings: Settings) -> Page:
    """Peaks above weights and input, each in a fresh process."""
    names, lines, figures = (GPT2, PUBLISHED, HYENA), ["## Memory"], {}
    lines.append("Peak of resident memory above weights and input, MiB, and CPU seconds of that single call.")
    for what, lengths in MEMORY_LENGTHS.items():
        layers = 1 if what == "Prefill" else 2
        width, chosen = (64, (64,)) if settings.smoke else (256, lengths)
        rows, peaks = [], {name: {} for name in names}
        for length in tqdm(chosen, desc=f"memory, {what}"):
            cells: list[object] = [length]
            for name in names:
                peak = settings.peak_memory(prepare_model, what, name, width, layers, length)
                if peak is None:
                    return ["## Memory", "Resident memory is read on Linux only."], {}
                peaks[name][length] = peak.mebibytes
                cells.append(f"{peak.mebibytes:.0f} ({peak.seconds:.1f} s)")
            rows.append(cells)
        lines += ["", f"{what}, width {width}, layers {layers}:", "", *markdown_table(["length", *names], rows)]
        figures[f"memory_{what.split()[0].lower()}"] = memory_plot(peaks, f"{what}, layers {layers}")
    return lines, figures


SECTIONS = {
    "prefill": prefill,
    "training": training,
    "peers": peers,
    "crossover": crossover,
    "memory": memory,
}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    run_sections("forward", "Whole models over length", __doc__, SECTIONS, budget=80)
