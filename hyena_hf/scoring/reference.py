# SPDX-License-Identifier: Apache-2.0
"""Bases of a reference genome by contig and position, from FASTA that is indexed, compressed or neither.

pysam reads; this file sees to what it leaves to its callers: an index where there is none (or a stale one), plain
gzip, repeated names, and messages that say which line is wrong.
"""

from __future__ import annotations

import gzip
import re
import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any


# IUPAC-IUB 1984: which bases a letter stands for
AMBIGUOUS = {
    "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC", "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG",
}  # fmt: skip
_LETTERS = set("ACGTNU") | set(AMBIGUOUS)
_TO_N = str.maketrans(dict.fromkeys([*AMBIGUOUS, "U"], "N"))
_GZIP, _BLOCKED = b"\x1f\x8b", b"BC"  # of a blocked gzip file: a field of this name at byte 12
# SAM specification, 4.1.2: the empty block that ends such a file
_LAST_BLOCK = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


class Reference:
    """Sequences of a FASTA file, fetched by position; to be used in a `with` statement.

    An index (`.fai`, for blocked gzip `.gzi` too) is used where it is at least as new as the file and, unless that is
    compressed, ends where the file does: a file that was put in place of another may be older than the index of that
    one. (Another file of the same layout is not told from it, nor a compressed one: delete the index.) Where there is
    none it is made and kept beside the file; where that folder is read-only, or the index there is stale, in a
    temporary folder. Plain gzip has no positions, so it is unpacked into a temporary folder; `bgzip` spares that.

    Attributes:
        path: Of the file.
        contigs: Names and lengths of the sequences; empty records are left out.

    Raises:
        ImportError: pysam is not installed.
        ValueError: No such file, no FASTA, cut off or damaged, lines of unequal length inside a sequence, or a name
            that comes twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with ExitStack() as stack:
            self._file = _opened(self.path, stack)
            self._resources = stack.pop_all()
        self.contigs: dict[str, int] = dict(zip(self._file.references, self._file.lengths, strict=True))

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def length(self, contig: str, place: str = "") -> int:
        """Bases of a contig.

        Args:
            contig: Its name.
            place: Who asks, for the message: `"line 7 of calls.vcf: "`.

        Raises:
            ValueError: There is no such contig.
        """
        if contig not in self.contigs:
            raise ValueError(f"{place}contig {contig!r} is not in {self.path}{self._hint(contig)}")
        return self.contigs[contig]

    def fetch(self, contig: str, start: int, end: int) -> str:
        """Bases `start` to `end` (0-based, the last one excluded), in capitals; IUPAC letters are kept.

        Raises:
            ValueError: There is no such contig, or the sequence holds what is no letter of DNA.
        """
        self.length(contig)
        text = self._file.fetch(contig, start, end).upper()
        check_letters(text, f"{self.path}, {contig},", start + 1)
        return text

    def _hint(self, contig: str) -> str:
        bare = contig.removeprefix("chr")
        alike = {bare, f"chr{bare}"} | ({"M", "chrM", "MT"} if bare in ("M", "MT") else set())
        if found := sorted(alike & set(self.contigs)):
            return (
                f", which names it {found[0]!r}; rename one of them (`bcftools annotate --rename-chrs`), and be sure "
                f"that both are of one assembly"
            )
        names = list(self.contigs)
        return f", which holds {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}; give the genome it belongs to"


def as_model_letters(bases: str) -> str:
    """Bases with every letter that is no A, C, G or T as N: the alphabet of DNA models."""
    return bases.translate(_TO_N)


def check_letters(bases: str, name: str, first: int = 1) -> None:
    """Refuse what is no DNA.

    Args:
        bases: In capitals.
        name: Of the sequence, for the message.
        first: Position of the first one.

    Raises:
        ValueError: A letter other than A, C, G, T, N, U and the IUPAC letters.
    """
    if wrong := set(bases) - _LETTERS:
        at = min(map(bases.index, wrong))
        raise ValueError(
            f"{name} holds {bases[at]!r} at position {first + at}, which is no letter of DNA; expected A, C, G, T, N "
            f"or an IUPAC letter"
        )


def is_base_of(base: str, found: str) -> bool:
    """Whether a REF letter agrees with the letter of the genome.

    VCF 4.3, 1.6.1: an ambiguous letter of the genome is reduced to a base that it stands for. N stays N.
    """
    return base == found or (found in AMBIGUOUS and base in AMBIGUOUS[found] + "N")


def pysam_module() -> Any:
    """pysam, or what to install."""
    try:
        import pysam
    except ImportError as error:
        raise ImportError("VCF and FASTA are read with pysam: pip install 'hyena-hf[genomes]'") from error
    return pysam


def silence(pysam: Any, stack: ExitStack) -> None:
    """Keep htslib from writing to stderr what we say in errors, until a stack is closed."""
    stack.callback(pysam.set_verbosity, pysam.set_verbosity(0))


def compression(path: Path) -> str:
    """`"none"`, `"gzip"` or `"bgzf"`, by a file's first bytes."""
    with path.open("rb") as handle:
        start = handle.read(14)
    if not start.startswith(_GZIP):
        return "none"
    return "bgzf" if start[12:14] == _BLOCKED else "gzip"


def check_end(path: Path) -> None:
    """Refuse a blocked gzip file that was cut off between two blocks, where every block that is left is whole.

    Raises:
        ValueError: It does not end with the empty block that marks the end.
    """
    if compression(path) != "bgzf":
        return
    with path.open("rb") as handle:
        handle.seek(max(path.stat().st_size - len(_LAST_BLOCK), 0))
        end = handle.read()
    if end != _LAST_BLOCK:
        raise ValueError(
            f"{path} is cut off: it lacks the empty block of {len(_LAST_BLOCK)} bytes that ends a file of bgzip; copy "
            f"it again, or pack it anew (`bgzip`)"
        )


def unpacked(path: Path, folder: Path) -> Path:
    """A copy of a plain gzip file without compression.

    Raises:
        ValueError: The file is cut off or damaged.
    """
    target = folder / path.stem
    try:
        with gzip.open(path) as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); copy it again") from error
    return target


def lines_of(path: Path) -> Any:
    """A file that gives its lines as bytes, whether it is compressed or not."""
    return path.open("rb") if compression(path) == "none" else gzip.open(path)


def _opened(path: Path, stack: ExitStack) -> Any:
    pysam = pysam_module()
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; name a FASTA file")
    check_end(path)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hyena-reference-")))
    readable = unpacked(path, folder) if compression(path) == "gzip" else path
    _check_start(path, readable)
    with ExitStack() as opening:
        silence(pysam, opening)
        index = _index(pysam, readable, path, folder)
    names = {"filepath_index": str(index[0])} | ({"filepath_index_compressed": str(index[1])} if index[1:] else {})
    try:
        file = pysam.FastaFile(str(readable), **names)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read with its index {index[0]} ({error}); delete the index") from error
    stack.callback(file.close)
    return file


def _check_start(path: Path, readable: Path) -> None:
    with lines_of(readable) as lines:
        first = next((line for line in lines if line.strip()), b"")
    if not first:
        raise ValueError(f"{path} is empty; expected FASTA: >name, then lines of bases")
    if not first.startswith(b">"):
        raise ValueError(f"{path} begins with {first[:20].decode('latin-1').strip()!r}; expected FASTA: >name")


def _index(pysam: Any, readable: Path, path: Path, folder: Path) -> list[Path]:
    """Index files of a FASTA: those beside it or, where they are missing or stale, new ones."""
    endings = [".fai", ".gzi"] if compression(readable) == "bgzf" else [".fai"]
    beside = [readable.with_name(readable.name + ending) for ending in endings]
    newer = all(file.is_file() and file.stat().st_mtime >= readable.stat().st_mtime for file in beside)
    if newer and (endings[1:] or _ends_with(beside[0], readable)):
        return beside
    made = [folder / f"index{ending}" for ending in endings]
    _check_names(path, readable)
    options = [word for pair in zip(["--fai-idx", "--gzi-idx"], map(str, made), strict=False) for word in pair]
    try:
        pysam.faidx(str(readable), *options)
    except pysam.SamtoolsError as error:
        raise ValueError(f"{path} cannot be indexed: {_wrong_line(readable)}") from error
    if not any(file.exists() for file in beside):
        with suppress(OSError):  # a read-only folder: the temporary index serves
            for file, name in zip(made, beside, strict=True):
                unfinished = Path(shutil.copy(file, name.with_name(f"{name.name}.{folder.name}")))
                unfinished.replace(name)  # at once, for whoever reads meanwhile
    return made


def _ends_with(index: Path, readable: Path) -> bool:
    """Whether only white space follows the last base that an index knows of an uncompressed file."""
    end = 0
    try:
        for line in index.read_text().splitlines():
            length, offset, width, step = (int(field) for field in line.split("\t")[1:5])
            rows, rest = divmod(length, width) if width else (0, 0)
            end = max(end, offset + rows * step + rest - (step - width if rows and not rest else 0))
    except ValueError:
        return False
    if end > readable.stat().st_size:
        return False
    with readable.open("rb") as file:
        file.seek(max(end - 1, 0))
        if end and not file.read(1).strip():
            return False
        if file.read(1).strip():  # the last line of bases goes on
            return False
        return not any(line.strip() for line in file)


def _check_names(path: Path, readable: Path) -> None:
    """Refuse a name that comes twice: htslib would take the first sequence and drop the other."""
    seen: dict[bytes, int] = {}
    with lines_of(readable) as lines:
        for number, line in enumerate(lines, 1):
            if not line.startswith(b">"):
                continue
            name = (line[1:].split() or [b""])[0]
            if name in seen:
                raise ValueError(
                    f"line {number} of {path} repeats the name {name.decode('latin-1')!r} of line {seen[name]}; "
                    f"positions would be ambiguous, rename one"
                )
            seen[name] = number


def _wrong_line(readable: Path) -> str:
    """Which line keeps a FASTA from being indexed: positions are computed from lines of one length."""
    width, previous = 0, 0
    with lines_of(readable) as lines:
        for number, line in enumerate(lines, 1):
            length = len(line.strip())
            if line.startswith(b">"):
                width = previous = 0
                continue
            if previous < width:
                return (
                    f"line {number - 1} has {previous} bases among lines of {width}; all lines of a sequence but the "
                    f"last need one length, re-wrap it (`seqkit seq -w 60`)"
                )
            width, previous = width or length, length
            if length > width:
                return f"line {number} has {length} bases after lines of {width}; re-wrap it (`seqkit seq -w 60`)"
    return "htslib gives no reason; is it cut off, or the disk full?"


def parse_region(region: str, contigs: dict[str, int]) -> tuple[str, int, int]:
    """`contig`, `contig:start` or `contig:start-end` (1-based, the end included) as contig, start, end (0-based).

    Args:
        region: As samtools reads it; numbers may have commas, and contigs colons.
        contigs: Names and lengths.

    Raises:
        ValueError: No such contig, no numbers, or a range outside of the contig.
    """
    if region in contigs:
        return region, 0, contigs[region]
    contig, _, numbers = region.rpartition(":")
    match = re.fullmatch(r"([\d,]+)(?:-([\d,]+))?", numbers)
    if not contig or match is None:
        known = ", ".join(list(contigs)[:5])
        raise ValueError(
            f"region {region!r} is neither a contig ({known}{' ...' if len(contigs) > 5 else ''}) nor "
            f"CONTIG:START-END, as in {next(iter(contigs), 'chr1')}:101-200"
        )
    if contig not in contigs:
        raise ValueError(f"region {region!r}: there is no contig {contig!r}; there are {', '.join(list(contigs)[:5])}")
    first, last = (number and int(number.replace(",", "")) for number in match.groups())
    last = contigs[contig] if last is None else last
    if not 1 <= int(first) <= int(last) <= contigs[contig]:
        raise ValueError(
            f"region {region!r} is {first} to {last}, but {contig} has the positions 1 to {contigs[contig]}, and the "
            f"start must not be behind the end"
        )
    return contig, int(first) - 1, int(last)
