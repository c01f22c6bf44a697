"""Section `assistant`: a distilled model that drafts for the model it was distilled from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import markdown_table
from benchmarks.timing import Settings
from hyena_hf import HyenaForCausalLM
from hyena_hf.distillation import distill
from hyena_hf.tokenization_byte import HyenaByteTokenizer
from training.data import module_name, split_documents, stdlib_documents

from .figures import Page
from .models import EXACT, FULL, TINY, make_model, random_tokens
from .runs import compare_runs, greedy, stamped


PROMPTS, NEW, STATES = (512, 2048), 256, 32
DRAFTS = (3, 8)  # tokens that the assistant proposes at a time, whatever it thinks of them
ALONE, AUTO, ASSISTED = "teacher, history", "teacher, auto", "teacher with assistant"


@dataclass(frozen=True)
class Pair:
    """A teacher, its distilled assistant, what to call them on the page, and tokens (1, L) to begin with."""

    teacher: Any
    student: Any
    described: str
    tokens: Tensor


def held_out_bytes() -> Tensor:
    """A module of Python's library on which the models of the demo have not been trained, (1, L)."""
    documents = split_documents(stdlib_documents(), group=module_name).heldout
    text = max((document.text for document in documents), key=len)
    return HyenaByteTokenizer()(text, return_tensors="pt")["input_ids"]


def make_pair(folder: Path | None, *, smoke: bool) -> Pair:
    """A trained model of bytes from a folder, or one of random weights; its filters distilled."""
    states = 8 if smoke else STATES
    if folder is None:
        scale, length = (TINY, 64) if smoke else (FULL, PROMPTS[-1] + NEW)
        teacher, tokens = make_model(EXACT, scale, length), random_tokens(scale, 1, length)
        described = "random weights, so acceptance says little about trained models"
    else:
        teacher = HyenaForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        teacher.generation_config.eos_token_id = None  # all generations are of one length
        teacher.config.eos_token_id = None
        tokens = held_out_bytes()
        described = f"trained on bytes ({folder.name if folder.is_absolute() else folder.as_posix()}), held-out text"
    student, report = distill(teacher, state_size=states)
    worst = max(float(one.filters.relative_l2.max()) for one in report.layers)
    size = teacher.num_parameters() / 1e6
    return Pair(
        teacher,
        student.eval().requires_grad_(False),
        f"{size:.1f}M parameters, {described}; {states} states, relative error of the worst filter {worst:.2g}",
        tokens,
    )


@dataclass
class Acceptance:
    """Calls of both models in one assisted generation."""

    teacher: int = 0
    drafted: int = 0

    def count(self, name: str, *_: Any) -> None:
        """A forward hook."""
        setattr(self, name, getattr(self, name) + 1)

    def share(self, new: int) -> float:
        """Drafted tokens that the teacher accepted; it adds one of its own in every call."""
        return max(new - self.teacher, 0) / max(self.drafted, 1)


def tokens_of(model: Any, ids: Tensor, new: int, **options: Any) -> Tensor:
    """All of a generation."""
    decode_cache = options.pop("decode_cache", None)
    return model.generate(ids, generation_config=greedy(new, decode_cache=decode_cache), **options)


def accepted(pair: Pair, ids: Tensor, new: int) -> tuple[Acceptance, Tensor]:
    """What the teacher thought of its assistant, and the tokens."""
    found = Acceptance()
    hooks = [
        pair.teacher.register_forward_hook(partial(found.count, "teacher")),
        pair.student.register_forward_hook(partial(found.count, "drafted")),
    ]
    tokens = tokens_of(pair.teacher, ids, new, assistant_model=pair.student)
    for hook in hooks:
        hook.remove()
    return found, tokens


def cases(pair: Pair, ids: Tensor, new: int) -> dict[str, Callable[[], float]]:
    """CPU seconds of whole generations."""
    teacher = pair.teacher
    return {
        ALONE: lambda: stamped(teacher, ids, greedy(new, decode_cache="history")).total,
        AUTO: lambda: stamped(teacher, ids, greedy(new, decode_cache="auto")).total,
        ASSISTED: lambda: stamped(teacher, ids, greedy(new), assistant_model=pair.student).total,
    }


def row(settings: Settings, pair: Pair, prompt: int, drafts: int, new: int) -> tuple[object, ...]:
    """One prompt, and so many drafted tokens for each call of the teacher."""
    config, ids = pair.student.generation_config, pair.tokens[:, :prompt]
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = drafts, "constant"
    config.assistant_confidence_threshold = 0.0
    found, drafted = accepted(pair, ids, new)
    alone = (tokens_of(pair.teacher, ids, new, decode_cache=kind) for kind in ("history", "auto"))
    same = all(torch.equal(tokens, drafted) for tokens in alone)
    one = compare_runs(settings, cases(pair, ids, new))
    ratios = one.control, one.ratio(AUTO), one.ratio(ASSISTED), one.ratio(ASSISTED, AUTO)
    calls = f"{found.teacher} / {found.drafted}"
    time = f"{one.milliseconds(ALONE) / new:.2f}"
    return prompt, drafts, time, *map(str, ratios), f"{found.share(new):.0%}", calls, "yes" if same else "no"


def section(settings: Settings, folder: Path | None = None) -> Page:
    """Batch 1, greedy."""
    prompts, new = ((24,), 12) if settings.smoke else (PROMPTS, NEW)
    pair = make_pair(folder, smoke=settings.smoke)
    places = [(prompt, drafts) for prompt in prompts for drafts in DRAFTS]
    rows = [row(settings, pair, *place, new) for place in tqdm(places, desc="assistant")]
    head = [
        *("prompt", "drafts", f"{ALONE}, ms a token", "it again (control)", f"{ALONE} / auto"),
        *(f"{ALONE} / assisted", f"{AUTO} / assisted", "accepted", "calls of teacher / assistant", "same tokens"),
    ]
    return [
        "## A distilled model as assistant",
        f"{pair.described}. Batch 1, greedy, {new} new tokens, CPU time of whole generations, prefill of both models "
        f"included. The assistant drafts a fixed number of tokens for each call of its teacher; accepted is the share "
        f"that the teacher kept.",
        "",
        *markdown_table(head, rows),
    ], {}
