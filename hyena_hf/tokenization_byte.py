# SPDX-License-Identifier: Apache-2.0
"""Turn any text into bytes and back: a fast byte-level tokenizer, with trained byte-pair merges as an option.

Layout of the ids, the same with and without merges:

| ids        | token                                                        |
|------------|--------------------------------------------------------------|
| 0 .. 255   | the byte of that value                                       |
| 256 .. 259 | `<|pad|>`, `<|bos|>`, `<|eos|>`, `<|mask|>`                  |
| 260 ..     | one token per trained merge, in order of rank (trained only) |

So without merges `tokenizer(text).input_ids == list(text.encode())`: bits per token are bits per byte. Raw bytes that
are no UTF-8 need no tokenizer: `list(data)` are their ids, and `bytes(ids)` leads back.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any
from warnings import warn

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers.tokenization_utils_base import BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend


__all__ = ["HyenaByteTokenizer"]

SPECIAL_TOKENS = {
    "pad_token": "<|pad|>",
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "mask_token": "<|mask|>",
}
# plain text: what somebody types cannot end a turn by spelling a special token
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NUM_BASE_TOKENS = 256 + len(SPECIAL_TOKENS)


class HyenaByteTokenizer(TokenizersBackend):
    r"""A byte-level tokenizer: every str comes back unchanged, no character is unknown, no normalisation is done.

    The text of a special token that somebody types, such as `<|eos|>` in a document, is bytes like any other: it
    cannot end a document, and the round trip holds with `skip_special_tokens=True` too. Special tokens enter a
    sequence by id or by `add_bos_token` and `add_eos_token`. Where the text is trusted and should be parsed (a
    template that spells `<|eos|>`), pass `split_special_tokens=False`, here or to a call.

    The chat template writes every message as a line `role: content`; pass or assign another `chat_template`.

    Decoding ids that are no valid UTF-8 (a generation cut inside a character) writes U+FFFD for the broken bytes.

    Token strings and `tokenizer.json` spell bytes as GPT-2 does (Radford et al. 2019, `bytes_to_unicode` of its
    encoder.py). ByT5 (Xue et al. 2021, arXiv:2105.13626) has the same idea with three special tokens first.

    Args:
        vocab: Token to id, read from `tokenizer.json` on loading. By default it follows from `merges`.
        merges: Trained pairs in order of rank, as `train_bpe` makes them. None: every byte is one token.
        split_special_tokens: Whether the text of special tokens in the input is read as bytes.
        kwargs: Arguments of `TokenizersBackend`, for example `add_bos_token=False`, `add_eos_token=False`,
            `padding_side="left"`, `model_max_length`, or a special token of another name, which gets the next id.

    Raises:
        ValueError: If `vocab` does not give the bytes the ids 0 to 255, as when another tokenizer's file is loaded.
            On a call: an empty batch, or a lone surrogate in the text (as UnicodeEncodeError).
        TypeError: On a call, if the text is not a str or a list of str.
    """

    model = BPE
    padding_side = "left"

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        merges: list[tuple[str, str]] | None = None,
        split_special_tokens: bool = True,
        **kwargs: Any,
    ):
        merges = merges or []
        vocab = _vocabulary(merges) if vocab is None else vocab
        for byte, character in enumerate(_byte_characters()):
            if vocab.get(character) != byte:
                raise ValueError(
                    f"the vocabulary gives byte {byte} the id {vocab.get(character)}, but a HyenaByteTokenizer needs "
                    f"{byte}; this is another tokenizer's file, load it with AutoTokenizer or its own class"
                )
        self._tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
        self._tokenizer.pre_tokenizer = _pre_tokenizer(split_words=bool(merges))
        self._tokenizer.decoder = decoders.ByteLevel()
        defaults = SPECIAL_TOKENS | {"chat_template": CHAT_TEMPLATE}
        super().__init__(split_special_tokens=split_special_tokens, **(defaults | kwargs))
        # tokenizer.json keeps the post-processor; transformers drops the two attributes that say what is in it
        added = self._tokenizer.encode("").ids
        self._add_bos_token = self.bos_token_id in added
        self._add_eos_token = self.eos_token_id in added

    @classmethod
    def train_bpe(cls, texts: Iterable[str], *, vocab_size: int, show_progress: bool = False) -> "HyenaByteTokenizer":
        """Learn byte-pair merges from texts; the result is lossless and is saved and loaded like the plain tokenizer.

        Words are split as in GPT-2 first, and a pair must occur twice to be merged. Bytes keep the ids 0 to 255.

        Args:
            texts: The corpus, one str (or one list of str) at a time; it is read once and not kept.
            vocab_size: Size asked for: 256 bytes, 4 special tokens and `vocab_size - 260` merges.
            show_progress: Whether to draw a progress bar on stderr.

        Returns:
            The trained tokenizer. `len(tokenizer)` is below `vocab_size`, with a warning, where the corpus has fewer
            pairs that repeat.

        Raises:
            TypeError: If `texts` is one str or yields something else than str, or `vocab_size` is no int.
            ValueError: If `vocab_size` leaves no room for a merge, or `texts` has no character.

        Source: Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019 (GPT-2), section 2.2.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError(f"texts must be an iterable of str, got one {type(texts).__name__}; wrap it in a list")
        if not isinstance(vocab_size, int):
            raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
        if vocab_size <= NUM_BASE_TOKENS:
            raise ValueError(
                f"vocab_size ({vocab_size}) must be above {NUM_BASE_TOKENS}: 256 bytes and {len(SPECIAL_TOKENS)} "
                f"special tokens come before the first merge; choose at least {NUM_BASE_TOKENS + 1}, or "
                "HyenaByteTokenizer() for plain bytes"
            )
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = _pre_tokenizer(split_words=True)
        trainer = BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            min_frequency=2,
            initial_alphabet=_byte_characters(),
            show_progress=show_progress,
        )
        tokenizer.train_from_iterator(_nonempty(texts), trainer)
        trained = cls(merges=[(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]])
        if len(trained) < vocab_size:
            warn(
                f"vocab_size {vocab_size} was asked for, but the corpus has repeating pairs for {len(trained)} only; "
                "use len(tokenizer) as the model's vocab_size, or train on more text",
                stacklevel=2,
            )
        return trained

    def train_new_from_iterator(
        self, text_iterator: Iterable[Any], vocab_size: int, length: int | None = None, *args: Any, **kwargs: Any
    ) -> "HyenaByteTokenizer":
        """Transformers' name for `train_bpe`, which keeps the layout of ids.

        Args:
            text_iterator: Texts or lists of texts.
            vocab_size: As in `train_bpe`.
            length: Number of texts; not needed here.
            args: Refused like kwargs.
            kwargs: Refused: special tokens have fixed ids.

        Raises:
            TypeError: If other arguments are given.
        """
        del length
        if args or kwargs:
            refused = ", ".join([*map(repr, args), *kwargs])
            raise TypeError(f"special tokens are fixed, {refused} cannot be given; see train_bpe")
        return self.train_bpe(text_iterator, vocab_size=vocab_size)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Nothing: files of an installed package are not copied into checkpoints, see `hyena_hf.auto_map`."""

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        checked_texts(text, text_pair)
        return super()._encode_plus(text, text_pair, *args, **kwargs)


def checked_texts(text: Any, text_pair: Any = None) -> list[str]:
    """Every str in the input of a tokenizer call, in order, after refusing what is no text.

    Args:
        text: A str, or a list or tuple of what `text` may be (batches, pairs, words).
        text_pair: The same, or None.

    Raises:
        TypeError: If something else is found; the message names it.
        ValueError: If the batch is empty, or a str has no UTF-8 form (lone surrogates, as UnicodeEncodeError).
    """
    if isinstance(text, (list, tuple)) and not text:
        raise ValueError("the batch has 0 texts, at least 1 is needed; pass [''] for one empty text")
    return [*_texts_in(text), *(() if text_pair is None else _texts_in(text_pair))]


def _texts_in(item: Any) -> Iterator[str]:
    if isinstance(item, str):
        if not item.isascii():
            item.encode()  # raises on a lone surrogate and says where it is
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _texts_in(part)
    else:
        remedy = "; decode it first, or take list(data) as byte ids" if isinstance(item, (bytes, bytearray)) else ""
        raise TypeError(f"expected a str or a list of str, got {type(item).__name__}{remedy}")


def _nonempty(texts: Iterable[Any]) -> Iterator[str]:
    seen = False
    for text in texts:
        for part in _texts_in(text):
            seen = seen or bool(part)
            yield part
    if not seen:
        raise ValueError("texts has 0 characters, at least 1 is needed to train on; check the path or the filter")


def _pre_tokenizer(*, split_words: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte 0 to 255 inside `tokenizers` (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def byte_token(byte: int) -> str:
    """The token that stands for a byte 0 to 255, where a published model uses one as a special token."""
    return _byte_characters()[byte]


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    vocab = {token: index for index, token in enumerate([*_byte_characters(), *SPECIAL_TOKENS.values()])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))  # two merges may spell one token
    return vocab
