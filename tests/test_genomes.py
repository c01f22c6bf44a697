# SPDX-License-Identifier: Apache-2.0
import dataclasses
import gzip
import hashlib
import re

import numpy as np
import pytest
import torch

from hyena_hf.tokenization_nucleotide import HyenaNucleotideTokenizer
from training import genomes
from training.genomes import (
    GENOMES,
    Contig,
    Genome,
    OpenFrame,
    encode,
    load_genomes,
    longest_apart,
    open_frames,
    read_fasta,
    reverse_complement,
    sample_windows,
    spread,
    without_frames,
)


COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A"}
FASTA = b">one first contig\nACGT\nacgtn\n>two\nGGRA\n"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A known genome `tiny` whose file is in a folder."""
    packed = gzip.compress(FASTA, mtime=0)
    genome = Genome("Test species", "tiny-examples", "tiny/genome.fa.gz", 13, hashlib.sha256(packed).hexdigest())
    monkeypatch.setitem(GENOMES, "tiny", genome)
    folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "genome.fa.gz").write_bytes(packed)
    return folder


def random_sequence(length, seed=0):
    return np.random.default_rng(seed).choice(list(b"ACGT"), size=length).astype(np.uint8).tobytes()


def tools(monkeypatch, tmp_path, apt_get):
    """Stand-ins for the package tools on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    unpack = 'mkdir -p "$3/usr/share/doc/tiny" && cp "$2" "$3/usr/share/doc/tiny/genome.fa.gz"'
    for name, body in (("apt-get", apt_get), ("dpkg-deb", unpack)):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_every_known_genome_has_its_own_checksum_and_a_name_of_words_and_numbers():
    digests = [genome.sha256 for genome in GENOMES.values()]

    assert len(set(digests)) == len(digests)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests)
    assert all(re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name) for name in GENOMES)


def test_a_genome_is_read_from_a_folder_without_the_package_tools(tiny, monkeypatch):
    monkeypatch.setattr(genomes.shutil, "which", lambda _: None)

    found = load_genomes(["tiny"], folder=tiny)

    assert found == {"tiny": [Contig("one", b"ACGTACGTN"), Contig("two", b"GGRA")]}


def test_a_package_is_fetched_once_and_then_read_from_the_cache(tiny, monkeypatch, tmp_path):
    source = tiny / "sub" / "genome.fa.gz"
    tools(monkeypatch, tmp_path, f'echo x >> {tmp_path}/calls; cp {source} "$2_1_all.deb"')

    for _ in range(2):
        found = load_genomes(["tiny"], cache=tmp_path / "cache")

    assert found["tiny"][1].sequence == b"GGRA"
    assert (tmp_path / "calls").read_text() == "x\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny-examples"]


def test_a_failed_download_says_what_the_tool_said_and_leaves_nothing(tiny, monkeypatch, tmp_path):  # noqa: ARG001
    tools(monkeypatch, tmp_path, "echo 'E: Unable to locate package' >&2; exit 100")

    with pytest.raises(RuntimeError, match="Unable to locate package; is the package list current"):
        load_genomes(["tiny"], cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_machine_without_the_package_tools_is_told_what_to_do(tiny, monkeypatch, tmp_path):  # noqa: ARG001
    monkeypatch.setattr(genomes.shutil, "which", lambda _: None)

    with pytest.raises(FileNotFoundError, match=r"apt-get and dpkg-deb not found.*apt-get download tiny-examples"):
        load_genomes(["tiny"], cache=tmp_path / "cache")


def test_a_folder_without_the_file_names_the_package(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no lambda_virus.fa.gz .*bowtie2-examples"):
        load_genomes(["lambda"], folder=tmp_path)


def test_another_file_of_that_name_is_refused_with_both_checksums(tiny):
    (tiny / "sub" / "genome.fa.gz").write_bytes(gzip.compress(b">one\nACGT\n"))

    with pytest.raises(ValueError, match=rf"has SHA-256 [0-9a-f]{{64}}, expected {GENOMES['tiny'].sha256}"):
        load_genomes(["tiny"], folder=tiny)


def test_a_wrong_number_of_bases_is_refused(tiny, monkeypatch):
    monkeypatch.setitem(GENOMES, "tiny", dataclasses.replace(GENOMES["tiny"], bases=14))

    with pytest.raises(ValueError, match="holds 13 bases, expected 14"):
        load_genomes(["tiny"], folder=tiny)


def test_an_unknown_genome_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no genome is called ecoli-k12; choose from lambda, ecoli-536"):
        load_genomes(["ecoli-k12"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no FASTA records"),
        (b">one\n>two\nACGT\n", "record 'one' is empty"),
        (b">one\nAC-T\n", "record 'one' has '-'"),
    ],
)
def test_a_file_that_is_no_genome_is_refused(tmp_path, content, message):
    path = tmp_path / "genome.fa"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=message):
        read_fasta(path)


def test_a_truncated_gzip_file_is_refused(tmp_path):
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(gzip.compress(FASTA * 100)[:-20])

    with pytest.raises(ValueError, match="not a complete gzip file"):
        read_fasta(path)


def test_the_reverse_complement_pairs_every_base_from_the_end():
    sequence = random_sequence(101)

    expected = "".join(COMPLEMENT[base] for base in reversed(sequence.decode()))
    assert reverse_complement(sequence).decode() == expected
    assert reverse_complement(reverse_complement(b"ACGTNRYSWKMBDHV")) == b"ACGTNRYSWKMBDHV"


@pytest.mark.filterwarnings("ignore::hyena_hf.tokenization_nucleotide.ReplacedNucleotideWarning")
def test_ids_are_those_of_the_tokenizer():
    sequence = random_sequence(50) + b"NRYS"

    ids = HyenaNucleotideTokenizer()(sequence.decode(), add_special_tokens=False)["input_ids"]
    assert torch.equal(encode(sequence), torch.tensor(ids))


def test_pieces_are_evenly_spaced_from_the_first_base_to_the_last():
    sequence = random_sequence(1_000)

    pieces = spread(sequence, count=3, length=100)

    assert pieces == [sequence[:100], sequence[450:550], sequence[900:]]
    with pytest.raises(ValueError, match="11 pieces of 100 bases do not fit in 1,000"):
        spread(sequence, count=11, length=100)


def test_windows_come_from_all_contigs_and_both_strands_and_depend_on_the_seed_alone():
    contigs = [Contig("a", random_sequence(300, 1)), Contig("b", random_sequence(200, 2)), Contig("c", b"ACGT")]

    windows = sample_windows(contigs, count=40, length=50, seed=3)

    strands = [w if i % 2 == 0 else reverse_complement(w) for i, w in enumerate(windows)]
    homes = [next(c.name for c in contigs if strand in c.sequence) for strand in strands]
    assert set(homes) == {"a", "b"}
    assert windows == sample_windows(contigs, count=40, length=50, seed=3)
    assert windows != sample_windows(contigs, count=40, length=50, seed=4)


def test_a_window_longer_than_every_contig_is_refused():
    with pytest.raises(ValueError, match="no contig holds 5 bases: the longest has 4"):
        sample_windows([Contig("c", b"ACGT")], count=1, length=5, seed=0)


def plain_frames(sequence, min_length):
    """Codon by codon: from the first ATG after a stop codon to the next stop codon."""
    frames = set()
    for forward, strand in ((True, sequence), (False, reverse_complement(sequence))):
        for phase in range(3):
            start = None
            for place in range(phase, len(strand) - 2, 3):
                codon = strand[place : place + 3]
                if codon == b"ATG" and start is None:
                    start = place
                if codon in (b"TAA", b"TAG", b"TGA"):
                    if start is not None and place + 3 - start >= min_length:
                        ends = (start, place + 3)
                        ends = ends if forward else (len(strand) - ends[1], len(strand) - ends[0])
                        frames.add(OpenFrame(*ends, forward))
                    start = None
    return frames


@pytest.mark.parametrize("length", [0, 5, 999, 3_001])
def test_open_frames_are_those_of_a_plain_scan(length):
    sequence = random_sequence(length, length)

    frames = open_frames(sequence, min_length=30)

    assert set(frames) == plain_frames(sequence, 30)
    assert frames == sorted(set(frames))


@pytest.mark.parametrize("length", [4, 998, 2_000])
def test_bases_outside_frames_lie_in_no_long_stretch_without_stop_codons(length):
    sequence = random_sequence(length, length)
    covered = np.zeros(length, dtype=bool)
    for forward, strand in ((True, sequence), (False, reverse_complement(sequence))):
        for phase in range(3):
            codons = [strand[place : place + 3] for place in range(phase, length - 2, 3)]
            begin = phase
            for index, codon in enumerate(codons):
                end = phase + 3 * (index + 1)
                if codon in genomes.STOPS or index == len(codons) - 1:
                    if end - begin >= 60:
                        covered[slice(begin, end) if forward else slice(length - end, length - begin)] = True
                    begin = end

    np.testing.assert_array_equal(without_frames(sequence, min_length=60), ~covered)


def test_of_overlapping_frames_the_longest_is_kept():
    long, inside, beside = OpenFrame(0, 900, True), OpenFrame(300, 600, False), OpenFrame(850, 1_200, True)

    assert longest_apart([inside, long, beside], overlap=60) == [long, beside]
    assert longest_apart([inside, long, beside], overlap=40) == [long]


@pytest.mark.real
def test_the_genomes_of_the_packages_are_the_ones_written_down(tmp_path):
    found = load_genomes(GENOMES, cache=tmp_path)

    assert {name: sum(len(c.sequence) for c in contigs) for name, contigs in found.items()} == {
        name: genome.bases for name, genome in GENOMES.items()
    }
