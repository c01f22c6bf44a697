"""Converted models beside the softmax model that they come from: exactness, drift, cache, throughput, transfer.

    python -m benchmarks.bench_linear_attention                    (--smoke: a tiny random model, 2 rounds)
    python -m benchmarks.bench_linear_attention --model FOLDER     (a Llama that is there already)
    python -m benchmarks.bench_linear_attention --only transfer    (that section alone; the others stay on the page)
    python -m benchmarks.bench_linear_attention --trained FOLDER   (exactness of converted, trained models as well)

CPU time of one thread, float32, shuffled rounds. Sections and what they take:

    exactness   2 min   pieces, padding, packing and beams against the whole sequence alone
    drift       1 min   the state behind 65,536 single tokens against float64, in several dtypes
    decoding    6 min   a step and the bytes of a cache over context; 14 GB of memory
    prefill     2 min   a prompt at once
    transfer    6 min   a step of attention transfer over a forward of the teacher, and its memory
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from benchmarks.generation.caches import Decoder, bytes_per_sequence, feed, tokens_for
from benchmarks.generation.figures import Page, lines_plot, reached
from benchmarks.report import markdown_table
from benchmarks.timing import CONTROL, Call, Comparison, Settings, free_memory, ratio_table, run_sections
from evaluation.exactness.cases import feed as feed_pieces
from evaluation.exactness.cases import padded_left, padded_right
from evaluation.exactness.models import VOCABULARY, call, relative_error, scale
from hyena_hf.linear_attention import attention_transfer, convert_attention
from hyena_hf.linear_attention.transfer import Loss
from hyena_hf.ops.linear_attention import LinearState, causal_linear_attention, empty_state, fold, with_ones


PUBLISHED = "HuggingFaceTB/SmolLM2-135M-Instruct"
WINDOW = 64
WAYS: Mapping[str, dict[str, Any]] = {"linear": {}, f"linear, window {WINDOW}": {"window": WINDOW}}
BOUND = 1e-5  # of logits, relative to max(1, largest)
OWN = "own float32 error, against float64"

LENGTHS, PIECES, NEW = (90, 70, 33, 7), (1, 14, 3, 22), 16  # exactness

TOKENS, DRIFT_BOUND = 65_536, 1e-4  # drift
CHECKPOINTS = (1024, 4096, 16_384, 65_536)

DYNAMIC, STATIC = "softmax, DynamicCache", "softmax, StaticCache"  # decoding
CONTEXTS = {1: (256, 1024, 4096, 16_384, 65_536), 16: (256, 1024, 4096, 16_384)}
ROOM = 8
MEMORY = 14.5e9  # bytes that a cache may take, with the layer that is being copied
GOAL, GOAL_AT = 5.0, (16, 16_384)

PROMPTS = (512, 2048, 8192)  # prefill

TRANSFER_LENGTHS, TRANSFER_LAYERS = (512, 1024), 2
TRANSFER_GOAL = 2.5
MEMORY_LAYERS = (2, 30)


class Source(NamedTuple):
    """The softmax model, a folder or a name on the hub (None: a tiny random one), and folders of it linearised."""

    name: str | None
    trained: tuple[str, ...] = ()

    def model(self, layers: int | None = None) -> Any:
        """The language model in float32, or the first of its layers with the same head."""
        if self.name is None:
            torch.manual_seed(0)
            sizes: dict[str, Any] = {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
            config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes, initializer_range=0.2)
            base = LlamaForCausalLM(config).eval()
        else:
            base = AutoModelForCausalLM.from_pretrained(self.name, dtype=torch.float32).eval()
        return base if layers is None else shortened(base, layers)

    def text(self, count: int) -> Tensor:
        """So many tokens (1, n) of this repository's own prose, repeated; random ones of a random model."""
        if self.name is None:
            return torch.randint(VOCABULARY, (1, count), generator=torch.Generator().manual_seed(0))
        prose = "".join((Path(__file__).parents[1] / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
        ids = AutoTokenizer.from_pretrained(self.name)(prose, return_tensors="pt", verbose=False).input_ids
        return ids.repeat(1, -(-count // ids.shape[1]))[:, :count]

    def __str__(self) -> str:
        return "a tiny random Llama" if self.name is None else Path(self.name).name


def shortened(base: Any, layers: int) -> Any:
    """The first layers of a model, and its embedding and head: the same tensors."""
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    return shared(type(base)(config), base)


def shared(model: Any, base: Any) -> Any:
    """A model with the tensors of another one in the place of its own."""
    model.load_state_dict(base.state_dict(), strict=False, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def converted(base: Any, **options: Any) -> Any:
    """`convert_attention`, the tensors of the teacher shared."""
    return shared(convert_attention(base, **options), base)


def trained_model(folder: str) -> Any:
    """A converted model from its folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


# exactness


def situations(model: Any, rows: list[Tensor]) -> dict[str, list[Tensor]]:
    """Logits of every row in each way to lay out and to feed a batch."""
    left, right = padded_left(rows), padded_right(rows)

    def real(logits: Tensor, mask: Tensor) -> list[Tensor]:
        return [logits[row, mask[row].bool()] for row in range(len(rows))]

    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = call(model, torch.cat(rows)[None], position_ids=positions)[0]
    return {
        "a batch, padded on the left": real(call(model, *left), left[1]),
        "a batch, padded on the right": real(call(model, *right), right[1]),
        "packed documents": list(packed.split([len(row) for row in rows])),
        "pieces of 1, 14, 3, 22 and the rest, padded on the left": real(feed_pieces(model, *left, PIECES), left[1]),
        "token by token, padded on the left": real(feed_pieces(model, *left, [1] * left[0].shape[1]), left[1]),
    }


def beams(model: Any, rows: list[Tensor], new: int) -> str:
    """Whether three beams of a padded batch with a cache are those without one."""
    ids, mask = padded_left(rows)
    options: dict[str, Any] = {
        "num_beams": 3,
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "pad_token_id": 0,
    }
    options["repetition_penalty"] = 2.0  # models that were not trained since their conversion repeat one token
    found = [model.generate(ids, attention_mask=mask, use_cache=kept, **options) for kept in (True, False)]
    different = len(set(found[0][:, ids.shape[1] :].flatten().tolist()))
    return f"{'identical' if found[0].equal(found[1]) else 'different'} ({different} different tokens)"


@torch.no_grad()
def exactness(settings: Settings, source: Source) -> Page:
    """Logits of a sequence in every situation against the same sequence alone, in one call, without a cache."""
    base = source.model()
    lengths, new = ((12, 7, 3), 4) if settings.smoke else (LENGTHS, NEW)
    rows = list(source.text(sum(lengths))[0].split(lengths))
    errors: dict[str, list[str]] = {}
    makers: dict[str, Callable[[], Any]] = {
        f"{way}, a random rotation": partial(converted, base, **options, init="random")
        for way, options in WAYS.items()
    }
    makers |= {f"trained: {Path(folder).name}": partial(trained_model, folder) for folder in source.trained}
    for make in tqdm(makers.values(), desc="exactness"):
        model = make()
        truths = [call(model, row[None])[0] for row in rows]
        finer = copy.deepcopy(model).double()
        exact = [call(finer, row[None])[0] for row in rows]
        found = {**situations(model, rows), OWN: exact}
        for name, logits in found.items():
            pairs = [
                ((ours.double() - truth.double()).abs().max().item(), scale(truth))
                for ours, truth in zip(logits, truths, strict=True)
            ]
            worst, relative = max(error for error, _ in pairs), max(error / size for error, size in pairs)
            mark = "" if name == OWN else f", {'within' if relative <= BOUND else 'above'} the bound"
            errors.setdefault(name, []).append(f"{relative:.1e} ({worst:.1e}{mark})")
        batch = padded_left(rows)
        steps = feed_pieces(finer, *batch, [1] * batch[0].shape[1])
        pairs = zip(steps, batch[1].bool(), exact, strict=True)
        errors.setdefault("token by token, all in float64", []).append(
            f"{max(relative_error(logits[real], truth) for logits, real, truth in pairs):.1e}"
        )
        errors.setdefault("three beams with a cache, against none", []).append(beams(model, rows[1:3], new))
    lines = [
        "## Exactness",
        f"Weights of {source}, feature maps a random rotation of every head or trained, all in float32; text of "
        f"{', '.join(map(str, lengths))} tokens. Largest error of a row's logits against the row alone in one call "
        f"without a cache, relative to max(1, largest logit); in brackets absolute. Bound: {BOUND:.0e} relative. "
        f"Beams: {new} tokens of two rows, padded on the left. Small random models of three families stand in the "
        f"table of `python -m evaluation.exactness`, with more situations.",
        "",
        *markdown_table(["situation", *makers], [(name, *cells) for name, cells in errors.items()]),
    ]
    return lines, {}


# drift

Keep = Callable[[LinearState], LinearState]


def normaliser_in_bfloat16(state: LinearState) -> LinearState:
    """A state whose last column, the sum of features, is stored in bfloat16."""
    sums = state.sums.clone()
    sums[..., -1] = sums[..., -1].bfloat16().to(sums.dtype)
    return state._replace(sums=sums)


KEEPS: Mapping[str, tuple[bool, Keep]] = {
    "float32 with a carry (ours)": (True, lambda state: state),
    "float32 without a carry": (False, lambda state: state),
    "normaliser in bfloat16": (False, normaliser_in_bfloat16),
    "sums in bfloat16": (False, lambda state: state._replace(sums=state.sums.bfloat16().to(state.sums.dtype))),
}


class Stream(NamedTuple):
    """Features of queries (1, H, n, F) and keys (1, K, n, F), or their logarithms where `log`; values (1, K, n, P)."""

    log: bool
    q: Tensor
    k: Tensor
    v: Tensor


Found = dict[int, tuple[Tensor, LinearState]]  # output of the last token and the state, by number of tokens


@torch.no_grad()
def first_layer(source: Source, count: int, feature_map: str) -> Stream:
    """What the first layer sees of a text."""
    model = converted(source.model(1), feature_map=feature_map)
    found: list[Tensor] = []

    def take(layer: Any, q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None) -> Tensor:  # noqa: ARG001
        found.extend((*layer.features(q, k), v))
        return torch.zeros_like(q)

    attention = model.model.layers[0].self_attn.linear_attention
    attention.replacement = take
    model.model(source.text(count), use_cache=False)
    q, k, v = found
    return Stream(attention.q_map.is_log, q, k, v)


def truth_at(stream: Stream, places: Iterable[int]) -> Found:
    """Outputs and states in float64, in a few calls."""
    found: Found = {}
    state, done = None, 0
    for place in places:
        q, k, v = (x[:, :, done:place].double() for x in stream[1:])
        y, state = causal_linear_attention(q, k, v, log_features=stream.log, state=state)
        found[place], done = (y[:, :, -1:], state), place
    return found


def token_by_token(stream: Stream, places: Iterable[int], carried: bool, keep: Keep) -> Found:
    """The same with one token a call, and a state that is stored between calls as `keep` does."""
    log, q, k, v = stream
    state = empty_state(k, v.shape[-1], log_features=log)
    state = state if carried else state._replace(carry=None)
    found: Found = {}
    values = with_ones(v)
    for t in range(max(places)):
        at = slice(t, t + 1)
        if t + 1 in places:
            y, state = causal_linear_attention(q[:, :, at], k[:, :, at], v[:, :, at], log_features=log, state=state)
            found[t + 1] = y, state
        else:
            state = fold(state, k[:, :, at], values[:, :, at])
        state = keep(state)
    return found


@torch.no_grad()
def drift(settings: Settings, source: Source) -> Page:
    """Outputs and normalisers behind single tokens."""
    places = (16, 48) if settings.smoke else CHECKPOINTS
    streams = {}
    for name in ("hedgehog", "hedgehog_softmax"):
        streams[f"{name}, keys of a text"] = first_layer(source, places[-1], name)
    last = streams["hedgehog_softmax, keys of a text"]
    streams["hedgehog_softmax, one key again and again"] = last._replace(k=last.k[:, :, 3:4].expand_as(last.k))
    rows, worst = [], 0.0
    for stream, operands in tqdm(streams.items(), desc="drift"):
        truth = truth_at(operands, places)
        for name, (carried, keep) in KEEPS.items():
            found = token_by_token(operands, places, carried, keep)
            errors = [((found[p][0] - truth[p][0]).abs().max() / truth[p][0].abs().max()).item() for p in places]
            ratio = found[places[-1]][1].sums[..., -1].sum() / truth[places[-1]][1].sums[..., -1].sum()
            rows.append((stream, name, *(f"{error:.1e}" for error in errors), f"{ratio.item():.4f}"))
            worst = max(worst, *errors) if carried else worst
    lines = [
        "## Drift of the state",
        f"Queries, keys and values of the first layer of {source} behind a text, one token a call; the same features "
        f"in float64, in one call, are the truth. Largest error of an output over the largest output, after so many "
        f"tokens; and the sum of the normaliser over the true one after the last. In bfloat16 means: stored so "
        f"between calls, as published caches do; all arithmetic is float32.",
        "",
        *markdown_table(["stream", "state", *map(str, places), "normaliser"], rows),
        "",
        f"Goal for ours: {DRIFT_BOUND:.0e} at {places[-1]} tokens; largest {worst:.1e}, reached: "
        f"{'yes' if worst <= DRIFT_BOUND else 'no'}.",
    ]
    return lines, {}


# decoding


class SoftmaxDecoder:
    """Steps behind a context of random keys and values; each takes its token back, without a second copy of anything.

    Args:
        model: The softmax model.
        batch, context: Of the cache.
        static: Whether the cache has a fixed size.
    """

    def __init__(self, model: Any, batch: int, context: int, *, static: bool) -> None:
        self.model, self.context, self.static = model, context, static
        self.token = tokens_for(model, batch, 1)
        if static:
            self.cache: Cache = StaticCache(config=model.config, max_cache_len=context + ROOM)
        else:
            self.cache = DynamicCache(config=model.config)
        feed(model, self.cache, self.token)
        first: Any = self.cache.layers[0]
        drawn = torch.randn(batch, first.keys.shape[1], context, first.keys.shape[3])
        for layer in self.cache.layers:
            self._fill(layer, drawn)

    def _fill(self, layer: Any, drawn: Tensor) -> None:
        if self.static:
            layer.keys[:, :, : self.context], layer.values[:, :, : self.context] = drawn, drawn
            layer.cumulative_length.fill_(self.context)
        else:
            layer.keys, layer.values = drawn.clone(), drawn.clone()

    def run(self) -> None:
        """One token of every row."""
        feed(self.model, self.cache, self.token)
        for layer in self.cache.layers:
            known: Any = layer
            if self.static:
                known.cumulative_length.fill_(self.context)
            else:
                known.keys, known.values = known.keys[:, :, : self.context], known.values[:, :, : self.context]


def linear_decoder(model: Any, batch: int, context: int) -> Decoder:
    """Steps behind a state and a window; they do not depend on what was read, hence few tokens were."""
    cache = DynamicCache(config=model.config)
    feed(model, cache, tokens_for(model, batch, min(context, WINDOW + 8)))
    for layer in cache.layers:
        known: Any = layer
        known.length = known.tokens = known.histories[0].count = context
    return Decoder(model, cache)


def softmax_bytes(config: Any, context: int) -> int:
    """Keys and values of a sequence in float32."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * width * context


def fits(config: Any, batch: int, context: int) -> bool:
    """Whether a softmax cache has its place, with a copy of a layer for all of its query heads."""
    copies = config.num_attention_heads / config.num_key_value_heads / config.num_hidden_layers
    needed = batch * softmax_bytes(config, context) * (1 + copies)
    return needed < min(MEMORY, 0.9 * free_memory())


def decode_cases(base: Any, models: Mapping[str, Any], batch: int, context: int, kind: str) -> dict[str, Any]:
    """Decoders of a row of the table; that of the softmax model comes first."""
    theirs = SoftmaxDecoder(base, batch, context, static=kind == STATIC)
    return {kind: theirs, **{name: linear_decoder(model, batch, context) for name, model in models.items()}}


def decoding(settings: Settings, source: Source) -> Page:
    """One step by batch, context and kind of cache."""
    base = source.model().requires_grad_(False)
    models = {name: converted(base, **options) for name, options in WAYS.items()}
    contexts = {1: (24, 80), 2: (24,)} if settings.smoke else CONTEXTS
    found: dict[str, dict[tuple, Comparison]] = {DYNAMIC: {}, STATIC: {}}
    held: dict[int, dict[str, int]] = {}
    for kind in found:
        for batch, context in tqdm([(b, c) for b, several in contexts.items() for c in several], desc=kind):
            if not fits(base.config, batch, context):
                continue
            decoders = decode_cases(base, models, batch, context, kind)
            found[kind][batch, context] = settings.compare({name: one.run for name, one in decoders.items()})
            if kind == DYNAMIC and batch == 1:
                held[context] = {name: bytes_per_sequence(one.cache) for name, one in decoders.items()}
            del decoders
    lines = [
        "## Decoding",
        f"One forward call for one new token of every row of {source}, the head included, transformers' own sdpa. "
        f"Contexts are random keys and values. With a growing cache every step copies keys and values; a static one "
        f"has room for {ROOM} tokens more and masks. What would not have fitted into the memory that was free is left "
        f"out.",
        "",
        "Bytes of the cache of one sequence:",
        "",
        *markdown_table(
            ["context", *WAYS, "softmax"], [(c, *(one[n] for n in (*WAYS, DYNAMIC))) for c, one in held.items()]
        ),
    ]
    for kind, comparisons in found.items():
        lines += ["", f"Time of {kind}, over that of a converted model:", ""]
        lines += ratio_table(["batch", "context"], comparisons, means=False)
    lines += ["", *throughput_lines(found), "", *goal_lines(found, GOAL_AT if not settings.smoke else (2, 24))]
    return lines, {
        "throughput": lines_plot(
            throughput(found, max(contexts)), f"Decoding, batch {max(contexts)}", "tokens of context", "tokens/s"
        ),
    }


def throughput(found: Mapping[str, Mapping[tuple, Comparison]], batch: int) -> dict[str, dict[int, float]]:
    """Tokens a second by case and context; those of converted models from the comparison with a growing cache."""
    rates: dict[str, dict[int, float]] = {}
    for kind, comparisons in found.items():
        for (rows, context), one in comparisons.items():
            for name in (kind, *WAYS) if kind == DYNAMIC else (kind,):
                if rows == batch:
                    rates.setdefault(name, {})[context] = rows / one.milliseconds(name) * 1e3
    return rates


def throughput_lines(found: Mapping[str, Mapping[tuple, Comparison]]) -> list[str]:
    """A table of them."""
    batches = dict.fromkeys(batch for batch, _ in found[DYNAMIC])
    rows = []
    for batch in batches:
        rates = throughput(found, batch)
        contexts = sorted({context for known in rates.values() for context in known})
        rows += [
            (
                batch,
                context,
                *(
                    f"{rates[name][context]:.1f}" if context in rates.get(name, {}) else "-"
                    for name in (DYNAMIC, STATIC, *WAYS)
                ),
            )
            for context in contexts
        ]
    return ["Tokens a second:", "", *markdown_table(["batch", "context", DYNAMIC, STATIC, *WAYS], rows)]


def goal_lines(found: Mapping[str, Mapping[tuple, Comparison]], at: tuple[int, int]) -> list[str]:
    """What converted models reach against either cache."""
    rows = []
    for kind, comparisons in found.items():
        for name in WAYS:
            if at in comparisons:
                ratio = comparisons[at].ratio(name)
                rows.append((kind, name, str(ratio), GOAL, reached(ratio, GOAL)))
    if not rows:
        return [f"The goal stands at batch {at[0]}, context {at[1]}, for which there was not the memory."]
    head = ["theirs", "ours", "ratio", "goal", "reached"]
    return [f"Goal at batch {at[0]}, context {at[1]}:", "", *markdown_table(head, rows)]


# prefill


def prefill(settings: Settings, source: Source) -> Page:
    """The first layer over a prompt, with a cache."""
    base = source.model(1).requires_grad_(False)
    models = {"softmax": base, **{name: converted(base, **options) for name, options in WAYS.items()}}
    found = {}
    for length in tqdm((24, 96) if settings.smoke else PROMPTS, desc="prefill"):
        ids = source.text(length)

        def run(model: Any, ids: Tensor = ids) -> None:
            feed(model, DynamicCache(config=model.config), ids)

        found[(length,)] = settings.compare({name: partial(run, model) for name, model in models.items()})
    lines = [
        "## Prefill",
        f"A prompt of one row at once, the first layer of {source} and the head on the last token, an empty "
        f"DynamicCache. Time of the softmax model over that of a converted one:",
        "",
        *ratio_table(["tokens"], found, means=False),
    ]
    return lines, {}


# transfer


def forward(base: Any, ids: Tensor) -> None:
    """The teacher alone, without its head, as a step of transfer runs it."""
    with torch.no_grad():
        base.base_model(ids, use_cache=False)


def transfer_cases(base: Any, ids: Tensor, losses: Iterable[Loss], maps: Iterable[str]) -> dict[str, Call]:
    """A forward of the teacher, and one step for every loss, window and map."""
    cases: dict[str, Call] = {"teacher's forward": partial(forward, base, ids)}
    for feature_map in maps:
        for options in WAYS.values():
            model = converted(base, feature_map=feature_map, **options)
            for loss in losses:
                name = f"{feature_map}, window {options.get('window', 0)}, {loss}"
                cases[name] = partial(attention_transfer, model, [ids], steps=1, loss=loss)
    return cases


def graph_step(model: Any, ids: Tensor) -> None:
    """What it would take to train the maps by the outputs of the model: a graph through the network."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".linear_attention." in name)
    model.base_model(ids, use_cache=False).last_hidden_state.square().mean().backward()


def prepare_memory(name: str | None, layers: int, kind: str, length: int) -> Call:
    """A call whose memory counts, after a small one that loads what a first call loads."""
    source = Source(name)
    base = source.model(layers).requires_grad_(False)
    model = converted(base, window=WINDOW)
    ids = source.text(length)
    calls: dict[str, Callable[[Tensor], object]] = {
        "teacher's forward": partial(forward, base),
        "step of transfer": lambda ids: attention_transfer(model, [ids], steps=1),
        "graph through the network": partial(graph_step, model),
    }
    calls[kind](ids[:, :8])
    return partial(calls[kind], ids)


def times_over(found: Mapping[int, Comparison]) -> list[str]:
    """Time of a step over that of a forward of the teacher, and whether it is cheap enough at all lengths."""
    rows, first = [], next(iter(found.values()))
    for name in first.seconds:
        if name == first.base:
            continue
        # comparisons divide the base by a case; this is the inverse
        ratios = [one.ratio(first.base, name) if name in one.seconds else None for one in found.values()]
        cheap = all(ratio.median <= TRANSFER_GOAL for ratio in ratios if ratio is not None)
        shown = f"{first.base} again ({CONTROL})" if name == CONTROL else name
        mark = "-" if name == CONTROL else "yes" if cheap else "no"
        rows.append((shown, *("-" if ratio is None else str(ratio) for ratio in ratios), mark))
    return markdown_table(["step", *(f"{n} tokens" for n in found), f"{TRANSFER_GOAL} or less"], rows)


def transfer(settings: Settings, source: Source) -> Page:
    """Time of a step by loss, and memory by the number of layers."""
    lengths, counts = ((16, 24), (1, 2)) if settings.smoke else (TRANSFER_LENGTHS, MEMORY_LAYERS)
    base = source.model(TRANSFER_LAYERS).requires_grad_(False)
    losses: tuple[Loss, ...] = ("weights", "outputs", "both")
    found = {}
    for length in tqdm(lengths, desc="transfer"):
        some = losses if length == lengths[0] else losses[:1]
        cases = transfer_cases(base, source.text(length), some, ("hedgehog", "hedgehog_softmax"))
        found[length] = settings.compare(cases)
    peaks = []
    for kind in tqdm(("teacher's forward", "step of transfer", "graph through the network"), desc="memory"):
        cells = [settings.peak_memory(prepare_memory, source.name, n, kind, lengths[0]) for n in counts]
        peaks.append((kind, *("-" if cell is None else f"{cell.mebibytes:.0f}" for cell in cells)))
    times = ", ".join(f"{one.milliseconds(one.base):.3g} ms at {n} tokens" for n, one in found.items())
    lines = [
        "## Transfer",
        f"One step of `attention_transfer` with its optimizer, one row of text, {TRANSFER_LAYERS} layers of {source}, "
        f"all converted; time over that of a forward of the teacher without its head ({times}):",
        "",
        *times_over(found),
        "",
        f"Peak memory above weights and inputs, MiB, {lengths[0]} tokens, window {WINDOW}, by number of layers, all "
        f"converted, each in a fresh process. A step holds gradients and moments of its maps, "
        f"{map_bytes(base) / 2**20:.2f} MiB a layer:",
        "",
        *markdown_table(["call", *(f"{n} layers" for n in counts)], peaks),
    ]
    return lines, {}


def map_bytes(base: Any) -> int:
    """Gradients and both moments of AdamW for the maps of a layer."""
    attention: Any = next(
        m.linear_attention for m in convert_attention(base, layers=[0]).modules() if hasattr(m, "linear_attention")
    )
    return 3 * sum(p.nbytes for p in attention.parameters())


SECTIONS = {
    "exactness": exactness,
    "drift": drift,
    "decoding": decoding,
    "prefill": prefill,
    "transfer": transfer,
}


def main() -> None:
    """Two options of its own, before those of all benchmarks."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default=PUBLISHED)
    parser.add_argument("--trained", nargs="+", default=[])
    own, sys.argv[1:] = parser.parse_known_args()
    source = Source(None) if "--smoke" in sys.argv else Source(own.model, tuple(own.trained))
    sections = {key: partial(section, source=source) for key, section in SECTIONS.items()}
    run_sections("linear_attention", "Linear attention from trained attention", __doc__, sections)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
