"""Bits per byte and perplexity of any causal language model on documents of any length.

    python -m evaluation.perplexity MODEL_DIR book.txt notes.txt --context 1024 --json result.json

A document x_0 .. x_{L-1} is scored by sliding windows: the model sees the inputs x_b .. x_{b+C-1} (C = `context`) and
predicts x_{b+1} .. x_{b+C}; the next window begins `stride` tokens later and counts only the targets that no earlier
window has counted. So every token but the first is scored exactly once: those of the first window with all that comes
before them, each later one with C - stride + 1 .. C tokens before it. A smaller stride gives every token more context
and costs C / stride times the work of stride = C.

    bits per byte = sum of nats / (ln 2 * bytes)        perplexity = exp(sum of nats / tokens)

Bits per byte compare models with different tokenizers, perplexities do not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hyena_hf  # noqa: F401  registers the Auto classes


@dataclass
class PerplexityResult:
    """What was scored and what it cost: sums over all documents; `bytes` are what the scored tokens stand for."""

    nats: float
    tokens: int
    bytes: int
    bits_per_byte: float = field(init=False)
    perplexity: float = field(init=False)

    def __post_init__(self) -> None:
        self.bits_per_byte = self.nats / (math.log(2) * self.bytes)
        self.perplexity = math.exp(min(self.nats / self.tokens, 709.0))  # exp overflows a float64 at 709.8


class Window(NamedTuple):
    """Inputs [begin, end) of one document; the targets from position `first` on (first > begin) are counted."""

    document: int
    begin: int
    end: int
    first: int


def sliding_windows(length: int, *, context: int, stride: int, document: int = 0) -> Iterator[Window]:
    """Windows over a document of `length` tokens whose counted targets [first, end] are 1 .. length - 1, each once."""
    first = 1
    for begin in range(0, length, stride):
        if first >= length:
            return
        end = min(begin + context, length - 1)
        yield Window(document, begin, end, first)
        first = end + 1


def bits_per_byte(
    model: PreTrainedModel,
    documents: Sequence[torch.Tensor],
    *,
    context: int,
    batch_size: int,
    stride: int | None = None,
    bytes_per_document: Sequence[int] | None = None,
) -> PerplexityResult:
    """Score documents with sliding windows; the result does not depend on the batch size beyond float32 rounding.

    Windows are run longest first, ragged ones padded on the right under an attention mask. Log-probabilities are taken
    in float32 at least and added in float64. The model is left as it was found, each module's training flag too.

    Args:
        model: any Transformers causal language model.
        documents: token ids, one 1-D int64 tensor for each document; a document of one token has nothing to score.
        context: the most tokens that the model sees at once, at least 2.
        batch_size: windows in a forward pass.
        stride: tokens between the beginnings of windows, 1 .. context; None means context // 2.
        bytes_per_document: how many bytes the scored tokens of each document stand for; None means one byte for each.

    Returns:
        Sums over all documents, bits per byte and perplexity.

    Raises:
        TypeError: a document is not a 1-D int64 tensor.
        ValueError: a size out of range, an empty document, an id outside the vocabulary, or nothing to score.
        FloatingPointError: the model gives a document a log-probability that is not finite.
    """
    stride = context // 2 if stride is None else stride
    _check_sizes(context=context, stride=stride, batch_size=batch_size)
    _check_documents(documents, bytes_per_document, vocab_size=model.config.get_text_config().vocab_size)
    windows = [
        window
        for index, document in enumerate(documents)
        for window in sliding_windows(len(document), context=context, stride=stride, document=index)
    ]
    windows.sort(key=lambda window: window.begin - window.end)  # stable, longest first: the least padding
    tokens = sum(len(document) - 1 for document in documents)
    nats = 0.0
    with (
        _evaluating(model),
        torch.inference_mode(),
        tqdm(total=tokens, unit="token", desc="perplexity", disable=None) as progress,
    ):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            for window, losses in zip(batch, _window_losses(model, documents, batch), strict=True):
                loss = losses.double().sum().item()
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"document {window.document} has a log-likelihood of {-loss} "
                        f"for its tokens {window.first} .. {window.end}"
                    )
                nats += loss
                progress.update(len(losses))
    return PerplexityResult(nats, tokens, tokens if bytes_per_document is None else sum(bytes_per_document))


def _window_losses(
    model: PreTrainedModel, documents: Sequence[torch.Tensor], batch: Sequence[Window]
) -> Iterator[torch.Tensor]:
    """Negative log-probabilities of the counted targets of each window, in nats."""
    rows = [documents[window.document][window.begin : window.end].to(model.device) for window in batch]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, L), any valid id does as padding
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    attention_mask = (torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]).long()
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    for row, window in enumerate(batch):
        targets = documents[window.document][window.first : window.end + 1].to(model.device)
        kept = logits[row, window.first - window.begin - 1 : window.end - window.begin]  # (targets, V)
        kept = kept.float() if kept.dtype in (torch.float16, torch.bfloat16) else kept
        yield F.cross_entropy(kept, targets, reduction="none")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has its own training flag back, also where a part was in eval mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _check_sizes(*, context: int, stride: int, batch_size: int) -> None:
    if context < 2:
        raise ValueError(f"context ({context}) must be at least 2 tokens")
    if not 1 <= stride <= context:
        raise ValueError(f"stride ({stride}) must be in 1 .. {context}, the context")
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be at least 1")


def _check_documents(
    documents: Sequence[torch.Tensor], bytes_per_document: Sequence[int] | None, *, vocab_size: int
) -> None:
    for index, document in enumerate(documents):
        if document.dim() != 1 or document.dtype != torch.int64:
            raise TypeError(
                f"document {index} must be a 1-D int64 tensor, got {document.dtype} of shape {tuple(document.shape)}"
            )
        if len(document) == 0:
            raise ValueError(f"document {index} is empty; leave it out")
        low, high = document.min().item(), document.max().item()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"document {index} has token ids {low} .. {high}, the model knows 0 .. {vocab_size - 1}")
    if sum(len(document) - 1 for document in documents) == 0:
        raise ValueError(f"the {len(documents)} documents hold no token to score: each needs at least 2")
    if bytes_per_document is None:
        return
    if len(bytes_per_document) != len(documents):
        raise ValueError(f"bytes_per_document has {len(bytes_per_document)} entries for {len(documents)} documents")
    if min(bytes_per_document) < 0 or sum(bytes_per_document) == 0:
        raise ValueError("bytes_per_document must not be negative and must not add up to 0")


def read_document(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, int]:
    """Token ids of one UTF-8 text file and the bytes that its scored tokens stand for.

    As in lm-eval's rolling log-likelihood the text follows one token that is not scored, the tokenizer's `bos` or else
    its `eos`, so that every byte of the file is scored. A tokenizer with neither leaves the first token of the text
    unscored, and its bytes uncounted.

    Raises:
        ValueError: the file is empty, or not UTF-8; the message names the file and the byte.
    """
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is not None:
        return torch.tensor([prefix, *ids]), len(content)
    return torch.tensor(ids), len(content) - len(str(tokenizer.decode(ids[:1])).encode())


def _trained_context(model: PreTrainedModel) -> int:
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise ValueError(f"{model.config.model_type} models do not say how long their context is; give --context")
    return length


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, and write as JSON where asked, the bits per byte of a saved model on text files, one document each."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.perplexity", description=main.__doc__)
    parser.add_argument("model", type=Path, help="folder with the model and its tokenizer")
    parser.add_argument("data", type=Path, nargs="+", help="UTF-8 text files")
    parser.add_argument("--context", type=int, help="tokens seen at once (default: max_position_embeddings)")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: context // 2)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows in a forward pass (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model} holds no config.json: it is not a folder written by save_pretrained")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    try:
        documents, sizes = zip(*(read_document(path, tokenizer) for path in options.data), strict=True)
        model = AutoModelForCausalLM.from_pretrained(options.model)
        result = bits_per_byte(
            model,
            documents,
            context=_trained_context(model) if options.context is None else options.context,
            stride=options.stride,
            batch_size=options.batch_size,
            bytes_per_document=sizes,
        )
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error))
    print(json.dumps(asdict(result)))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
