"""The demo: equal models, disjoint text, one report, and nothing done twice."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, Trainer

from benchmarks import bench_demo
from training.demo import (
    DISTILLED,
    LEARNING_RATES,
    SMOKE,
    Plan,
    main,
    make_corpus,
    make_prompts,
    model_size,
    parse_arguments,
    sweep,
)
from training.demo_measurements import cache_bytes
from training.demo_models import Size, count_config, equal_configs


@pytest.mark.parametrize("plan", [Plan(), SMOKE], ids=["full", "smoke"])
def test_the_three_models_have_trained_parameters_within_one_percent(plan):
    counts = {name: count_config(config) for name, config in equal_configs(model_size(plan)).items()}
    assert counts.keys() == LEARNING_RATES.keys()
    assert max(counts.values()) <= 1.01 * min(counts.values())


def test_the_full_demo_has_the_size_that_it_promises():
    parameters = count_config(equal_configs(model_size(Plan()))["hyena"])
    assert 1.0e6 <= parameters <= 1.5e6
    assert Plan().train_bytes >= 1.0e6 >= Plan().sweep_bytes
    assert Plan().prompt_bytes + Plan().new_tokens <= Plan().length


def test_the_standard_library_gives_every_byte_of_the_plan():
    corpus = make_corpus(None, Plan())
    sizes = [sum(map(len, part)) for part in (corpus.train, corpus.validation, corpus.heldout)]
    assert sizes == [Plan().train_bytes, Plan().validation_bytes, Plan().heldout_bytes]
    assert not set(corpus.train) & (set(corpus.validation) | set(corpus.heldout))


def test_prompts_begin_lines_in_the_middle_of_held_out_text():
    documents = [b"one\ntwo\nthree\nfour\n", b"\n".join([b"line"] * 50)]
    assert make_prompts(documents, 6) == ["line\nl", "four\n"]


def test_each_run_has_its_own_folder():
    folders = [[], ["--seed", "1"], ["--smoke"], ["--data", "texts/book.txt"]]
    names = [parse_arguments(arguments).output.as_posix() for arguments in folders]
    assert names == ["runs/demo", "runs/demo-seed1", "runs/demo-smoke", "runs/demo-book"]


def test_only_caches_that_can_be_counted_are_counted():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert cache_bytes(cache) == 2 * 24 * 4
    static = StaticCache(equal_configs(Size(260, 16, hidden_size=32))["llama"], max_cache_len=8)
    with pytest.raises(TypeError, match="cannot count the bytes of a StaticLayer"):
        cache_bytes(static)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    words = random.Random(0).choices(["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and", "then\n"], k=4000)
    (folder / "book.txt").write_text(" ".join(words))
    arguments = ["--smoke", "--data", str(folder / "book.txt"), "--output", str(folder / "run")]
    main(arguments)
    return folder / "run", arguments


def test_a_smoke_run_fills_the_report(smoke):
    folder, _ = smoke
    results = json.loads((folder / "results.json").read_text())
    assert (folder / "report.html").stat().st_size > 1000
    assert {name.split(",")[0] for name in results["baselines"]} == {"Markov", "xz"}
    assert results["corpus"]["heldout_bytes"] > 0
    assert list(results["models"]) == ["hyena", "gpt2", "llama", DISTILLED]
    for name, numbers in results["models"].items():
        assert 0 < numbers["heldout_bits_per_byte"] < 9
        assert numbers["decode_tokens_per_second"] > 0
        assert numbers["cache_bytes"] > 0
        assert len(numbers["samples"]) == 1
        assert name == DISTILLED or numbers["loss_curve"]


def test_the_distilled_model_is_a_row_with_its_report_and_a_model_that_loads(smoke):
    folder, _ = smoke
    models = json.loads((folder / "results.json").read_text())["models"]
    assert "relative l2: median" in models[DISTILLED]["distillation"]
    assert "<h3>hyena, distilled</h3>" in (page := (folder / "report.html").read_text())
    assert "relative l2: median" in page
    assert models[DISTILLED]["cache_bytes"] < models["hyena"]["cache_bytes"]
    assert abs(models[DISTILLED]["heldout_bits_per_byte"] - models["hyena"]["heldout_bits_per_byte"]) < 0.1
    student = AutoModelForCausalLM.from_pretrained(folder / "hyena-distilled" / "model")
    assert student.config.filter_types == ["modal"] * SMOKE.num_hidden_layers


def test_the_benchmark_page_has_the_distilled_model_without_training_numbers(smoke):
    results = json.loads((smoke[0] / "results.json").read_text())
    row = next(line for line in bench_demo.page([results]) if line.startswith(f"| {DISTILLED} |"))
    assert row.split(" | ")[2] == row.split(" | ")[4] == "-"


def test_a_finished_demo_is_not_trained_or_measured_again(smoke, monkeypatch):
    folder, arguments = smoke
    before = json.loads((folder / "results.json").read_text())
    monkeypatch.setattr(Trainer, "training_step", None)
    monkeypatch.setattr("training.demo.measure", None)
    monkeypatch.setattr("training.demo.distill", None)
    monkeypatch.setattr("training.demo.markov_bits_per_byte", None)
    main(arguments)
    after = json.loads((folder / "results.json").read_text())
    assert after["models"] == before["models"]
    assert after["baselines"] == before["baselines"]


def test_a_sweep_compares_three_rates_on_validation_text_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "book.txt").write_text("the cat sat on the mat " * 200)
    corpus = make_corpus(str(tmp_path / "book.txt"), SMOKE)
    corpus.heldout.clear()
    monkeypatch.setattr("training.demo.equal_configs", lambda size: {"gpt2": equal_configs(size)["gpt2"]})
    table = sweep(SMOKE, corpus, tmp_path / "sweep", seed=0)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == table
    assert len(set(table["gpt2"].values())) == 3
    assert "validation bits per byte" in capsys.readouterr().out
