"""The exactness table: ours is exact, known defects of others show, and a model that is broken on purpose is found."""

import io
import json
import re
from functools import cache

import pytest
import torch
from PIL import Image

from evaluation.exactness.__main__ import main
from evaluation.exactness.cases import Case, Cell, causality, measured
from evaluation.exactness.models import MODELS, Float64Throughout, Subject, call, new_model, relative_error
from evaluation.exactness.page import BAD, GOOD, as_text, reasons, titles, write_page
from evaluation.exactness.table import all_cases, answer, answers, fill
from hyena_hf import HyenaForCausalLM
from hyena_hf.cache import OnlineTiles


OURS = [name for name, spec in MODELS.items() if spec.ours]


@cache
def table_in(dtype):
    names = list(MODELS) if dtype == "float32" else OURS
    return fill(names, all_cases(smoke=True), dtype=dtype)


def table():
    return table_in("float32")


def bad(model):
    return {title for title, cell in model["cells"].items() if not cell["good"]}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OURS)
def test_every_cell_of_ours_is_within_its_bound(name, dtype):
    model = table_in(dtype)["models"][name]
    assert bad(model) == set()
    assert model["good"] == len(model["cells"]) == len(all_cases(smoke=True))


def test_llama_is_exact_too():
    assert bad(table()["models"]["Llama"]) == set()


def test_the_known_defects_of_mamba2_and_lfm2_show():
    for name in ("Mamba2", "LFM2"):
        cells = table()["models"][name]["cells"]
        for title in ("right-padded prompts, then 20 steps", "holes in the mask", "packed by position_ids"):
            assert cells[title]["error"] > 0.1
        assert cells["left padding, up to 90%"]["good"]
        assert cells["token by token, equal rows"]["good"]


def test_what_a_model_raises_is_its_answer_with_the_reason():
    cell = table()["models"]["Mamba2"]["cells"]["assisted decoding"]
    assert (cell["good"], cell["text"], cell["error"]) == (False, "refused", None)
    assert cell["reason"].startswith("ValueError: assisted generation is not supported")
    assert sum("Mamba2, prompt lookup; assisted decoding: ValueError" in line for line in reasons(table())) == 1


class IgnoresTheMask(HyenaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        if attention_mask is not None:
            kwargs.pop("position_ids", None)
        return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs)


class ForgetsTheLastTokenOfThePrompt(HyenaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        out = super().forward(input_ids, attention_mask=attention_mask, **{**kwargs, "use_cache": False})
        if past_key_values is None:
            return out
        if past_key_values.get_seq_length() == 0:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.clone()
            mask[:, -1] = 0
            super().forward(input_ids, attention_mask=mask, past_key_values=past_key_values)
            return out
        return super().forward(input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)


class SeesTheNextToken(HyenaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids, **kwargs)
        out.logits = out.logits + 1e-3 * out.logits.roll(-1, dims=1)
        return out


def broken(kind):
    model = new_model(MODELS["Hyena order 2"])
    model.__class__ = kind
    return answers(Subject("Hyena order 2", torch.float32, model=model), all_cases(smoke=True))


def test_a_model_that_ignores_the_mask_is_found_by_the_cells_with_padding():
    found = bad(broken(IgnoresTheMask))
    assert found >= {"left padding, batch of 1", "left padding, up to 90%", "holes in the mask"}
    assert found >= {
        "padding inside a later chunk",
        "token by token, ragged rows",
        "greedy with a cache, padded batch",
    }
    # what stands behind a token cannot disturb it, and these have no padding
    assert not found & {"right padding", "chunked prefill 1/14/3/22, equal rows", "packed by seq_idx", "prompt lookup"}


def test_a_cache_that_drops_a_token_is_found_by_the_cells_with_a_cache():
    found = bad(broken(ForgetsTheLastTokenOfThePrompt))
    assert found >= {"chunked prefill 1/14/3/22, equal rows", "token by token, equal rows", "sampling with a cache"}
    assert found >= {"greedy with a cache, padded batch", "greedy, static cache, padded batch"}
    assert not found & {"left padding, up to 90%", "holes in the mask", "gradients, packed by cu_seq_lens_q"}


def test_a_model_that_sees_a_later_token_is_found():
    model = new_model(MODELS["Hyena order 2"])
    model.__class__ = SeesTheNextToken
    with torch.no_grad():
        assert not causality(Subject("Hyena order 2", model=model), 31).good


class IsNotFiniteWithoutTokens(HyenaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        out = super().forward(input_ids, attention_mask, past_key_values=past_key_values, **kwargs)
        if attention_mask is not None:
            out.logits[attention_mask.sum(1) == 0] = float("nan")
        return out


def test_a_row_without_tokens_must_be_finite():
    model = new_model(MODELS["Hyena order 2"])
    model.__class__ = IsNotFiniteWithoutTokens
    case = next(case for case in all_cases(smoke=True) if case.title == "rows that are masked entirely")
    assert answer(case, Subject("Hyena order 2", model=model)) == Cell(good=False, text="not finite")


def test_the_worst_error_is_the_one_largest_beside_its_bound():
    assert measured([(3e-5, 4e-5), (2e-5, 1e-5)]) == Cell(good=False, text="2.0e-05", error=2e-5, bound=1e-5)
    assert measured([(0.0, 1e-5)]).text == "0"
    assert not measured([(float("inf"), 1e-5), (1e-7, 1e-5)]).good


def test_an_error_that_is_not_finite_is_infinite():
    assert relative_error(torch.tensor([float("nan"), 1.0]), torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([float("inf"), 1.0]), torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([12.0, 1.0]), torch.tensor([10.0, 1.0])) == 0.2


def test_a_programming_error_is_no_answer():
    def ask(_subject):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(Case("interrupted", ask), Subject("Llama"))


def test_the_float64_reference_of_llama_rounds_nowhere_to_float32():
    ids = torch.arange(40)[None]
    model = new_model(MODELS["Llama"]).double()
    with torch.no_grad(), Float64Throughout():
        whole, part = call(model, ids)[:, :20], call(model, ids[:, :20])
    with torch.no_grad():
        plain = call(model, ids)[:, :20]
    assert relative_error(part, whole) < 1e-14
    assert 1e-9 < relative_error(plain, whole) < 1e-5


def test_models_have_equal_sizes_and_strong_weights():
    for name, spec in MODELS.items():
        model = new_model(spec)
        assert (model.config.vocab_size, model.config.hidden_size, model.config.num_hidden_layers) == (97, 32, 3)
        assert torch.equal(model.get_input_embeddings().weight, new_model(spec).get_input_embeddings().weight)
        assert 0.14 < model.get_input_embeddings().weight.std().item() < 0.16
        logits = Subject(name).alone(torch.arange(90))[0]
        assert logits.std().item() > 0.5


def test_text_json_and_page_say_the_same(tmp_path):
    page = write_page(table(), tmp_path / "new" / "folder", command="python -m evaluation.exactness --smoke")
    stored = json.loads(page.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert {key: stored[key] for key in table()} == json.loads(json.dumps(table()))
    assert stored["command"] == "python -m evaluation.exactness --smoke"
    text, markdown = page.with_suffix(".txt").read_text(), page.read_text()
    assert text == as_text(table())
    lines = {line[0]: line[1:] for line in (re.split("  +", line) for line in text.splitlines())}
    for title in titles(table()):
        cells = [model["cells"][title] for model in stored["models"].values()]
        assert lines[title] == [f"{GOOD if cell['good'] else BAD} {cell['text']}" for cell in cells]
        row = [f"{GOOD} {cell['text']}" if cell["good"] else f"**{BAD} {cell['text']}**" for cell in cells]
        assert f"| {' | '.join([title, *row])} |" in markdown.splitlines()


def test_good_bad_and_refused_cells_of_the_picture_differ_without_colour(tmp_path):
    results = table()
    page = write_page(results, tmp_path, command="")
    data = page.with_suffix(".png").read_bytes()
    assert len(data) < 150_000
    picture = Image.open(io.BytesIO(data)).convert("L")
    assert picture.width > 1000
    shades = {shade: count for count, shade in picture.getcolors()}
    dark = sum(count for shade, count in shades.items() if 60 <= shade < 100)
    pale = sum(count for shade, count in shades.items() if 220 <= shade < 245)
    assert min(dark, pale) > 20_000


def test_the_command_writes_what_it_prints_and_fails_only_for_ours(tmp_path, capsys):
    assert main(["--models", "Mamba2", "--smoke", "--output", str(tmp_path), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "exactness_bfloat16.txt").read_text() in printed
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".png", ".txt"]
    assert "own bfloat16 error, against float32" in printed


def test_the_command_fails_where_a_cell_of_ours_is_bad(monkeypatch, capsys):
    worse = lambda *_, **__: [Case("wrong", lambda _: measured([(1.0, 1e-5)]))]  # noqa: E731
    monkeypatch.setattr("evaluation.exactness.__main__.all_cases", worse)
    assert main(["--models", "Hyena order 2"]) == 1
    assert main(["--models", "Llama"]) == 0
    assert f"{BAD} 1.0" in capsys.readouterr().out


def test_tiles_are_at_work_in_their_column(monkeypatch):
    """Whole-length sequences of the table are shorter than a block of tiles is by default."""
    folds = []
    fold = OnlineTiles._fold
    monkeypatch.setattr(OnlineTiles, "_fold", lambda self, *rest: folds.append(self) or fold(self, *rest))
    subject = Subject("online tiles", torch.float32)
    cell = answers(subject, [case for case in all_cases(smoke=True) if case.title == "token by token, equal rows"])
    assert cell["good"] == 1
    assert folds
