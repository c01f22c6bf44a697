# SPDX-License-Identifier: Apache-2.0
"""Every substitution of a region against strings edited by hand, its heat map, and what is refused."""

import random
import sys
from argparse import ArgumentParser, Namespace

import numpy as np
import pytest
import torch

from hyena_hf import HyenaNucleotideTokenizer
from hyena_hf.cli import mutagenesis as command
from hyena_hf.scoring import tables, windows
from hyena_hf.scoring.mutagenesis import COLUMNS, plot_mutagenesis, saturation_mutagenesis, write_mutagenesis
from hyena_hf.scoring.variants import score_variants
from hyena_hf.scoring.windows import WindowSettings

from .models import new_model


pytest.importorskip("pysam")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

IDS = {"A": 7, "C": 8, "G": 9, "T": 10, "N": 11}
SMALL = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
SEQUENCE = "".join(random.Random(0).choices("ACGTacgt", k=120))
GAPPED = SEQUENCE[:50] + "NNnR" + SEQUENCE[54:]


@pytest.fixture(scope="module")
def model():
    return new_model(dtype=torch.float64, **SMALL)


@pytest.fixture(scope="module")
def tokenizer():
    return HyenaNucleotideTokenizer()


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "genome.fa"
    lines = [GAPPED[at : at + 50] for at in range(0, len(GAPPED), 50)]
    path.write_text("\n".join([">first", "ACGTACGT", ">c1 of two", *lines]) + "\n")
    return path


def log_likelihood(model, text):
    """Sum of the log-probabilities of all letters, the first one after [CLS]."""
    ids = [0, *(IDS[letter] for letter in text)]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    peaks = logits.max(axis=1, keepdims=True)
    log_probs = logits - peaks - np.log(np.exp(logits - peaks).sum(axis=1, keepdims=True))
    return sum(row[following] for row, following in zip(log_probs, ids[1:], strict=False))


def naive(model, sequence, sites, window):
    rows = []
    for site in sites:
        start = site - (window - 1) // 2
        while start + window > len(sequence):
            start -= 1
        start = max(start, 0)
        text = list(sequence.upper()[start : start + window])
        whole, row = log_likelihood(model, text), []
        for base in "ACGT":
            changed = list(text)
            changed[site - start] = base
            row.append(log_likelihood(model, changed) - whole)
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("window", [9, 32, 200])
@pytest.mark.parametrize("sites", [range(4), range(57, 62), range(116, 120)], ids=["begin", "middle", "end"])
def test_ratios_are_those_of_strings_edited_by_hand(model, tokenizer, window, sites):
    effects = saturation_mutagenesis(
        model, tokenizer, SEQUENCE, start=sites.start, end=sites.stop, window=window, batch_size=7
    )
    np.testing.assert_allclose(effects, naive(model, SEQUENCE, sites, window), atol=1e-8, rtol=0)


def test_the_base_that_is_there_has_the_ratio_zero(model, tokenizer):
    effects = saturation_mutagenesis(model, tokenizer, SEQUENCE[:30])
    assert effects.shape == (30, 4)
    assert [row.index(0.0) for row in effects.tolist()] == ["ACGT".index(base) for base in SEQUENCE[:30].upper()]


def test_sites_without_a_known_base_have_no_ratio(model, tokenizer):
    effects = saturation_mutagenesis(model, tokenizer, GAPPED, start=49, end=55, window=20)
    assert np.isnan(effects).all(axis=1).tolist() == [False, True, True, True, True, False]
    plain = GAPPED.replace("R", "N")
    np.testing.assert_allclose(effects[[0, 5]], naive(model, plain, [49, 54], 20), atol=1e-8, rtol=0)


def test_ratios_are_those_of_the_same_variants(model, tokenizer, fasta, tmp_path):
    sites = (3, 60, 118)
    lines = [
        f"c1\t{site + 1}\t.\t{SEQUENCE[site]}\t{','.join(set('ACGT') - {SEQUENCE[site].upper()})}\t.\t.\t.\n"
        for site in sites
    ]
    vcf = tmp_path / "all.vcf"
    vcf.write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n" + "".join(lines))
    variants = score_variants(model, tokenizer, vcf, fasta, window=32, reverse_complement=True)
    assert len(variants) == 9
    effects = saturation_mutagenesis(model, tokenizer, GAPPED, window=32, reverse_complement=True)
    for variant in variants:
        ratio = effects[variant.pos - 1, "ACGT".index(variant.alt)]
        assert ratio == pytest.approx(variant.log_ratio, abs=1e-9)


def test_a_contig_within_the_window_is_scored_once_as_reference(model, tokenizer, monkeypatch):
    seen = []

    def count(_model, _tokenizer, sequences, **_):
        seen.extend(sequences)
        return np.zeros(len(sequences))

    monkeypatch.setattr(windows, "score", count)
    saturation_mutagenesis(model, tokenizer, SEQUENCE, start=10, end=20, window=120)
    assert len(seen) == 1 + 10 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 5, "end": 5}, "start 5 to end 5 is no range of a sequence of 120 bases"),
        ({"start": -1}, "start -1 to end 120 is no range"),
        ({"end": 121}, "start 0 to end 121 is no range"),
        ({"sequence": ""}, "is no range of a sequence of 0 bases"),
        ({"sequence": "ACGTQ"}, "the sequence holds 'Q' at position 5, which is no letter of DNA"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_bad_input_is_refused(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        saturation_mutagenesis(model, tokenizer, **{"sequence": SEQUENCE, **options})


def test_a_sequence_that_is_no_text_is_refused(model, tokenizer):
    with pytest.raises(TypeError, match="sequence must be a str of bases, got list"):
        saturation_mutagenesis(model, tokenizer, list(SEQUENCE))


# tables


@pytest.mark.parametrize("name", ["out.tsv", "out.parquet"])
def test_a_table_holds_the_sites_of_a_region(model, tokenizer, fasta, tmp_path, name):
    settings = WindowSettings(window=24)
    assert write_mutagenesis(model, tokenizer, fasta, "c1:48-60", tmp_path / name, settings=settings) == 13
    rows = list(tables.read_rows(tmp_path / name, COLUMNS))
    assert [row[:3] for row in rows] == [("c1", pos, GAPPED[pos - 1].upper()) for pos in range(48, 61)]
    effects = np.array([row[3:] for row in rows], np.float64)
    expected = saturation_mutagenesis(model, tokenizer, GAPPED, start=47, end=60, window=24)
    np.testing.assert_allclose(effects, expected, atol=1e-9, rtol=0)
    assert not (tmp_path / f"{name}.parts").exists()


def test_a_run_that_was_stopped_goes_on_where_it_was(model, tokenizer, fasta, tmp_path, monkeypatch):
    monkeypatch.setattr("hyena_hf.scoring.mutagenesis._PART_SITES", 10)
    settings = WindowSettings(window=24)
    calls, score = [], windows.score

    def stopping(*given, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*given, **options)

    monkeypatch.setattr(windows, "score", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_mutagenesis(model, tokenizer, fasta, "c1", tmp_path / "out.tsv", settings=settings)
    write_mutagenesis(model, tokenizer, fasta, "c1", tmp_path / "out.tsv", settings=settings)
    assert len(calls) == 3 + 1 + 9  # parts of 12: those before the stop, the one it hit, the rest
    effects = np.array([row[3:] for row in tables.read_rows(tmp_path / "out.tsv", COLUMNS)], np.float64)
    expected = saturation_mutagenesis(model, tokenizer, GAPPED, window=24)
    np.testing.assert_allclose(effects, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ("c2", "region 'c2' is neither a contig \\(first, c1\\) nor CONTIG:START-END, as in first:101-200"),
        ("c2:5-6", "there is no contig 'c2'; there are first, c1"),
        ("c1:0-6", "region 'c1:0-6' is 0 to 6, but c1 has the positions 1 to 120"),
        ("c1:9-8", "the start must not be behind the end"),
        ("c1:100-121", "is 100 to 121, but c1 has the positions 1 to 120"),
        ("c1:a-b", "is neither a contig"),
    ],
)
def test_a_region_that_is_not_there_is_refused(model, tokenizer, fasta, tmp_path, region, message):
    with pytest.raises(ValueError, match=message):
        write_mutagenesis(model, tokenizer, fasta, region, tmp_path / "out.tsv")


# the map


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_a_map_has_a_row_for_every_hundred_positions(tmp_path):
    effects = np.random.default_rng(0).normal(size=(250, 4))
    plot_mutagenesis(effects, "ACGTN" * 50, tmp_path / "long.png", first=1001, title="c1")
    plot_mutagenesis(effects[:50], "ACGTN" * 10, tmp_path / "short.png")
    heights = [pixels(tmp_path / name).shape[0] for name in ("short.png", "long.png")]
    assert heights[1] - heights[0] == pytest.approx(2 * 1.1 * 120, abs=2)


def test_a_map_is_blue_where_likelihood_falls_and_red_where_it_rises(tmp_path):
    for value, name in ((-2.0, "falls.png"), (2.0, "rises.png")):
        effects = np.zeros((100, 4))
        effects[:, 1:] = value
        plot_mutagenesis(effects, "A" * 100, tmp_path / name)
    # red against blue on average, over everything but the same axes and bar
    difference = (pixels(tmp_path / "rises.png") - pixels(tmp_path / "falls.png")).mean(axis=(0, 1))
    assert difference[0] > 0.1
    assert difference[2] < -0.1


@pytest.mark.parametrize(
    ("effects", "sequence", "message"),
    [
        (np.zeros((5, 3)), "ACGTA", r"effects have the shape \(5, 3\); expected \(n, 4\)"),
        (np.zeros((0, 4)), "", "at least one site"),
        (np.zeros((5, 4)), "ACGT", "sequence has 4 bases, but there are effects of 5 sites"),
        (np.full((4, 4), np.nan), "NNNN", "effects hold no number"),
    ],
)
def test_effects_that_make_no_map_are_refused(tmp_path, effects, sequence, message):
    with pytest.raises(ValueError, match=message):
        plot_mutagenesis(effects, sequence, tmp_path / "map.png")


def test_a_picture_is_not_overwritten(tmp_path):
    (tmp_path / "map.png").write_text("mine")
    with pytest.raises(ValueError, match=r"map.png exists already"):
        plot_mutagenesis(np.zeros((4, 4)), "ACGT", tmp_path / "map.png")


def test_missing_matplotlib_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ImportError, match=r"pip install 'hyena-hf\[genomes\]'"):
        plot_mutagenesis(np.zeros((4, 4)), "ACGT", tmp_path / "map.png")


# command


def parsed(*words: object) -> Namespace:
    parser = ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["mutagenesis", *map(str, words)])


def test_the_command_writes_a_table_and_a_map(model, tokenizer, fasta, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out, plot = tmp_path / "out.parquet", tmp_path / "map.png"
    options = ["--region", "c1:40-70", "--window", 24, "--device", "cpu", "--reverse-complement", "--plot", plot]
    arguments = parsed(tmp_path / "model", fasta, out, *options)
    arguments.run(arguments)
    assert capsys.readouterr().out == f"31 sites; written to {out} and {plot}\n"
    effects = np.array([row[3:] for row in tables.read_rows(out, COLUMNS)], np.float64)
    expected = saturation_mutagenesis(model, tokenizer, GAPPED, start=39, end=70, window=24, reverse_complement=True)
    np.testing.assert_allclose(effects, expected, atol=1e-9, rtol=0)
    assert pixels(plot).shape[2] == 3


def test_the_same_call_goes_on_from_a_kill_before_the_map_without_scoring(
    model, tokenizer, fasta, tmp_path, monkeypatch
):
    def stop(*_, **_options):
        raise KeyboardInterrupt

    out, plot = tmp_path / "out.tsv", tmp_path / "map.png"
    options = {"settings": WindowSettings(window=24), "picture": plot}
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", stop)
        with pytest.raises(KeyboardInterrupt):
            write_mutagenesis(model, tokenizer, fasta, "c1:40-50", out, **options)
    assert not out.exists()
    assert not plot.exists()
    monkeypatch.setattr(windows, "score", stop)
    write_mutagenesis(model, tokenizer, fasta, "c1:40-50", out, **options)
    assert pixels(plot).shape[2] == 3
    assert len(list(tables.read_rows(out, COLUMNS))) == 11


def test_a_map_that_cannot_be_drawn_says_how_to_get_the_table(model, tokenizer, tmp_path):
    genome, out = tmp_path / "n.fa", tmp_path / "out.tsv"
    genome.write_text(">c1\nACGTNNNNACGT\n")
    with pytest.raises(ValueError, match=r"all sites are N.* the same command without this second file writes"):
        write_mutagenesis(model, tokenizer, genome, "c1:5-8", out, picture=tmp_path / "map.png")
    write_mutagenesis(model, tokenizer, genome, "c1:5-8", out)
    assert len(list(tables.read_rows(out, COLUMNS))) == 4


def test_the_command_refuses_a_picture_of_no_known_format_before_any_work(fasta, tmp_path):
    arguments = parsed("nowhere", fasta, tmp_path / "o.tsv", "--region", "c1", "--plot", tmp_path / "map.doc")
    with pytest.raises(ValueError, match=r"ends in '.doc', which is no format of a picture"):
        arguments.run(arguments)
