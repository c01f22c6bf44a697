"""Quality against sparsity: a trained model with fewer frequencies, with fewer taps, and on longer inputs.

    make demo                                        (trains the model that is measured)
    python -m benchmarks.bench_sparse                (about 8 minutes; --smoke: seconds, page in runs/smoke)

Nothing is trained again: the filters of the demo's Hyena are cut and its held-out bits per byte measured.

- Frequencies: `frequency_sparsity` removes the highest ones and keeps the filter causal. Beside it the way of
  FlashFFTConv (Fu et al. 2023, arXiv 2311.05908, section 3.3): bins of the transform of the padded filter are set to
  zero and the convolution is left as it comes out, so that outputs see later tokens; how much is in the column "leak",
  the largest change of logits before a token that was changed, relative to the largest logit. A model must not be
  judged by what it reads ahead.
- Taps: `filter_length`, a partial convolution.
- Contexts beyond the trained one: filters that go on (`extrapolate`), or that end where training ended.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from evaluation.perplexity import bits_per_byte
from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.mixers import HyenaMixer
from hyena_hf.ops import bidirectional_fftconv, short_conv
from training.demo import SMOKE, Plan, make_corpus


SPARSITIES = (0.0, 0.25, 0.5, 0.75, 0.875, 0.9375, 0.96875)
SHARES = (1, 2, 4, 8, 16, 32, 64)


def model_with(trained: HyenaForCausalLM, **changes: Any) -> HyenaForCausalLM:
    """The trained weights under a config with some fields changed."""
    fields = trained.config.to_dict() | changes
    known = {key: value for key, value in fields.items() if key in HyenaConfig.__dataclass_fields__}
    model = HyenaForCausalLM(HyenaConfig(**known)).eval()
    model.load_state_dict(trained.state_dict())
    return model.requires_grad_(False)


def masked_on_the_circle(trained: HyenaForCausalLM, sparsity: float) -> HyenaForCausalLM:
    """The trained model with zeroed bins and nothing done about causality."""

    def one_pass(self: HyenaMixer, p: Tensor, memory: Any) -> Tensor:
        length = p.shape[-1]
        h = memory.taps.rising(self.filter, 0, length)
        spectrum = torch.fft.rfft(h, n=2 * length)
        kept = round((1 - sparsity) * spectrum.shape[-1])
        spectrum[:, kept:] = 0
        circle = torch.fft.irfft(spectrum, n=2 * length)
        gate, key, value = short_conv(p, *self.short_conv(p.dtype)).chunk(3, dim=1)
        ahead = circle[:, length + 1 :].flip(-1)
        return bidirectional_fftconv(
            value, circle[:, :length], ahead, self.skip[0], pregate=key.contiguous(), postgate=gate.contiguous()
        )

    model = model_with(trained)
    for module in model.modules():
        if isinstance(module, HyenaMixer):
            module.one_pass = MethodType(one_pass, module)
    return model


@torch.no_grad()
def leak(model: HyenaForCausalLM, ids: Tensor) -> float:
    """Largest change of earlier logits when the token in the middle changes, relative to the largest logit."""
    changed = ids.clone()
    middle = ids.shape[1] // 2
    changed[:, middle] = (changed[:, middle] + 1) % 256
    logits = [model(x, use_cache=False).logits[:, :middle] for x in (ids, changed)]
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())


def bits(model: HyenaForCausalLM, documents: Sequence[Tensor], context: int) -> float:
    """Held-out bits per byte, half of each window as context."""
    with model.frozen_filters():
        return bits_per_byte(model, documents, context=context, batch_size=max(4096 // context, 1)).bits_per_byte


def frequencies(trained: HyenaForCausalLM, documents: Sequence[Tensor], context: int) -> tuple[list[str], Figure]:
    """Bits per byte against the share of zeroed frequencies."""
    row = torch.cat(list(documents))[: 8 * context].view(8, -1)
    rows, curves = [], ([], [])
    for sparsity in tqdm(SPARSITIES, desc="frequencies"):
        causal, masked = model_with(trained, frequency_sparsity=sparsity), masked_on_the_circle(trained, sparsity)
        values = bits(causal, documents, context), bits(masked, documents, context)
        for curve, value in zip(curves, values, strict=True):
            curve.append(value)
        leaks = leak(causal, row), leak(masked, row)
        rows.append((f"{sparsity:g}", f"{values[0]:.4f}", f"{leaks[0]:.1e}", f"{values[1]:.4f}", f"{leaks[1]:.1e}"))
    columns = ["zeroed", "ours, bits a byte", "ours, leak", "bins zeroed only, bits a byte", "bins zeroed only, leak"]
    figure, axes = plt.subplots(figsize=(5, 3.5))
    for curve, label in zip(curves, ("causal (frequency_sparsity)", "bins zeroed only: reads ahead"), strict=True):
        axes.plot(SPARSITIES, curve, marker="o", label=label)
    axes.set(xlabel="share of frequencies zeroed", ylabel="held-out bits per byte")
    axes.legend()
    return markdown_table(columns, rows), figure


def taps(trained: HyenaForCausalLM, documents: Sequence[Tensor], context: int) -> list[str]:
    """Bits per byte against the number of taps."""
    rows = []
    for share in tqdm(SHARES, desc="taps"):
        length = max(context // share, 1)
        value = bits(model_with(trained, filter_length=length), documents, context)
        rows.append((length, f"{value:.4f}", length - 1))
    return markdown_table(["taps of each filter", "bits a byte", "gated inputs that the cache holds"], rows)


def contexts(trained: HyenaForCausalLM, documents: Sequence[Tensor], context: int) -> list[str]:
    """Bits per byte on inputs longer than those of training."""
    trained_length = trained.config.max_position_embeddings
    rows = []
    for factor in tqdm((1, 2, 4, 8, 16), desc="contexts"):
        values = [
            bits(model_with(trained, filter_length=length), documents, factor * context)
            for length in (None, trained_length)
        ]
        rows.append((factor * context, *(f"{value:.4f}" for value in values)))
    return markdown_table(["context", "filters go on", f"filters end after {trained_length} taps"], rows)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a trained model (default runs/demo/hyena/model, from make demo)")
    parser.add_argument("--smoke", action="store_true", help="little text, untrained where there is no demo")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    plan = SMOKE if options.smoke else replace(Plan(), heldout_bytes=50_000)
    folder = options.model or Path("runs") / ("demo-smoke" if options.smoke else "demo") / "hyena" / "model"
    if folder.exists():
        trained = HyenaForCausalLM.from_pretrained(folder).eval()
    elif options.smoke:
        config = HyenaConfig(
            vocab_size=260, hidden_size=16, num_hidden_layers=1, intermediate_size=16, max_position_embeddings=64
        )
        trained = HyenaForCausalLM(config).eval()
    else:
        parser.error(f"there is no model in {folder}; run make demo first or name one with --model")
    corpus = make_corpus(None, plan)
    documents = [torch.tensor(list(document)) for document in corpus.heldout]
    context = plan.length
    table, figure = frequencies(trained, documents, context)
    size = sum(map(len, documents))
    lines = [
        f"{folder}, {size:,} held-out bytes of {len(documents)} documents of the {corpus.name}; trained on contexts "
        f"of {context} tokens, nothing is trained again.",
        *("", "## Frequencies", "", *table),
        *("", "## Taps", "", *taps(trained, documents, context)),
        *("", "## Contexts beyond training", "", *contexts(trained, documents, context)),
    ]
    path = write_result(
        "sparse",
        "Quality against sparsity",
        command_line("bench_sparse"),
        lines,
        {"frequencies": figure},
        folder=SMOKE_RESULTS if options.smoke else RESULTS,
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
