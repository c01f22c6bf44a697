"""Text from disk becomes documents, documents become packed rows: nothing is lost and nothing leaks."""

import gzip
import json
import logging
import random

import datasets
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hyena_hf import HyenaConfig, HyenaForCausalLM
from training.data import (
    Document,
    collate_rows,
    module_name,
    pack_documents,
    read_documents,
    shuffle_documents,
    split_documents,
    stdlib_documents,
)


def test_rows_hold_every_token_of_every_document_in_order():
    documents = [list(range(1, 8)), [], [9], list(range(10, 23))]
    rows = pack_documents(documents, 5, pad_token_id=0)
    stream = torch.cat([row["input_ids"] for row in rows]).tolist()
    assert stream == [*range(1, 8), 9, *range(10, 23), 0, 0, 0, 0]
    assert rows.num_tokens == 21


def test_positions_restart_at_documents_and_at_rows():
    rows = pack_documents([[1, 2, 3], [4, 5, 6, 7]], 5)
    assert [row["position_ids"].tolist() for row in rows] == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


def test_a_token_is_predicted_if_and_only_if_its_document_precedes_it_in_the_row():
    rows = pack_documents([[1, 2, 3], [4, 5, 6, 7]], 5)
    assert [row["labels"].tolist() for row in rows] == [[-100, 2, 3, -100, 5], [-100, 7, -100, -100, -100]]


def tiny_gpt2():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )


def tiny_hyena(order=2):
    return HyenaForCausalLM(
        HyenaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            max_position_embeddings=32,
            order=order,
        )
    )


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_llama, tiny_hyena, lambda: tiny_hyena(order=3)])
def test_the_loss_of_packed_rows_is_that_of_the_pieces_alone(make_model):
    model = make_model().double().eval()
    documents = [torch.randint(50, (length,)) for length in (7, 1, 12, 25, 3)]
    batch = collate_rows(list(pack_documents(documents, 16)))
    packed = model(**batch, use_cache=False).loss

    starts = ((batch["position_ids"] == 0).flatten().nonzero()).flatten().tolist()
    pieces = torch.tensor_split(batch["input_ids"].flatten()[:48], starts[1:])
    total, count = 0.0, 0
    for piece in pieces:
        if len(piece) > 1:
            total += model(input_ids=piece[None], labels=piece[None]).loss * (len(piece) - 1)
            count += len(piece) - 1
    torch.testing.assert_close(packed, total / count, rtol=1e-6, atol=0)  # transformers takes losses in float32


def test_packing_refuses_rows_that_predict_nothing_and_empty_data():
    with pytest.raises(ValueError, match=r"length must be at least 2, got 1"):
        pack_documents([[1, 2]], 1)
    with pytest.raises(ValueError, match="no tokens to pack"):
        pack_documents([[], []], 8)


def test_files_of_every_kind_give_their_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("één\r\nline\n".encode())
    (tmp_path / "b.py.gz").write_bytes(gzip.compress(b"x = 1\n"))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"}) + "\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    names = {document.name: document.text for document in read_documents([tmp_path])}
    assert names == {"a.txt": "één\r\nline\n", "b.py.gz": "x = 1\n", "c.jsonl:1": "one", "c.jsonl:3": "two"}


def test_datasets_saved_on_disk_and_parquet_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"content": ["one", "two"], "id": [1, 2]})
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for source in ("saved", "rows.parquet"):
        documents = read_documents([tmp_path / source], text_column="content")
        assert [document.text for document in documents] == ["one", "two"]


def test_only_names_with_a_prefix_are_looked_up_on_the_hub(monkeypatch):
    asked = []
    rows = datasets.Dataset.from_dict({"text": ["one", "", "two"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: (asked.append((args, kwargs)), rows)[1])
    documents = read_documents(["hf:owner/name:config", "hf:name"])
    assert asked == [(("owner/name", "config"), {"split": "train"}), (("name", None), {"split": "train"})]
    assert [document.name for document in documents[:2]] == ["hf:owner/name:config:1", "hf:owner/name:config:3"]


def test_the_first_rows_of_a_set_are_a_set_of_rows():
    rows = pack_documents([range(1, 8), range(8, 20)], 4)
    for count in (1, 2, 100):
        part = rows.first(count)
        assert len(part) == min(count, len(rows))
        for row, whole in zip(part, rows, strict=False):
            assert all(torch.equal(row[name], whole[name]) for name in row)


def test_bytes_that_are_not_utf8_are_refused_with_file_and_offset(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"one \xe9 two")
    with pytest.raises(
        ValueError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 4 .*--encoding-errors replace"
    ):
        read_documents([tmp_path / "latin.txt"])


def test_replaced_bytes_are_counted_and_no_text_is_lost(tmp_path, caplog):
    (tmp_path / "latin.txt").write_bytes(b"one \xe9 \xff two")
    with caplog.at_level(logging.WARNING):
        [document] = read_documents([tmp_path / "latin.txt"], encoding_errors="replace")
    assert document.text == "one \ufffd \ufffd two"
    assert "2 bytes that are not UTF-8 were replaced" in caplog.text
    with pytest.raises(ValueError, match="must be one of strict, replace, backslashreplace, got 'ignore'"):
        read_documents([tmp_path / "latin.txt"], encoding_errors="ignore")


def test_a_path_that_does_not_exist_is_named_and_not_looked_up_elsewhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wikitext' does not exist; expected a file or a folder, or hf:NAME"):
        read_documents([tmp_path / "wikitext"])


def test_an_empty_file_or_folder_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    for source in (tmp_path / "empty.txt", tmp_path):
        with pytest.raises(ValueError, match="holds no text; expected at least one document that is not empty"):
            read_documents([source])


def test_files_left_out_of_a_folder_are_counted(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with caplog.at_level(logging.WARNING):
        assert len(read_documents([tmp_path])) == 1
    assert r"1 files that are not known as text were left out (.png)" in caplog.text


def test_broken_lines_columns_and_archives_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is not JSON"):
        read_documents([tmp_path / "a.jsonl"])
    (tmp_path / "b.jsonl").write_text('{"content": "fine"}\n')
    with pytest.raises(ValueError, match=r"line 1 has no text in 'text'; it holds content; .*--text-column"):
        read_documents([tmp_path / "b.jsonl"])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"some text, cut off")[:-5])
    with pytest.raises(ValueError, match=r"c\.txt\.gz is not a complete gzip file"):
        read_documents([tmp_path / "c.txt.gz"])


def test_standard_library_splits_share_no_module_and_are_text_enough():
    splits = split_documents(stdlib_documents(), group=module_name)
    modules = [{module_name(document.name) for document in split} for split in splits]
    assert len(set.union(*modules)) == sum(map(len, modules))
    assert not {name for split in splits for name, _ in split if "test" in name.split("/")}
    sizes = [sum(len(document.text) for document in split) for split in splits]
    assert sizes[0] > 4_000_000
    assert min(sizes[1:]) > 200_000


def test_splits_and_order_depend_on_names_alone():
    documents = [Document(f"m{i}", "text") for i in range(200)]
    mixed = random.Random(1).sample(documents, len(documents))
    assert [set(split) for split in split_documents(mixed)] == [set(split) for split in split_documents(documents)]
    assert shuffle_documents(mixed) == shuffle_documents(documents) != documents


def test_a_single_document_is_split_by_position_without_loss():
    splits = split_documents([Document("book", "".join(map(str, range(1000))))], validation=0.1, heldout=0.2)
    assert "".join(split[0].text for split in splits) == "".join(map(str, range(1000)))
    with pytest.raises(ValueError, match="3 characters in 1 documents are too few"):
        split_documents([Document("note", "abc")])
