"""Sequence-length warm-up: stages change the data alone, every row is used once an epoch, runs are a function of the
seed.

Run: python -m pytest tests/test_training_warmup.py -q
"""

import itertools
from collections import Counter

import pytest
import torch
from transformers import set_seed

from hyena_hf import HyenaByteTokenizer, HyenaConfig, HyenaForCausalLM
from training.data import pack_documents
from training.fine_tuner import FineTuneData, FineTuner, FineTuneRecipe, fine_tune
from training.warmup import Stage, StagedRows, StepBatches, describe, parse_stages


def rows(length):
    return pack_documents([[(i * j) % 250 for i in range(40)] for j in range(1, 13)], length)


def flat(batches):
    return [index for batch in batches for index in batch]


def test_stages_are_read_from_words():
    assert parse_stages(["2e:1024:256", "0.5e:2048:128", "500:4096:64"]) == (
        Stage(256, 1024, epochs=2.0),
        Stage(128, 2048, epochs=0.5),
        Stage(64, 4096, steps=500),
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["2e:1024"], "'2e:1024' is not DURATION:LENGTH:BATCH"),
        (["2.5:1024:8"], "is not DURATION:LENGTH:BATCH"),
        (["0:1024:8"], "duration of a stage must be positive"),
        (["2e:1024:0"], "must be positive"),
        (["9:64:8", "9:32:8"], r"'9:32:8' has shorter rows than the one before \(64\)"),
    ],
)
def test_stages_that_cannot_be_trained_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_stages(words)


def test_a_stage_lasts_steps_or_epochs():
    with pytest.raises(ValueError, match="lasts steps or epochs, got steps=3 and epochs=2"):
        Stage(8, 64, steps=3, epochs=2)


@pytest.mark.parametrize("lengths", [None, [torch.arange(10)]], ids=["plain", "grouped"])
def test_every_epoch_holds_every_row_once_and_steps_are_of_one_size(lengths):
    batches = list(StepBatches([range(10)], [Stage(4, epochs=6)], seed=1, lengths=lengths))
    assert [len(batch) for batch in batches] == [4] * 15
    assert Counter(flat(batches)) == {(0, row): 6 for row in range(10)}


def test_a_batch_may_be_larger_than_the_data():
    batches = list(StepBatches([range(3)], [Stage(7, steps=3)], seed=1))
    assert Counter(flat(batches)) == {(0, row): 7 for row in range(3)}


def test_rows_depend_on_the_seed_alone():
    first, again, other = (list(StepBatches([range(99)], [Stage(4, steps=9)], seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_devices_share_the_rows_of_a_step():
    stages = [Stage(2, steps=3), Stage(1, steps=4)]
    one = list(StepBatches([range(12), range(6)], [Stage(4, steps=3), Stage(2, steps=4)], seed=3))
    two = StepBatches([range(12), range(6)], stages, seed=3, devices=2)
    dealt = list(two)
    assert len(dealt) == len(two) == 14
    assert [dealt[i] + dealt[i + 1] for i in range(0, 14, 2)] == one


def test_rows_of_like_length_share_a_step():
    lengths = torch.randint(1, 1000, (256,), generator=torch.Generator().manual_seed(0))
    for grouped, least, most in ((None, 700, 1000), ([lengths], 0, 40)):
        batches = StepBatches([range(256)], [Stage(8, epochs=1)], seed=5, lengths=grouped)
        spreads = [
            int(lengths[[row for _, row in batch]].max() - lengths[[row for _, row in batch]].min())
            for batch in batches
        ]
        assert least <= sum(spreads) / len(spreads) <= most


def test_epochs_of_a_stage_are_steps_over_its_own_rows():
    parts = [rows(8), rows(16)]
    batches = StepBatches(parts, [Stage(4, 8, epochs=2), Stage(2, 16, epochs=1)], seed=0, devices=2)
    assert [len(part) for part in parts] == [60, 30]
    assert batches.steps == [15, 8]
    assert batches.ends() == [15, 23]
    assert batches.epochs_after(15) == 2
    assert batches.epochs_after(19) == pytest.approx(2 + 4 * 4 / 30)


def test_the_report_counts_tokens_of_a_step_over_all_devices():
    batches = StepBatches([rows(8), rows(16)], [Stage(4, 8, steps=3), Stage(2, steps=5)], seed=0, devices=2)
    first, second = describe(batches, longest=16)
    assert first == {"steps": 3, "length": 8, "batch": 4, "tokens_a_step": 64, "epochs": 0.4}
    assert (second["length"], second["tokens_a_step"]) == (16, 64)


def test_rows_cut_to_another_length_are_the_same_stream():
    stream = rows(16)
    short = stream.with_length(8)
    again = pack_documents([[(i * j) % 250 for i in range(40)] for j in range(1, 13)], 8)
    assert short.digest() == again.digest()
    assert all(torch.equal(short[i]["labels"], again[i]["labels"]) for i in range(len(short)))
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        stream.with_length(1)


def test_stages_need_rows():
    with pytest.raises(ValueError, match="1 sets of rows for 2 stages"):
        StepBatches([range(3)], [Stage(1, steps=1)] * 2, seed=0)
    with pytest.raises(ValueError, match="stage 2 has no rows"):
        StepBatches([range(3), range(0)], [Stage(1, steps=1)] * 2, seed=0)


def test_warm_up_changes_the_lengths_of_the_data_and_nothing_of_the_model(tmp_path, monkeypatch):
    set_seed(0)
    config = HyenaConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=2, intermediate_size=16, max_position_embeddings=32
    )
    model, shapes = HyenaForCausalLM(config), []
    original = FineTuner.training_step

    def watched(self, model, inputs, *args, **kwargs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FineTuner, "training_step", watched)
    stages = parse_stages(["3:8:8", "2:16:4", "2:32:2"])
    recipe = FineTuneRecipe("lm", stages, evaluate_every=7)
    data = FineTuneData(rows(32), rows(32))
    result = fine_tune(model, data, output_dir=tmp_path, recipe=recipe, tokenizer=HyenaByteTokenizer())
    assert shapes == [(8, 8)] * 3 + [(4, 16)] * 2 + [(2, 32)] * 2
    assert model.config.max_position_embeddings == 32
    assert [stage["tokens_a_step"] for stage in result.stages] == [64, 64, 64]
    assert result.steps == 7


def test_staged_rows_are_indexed_by_stage_and_row():
    staged = StagedRows([rows(8), rows(16)])
    assert len(staged) == 90
    assert list(itertools.chain(staged[0, 3]["input_ids"].shape, staged[1, 3]["input_ids"].shape)) == [8, 16]


def test_a_stage_longer_than_the_rows_is_refused(tmp_path):
    recipe = FineTuneRecipe("lm", parse_stages(["3:64:8"]))
    model = HyenaForCausalLM(HyenaConfig(vocab_size=260, hidden_size=8, num_hidden_layers=1, intermediate_size=8))
    with pytest.raises(ValueError, match=r"stage of length 64 is longer than the longest training row \(32 tokens\)"):
        fine_tune(
            model, FineTuneData(rows(32), rows(32)), output_dir=tmp_path, recipe=recipe, tokenizer=HyenaByteTokenizer()
        )
