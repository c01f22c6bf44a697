import json
import math
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from evaluation.perplexity import bits_per_byte, main, read_document, sliding_windows
from hyena_hf import HyenaByteTokenizer, HyenaConfig, HyenaForCausalLM


@pytest.fixture(params=["gpt2", "hyena"])
def model(request):
    if request.param == "gpt2":
        config = GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
        return GPT2LMHeadModel(config)
    config = HyenaConfig(
        vocab_size=256, hidden_size=16, num_hidden_layers=2, intermediate_size=32, max_position_embeddings=64
    )
    model = HyenaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model


def _documents(*lengths):
    return [torch.randint(256, (length,)) for length in lengths]


def _nats_token_by_token(model, document, context, stride):
    """One forward pass for each token, on exactly the tokens that its window shows."""
    nats = 0.0
    for t in range(1, len(document)):
        begin = stride * max(0, math.ceil((t - context) / stride))
        logits = model.eval()(document[None, begin:t]).logits[0, -1]
        nats -= logits.double().log_softmax(-1)[document[t]].item()
    return nats


@pytest.mark.parametrize(("context", "stride"), [(2, 1), (7, 3), (8, 8), (9, 4)])
def test_every_token_but_the_first_is_scored_once_with_enough_context(context, stride):
    for length in range(1, 40):
        windows = list(sliding_windows(length, context=context, stride=stride))
        targets = [target for window in windows for target in range(window.first, window.end + 1)]
        assert targets == list(range(1, length))
        for window in windows:
            assert window.end - window.begin <= context
            assert window.first - window.begin >= min(window.first, context - stride + 1)


@pytest.mark.parametrize("stride", [1, 5, 8])
def test_windows_in_batches_give_the_sum_of_single_predictions(model, stride):
    documents = _documents(19, 1, 2, 24)
    result = bits_per_byte(model.double(), documents, context=8, stride=stride, batch_size=3)
    expected = sum(_nats_token_by_token(model, document, 8, stride) for document in documents)
    assert result.tokens == 18 + 0 + 1 + 23
    assert result.nats == pytest.approx(expected, rel=1e-12)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / result.tokens)
    assert result.perplexity == pytest.approx(math.exp(expected / result.tokens))


def test_the_result_is_the_same_for_any_batch_size(model):
    documents = _documents(61, 3, 17, 40, 2, 33)
    results = [bits_per_byte(model, documents, context=16, batch_size=size).nats for size in (1, 2, 5, 100)]
    assert results == pytest.approx([results[0]] * 4, rel=1e-6)


def test_the_default_stride_is_half_the_context(model):
    documents = _documents(50)
    default = bits_per_byte(model, documents, context=12, batch_size=4)
    assert default == bits_per_byte(model, documents, context=12, stride=6, batch_size=4)
    assert default.nats != bits_per_byte(model, documents, context=12, stride=12, batch_size=4).nats


def test_a_model_that_knows_nothing_needs_eight_bits_for_a_byte(model):
    model.get_output_embeddings().weight.data.zero_()
    documents = _documents(30, 11)
    assert bits_per_byte(model, documents, context=8, batch_size=2).bits_per_byte == pytest.approx(8, rel=1e-6)
    result = bits_per_byte(model, documents, context=8, batch_size=2, bytes_per_document=[60, 20])
    assert result.bits_per_byte == pytest.approx(8 * 39 / 80, rel=1e-6)
    assert result.bytes == 80


def test_the_model_is_left_in_the_mode_it_was_found_in(model):
    model.train()
    next(model.children()).eval()
    before = [module.training for module in model.modules()]
    first = bits_per_byte(model, _documents(20), context=8, batch_size=2)
    assert [module.training for module in model.modules()] == before
    assert not torch.is_inference_mode_enabled()
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    assert first.tokens == 19


def test_the_mode_is_restored_after_an_error_too(model):
    model.train().lm_head.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"document 1 .* tokens 1 \.\. 4"):
        bits_per_byte(model, [torch.tensor([1]), torch.tensor([1, 2, 3, 4, 5])], context=8, batch_size=2)
    assert model.training


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([torch.arange(4)], {"context": 1}, r"context \(1\) must be at least 2"),
        ([torch.arange(4)], {"stride": 9}, r"stride \(9\) must be in 1 \.\. 8"),
        ([torch.arange(4)], {"stride": 0}, r"stride \(0\) must be in 1 \.\. 8"),
        ([torch.arange(4)], {"batch_size": 0}, r"batch_size \(0\)"),
        ([torch.arange(4), torch.arange(0)], {}, "document 1 is empty"),
        ([torch.tensor([3, 256])], {}, r"document 0 has token ids 3 \.\. 256, the model knows 0 \.\. 255"),
        ([torch.arange(1)], {}, "the 1 documents hold no token to score"),
        ([], {}, "the 0 documents hold no token to score"),
        ([torch.arange(4)], {"bytes_per_document": [1, 2]}, "2 entries for 1 documents"),
        ([torch.arange(4)], {"bytes_per_document": [0]}, "must not add up to 0"),
    ],
)
def test_input_that_cannot_be_scored_is_refused_with_its_numbers(model, documents, options, message):
    with pytest.raises(ValueError, match=message):
        bits_per_byte(model, documents, **{"context": 8, "batch_size": 2, **options})


@pytest.mark.parametrize("document", [torch.zeros(2, 3, dtype=torch.long), torch.zeros(3)])
def test_a_document_must_be_a_row_of_ids(model, document):
    with pytest.raises(TypeError, match="document 0 must be a 1-D int64 tensor"):
        bits_per_byte(model, [document], context=8, batch_size=1)


@pytest.fixture
def folder(model, tmp_path):
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path / "model")
    HyenaByteTokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("model", ["hyena"], indirect=True)
def test_the_command_scores_every_byte_of_text_files(model, folder, tmp_path, capsys):
    texts = ["Hyänen lachen.\r\n" * 2, "x"]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    main([str(folder), *map(str, paths), "--batch-size", "2", "--context", "16", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out) == result
    documents = [torch.tensor([HyenaByteTokenizer().bos_token_id, *text.encode()]) for text in texts]
    expected = sum(_nats_token_by_token(model, document, context=16, stride=8) for document in documents)
    assert result["nats"] == pytest.approx(expected, rel=1e-5)
    assert result["tokens"] == result["bytes"] == 17 * 2 + 1


@pytest.mark.parametrize("model", ["hyena"], indirect=True)
@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"gr\xfc\xdfe", [], "data.txt is not UTF-8: byte 2 is 0xfc"),
        (b"", [], "data.txt is empty"),
        (None, [], "No such file or directory: .*data.txt"),
        (b"text", ["--context", "0"], r"context \(0\) must be at least 2"),
        (b"text", ["--json", "missing/out.json"], "there is no folder missing"),
    ],
)
def test_the_command_names_the_file_that_it_cannot_score(folder, tmp_path, capsys, content, options, message):
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), str(path), *options])
    assert re.search(message, capsys.readouterr().err)


def test_the_command_refuses_a_folder_without_a_model(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), __file__])
    assert "holds no config.json" in capsys.readouterr().err


def test_without_a_bos_token_the_first_token_is_not_scored_and_its_bytes_are_not_counted(tmp_path):
    path = tmp_path / "text"
    path.write_text("äb", encoding="utf-8")
    ids, size = read_document(path, HyenaByteTokenizer.train_bpe(["äb äb"] * 9, vocab_size=261))
    assert (ids[0].item(), size) == (257, 3)
    tokenizer = HyenaByteTokenizer.train_bpe(["ää"] * 9, vocab_size=261)
    tokenizer.bos_token = tokenizer.eos_token = None
    ids, size = read_document(path, tokenizer)
    assert (ids.tolist(), size) == ([260, ord("b")], 1)


def test_a_model_without_a_trained_length_needs_one_from_the_user(tmp_path, capsys):
    model = MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=8, num_hidden_layers=1, state_size=2))
    model.save_pretrained(tmp_path)
    HyenaByteTokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), __file__])
    assert "mamba models do not say how long their context is; give --context" in capsys.readouterr().err
