import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from evaluation.report import write_report


@pytest.fixture
def results():
    curve = [[step, 2 + 6 * math.exp(-step / 20)] for step in range(0, 100, 5)]
    sample = {"prompt": "if a < b:", "text": " print('<script>alert(1)</script> & more')\x00\x1b\n\tpass \udc80"}
    return {
        "machine": {"cores": 2, "torch": "2.13"},
        "command": "python -m training.demo",
        "commit": "abc1234",
        "corpus": {"name": "standard library", "train_bytes": 1_234_567, "heldout_bytes": 1000},
        "models": {
            "Hyena": {
                "parameters": 1_100_000,
                "heldout_bits_per_byte": 2.1234,
                "loss_curve": curve,
                "samples": [sample],
            },
            "GPT-2": {
                "parameters": 1_090_000,
                "heldout_bits_per_byte": 2.9,
                "loss_curve": curve,
                "train_seconds": 61.2,
            },
        },
        "baselines": {"Markov order 5": 2.3, "xz": 2.6},
        "seed": 7,
    }


class _Page(HTMLParser):
    """Texts, tag counts, and whether every element that was opened is closed."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tags, self.open = [], [], []
        self.feed(page.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, _attrs):
        self.tags.append(tag)
        if tag not in {"meta", "br", "link", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, _attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_states_the_result_and_holds_plots_table_and_samples(results, tmp_path):
    page = write_report(results, tmp_path / "runs" / "demo")
    assert page == tmp_path / "runs" / "demo" / "report.html"
    parsed = _Page(page)
    text = "".join(parsed.texts)
    assert "Hyena reaches 2.123 bits per byte on held-out text" in text
    assert "1,234,567 training bytes" in text
    assert "1,100,000" in text
    assert "abc1234" in text
    assert "Markov order 5" in text
    assert parsed.tags.count("svg") == 2
    assert parsed.tags.count("tr") == 3


def test_the_headline_says_what_is_better_than_the_best_model(results, tmp_path):
    results["baselines"]["Markov order 5"] = 1.9
    text = "".join(_Page(write_report(results, tmp_path)).texts)
    assert "Hyena reaches 2.123 bits per byte on held-out text, behind Markov order 5 (1.900)" in text


def test_sample_text_cannot_become_markup(results, tmp_path):
    results["models"]["<b>&"] = {"heldout_bits_per_byte": 3.0}
    parsed = _Page(write_report(results, tmp_path))
    assert "script" not in parsed.tags
    assert " print('<script>alert(1)</script> & more')\\x00\\x1b\n\tpass ?" in "".join(parsed.texts)
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", "".join(parsed.texts))


def test_the_report_of_a_distillation_is_on_the_page_as_it_is(results, tmp_path):
    results["models"]["distilled"] = {"heldout_bits_per_byte": 2.2, "distillation": "layer  error\n    0   < 0.1"}
    parsed = _Page(write_report(results, tmp_path))
    assert "layer  error\n    0   < 0.1" in "".join(parsed.texts)
    assert parsed.texts.count("Distillation") == 1


def test_the_page_needs_nothing_from_outside(results, tmp_path):
    page = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)|@import|\bsrc=|url\((?!#)", page)
    assert not re.search(r'href="(?!#)', page)


def test_every_id_is_there_once_and_every_reference_finds_its_own(results, tmp_path):
    page = write_report(results, tmp_path).read_text(encoding="utf-8")
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', page)) <= set(ids)


def test_the_plots_are_files_of_their_own_too(results, tmp_path):
    write_report(results, tmp_path)
    for name in ("loss_curves", "bits_per_byte"):
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
    bars = (tmp_path / "bits_per_byte.svg").read_text(encoding="utf-8")
    assert bars.index(">GPT-2<") < bars.index(">xz<") < bars.index(">Markov order 5<") < bars.index(">Hyena<")


def test_the_json_keeps_every_key_and_is_valid_where_a_number_is_not_finite(results, tmp_path):
    results["models"]["GPT-2"] |= {"heldout_bits_per_byte": math.nan, "extra": np.float32(0.5)}
    results["folder"] = tmp_path
    write_report(results, tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert stored["models"]["GPT-2"]["heldout_bits_per_byte"] is None
    assert stored["models"]["GPT-2"]["extra"] == 0.5
    assert stored["seed"] == 7
    assert stored["folder"] == str(tmp_path)
    assert stored["models"]["Hyena"]["loss_curve"] == results["models"]["Hyena"]["loss_curve"]


@pytest.mark.parametrize(
    "removed", ["machine", "command", "commit", "corpus", "models", "baselines", "parameters", "loss_curve", "samples"]
)
def test_a_missing_key_leaves_a_gap_not_an_error(results, tmp_path, removed):
    results.pop(removed, None)
    for model in results.get("models", {}).values():
        model.pop(removed, None)
    _Page(write_report(results, tmp_path))


@pytest.mark.parametrize(
    "results", [{}, {"models": {}}, {"models": {"a": {}}}, {"models": {"$x_1$": {"loss_curve": [[1, 2]]}}}]
)
def test_almost_nothing_makes_a_page_too(results, tmp_path):
    assert "No held-out results" in "".join(_Page(write_report(results, tmp_path)).texts)


def test_what_cannot_be_written_leaves_the_previous_report(results, tmp_path, monkeypatch):
    write_report(results, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluation.report.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report({"commit": "other"}, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
