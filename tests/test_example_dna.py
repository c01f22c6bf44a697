# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from Bio.Seq import Seq

from examples import dna
from examples.dna_markov import NucleotideMarkov, markov_bits, new_stretches
from examples.dna_models import Shape, TrainingStage, hyena_config, llama_config, train_in_stages
from examples.dna_tasks import (
    CODON_CLASSES,
    INTERGENIC,
    Planted,
    auc,
    effect_of,
    embed_genome,
    kmer_frequencies,
    linear_probe,
    markov_log_ratios,
    mean_states,
    plant_substitutions,
    species_windows,
    summarise_variants,
    write_fasta,
    write_task,
    write_vcf,
)
from training.demo_models import count_config
from training.genomes import Contig, longest_apart, open_frames, read_fasta, reverse_complement
from training.tasks import read_task


TINY = Shape(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=1, intermediate_size=32, positions=66, short_taps=8
)


def random_sequence(length, seed=0):
    return np.random.default_rng(seed).choice(list(b"ACGT"), size=length).astype(np.uint8).tobytes()


def plain_probability(windows, context, base, weight):
    """The recursion of the docstring, by counting the ends of the windows."""
    lower = plain_probability(windows, context[1:], base, weight) if context else 0.25
    ends = [window[-len(context) - 1 :] for window in windows]
    total = sum(end[:-1] == context for end in ends)
    return (ends.count(context + base) + weight * lower) / (total + weight)


def test_markov_probabilities_are_those_of_plain_counting():
    training, text = random_sequence(200), random_sequence(60, 1)
    windows = [training[i : i + 4] for i in range(len(training) - 3)]

    found = NucleotideMarkov([training], 3).log2_probabilities(text, weight=4)

    expected = [plain_probability(windows, text[i - 3 : i], text[i : i + 1], 4) for i in range(3, len(text))]
    np.testing.assert_allclose(2**found, expected, rtol=1e-12)


def test_markov_probabilities_of_the_four_bases_add_up_to_one():
    model = NucleotideMarkov([random_sequence(500)], 5)
    context = random_sequence(5, 2)

    for weight in (1, 64):
        total = sum(
            2 ** model.log2_probabilities(context + base, weight=weight)[0] for base in (b"A", b"C", b"G", b"T")
        )
        assert total == pytest.approx(1, abs=1e-12)


def test_a_high_order_predicts_a_copy_and_an_order_of_zero_only_composition():
    text = random_sequence(4_000)

    table = markov_bits(
        [text], {"copy": [text], "other": [random_sequence(4_000, 1)]}, orders=(0, 12), weights=(1, 64)
    )

    assert table["0"]["copy"]["bits"] == pytest.approx(2, abs=0.01)
    assert table["12"]["copy"]["bits"] < 0.5
    assert table["12"]["other"]["bits"] > 1.99
    assert table["12"]["copy"]["weight"] == 1
    assert table["12"]["other"]["weight"] == 64


def test_windows_with_other_letters_are_left_out_of_the_markov_model():
    model = NucleotideMarkov([b"ACGTNACGT"], 2)

    assert model.orders[2].counts.sum() == 4
    assert len(model.log2_probabilities(b"ACGTNACGT", weight=1)) == 4


@pytest.mark.parametrize(
    ("sequences", "order", "message"), [([b"ACGT"], 31, "in 0 .. 30"), ([b"AC"], 3, "window of 4")]
)
def test_a_markov_model_refuses_what_it_cannot_count(sequences, order, message):
    with pytest.raises(ValueError, match=message):
        NucleotideMarkov(sequences, order)


def test_both_models_have_nearly_the_same_number_of_parameters():
    hyena, llama = (count_config(make(Shape())) for make in (hyena_config, llama_config))

    assert abs(llama / hyena - 1) < 0.01


def test_filters_alternate_between_short_and_all_positions():
    config = hyena_config(Shape())

    assert config.filter_types == ["explicit", "implicit"] * 2
    assert config.filter_length == [128, 131_074] * 2


def test_a_stage_begins_with_the_weights_of_the_one_before_and_is_not_repeated(tmp_path):
    sequences = (random_sequence(2_000), random_sequence(300, 1))
    stages = (TrainingStage(16, 4, 10, 1e-2), TrainingStage(64, 2, 10, 1e-12))
    config = hyena_config(TINY)

    first, second = train_in_stages("hyena", config, stages, sequences, output=tmp_path, seed=0)
    again = train_in_stages("hyena", config, stages, sequences, output=tmp_path, seed=0)

    weights = [dna.AutoModelForCausalLM.from_pretrained(stage["model_dir"]).state_dict() for stage in (first, second)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])
    assert again == [first, second]
    assert (first["tokens"], second["tokens"]) == (640, 1_280)


def test_species_windows_are_dealt_among_strains_and_tests_come_from_the_held_out_one():
    strains = [[Contig("a", random_sequence(500, 1))], [Contig("b", random_sequence(500, 2))]]
    other = [Contig("c", random_sequence(500, 3))]

    split = species_windows({"one": strains}, {"one": other}, length=40, train_count=5, test_count=4, seed=0)

    def homes(rows, contigs):
        return [sum(w in c.sequence or reverse_complement(w) in c.sequence for _, w in rows) for c in contigs]

    assert homes(split.train, [strains[0][0], strains[1][0], other[0]]) == [3, 2, 0]
    assert homes(split.test, other) == [4]


def test_a_task_that_was_written_is_what_fine_tuning_reads(tmp_path):
    split = species_windows(
        {name: [[Contig(name, random_sequence(500, seed))]] for seed, name in enumerate(("one", "two"))},
        {name: [Contig(name, random_sequence(500, 7))] for name in ("one", "two")},
        length=30,
        train_count=20,
        test_count=3,
        seed=0,
    )

    data = read_task(write_task(split, tmp_path / "task"))

    read = {(example.sequence.encode(), data.classes[example.label]) for example in data.train + data.validation}
    assert read == {(sequence, label) for label, sequence in split.train}
    assert [example.sequence.encode() for example in data.test] == [sequence for _, sequence in split.test]


def test_word_frequencies_count_both_strands_and_skip_other_letters():
    found = kmer_frequencies(b"ACGNAC", 2)

    words = Counter(["AC", "CG", "AC", "GT", "CG", "GT"])  # of ACG, AC and of GT, CGT
    expected = [words[a + b] / 6 for a in "ACGT" for b in "ACGT"]
    np.testing.assert_allclose(found, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mean_states_average_every_layer_over_bases_and_strands():
    torch.manual_seed(0)
    model = dna.AutoModelForCausalLM.from_config(hyena_config(TINY))
    strands = [random_sequence(20), random_sequence(20, 1)]

    found = mean_states(model, strands)

    each = [model(input_ids=dna.encode(strand)[None], output_hidden_states=True).hidden_states for strand in strands]
    expected = [sum(states[layer][0].double().mean(dim=0) for states in each) / 2 for layer in range(3)]
    np.testing.assert_allclose(found, torch.cat(expected).detach().numpy(), atol=1e-6)


def test_words_tell_species_of_different_composition_apart():
    draw = np.random.default_rng(0)
    strains = {
        name: [Contig(name, draw.choice(list(b"ACGT"), size=5_000, p=chances).astype(np.uint8).tobytes())]
        for name, chances in (("one", [0.3, 0.2, 0.2, 0.3]), ("two", [0.2, 0.3, 0.3, 0.2]))
    }
    split = species_windows(
        {name: [strain] for name, strain in strains.items()},
        strains,
        length=400,
        train_count=40,
        test_count=20,
        seed=0,
    )

    assert linear_probe(split, lambda window: kmer_frequencies(window, 4))["accuracy"] > 0.9


@pytest.fixture(scope="module")
def planted():
    contig = random_sequence(40_000, 5)
    return contig, plant_substitutions(contig, per_class=30, min_frame=240, margin=50, seed=1)


def test_planted_substitutions_stand_on_the_contig_apart_and_change_a_base(planted):
    contig, variants = planted

    assert all(chr(contig[v.position]) == v.ref != v.alt for v in variants)
    assert len({v.position for v in variants}) == len(variants)
    assert Counter(v.kind for v in variants) == dict.fromkeys((*CODON_CLASSES, INTERGENIC), 30)
    assert all(50 <= v.position < len(contig) - 50 for v in variants)


def test_codon_positions_and_effects_are_those_of_the_translated_frames(planted):
    contig, variants = planted
    frames = longest_apart(open_frames(contig, min_length=240))

    for variant in variants:
        if variant.kind == INTERGENIC:
            continue
        changed = contig[: variant.position] + variant.alt.encode() + contig[variant.position + 1 :]
        effects = set()
        for frame in frames:
            if frame.begin <= variant.position < frame.end:
                place = variant.position - frame.begin if frame.forward else frame.end - 1 - variant.position
                if CODON_CLASSES[place % 3] == variant.kind:
                    old, new = (_protein(text, frame) for text in (contig, changed))
                    effects.add("synonymous" if old == new else "nonsense" if "*" in new[:-1] else "missense")
        assert variant.effect in effects


def _protein(sequence, frame):
    part = sequence[frame.begin : frame.end]
    return str(Seq((part if frame.forward else reverse_complement(part)).decode()).translate())


@pytest.mark.parametrize(
    ("before", "after", "effect"),
    [("CTT", "CTC", "synonymous"), ("TGG", "TGA", "nonsense"), ("ATG", "GTG", "missense")],
)
def test_the_effect_of_a_codon_change(before, after, effect):
    assert effect_of(before, after) == effect


def test_too_few_places_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"has 0 places of class 'codon position 1' in frames of 900"):
        plant_substitutions(random_sequence(1_000), per_class=5, min_frame=900, margin=10, seed=0)


def test_the_vcf_matches_its_fasta(tmp_path, planted):
    import pysam

    contig, variants = planted
    fasta = write_fasta(tmp_path / "contig.fa", [Contig("chr", contig)])
    write_vcf(tmp_path / "planted.vcf", Contig("chr", contig), variants)

    assert read_fasta(fasta) == [Contig("chr", contig)]
    with pysam.VariantFile(str(tmp_path / "planted.vcf")) as file:
        records = [(record.pos - 1, record.ref, record.alts) for record in file]
    assert records == [(v.position, v.ref, (v.alt,)) for v in variants]


def test_a_markov_log_ratio_is_that_of_the_whole_sequence():
    contig, place = random_sequence(300, 3), 150
    model = NucleotideMarkov([random_sequence(2_000, 4)], 6)
    alt = "A" if contig[place] != ord("A") else "C"

    found = markov_log_ratios(model, contig, [Planted(place, chr(contig[place]), alt, INTERGENIC, None)], weight=4)

    changed = contig[:place] + alt.encode() + contig[place + 1 :]
    whole = [
        sum(model.log2_probabilities(strand, weight=4).sum() for strand in (text, reverse_complement(text))) / 2
        for text in (contig, changed)
    ]
    assert found[0] == pytest.approx((whole[1] - whole[0]) * math.log(2), abs=1e-9)


def test_the_area_under_the_curve_counts_pairs():
    positives, negatives = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])

    pairs = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    area, error = auc(positives, negatives)
    assert area == pytest.approx(np.mean(pairs))
    assert 0 < error < 0.5


def test_the_error_of_an_area_is_the_spread_over_draws():
    draw = np.random.default_rng(0)

    areas, errors = zip(*(auc(draw.normal(0.5, 1, 60), draw.normal(0, 1, 40)) for _ in range(300)), strict=True)

    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.15)


def test_a_summary_gives_low_ratios_of_coding_changes_a_high_area():
    summary = summarise_variants((*CODON_CLASSES, INTERGENIC) * 5, [None] * 20, [-3.0, -2.0, -1.0, 0.0] * 5)

    assert summary["auc"]["codon positions 1 and 2 against 3"][0] == 1
    assert summary["groups"]["codon position 1"] == {"count": 5, "quartiles": [-3.0, -3.0, -3.0]}


def test_a_failing_command_is_reported_with_what_it_said(tmp_path):
    with pytest.raises(RuntimeError, match=r"hyena embed .* failed: "):
        embed_genome(tmp_path / "no-model", tmp_path / "no.fa", tmp_path / "out", options=["--no-such-option"])


def test_the_smoke_run_goes_through_every_stage_and_does_nothing_twice(tmp_path, capsys):
    folder = tmp_path / "run"

    dna.main(["--output", str(folder), "--smoke"])
    first = {path: path.stat().st_mtime_ns for path in (folder / "measured").iterdir()}
    dna.main(["--output", str(folder), "--smoke"])

    results = json.loads((folder / "results.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in (folder / "measured").iterdir()} == first
    assert set(results["species-64"]) >= {"Hyena, frozen", "4-mers"}
    assert results["finetuned-64"]["confusion"]
    assert results["embed-whole"]["peak_bytes"] > 0
    page = (folder / "dna.md").read_text()
    assert all(f"## {title}" in page for title in ("Training", "Bits per base", "Species", "Planted", "Embedding"))
    assert {path.name for path in folder.glob("*.png")} == {
        f"dna_{key}.png" for key in ("training", "bits", "species", "variants")
    }
    assert "the numbers mean nothing" in capsys.readouterr().out


def test_a_folder_of_another_run_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 7}')

    with pytest.raises(ValueError, match="holds another run"):
        dna.main(["--output", str(tmp_path), "--smoke"])


def test_a_stage_whose_model_is_missing_says_which_to_run_first(tmp_path):
    with pytest.raises(ValueError, match="no trained hyena; run --stages hyena first"):
        dna.main(["--output", str(tmp_path), "--smoke", "--stages", "bits"])


def test_new_stretches_hold_no_word_of_the_training_sequences():
    training, text = random_sequence(300), bytearray(random_sequence(200, 1))
    text[50:80] = training[100:130]
    text[120:150] = reverse_complement(training)[20:50]
    strands = [training, reverse_complement(training)]

    found = new_stretches(bytes(text), strands, words=12, min_length=20)

    shared = [i for i in range(189) if any(bytes(text[i : i + 12]) in strand for strand in strands)]
    assert 50 in shared
    assert 138 in shared
    edges = [(0, shared[0] + 11), *((a + 1, b + 11) for a, b in itertools.pairwise(shared)), (shared[-1] + 1, 200)]
    assert found == [bytes(text[begin:end]) for begin, end in edges if end - begin >= 20]
