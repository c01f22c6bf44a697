"""The common test suites of the installed transformers release, imported from its source distribution.

The wheel has no tests. The source distribution has the mixins that every model of transformers must pass, but not all
that they import: the testers of generation and of exporters, the launcher of distributed tests and the constants of
the configuration tests are left out of it. `STAND_INS` takes their place and does nothing.

Nothing of it is copied into this repository; the archive is kept in .cache/, which git ignores.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import transformers


PACKAGE = "transformers_release_tests"
CACHE = Path(__file__).parents[2] / ".cache" / "hf_suite"
VERSION = transformers.__version__

# removed at exit
_FOLDER = tempfile.TemporaryDirectory(prefix="hyena_hf_suite_")
# the checkpoints that pipeline tests would download; `pipelines.write_checkpoints` makes them
CHECKPOINTS = Path(_FOLDER.name)


class ReleaseUnavailableError(RuntimeError):
    """The source distribution is not in the cache and cannot be downloaded."""


class ExportTesterMixin:
    """No exporter is tested here."""


class GenerationTesterMixin:
    """Generation is tested by tests/test_generation.py and tests/test_cache.py."""


def no_processes(*_, **__):
    """Stands for what would start ranks. Models outside transformers' own lists are skipped before they get here."""
    raise AssertionError("the source distribution has no launcher for distributed tests")


# what the mixins import and the source distribution lacks
STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "distributed_testing_utils": {
        "_get_distributed_backend": lambda: "gloo",
        "_get_distributed_device_type": lambda: "cpu",
        "_get_rank_device": no_processes,
        "_set_rank_device": no_processes,
        "_start_rank_processes": no_processes,
        "run_distributed": no_processes,
    },
    # arguments that every config takes, with values other than their defaults
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["BertModel"],
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "problem_type": "regression",
        }
    },
}


def archive() -> Path:
    """The source distribution, downloaded through pip where it is not in the cache."""
    path = CACHE / f"transformers-{VERSION}.tar.gz"
    if path.exists():
        return path
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--dest", str(CACHE), f"transformers=={VERSION}"], capture_output=True, text=True, check=False
    )
    if not path.exists():
        raise ReleaseUnavailableError(
            f"the suite needs the source distribution of transformers {VERSION}: pip could not bring it\n"
            f"{done.stderr.strip()}\nPut {path.name} into {CACHE}, or run where pip reaches an index."
        )
    return path


def extract() -> Path:
    """The folder with the tests of the release."""
    folder = CACHE / f"transformers-{VERSION}" / "tests"
    if not folder.exists():
        with tarfile.open(archive()) as tar:
            members = [member for member in tar.getmembers() if member.name.split("/")[1:2] == ["tests"]]
            tar.extractall(CACHE, members=members, filter="data")
    return folder


def _enter(name: str, **attributes) -> ModuleType:
    module = ModuleType(f"{PACKAGE}.{name}" if name else PACKAGE)
    module.__dict__.update(attributes)
    sys.modules[module.__name__] = module
    return module


def load() -> dict[str, ModuleType]:
    """Import the suites: name of the file without `test_` -> module."""
    folder = extract()
    _enter("", __path__=[str(folder)])
    for name, attributes in STAND_INS.items():
        if "." in name:
            _enter(name.split(".")[0], __path__=[])
        _enter(name, **attributes)
    # pipeline tests read the list of their checkpoints when they are imported
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(CHECKPOINTS)
    (CHECKPOINTS / "reports").mkdir(parents=True, exist_ok=True)
    (CHECKPOINTS / "reports" / "tiny_model_summary.json").write_text("{}")
    names = (
        *("modeling_common", "configuration_common", "pipeline_mixin", "training_mixin"),
        *("tensor_parallel_mixin", "fsdp_mixin"),
    )
    with warnings.catch_warnings(), patch("transformers.utils.direct_transformers_import", lambda _: transformers):
        warnings.simplefilter("ignore")
        return {name: importlib.import_module(f"{PACKAGE}.test_{name}") for name in names}
