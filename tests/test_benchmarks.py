"""The pages that benchmarks write: what they must say, and that nothing of this machine's paths gets into them."""

import subprocess
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.bench_batching import page as batching_page
from benchmarks.bench_filter import PublishedFilter, package_filter, peak_here, ratio_plot
from benchmarks.bench_filter import page as filter_page
from benchmarks.bench_import import cpu_seconds, loaded_modules
from benchmarks.bench_recall import MODELS, Settings, learning_curves, page, rate_factor, trained


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
    assert published > 3 * taps


def test_outside_a_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    assert report.commit().startswith("unknown")


def test_import_cost_counts_what_the_code_burns_and_a_failing_import_is_an_error():
    assert cpu_seconds("sum(range(20_000_000))") > 2 * cpu_seconds("pass")
    assert loaded_modules("import json", ("json", "wave")) == ["json"]
    with pytest.raises(subprocess.CalledProcessError):
        cpu_seconds("raise SystemExit(3)")


def test_the_recall_page_tells_a_run_that_missed_the_goal_from_one_that_reached_it():
    runs = {
        name: [trained(Settings(name, 1e-3, 1, steps=2, batch_size=4, evaluate_every=1, held_out=5, final=5))]
        for name in MODELS
    }
    assert learning_curves(runs).axes[0].lines
    assert "| Hyena | 0.001 | 1 |" in (text := "\n".join(page(runs, runs)))
    assert "0 of 1" in text
    runs["Hyena"][0].update(accuracy=0.995, reached=1, reached_seconds=2.0)
    assert "1 of 1" in "\n".join(page(runs, runs))


def test_the_rate_warms_up_and_ends_at_its_fraction():
    settings = Settings("Hyena", 1e-3, 1, steps=1000, warmup=100)
    assert rate_factor(0, settings) == pytest.approx(0.01)
    assert rate_factor(99, settings) > 0.97
    assert rate_factor(1000, settings) == pytest.approx(settings.final_rate)
