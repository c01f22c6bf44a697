"""Labelled sequences: every layout of the published tasks gives the same examples; bad files are refused by row.

Run: python -m pytest tests/test_finetune_tasks.py -q
"""

import gzip
import logging

import pyarrow
import pyarrow.parquet
import pytest
import torch

from hyena_hf import HyenaByteTokenizer, HyenaNucleotideTokenizer
from training.sequences import PaddingCollator, encode_sequences
from training.tasks import (
    GENOMIC_BENCHMARKS,
    NUCLEOTIDE_TRANSFORMER,
    TASKS,
    Example,
    count_leaks,
    hold_out,
    read_task,
)


SPLITS = {
    "train": [("ACGTA", "neg"), ("CCGT", "pos"), ("TTTTG", "neg"), ("GATTACA", "pos")],
    "validation": [("AAAC", "pos")],
    "test": [("GGGT", "neg"), ("CATG", "pos")],
}
DNA = HyenaNucleotideTokenizer()


def write_folders(folder, split, rows):
    for number, (sequence, label) in enumerate(rows):
        (folder / split / label).mkdir(parents=True, exist_ok=True)
        (folder / split / label / f"{number}.txt").write_text(sequence + "\n")


def write_table(folder, split, rows, suffix="csv"):
    separator = "\t" if suffix == "tsv" else ","
    lines = [separator.join(["label", "sequence"]), *(separator.join([label, sequence]) for sequence, label in rows)]
    (folder / f"{split}.{suffix}").write_text("\n".join(lines) + "\n")


def write_parquet(folder, split, rows):
    sequences, labels = zip(*rows, strict=True)
    table = pyarrow.table({"sequence": list(sequences), "label": list(labels)})
    pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


def write_fasta(folder, split, rows):
    text = "".join(f">read {n} of {split}|{label}\n{sequence}\n" for n, (sequence, label) in enumerate(rows))
    (folder / f"{split}.fna").write_text(text)


def write_packed(folder, split, rows):
    write_table(folder, split, rows)
    path = folder / f"{split}.csv"
    (folder / f"{split}.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


LAYOUTS = {
    "folders": write_folders,
    "csv": write_table,
    "tsv": lambda *args: write_table(*args, suffix="tsv"),
    "gzip": write_packed,
    "parquet": write_parquet,
    "fasta": write_fasta,
}


def written(folder, splits=SPLITS, layout="csv"):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        LAYOUTS[layout](folder, split, rows)
    return folder


def pairs(examples):
    return sorted((example.sequence, example.label) for example in examples)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_examples(tmp_path, layout):
    data = read_task(written(tmp_path, layout=layout))
    assert data.classes == ["neg", "pos"]
    for split, examples in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        expected = [(sequence, data.classes.index(label)) for sequence, label in SPLITS[split]]
        assert pairs(examples) == sorted(expected)
    assert not data.held_out


@pytest.mark.parametrize("name", ["valid", "val", "dev"])
def test_the_validation_split_has_many_names(tmp_path, name):
    splits = {name if split == "validation" else split: rows for split, rows in SPLITS.items()}
    assert pairs(read_task(written(tmp_path, splits)).validation) == [("AAAC", 1)]


def test_classes_that_are_numbers_stand_in_their_order(tmp_path):
    rows = [("ACGT", str(label)) for label in (10, 2, 0)]
    data = read_task(written(tmp_path, {"train": rows, "validation": rows, "test": rows[:1]}))
    assert data.classes == ["0", "2", "10"]
    assert [example.label for example in data.train] == [2, 1, 0]


def test_validation_is_held_out_by_the_sequence_and_equal_ones_stay_together():
    examples = [Example(str(n), sequence, 0) for n, sequence in enumerate(["ACGTT", "acgtt", "AACGT", *"ACGTN" * 9])]
    examples += [Example(f"{n}", format(n, "b").replace("0", "A").replace("1", "C"), 0) for n in range(2000)]
    train, validation = hold_out(examples, 0.1)
    assert len(train) + len(validation) == len(examples)
    assert 150 < len(validation) < 280
    assert hold_out(examples[::-1], 0.1)[1] == validation[::-1]
    assert count_leaks(train, validation) == 0


def test_without_a_validation_split_a_tenth_of_training_is_held_out(tmp_path):
    rows = [(format(n, "b").replace("0", "A").replace("1", "C"), "pos" if n % 2 else "neg") for n in range(300)]
    data = read_task(written(tmp_path, {"train": rows, "test": [("GGTT", "pos")]}))
    assert data.held_out
    assert len(data.train) + len(data.validation) == 300
    assert 10 < len(data.validation) < 50


def test_leaks_are_counted_also_as_reverse_complements(tmp_path, caplog):
    splits = {**SPLITS, "test": [("gattaca", "pos"), ("TACGT", "neg"), ("GGGTC", "neg")]}
    with caplog.at_level(logging.WARNING):
        data = read_task(written(tmp_path, splits))
    assert data.leaked == 2
    assert "2 of 3 test sequences stand in the training split too" in caplog.text


def test_a_label_for_every_character_is_letters_numbers_or_a_list(tmp_path):
    rows = {"letters": [("ACG", "001"), ("TT", "10")], "numbers": [("ACG", "0 0 1"), ("TT", "1 0")]}
    for name, split in rows.items():
        data = read_task(written(tmp_path / name, {**dict.fromkeys(SPLITS, split)}), per_token=True)
        assert [example.label for example in data.train] == [(0, 0, 1), (1, 0)]
    lists = [("ACG", [0, -100, 1]), ("TT", [1, 0])]
    data = read_task(written(tmp_path / "lists", dict.fromkeys(SPLITS, lists), "parquet"), per_token=True)
    assert [example.label for example in data.train] == [(0, -100, 1), (1, 0)]
    assert data.classes == ["0", "1"]


BAD = {
    "unknown label": ({"test": [("ACGT", "maybe")]}, "test.csv, line 2 has the label 'maybe', which no training row"),
    "no sequence": ({"test": [("", "pos")]}, r"test.csv, line 2 has no sequence \(column 'sequence'\)"),
    "no label": ({"train": [("ACGT", "pos"), ("ACGT", "")]}, "train.csv, line 3 has no label"),
    "one class": ({"train": [("ACGT", "pos")]}, r"training split has one class only \(pos\)"),
    "empty split": ({"test": []}, "test.csv holds no sequences"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_cannot_be_used_are_refused_with_their_line(tmp_path, name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        read_task(written(tmp_path, {**SPLITS, **change}))


def test_missing_and_doubled_splits_are_refused_with_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        read_task(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no train split; expected train/CLASS/\*.txt or .* it holds nothing"):
        read_task(tmp_path)
    folder = written(tmp_path, {split: SPLITS[split] for split in ("train", "validation")})
    with pytest.raises(ValueError, match=r"has no test split; .* it holds train.csv, validation.csv"):
        read_task(folder)
    written(folder, {"train": SPLITS["train"], "test": SPLITS["test"]}, "fasta")
    with pytest.raises(ValueError, match=r"has several train splits: train.csv, train.fna; keep one"):
        read_task(folder)


def test_files_of_another_form_are_refused(tmp_path):
    folder = written(tmp_path)
    (folder / "train.csv").write_text("seq,label\nACGT,1\n")
    with pytest.raises(ValueError, match=r"train.csv has no column 'sequence'; it has seq, label"):
        read_task(folder)
    (folder / "train.csv").unlink()
    (folder / "train.fna").write_text("ACGT\n>a|1\nACGT\n")
    with pytest.raises(ValueError, match=r"train.fna is not FASTA: it begins with 'A'"):
        read_task(folder)
    (folder / "train.fna").write_text(">a\nACGT\n")
    with pytest.raises(ValueError, match="record 'a' has no label"):
        read_task(folder)


def test_labels_for_characters_are_one_for_each(tmp_path):
    folder = written(tmp_path, {split: [("ACG", "01")] for split in SPLITS})
    with pytest.raises(ValueError, match=r"train.csv, line 2 has 2 labels for 3 characters"):
        read_task(folder, per_token=True)


# published tasks


def test_the_published_tasks_are_8_and_18():
    assert len(GENOMIC_BENCHMARKS) == 8
    assert len(NUCLEOTIDE_TRANSFORMER) == 18
    assert len(TASKS) == 26
    assert [name for name, task in TASKS.items() if task.num_classes == 3] == [
        "human_ensembl_regulatory", "enhancers_types", "splice_sites_all",
    ]  # fmt: skip
    metrics = [task.metric for task in NUCLEOTIDE_TRANSFORMER.values()]
    assert {name: metrics.count(name) for name in metrics} == {"mcc": 12, "f1": 5, "accuracy": 1}


def test_data_of_another_task_are_refused(tmp_path):
    folder = written(tmp_path)
    assert read_task(folder, definition=TASKS["H3"]).classes == ["neg", "pos"]
    with pytest.raises(ValueError, match=r"have 2 classes \(neg, pos\), the published task has 3"):
        read_task(folder, definition=TASKS["enhancers_types"])
    written(folder, {"test": [("A" * 501, "pos")]})
    with pytest.raises(ValueError, match=r"longest sequence has 501 characters, in the published task all have 500"):
        read_task(folder, definition=TASKS["H3"])


# token ids


def test_nucleotides_are_encoded_in_either_case_without_special_tokens():
    rows, cut = encode_sequences(
        [Example("a", "ACgt", 1), Example("b", "nAA", 0)], DNA, length=4, special_tokens=False
    )
    assert [row["input_ids"].tolist() for row in (rows[0], rows[1])] == [[7, 8, 9, 10], [11, 7, 7]]
    assert [int(rows[row]["labels"]) for row in range(2)] == [1, 0]
    assert cut == 0


def test_special_tokens_bear_no_label():
    rows, _ = encode_sequences([Example("a", "ACG", (1, 0, 1))], DNA, length=5, special_tokens=True)
    assert rows[0]["input_ids"].tolist() == [0, 7, 8, 9, 1]
    assert rows[0]["labels"].tolist() == [-100, 1, 0, 1, -100]


def test_longer_sequences_are_refused_or_cut_and_counted():
    examples = [Example("a", "ACGT", 0), Example("b", "ACG", 1), Example("c", "ACGTACG", 1)]
    with pytest.raises(ValueError, match=r"2 of 3 sequences have more than 3 tokens \(the longest 7\)"):
        encode_sequences(examples, DNA, length=3, special_tokens=False)
    rows, cut = encode_sequences(examples, DNA, length=3, special_tokens=False, truncate=True)
    assert cut == 2
    assert rows.lengths.tolist() == [3, 3, 3]


def test_labels_stay_with_their_characters_when_sequences_are_cut():
    example = Example("a", "ACGTA", (0, 1, 2, 3, 4))
    for special, expected in ((False, [0, 1, 2]), (True, [-100, 0, -100])):
        rows, _ = encode_sequences([example], DNA, length=3, special_tokens=special, truncate=True)
        assert rows[0]["labels"].tolist() == expected


def test_labels_for_characters_need_a_token_for_each():
    example = Example("a", "the", (0, 1, 2))
    trained = HyenaByteTokenizer.train_bpe(["the the the the"] * 50, vocab_size=263)
    with pytest.raises(ValueError, match="a token stands for 3 characters; labels for every character need"):
        encode_sequences([example], trained, length=9, special_tokens=False)


def test_rows_cut_shorter_keep_the_beginning():
    rows, _ = encode_sequences([Example("a", "ACGT", (0, 1, 1, 0))], DNA, length=9, special_tokens=False)
    assert rows.cut(2)[0]["input_ids"].tolist() == [7, 8]
    assert rows.cut(2)[0]["labels"].tolist() == [0, 1]
    assert rows.cut(2).digest() != rows.digest()


@pytest.mark.parametrize(("side", "ids"), [("left", [4, 4, 8, 9]), ("right", [8, 9, 4, 4])])
def test_batches_are_padded_to_their_longest(side, ids):
    rows, _ = encode_sequences(
        [Example("a", "ACGT", (0, 1, 1, 0)), Example("b", "CG", (1, 0))], DNA, length=9, special_tokens=False
    )
    batch = PaddingCollator(4, side)([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10], ids]
    assert torch.equal(batch["attention_mask"][1].bool(), torch.tensor(ids) != 4)
    assert torch.equal(batch["labels"][1] == -100, torch.tensor(ids) == 4)


def test_labels_are_counted_by_class():
    rows, _ = encode_sequences(
        [Example("a", "ACG", (0, 2, -100)), Example("b", "AC", (2, 2))], DNA, length=9, special_tokens=True
    )
    assert rows.label_counts(4).tolist() == [1, 0, 3, 0]
