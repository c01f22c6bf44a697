"""Sequences from files: what each kind of file gives, what is refused and how it is named, windows.

Run: python -m pytest tests/test_scoring_sequences.py -q
"""

import gzip
import random

import datasets
import pandas as pd
import pysam
import pytest

from hyena_hf import HyenaByteTokenizer, HyenaNucleotideTokenizer
from hyena_hf.scoring import read_sequences
from hyena_hf.scoring.reference import Reference
from hyena_hf.scoring.sequences import Cleaning, Record, windows


def written(folder, name, text):
    data = text.encode() if isinstance(text, str) else text
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def pairs(path, **options):
    return [(record.id, record.sequence) for record in read_sequences(path, **options)]


FASTA = ">a first\nACGT\nac\n\n>b\nNRY\n"


@pytest.mark.parametrize("name", ["x.fa", "x.fasta.gz", "x.FNA"])
def test_fasta_is_read_in_capitals_and_may_be_packed(tmp_path, name):
    assert pairs(written(tmp_path, name, FASTA)) == [("a", "ACGTAC"), ("b", "NRY")]


def test_lower_case_is_kept_when_asked_for(tmp_path):
    assert pairs(written(tmp_path, "x.fa", FASTA), case="keep")[0] == ("a", "ACGTac")


@pytest.mark.parametrize("name", ["x.fq", "x.fastq.gz"])
def test_fastq_gives_its_reads(tmp_path, name):
    assert pairs(written(tmp_path, name, "@r1\nACgT\n+\nIIII\n@r2\nA\n+\nI\n")) == [("r1", "ACGT"), ("r2", "A")]


def test_windows_line_ends_and_spaces_are_no_letters(tmp_path):
    assert pairs(written(tmp_path, "x.fa", ">a\r\nAC GT\r\nA\r\n")) == [("a", "ACGTA")]


def test_lines_are_numbered_and_keep_their_case(tmp_path):
    assert pairs(written(tmp_path, "x.txt", "ACGT\nac\n\n")) == [("1", "ACGT"), ("2", "ac")]
    assert pairs(written(tmp_path, "x.txt.gz", "ac\n"), case="upper") == [("1", "AC")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "folder"])
def test_tables_give_a_column(tmp_path, kind):
    frame, path = pd.DataFrame({"name": ["x", "y"], "dna": ["ACGT", "NA"]}), tmp_path / f"t.{kind}"
    write = {
        "csv": lambda: frame.to_csv(path, index=False),
        "tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "json": lambda: frame.to_json(path, orient="records"),
        "parquet": lambda: frame.to_parquet(path),
        "folder": lambda: datasets.Dataset.from_pandas(frame).save_to_disk(path),
    }
    write[kind]()
    assert pairs(path, column="dna") == [("1", "ACGT"), ("2", "NA")]
    assert pairs(path, column="dna", id_column="name") == [("x", "ACGT"), ("y", "NA")]


def test_quotes_a_byte_order_mark_and_blank_lines_at_the_end_move_no_field(tmp_path):
    text = b'\xef\xbb\xbfsequence,note\r\nAC,"1,\r\n2"\r\nGT,\r\n\r\n'
    assert pairs(written(tmp_path, "x.csv", text)) == [("1", "AC"), ("2", "GT")]


def test_a_field_of_a_table_may_be_longer_than_csv_takes_by_default(tmp_path):
    letters = "ACGT" * 50_000
    assert pairs(written(tmp_path, "x.csv", f"sequence\n{letters}\n")) == [("1", letters)]


PACKED = gzip.compress(b">a\n" + bytes(range(65, 85)) * 5000)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.fa", "", "holds no sequences"),
        ("x.fa", ">a\nA\n>b\n>c\nA\n", "record 2 of .*'b'. has no letters"),
        ("x.fa", ">a\nA\n>\nA\n", "record 2 of .* has no name"),
        ("x.fa", "ACGT\n", "begins with b'ACGT"),
        ("x.fa", "junk\n>a\nACGT\n", "begins with b'junk"),
        ("x.fq", "@a\nACGT\n+\nIIII\n@b\nAC\n+\nI\n", "broken behind record 1"),
        ("x.fq", "@a\nACGT\n+\nIIII\n@b\nAC\n", "record 2 of .*'b'. has no qualities"),
        ("x.fa.data.gz", FASTA, "suffix"),
        ("x.doc", FASTA, "suffix that says nothing"),
        ("x.txt", "", "holds no sequences"),
        ("x.txt", "A\n\nC\n", "line 2 of .* is blank"),
        ("x.txt", b"\xff\xfe\n", "no readable text"),
        ("x.csv", "", "is empty"),
        ("x.csv", "sequence,a\nACGT,1\n,2\n", "record 2 of .* has no letters"),
        ("x.csv", "dna\nACGT\n", "no column 'sequence' but dna"),
        ("x.csv", "sequence,a\nACGT,1,\nCCCC,2,\n", "line 2 has 3 fields, but the header names 2"),
        ("x.csv", 'a,sequence\n"1\n2",AC\n3\n', "line 4 has 1 fields, but the header names 2"),
        ("x.tsv", "id\tsequence\na\tAC\tGT\n", "line 2 has 3 fields"),
        ("x.csv", "sequence\nACGT\n\nCCCC\n", "line 3 is blank"),
        ("x.csv", 'sequence\nACGT\n""\n', "record 2 of .* has no letters"),
        ("x.csv", "sequence,sequence\nA,C\n", "names 'sequence' 2 times"),
        ("x.csv", 'sequence\n"ACGT\n', "mend its quotes"),
        ("x.jsonl", '{"sequence": 1}\n', "holds int, not text"),
        ("x.jsonl", "{half\n", "cannot be read as a table"),
        ("x.parquet", "PAR1", "cannot be read as a table"),
    ],
)
def test_bad_files_are_refused_in_words(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        pairs(written(tmp_path, name, text))


@pytest.mark.parametrize("suffix", ["fa.gz", "txt.gz"])
def test_a_packed_file_that_ends_early_is_refused(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(PACKED[:-20])
    with pytest.raises(ValueError, match="copy it again"):
        pairs(path)


def test_a_file_of_bgzip_that_is_cut_off_between_two_blocks_is_refused(tmp_path):
    draw, path = random.Random(0), tmp_path / "x.fa.gz"
    with pysam.BGZFile(str(path), "wb") as file:
        file.write("".join(f">r{index}\n{''.join(draw.choices('ACGT', k=60))}\n" for index in range(5000)).encode())
    assert len(pairs(path)) == 5000
    data = path.read_bytes()
    second = int.from_bytes(data[16:18], "little") + 1
    path.write_bytes(data[:second])
    for read in (pairs, Reference):
        with pytest.raises(ValueError, match=r"x\.fa\.gz is cut off"):
            read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.fa does not exist"):
        pairs(tmp_path / "gone.fa")


def test_windows_cover_every_letter_and_none_lies_in_another():
    for length in range(1, 14):
        for size in range(1, 8):
            for stride in range(1, size + 1):
                record = Record("c", "".join(chr(65 + at) for at in range(length)))
                found = list(windows([record], size, stride))
                ends = [(0, min(size, length))]
                while ends[-1][1] < length:
                    start = ends[-1][0] + stride
                    ends.append((start, min(start + size, length)))
                assert [(w.id, w.sequence) for w in found] == [
                    (f"c:{a + 1}-{b}", record.sequence[a:b]) for a, b in ends
                ]


@pytest.mark.parametrize(("size", "stride"), [(0, None), (5, 0), (5, 6)])
def test_windows_that_would_skip_letters_are_refused(size, stride):
    with pytest.raises(ValueError, match="use"):
        list(windows([], size, stride))


def test_ambiguous_letters_become_n_for_a_tokenizer_without_them_and_are_counted():
    cleaning = Cleaning(HyenaNucleotideTokenizer(), upper=True)
    assert cleaning("acgtRYn") == "ACGTNNN"
    assert (cleaning.lower, cleaning.ambiguous) == (5, 2)


def test_letters_stay_where_the_tokenizer_knows_them_or_was_told_otherwise():
    assert Cleaning(HyenaByteTokenizer(), upper=False)("acRY") == "acRY"
    assert Cleaning(HyenaNucleotideTokenizer(ambiguous="unk"), upper=False)("acRY") == "acRY"
