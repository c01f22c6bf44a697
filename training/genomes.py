# SPDX-License-Identifier: Apache-2.0
"""Bacterial genomes that install from Debian packages: fetch, check, read, cut, encode.

    genomes = load_genomes(["ecoli-536", "ecoli-mg1655"])         # {name: [Contig, ...]}, fetched once into a cache
    load_genomes(["lambda"], folder=Path("my/fasta/files"))       # no network: the same files, found by their names

`bowtie-examples`, `bowtie2-examples` and `ragout-examples` hold 17 complete bacterial genomes and a phage. A package
is downloaded with `apt-get download` (no root, nothing installed) and unpacked with `dpkg-deb`; every file must have
the SHA-256 and the number of bases written down here. Coordinates are 0-based, ends are exclusive.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hyena_hf.tokenization_nucleotide import VOCAB


CACHE = Path(".cache/genomes")


@dataclass(frozen=True)
class Genome:
    """Where one genome is and what it must be."""

    species: str
    package: str  # Debian package
    path: str  # of the .fa.gz under usr/share/doc/ in the package
    bases: int  # of all contigs
    sha256: str  # of the .gz file


def _ragout(species: str, path: str, bases: int, sha256: str) -> Genome:
    return Genome(species, "ragout-examples", f"ragout/examples/{path}.fasta.gz", bases, sha256)


GENOMES: dict[str, Genome] = {
    "lambda": Genome(
        "Escherichia phage lambda",
        "bowtie2-examples",
        "bowtie2/examples/reference/lambda_virus.fa.gz",
        48_502,
        "08fe207fcb4bbe47e80cc7469e68d1f1d8d497a836fe1c09f5a9734d2e4cd9e0",
    ),
    "ecoli-536": Genome(
        "Escherichia coli",
        "bowtie-examples",
        "bowtie/examples/genomes/NC_008253.fna.gz",
        4_938_920,
        "b5f5e726fa79caeeb12c19f3697faf7af437f57daf4195419056d639fb36a334",
    ),
    "ecoli-mg1655": _ragout(
        "Escherichia coli",
        "E.Coli/references/MG1655-K12",
        4_639_675,
        "ae952b2873ef8badc956925a61c5b536d4e40322b4e8b15dde3d8eda7ce3c879",
    ),
    "ecoli-dh1": _ragout(
        "Escherichia coli",
        "E.Coli/references/DH1",
        4_630_707,
        "53621b05f11c062c3600ed53fc05f2e6db3605d8104260674ff019e536acdccd",
    ),
    "vcholerae-n16961": _ragout(
        "Vibrio cholerae",
        "V.Cholerae/references/O1_biovar",
        4_033_464,
        "ef8ecca73105608a904c9e81973ef3af472096e349a463fbec324411c6566cc9",
    ),
    "vcholerae-inaba": _ragout(
        "Vibrio cholerae",
        "V.Cholerae/references/O1_Inaba",
        4_202_811,
        "21142953cd1733f09cf66d1540a1685a8122ba97bf9ba5255e6a8ff5344b624e",
    ),
    "vcholerae-o395": _ragout(
        "Vibrio cholerae",
        "V.Cholerae/references/O395",
        4_135_300,
        "3ecf6fc1bfac8787e560fe4c9965d1248bb2de1987d0cb7eb5470f01a1ca8772",
    ),
    "vcholerae-h1": _ragout(
        "Vibrio cholerae",
        "V.Cholerae/references/H1",
        4_089_020,
        "0bbc9c0e3cf2c1925758a9bf66b1ca6bc0318064b13bf888707b57f2cb9945f7",
    ),
    "saureus-n315": _ragout(
        "Staphylococcus aureus",
        "S.Aureus/references/N315",
        2_814_816,
        "f00af0fea6d59d4aef1cac64be57a5215739b7c23fae7f6bc0d44e1f9805a0e9",
    ),
    "saureus-col": _ragout(
        "Staphylococcus aureus",
        "S.Aureus/references/COL",
        2_809_422,
        "e42c7cbcb34ea73ed05d79eff4e222d8852caf412c859a94a7feb03ec42d0648",
    ),
    "saureus-jkd6008": _ragout(
        "Staphylococcus aureus",
        "S.Aureus/references/JKD6008",
        2_924_344,
        "f05727535ae62475899e6505741771b03710de6290c18f7c3d88826089a0c7a4",
    ),
    "saureus-usa300": _ragout(
        "Staphylococcus aureus",
        "S.Aureus/references/USA300_FPR3757",
        2_872_769,
        "61066f50bd925c6adc75fd98df7c864b1bfcbfa30f3c773b2a4a3a88084041d4",
    ),
    "saureus-rf122": _ragout(
        "Staphylococcus aureus",
        "S.Aureus/references/RF122",
        2_742_531,
        "462b4f0756da814c67b526f5a226ec0c53125ddf1cb8c89acc968fc7c5e16996",
    ),
    "hpylori-g27": _ragout(
        "Helicobacter pylori",
        "H.Pylori/references/G27",
        1_652_982,
        "80dd2ad4125b47fa644350cec0bee7bf3956e379bf3e3e97a25e9c17ba297658",
    ),
    "hpylori-els37": _ragout(
        "Helicobacter pylori",
        "H.Pylori/references/ELS37",
        1_664_587,
        "cbb724aae0e46b32488606ec436679e58631943b39abcc37049989dd47aed49c",
    ),
    "hpylori-puno120": _ragout(
        "Helicobacter pylori",
        "H.Pylori/references/Puno120",
        1_624_979,
        "79fa6c9c68e8ea4feeec8a33bdf510a2f48c15c14cb04379e5ef72e44434557f",
    ),
    "hpylori-gambia94-24": _ragout(
        "Helicobacter pylori",
        "H.Pylori/references/Gambia94_24",
        1_709_911,
        "92e4798809e20eb07cbc08bd4f2536b316a7a0cd3dd8d596b7638f9dd6d626f6",
    ),
    "hpylori-sjm180": _ragout(
        "Helicobacter pylori",
        "H.Pylori/references/SJM180",
        1_658_051,
        "6b5971d7c592ad7c4e609845e4667c3fd27f2ab73967b6475677295e2ba5d879",
    ),
}


class Contig(NamedTuple):
    """One FASTA record: the first word of its header, and its bases in capitals."""

    name: str
    sequence: bytes


class OpenFrame(NamedTuple):
    """An open reading frame, start codon to stop codon inclusive: bases [begin, end) of the forward strand."""

    begin: int
    end: int
    forward: bool


def load_genomes(names: Iterable[str], *, folder: Path | None = None, cache: Path = CACHE) -> dict[str, list[Contig]]:
    """Read genomes, after fetching the packages that are not in the cache yet.

    Args:
        names: keys of `GENOMES`.
        folder: where the .gz files already are, under any subfolders; then nothing is fetched.
        cache: where packages are unpacked, one folder for each.

    Raises:
        ValueError: an unknown name, or a file that is not the one expected (both checksums are named).
        FileNotFoundError: `folder` lacks a file, or the package tools are missing.
        RuntimeError: a package could not be fetched.
    """
    names = list(names)
    unknown = sorted(set(names) - GENOMES.keys())
    if unknown:
        raise ValueError(f"no genome is called {', '.join(unknown)}; choose from {', '.join(GENOMES)}")
    return {name: _load(GENOMES[name], folder, cache) for name in names}


def _load(genome: Genome, folder: Path | None, cache: Path) -> list[Contig]:
    path = locate(genome, folder=folder, cache=cache)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != genome.sha256:
        raise ValueError(
            f"{path} has SHA-256 {digest}, expected {genome.sha256}: another release of {genome.package}, or a "
            "damaged file; delete it and fetch again"
        )
    contigs = read_fasta(path)
    bases = sum(len(contig.sequence) for contig in contigs)
    if bases != genome.bases:
        raise ValueError(f"{path} holds {bases:,} bases, expected {genome.bases:,}")
    return contigs


def locate(genome: Genome, *, folder: Path | None = None, cache: Path = CACHE) -> Path:
    """The file of a genome: in `folder` if one is given, or else in the cache, fetched where it is not there."""
    if folder is not None:
        found = sorted(Path(folder).rglob(Path(genome.path).name))
        if not found:
            raise FileNotFoundError(
                f"{folder} holds no {Path(genome.path).name} ({genome.species}); it is in the Debian package "
                f"{genome.package}, leave the folder out to fetch it"
            )
        return found[0]
    unpacked = Path(cache) / genome.package
    if not unpacked.exists():
        fetch_package(genome.package, unpacked)
    return unpacked / "usr/share/doc" / genome.path


def fetch_package(package: str, target: Path) -> None:
    """Download a Debian package and unpack it into `target`, which appears when it is whole.

    Raises:
        FileNotFoundError: no `apt-get` or `dpkg-deb` on this machine.
        RuntimeError: one of them failed; the message holds what it said.
    """
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise FileNotFoundError(
            f"{' and '.join(missing)} not found, so {package} cannot be fetched here; on a Debian or Ubuntu machine "
            f"run `apt-get download {package} && dpkg-deb -x {package}_*.deb genomes`, copy the folder and name it "
            "(--genomes genomes)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        _run(["apt-get", "download", package], work, package)
        _run(["dpkg-deb", "-x", str(next(work.glob("*.deb"))), "unpacked"], work, package)
        (work / "unpacked").rename(target)


def _run(command: Sequence[str], folder: Path, package: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed while fetching {package}: {done.stderr.strip()}; "
            "is the package list current (apt-get update) and the network up?"
        )


def read_fasta(path: Path) -> list[Contig]:
    """Read the records of a FASTA file, gzip or plain, with Biopython; letters become capitals.

    Raises:
        ValueError: no records, a record without bases, a broken gzip file, or a letter outside the IUPAC code.
    """
    try:
        from Bio.SeqIO.FastaIO import SimpleFastaParser
    except ImportError as error:
        raise ImportError("reading FASTA needs Biopython: pip install 'hyena-hf[genomes]'") from error

    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            records = [
                Contig((title.split() or [""])[0], sequence.upper().encode())
                for title, sequence in SimpleFastaParser(file)
            ]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); fetch it again") from error
    if not records:
        raise ValueError(f"{path} holds no FASTA records: expected lines that begin with '>'")
    for contig in records:
        strange = set(contig.sequence) - set(_IUPAC)
        if strange or not contig.sequence:
            found = f"has {bytes(sorted(strange)).decode()!r}" if strange else "is empty"
            raise ValueError(f"{path}: record {contig.name!r} {found}; expected the IUPAC letters {_IUPAC.decode()}")
    return records


_IUPAC = b"ACGTNRYSWKMBDHV"
_COMPLEMENT = bytes.maketrans(_IUPAC, b"TGCANYRSWMKVHDB")
_IDS = np.full(256, VOCAB["N"], dtype=np.int64)
_IDS[list(b"ACGT")] = [VOCAB[base] for base in "ACGT"]


def reverse_complement(sequence: bytes) -> bytes:
    """The other strand, read in its own direction."""
    return sequence.translate(_COMPLEMENT)[::-1]


def encode(sequence: bytes) -> torch.Tensor:
    """Token ids (length,) int64 of capitals: those of `HyenaNucleotideTokenizer`, every other letter as N."""
    return torch.from_numpy(_IDS[np.frombuffer(sequence, dtype=np.uint8)])


def spread(sequence: bytes, *, count: int, length: int) -> list[bytes]:
    """`count` pieces of `length` bases, evenly spaced from the first base to the last.

    Raises:
        ValueError: they do not fit without overlap.
    """
    if count < 1 or length < 1 or count * length > len(sequence):
        raise ValueError(f"{count} pieces of {length:,} bases do not fit in {len(sequence):,} bases")
    starts = np.linspace(0, len(sequence) - length, count).round().astype(int)
    return [sequence[start : start + length] for start in starts]


def sample_windows(contigs: Sequence[Contig], *, count: int, length: int, seed: int) -> list[bytes]:
    """`count` windows of `length` bases at random places, every place of the genome with the same chance, strands in
    turn.

    Raises:
        ValueError: no contig is that long.
    """
    long_enough = [contig.sequence for contig in contigs if len(contig.sequence) >= length]
    if not long_enough:
        raise ValueError(
            f"no contig holds {length:,} bases: the longest has {max(len(c.sequence) for c in contigs):,}"
        )
    places = np.array([len(sequence) - length + 1 for sequence in long_enough])
    draws = np.random.default_rng(seed).integers(places.sum(), size=count)
    ends = np.cumsum(places)
    windows = []
    for index, draw in enumerate(draws):
        contig = int(np.searchsorted(ends, draw, side="right"))
        start = int(draw - ends[contig] + places[contig])
        window = long_enough[contig][start : start + length]
        windows.append(window if index % 2 == 0 else reverse_complement(window))
    return windows


STOPS = (b"TAA", b"TAG", b"TGA")


def open_frames(sequence: bytes, *, min_length: int) -> list[OpenFrame]:
    """Open reading frames in all six frames, in the order of their beginnings.

    A frame runs from the first ATG after a stop codon (or after the edge) to the next stop codon in phase; those that
    no stop codon ends are left out.

    Args:
        sequence: one strand, capitals.
        min_length: fewest bases, both codons included.
    """
    size = len(sequence)
    forward = [OpenFrame(*frame, True) for frame in _frames(sequence, min_length, first=b"ATG")]
    backward = [
        OpenFrame(size - end, size - begin, False)
        for begin, end in _frames(reverse_complement(sequence), min_length, first=b"ATG")
    ]
    return sorted(forward + backward)


def longest_apart(frames: Iterable[OpenFrame], *, overlap: int = 60) -> list[OpenFrame]:
    """The frames that remain when each one, longest first, is dropped if it shares over `overlap` bases with a kept
    one: long frames are genes, and a gene's five other frames are often open by chance."""
    kept: list[OpenFrame] = []
    for frame in sorted(frames, key=lambda frame: frame.begin - frame.end):
        if all(min(frame.end, other.end) - max(frame.begin, other.begin) <= overlap for other in kept):
            kept.append(frame)
    return sorted(kept)


def without_frames(sequence: bytes, *, min_length: int) -> NDArray[np.bool_]:
    """Which bases lie in no stretch free of stop codons of `min_length` bases or more, in none of the six frames.

    Stricter than "between two genes": it needs no start codon and no choice among overlapping frames.

    Returns:
        (len(sequence),) bool.
    """
    free = np.ones(len(sequence), dtype=bool)
    for begin, end in _frames(sequence, min_length, first=None):
        free[begin:end] = False
    for begin, end in _frames(reverse_complement(sequence), min_length, first=None):
        free[len(sequence) - end : len(sequence) - begin] = False
    return free


def _frames(sequence: bytes, min_length: int, *, first: bytes | None) -> Iterator[tuple[int, int]]:
    """Stretches of one strand that end with a stop codon and hold no other in phase; from `first` on, if given."""
    stops, starts = (_places(sequence, codons) for codons in (STOPS, (first,) if first else ()))
    for phase in range(3):
        ends = stops[stops % 3 == phase]
        begins = np.concatenate([[phase], ends[:-1] + 3])
        if first is None:  # the stretch after the last stop codon counts too
            last = len(sequence) - (len(sequence) - phase) % 3
            begins = np.append(begins, ends[-1] + 3) if len(ends) else begins
            ends = np.append(ends, last - 3)
        else:
            begins = _at_or_after(starts[starts % 3 == phase], begins[: len(ends)], absent=len(sequence))
        for begin, end in zip(begins.tolist(), (ends + 3).tolist(), strict=True):
            if end - begin >= min_length:
                yield begin, end


def _places(sequence: bytes, codons: Sequence[bytes]) -> NDArray[np.int64]:
    letters = np.frombuffer(sequence, dtype=np.uint8)
    count = max(0, len(letters) - 2)
    found = np.zeros(count, dtype=bool)
    for codon in codons:
        found |= np.logical_and.reduce([letters[i : i + count] == codon[i] for i in range(3)])
    return np.flatnonzero(found)


def _at_or_after(places: NDArray[np.int64], wanted: NDArray[np.int64], *, absent: int) -> NDArray[np.int64]:
    return np.append(places, absent)[np.searchsorted(places, wanted)]
