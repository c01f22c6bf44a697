"""Collects the suites only for `-m hf_suite`, and writes what came of them to benchmarks/results/hf_suite.md."""

import re
from collections import Counter, defaultdict

import pytest

from benchmarks.report import markdown_table, write_result


# the marks that transformers' own conftest knows
MARKS = (
    *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test"),
    *("is_fsdp_test", "is_pipeline_test", "is_tensor_parallel_test", "is_training_test", "order"),
)
COMMAND = "python -m pytest -m hf_suite"
WORST_FIRST = ("failed", "skipped", "passed")

results: dict[str, tuple[str, str]] = {}  # test -> outcome and, where skipped, reason


def pytest_ignore_collect(config):
    """True, which ignores, unless the expression after -m asks for the suite."""
    return None if re.search(r"(?<!not )\bhf_suite\b", config.getoption("markexpr")) else True


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: set by transformers' own tests")


def reason_of(report) -> str:
    """Why a test was skipped, without what differs from test to test."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    other_task = "is not in `self.pipeline_model_mapping`" in reason or reason.startswith("test requires")
    if other_task and "test_pipeline_" in report.nodeid:
        return "pipeline of another task"
    reason = re.sub(r"^\w+::\w+ is skipped: ", "", reason)
    reason = re.sub(r" ?\(enabled: .*", "", reason)
    return re.sub(r"<class '[\w.]+\.(\w+)'>", r"\1", reason).rstrip(".")


def pytest_runtest_logreport(report):
    if "hf_suite" not in report.keywords or (report.when != "call" and report.passed):
        return
    if type(report) is not pytest.TestReport and not report.failed:  # a subtest; the test itself is reported as well
        return
    seen = results.get(report.nodeid, ("passed", ""))
    now = report.outcome, reason_of(report) if report.skipped else ""
    results[report.nodeid] = min(seen, now, key=lambda result: WORST_FIRST.index(result[0]))


def tables() -> list[str]:
    """Counts by model, and every reason for skipping with the number of tests by model."""
    counts, reasons = defaultdict(Counter), defaultdict(Counter)
    for test, (outcome, reason) in results.items():
        model = test.split("::")[1].removeprefix("Test")
        counts[model][outcome] += 1
        if outcome == "skipped":
            reasons[reason][model] += 1
    rows = [
        [model, *(count[outcome] for outcome in ("passed", "failed", "skipped"))] for model, count in counts.items()
    ]
    why = [[reason, *(by[model] or "" for model in counts)] for reason, by in sorted(reasons.items())]
    failed = [f"- failed: `{test}`" for test, (outcome, _) in results.items() if outcome == "failed"]
    return [
        *markdown_table(["model", "passed", "failed", "skipped"], rows),
        *["", *failed, "", "Skipped, by reason:", ""],
        *markdown_table(["reason", *counts], why),
    ]


def pytest_terminal_summary(terminalreporter, config):
    if not results:
        return
    lines = tables()
    terminalreporter.section("transformers' common suites")
    for line in lines:
        terminalreporter.write_line(line)
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("keyword"):
        path = write_result("hf_suite", "transformers' own common suites", COMMAND, lines)
        terminalreporter.write_line(f"written to {path}")
