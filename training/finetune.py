"""Fine-tune a model on labelled sequences, labelled tokens, or text.

    python -m training.finetune MODEL --task sequence --data human_nontata_promoters/ --output runs/promoters
    python -m training.finetune MODEL --task sequence --data H3K4me1/ --benchmark H3K4me1 --output runs/H3K4me1
    python -m training.finetune MODEL --task token --data genes/ --class-weights balanced --output runs/genes
    python -m training.finetune MODEL --task lm --data ecoli.fna --length 4096 --lora 8 --output runs/ecoli
    python -m training.finetune MODEL --task lm --data hg38.fa --stages 2e:1024:256 2e:2048:128 --output runs/hg38
    torchrun --nproc-per-node 8 -m training.finetune ...

MODEL is a folder or a name of the Hub, or a config.json for new weights. For classes --data is one folder with the
splits train, test and perhaps validation (class folders of .txt, CSV, TSV, Parquet or FASTA; `training.tasks` says
how); the test split is used once, at the end, on the best checkpoint. For text it is files, folders or hf:NAME as in
`training.train_lm`, or FASTA; 5% of the documents, chosen by a hash of their name, are kept for validation.

The same command goes on where it was interrupted; another one is refused in the same folder. The best checkpoint by
--metric is in OUTPUT/model, for Auto classes (after `import hyena_hf`) and without PEFT; figures are in
OUTPUT/result.json, curves in OUTPUT/curves.png. Defaults are those of the published HyenaDNA fine-tuning: AdamW with
learning rate 6e-4, decay 0.1 and none on filters, cosine to a tenth, clip 1.0.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import hyena_hf  # noqa: F401  registers the Auto classes
from hyena_hf.tokenization_byte import HyenaByteTokenizer
from hyena_hf.tokenization_nucleotide import HyenaNucleotideTokenizer
from training.adapters import LORA_PARTS, add_lora, freeze_backbone
from training.data import Document, pack_documents, read_documents, split_documents
from training.fine_tuner import TASK_KINDS, FineTuneData, FineTuneRecipe, FineTuneResult, balanced_weights, fine_tune
from training.metrics import CLASSIFICATION_METRICS, metrics_of
from training.sequences import EncodedSequences, encode_sequences
from training.tasks import FASTA_SUFFIXES, TASKS, TaskData, read_fasta, read_task, suffix_of
from training.train_lm import VALIDATION_ROWS, Encoder
from training.warmup import Stage, parse_stages


HEADS: dict[str, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "lm": AutoModelForCausalLM,
}
TOKENIZERS = {"dna": HyenaNucleotideTokenizer, "byte": HyenaByteTokenizer}
BALANCED = "balanced"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the flags are listed in a test."""
    parser = argparse.ArgumentParser(
        prog="python -m training.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_data_flags(parser)
    _add_model_flags(parser)
    _add_training_flags(parser)
    options = parser.parse_args(arguments)
    if options.stages and (options.epochs or options.batch_size):
        parser.error("--stages says how long and in which batches; leave --epochs and --batch-size out")
    if options.lora and options.freeze:
        parser.error("--lora freezes the backbone already; leave --freeze out")
    if (options.lora_parts or options.adapter_only) and not options.lora:
        parser.error("--lora-parts and --adapter-only are for --lora RANK")
    if options.task == "lm" and (options.benchmark or options.class_weights or options.truncate or options.pooling):
        parser.error("--benchmark, --class-weights, --truncate and --pooling are for classes; --task lm has none")
    return options


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", choices=TASK_KINDS, required=True)
    add("--data", nargs="+", required=True, metavar="SOURCE", help="see above")
    add("--benchmark", choices=sorted(TASKS), help="published task that the data must agree with; sets the metric")
    add("--tokenizer", help="dna, byte or what AutoTokenizer loads; default: the model's own")
    add("--length", type=int, help="most tokens of a sequence, or those of a row of text; default: the model's")
    add("--truncate", action="store_true", help="cut longer sequences, which are refused otherwise")
    add(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        help="let the tokenizer put its own around each sequence; default: not for dna, as published",
    )


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a folder, a name of the Hub, or a config.json for new weights")
    add("--output", type=Path, required=True, help="folder of this run")
    add("--pooling", choices=["last", "mean"], help="what a sequence head reads; default: as the model says")
    add("--lora", type=int, metavar="RANK", help="train adapters of this rank beside the head")
    add("--lora-parts", nargs="+", choices=list(LORA_PARTS), help="layers that get adapters; default: all of these")
    add("--adapter-only", action="store_true", help="save the adapter without the merged model")
    add("--freeze", choices=["backbone"], help="train the head alone")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=float, help="passes over the training data; default: 10")
    add("--batch-size", type=int, help="rows of a step on each device; default: 32")
    add("--stages", nargs="+", metavar="DURATION:LENGTH:BATCH", help="growing lengths, e.g. 2e:1024:256 500:4096:64")
    add("--tokens-per-pass", type=int, help="most tokens in memory at once on each device; a step takes more passes")
    add("--learning-rate", type=float, default=6e-4, help="the peak (default %(default)s)")
    add("--filter-learning-rate", type=float, help="of the long filters; default: as the others")
    add("--weight-decay", type=float, default=0.1, help="of all but filters, biases and norms (default %(default)s)")
    add("--warmup", type=float, default=0.01, help="of the learning rate: fraction of the steps (default %(default)s)")
    add("--class-weights", nargs="+", metavar="WEIGHT", help="balanced, or a number for each class in their order")
    add("--metric", choices=[*CLASSIFICATION_METRICS, "loss", "bits"], help="chooses the best checkpoint")
    add("--patience", type=int, help="stop after so many evaluations without a better one")
    add("--evaluate-every", type=int, help="steps; default: 20 times in the run")
    add("--bf16", action="store_true", help="mixed precision")
    add("--seed", type=int, default=0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")  # float32 transforms: a training step rounds more than they do
    processes = PartialState(cpu=not torch.accelerator.is_available())
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    config = AutoConfig.from_pretrained(options.model)
    length = usable_length(config, options.length)
    if options.task == "lm":
        data, classes = read_text(options, tokenizer, length), []
    else:
        data, classes = read_classes(options, tokenizer, length)
    set_seed(options.seed)
    model = make_model(options, classes, tokenizer)
    adapted: Any = model
    if options.lora:
        adapted = add_lora(model, options.task, options.lora, options.lora_parts or tuple(LORA_PARTS))
    elif options.freeze:
        freeze_backbone(model)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    processes.print(f"{trained:,} of {model.num_parameters():,} parameters are trained; data: {data.report}")
    result = fine_tune(
        adapted,
        data,
        output_dir=options.output,
        recipe=make_recipe(options, data, len(classes)),
        tokenizer=tokenizer,
        keep_merged=not options.adapter_only,
    )
    processes.print(summary(result))


def load_tokenizer(choice: str) -> PreTrainedTokenizerBase:
    """The tokenizer `dna`, `byte`, or what AutoTokenizer loads.

    Raises:
        ValueError: nothing loads from there.
    """
    if choice in TOKENIZERS:
        return TOKENIZERS[choice]()
    try:
        return AutoTokenizer.from_pretrained(choice)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no tokenizer loads from {choice!r} ({error}); name one with --tokenizer, e.g. dna"
        ) from error


def usable_length(config: Any, asked: int | None) -> int:
    """Most tokens of a row: what was asked for, or the model's positions.

    Raises:
        ValueError: more than the model has, less than 2, or a model without a limit and nothing asked.
    """
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    positions = vars(config).get(name)
    if asked is None and positions is None:
        raise ValueError("the model does not say how many positions it has; give --length")
    length = positions if asked is None else asked
    if length < 2 or (positions is not None and length > positions):
        raise ValueError(f"--length ({length}) must be from 2 to the positions of the model ({positions})")
    return length


def read_classes(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[FineTuneData, list[str]]:
    """Encoded splits of a folder, and the names of the classes.

    Raises:
        ValueError: as `read_task` and `encode_sequences` say.
    """
    if len(options.data) > 1:
        raise ValueError(f"--data must be one folder for --task {options.task}, got {len(options.data)} sources")
    definition = TASKS[options.benchmark] if options.benchmark else None
    task = read_task(options.data[0], definition=definition, per_token=options.task == "token")
    special = options.special_tokens
    if special is None:
        special = not isinstance(tokenizer, HyenaNucleotideTokenizer)
    splits: dict[str, EncodedSequences] = {}
    cut: dict[str, int] = {}
    for name, examples in {"train": task.train, "validation": task.validation, "test": task.test}.items():
        splits[name], cut[name] = encode_sequences(
            examples, tokenizer, length=length, special_tokens=special, truncate=options.truncate
        )
    return FineTuneData(**splits, report=_report(task, splits, cut)), task.classes


def _report(task: TaskData, splits: dict[str, EncodedSequences], cut: dict[str, int]) -> dict[str, Any]:
    counts = splits["train"].label_counts(len(task.classes)).tolist()
    return {
        "classes": task.classes,
        "sequences": {name: len(rows) for name, rows in splits.items()},
        "longest": {name: int(rows.lengths.max()) for name, rows in splits.items()},
        "training_labels": counts,
        "truncated": cut,
        "test_sequences_in_training": task.leaked,
        "validation_from_training": task.held_out,
    }


def read_text(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, length: int) -> FineTuneData:
    """Packed rows of text or FASTA records; 5% of the documents are for validation.

    Raises:
        ValueError: as `read_documents` and `split_documents` say.
    """
    fasta = [source for source in options.data if suffix_of(Path(source)) in FASTA_SUFFIXES]
    others = [source for source in options.data if source not in fasta]
    documents = [
        Document(f"{source}:{header}", sequence) for source in fasta for header, sequence in read_fasta(Path(source))
    ]
    documents += read_documents(others) if others else []
    splits = split_documents(documents, validation=0.05, heldout=0)
    train, validation = (pack_documents(map(Encoder(tokenizer), part), length) for part in splits[:2])
    report = {
        "documents": {"train": train.num_documents, "validation": validation.num_documents},
        "tokens": {"train": train.num_tokens, "validation": validation.num_tokens},
    }
    return FineTuneData(train, validation.first(VALIDATION_ROWS), report=report)


def make_model(
    options: argparse.Namespace, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model with the head of the task; the head is new unless the checkpoint has one of its shape.

    Raises:
        ValueError: a model with fewer ids than the tokenizer, or pooling of a model that has no choice of it.
    """
    fields: dict[str, Any] = {}
    if options.task != "lm":
        fields = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    config = AutoConfig.from_pretrained(options.model, **fields)
    if options.pooling is not None:
        if "classifier_pooling" not in vars(config):
            raise ValueError(f"--pooling is for Hyena models; {config.model_type} has no choice of it")
        config.classifier_pooling = options.pooling
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"the model's vocab_size ({config.vocab_size}) must be at least the tokenizer's ({len(tokenizer)}); "
            "choose the tokenizer that belongs to the model (--tokenizer)"
        )
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if options.model.endswith(".json"):
        return HEADS[options.task].from_config(config)
    return HEADS[options.task].from_pretrained(options.model, config=config)


def make_recipe(options: argparse.Namespace, data: FineTuneData, num_classes: int) -> FineTuneRecipe:
    """The recipe that the command line asks for.

    Raises:
        ValueError: class weights that are no numbers, or another number than of classes.
    """
    stages = parse_stages(options.stages) if options.stages else (_only_stage(options),)
    metric = options.metric or (TASKS[options.benchmark].metric if options.benchmark else None)
    return FineTuneRecipe(
        task=options.task,
        stages=stages,
        learning_rate=options.learning_rate,
        filter_learning_rate=options.filter_learning_rate,
        weight_decay=options.weight_decay,
        warmup=options.warmup,
        class_weights=_class_weights(options.class_weights, data, num_classes),
        metric=metric or metrics_of(options.task)[0],
        patience=options.patience,
        evaluate_every=options.evaluate_every,
        tokens_per_pass=options.tokens_per_pass,
        bf16=options.bf16,
        seed=options.seed,
    )


def _only_stage(options: argparse.Namespace) -> Stage:
    return Stage(
        batch=32 if options.batch_size is None else options.batch_size,
        epochs=10 if options.epochs is None else options.epochs,
    )


def _class_weights(words: Sequence[str] | None, data: FineTuneData, num_classes: int) -> tuple[float, ...] | None:
    if not words:
        return None
    if list(words) == [BALANCED] and isinstance(data.train, EncodedSequences):
        return balanced_weights(data.train.label_counts(num_classes))
    try:
        weights = tuple(float(word) for word in words)
    except ValueError as error:
        raise ValueError(f"--class-weights must be {BALANCED} or numbers, got {' '.join(words)}") from error
    if len(weights) != num_classes:
        raise ValueError(f"--class-weights has {len(weights)} numbers for {num_classes} classes; give one for each")
    return weights


def summary(result: FineTuneResult) -> str:
    """What the command says at the end."""
    scores = {"validation": result.validation} | ({"test": result.test} if result.test else {})
    lines = [
        f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in of.items() if isinstance(value, float))
        for split, of in scores.items()
    ]
    ended = f"stopped early at step {result.steps}" if result.stopped_early else f"{result.steps} steps"
    lines.insert(
        0, f"{ended}, best by {result.metric} at step {result.best_step}; {result.train_seconds:,.0f} s of training"
    )
    return "\n".join([*lines, f"the model is in {result.model_dir}"])


if __name__ == "__main__":
    main()
