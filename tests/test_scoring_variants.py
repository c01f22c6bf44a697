# SPDX-License-Identifier: Apache-2.0
"""Log-ratios of variants against strings edited by hand and log-softmax in NumPy, and what is refused."""

import gzip
import json
import os
import random
import re
import signal
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import astuple

import numpy as np
import pytest
import torch

from hyena_hf import HyenaNucleotideTokenizer
from hyena_hf.cli import variants as command
from hyena_hf.scoring import tables, windows
from hyena_hf.scoring.reference import Reference, parse_region
from hyena_hf.scoring.variants import (
    COLUMNS,
    VariantEffect,
    VariantSettings,
    annotate,
    score_variants,
    write_variant_effects,
)

from .models import new_model


pysam = pytest.importorskip("pysam")
pytest.importorskip("pyarrow")

IDS = {"[CLS]": 0, "A": 7, "C": 8, "G": 9, "T": 10, "N": 11}
SMALL = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
WINDOW = 32
HEADER = (  # without the contigs, as many callers write it
    '##fileformat=VCFv4.2\n##INFO=<ID=DP,Number=1,Type=Integer,Description="Depth">\n'
    "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
)


def letters(count, seed, alphabet="ACGTacgt"):
    return "".join(random.Random(seed).choices(alphabet, k=count))


CONTIGS = {
    "c1": letters(200, 1),
    "short": letters(20, 2),
    "gaps": letters(40, 3) + "N" * 30 + letters(40, 4) + "nnRg" + letters(20, 5),
    "chr7": letters(50, 6),
}


@pytest.fixture(scope="module")
def model():
    return new_model(dtype=torch.float64, **SMALL)


@pytest.fixture(scope="module")
def tokenizer():
    return HyenaNucleotideTokenizer()


@pytest.fixture
def fasta(tmp_path):
    return write_fasta(tmp_path / "genome.fa", CONTIGS)


def write_fasta(path, contigs, width=30):
    lines = []
    for name, bases in contigs.items():
        lines += [f">{name} a description", *(bases[at : at + width] for at in range(0, len(bases), width))]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_vcf(path, records, header=HEADER):
    """Records of contig, position, REF, ALT; REF None: that of the genome, one base."""
    lines = []
    for contig, pos, ref, alt in records:
        ref = CONTIGS[contig][pos - 1].upper() if ref is None else ref
        lines.append(f"{contig}\t{pos}\t.\t{ref}\t{alt}\t.\t.\tDP=3\n")
    path.write_text(header + "".join(lines))
    return path


def bases(contig, pos, count):
    return CONTIGS[contig][pos - 1 : pos - 1 + count].upper()


def other(base):
    return "ACGT"[("ACGT".index(base.upper()) + 1) % 4]


def log_likelihood(model, text):
    """Sum of the log-probabilities of all letters, the first one after [CLS]."""
    ids = [IDS["[CLS]"], *(IDS[letter] for letter in text)]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    total = 0.0
    for row, following in zip(logits[:-1], ids[1:], strict=True):
        total += row[following] - row.max() - np.log(np.exp(row - row.max()).sum())
    return total


def naive_windows(contig, pos, ref, alt, window=WINDOW):
    """Reference and alternative windows by editing a list of letters, and the range of the window."""
    sequence = [base if base in "ACGT" else "N" for base in CONTIGS[contig].upper()]
    start = pos - 1 - (window - len(ref)) // 2
    while start + window > len(sequence):
        start -= 1
    start = max(start, 0)
    end = min(start + window, len(sequence))
    before, behind = sequence[start : pos - 1], sequence[pos - 1 + len(ref) : end]
    return "".join([*before, *ref, *behind]), "".join([*before, *alt, *behind]), start + 1, end


def assert_as_naive(model, effect, window=WINDOW):
    ref, alt, start, end = naive_windows(effect.chrom, effect.pos, effect.ref, effect.alt, window)
    expected = log_likelihood(model, ref), log_likelihood(model, alt)
    assert (effect.window_start, effect.window_end) == (start, end)
    assert effect.ref_ll == pytest.approx(expected[0], abs=1e-8)
    assert effect.alt_ll == pytest.approx(expected[1], abs=1e-8)
    assert effect.log_ratio == pytest.approx(expected[1] - expected[0], abs=1e-8)
    assert effect.log_ratio_per_token == pytest.approx(expected[1] / len(alt) - expected[0] / len(ref), abs=1e-9)
    assert effect.n_fraction == pytest.approx(ref.count("N") / len(ref))


def scored(model, tokenizer, tmp_path, fasta, records, **options):
    vcf = write_vcf(tmp_path / "calls.vcf", records)
    return score_variants(model, tokenizer, vcf, fasta, **{"window": WINDOW, **options})


def assert_all_as_naive(model, effects, window=WINDOW):
    assert effects
    for effect in effects:
        assert_as_naive(model, effect, window)


CASES = {
    "substitutions in the middle": [("c1", 90, None, other(bases("c1", 90, 1))), ("c1", 91, None, "N")],
    "substitutions of the first and the last base": [
        ("c1", 1, None, other(bases("c1", 1, 1))),
        ("c1", 200, None, other(bases("c1", 200, 1))),
    ],
    "insertions at both ends": [
        ("c1", 1, None, bases("c1", 1, 1) + "GATTACA"),
        ("c1", 200, None, bases("c1", 200, 1) + "GATTACA"),
    ],
    "deletions at both ends": [
        ("c1", 1, bases("c1", 1, 6), bases("c1", 6, 1)),
        ("c1", 194, bases("c1", 194, 7), bases("c1", 194, 1)),
    ],
    "several bases for several": [("c1", 120, bases("c1", 120, 3), "TTTTT"), ("c1", 121, bases("c1", 121, 4), "CG")],
    "several alleles": [("c1", 60, bases("c1", 60, 2), f"{bases('c1', 60, 1)},GGG,TT")],
    "a contig shorter than the window": [("short", 7, None, other(bases("short", 7, 1))), ("short", 20, None, "ACGT")],
    "lower-case alleles": [("c1", 44, bases("c1", 44, 2).lower(), "ttt")],
    "beside N and inside N": [("gaps", 40, None, other(bases("gaps", 40, 1))), ("gaps", 55, "N", "A")],
    "IUPAC letters, of which VCF names one base": [("gaps", 113, "A", "C"), ("gaps", 113, "G", "C")],
}


@pytest.mark.parametrize("records", CASES.values(), ids=CASES)
def test_log_ratios_are_those_of_strings_edited_by_hand(model, tokenizer, tmp_path, fasta, records):
    effects = scored(model, tokenizer, tmp_path, fasta, records)
    assert len(effects) == sum(len(alt.split(",")) for *_, alt in records)
    assert_all_as_naive(model, effects)


@pytest.mark.parametrize("window", [2, 3, 31, 150, 256])
def test_windows_of_any_length_hold_the_variant_in_their_middle(model, tokenizer, tmp_path, fasta, window):
    records = [("c1", pos, None, other(bases("c1", pos, 1))) for pos in (1, 2, 100, 199, 200)]
    effects = scored(model, tokenizer, tmp_path, fasta, records, window=window)
    assert_all_as_naive(model, effects, window)


def test_the_other_strand_is_averaged(model, tokenizer, tmp_path, fasta):
    records = [("c1", 30, None, bases("c1", 30, 1) + "CC")]
    (effect,) = scored(model, tokenizer, tmp_path, fasta, records, reverse_complement=True)
    ref, alt, *_ = naive_windows("c1", 30, effect.ref, effect.alt)
    turn = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}
    strands = [[text, "".join(turn[base] for base in reversed(text))] for text in (ref, alt)]
    values = [sum(log_likelihood(model, text) for text in pair) / 2 for pair in strands]
    assert effect.log_ratio == pytest.approx(values[1] - values[0], abs=1e-8)


def test_the_size_of_batches_changes_no_ratio(tokenizer, tmp_path, fasta):
    model = new_model(**SMALL)
    records = [("c1", pos, None, other(bases("c1", pos, 1)) + "A" * (pos % 5)) for pos in range(1, 200, 17)]
    results = [
        [effect.log_ratio for effect in scored(model, tokenizer, tmp_path, fasta, records, batch_size=size)]
        for size in (1, 5, "auto")
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-5, rtol=0)
    np.testing.assert_allclose(results[0], results[2], atol=1e-5, rtol=0)


def test_windows_that_are_alike_are_scored_once(model, tokenizer, tmp_path, fasta, monkeypatch):
    seen = []
    monkeypatch.setattr(windows, "score", lambda *arguments, **_: seen.extend(arguments[2]) or np.zeros(len(seen)))
    scored(model, tokenizer, tmp_path, fasta, [("c1", 60, None, "A,C,G,T"), ("c1", 60, None, "A,TT")])
    assert len(seen) == len(set(seen)) == 5


def test_an_allele_without_a_sequence_has_a_row_that_says_why(model, tokenizer, tmp_path, fasta):
    base = bases("c1", 60, 1)
    alts = f"{other(base)},*,<DEL>,{base}[c1:90[,]c1:90]{base},.{base},R"
    effects = scored(model, tokenizer, tmp_path, fasta, [("c1", 60, None, alts), ("c1", 61, None, ".")])
    assert [effect.note for effect in effects] == [
        None,
        "ALT * is an allele that an upstream deletion removes",
        "symbolic ALT <DEL>",
        f"breakend ALT {base}[c1:90[",
        f"breakend ALT ]c1:90]{base}",
        f"breakend ALT .{base}",
        "ALT R has letters other than A, C, G, T, N",
        "no ALT",
    ]
    assert [effect.log_ratio is None for effect in effects] == [False] + [True] * 7


def test_an_allele_too_large_for_the_window_has_a_row_that_says_so(model, tokenizer, tmp_path, fasta):
    records = [("c1", 60, None, "A" * 16), ("c1", 60, None, "A" * 17), ("c1", 60, bases("c1", 60, 17), "A")]
    effects = scored(model, tokenizer, tmp_path, fasta, records)
    assert_as_naive(model, effects[0])
    assert effects[1].note == "allele of 17 bases takes more than half of a window of 32"
    assert effects[2].note == "REF: allele of 17 bases takes more than half of a window of 32"


def test_an_insertion_beyond_what_the_model_takes_has_a_row_that_says_so(tokenizer, tmp_path, fasta):
    model = new_model(**SMALL, beyond_trained_length="refuse", max_position_embeddings=33)
    effects = scored(model, tokenizer, tmp_path, fasta, [("c1", 60, None, "A"), ("c1", 60, None, "AC")])
    assert [effect.note for effect in effects] == [
        None,
        "window of 33 bases with the allele is longer than the model takes (32)",
    ]


@pytest.mark.parametrize("bound", [{"beyond_trained_length": "refuse"}, {"trainable_positional_features": True}])
def test_the_default_window_of_a_bounded_model_leaves_room_for_insertions(tokenizer, tmp_path, fasta, bound):
    model = new_model(dtype=torch.float64, **SMALL, **bound, max_position_embeddings=WINDOW + 1)
    records = [
        ("c1", 60, None, "ACGT"),
        ("c1", 60, None, f"{other(bases('c1', 60, 1))},AC,<DEL>,{'A' * 17}"),
        ("c1", 1, None, "A" * 16),
        ("c1", 200, None, "ACG"),
        ("c1", 60, bases("c1", 60, 4), "A"),
        ("short", 9, None, "A" * 16),
    ]
    effects = scored(model, tokenizer, tmp_path, fasta, records, window=None)
    rooms = [29, 31, 31, None, None, 17, 30, 32, 17]
    for effect, window in zip(effects, rooms, strict=True):
        assert (effect.log_ratio is None) == (window is None)
        if window is not None:
            assert_as_naive(model, effect, window)


def test_a_window_with_many_n_is_scored_and_noted(model, tokenizer, tmp_path, fasta):
    records = [("gaps", 35, None, other(bases("gaps", 35, 1))), ("gaps", 10, None, other(bases("gaps", 10, 1)))]
    effects = scored(model, tokenizer, tmp_path, fasta, records, max_n_fraction=0.2)
    assert effects[0].n_fraction == 11 / 32  # N begins at 41, the window ends at 51
    assert effects[0].note == "34.4% of the window are N, more than 20.0%"
    assert effects[0].log_ratio is not None
    assert effects[1].note is None


def test_a_model_without_finite_numbers_is_noted(tokenizer, tmp_path, fasta):
    broken = new_model(**SMALL)
    broken.lm_head.weight.data.fill_(torch.nan)
    (effect,) = scored(broken, tokenizer, tmp_path, fasta, [("c1", 60, None, "ACG")])
    assert effect.note == "the model gives no finite likelihood"


def test_the_window_is_what_the_model_was_trained_on_by_default(model, tokenizer, tmp_path, fasta):
    (effect,) = scored(model, tokenizer, tmp_path, fasta, [("c1", 60, None, "ACG")], window=None)
    assert (effect.window_start, effect.window_end) == (1, 200)
    (effect,) = scored(
        new_model(**SMALL, max_position_embeddings=65),
        tokenizer,
        tmp_path,
        fasta,
        [("c1", 60, None, "A")],
        window=None,
    )
    assert effect.window_end - effect.window_start + 1 == 64  # and [CLS]


# files


@pytest.mark.parametrize("kind", ["gzip", "bgzip", "bcf"])
def test_compressed_variants_are_read(model, tokenizer, tmp_path, fasta, kind):
    header = HEADER.replace("#CHROM", "##contig=<ID=c1,length=200>\n#CHROM")
    plain = write_vcf(tmp_path / "plain.vcf", [("c1", 60, None, "ACG"), ("c1", 70, None, "T,TT")], header)
    packed = tmp_path / {"gzip": "g.vcf.gz", "bgzip": "b.vcf.gz", "bcf": "b.bcf"}[kind]
    if kind == "gzip":
        packed.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        source = pysam.VariantFile(str(plain))
        with source, pysam.VariantFile(str(packed), "wb" if kind == "bcf" else "wz", header=source.header) as target:
            for record in source:
                target.write(record)
    effects = [score_variants(model, tokenizer, file, fasta, window=WINDOW) for file in (plain, packed)]
    assert effects[0] == effects[1]


@pytest.mark.parametrize("kind", ["gzip", "bgzip"])
def test_a_compressed_genome_is_read(tmp_path, fasta, kind):
    packed = tmp_path / "packed.fa.gz"
    if kind == "gzip":
        packed.write_bytes(gzip.compress(fasta.read_bytes()))
    else:
        pysam.tabix_compress(str(fasta), str(packed))
    with Reference(packed) as genome:
        assert genome.contigs == {name: len(sequence) for name, sequence in CONTIGS.items()}
        assert genome.fetch("c1", 25, 95) == CONTIGS["c1"][25:95].upper()


def test_an_index_is_kept_beside_the_genome(fasta):
    with Reference(fasta):
        pass
    assert sorted(path.name for path in fasta.parent.iterdir()) == ["genome.fa", "genome.fa.fai"]


def test_a_genome_in_a_read_only_folder_is_read(fasta, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("hyena_hf.scoring.reference.shutil.copy", refuse)
    with Reference(fasta) as genome:
        assert genome.fetch("chr7", 0, 50) == CONTIGS["chr7"].upper()
    assert not fasta.with_name("genome.fa.fai").exists()


def test_an_index_that_is_older_than_the_genome_is_not_trusted(fasta):
    with Reference(fasta):
        pass
    os.utime(fasta.with_name("genome.fa.fai"), (0, 0))
    write_fasta(fasta, {"new": "acgt" * 5, **CONTIGS})
    with Reference(fasta) as genome:
        assert genome.fetch("new", 0, 20) == "ACGT" * 5
        assert genome.fetch("c1", 0, 200) == CONTIGS["c1"].upper()


@pytest.mark.parametrize("change", [{"c1": "acgt" * 40}, {"chr7": "acgt" * 10}, {"chr7": "acgt" * 15}, {"new": "AC"}])
def test_an_index_of_a_genome_that_ends_elsewhere_is_not_trusted(fasta, change):
    with Reference(fasta):
        pass
    write_fasta(fasta, {**CONTIGS, **change})
    os.utime(fasta, (1e9, 1e9))  # such as one that was unpacked with its date
    with Reference(fasta) as genome:
        assert genome.contigs == {name: len(bases) for name, bases in {**CONTIGS, **change}.items()}
        assert all(genome.fetch(name, 0, 200) == bases.upper() for name, bases in {**CONTIGS, **change}.items())


@pytest.mark.parametrize("text", [">a\nACGT\nACGT", ">a\r\nACGT\r\nAC\r\n\r\n", ">b\n\n>a\nACGT\nACGT\n", ">a\nA\n"])
def test_an_index_of_this_genome_is_used(tmp_path, text, monkeypatch):
    path = tmp_path / "genome.fa"
    path.write_bytes(text.encode())
    with Reference(path) as genome:
        contigs = genome.contigs
    monkeypatch.setattr(pysam, "faidx", None)
    with Reference(path) as genome:
        assert genome.contigs == contigs


def test_blank_records_of_a_genome_are_left_out(tmp_path):
    path = tmp_path / "blank.fa"
    path.write_text(">empty\n>full\nACGT\n>blank\n\n>last\nAC\n")
    with Reference(path) as genome:
        assert genome.contigs == {"full": 4, "last": 2}


def test_a_region_is_read_as_samtools_does():
    contigs = {"c1": 2000, "HLA:1-5": 30}
    assert parse_region("c1", contigs) == ("c1", 0, 2000)
    assert parse_region("c1:1,001-1,100", contigs) == ("c1", 1000, 1100)
    assert parse_region("c1:7", contigs) == ("c1", 6, 2000)
    assert parse_region("HLA:1-5", contigs) == ("HLA:1-5", 0, 30)
    assert parse_region("HLA:1-5:2-3", contigs) == ("HLA:1-5", 1, 3)


# bad input


WRONG = {
    "another base": ([("c1", 5, None, "A"), ("c1", 60, "ACGTACGT", "A")], r"line 5 of .*calls.vcf: REF is ACGTACGT, "
                     rf"but .*genome.fa has {bases('c1', 60, 8)} at c1:60"),
    "N where the genome has a base": ([("c1", 60, "N", "A")], r"line 4 .* REF is N, but"),
    "a base where the genome has N": ([("gaps", 55, "A", "C")], r"line 4 .* REF is A, but .* has N at gaps:55"),
    "no such contig": ([("c1", 5, None, "A"), ("nowhere", 5, "A", "C")],
                       r"line 5 .*contig 'nowhere' is not in .*, which holds c1, short, gaps, chr7;"),
    "a contig with chr": ([("7", 5, "A", "C")], r"line 4 .*contig '7' is not in .*, which names it 'chr7'; rename"),
    "a contig without chr": ([("chrc1", 5, "A", "C")], r"line 4 .*contig 'chrc1' .*, which names it 'c1'; rename"),
    "behind the end": ([("c1", 201, "A", "C")], r"c1:201 with REF A ends at position 201, but c1 has the "
                       "positions 1 to 200"),
    "over the end": ([("c1", 199, "ACG", "C")], "c1:199 with REF ACG ends at position 201"),
    "position 0": ([("c1", 0, "A", "C")], r"c1:0 with REF A ends at position 0, but c1 has the positions 1 to 200"),
}  # fmt: skip


@pytest.mark.parametrize(("records", "message"), WRONG.values(), ids=WRONG)
def test_a_record_that_does_not_match_the_genome_is_named_by_its_line(
    model, tokenizer, tmp_path, fasta, records, message, monkeypatch
):
    monkeypatch.setattr(windows, "score", lambda *_, **__: pytest.fail("scored before all records were checked"))
    with pytest.raises(ValueError, match=message):
        scored(model, tokenizer, tmp_path, fasta, records)


BROKEN_VCF = {
    "no bytes": ("", r"is empty; a VCF has a header"),
    "no header": ("c1\t5\t.\tA\tC\t.\t.\t.\n", "its header cannot be read"),
    "a position that is no number": (f"{HEADER}c1\tfive\t.\tA\tC\t.\t.\t.\n", "line 4 of .* cannot be read"),
    "a line cut off": (f"{HEADER}c1\t5\t.\t{bases('c1', 5, 1)}\tC\t.\t.\t.\nc1\t9\n", "line 5 of .* cannot be read"),
    "a blank line": (f"{HEADER}\nc1\t5\t.\tA\tC\t.\t.\t.\n", "line 4 of .*no blank line"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN_VCF.values(), ids=BROKEN_VCF)
def test_a_broken_vcf_is_refused(model, tokenizer, tmp_path, fasta, text, message):
    vcf = tmp_path / "broken.vcf"
    vcf.write_text(text)
    with pytest.raises(ValueError, match=message):
        score_variants(model, tokenizer, vcf, fasta, window=WINDOW)


@pytest.mark.parametrize("kind", ["gzip", "bgzip"])
def test_a_compressed_vcf_that_is_cut_off_is_refused(model, tokenizer, tmp_path, fasta, kind):
    numbers = random.Random(0)
    records = [("c1", numbers.randint(1, 200), None, letters(9, index)) for index in range(5000)]
    plain, packed = write_vcf(tmp_path / "calls.vcf", records), tmp_path / "calls.vcf.gz"
    if kind == "gzip":
        packed.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        pysam.tabix_compress(str(plain), str(packed))
    packed.write_bytes(packed.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"cut off|truncated"):
        score_variants(model, tokenizer, packed, fasta, window=WINDOW)


BROKEN_FASTA = {
    "no bytes": ("", "is empty; expected FASTA"),
    "no name": ("ACGT\n", "begins with 'ACGT'; expected FASTA"),
    "FASTQ": ("@r\nACGT\n+\nIIII\n", "begins with '@r'"),
    "a short line inside": (">c\nACGT\nAC\nACGT\n", "line 3 has 2 bases among lines of 4"),
    "a blank line inside": (">c\nACGT\n\nACGT\n", "line 3 has 0 bases among lines of 4"),
    "a long line": (">c\nACGT\nACGTA\n", "line 3 has 5 bases after lines of 4"),
    "a name that comes twice": (">c\nACGT\n>c\nAC\n", "line 3 of .* repeats the name 'c' of line 1"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN_FASTA.values(), ids=BROKEN_FASTA)
def test_a_broken_genome_is_refused(tmp_path, text, message):
    path = tmp_path / "broken.fa"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Reference(path)


def test_a_letter_that_is_no_dna_is_named_by_its_position(tmp_path):
    path = tmp_path / "protein.fa"
    path.write_text(">p\nACGTAC\nGLACGT\n")
    with (
        Reference(path) as genome,
        pytest.raises(ValueError, match=r"p, holds 'L' at position 8, .* no letter of DNA"),
    ):
        genome.fetch("p", 3, 10)


def test_files_that_are_not_there_are_refused(model, tokenizer, tmp_path, fasta):
    with pytest.raises(ValueError, match=r"none.vcf: there is no such file; name a VCF"):
        score_variants(model, tokenizer, tmp_path / "none.vcf", fasta)
    with pytest.raises(ValueError, match=r"none.fa: there is no such file; name a FASTA"):
        Reference(tmp_path / "none.fa")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 1}, ValueError, "window is 1; .* at least 2"),
        ({"window": 2.5}, TypeError, "window must be a number of bases"),
        ({"max_n_fraction": 10}, ValueError, "max_n_fraction is 10; it is a share"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ],
)
def test_settings_out_of_range_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        VariantSettings(**options)


def test_a_window_longer_than_the_model_takes_is_refused(tokenizer, tmp_path, fasta):
    model = new_model(**SMALL, beyond_trained_length="refuse", max_position_embeddings=64)
    with pytest.raises(ValueError, match="window is 64 bases, but the model takes 63"):
        scored(model, tokenizer, tmp_path, fasta, [("c1", 60, None, "A")], window=64)


def test_a_tokenizer_without_a_token_for_each_base_is_refused(model, tmp_path, fasta):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE({"A": 0, "C": 1, "AC": 2, "G": 3, "T": 4, "N": 5}, [("A", "C")]))
    with pytest.raises(ValueError, match="reads ACGTN as 4 tokens; windows need one token for each base"):
        scored(model, PreTrainedTokenizerFast(tokenizer_object=pairs), tmp_path, fasta, [("c1", 60, None, "A")])


# tables


MANY = [("c1", pos, None, f"{other(bases('c1', pos, 1))},GATT") for pos in range(3, 190, 8)] + [
    ("c1", 195, None, "<DEL>")
]


def written(model, tokenizer, tmp_path, fasta, name, records=MANY, **options):
    vcf = write_vcf(tmp_path / "calls.vcf", records)
    settings = VariantSettings(window=WINDOW)
    count = write_variant_effects(
        model, tokenizer, vcf, fasta, tmp_path / name, **{"settings": settings, "part_records": 5, **options}
    )
    assert count == len(records)
    return [VariantEffect(*row) for row in tables.read_rows(tmp_path / name, COLUMNS)]


@pytest.mark.parametrize("name", ["out.tsv", "out.parquet"])
def test_a_table_holds_every_row_and_leaves_no_parts(model, tokenizer, tmp_path, fasta, name):
    rows = written(model, tokenizer, tmp_path, fasta, name)
    direct = scored(model, tokenizer, tmp_path, fasta, MANY)
    assert [row.log_ratio is None for row in rows] == [False] * 48 + [True]
    for row, effect in zip(rows, direct, strict=True):
        assert astuple(row)[:7] == astuple(effect)[:7]
        assert row.note == effect.note
        assert row.log_ratio == pytest.approx(effect.log_ratio, abs=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls.vcf", "genome.fa", "genome.fa.fai", name]


@pytest.mark.parametrize("name", ["out.tsv", "out.parquet"])
def test_a_vcf_without_records_gives_a_table_without_rows(model, tokenizer, tmp_path, fasta, name):
    assert written(model, tokenizer, tmp_path, fasta, name, records=[]) == []
    assert score_variants(model, tokenizer, tmp_path / "calls.vcf", fasta) == []


def test_a_table_that_exists_is_not_overwritten(model, tokenizer, tmp_path, fasta):
    (tmp_path / "out.tsv").write_text("mine")
    with pytest.raises(ValueError, match=r"out.tsv exists already and is not overwritten"):
        written(model, tokenizer, tmp_path, fasta, "out.tsv")
    assert (tmp_path / "out.tsv").read_text() == "mine"


def test_a_table_of_an_unknown_format_is_refused(model, tokenizer, tmp_path, fasta):
    with pytest.raises(ValueError, match=r"ends in '.csv', but a table is written as .tsv or .parquet"):
        written(model, tokenizer, tmp_path, fasta, "out.csv")


def run_in_children(*works):
    """Exit codes of copies of this process, each with its work: 0, or minus the signal that killed it."""
    children = []
    for work in works:
        children.append(os.fork())
        if children[-1] == 0:
            code = 99
            try:
                work()
                code = 0
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # newer Pythons: it has threads and forks
def test_a_run_that_was_killed_goes_on_where_it_was(model, tokenizer, tmp_path, fasta, monkeypatch):
    whole = written(model, tokenizer, tmp_path, fasta, "whole.tsv")
    append, calls, score = tables.ResumableTable.append, [], windows.score

    def die_in_part_two(self, rows):
        if self._count == 2:
            self._part(2).with_name(".part-000002.tsv.7.unfinished").write_text("chrom\tpo")
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(tables.ResumableTable, "append", die_in_part_two)
        killed = run_in_children(lambda: written(model, tokenizer, tmp_path, fasta, "out.tsv"))
    assert killed == [-signal.SIGKILL]
    assert not (tmp_path / "out.tsv").exists()
    monkeypatch.setattr(windows, "score", lambda *given, **options: calls.append(1) or score(*given, **options))
    assert written(model, tokenizer, tmp_path, fasta, "out.tsv") == whole
    assert len(calls) == 5 - 2  # 25 records in parts of 5, two of which were there
    assert not (tmp_path / "out.tsv.parts").exists()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_processes_write_the_table_of_one(model, tokenizer, tmp_path, fasta):
    whole = written(model, tokenizer, tmp_path, fasta, "whole.tsv")

    def work(rank):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=rank, world_size=2)
        written(model, tokenizer, tmp_path, fasta, "out.tsv")
        torch.distributed.destroy_process_group()

    assert run_in_children(lambda: work(0), lambda: work(1)) == [0, 0]
    for row, alone in zip(tables.read_rows(tmp_path / "out.tsv", COLUMNS), whole, strict=True):
        assert row == pytest.approx(astuple(alone), abs=1e-9)


def interrupted(model, tokenizer, tmp_path, fasta, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tables.ResumableTable, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            written(model, tokenizer, tmp_path, fasta, "out.tsv")
    return tmp_path / "out.tsv.parts"


CHANGES = {
    "window": {"settings": VariantSettings(window=30)},
    "reverse_complement": {"settings": VariantSettings(window=WINDOW, reverse_complement=True)},
    "part_records": {"part_records": 6},
    "vcf": {"records": MANY[:-1]},
}


@pytest.mark.parametrize(("key", "change"), CHANGES.items(), ids=CHANGES)
def test_parts_of_a_run_with_other_options_are_refused(model, tokenizer, tmp_path, fasta, monkeypatch, key, change):
    interrupted(model, tokenizer, tmp_path, fasta, monkeypatch)
    with pytest.raises(ValueError, match=rf"was begun with another {key}: .* there, .* now.* name another table"):
        written(model, tokenizer, tmp_path, fasta, "out.tsv", **change)


def test_parts_of_another_model_are_refused(model, tokenizer, tmp_path, fasta, monkeypatch):
    interrupted(model, tokenizer, tmp_path, fasta, monkeypatch)
    changed = new_model(dtype=torch.float64, seed=1, **SMALL)
    with pytest.raises(ValueError, match="was begun with another model"):
        written(changed, tokenizer, tmp_path, fasta, "out.tsv")


def test_the_size_of_batches_may_change_when_a_run_goes_on(model, tokenizer, tmp_path, fasta, monkeypatch):
    interrupted(model, tokenizer, tmp_path, fasta, monkeypatch)
    written(model, tokenizer, tmp_path, fasta, "out.tsv", settings=VariantSettings(window=WINDOW, batch_size=2))


def test_a_folder_of_parts_that_is_not_ours_is_left_alone(model, tokenizer, tmp_path, fasta):
    (tmp_path / "out.tsv.parts").mkdir()
    (tmp_path / "out.tsv.parts" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty \(it holds notes.txt\)"):
        written(model, tokenizer, tmp_path, fasta, "out.tsv")


def test_a_manifest_says_what_parts_were_made_from(model, tokenizer, tmp_path, fasta, monkeypatch):
    folder = interrupted(model, tokenizer, tmp_path, fasta, monkeypatch)
    manifest = json.loads((folder / "_manifest.json").read_text())["job"]
    assert manifest["window"] == WINDOW
    assert {"model", "tokenizer", "vcf", "reference", "reverse_complement", "max_n_fraction"} < set(manifest)


# annotation


@pytest.mark.parametrize("name", ["annotated.vcf", "annotated.vcf.gz"])
def test_an_annotated_vcf_holds_the_ratio_of_every_allele(model, tokenizer, tmp_path, fasta, name):
    records = [("c1", 60, None, f"{other(bases('c1', 60, 1))},*,ACG"), ("gaps", 9, None, "."), ("c1", 70, None, "TT")]
    rows = written(model, tokenizer, tmp_path, fasta, "out.tsv", records=records)
    annotate(tmp_path / "calls.vcf", tmp_path / "out.tsv", tmp_path / name)
    with pysam.VariantFile(str(tmp_path / name)) as file:
        found = [(record.pos, record.info["DP"], record.info.get("HYENA_LLR")) for record in file]
    assert [entry[:2] for entry in found] == [(60, 3), (9, 3), (70, 3)]
    assert found[0][2][1] is None
    assert found[1][2] is None
    assert [found[0][2][0], found[0][2][2], found[2][2][0]] == pytest.approx(
        [rows[0].log_ratio, rows[2].log_ratio, rows[4].log_ratio], rel=1e-5
    )


def test_an_annotated_vcf_is_the_old_one_but_for_the_new_field(model, tokenizer, tmp_path, fasta):
    header = HEADER.replace("INFO\n", "INFO\tFORMAT\tone\n")
    line = f"c1\t60\trs1;rs2\t{bases('c1', 60, 1)}\tTTT\t30.10\tlow\tEND=70;AF=0.123456789\tGT:AD\t0|1:3\n"
    vcf = tmp_path / "calls.vcf"
    vcf.write_text(header + line)
    write_variant_effects(model, tokenizer, vcf, fasta, tmp_path / "out.tsv")
    annotate(vcf, tmp_path / "out.tsv", tmp_path / "annotated.vcf")
    lines = (tmp_path / "annotated.vcf").read_text().splitlines(keepends=True)
    assert lines.pop(2).startswith("##INFO=<ID=HYENA_LLR,Number=A,Type=Float")
    assert re.sub(";HYENA_LLR=[-.0-9]+", "", "".join(lines)) == header + line


def test_an_annotated_bcf_becomes_text(model, tokenizer, tmp_path, fasta):
    plain = write_vcf(tmp_path / "plain.vcf", MANY[:2], HEADER.replace("#CHROM", "##contig=<ID=c1>\n#CHROM"))
    source = pysam.VariantFile(str(plain))
    with source, pysam.VariantFile(str(tmp_path / "calls.bcf"), "wb", header=source.header) as target:
        target.write(next(source))
    write_variant_effects(model, tokenizer, tmp_path / "calls.bcf", fasta, tmp_path / "out.tsv")
    annotate(tmp_path / "calls.bcf", tmp_path / "out.tsv", tmp_path / "annotated.vcf")
    with pysam.VariantFile(str(tmp_path / "annotated.vcf")) as file:
        assert [len(record.info["HYENA_LLR"]) for record in file] == [2]


def test_annotation_with_the_table_of_another_vcf_is_refused(model, tokenizer, tmp_path, fasta):
    written(model, tokenizer, tmp_path, fasta, "out.tsv", records=MANY[:3])
    vcf = write_vcf(tmp_path / "calls.vcf", MANY[1:3])
    with pytest.raises(ValueError, match=r"line 4 of .* is c1 11 ., but scores go on with c1 3 .; score"):
        annotate(vcf, tmp_path / "out.tsv", tmp_path / "annotated.vcf")
    assert not (tmp_path / "annotated.vcf").exists()


def test_an_annotation_that_is_there_already_is_refused(model, tokenizer, tmp_path, fasta):
    written(model, tokenizer, tmp_path, fasta, "out.tsv", records=MANY[:3])
    annotate(tmp_path / "calls.vcf", tmp_path / "out.tsv", tmp_path / "annotated.vcf")
    with pytest.raises(ValueError, match=r"annotated.vcf exists already"):
        annotate(tmp_path / "calls.vcf", tmp_path / "out.tsv", tmp_path / "annotated.vcf")
    with pytest.raises(ValueError, match=r"annotated.vcf has HYENA_LLR already"):
        annotate(tmp_path / "annotated.vcf", tmp_path / "out.tsv", tmp_path / "twice.vcf")


# command


def parsed(*words: object) -> Namespace:
    parser = ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["variants", *map(str, words)])


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_command_writes_a_table_and_an_annotated_vcf(folder, model, tokenizer, tmp_path, fasta, capsys):
    vcf, out, annotated = write_vcf(tmp_path / "calls.vcf", MANY), tmp_path / "o.parquet", tmp_path / "a.vcf"
    options = ["--window", 32, "--device", "cpu", "--batch-size", 4, "--annotate", annotated]
    arguments = parsed(folder, vcf, fasta, out, *options)
    arguments.run(arguments)
    assert capsys.readouterr().out == f"25 records; written to {out} and {annotated}\n"
    expected = score_variants(model, tokenizer, vcf, fasta, window=32)
    ratios = [VariantEffect(*row).log_ratio for row in tables.read_rows(out, COLUMNS)]
    assert ratios == pytest.approx([effect.log_ratio for effect in expected], abs=1e-9)
    assert annotated.read_text().count("HYENA_LLR=") == 25


def test_the_command_goes_on_from_a_kill_before_the_annotation_without_scoring(folder, tmp_path, fasta, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    vcf, out, annotated = write_vcf(tmp_path / "calls.vcf", MANY), tmp_path / "o.tsv", tmp_path / "a.vcf"
    words = folder, vcf, fasta, out, "--window", 32, "--device", "cpu", "--annotate", annotated
    with monkeypatch.context() as patch:
        patch.setattr("hyena_hf.scoring.variants.annotate_vcf", stop)
        with pytest.raises(KeyboardInterrupt):
            parsed(*words).run(parsed(*words))
    assert not out.exists()
    monkeypatch.setattr(windows, "score", stop)
    parsed(*words).run(parsed(*words))
    assert annotated.read_text().count("HYENA_LLR=") == 25
    assert len(list(tables.read_rows(out, COLUMNS))) == 49
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "many"], "--batch-size many is neither a number nor auto"),
        (["--annotate", "a.txt"], r"a.txt: an annotated file ends in .vcf"),
        (["--max-n", "2"], "max_n_fraction is 2.0"),
        (["--device", "toaster"], "cannot be put on the device toaster"),
    ],
)
def test_the_command_refuses_options_before_any_work(folder, tmp_path, fasta, options, message):
    arguments = parsed(folder, write_vcf(tmp_path / "calls.vcf", MANY), fasta, tmp_path / "out.tsv", *options)
    with pytest.raises(ValueError, match=message):
        arguments.run(arguments)
    assert not list(tmp_path.glob("out*"))


def test_the_command_refuses_a_model_that_is_not_there(tmp_path, fasta):
    arguments = parsed("nowhere", write_vcf(tmp_path / "calls.vcf", MANY), fasta, tmp_path / "out.tsv")
    with pytest.raises(ValueError, match="nowhere is no folder, and no name on the hub"):
        arguments.run(arguments)


def test_missing_pysam_names_what_to_install(fasta, monkeypatch):
    monkeypatch.setitem(sys.modules, "pysam", None)
    with pytest.raises(ImportError, match=r"pip install 'hyena-hf\[genomes\]'"):
        Reference(fasta)


def test_the_command_scores_in_another_dtype_where_told(folder, tmp_path, fasta):
    vcf, ratios = write_vcf(tmp_path / "calls.vcf", MANY[:4]), []
    for dtype in ("auto", "float32"):
        arguments = parsed(folder, vcf, fasta, tmp_path / f"{dtype}.tsv", "--device", "cpu", "--dtype", dtype)
        arguments.run(arguments)
        rows = tables.read_rows(tmp_path / f"{dtype}.tsv", COLUMNS)
        ratios.append([VariantEffect(*row).log_ratio for row in rows])
    assert ratios[0] != ratios[1]
    assert ratios[0] == pytest.approx(ratios[1], abs=1e-4)
