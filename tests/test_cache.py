"""A sequence's logits do not depend on padding, packing, neighbours, or on how its tokens were fed to a cache.

The truth of every test is `alone`: the sequence by itself, without padding and without a cache. Bounds are relative to
max(1, largest logit): 1e-10 in float64; in float32 1e-5, or the model's own error against float64 if that is more.
"""

import copy
from functools import cache

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hyena_hf.cache import HyenaCacheLayer
from hyena_hf.ops.modal import PI
from tests.models import FULL, MODELS, model_of, new_model, shrink_tiles, tokens


DTYPES = [torch.float64, torch.float32]
LENGTHS = (45, 12, 28, 6)
STEPS = 5  # the last tokens of every sequence, fed one by one in some tests
TOTAL = sum(LENGTHS)

every_model = pytest.mark.parametrize("name", MODELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    shrink_tiles(monkeypatch)


@cache
def sequences():
    return [tokens(length, seed=length) for length in LENGTHS]


@cache
def alone(name, dtype):
    with torch.no_grad():
        return [model_of(name, dtype)(s[None], use_cache=False).logits[0] for s in sequences()]


def scale(exact):
    return max(1.0, exact.abs().max().item())


@cache
def own_error(name, dtype):
    """Largest relative error of the sequences alone against float64."""
    pairs = zip(alone(name, dtype), alone(name, torch.float64), strict=True)
    return max((got - exact).abs().max().item() / scale(exact) for got, exact in pairs)


def bound(name, dtype):
    return 1e-10 if dtype == torch.float64 else max(1e-5, own_error(name, dtype))


def check(name, dtype, sequence, got, columns=slice(None)):
    """Logits of one sequence, or of some of its positions, against the sequence alone."""
    truth, exact = alone(name, dtype)[sequence], alone(name, torch.float64)[sequence]
    assert (got - truth[columns]).abs().max().item() <= bound(name, dtype) * scale(exact)


def layout(kind):
    """Ids and mask (4, columns): where the tokens of each sequence stand among the columns."""
    columns = 53 if kind == "holes" else max(LENGTHS)
    ids, mask = tokens(4, columns, seed=99), torch.zeros(4, columns, dtype=torch.long)
    for row, sequence in enumerate(sequences()):
        n = len(sequence)
        places = {
            "left": range(columns - n, columns),
            "right": range(n),
            "right, then steps": [*range(n - STEPS), *range(columns - STEPS, columns)],
            "holes": torch.randperm(columns, generator=torch.Generator().manual_seed(row))[:n].sort().values,
        }[kind]
        mask[row, list(places)] = 1
        ids[row, list(places)] = sequence
    return ids, mask


LAYOUTS = ["left", "right", "right, then steps", "holes"]

# sizes of consecutive calls
FEEDINGS = {
    "at once": lambda n: [n],
    "in chunks": lambda n: [1, 14, 3, 22, n - 40],
    "token by token": lambda n: [1] * n,
    "two to five at a time": lambda n: [5, 2, 3, 4] * 3 + [n - 42],
    "a prompt, then steps": lambda n: [n - STEPS] + [1] * STEPS,
}


def feed(model, ids, mask, sizes, past):
    """Logits of consecutive calls with one cache."""
    outputs, done = [], 0
    for size in sizes:
        until = done + size
        kwargs = {} if mask is None else {"attention_mask": mask[:, :until]}
        outputs.append(model(ids[:, done:until], past_key_values=past, **kwargs).logits)
        done = until
    return torch.cat(outputs, dim=1)


@every_dtype
@every_model
@pytest.mark.parametrize("kind", LAYOUTS)
def test_masked_tokens_do_not_exist(name, dtype, kind):
    ids, mask = layout(kind)
    logits = model_of(name, dtype)(ids, attention_mask=mask, use_cache=False).logits
    assert logits.isfinite().all()
    for row in range(4):
        check(name, dtype, row, logits[row, mask[row].bool()])


@every_dtype
@every_model
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("feeding", FEEDINGS)
def test_feeding_a_cache_in_any_pieces_equals_the_sequence_alone(name, dtype, kind, feeding):
    model = model_of(name, dtype)
    ids, mask = layout(kind)
    logits = feed(model, ids, mask, FEEDINGS[feeding](ids.shape[1]), DynamicCache(config=model.config))
    assert logits.isfinite().all()
    for row in range(4):
        check(name, dtype, row, logits[row, mask[row].bool()])


@every_dtype
@every_model
@pytest.mark.parametrize("feeding", ["in chunks", "a prompt, then steps"])
def test_a_static_cache_gives_the_same_logits(name, dtype, feeding):
    model = model_of(name, dtype)
    for kind in ("left", "holes"):
        ids, mask = layout(kind)
        past = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 3)
        logits = feed(model, ids, mask, FEEDINGS[feeding](ids.shape[1]), past)
        for row in range(4):
            check(name, dtype, row, logits[row, mask[row].bool()])


@every_dtype
@every_model
def test_a_dense_batch_needs_no_mask(name, dtype):
    model, sequence = model_of(name, dtype), sequences()[0]
    for past in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=45)):
        logits = feed(model, sequence.expand(2, -1), None, [20, 1, 1, 3, 20], past)
        check(name, dtype, 0, logits[0])
        check(name, dtype, 0, logits[1])


@every_model
@pytest.mark.parametrize("kind", LAYOUTS)
def test_bfloat16_logits_depend_on_the_batch_by_less_than_2e_2(name, kind):
    model, exact = model_of(name, torch.bfloat16), model_of(name, torch.float32)
    ids, mask = layout(kind)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    pieces = feed(model, ids, mask, FEEDINGS["in chunks"](ids.shape[1]), DynamicCache(config=model.config))
    for row, sequence in enumerate(sequences()):
        truth, reference = (m(sequence[None], use_cache=False).logits[0].float() for m in (model, exact))
        limit = max(2e-2 * scale(truth), (truth - reference).abs().max().item())
        for got in (whole, pieces):
            assert (got[row, mask[row].bool()].float() - truth).abs().max().item() <= limit
        if name in ("order 2", "order 3"):  # no products of rows in bfloat16: not a bit differs
            assert torch.equal(whole[row, mask[row].bool()].float(), truth)


@every_model
def test_rows_that_are_masked_for_a_while_or_for_ever_are_finite_and_disturb_nobody(name):
    model, dtype = model_of(name), torch.float64
    ids, mask = layout("right, then steps")
    mask[1] = 0  # never a token
    ids = torch.cat([ids[:, :20], tokens(4, 3), ids[:, 20:]], dim=1)
    mask = torch.cat([mask[:, :20], torch.zeros(4, 3, dtype=torch.long), mask[:, 20:]], dim=1)
    for sizes in ([48], [20, 1, 2, 20, 1, 1, 1, 1, 1]):
        logits = feed(model, ids, mask, sizes, DynamicCache(config=model.config))
        assert logits.isfinite().all()
        for row in (0, 2, 3):
            check(name, dtype, row, logits[row, mask[row].bool()])
    assert model(ids, attention_mask=torch.zeros_like(mask), use_cache=False).logits.isfinite().all()


# packed documents


def packed():
    """The four sequences in one row, described in the three usual ways."""
    lengths = torch.tensor(LENGTHS)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return torch.cat(sequences())[None], {
        "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]},
        "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(4), lengths)[None].to(torch.int32)},
        "cu_seq_lens_q": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 45, "max_length_k": 45},
    }


@every_dtype
@every_model
@pytest.mark.parametrize("described_by", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packed_documents_do_not_see_each_other(name, dtype, described_by):
    ids, descriptions = packed()
    out = model_of(name, dtype)(ids, **descriptions[described_by])
    assert out.past_key_values is None
    for row, part in enumerate(out.logits[0].split(LENGTHS)):
        check(name, dtype, row, part)


@every_model
def test_documents_packed_in_several_rows_with_padding_do_not_see_each_other(name):
    model = model_of(name)
    first, second, third, fourth = sequences()
    ids = torch.stack([torch.cat([first, tokens(1)]), torch.cat([third, second, fourth])])
    documents = torch.tensor([[0] * 46, [0] * 28 + [1] * 12 + [2] * 6])
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    logits = model(ids, attention_mask=mask, seq_idx=documents, use_cache=False).logits
    for row, part in ((0, logits[0, :45]), (2, logits[1, :28]), (1, logits[1, 28:40]), (3, logits[1, 40:])):
        check(name, torch.float64, row, part)


def gradients(model, calls):
    """Gradients of a sum of fixed random projections of the logits of every sequence."""
    model.zero_grad()
    weights = [torch.randn(n, 97, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in LENGTHS]
    for logits, rows in calls(model):
        (logits * torch.cat([weights[row] for row in rows])).sum().backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


@every_dtype
@every_model
def test_gradients_of_packed_and_padded_documents_are_those_of_the_documents_alone(name, dtype):
    def one_by_one(model):
        return ((model(s[None]).logits[0], [row]) for row, s in enumerate(sequences()))

    model = new_model(name, dtype)
    truth, exact = gradients(model, one_by_one), gradients(new_model(name, torch.float64), one_by_one)
    ids, descriptions = packed()
    holes, mask = layout("holes")
    ways = {
        **{key: lambda m, kw=kwargs: [(m(ids, **kw).logits[0], range(4))] for key, kwargs in descriptions.items()},
        "holes": lambda m: [(m(holes, attention_mask=mask, use_cache=False).logits[mask.bool()], range(4))],
    }
    for way, calls in ways.items():
        for key, gradient in gradients(model, calls).items():
            own = (truth[key] - exact[key]).abs().max().item()
            limit = (1e-10 if dtype == torch.float64 else 1e-5) * scale(exact[key])
            assert (gradient - truth[key]).abs().max().item() <= max(limit, own), (way, key)


@every_model
def test_padding_gets_no_gradient(name):
    model = model_of(name)
    ids, mask = layout("holes")
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[mask.bool()].square().sum().backward()
    assert embeds.grad[~mask.bool()].eq(0).all()
    assert embeds.grad[mask.bool()].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize(("length", "at"), [(2, 1), (131, 65), (301, 270)])
@every_model
def test_a_later_token_changes_nothing_before_it(name, length, at, dtype, limit):
    ids = tokens(1, length)
    changed = ids.clone()
    changed[0, at] = (changed[0, at] + 1) % 97
    with torch.no_grad():
        before, after = (model_of(name, dtype)(x, use_cache=False).logits[0] for x in (ids, changed))
    assert (before - after)[:at].abs().max().item() <= limit * scale(before)
    assert (before - after)[at:].abs().max().item() > 0.1


@every_dtype
@every_model
def test_a_batch_of_eight_from_one_token_to_past_the_trained_length_with_any_padding(name, dtype):
    model, exact = model_of(name, dtype), model_of(name)
    lengths, columns, steps = (263, 1, 251, 26, 131, 2, 90, 180), 263, 20
    ids = tokens(8, columns + steps)
    at = torch.arange(columns)
    sides = {"left": [at >= columns - n for n in lengths], "right": [at < n for n in lengths]}
    for side, masks in sides.items():
        mask = torch.cat([torch.stack(masks), torch.ones(8, steps, dtype=torch.bool)], dim=1)
        sizes = [columns] + [1] * steps if side == "right" else [columns + steps]
        logits = feed(model, ids, mask.long(), sizes, DynamicCache(config=model.config))
        for row in range(8):
            sequence = ids[row : row + 1, mask[row]]
            truth, reference = (m(sequence, use_cache=False).logits[0] for m in (model, exact))
            own = (truth - reference).abs().max().item()
            limit = 1e-10 * scale(reference) if dtype == torch.float64 else max(1e-5 * scale(reference), own)
            assert (logits[row, mask[row]] - truth).abs().max().item() <= limit, (side, row)


# attention weights


@cache
def eager(name):
    return new_model(name, torch.float64, attn_implementation="eager").requires_grad_(False)


def check_weights(name, layers, row, columns, sequence, first=0):
    """Weights of the queries from `first` on of a row's tokens, which stand in `columns`, and nothing elsewhere."""
    truth = eager(name)(sequence[None], use_cache=False, output_attentions=True).attentions
    for got, alone_weights in zip(layers, truth, strict=True):
        new = columns[columns >= first] - first
        exact = alone_weights[0][:, -len(new) :]
        torch.testing.assert_close(got[row][:, new][:, :, columns], exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(got[row][:, new].sum(-1), exact.sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", ["hybrid", "sliding", "hedgehog window"])
def test_attention_weights_stand_in_the_columns_of_the_batch(name, kind):
    ids, mask = layout(kind)
    out = eager(name)(ids, attention_mask=mask, use_cache=False, output_attentions=True)
    assert len(out.attentions) == sum(layer != "hyena" for layer in eager(name).config.layer_types)
    for row in range(4):
        columns = mask[row].nonzero().squeeze(1)
        check_weights(name, out.attentions, row, columns, sequences()[row])
        assert torch.stack([w[row].sum(-1) for w in out.attentions]).gt(0.5).sum(-1).eq(len(columns)).all()


@pytest.mark.parametrize("kind", [None, *LAYOUTS])
@pytest.mark.parametrize("how", ["dynamic", "static", "recording"])
@pytest.mark.parametrize("name", ["hybrid", "sliding"])
def test_attention_weights_of_a_continued_cache_stand_in_the_columns_of_the_stream(name, how, kind):
    model = eager(name)
    ids, mask = layout(kind) if kind else (sequences()[0].expand(4, -1), torch.ones(4, 45, dtype=torch.long))
    capacity = ids.shape[1] + 3
    past = DynamicCache(config=model.config)
    if how == "static":
        past = StaticCache(config=model.config, max_cache_len=capacity)
    if how == "recording":
        past.activate_past_recording()
    done = 0
    for size in (20, 1, ids.shape[1] - 24, 1, 2):
        until = done + size
        kwargs = {"attention_mask": mask[:, :until], "past_key_values": past, "output_attentions": True}
        layers = model(ids[:, done:until], **kwargs).attentions
        assert {tuple(w.shape) for w in layers} == {(4, 4, size, capacity if how == "static" else until)}
        for row in range(4):
            columns = mask[row, :until].nonzero().squeeze(1)
            if columns.numel() and columns[-1] >= done:
                check_weights(name, layers, row, columns, ids[row, columns], done)
        done = until


def test_attention_weights_forget_a_masked_call_that_was_cropped_whole():
    model, sequence = eager("hybrid"), sequences()[0]
    past = DynamicCache(config=model.config)
    past.activate_past_recording()
    for size, masked, crop in ((4, False, 0), (1, False, None), (4, True, -5)):
        mask = torch.ones(1, past.get_seq_length() + size, dtype=torch.long)
        mask[0, -2] = 0 if masked else 1
        model(
            tokens(1, size) if masked else sequence[None, past.get_seq_length() :][:, :size],
            attention_mask=mask,
            past_key_values=past,
        )
        if crop is not None:
            past.crop(crop)
    out = model(sequence[None, 4:], past_key_values=past, output_attentions=True)
    check_weights("hybrid", out.attentions, 0, torch.arange(45), sequence, 4)


@every_model
def test_what_stands_in_masked_embeddings_reaches_nobody_even_if_it_is_no_number(name):
    model = model_of(name)
    ids, mask = layout("holes")
    embeds = model.get_input_embeddings()(ids).masked_fill(~mask.bool().unsqueeze(-1), float("nan"))
    for use_cache in (True, False):
        logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=use_cache).logits
        for row in range(4):
            check(name, torch.float64, row, logits[row, mask[row].bool()])


@pytest.mark.parametrize("masked", [False, True])
def test_full_attention_can_take_tokens_back_that_nobody_recorded(masked):
    model = new_model("attention only", torch.float64, layer_types=[FULL] * 3).requires_grad_(False)
    ids, mask = layout("holes") if masked else (sequences()[0].expand(4, -1), torch.ones(4, 45, dtype=torch.long))
    past = DynamicCache(config=model.config)
    model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=past)
    past.crop(-7)
    assert past.get_seq_length() == 23
    logits = model(ids[:, 23:], attention_mask=mask, past_key_values=past).logits
    truth = model(ids, attention_mask=mask, use_cache=False).logits[:, 23:]
    real = mask[:, 23:].bool()
    torch.testing.assert_close(logits[real], truth[real], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="reaches beyond"):
        past.crop(-100)


def test_attention_weights_follow_a_crop_and_a_reordering():
    model = eager("hybrid")
    ids, mask = layout("holes")
    past = DynamicCache(config=model.config)
    past.activate_past_recording()
    for until in (20, 30, 40):
        model(ids[:, past.get_seq_length() : until], attention_mask=mask[:, :until], past_key_values=past)
        past.crop(-3 if until == 40 else 0)
    order = torch.tensor([2, 0, 1, 1])
    past.reorder_cache(order)
    ids, mask = ids[order], mask[order]
    out = model(ids[:, 37:], attention_mask=mask, past_key_values=past, output_attentions=True)
    for row in range(4):
        check_weights("hybrid", out.attentions, row, mask[row].nonzero().squeeze(1), ids[row, mask[row].bool()], 37)


# what generate() and users do to caches


def filled(name, dtype, kind="right, then steps", record=False):
    """A cache that holds all but the last STEPS columns of a layout, with those columns and the whole mask."""
    model = model_of(name, dtype)
    ids, mask = layout(kind)
    past = DynamicCache(config=model.config)
    if record:
        past.activate_past_recording()
    feed(model, ids, mask, [30, ids.shape[1] - STEPS - 30], past)
    return model, past, ids[:, -STEPS:], mask


def go_on(model, past, ids, mask):
    """Logits of the last columns, one by one."""
    start = mask.shape[1] - ids.shape[1]
    steps = range(ids.shape[1])
    return torch.cat(
        [
            model(ids[:, t : t + 1], attention_mask=mask[:, : start + t + 1], past_key_values=past).logits
            for t in steps
        ],
        dim=1,
    )


REARRANGEMENTS = {
    "reorder": (lambda past: past.reorder_cache(torch.tensor([2, 0, 0, 3])), [2, 0, 0, 3]),
    "repeat": (lambda past: past.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    "select": (lambda past: past.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
}


@every_dtype
@every_model
@pytest.mark.parametrize("how", REARRANGEMENTS)
@pytest.mark.parametrize("record", [False, True], ids=["", "recording"])
def test_rows_of_a_cache_can_be_reordered_repeated_and_selected(name, dtype, how, record):
    model, past, ids, mask = filled(name, dtype, record=record)
    rearrange, rows = REARRANGEMENTS[how]
    rearrange(past)
    logits = go_on(model, past, ids[rows], mask[rows])
    for position, row in enumerate(rows):
        check(name, dtype, row, logits[position], slice(-STEPS, None))


@every_dtype
@every_model
@pytest.mark.parametrize("kind", ["left", "right, then steps", "holes"])
def test_rejected_tokens_leave_no_trace(name, dtype, kind):
    model, past, ids, mask = filled(name, dtype, kind, record=True)
    past.crop(0)
    for rejected, holes in ((7, True), (1, False), (70, True)):
        wrong, extra = tokens(4, rejected, seed=rejected), torch.ones(4, rejected, dtype=torch.long)
        if holes:
            extra[1, ::2] = 0
            extra[2] = 0
        seen = mask[:, : -ids.shape[1]]
        model(wrong, attention_mask=torch.cat([seen, extra], dim=1), past_key_values=past)
        past.crop(-rejected)
        assert past.get_seq_length() == seen.shape[1]
    logits = go_on(model, past, ids, mask)
    real = mask[:, -STEPS:].bool()
    for row in range(4):
        if real[row].any():
            check(name, dtype, row, logits[row, real[row]], slice(-int(real[row].sum()), None))


@every_model
def test_part_of_the_candidates_can_be_kept(name):
    model, past, ids, mask = filled(name, torch.float64, record=True)
    start = mask.shape[1] - STEPS
    candidates = ids.clone()
    candidates[:, 2:] = (candidates[:, 2:] + 1) % 97
    logits = model(candidates, attention_mask=mask, past_key_values=past).logits[:, :2]
    past.crop(-3)
    assert past.get_seq_length() == start + 2
    logits = torch.cat([logits, go_on(model, past, ids[:, 2:], mask)], dim=1)
    for row in range(4):
        check(name, torch.float64, row, logits[row], slice(-STEPS, None))


@every_model
def test_recording_can_begin_late_and_be_switched_off(name):
    model, past, ids, mask = filled(name, torch.float64)
    past.activate_past_recording()
    first = go_on(model, past, ids[:, :2], mask[:, :-3])
    past.crop(-1)
    for layer in past.layers:
        layer.record_past = False
    logits = torch.cat([first[:, :1], go_on(model, past, ids[:, 1:], mask)], dim=1)
    for row in range(4):
        check(name, torch.float64, row, logits[row], slice(-STEPS, None))


@every_model
def test_a_copy_of_a_cache_lives_its_own_life(name):
    model, past, ids, mask = filled(name, torch.float64)
    twin = copy.deepcopy(past)
    model(tokens(4, 3), attention_mask=mask[:, :-2], past_key_values=twin)
    logits = go_on(model, past, ids, mask)
    for row in range(4):
        check(name, torch.float64, row, logits[row], slice(-STEPS, None))
    assert twin.get_seq_length() == past.get_seq_length() - 2


@every_model
def test_offloaded_layers_come_back_as_they_were(name):
    model, past, ids, mask = filled(name, torch.float64)
    for layer in past.layers:
        layer.offload()
        layer.prefetch()
    logits = go_on(model, past, ids, mask)
    for row in range(4):
        check(name, torch.float64, row, logits[row], slice(-STEPS, None))


@every_model
def test_layers_of_an_offloaded_cache_are_fetched_before_their_turn_and_sent_away_after_it(name, monkeypatch):
    away = set()
    for what, change in (("offload", away.add), ("prefetch", away.discard)):
        method = getattr(HyenaCacheLayer, what)
        monkeypatch.setattr(HyenaCacheLayer, what, lambda self, m=method, c=change: (m(self), c(id(self)))[0])
    push = HyenaCacheLayer.push

    def watched(self, *args):
        assert id(self) not in away
        return push(self, *args)

    monkeypatch.setattr(HyenaCacheLayer, "push", watched)
    model, sequence = model_of(name), sequences()[0][None]
    past = DynamicCache(config=model.config, offloading=True)
    logits = feed(model, sequence, None, [20, 1, 24], past)
    check(name, torch.float64, 0, logits[0])
    assert away == {id(layer) for layer in past.layers[1:]}  # the first waits for the next call


@every_model
def test_a_reset_cache_is_empty(name):
    model, past, _, _ = filled(name, torch.float64)
    past.reset()
    assert past.get_seq_length() == 0
    logits = feed(model, sequences()[0][None], None, [40, 5], past)
    check(name, torch.float64, 0, logits[0])


@pytest.mark.parametrize("name", ["order 3", "heads", "sliding"])
def test_a_cache_grows_past_the_trained_length(name):
    model, ids = model_of(name), tokens(2, 300)
    past = DynamicCache(config=model.config)
    logits = feed(model, ids, None, [20, *[7] * 38, *[1] * 14], past)
    whole = model(ids, use_cache=False).logits
    assert (logits - whole).abs().max().item() <= bound(name, torch.float64) * scale(whole)
    assert past.get_seq_length() == 300


def history_bytes(layer):
    return layer.nbytes() - layer.taps.nbytes()


def test_a_token_costs_a_float_per_channel_and_convolution_and_two_with_heads():
    short, rows, width = 2, 3, 32  # the short convolution remembers two tokens
    for name, per_token, channels in (("order 2", width, 96), ("order 3", 2 * width, 128), ("heads", 2 * width, 96)):
        model = model_of(name, torch.float32)
        for tokens_held in (50, 100):
            past = DynamicCache(config=model.config)
            model(tokens(rows, tokens_held), past_key_values=past)
            for layer in past.layers:
                assert history_bytes(layer) == 4 * rows * (per_token * tokens_held + channels * short)


def test_a_sliding_window_and_its_cache_do_not_grow():
    model, ids = model_of("sliding"), tokens(1, 60)
    past = DynamicCache(config=model.config)
    feed(model, ids[:, :20], None, [20], past)
    before = history_bytes(past.layers[0])
    feed(model, ids[:, 20:], None, [30, 1, 9], past)
    assert history_bytes(past.layers[0]) == before
    assert history_bytes(past.layers[2]) > 2 * before


def test_transformers_builds_our_layers_for_hyena_and_attention_layers_alike():
    model = model_of("hybrid")
    past = DynamicCache(config=model.config)
    model(tokens(1, 4), past_key_values=past)
    assert [type(layer) for layer in past.layers] == [HyenaCacheLayer] * 3
    plain = DynamicCache()
    model(tokens(1, 4), past_key_values=plain)
    assert [type(layer) for layer in plain.layers] == [HyenaCacheLayer] * 3
    assert plain.get_seq_length() == 4


def test_gradients_flow_through_a_cache():
    model = new_model("order 3", torch.float64)
    past, sequence = DynamicCache(config=model.config), sequences()[2][None]
    embeds = model.get_input_embeddings()(sequence).detach().requires_grad_()
    parts = [model(inputs_embeds=part, past_key_values=past).logits for part in embeds.split([14, 1, 13], dim=1)]
    (cached,) = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), embeds)
    (whole,) = torch.autograd.grad(model(inputs_embeds=embeds, use_cache=False).logits.square().sum(), embeds)
    assert (cached - whole).abs().max().item() <= 1e-10 * whole.abs().max().item()


@pytest.mark.parametrize("name", ["order 2", "order 3", "heads", "modal", "modal heads", "modal order 3", "online"])
def test_gradients_of_parameters_flow_through_a_cache_of_any_kind(name):
    """In eval mode too, where torch records gradients by default: steps of one token once raised there."""
    model, sequence = new_model(name, torch.float64), sequences()[2][None]
    parameters = dict(model.named_parameters())

    def gradients(logits):
        return torch.autograd.grad(logits.square().sum(), list(parameters.values()), allow_unused=True)

    past = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=past).logits for part in sequence.split([12, 1, 1, 6, 1, 7], dim=1)]
    cached, whole = gradients(torch.cat(parts, dim=1)), gradients(model(sequence, use_cache=False).logits)
    for key, a, b in zip(parameters, cached, whole, strict=True):
        if key.endswith("filter.angle"):  # those of poles that are real get none through a cache
            complex_pole = (parameters[key] != 0) & (parameters[key].abs() != PI)
            a, b = a[complex_pole], b[complex_pole]
        assert (a - b).norm() <= 1e-8 * b.norm() + 1e-12, key


@pytest.mark.parametrize("name", ["order 2", "heads", "modal"])
def test_dropout_between_gates_is_at_work_in_steps_of_one_token_too(name):
    model, ids = new_model(name, hyena_dropout=0.5).train(), tokens(1, 12)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=past)
        drawn = [model(ids[:, -1:], past_key_values=copy.deepcopy(past)).logits for _ in range(4)]
    assert not all(torch.equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize("how", ["dynamic", "static", "recording"])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_filled_in_inference_mode_goes_on_outside_with_gradients(name, how):
    """As transformers' growing caches do: what was made there can neither be written nor kept for a backward pass."""
    model, ids = copy.deepcopy(model_of(name)).requires_grad_(), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :4] = 0
    past = StaticCache(model.config, max_cache_len=32) if how == "static" else DynamicCache(config=model.config)
    if how == "recording":
        past.activate_past_recording()
    parts, start = [], 0
    for size, inside in ((12, True), (1, True), (1, False), (9, False), (1, True), (1, False), (5, False)):
        given = {"attention_mask": mask[:, : start + size], "past_key_values": past}
        with torch.inference_mode(inside):
            parts.append(model(ids[:, start : start + size], **given).logits)
        start += size
    logits = torch.cat([part.detach().clone() for part in parts], dim=1)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-10)
    if how != "static":  # whose past is written in place
        parts[-1].sum().backward()
        assert model.model.embed_tokens.weight.grad.isfinite().all()
