"""Turn a trained attention model into one with linear attention: convert, transfer its attention, train it further.

    python -m training.linearize MODEL OUTPUT --data books/ --window 64
    python -m training.linearize SmolLM2-135M-Instruct.Q4_1.gguf OUTPUT --data docs/ --held-out jargon.txt --window 64
    python -m training.linearize MODEL OUTPUT --data docs/ --full --objective text
    python -m training.linearize MODEL OUTPUT --smoke              # a little of the standard library, a few steps
    torchrun --nproc-per-node 8 -m training.linearize ...

MODEL is a folder, a name of the Hub or a GGUF file (its weights are dequantised) of a model that `convert_attention`
knows. The same command goes on where it was interrupted; another one is refused in the same folder.

    OUTPUT/converted/       after attention transfer: the model's own weights, trained feature maps
    OUTPUT/model/           after further training, LoRA merged, for from_pretrained (after `import hyena_hf`)
    OUTPUT/adapter/         the LoRA adapter alone, on top of OUTPUT/converted
    OUTPUT/linearize.json   perplexities of the original and of the converted model with all of its attention and with
                            its branches alone; how close every layer is
    OUTPUT/transfer.png     losses of the layers, how close they came     OUTPUT/curves.png  losses of further training

1. Attention transfer (`hyena_hf.linear_attention`): feature maps alone, against full softmax attention.
2. Further training: LoRA in all linear layers and the maps (--full: everything), to predict what the original predicts
   (--objective teacher, its own weights with softmax attention) or the text (--objective text).

Perplexities are of the validation text, 5% of the documents chosen by a hash of their name, and of --held-out, which
nothing is chosen by. A converted model no better than its window alone has a dead linear branch.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, set_seed
from transformers.distributed.fsdp import is_fsdp_enabled
from transformers.utils import logging as transformers_logging

import hyena_hf  # noqa: F401  registers the Auto classes
from hyena_hf.feature_maps import FEATURE_MAPS
from hyena_hf.linear_attention import TransferReport, attention_transfer, convert_attention
from hyena_hf.linear_attention.transfer import measure_branches, measure_layers
from training.adapters import add_lora
from training.data import PackedRows, collate_rows, module_name, pack_documents, read_documents, split_documents
from training.data import stdlib_documents as standard_library
from training.fine_tuner import FineTuneData, FineTuneRecipe, fine_tune
from training.imitation import FormerSelf, ModelTeacher
from training.recipe import claim, write_json
from training.train_lm import SMOKE_CHARACTERS, Encoder, shorten
from training.trainer import STAGING, publish
from training.warmup import Stage


COMMAND, REPORT = "command.json", "linearize.json"
RANK = 16  # of adapters
CHOOSING_ROWS = 16  # of the validation text, for the losses that choose the best checkpoint
LEAST = {"length": 2, "rows": 1, "batch_size": 1, "transfer_steps": 0, "steps": 0, "window": 0}  # of flags
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the flags are listed in a test."""
    parser = argparse.ArgumentParser(
        prog="python -m training.linearize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="a folder, a name of the Hub, or a GGUF file")
    add("output", type=Path, help="folder of this run")
    add("--data", nargs="+", metavar="SOURCE", help="as for train_lm; default: Python's standard library")
    add("--held-out", nargs="+", metavar="SOURCE", help="text of another source, for perplexities at the end")
    add("--length", type=int, default=512, help="tokens in a row (default %(default)s)")
    add("--rows", type=int, default=40, help="rows that perplexities are of, at most (default %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights; maps and adapters train in float32")
    add("--seed", type=int, default=0, help="of the order of the rows")
    add("--smoke", action="store_true", help="a few steps on a little of the data: proves only that it runs")
    _add_conversion_flags(parser)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.batch_size, options.steps, options.transfer_steps = 2, 4, 4
        options.length, options.rows = min(options.length, 64), 4
    for name, least in LEAST.items():
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be at least {least}")
    if options.full and options.lora is not None:
        parser.error("--full trains everything; leave --lora out")
    if options.full and options.dtype != "float32":
        parser.error("--full trains the weights themselves, and small steps vanish in bfloat16; leave --dtype out")
    return options


def _add_conversion_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--window", type=int, default=64, help="tokens that keep softmax attention (default %(default)s; 0: none)")
    add("--feature-map", choices=FEATURE_MAPS, default="hedgehog_softmax", help="default %(default)s")
    add("--feature-dim", type=int, help="outputs of a learned map; default: the width of a head")
    add("--layers", type=int, nargs="+", help="indices of the layers to convert; default: all")
    add("--batch-size", type=int, default=2, help="rows in a step (default %(default)s)")
    add("--transfer-steps", type=int, default=50, help="of attention transfer; 0: none (default %(default)s)")
    add("--transfer-loss", choices=["weights", "outputs", "both"], default="weights", help="default %(default)s")
    add("--transfer-learning-rate", type=float, default=1e-2, help="default %(default)s")
    add("--steps", type=int, default=500, help="of further training; 0: none (default %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="the peak (default %(default)s)")
    add("--objective", choices=["teacher", "text"], default="teacher", help="what further training predicts")
    add("--lora", type=int, metavar="RANK", help=f"of the adapters; default: {RANK}")
    add("--full", action="store_true", help="train all weights instead of adapters")
    add("--evaluate-every", type=int, help="steps of further training; default: 20 times in the run")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.disable_progress_bar()
    processes = PartialState(cpu=not torch.accelerator.is_available())
    model, tokenizer = load(options.model, DTYPES[options.dtype])
    documents = read_documents(options.data) if options.data else standard_library()
    documents = shorten(documents, SMOKE_CHARACTERS) if options.smoke else documents
    splits = split_documents(documents, validation=0.05, heldout=0, group=str if options.data else module_name)
    train_rows, validation = (pack_documents(map(Encoder(tokenizer), part), options.length) for part in splits[:2])
    held_out = {"validation": validation.first(options.rows)}
    if options.held_out:
        rows = pack_documents(map(Encoder(tokenizer), read_documents(options.held_out)), options.length)
        held_out["held-out"] = rows.first(options.rows)
    report = linearize(model, tokenizer, train_rows, held_out, options)
    processes.print(summary(report))
    processes.print(f"the model is in {options.output / ('model' if options.steps else 'converted')}")
    if options.smoke:
        processes.print("This was a smoke run: its numbers mean nothing.")


def load(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A language model with softmax attention and its tokenizer; weights of a GGUF file are dequantised.

    Raises:
        ValueError: There is no such GGUF file.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no GGUF file {source}")
        # without this the configuration goes on saying that the weights are quantised, and they cannot be saved
        dequantised = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, quantization_config=dequantised
        )
        return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype), AutoTokenizer.from_pretrained(source)


def linearize(
    model: Any, tokenizer: Any, train_rows: PackedRows, held_out: dict[str, PackedRows], options: argparse.Namespace
) -> dict[str, Any]:
    """Convert a model, transfer its attention and train it further, or go on with a run that was interrupted.

    Under torchrun every process trains on rows of its own; all measure, and the first one writes. Under `accelerate
    launch` with FSDP2 the model lies in shards during further training, and whole on every device before.

    Args:
        model: A causal language model that `convert_attention` knows; on the CPU, so that devices hold one copy.
        tokenizer: Saved with the models.
        train_rows: Text to learn from.
        held_out: Rows for perplexities by name; `"validation"` chooses the best checkpoint.
        options: The command line.

    Returns:
        The report, as in OUTPUT/linearize.json.

    Raises:
        ValueError: The folder belongs to another run; the model cannot be converted; a process has no weights.
    """
    if is_fsdp_enabled():
        raise ValueError(
            "the transfer needs the weights in every process, and accelerate has loaded them in the first one only; "
            "pass --fsdp_cpu_ram_efficient_loading false to accelerate launch"
        )
    output = options.output
    this = {key: value for key, value in vars(options).items() if key not in ("output", "evaluate_every")}
    # what cannot be converted is refused before the folder is taken
    converted = None if (output / COMMAND).exists() else _convert(model, options)
    processes = PartialState(cpu=not torch.accelerator.is_available())
    processes.wait_for_everyone()
    if processes.is_main_process:
        claim(output, this | {"train_digest": train_rows.digest()}, COMMAND)
    processes.wait_for_everyone()
    report = _Report(output / REPORT, held_out, options.batch_size)
    if not (output / "converted").exists():
        converted = converted or _convert(model, options)
        _transfer(converted, tokenizer, train_rows, held_out["validation"], options)
    # from there in any case: its name is what an adapter remembers
    processes.wait_for_everyone()
    converted: Any = AutoModelForCausalLM.from_pretrained(output / "converted", dtype=DTYPES[options.dtype])
    converted.to(processes.device)
    report.add("layers", json.loads((output / "converted" / "transfer.json").read_text())["layers"])
    report.measure("transferred", converted, ("softmax", "converted", "window", "linear"))
    if options.steps:
        tuned = _tuned(model, converted, tokenizer, train_rows, held_out["validation"], options)
        report.measure("trained", tuned, ("converted", "window", "linear"))
    return report.values


class _Report:
    """Perplexities by model, rows and attention, in a file; what it holds is not measured again."""

    def __init__(self, path: Path, held_out: dict[str, PackedRows], batch_size: int) -> None:
        self.path, self.batch_size = path, batch_size
        self.held_out = held_out
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"perplexity": {}}

    def add(self, key: str, value: Any) -> None:
        """Write something down."""
        self.values[key] = value
        if PartialState().is_main_process:
            write_json(self.path, self.values)

    def measure(self, name: str, model: Any, attentions: Sequence[str]) -> None:
        """Perplexities of a converted model with some of the attentions that `measure_branches` knows."""
        found = self.values["perplexity"]
        if name in found:
            return
        of_rows = {}
        for rows_name, rows in self.held_out.items():
            batches = [collate_rows(rows_of) for rows_of in _batches(rows, range(len(rows)), self.batch_size)]
            of_rows[rows_name] = measure_branches(model, batches, attentions)
        self.add("perplexity", found | {name: of_rows})


def _batches(rows: PackedRows, order: Sequence[int], size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    for start in range(0, len(order), size):
        yield [rows[index] for index in order[start : start + size]]


class _Batches:
    """Shuffled batches of rows, alike in every pass; each process has its share of the rows."""

    def __init__(self, rows: PackedRows, size: int, seed: int) -> None:
        self.rows, self.size = rows, size
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        processes = PartialState()
        self.order = order[processes.process_index :: processes.num_processes]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from map(collate_rows, _batches(self.rows, self.order, self.size))


def _convert(model: Any, options: argparse.Namespace) -> Any:
    converted: Any = convert_attention(
        model,
        layers=options.layers or "all",
        feature_map=options.feature_map,
        feature_dim=options.feature_dim,
        window=options.window,
    )
    return converted.to(PartialState(cpu=not torch.accelerator.is_available()).device)


def _transfer(
    converted: Any, tokenizer: Any, train_rows: PackedRows, validation: PackedRows, options: argparse.Namespace
) -> None:
    """Attention transfer of a converted model, which goes to OUTPUT/converted."""
    held_out = [collate_rows(part) for part in _batches(validation, range(min(8, len(validation))), 1)]
    quiet = None if PartialState().is_main_process else True  # None: where nobody watches
    if options.transfer_steps:
        with tqdm(total=options.transfer_steps, desc="attention transfer", unit="step", disable=quiet) as bar:

            def show(step: int, loss: float) -> None:
                bar.update(step - bar.n)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

            report = attention_transfer(
                converted,
                _Batches(train_rows, options.batch_size, options.seed),
                steps=options.transfer_steps,
                loss=options.transfer_loss,
                learning_rate=options.transfer_learning_rate,
                held_out=held_out,
                progress=show,
                work_dir=options.output / "transfer",
            )
    else:
        report = TransferReport(0, {}, measure_layers(converted, held_out))
    if not PartialState().is_main_process:
        return
    staged = options.output / STAGING / "converted"
    shutil.rmtree(staged.parent, ignore_errors=True)
    converted.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    write_json(staged / "transfer.json", asdict(report))
    plot_transfer(report, options.output / "transfer.png")
    publish(staged, options.output / "converted")
    shutil.rmtree(staged.parent)


def _tuned(
    model: Any,
    converted: Any,
    tokenizer: Any,
    train_rows: PackedRows,
    validation: PackedRows,
    options: argparse.Namespace,
) -> Any:
    """The model after further training, from OUTPUT/model."""
    set_seed(options.seed)
    teacher = None
    if options.objective == "teacher":
        teacher = ModelTeacher(model) if options.full else FormerSelf()
    recipe = FineTuneRecipe(
        task="lm",
        stages=(Stage(batch=options.batch_size, steps=options.steps),),
        learning_rate=options.learning_rate,
        weight_decay=0.0,
        warmup=0.02,
        metric="bits",
        evaluate_every=options.evaluate_every,
        seed=options.seed,
    )
    if options.full:
        student = converted.requires_grad_(requires_grad=True)
    else:
        student = add_lora(converted, "lm", options.lora or RANK)
    result = fine_tune(
        student,
        FineTuneData(train_rows, validation.first(CHOOSING_ROWS)),
        output_dir=options.output,
        recipe=recipe,
        tokenizer=tokenizer,
        teacher=teacher,
    )
    tuned: Any = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=DTYPES[options.dtype])
    return tuned.to(PartialState().device)


def plot_transfer(report: TransferReport, path: Path) -> None:
    """Draw the loss of every layer against the step, and how close each came to softmax attention."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, fits, entropies = figure.subplots(1, 3)
    colours = torch.linspace(0, 1, max(2, len(report.losses))).tolist()
    for shade, (index, values) in zip(colours, report.losses.items(), strict=False):
        losses.plot(range(1, len(values) + 1), values, color=(shade, 0.3, 1 - shade), linewidth=0.8, label=str(index))
    losses.set(xlabel="step", ylabel="loss of a layer (first blue, last red)")
    indices = [fit.layer for fit in report.layers]
    fits.plot(indices, [fit.kl for fit in report.layers], marker=".", label="KL, nats")
    fits.plot(indices, [fit.linear_kl for fit in report.layers], marker=".", label="KL of the linear branch, nats")
    fits.plot(indices, [fit.output_error for fit in report.layers], marker=".", label="relative error of outputs")
    entropies.plot(indices, [fit.teacher_entropy for fit in report.layers], marker=".", label="softmax")
    entropies.plot(indices, [fit.entropy for fit in report.layers], marker=".", label="converted")
    for axes in (fits, entropies):
        axes.set(xlabel="layer", ylim=(0, None))
        axes.legend()
        axes.grid(alpha=0.3)
    entropies.set(ylabel="entropy of weights, nats")
    figure.savefig(path, dpi=120)


def summary(report: dict[str, Any]) -> str:
    """Perplexities and their ratios to the original's."""
    lines = []
    for rows, before in report["perplexity"]["transferred"].items():
        lines.append(f"{rows}, original: perplexity {before['softmax']:.2f}")
        for name, of_rows in report["perplexity"].items():
            lines += [
                f"{rows}, {name}, {attention}: perplexity {value:.2f}, {value / before['softmax']:.3f} times"
                for attention, value in of_rows[rows].items()
                if attention != "softmax"
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
