# SPDX-License-Identifier: Apache-2.0
"""Variants of a VCF or BCF file, each checked against the genome it claims to belong to."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .reference import Reference, compression, is_base_of, lines_of, pysam_module, silence, unpacked


_BASES = re.compile("[ACGTN]+")
_SHOWN = 30  # bases of an allele in a message


@dataclass(frozen=True)
class Variant:
    """One record.

    Attributes:
        chrom: Contig.
        start: First base of REF, 0-based.
        id: None where there is none.
        ref: Capitals.
        alts: As in the file, sequences in capitals; `.` where ALT is missing.
        place: Where it stands, for messages: `"line 12 of calls.vcf"`.
    """

    chrom: str
    start: int
    id: str | None
    ref: str
    alts: tuple[str, ...]
    place: str

    @property
    def end(self) -> int:
        """One behind the last base of REF, 0-based."""
        return self.start + len(self.ref)


class VariantFile:
    """Records of a VCF (plain, gzip, bgzip) or BCF file, in its order; to be used in a `with` statement.

    Args:
        path: The file. No index is needed.

    Attributes:
        file: The `pysam.VariantFile`.

    Raises:
        ImportError: pysam is not installed.
        ValueError: No such file, an empty one, or no VCF.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        pysam = pysam_module()
        if not self.path.is_file():
            raise ValueError(f"{path}: there is no such file; name a VCF or BCF file")
        if self.path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; a VCF has a header even where it has no variants")
        with ExitStack() as stack:
            self._readable = self.path
            if compression(self.path) == "gzip":  # pysam reads only blocked gzip
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hyena-variants-"))
                self._readable = unpacked(self.path, Path(folder))
            silence(pysam, stack)
            try:
                self.file: Any = stack.enter_context(pysam.VariantFile(str(self._readable)))
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} is no VCF or BCF file: its header cannot be read ({error})") from error
            self._before = None if self.file.is_bcf else _header_lines(self._readable)
            self._resources = stack.pop_all()

    def __enter__(self) -> VariantFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def place(self, number: int) -> str:
        """Where record `number` (from 0) stands; a BCF file has no lines."""
        where = f"record {number + 1}" if self._before is None else f"line {self._before + number + 1}"
        return f"{where} of {self.path}"

    def records(self) -> Iterator[tuple[str, Any]]:
        """Records of pysam with their places.

        Raises:
            ValueError: A line that is no record, or a file that is cut off.
        """
        number = 0
        try:
            for record in self.file:
                yield self.place(number), record
                number += 1
        except OSError as error:
            raise ValueError(
                f"{self.place(number)} cannot be read ({error}); expected CHROM, POS, ID, REF, ALT, QUAL, FILTER, "
                f"INFO, separated by tabs, and no blank line"
            ) from error

    def lines(self) -> Iterator[str]:
        """The text of the file, line by line; of BCF, the text it stands for."""
        if self.file.is_bcf:
            yield from str(self.file.header).splitlines()
            yield from (str(record).rstrip("\n") for _, record in self.records())
            return
        with lines_of(self._readable) as lines:
            yield from (line.decode("utf-8", "surrogateescape").rstrip("\r\n") for line in lines)


def read_variants(path: str | Path, reference: Reference) -> Iterator[Variant]:
    """Records in the order of the file, checked.

    Raises:
        ValueError: A record that does not match the genome, with its line: a contig or position that does not exist,
            or other bases.
    """
    with VariantFile(path) as file:
        for place, record in file.records():
            alts = tuple(alt.upper() if alt.isalpha() else alt for alt in record.alts or (".",))
            variant = Variant(record.chrom, record.pos - 1, record.id, record.ref.upper(), alts, place)
            _check(variant, reference)
            yield variant


def why_no_sequence(alt: str) -> str:
    """Why an ALT field stands for no bases, in words; empty where it does."""
    if _BASES.fullmatch(alt):
        return ""
    if alt == ".":
        return "no ALT"
    if alt == "*":
        return "ALT * is an allele that an upstream deletion removes"
    if alt.startswith("<"):
        return f"symbolic ALT {alt}"
    if "[" in alt or "]" in alt or alt.startswith(".") or alt.endswith("."):
        return f"breakend ALT {alt}"
    return f"ALT {_shown(alt)} has letters other than A, C, G, T, N"


def _check(variant: Variant, reference: Reference) -> None:
    where = f"{variant.chrom}:{variant.start + 1}"
    length = reference.length(variant.chrom, f"{variant.place}: ")
    if variant.start < 0 or variant.end > length:
        raise ValueError(
            f"{variant.place}: {where} with REF {_shown(variant.ref)} ends at position {variant.end}, but "
            f"{variant.chrom} has the positions 1 to {length} in {reference.path}; is it another assembly?"
        )
    found = reference.fetch(variant.chrom, variant.start, variant.end)
    if not all(map(is_base_of, variant.ref, found)):
        raise ValueError(
            f"{variant.place}: REF is {_shown(variant.ref)}, but {reference.path} has {_shown(found)} at {where}; "
            f"give the genome that the variants were called on (`bcftools norm --check-ref w` lists all differences)"
        )


def _header_lines(path: Path) -> int:
    with lines_of(path) as lines:
        return sum(1 for _ in itertools.takewhile(lambda line: line.startswith(b"#"), lines))


def _shown(bases: str) -> str:
    return bases if len(bases) <= _SHOWN else f"{bases[:_SHOWN]}... ({len(bases)} bases)"


INFO = "HYENA_LLR"
_INFO_LINE = (
    f'##INFO=<ID={INFO},Number=A,Type=Float,Description="Log-likelihood ratio of ALT against REF under a Hyena model '
    f'(natural logarithm)">'
)
_ENDINGS = (".vcf", ".vcf.gz")
Effect = tuple[str, int, str, float | None]  # contig, position, ALT, log-ratio


def check_annotation(vcf: str | Path, output: str | Path) -> None:
    """Refuse, before any work, an annotated VCF that could not be written.

    Raises:
        ValueError: It exists already, its ending says no format, or the input has the field already.
    """
    output = Path(output)
    if not output.name.endswith(_ENDINGS):
        raise ValueError(f"{output}: an annotated file ends in {' or '.join(_ENDINGS)}; rename it")
    if output.exists():
        raise ValueError(f"{output} exists already and is not overwritten; name another file, or delete it")
    with VariantFile(vcf) as file:
        if INFO in file.file.header.info:
            raise ValueError(f"{vcf} has {INFO} already; remove it first (`bcftools annotate -x INFO/{INFO}`)")


def annotate_vcf(vcf: str | Path, effects: Iterator[Effect], output: str | Path) -> None:
    """Write a VCF again, with `HYENA_LLR` in INFO: one number for each ALT, `.` where there is none.

    Lines are copied as they are but for that field: htslib would write END, headers and numbers anew, and stops the
    process at a contig that the header lacks.

    Args:
        vcf: The file that was scored.
        effects: Contig, position (1-based), ALT (`.` where the record has none) and log-ratio of every allele, in the
            order of the file.
        output: `.vcf`, or `.vcf.gz` (bgzip). Numbers have seven digits.

    Raises:
        ValueError: As `check_annotation`; or effects of another file.
    """
    output = Path(output)
    check_annotation(vcf, output)
    unfinished = output.with_name(f"{output.name}.unfinished")
    opened: Any = pysam_module().BGZFile(str(unfinished), "wb") if output.suffix == ".gz" else unfinished.open("wb")
    with VariantFile(vcf) as file, opened as target:
        for number, line in enumerate(file.lines(), 1):
            if line.startswith("#CHROM"):
                target.write(f"{_INFO_LINE}\n".encode())
            elif not line.startswith("#"):
                line = _annotated(line, effects, f"line {number} of {vcf}")
            target.write(f"{line}\n".encode("utf-8", "surrogateescape"))
        if (effect := next(effects, None)) is not None:
            raise ValueError(f"{vcf} has ended, but scores go on with {effect[0]}:{effect[1]} {effect[2]}")
    unfinished.replace(output)


def _annotated(line: str, effects: Iterator[Effect], place: str) -> str:
    fields = line.split("\t")
    chrom, pos, _, _, alts, *_, info = fields[:8]
    values = []
    for alt in alts.split(","):
        effect = next(effects, ("nothing", 0, "", None))
        if (effect[0], effect[1], effect[2].upper()) != (chrom, int(pos), alt.upper()):
            scored = " ".join(map(str, effect[:3]))
            raise ValueError(f"{place} is {chrom} {pos} {alt}, but scores go on with {scored}; score this file")
        values.append("." if effect[3] is None else f"{effect[3]:.7g}")
    if alts != ".":
        added = f"{INFO}={','.join(values)}"
        fields[7] = added if info == "." else f"{info};{added}"
    return "\t".join(fields)
