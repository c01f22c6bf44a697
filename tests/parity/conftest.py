# SPDX-License-Identifier: Apache-2.0
"""The published implementations, installed once into .cache/, and tiny models that they write and run.

They need GPU kernels to import; stand_ins.py writes those out. Nothing of the references is in this repository, and
they run in processes of their own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.parity.comparison import Published
from tests.parity.published import Case


REFERENCES = ("stripedhyena==0.2.2", "evo-model==0.5", "vtx==1.1.0", "einops==0.8.1")
CACHE = Path(__file__).parents[2] / ".cache" / "parity"


@pytest.fixture(scope="session")
def references() -> Path:
    """Folder with the published packages, each as its index has it."""
    folder = CACHE / "_".join(REFERENCES)
    if not folder.exists():
        partial = CACHE / f"partial-{os.getpid()}"
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(partial), *REFERENCES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"parity tests need {', '.join(REFERENCES)}; pip could not bring them\n{done.stderr}")
        partial.rename(folder)
    return folder


def run_reference(case: Case, site: Path, folder: Path) -> Published:
    """Let a reference fill the folder with the weights of a case, or run those given there."""
    ids = np.random.default_rng(0).integers(0, case.config["vocab_size"], (2, case.length))
    names = ("family", "config", "form", "file", "prefix", "dtype", "residues", "rounded_frequencies")
    request = {name: getattr(case, name) for name in names}
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({**request, "site": str(site), "input_ids": ids.tolist(), "folder": str(folder)}))
    command = [sys.executable, str(Path(__file__).with_name("reference.py")), str(path)]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder.with_suffix(".npz")) as arrays:
        return Published(folder, dict(arrays))


@pytest.fixture(scope="session")
def publish(references: Path, tmp_path_factory) -> Callable[[Case], Published]:
    """Let a reference write a case and run it; a case is made once a session."""
    made: dict[str, Published] = {}

    def run(case: Case) -> Published:
        if (name := repr(case)) not in made:
            folder = tmp_path_factory.mktemp("published") / "checkpoint"
            folder.mkdir()
            text = json.dumps(case.config) if case.config_file.endswith(".json") else yaml.safe_dump(case.config)
            (folder / case.config_file).write_text(text)
            made[name] = run_reference(case, references, folder)
        return made[name]

    return run


@pytest.fixture
def run_exported(references: Path) -> Callable[[Path], Published]:
    """Let stripedhyena run a folder in its layout, by the config in there, as evo-model loads it: no name may lack."""

    def run(folder: Path) -> Published:
        config = json.loads((folder / "config.json").read_text())
        return run_reference(Case("stripedhyena", config, form="given"), references, folder)

    return run
