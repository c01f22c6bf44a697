"""A published HyenaDNA is fine-tuned with LoRA, merged, saved and reloaded: each step fails in its remote code."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hyena_hf.checkpoints import convert_checkpoint
from tests.test_checkpoints import golden


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hyenadna") / "out"
    convert_checkpoint(golden("longsafari-hf"), folder)
    return folder


def sequences():
    """Class 0 is rich in A and T, class 1 in G and C; lengths differ, so that batches are padded."""
    generator = torch.Generator().manual_seed(0)
    for index in range(48):
        weights = torch.tensor([4.0, 1.0, 1.0, 4.0] if index % 2 == 0 else [1.0, 4.0, 4.0, 1.0])
        length = 20 + int(torch.randint(0, 40, (), generator=generator))
        letters = torch.multinomial(weights, length, replacement=True, generator=generator)
        yield {"sequence": "".join("ACGT"[letter] for letter in letters), "labels": index % 2}


def test_lora_on_a_published_model_trains_merges_saves_and_reloads(converted, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(converted, num_labels=2, classifier_pooling="mean")
    body = {name: value.clone() for name, value in model.model.state_dict().items()}
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8))
    data = Dataset.from_list(list(sequences())).map(
        lambda row: tokenizer(row["sequence"]), remove_columns=["sequence"]
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=30, per_device_train_batch_size=16, learning_rate=2e-2,
        report_to=[], save_strategy="no", use_cpu=True, logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]

    batch = tokenizer([row["sequence"] for row in list(sequences())[:5]], return_tensors="pt", padding=True)
    with torch.no_grad():
        tuned = model.eval()(**batch).logits
        merged = model.merge_and_unload()
        assert any(not torch.equal(value, body[name]) for name, value in merged.model.state_dict().items())
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(reloaded(**batch).logits, tuned, rtol=1e-5, atol=1e-5)
        assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_published_model_is_trained_whole_saved_and_generates(converted, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    batch = tokenizer(["ACGTACGTAC", "ACGT"], return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = tokenizer(["ACGTA", "AC"], return_tensors="pt", padding=True, add_special_tokens=False)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(reloaded.generate(**prompt, **settings), model.eval().generate(**prompt, **settings))
