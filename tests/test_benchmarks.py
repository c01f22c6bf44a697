"""The pages that benchmarks write: what they must say, and that nothing of this machine's paths gets into them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import (
    bench_fftconv,
    bench_forward,
    bench_generate,
    bench_linear_attention,
    bench_linear_classifier,
    bench_linear_minilm,
    bench_long_context,
    bench_mixer,
    generation,
    published,
    recall,
    report,
    timing,
)
from benchmarks.bench_batching import page as batching_page
from benchmarks.bench_filter import PublishedFilter, package_filter, peak_here, ratio_plot
from benchmarks.bench_filter import page as filter_page
from benchmarks.bench_import import cpu_seconds, loaded_modules
from benchmarks.bench_recall import MODELS, page
from benchmarks.generation.models import GPT2, HISTORY, LLAMA, TINY


def test_a_page_names_its_command_commit_and_machine_and_shows_its_plots(tmp_path):
    figure = Figure()
    figure.subplots().plot([0, 1], [1, 0])
    table = report.markdown_table(["model", "loss"], [("a|b", 1.5)])
    path = report.write_result(
        "thing", "A thing", "python -m thing", table, {"curve": figure}, folder=tmp_path / "new"
    )
    text = path.read_text()
    for part in ("# A thing", "`python -m thing`", report.commit(), "| a\\|b | 1.5 |", "![curve](thing_curve.png)"):
        assert part in text
    assert str(tmp_path) not in text
    assert str(Path.cwd()) not in text
    assert (path.parent / "thing_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in path.parent.iterdir()} == {"thing.md", "thing_curve.png"}


def test_a_table_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match="a row has 1 cells for 2 columns"):
        report.markdown_table(["a", "b"], [("only",)])


def test_the_machine_line_names_cores_and_versions():
    assert all(part in report.machine() for part in ("cores", "Python 3", "torch 2", "transformers 5"))


def test_a_changed_tree_is_marked_but_new_results_do_not_count(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(report, "RESULTS", results)
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    (results / "new.md").write_text("a result")
    assert "uncommitted" not in report.commit()
    (tmp_path / "code.py").write_text("2")
    assert report.commit().endswith("with uncommitted changes")


def test_the_batching_page_has_every_case_and_shows_what_float64_sums_buy():
    lines = batching_page(1, smoke=True)
    for name in ("no mask again (control)", "mask of ones", "packed", "float32 sums"):
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in lines if line.startswith("| high")}
    prefix = {key: float(row[3]) for key, row in cells.items()}
    assert prefix["| highest", "Hyena order 3"] < 1e-6 < prefix["| high", "Hyena order 3"]


def test_the_published_filter_of_the_benchmark_gives_the_taps_of_the_package():
    published, package = PublishedFilter(6, 100), package_filter(6, 100)
    linears = [layer for layer in published.network if isinstance(layer, torch.nn.Linear)]
    for theirs, ours in zip(linears, [*package.layers, package.output], strict=True):
        theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(published(), package(100)[0], rtol=0, atol=1e-3)


def test_the_filter_page_compares_time_with_and_without_gradients():
    lines, found = filter_page([(32, 256)], [], rounds=2)
    assert sum(line.startswith("| 32 | 256 |") for line in lines) == 2
    assert ratio_plot(found).axes[0].lines


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux")
def test_a_long_filter_takes_little_memory_beside_its_taps_but_the_published_one_takes_much():
    package, taps = peak_here("package", 128, 131_072)
    published, _ = peak_here("published", 128, 131_072)
    assert taps == 64
    assert package < 1.5 * taps
    assert published > 2.5 * taps  # 3, less what this process has to spare


def test_outside_a_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    assert report.commit().startswith("unknown")


def test_import_cost_counts_what_the_code_burns_and_a_failing_import_is_an_error():
    assert cpu_seconds("sum(range(20_000_000))") > 2 * cpu_seconds("pass")
    assert loaded_modules("import json", ("json", "wave")) == ["json"]
    with pytest.raises(subprocess.CalledProcessError):
        cpu_seconds("raise SystemExit(3)")


def test_the_recall_page_tells_a_run_that_missed_the_goal_from_one_that_reached_it():
    sizes = {"steps": 2, "batch_size": 4, "evaluate_every": 1, "held_out": 5, "final": 5}
    runs = {name: [recall.run(recall.Settings(name, 1e-3, 1, **sizes), fields)] for name, fields in MODELS.items()}
    assert recall.learning_curves(runs).axes[0].lines
    assert "| Hyena | 0.001 | 1 |" in (text := "\n".join(page(runs, runs)))
    assert "0 of 1" in text
    runs["Hyena"][0].update(accuracy=0.995, reached=1, reached_seconds=2.0)
    assert "1 of 1" in "\n".join(page(runs, runs))


def add_up(count: int) -> None:
    for _ in range(count):
        sum(range(20_000))


def test_a_call_three_times_as_long_has_a_third_of_the_ratio_and_the_control_has_one():
    found = timing.compare({"one": lambda: add_up(1), "three": lambda: add_up(3)}, 5)
    assert 0.2 < found.ratio("three").median < 0.5
    assert found.control is not None
    assert 0.6 < found.control.median < 1.6
    assert found.rounds == 5
    assert found.ratio("one", "three").median > 2


def test_a_small_budget_leaves_three_rounds_and_no_control_no_second_row():
    found = timing.compare({"one": lambda: add_up(20)}, 50, control=False, budget=1e-3)
    assert found.rounds == timing.LEAST_ROUNDS
    assert found.control is None


def test_a_table_of_ratios_shows_missing_cases_and_geometric_means():
    first = timing.Comparison({"slow": [4.0, 4.0], "fast": [1.0, 1.0], "other": [2.0, 2.0]})
    second = timing.Comparison({"slow": [9.0, 9.0], "fast": [1.0, 1.0]})
    lines = timing.ratio_table(["L"], {(1,): first, (2,): second})
    assert "| 2 | 2 | 9e+03 | - | 9.00 [9.00-9.00] | - |" in lines
    assert lines[-1].endswith("| 6.00 | 2.00 |")
    assert "lowest median 4.00 at (1)" in timing.verdict({(1,): first, (2,): second}, "fast", "5")


def ones(mebibytes: int) -> timing.Call:
    return lambda: torch.ones(mebibytes, 2**18)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux")
def test_the_peak_of_memory_is_that_of_the_call_however_it_is_read():
    peak, sampled = timing.peak_here(ones, 64), timing._sampled_peak(ones(64))
    assert peak is not None
    assert 60 < peak.mebibytes < 80
    assert 60 < sampled.mebibytes < 80


def test_a_fresh_process_has_the_variables_that_it_is_given_and_this_one_keeps_its_own():
    read = os.getenv  # noqa: TID251 (a function that any process can import)
    assert timing.in_subprocess(read, "A_NEW_VARIABLE", environment={"A_NEW_VARIABLE": "1"}) == "1"
    assert "A_NEW_VARIABLE" not in os.environ


def test_a_section_that_runs_again_takes_its_old_place_on_the_page(tmp_path, monkeypatch):
    texts = {"first": "one", "second": "two"}
    sections = {key: lambda _, key=key: ([f"## {key}", texts[key]], {}) for key in texts}
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    for only in ("first,second", "first"):
        monkeypatch.setattr(sys, "argv", ["bench", "--only", only])
        timing.run_sections("thing", "A thing", "what it does", sections)
        texts["first"], texts["second"] = "three", "four"
    text = (tmp_path / "thing.md").read_text()
    assert text.count("## ") == 2
    assert text.index("three") < text.index("two")
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "third"])
    with pytest.raises(SystemExit):
        timing.run_sections("thing", "A thing", "what it does", sections)


@pytest.mark.parametrize("convolve", [published.naive_fftconv, published.complex_fftconv, published.smooth_fftconv])
def test_every_baseline_is_a_causal_convolution_with_its_gradients(convolve):
    inputs = [x.requires_grad_() for x in bench_fftconv.tensors(2, 3, 101)[:2]]
    grad = torch.randn(2, 3, 101)
    truth = bench_fftconv.direct_convolution(*inputs)
    expected = torch.autograd.grad(truth, inputs, grad.double())
    y = convolve(*inputs)
    for found, exact in zip((y, *torch.autograd.grad(y, inputs, grad)), (truth, *expected), strict=True):
        assert bench_fftconv.relative_error(found, exact.double()) < 1e-6


def test_the_published_operator_of_the_benchmarks_is_the_operator_of_the_package():
    theirs = published.PublishedOperator(8, 100)
    mixer = bench_mixer._mixer(bench_mixer.make_mixer(8, 100))
    weights = mixer.state_dict()
    for name in ("weight", "bias"):
        weights[f"short.{name}"] = weights.pop(f"short_conv.{name}")
        for index in range(3):
            weights[f"filter.network.{2 * index}.{name}"] = weights.pop(f"filter.layers.{index}.{name}")
    weights["filter.network.6.weight"] = weights.pop("filter.output.weight")
    weights["short.weight"], weights["skip"] = weights["short.weight"].unsqueeze(1), weights["skip"][0]
    missing, _ = theirs.load_state_dict(weights, strict=False)
    # what the package does not hold is the same by formula
    assert {name.split(".")[-1] for name in missing} == {"times", "features", "rates", "frequency"}
    x = torch.randn(2, 90, 8)
    assert bench_fftconv.relative_error(theirs(x), mixer(x).double()) < 1e-5


@pytest.mark.parametrize("bench", [bench_fftconv, bench_mixer, bench_forward, bench_long_context])
def test_every_section_of_a_page_runs_on_tiny_shapes(bench):
    settings = timing.Settings(rounds=2, smoke=True)
    for key, section in bench.SECTIONS.items():
        (heading, *lines), _ = section(settings)
        assert heading.startswith("## ")
        assert key == "gpu" or sum(line.startswith("| ") for line in lines) > 2


QUICK = ("context", "memory", "prefill", "online")


@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=() if key in QUICK else pytest.mark.slow) for key in bench_generate.SECTIONS],
)
def test_every_section_of_the_page_on_generation_runs_on_tiny_shapes(key):
    (heading, *lines), _ = bench_generate.SECTIONS[key](timing.Settings(rounds=2, smoke=True))
    assert heading.startswith("## ")
    assert sum(line.startswith("| ") for line in lines) > 2


@pytest.fixture(scope="module")
def pages_on_linear_attention(tmp_path_factory):
    """Every section of the page on tiny shapes, its tables by rows of cells."""
    folder = str(tmp_path_factory.mktemp("trained"))
    bench_linear_attention.converted(bench_linear_attention.Source(None).model(), window=5).save_pretrained(folder)
    settings, source = timing.Settings(rounds=2, smoke=True), bench_linear_attention.Source(None, (folder,))
    found = {}
    for key, section in bench_linear_attention.SECTIONS.items():
        (heading, *lines), _ = section(settings, source)
        assert heading.startswith("## ")
        found[key] = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return found


def test_every_section_of_the_page_on_linear_attention_has_rows(pages_on_linear_attention):
    assert all(len(rows) > 3 for rows in pages_on_linear_attention.values())


def test_the_page_on_linear_attention_finds_every_situation_within_its_bound(pages_on_linear_attention):
    rows = pages_on_linear_attention["exactness"]
    assert sum(cell.count("within the bound") for row in rows for cell in row) == 15
    assert sum(cell.startswith("identical") for row in rows for cell in row) == 3


def test_the_page_on_linear_attention_shows_what_a_coarse_normaliser_loses(pages_on_linear_attention):
    errors = {tuple(row[:2]): float(row[3]) for row in pages_on_linear_attention["drift"][2:]}
    assert len(errors) == 12
    for (_, state), error in errors.items():
        assert (error > 1e-3) if "bfloat16" in state else (error < 1e-6)


@pytest.mark.parametrize("static", [False, True])
def test_a_measured_softmax_step_leaves_its_cache_as_it_was(static):
    decoder = bench_linear_attention.SoftmaxDecoder(bench_linear_attention.Source(None).model(), 2, 12, static=static)
    seen = []
    hook = decoder.model.register_forward_hook(lambda *call: seen.append(call[-1].logits.clone()))
    for _ in range(3):
        decoder.run()
    hook.remove()
    assert seen[2].equal(seen[0])
    assert decoder.cache.get_seq_length() == 12


def test_the_models_of_the_page_on_generation_have_equal_sizes_within_a_hundredth():
    full = generation.models.FULL
    sizes = [
        generation.models.count(generation.models.equal_config(name, full, 64)) for name in generation.models.CONFIGS
    ]
    assert max(abs(size / full.parameters - 1) for size in sizes) < 0.01


@pytest.mark.parametrize(
    ("name", "static"),
    [
        *((name, False) for name in (*generation.step.GROWING, HISTORY)),
        *((name, True) for name in generation.step.STATIC),
    ],
)
def test_a_measured_step_leaves_its_cache_as_it_was(name, static):
    model = generation.models.make_model(name, TINY, 40)
    cache = generation.caches.filled_cache(model, 3, 32, 8, static=static)
    decoder = generation.caches.Decoder(model, cache, steps=2)
    held, seen = generation.caches.bytes_per_sequence(cache), []
    hook = model.register_forward_hook(lambda *call: seen.append(call[-1].logits.clone()))
    for _ in range(4):
        decoder.run()
    hook.remove()
    assert generation.caches.bytes_per_sequence(cache) == held
    if name in (GPT2, LLAMA, HISTORY):
        torch.testing.assert_close(seen[6], seen[0])


def test_the_modal_fft_of_the_page_on_generation_is_the_recurrence():
    _, poles, w = generation.prefill.make_inputs(2, 3, 4, 50)
    state = torch.zeros(2, 3, 4, dtype=torch.complex128)
    for x in w.double().unbind(-1):
        state = poles.to(state.dtype) * state + x.unsqueeze(-1)
    found = generation.prefill.modal_fft_state(poles, w)
    assert bench_fftconv.relative_error(torch.view_as_real(found), torch.view_as_real(state)) < 1e-5


@pytest.mark.gpu
def test_the_gated_convolutions_of_the_gpu_page_run():
    lines, _ = bench_fftconv.gpu(timing.Settings(rounds=2, smoke=True))
    assert sum(line.startswith("| ") for line in lines) > 8


def test_peaks_of_nothing_can_be_drawn():
    """Tiny shapes may fit into memory that is there already."""
    figure = timing.memory_plot({"ours": {64: 0.0}, "theirs": {64: 0.0}}, "Peaks")
    assert figure.axes[0].get_yscale() == "log"


def test_the_page_on_a_sentence_encoder_chooses_rates_by_other_rows_and_runs_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_linear_minilm, "MAPS", (("hedgehog", 4), ("relu", None), ("elu", None)))
    material, sizes = bench_linear_minilm.invented(), bench_linear_minilm.SMOKE
    bench = bench_linear_minilm.Bench(material, sizes, tmp_path)
    results = bench.results()
    for name, trials in results["chosen"].items():
        assert trials[results["final"][name]["rate"]]["kl"] == min(trial["kl"] for trial in trials.values())
    assert results["best"] == max(results["chosen"], key=lambda name: results["final"][name]["after"]["cosine"])
    rows = [material.train, material.validation, material.held_out]
    assert len(torch.cat(rows).unique(dim=0)) == sum(map(len, rows))  # no row serves twice
    monkeypatch.setattr(bench_linear_minilm, "convert_attention", None)
    assert bench.results() == results
    lines = bench_linear_minilm.page(results, sizes, material)
    assert sum(line.startswith("| hedgehog-4 | 8 |") for line in lines) == 1
    assert any(line.startswith("| elu | 8 | nothing to train |") for line in lines)
    assert bench_linear_minilm.layers_plot(results).axes[0].lines


def test_the_page_on_classifiers_trains_every_way_from_the_same_softmax_model(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_linear_classifier, "WAYS", {"softmax": None, "elu": {"feature_map": "elu"}})
    material = bench_linear_classifier.invented(tmp_path / "encoder")
    bench = bench_linear_classifier.Bench(material, tmp_path / "runs")
    results = bench.results()
    base = results["bases"][0]
    assert results["runs"]["softmax"][0]["before"] == base["validation"]
    monkeypatch.setattr(bench_linear_classifier, "fine_tune", None)
    assert bench.results() == results
    results["runs"]["softmax"][0]["test"], results["runs"]["elu"][0]["test"] = 0.8, 0.6
    (row,) = (line for line in bench_linear_classifier.page(results, material.sizes) if "75.0% (75.0%" in line)
    assert row.startswith("| elu |")
    assert bench_linear_classifier.accuracy_plot(results).axes[0].patches
