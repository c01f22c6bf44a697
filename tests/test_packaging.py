"""What a user installs and imports: the wheel, the public names, the price of the import.

.venv/bin/python -m pytest tests/test_packaging.py
"""

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import hyena_hf


ROOT = Path(__file__).parents[1]
VERSION = version("hyena-hf")
HEAVY = {
    "accelerate",
    "datasets",
    "evaluate",
    "lm_eval",
    "matplotlib",
    "peft",
    "scipy",
    "sklearn",
    "transformers.trainer",
}
LLAMA = "from transformers import AutoModelForCausalLM, LlamaForCausalLM"
SPINE = {
    "HyenaByteTokenizer",
    "HyenaConfig",
    "HyenaForCausalLM",
    "HyenaForMaskedLM",
    "HyenaForQuestionAnswering",
    "HyenaForSequenceClassification",
    "HyenaForTextEncoding",
    "HyenaForTokenClassification",
    "HyenaModel",
    "HyenaNucleotideTokenizer",
    "HyenaPreTrainedModel",
}


def run_python(*args):
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def heavy_modules_after(*statements):
    """Which of the heavy modules are loaded after each statement, in one fresh interpreter."""
    report = f"print(*sorted(set({sorted(HEAVY)}) & sys.modules.keys()))"
    code = "\n".join(["import sys", *(f"{statement}\n{report}" for statement in statements)])
    return [set(line.split()) for line in run_python("-c", code).splitlines()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out))
    return next(out.glob("*.whl"))


def test_the_wheel_holds_only_hyena_hf(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.partition("/")[0] for name in archive.namelist()}
    assert folders == {"hyena_hf", f"hyena_hf-{VERSION}.dist-info"}


def test_the_wheel_holds_every_module_of_hyena_hf_and_its_type_marker(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("hyena_hf/")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hyena_hf").rglob("*.py")}
    assert packed >= modules | {"hyena_hf/py.typed"}


def test_a_plain_install_requires_only_torch_and_transformers(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"hyena_hf-{VERSION}.dist-info/METADATA").decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.9", "Requires-Dist: transformers<6,>=5.17"]


def test_public_names_are_exactly_all():
    public = {name for name in dir(hyena_hf) if not name.startswith("_")}
    members = {name for name in public if not isinstance(getattr(hyena_hf, name), ModuleType)}
    assert members == set(hyena_hf.__all__)
    assert len(hyena_hf.__all__) == len(set(hyena_hf.__all__))


def test_all_names_the_model_its_config_and_the_tokenizers():
    assert set(hyena_hf.__all__) >= SPINE


@pytest.mark.parametrize("name", sorted(SPINE))
def test_every_public_name_is_a_class_of_that_name(name):
    assert getattr(hyena_hf, name).__name__ == name


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hyena_hf.no_such_name


def test_importing_the_package_loads_no_trainer_harness_or_scipy():
    (loaded,) = heavy_modules_after("import hyena_hf")
    assert not loaded


def test_importing_the_model_loads_nothing_heavy_that_llama_does_not():
    with_llama, with_hyena = heavy_modules_after(LLAMA, "from hyena_hf import HyenaForCausalLM")
    assert with_hyena == with_llama
