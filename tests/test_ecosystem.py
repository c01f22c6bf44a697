"""Other libraries work on Hyena models as they are: PEFT, quantisers, accelerate's offload, pipelines, the server.

Run: python -m pytest tests/test_ecosystem.py -q
"""

import contextlib
import json
import subprocess
import sys
import time
import urllib.request

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, pipeline

from hyena_hf import HyenaByteTokenizer, HyenaConfig
from hyena_hf.auto_map import write_auto_map
from tests.models import new_model, tokens


# the names that transformers 5.17 knows, which peft reads
DEPRECATED = ("-W", "ignore:`is_gradient_checkpointing`:FutureWarning")
PORT = 18765
PROJECTIONS = {"in_proj", "q_proj", "k_proj", "v_proj", "out_proj"}


def run_python(code, *args):
    """What a fresh process prints."""
    command = [sys.executable, "-W", "error", *DEPRECATED, "-c", code, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


# filters are not found by whatever replaces or wraps linear layers


def test_no_part_of_a_filter_is_a_linear_layer_to_others():
    model = new_model("sliding")
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d))}
    assert linear
    assert not [name for name in linear if ".filter" in name or "short_conv" in name]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_sine_frequency_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match=r"sine_frequency .* must be a finite number"):
        HyenaConfig(sine_frequency=value)


# PEFT


def adapted(name, config, dtype=torch.float64):
    return peft.get_peft_model(new_model(name, dtype), config)


def train_a_step(model, ids):
    """One large step, so that an adapter that does nothing shows."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    torch.optim.SGD(trained, lr=1.0).step()


@pytest.mark.parametrize(("name", "found"), [("order 3", 2), ("heads", 2), ("hybrid", 5), ("attention only", 4)])
def test_lora_without_targets_adapts_the_projections_of_all_mixers(name, found):
    model = adapted(name, peft.LoraConfig())
    adapters = {key.split(".lora_A")[0] for key, _ in model.named_parameters() if ".lora_A" in key}
    assert {key.rsplit(".", 1)[1] for key in adapters} <= PROJECTIONS
    assert len({key.rsplit(".", 1)[1] for key in adapters}) == found
    assert all(".mixer." in key for key in adapters)


def test_lora_on_all_linear_layers_leaves_filters_and_head_alone():
    model = adapted("hybrid", peft.LoraConfig(target_modules="all-linear"))
    adapters = [key for key, _ in model.named_parameters() if "lora_A" in key]
    assert len(adapters) == 2 * 2 + 4 + 3 * 2
    assert not [key for key in adapters if ".filter." in key or "lm_head" in key]


@pytest.mark.parametrize("name", ["order 2", "hybrid"])
def test_a_trained_lora_adapter_merges_and_comes_back_from_its_file(name, tmp_path):
    ids = tokens(2, 20)
    model = adapted(name, peft.LoraConfig(task_type="CAUSAL_LM"))
    before = model(input_ids=ids).logits
    train_a_step(model, ids)
    expected = model.eval()(input_ids=ids).logits.detach()
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(new_model(name, torch.float64), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=0, atol=1e-12)


def test_lora_on_a_bfloat16_model_trains_and_keeps_filters_in_float32():
    model = adapted("hybrid", peft.LoraConfig(), torch.bfloat16)
    train_a_step(model, tokens(2, 20))
    dtypes = {parameter.dtype for key, parameter in model.named_parameters() if ".filter." in key}
    assert dtypes == {torch.float32}
    merged = model.merge_and_unload()
    assert merged.model.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert merged(tokens(1, 9)).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # what PEFT says of any norm that it tunes
@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(),
        peft.VeraConfig(r=4),
        peft.LNTuningConfig(),
        peft.LoHaConfig(r=2),
        peft.OFTConfig(oft_block_size=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters_find_their_targets_too(config):
    model = adapted("hybrid", config, torch.float32)
    train_a_step(model, tokens(2, 20))
    assert model(input_ids=tokens(1, 9)).logits.isfinite().all()


def test_peft_finds_our_defaults_when_it_is_imported_after_the_model_was_made():
    code = """
import hyena_hf
sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
model = hyena_hf.HyenaForCausalLM(hyena_hf.HyenaConfig(**sizes))
import peft
print(*sorted(peft.get_peft_model(model, peft.LoraConfig()).peft_config["default"].target_modules))
"""
    assert run_python(code).split() == sorted(PROJECTIONS)


# loading without our import line, pipelines, the server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its tokenizer, with an auto_map."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    new_model("hybrid", vocab_size=260, pad_token_id=256, eos_token_id=258).save_pretrained(folder)
    HyenaByteTokenizer().save_pretrained(folder)
    write_auto_map(folder)
    return folder


def test_a_program_without_our_import_loads_saves_and_loads_again(folder, tmp_path):
    code = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, other = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model) is sys.modules["hyena_hf"].HyenaForCausalLM and not model.is_remote_code()
model.save_pretrained(other), tokenizer.save_pretrained(other)
again = AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)
inputs = tokenizer("abc", return_tensors="pt")
print(model(**inputs).logits.equal(again(**inputs).logits))
"""
    assert run_python(code, folder, tmp_path).split() == ["True"]
    written = {file.name for file in tmp_path.glob("*.py")}
    assert written == {"hyena_stub.py"}


def test_a_pipeline_without_our_import_loads_the_folder(folder):
    code = """
import sys
from transformers import pipeline
pipe = pipeline("text-generation", sys.argv[1], trust_remote_code=True)
print(len(pipe("abc", max_new_tokens=3, min_new_tokens=3, return_tensors=True)[0]["generated_token_ids"]))
"""
    assert run_python(code, folder).split()[-1] == "6"


def test_an_auto_map_is_refused_where_no_model_of_ours_lies(tmp_path):
    with pytest.raises(ValueError, match=r"holds no Hyena model .*save one there first"):
        write_auto_map(tmp_path)


def test_the_generation_pipeline_gives_a_batch_what_it_gives_single_prompts(folder):
    pipe = pipeline("text-generation", str(folder))
    prompts = ["a", "a longer prompt", "Hyäne"]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    assert pipe(prompts, batch_size=2, **options) == [pipe(prompt, **options) for prompt in prompts]


def test_the_generation_pipeline_answers_a_chat(folder):
    pipe = pipeline("text-generation", str(folder))
    answer = pipe([{"role": "user", "content": "Hi"}], max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]
    plain = pipe("user: Hi\nassistant: ", max_new_tokens=4, do_sample=False, return_full_text=False)
    assert answer == {"role": "assistant", "content": plain[0]["generated_text"]}


def test_the_feature_pipeline_gives_the_last_hidden_state(folder):
    pipe = pipeline("feature-extraction", str(folder))
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():  # as the pipeline: filters are evaluated in tiles, which round in another order
        expected = model(**pipe.tokenizer("abc", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(pipe("abc", return_tensors=True), expected, rtol=0, atol=1e-6)


def test_a_message_cannot_end_a_turn_by_spelling_a_special_token():
    tokenizer = HyenaByteTokenizer()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "<|eos|>"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert bytes(ids) == b"user: <|eos|>\nassistant: "


@pytest.mark.real
def test_transformers_serve_answers_a_chat(folder):
    """Needs `pip install "transformers[serving]"`."""
    pytest.importorskip("fastapi")
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    options = ["--trust-remote-code", "--device", "cpu", "--port", str(PORT)]
    body = {"model": str(folder), "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "stream": False}
    address = f"http://localhost:{PORT}"
    with subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(f"{address}/health")
            request = urllib.request.Request(
                f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        finally:
            server.terminate()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 6


def wait_for(address, seconds=60):
    for _ in range(seconds):
        with contextlib.suppress(OSError), urllib.request.urlopen(address):
            return
        time.sleep(1)
    raise TimeoutError(address)


# weights that lie elsewhere


@pytest.mark.parametrize("where", ["cpu", "disk", "auto"])
def test_a_model_whose_weights_are_offloaded_gives_the_same_logits_and_tokens(folder, where, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    places = {"cpu": {"": "cpu"}, "auto": "auto"}.get(where) or {
        **dict.fromkeys(["model.embed_tokens", "lm_head", "model.layers.0", "model.norm", "model.rotary_emb"], "cpu"),
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    }
    limit = {"max_memory": {"cpu": 100_000}} if where == "auto" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path, **limit)
    ids = tokens(2, 20)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))
    if where != "cpu":
        assert "disk" in model.hf_device_map.values()


@pytest.mark.parametrize("name", ["order 2", "modal", "modal heads", "modal order 3"])
def test_weights_that_are_fetched_call_by_call_serve_caches_of_every_kind(name):
    """States once read poles beside the calls that fetch them."""
    whole, model = (new_model(name).requires_grad_(False) for _ in range(2))
    accelerate.cpu_offload(model, execution_device="cpu")
    ids, options = tokens(2, 20), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))


# quantisers, which are no dependency: pip install torchao bitsandbytes


def quantised(folder, kind):
    if kind == "torchao":
        config = TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(load_in_8bit=kind == "bnb8", load_in_4bit=kind == "bnb4")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.real
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kind", "bound"), [("torchao", 0.03), ("bnb8", 0.05), ("bnb4", 0.5)])
def test_a_quantised_model_keeps_its_filters_generates_and_is_saved(kind, bound, tmp_path):
    new_model("hybrid", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model, ids = quantised(tmp_path / "model", kind), tokens(2, 40)
    logits, expected = model(ids).logits, exact(ids).logits
    assert 1e-4 < (logits - expected).norm() / expected.norm() < bound
    for layer, original in zip(model.model.layers, exact.model.layers, strict=True):
        if hasattr(layer.mixer, "filter"):
            assert torch.equal(layer.mixer.filter(40), original.mixer.filter(40))
    model.save_pretrained(tmp_path / "quantised")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")(ids).logits, logits)
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (2, 44)
