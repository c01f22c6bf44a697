"""Train a byte-level Hyena beside GPT-2 and Llama on real text, distil it, measure all four, write one page.

    make demo                                        # = python -m training.demo
    make demo DATA=book.txt                          # = python -m training.demo --data book.txt
    make demo SMOKE=1                                # every stage in under a minute; its numbers mean nothing
    python -m training.demo --sweep                  # three learning rates for each model: whence LEARNING_RATES

The text is Python's own standard library, divided by module into training, validation and held-out files, or DATA. The
three models have the same width, depth and number of trained parameters, read the same rows in the same order and are
trained with the same recipe; only the peak learning rate is each one's own. Then the long filters of the Hyena are
turned into recurrences, so that it generates in constant memory: the row "hyena, distilled". Beside them: an order-5
Markov model of bytes and xz, both given the same training bytes. `OUTPUT/report.html` and `OUTPUT/results.json` hold
the numbers.

Stopped at any moment, the same command goes on from the last checkpoint; what is finished is not done again (delete
OUTPUT to start anew).
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from evaluation.baselines import markov_bits_per_byte, xz_bits_per_byte
from evaluation.perplexity import bits_per_byte
from evaluation.report import write_report
from hyena_hf import HyenaForCausalLM
from hyena_hf.distillation import distill
from hyena_hf.tokenization_byte import HyenaByteTokenizer
from training.data import (
    Document,
    module_name,
    pack_documents,
    read_documents,
    shuffle_documents,
    split_documents,
    stdlib_documents,
)
from training.demo_measurements import measure_decoding, sample_texts
from training.demo_models import Size, count_parameters, equal_configs
from training.recipe import Recipe, train, write_json


LEARNING_RATES = {"hyena": 2e-3, "gpt2": 4e-3, "llama": 2e-3}
SWEPT_RATES = (2e-3, 4e-3, 8e-3)
DISTILLED = "hyena, distilled"


@dataclass(frozen=True)
class Plan:
    """How much of everything: the one place that decides what the demo costs."""

    train_bytes: int = 1_048_576  # a token is a byte: 512 steps of 8 rows of 256
    sweep_bytes: int = 917_504  # of them, for the choice of learning rates
    validation_bytes: int = 100_000
    heldout_bytes: int = 200_000
    length: int = 256
    batch_size: int = 8
    hidden_size: int = 128
    num_hidden_layers: int = 4
    intermediate_size: int = 432
    state_size: int = 16  # numbers that a distilled filter remembers
    save_every: int = 50
    prompt_bytes: int = 48
    new_tokens: int = 200  # prompt and new tokens fit in `length`, which GPT-2 cannot exceed


SMOKE = Plan(
    train_bytes=8_192,
    sweep_bytes=4_096,
    validation_bytes=2_000,
    heldout_bytes=4_000,
    length=64,
    batch_size=8,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=128,
    state_size=4,
    save_every=10,
    prompt_bytes=24,
    new_tokens=16,
)


@dataclass(frozen=True)
class Corpus:
    """Bytes of the documents that are trained on, chosen by, and reported."""

    name: str
    train: list[bytes]
    validation: list[bytes]
    heldout: list[bytes]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="PATH", help="your own text; default: Python's standard library")
    parser.add_argument("--output", type=Path, help="default: runs/demo, with a suffix for data, seeds and smoke")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of rows and samples")
    parser.add_argument("--smoke", action="store_true", help="tiny models, a few steps")
    parser.add_argument("--sweep", action="store_true", help="train each model at three learning rates instead")
    options = parser.parse_args(arguments)
    if options.output is None:
        suffixes = [Path(options.data).stem if options.data else "", f"seed{options.seed}" if options.seed else ""]
        suffixes += ["smoke" if options.smoke else ""]
        options.output = Path("runs") / "-".join(["demo", *filter(None, suffixes)])
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo or the sweep."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    plan = SMOKE if options.smoke else Plan()
    if options.smoke:
        torch.set_num_threads(1)  # tiny models lose by sharing work
    torch.set_float32_matmul_precision("high")  # float32 transforms: a training step rounds more than they do
    if options.sweep:
        plan = replace(plan, train_bytes=plan.sweep_bytes)
    corpus = make_corpus(options.data, plan)
    if options.sweep:
        sweep(plan, corpus, options.output / "sweep", options.seed)
    else:
        run(plan, corpus, options)
    if options.smoke:
        print("\nThis was a smoke run: every stage ran, the numbers mean nothing.")


def make_corpus(data: str | None, plan: Plan) -> Corpus:
    """Choose the documents: a fixed shuffle of each split, cut off at the plan's number of bytes."""
    documents = read_documents([data]) if data else stdlib_documents()
    splits = split_documents(documents, group=str if data else module_name)
    limits = (plan.train_bytes, plan.validation_bytes, plan.heldout_bytes)
    name = Path(data).name if data else f"standard library of Python {platform.python_version()}"
    return Corpus(name, *(_first_bytes(split, limit) for split, limit in zip(splits, limits, strict=True)))


def _first_bytes(documents: Sequence[Document], limit: int) -> list[bytes]:
    chosen: list[bytes] = []
    for document in shuffle_documents(documents):
        content = document.text.encode()[: limit - sum(map(len, chosen))]
        chosen += [content] if len(content) > 1 else []  # a single byte has nothing to predict
    return chosen


def run(plan: Plan, corpus: Corpus, options: argparse.Namespace) -> None:
    """Train and measure the models and the baselines, write the report, print the table."""
    print(
        f"{corpus.name}: {_size(corpus.train):,} bytes of training text, {_size(corpus.validation):,} of validation, "
        f"{_size(corpus.heldout):,} held out",
        flush=True,
    )
    configs = equal_configs(model_size(plan))
    models = {
        name: run_model(name, config, plan, corpus, options.output / name, options.seed)
        for name, config in configs.items()
    }
    models[DISTILLED] = run_distilled(options.output / "hyena" / "model", plan, corpus, options.output, options.seed)
    results = {
        "machine": machine(),
        "command": command(options),
        "commit": commit(),
        "seed": options.seed,
        "smoke": options.smoke,
        "plan": asdict(plan),
        "corpus": {
            "name": corpus.name,
            "train_bytes": _size(corpus.train),
            "validation_bytes": _size(corpus.validation),
            "heldout_bytes": _size(corpus.heldout),
        },
        "models": models,
        "baselines": run_baselines(corpus, options.output / "baselines.json"),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }
    page = write_report(results, options.output)
    print_table(results)
    print(f"\n{page}")


def model_size(plan: Plan) -> Size:
    """The size that the plan gives to all three models."""
    tokenizer = HyenaByteTokenizer()
    return Size(
        vocab_size=len(tokenizer),
        length=plan.length,
        hidden_size=plan.hidden_size,
        num_hidden_layers=plan.num_hidden_layers,
        intermediate_size=plan.intermediate_size,
    )


def train_model(
    name: str, config: PreTrainedConfig, plan: Plan, corpus: Corpus, output_dir: Path, *, seed: int, rate: float
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train one model, or go on with it; what it learned is in the model, how in the numbers."""
    train_rows = pack_documents(map(list, corpus.train), plan.length)
    validation_rows = pack_documents(map(list, corpus.validation), plan.length)
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    recipe = Recipe(
        steps=-(-len(train_rows) // plan.batch_size),
        batch_size=plan.batch_size,
        learning_rate=rate,
        seed=seed,
        save_every=plan.save_every,
        evaluate_every=1_000_000,  # at the end only
    )
    print(f"{name}: {count_parameters(model):,} parameters, {recipe.steps} steps, learning rate {rate:g}", flush=True)
    result = train(model, train_rows, validation_rows, output_dir=output_dir, recipe=recipe)
    return model, {
        "parameters": count_parameters(model),
        "learning_rate": rate,
        "train_seconds": result.train_seconds,
        "tokens_per_second_training": result.tokens_per_second,
        "loss_curve": [list(point) for point in result.loss_curve],
    }


def run_model(
    name: str, config: PreTrainedConfig, plan: Plan, corpus: Corpus, output_dir: Path, seed: int
) -> dict[str, Any]:
    """Train one model and measure it; finished measurements are read back."""
    model, numbers = train_model(name, config, plan, corpus, output_dir, seed=seed, rate=LEARNING_RATES[name])
    path = output_dir / "measured.json"
    if not path.exists():
        write_json(path, measure(model, plan, corpus, seed))
    return numbers | json.loads(path.read_text())


def run_distilled(model_dir: Path, plan: Plan, corpus: Corpus, output_dir: Path, seed: int) -> dict[str, Any]:
    """Distil the trained Hyena and measure it; finished measurements are read back."""
    folder = output_dir / "hyena-distilled"
    path = folder / "measured.json"
    if not path.exists():
        print(f"{DISTILLED}: every filter in {plan.state_size} numbers", flush=True)
        teacher = HyenaForCausalLM.from_pretrained(model_dir)
        student, report = distill(teacher, state_size=plan.state_size, work_dir=folder / "fits")
        student.save_pretrained(folder / "model")
        report.save(folder)
        numbers = {"parameters": count_parameters(student), "distillation": str(report)}
        write_json(path, numbers | measure(student, plan, corpus, seed))
    return json.loads(path.read_text())


def measure(model: PreTrainedModel, plan: Plan, corpus: Corpus, seed: int) -> dict[str, Any]:
    """Bits per byte on both held-back sets, decoding speed, cache size, samples."""
    tokenizer = HyenaByteTokenizer()
    prompts = make_prompts(corpus.heldout, plan.prompt_bytes)
    decoding = measure_decoding(model, torch.tensor(list(prompts[0].encode())), new_tokens=plan.new_tokens)
    return {
        "heldout_bits_per_byte": _bits(model, corpus.heldout, plan),
        "validation_bits_per_byte": _bits(model, corpus.validation, plan),
        "decode_tokens_per_second": decoding.tokens_per_second,
        "cache_bytes": decoding.cache_bytes,
        "cache_context": decoding.context,
        "samples": sample_texts(model, tokenizer, prompts, new_tokens=plan.new_tokens, seed=seed),
    }


def _bits(model: PreTrainedModel, documents: Sequence[bytes], plan: Plan) -> float:
    ids = [torch.tensor(list(document)) for document in documents]
    return bits_per_byte(model, ids, context=plan.length, batch_size=plan.batch_size).bits_per_byte


def make_prompts(documents: Sequence[bytes], size: int, count: int = 3) -> list[str]:
    """Beginnings of lines in the middle of held-out documents, each about `size` bytes."""
    prompts = []
    for document in sorted(documents, key=len, reverse=True)[:count]:
        middle = document.find(b"\n", len(document) // 2) + 1
        prompts.append(document[middle : middle + size].decode(errors="ignore") or "\n")
    return prompts


def run_baselines(corpus: Corpus, path: Path) -> dict[str, float]:
    """Bits per held-out byte of the Markov model and of xz; finished ones are read back."""
    if not path.exists():
        print("baselines: order-5 Markov models, xz", flush=True)
        values = {
            "Markov, order 5, Witten-Bell": markov_bits_per_byte(
                corpus.train, corpus.heldout, smoothing="witten-bell"
            ),
            "Markov, order 5, Kneser-Ney": markov_bits_per_byte(corpus.train, corpus.heldout, smoothing="kneser-ney"),
            "xz": xz_bits_per_byte(corpus.train, corpus.heldout),
        }
        write_json(path, values)
    return json.loads(path.read_text())


def sweep(plan: Plan, corpus: Corpus, output_dir: Path, seed: int) -> dict[str, dict[str, float]]:
    """Train each model at each of SWEPT_RATES on part of the text; print and write validation bits per byte.

    Held-out text is not read.
    """
    table: dict[str, dict[str, float]] = {}
    for name, config in equal_configs(model_size(plan)).items():
        table[name] = {}
        for rate in SWEPT_RATES:
            folder = output_dir / f"{name}-{rate:g}"
            model, _ = train_model(name, config, plan, corpus, folder, seed=seed, rate=rate)
            table[name][f"{rate:g}"] = _bits(model, corpus.validation, plan)
            write_json(output_dir / "sweep.json", table)
    print("\nvalidation bits per byte" + "".join(f"{rate:>10g}" for rate in SWEPT_RATES))
    for name, row in table.items():
        print(f"{name:24}" + "".join(f"{bits:>10.3f}" for bits in row.values()))
    return table


def print_table(results: dict[str, Any]) -> None:
    """Print what matters most."""
    print(f"\n{'':18}{'parameters':>12}{'held-out bits/byte':>20}{'decoding tokens/s':>19}{'cache bytes':>13}")
    for name, numbers in results["models"].items():
        print(
            f"{name:18}{numbers['parameters']:>12,}{numbers['heldout_bits_per_byte']:>20.3f}"
            f"{numbers['decode_tokens_per_second']:>19.0f}{numbers['cache_bytes']:>13,}"
        )
    for name, bits in results["baselines"].items():
        print(f"{name:18}{'':>12}{bits:>20.3f}")


def machine() -> str:
    """What the numbers were measured on."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "CPU"
    return (
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {device}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def command(options: argparse.Namespace) -> str:
    """The command that repeats these results."""
    words = ["python -m training.demo", f"--seed {options.seed}", f"--data {options.data}" if options.data else ""]
    return " ".join(filter(None, [*words, "--smoke" if options.smoke else ""]))


def commit() -> str:
    """The commit of the checkout, marked when there are changes on top of it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _size(documents: Sequence[bytes]) -> int:
    return sum(map(len, documents))


if __name__ == "__main__":
    main()
