# SPDX-License-Identifier: Apache-2.0
"""What a model makes of variants: the log-likelihood of a window with the alternative allele against the reference.

    log_ratio = ln p(left + ALT + right) - ln p(left + REF + right)

- Both windows have the same flanks. The reference window has `window` bases (fewer on a shorter contig), centred on
  REF and shifted inwards at the ends of the contig; the alternative one is longer or shorter by the indel.
- A model that takes a bounded number of bases may have no room for an insertion in its default window: the flanks of
  that record are then shorter, for all its alleles. A window that was asked for stays as it is, and the note says
  which allele does not fit.
- Every base costs likelihood (about ln 4 = 1.4 under a model that knows nothing), so a raw ratio holds the length of
  an insertion or deletion. `log_ratio_per_token` divides each likelihood by the bases it was summed over: compare
  indels by that one, substitutions by either.
- Bases are read as capitals, IUPAC letters of the genome as N. Where the genome is ambiguous, the window has the REF
  of the VCF.
- The model predicts from left to right: a variant acts on what follows it, and with `reverse_complement=True`, the
  mean over both strands, on both sides.
- An ALT that is no sequence (`*`, `<DEL>`, a breakend, `.`), or that the window cannot hold, has a row without numbers
  and says why in `note`. No record is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from .batching import progress_bar
from .manifest import file_fingerprint, model_fingerprint, tokenizer_fingerprint
from .reference import Reference, as_model_letters
from .tables import ResumableTable, check_output, in_batches, read_rows, write_in_parts
from .vcf import Variant, annotate_vcf, check_annotation, read_variants, why_no_sequence
from .windows import WindowScorer, WindowSettings


__all__ = ["VariantEffect", "VariantSettings", "annotate", "score_variants", "write_variant_effects"]

_PART_BASES = 1 << 24  # of the reference windows of a part, which are in memory at once
_PART_RECORDS = 1024  # at most


@dataclass(frozen=True)
class VariantSettings(WindowSettings):
    """How variants are scored.

    Args:
        window: As for `WindowSettings`.
        batch_size: As for `WindowSettings`.
        reverse_complement: As for `WindowSettings`.
        max_n_fraction: Share of N (and IUPAC letters, which are read as N) above which the note of a row says so; it
            is scored all the same.

    Raises:
        TypeError: As `WindowSettings`.
        ValueError: As `WindowSettings`, or a share outside 0 to 1.
    """

    max_n_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.max_n_fraction <= 1.0:
            raise ValueError(f"max_n_fraction is {self.max_n_fraction}; it is a share, from 0 to 1")


@dataclass(frozen=True)
class VariantEffect:
    """What became of one ALT of one record.

    Attributes:
        chrom: Contig.
        pos: First base of REF, 1-based.
        id: None where the record has none.
        ref: REF in capitals.
        alt: ALT; sequences in capitals.
        window_start: First base of the reference window, 1-based; None where there is none.
        window_end: Its last base, included.
        ref_ll: ln p of the reference window; None where the allele was not scored, like the next three.
        alt_ll: ln p of the alternative window.
        log_ratio: `alt_ll - ref_ll`.
        log_ratio_per_token: Difference of the two after each is divided by its scored bases.
        n_fraction: Share of N in the reference window.
        note: Why there is no number, or what to mind about it; None where there is nothing to say.
    """

    chrom: str
    pos: int
    id: str | None
    ref: str
    alt: str
    window_start: int | None
    window_end: int | None
    ref_ll: float | None
    alt_ll: float | None
    log_ratio: float | None
    log_ratio_per_token: float | None
    n_fraction: float | None
    note: str | None


COLUMNS: dict[str, type] = {
    **dict.fromkeys([field.name for field in fields(VariantEffect)], float),
    **dict.fromkeys(("chrom", "id", "ref", "alt", "note"), str),
    **dict.fromkeys(("pos", "window_start", "window_end"), int),
}


def score_variants(
    model: Any,
    tokenizer: Any,
    vcf: str | Path,
    reference: str | Path,
    *,
    window: int | None = None,
    batch_size: int | str = "auto",
    reverse_complement: bool = False,
    max_n_fraction: float = 0.1,
) -> list[VariantEffect]:
    """Log-ratios of all variants of a file, in its order: one row for each ALT of each record.

    All records are compared with the genome before the first one is scored.

    Args:
        model: A causal language model, as for `score`.
        tokenizer: Its tokenizer, with one token for each base.
        vcf: VCF (plain or compressed) or BCF; needs no index.
        reference: FASTA (plain, gzip or bgzip) that the variants were called on.
        window: Bases of the reference window; None: the model's `max_position_embeddings`, at most 8,192, and fewer
            for a record with an insertion that the model would not take beside them.
        batch_size: Windows in a batch, or `"auto"`.
        reverse_complement: Mean over both strands.
        max_n_fraction: Share of N above which the note of a row says so; it is scored all the same.

    Returns:
        Rows; `pandas.DataFrame(rows)` makes a table. Reference windows that are alike are scored once.

    Raises:
        ImportError: pysam is not installed.
        TypeError: The model predicts no next token, or an argument is of another kind.
        ValueError: A file that is missing, empty or damaged; a record that does not match the genome, with its line; a
            window longer than the model takes.
    """
    settings = VariantSettings(window, batch_size, reverse_complement, max_n_fraction)
    scorer = WindowScorer(model, tokenizer, settings)
    with Reference(reference) as genome:
        num_records = _count(read_variants(vcf, genome))
        size = _part_records(scorer.window)
        batches = in_batches(read_variants(vcf, genome), size) if num_records else ()
        return [effect for batch in batches for effect in _effects(batch, genome, scorer, max_n_fraction)]


def write_variant_effects(  # noqa: PLR0913 (options of one call, all by name)
    model: Any,
    tokenizer: Any,
    vcf: str | Path,
    reference: str | Path,
    output: str | Path,
    *,
    settings: VariantSettings | None = None,
    part_records: int | None = None,
    annotated: str | Path | None = None,
    progress: bool | None = False,
) -> int:
    """`score_variants` into a table that grows in parts: a run that was killed goes on where it was.

    Args:
        model: As for `score_variants`.
        tokenizer: As for `score_variants`.
        vcf: As for `score_variants`.
        reference: As for `score_variants`.
        output: `.tsv` or `.parquet`, with the columns of `VariantEffect`. Until it is whole, parts are in a folder
            `OUTPUT.parts`.
        settings: The window and how it is scored.
        part_records: Records of a part: what a killed run loses at most; None: 1,024, fewer with long windows.
        annotated: Also write the VCF again, as `annotate` does, before the table has its name: the same call goes on
            from a kill between the two.
        progress: Whether to draw a bar on stderr; None: where that is a terminal.

    Returns:
        Number of records.

    Raises:
        ImportError: pysam, or for Parquet pyarrow, is not installed.
        TypeError: As `score_variants`.
        ValueError: As `score_variants`; a table that exists; parts of a run with another model, files or settings; an
            annotated file as in `annotate`.
    """
    check_output(Path(output))
    if annotated is not None:
        check_annotation(vcf, annotated)
    settings = settings or VariantSettings()
    scorer = WindowScorer(model, tokenizer, settings)
    size = _part_records(scorer.window) if part_records is None else part_records
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"part_records is {part_records!r}; a part has a number of records, at least 1")
    with Reference(reference) as genome:
        num_records = _count(read_variants(vcf, genome))
        files = {"vcf": file_fingerprint(Path(vcf)), "reference": file_fingerprint(Path(reference))}
        origin = {**origin_of(scorer), **files, "max_n_fraction": settings.max_n_fraction, "part_records": size}
        with progress_bar(num_records, progress, "variant") as bar:

            def rows(batch: list[Variant]) -> list[tuple[Any, ...]]:
                made = [astuple(effect) for effect in _effects(batch, genome, scorer, settings.max_n_fraction)]
                bar.update(len(batch))
                return made

            variants = in_batches(read_variants(vcf, genome), size)
            companion = None if annotated is None else lambda table: annotate(vcf, table, annotated)
            write_in_parts(lambda: ResumableTable(output, COLUMNS, origin), variants, rows, companion)
    return num_records


def annotate(vcf: str | Path, table: str | Path, output: str | Path) -> None:
    """Write a VCF again with the log-ratios of its alleles as `HYENA_LLR` in INFO.

    Args:
        vcf: The file that was scored.
        table: What `write_variant_effects` made of it.
        output: `.vcf`, or `.vcf.gz` (bgzip); `.` where an allele has no number. Seven digits are kept.

    Raises:
        ValueError: A table of another file, an output that exists, or a VCF that has `HYENA_LLR` already.
    """
    check_annotation(vcf, output)
    effects = (VariantEffect(*row) for row in read_rows(Path(table), COLUMNS))
    annotate_vcf(vcf, ((effect.chrom, effect.pos, effect.alt, effect.log_ratio) for effect in effects), output)


def origin_of(scorer: WindowScorer) -> dict[str, Any]:
    """What numbers of a scorer depend on; the size of batches is not among it."""
    settings = asdict(scorer.settings) | {"window": scorer.window}
    settings.pop("batch_size")
    if scorer.leaves_room:  # one of the same size that was asked for does not
        settings["leaves_room"] = True
    prints = {"model": model_fingerprint(scorer.model), "tokenizer": tokenizer_fingerprint(scorer.tokenizer)}
    return {**prints, **settings}


def _count(variants: Iterable[Variant]) -> int:
    return sum(1 for _ in variants)


def _part_records(window: int) -> int:
    return max(min(_PART_RECORDS, _PART_BASES // window), 1)


@dataclass(frozen=True)
class _Draft:
    """An allele before it is scored: its window on the contig, and the two sequences or why there are none."""

    variant: Variant
    alt: str
    window: tuple[int, int] | None
    sequences: tuple[str, str] | None
    n_fraction: float | None
    note: str | None


def _effects(
    variants: list[Variant], genome: Reference, scorer: WindowScorer, max_n_fraction: float
) -> list[VariantEffect]:
    drafts = [draft for variant in variants for draft in _drafts(variant, genome, scorer, max_n_fraction)]
    scores = scorer(text for draft in drafts for text in draft.sequences or ())
    return [_effect(draft, scores, scorer) for draft in drafts]


def _drafts(variant: Variant, genome: Reference, scorer: WindowScorer, max_n_fraction: float) -> Iterator[_Draft]:
    """The alleles of a record; the flanks are fetched once."""
    if large := scorer.is_large(variant.ref):
        yield from (_Draft(variant, alt, None, None, None, f"REF: {large}") for alt in variant.alts)
        return
    fitting = [len(alt) for alt in variant.alts if not (why_no_sequence(alt) or scorer.is_large(alt))]
    growth = max(fitting, default=0) - len(variant.ref)
    window = scorer.place(variant.start, variant.end, genome.length(variant.chrom), growth)
    bases = as_model_letters(genome.fetch(variant.chrom, *window))
    left, right = bases[: variant.start - window[0]], bases[variant.end - window[0] :]
    ref = left + as_model_letters(variant.ref) + right
    share = ref.count("N") / len(ref)
    for alt in variant.alts:
        reason = why_no_sequence(alt) or scorer.is_large(alt)
        reason = reason or scorer.is_unfit(len(ref)) or scorer.is_unfit(len(left) + len(alt) + len(right))
        if reason:
            yield _Draft(variant, alt, window, None, share, reason)
            continue
        many = share > max_n_fraction
        note = f"{share:.1%} of the window are N, more than {max_n_fraction:.1%}" if many else None
        yield _Draft(variant, alt, window, (ref, left + alt + right), share, note)


def _effect(draft: _Draft, scores: dict[str, float], scorer: WindowScorer) -> VariantEffect:
    ref_ll = alt_ll = log_ratio = per_token = None
    note = draft.note
    if draft.sequences is not None:
        ref, alt = draft.sequences
        ref_ll, alt_ll = scores[ref], scores[alt]
        log_ratio = alt_ll - ref_ll
        per_token = alt_ll / scorer.num_scored(alt) - ref_ll / scorer.num_scored(ref)
        if not math.isfinite(log_ratio):
            note = "the model gives no finite likelihood"
    first, last = draft.window or (None, None)
    return VariantEffect(
        chrom=draft.variant.chrom,
        pos=draft.variant.start + 1,
        id=draft.variant.id,
        ref=draft.variant.ref,
        alt=draft.alt,
        window_start=None if first is None else first + 1,
        window_end=last,
        ref_ll=ref_ll,
        alt_ll=alt_ll,
        log_ratio=log_ratio,
        log_ratio_per_token=per_token,
        n_fraction=draft.n_fraction,
        note=note,
    )
