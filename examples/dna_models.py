# SPDX-License-Identifier: Apache-2.0
"""The models of the DNA example, and their training: a Hyena on growing lengths, a Llama of equal size beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, set_seed

from hyena_hf import HyenaConfig
from hyena_hf.tokenization_nucleotide import HyenaNucleotideTokenizer
from training.data import PackedRows, pack_documents
from training.demo_models import count_config
from training.genomes import encode, reverse_complement
from training.recipe import Recipe, TrainingResult, train


@dataclass(frozen=True)
class TrainingStage:
    """Rows of one length: sequence-length warm-up is a list of them."""

    length: int
    batch_size: int
    steps: int
    learning_rate: float

    @property
    def tokens(self) -> int:
        """Tokens that the stage reads."""
        return self.length * self.batch_size * self.steps


@dataclass(frozen=True)
class Shape:
    """Width and depth that both models share; Llama's MLP width follows from the number of parameters."""

    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    intermediate_size: int = 128
    positions: int = 131_074  # over which the time of the long filters runs
    short_taps: int = 128  # of the filters of every other layer


def hyena_config(shape: Shape) -> HyenaConfig:
    """Explicit filters of `short_taps` and implicit ones over all positions, in turn; filters as HyenaDNA's otherwise.

    Implicit filters alone cannot tell neighbouring bases apart here: their time moves by 1 / 131,074 a base.
    """
    explicit = [layer % 2 == 0 for layer in range(shape.num_hidden_layers)]
    return HyenaConfig(
        **_special_ids(),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.positions,
        filter_types=["explicit" if short else "implicit" for short in explicit],
        filter_length=[shape.short_taps if short else shape.positions for short in explicit],
        filter_num_bands=2,
        sine_frequency=10.0,
        short_conv_kernel=5,
        gated_mlp=True,
        hidden_act="silu",
        norm_type="rms_norm",
        initializer_range=0.06,  # the usual 0.02 suits widths near 1,000
    )


def llama_config(shape: Shape) -> LlamaConfig:
    """Llama with a tied embedding and the number of parameters of the Hyena, as near as its MLP width allows."""
    target = count_config(hyena_config(shape))
    at_one, at_two = (count_config(_llama_config(shape, width)) for width in (1, 2))
    return _llama_config(shape, max(1, round(1 + (target - at_one) / (at_two - at_one))))


def _llama_config(shape: Shape, intermediate_size: int) -> LlamaConfig:
    return LlamaConfig(
        **_special_ids(),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=shape.positions,
        initializer_range=0.06,
        tie_word_embeddings=True,
    )


def _special_ids() -> dict[str, Any]:
    tokenizer = HyenaNucleotideTokenizer()
    return dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def both_strands(sequence: bytes, length: int) -> PackedRows:
    """Rows of `length` bases of a sequence and of its reverse complement."""
    return pack_documents([encode(sequence), encode(reverse_complement(sequence))], length)


def train_in_stages(
    name: str,
    config: PreTrainedConfig,
    stages: Sequence[TrainingStage],
    sequences: tuple[bytes, bytes],
    *,
    output: Path,
    seed: int,
) -> list[dict[str, Any]]:
    """Train a model stage by stage, or go on with it; each stage begins with the weights of the one before.

    Args:
        name: of the model; stage folders are `OUTPUT/NAME-LENGTH`.
        config: of the model.
        stages: lengths, batches and steps.
        sequences: training and validation sequence, one strand.
        output: folder of the example.
        seed: of weights and of the order of rows.

    Returns:
        What each stage cost and gave; the trained model is in `model_dir`.
    """
    tokenizer = HyenaNucleotideTokenizer(model_max_length=stages[-1].length)
    done: list[dict[str, Any]] = []
    for number, stage in enumerate(stages):
        set_seed(seed)
        model = _begin(config, done)
        train_rows, validation_rows = (both_strands(sequence, stage.length) for sequence in sequences)
        interval = max(10, stage.steps // 100 * 10)
        recipe = Recipe(
            steps=stage.steps,
            batch_size=stage.batch_size,
            learning_rate=stage.learning_rate,
            seed=seed + number,
            log_every=max(1, interval // 10),
            save_every=max(1, interval // 10) * 10,
            evaluate_every=interval,
        )
        print(f"{name}: {stage.steps} steps of {stage.batch_size} x {stage.length:,} bases", flush=True)
        result = train(
            model,
            train_rows,
            validation_rows.first(max(1, 65_536 // stage.length)),
            output_dir=output / f"{name}-{stage.length}",
            recipe=recipe,
            tokenizer=tokenizer,
        )
        done.append(_describe(stage, result, model))
    return done


def _begin(config: PreTrainedConfig, done: Sequence[dict[str, Any]]) -> PreTrainedModel:
    if done:
        return AutoModelForCausalLM.from_pretrained(done[-1]["model_dir"])
    return AutoModelForCausalLM.from_config(config)


def _describe(stage: TrainingStage, result: TrainingResult, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "length": stage.length,
        "batch_size": stage.batch_size,
        "steps": stage.steps,
        "tokens": stage.tokens,
        "learning_rate": stage.learning_rate,
        "parameters": model.num_parameters(only_trainable=True),
        "train_seconds": result.train_seconds,
        "tokens_per_second": result.tokens_per_second,
        "loss_curve": [list(point) for point in result.loss_curve],
        "validation_curve": [list(point) for point in result.validation_curve],
        "model_dir": result.model_dir,
    }
