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

from .figures import Page
from .models import EXACT, FULL, TINY, make_model
from .runs import compare_runs, greedy, stamped


PROMPTS, NEW, STATES = (512, 2048), 256, 32
ALONE, AUTO, ASSISTED = "teacher, history", "teacher, auto", "teacher with assistant"


@dataclass(frozen=True)
class Pair:
    """A teacher, its distilled assistant, and what to call them on the page."""

    teacher: Any
    student: Any
    described: str


def make_pair(folder: Path | None, *, smoke: bool) -> Pair:
    """A trained model from a folder, or one of random weights; its filters distilled."""
    states = 8 if smoke else STATES
    if folder is None:
        teacher = make_model(EXACT, TINY if smoke else FULL, 64 if smoke else PROMPTS[-1] + NEW)
        described = "random weights, so acceptance says little about trained models"
    else:
        teacher = HyenaForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        teacher.generation_config.eos_token_id = None  # all generations are of one length
        teacher.config.eos_token_id = None
        described = f"trained, {folder.as_posix() if not folder.is_absolute() else folder.name}"
    student, report = distill(teacher, state_size=states)
    worst = max(float(one.filters.relative_l2.max()) for one in report.layers)
    size = teacher.num_parameters() / 1e6
    return Pair(
        teacher,
        student.eval().requires_grad_(False),
        f"{size:.1f}M parameters, {described}; {states} states, relative error of the worst filter {worst:.2g}",
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


def section(settings: Settings, folder: Path | None = None) -> Page:
    """Batch 1, greedy."""
    prompts, new = ((24,), 12) if settings.smoke else (PROMPTS, NEW)
    pair, rows = make_pair(folder, smoke=settings.smoke), []
    for prompt in tqdm(prompts, desc="assistant"):
        ids = torch.randint(pair.teacher.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
        found, drafted = accepted(pair, ids, new)
        same = [
            torch.equal(tokens_of(pair.teacher, ids, new, decode_cache=kind), drafted) for kind in ("history", "auto")
        ]
        one = compare_runs(settings, cases(pair, ids, new))
        calls = f"{found.teacher} / {found.drafted}"
        cells = (f"{one.milliseconds(ALONE) / new:.2f}", str(one.control), str(one.ratio(AUTO)))
        assisted = str(one.ratio(ASSISTED)), str(one.ratio(ASSISTED, AUTO))
        rows.append((prompt, *cells, *assisted, f"{found.share(new):.0%}", calls, "yes" if all(same) else "no"))
    head = [
        *("prompt", f"{ALONE}, ms a token", "it again (control)", AUTO, f"{ALONE} / assisted", f"{AUTO} / assisted"),
        *("accepted", "calls of teacher / assistant", "same tokens"),
    ]
    return [
        "## A distilled model as assistant",
        f"{pair.described}. Batch 1, greedy, {new} new tokens, CPU time of whole generations, prefill of both models "
        f"included; ratios are over the teacher alone. Accepted are drafted tokens that the teacher kept.",
        "",
        *markdown_table(head, rows),
    ], {}
