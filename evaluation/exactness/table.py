"""Ask every model every question, and keep the answers as plain data.

results = fill(["Llama", "Hyena order 2"], all_cases())
results["models"]["Llama"]["cells"]["left padding, up to 90%"]["good"]
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from evaluation.exactness.cases import Case, Cell, logit_cases
from evaluation.exactness.decoding import token_cases
from evaluation.exactness.models import DTYPES, FLOOR, LAYERS, MODELS, VOCABULARY, WIDTH, Subject, arithmetic


# what a model raises when it cannot do what a case asks: an answer, not a fault of the table
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def all_cases(*, smoke: bool = False) -> list[Case]:
    """The rows of the table."""
    return [*logit_cases(smoke=smoke), *token_cases(smoke=smoke)]


def answer(case: Case, subject: Subject) -> Cell:
    """A model's cell; what it raises becomes the reason."""
    try:
        with warnings.catch_warnings(), torch.no_grad(), arithmetic(subject.dtype):
            warnings.simplefilter("ignore")
            return case.ask(subject)
    except REFUSALS as error:
        first = (str(error).splitlines() or [""])[0]
        return Cell(good=False, text="refused", reason=f"{type(error).__name__}: {first}")


def answers(subject: Subject, cases: Sequence[Case]) -> dict[str, Any]:
    """One column: a model's cells, its size and its own error."""
    with MODELS[subject.name].context():
        cells = {case.title: asdict(answer(case, subject)) for case in tqdm(cases, desc=subject.name, leave=False)}
    return {
        "ours": subject.ours,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "own_error": subject.noise(),
        "good": sum(cell["good"] for cell in cells.values()),
        "cells": cells,
    }


def fill(names: Sequence[str], cases: Sequence[Case], *, dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    """The table.

    Args:
        names: columns, keys of `MODELS`.
        cases: rows.
        dtype: a key of `DTYPES`.
        seed: of the weights.

    Returns:
        `dtype`, `seed`, `sizes`, `floor` (the bound of a model without rounding error of its own) and `models`: by
        name the dict of `answers`.
    """
    return {
        "dtype": dtype,
        "seed": seed,
        "sizes": {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS},
        "floor": FLOOR[DTYPES[dtype]],
        "models": {name: answers(Subject(name, DTYPES[dtype], seed=seed), cases) for name in names},
    }
