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

from .reference import Reference, compression, is_base_of, lines_of, pysam_module, quiet, unpacked


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
            readable = self.path
            if compression(self.path) == "gzip":  # pysam reads only blocked gzip
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hyena-variants-"))
                readable = unpacked(self.path, Path(folder))
            stack.enter_context(quiet(pysam))
            try:
                self.file: Any = stack.enter_context(pysam.VariantFile(str(readable)))
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} is no VCF or BCF file: its header cannot be read ({error})") from error
            self._before = None if self.file.is_bcf else _header_lines(readable)
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
_INFO_TEXT = "Log-likelihood ratio of ALT against REF under a Hyena model (natural logarithm)"
Effect = tuple[str, int, str, float | None]  # contig, position, ALT, log-ratio
_MODES = {".vcf": "w", ".gz": "wz", ".bcf": "wb"}


def check_annotation(vcf: str | Path, output: str | Path) -> None:
    """Refuse, before any work, an annotated VCF that could not be written.

    Raises:
        ValueError: It exists already, its ending says no format, or the input has the field already.
    """
    output = Path(output)
    if output.suffix not in _MODES or (output.suffix == ".gz" and not output.name.endswith(".vcf.gz")):
        raise ValueError(f"{output}: an annotated file ends in .vcf, .vcf.gz or .bcf; rename it")
    if output.exists():
        raise ValueError(f"{output} exists already and is not overwritten; name another file, or delete it")
    with VariantFile(vcf) as file:
        if INFO in file.file.header.info:
            raise ValueError(f"{vcf} has {INFO} already; remove it first (`bcftools annotate -x INFO/{INFO}`)")


def annotate_vcf(vcf: str | Path, effects: Iterator[Effect], output: str | Path) -> None:
    """Write a VCF again, with `HYENA_LLR` in INFO: one number for each ALT, `.` where there is none.

    Args:
        vcf: The file that was scored.
        effects: Contig, position (1-based), ALT (`.` where the record has none) and log-ratio of every allele, in the
            order of the file.
        output: `.vcf`, `.vcf.gz` or `.bcf`. Numbers in BCF are float32, in text they have six digits.

    Raises:
        ValueError: As `check_annotation`; or effects of another file.
    """
    output = Path(output)
    check_annotation(vcf, output)
    pysam = pysam_module()
    with VariantFile(vcf) as file:  # htslib adds what the header lacks while it reads: contigs, filters, fields
        for _ in file.records():
            pass
        header = file.file.header.copy()
    header.add_meta("INFO", items=[("ID", INFO), ("Number", "A"), ("Type", "Float"), ("Description", _INFO_TEXT)])
    unfinished = output.with_name(f"{output.name}.unfinished")
    with VariantFile(vcf) as file, pysam.VariantFile(str(unfinished), _MODES[output.suffix], header=header) as target:
        for place, record in file.records():
            values = [_matching(effects, record, alt, place) for alt in record.alts or (".",)]
            record.translate(header)
            if record.alts and any(value is not None for value in values):
                record.info[INFO] = values
            target.write(record)
    unfinished.replace(output)


def _matching(
    effects: Iterator[tuple[str, int, str, float | None]], record: Any, alt: str, place: str
) -> float | None:
    chrom, pos, scored, value = next(effects, ("nothing", 0, "", None))
    if (chrom, pos, scored.upper()) != (record.chrom, record.pos, alt.upper()):
        raise ValueError(f"{place} is {record.chrom}:{record.pos} {alt}, but scores go on with {chrom}:{pos} {scored}")
    return value
