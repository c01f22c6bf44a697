# SPDX-License-Identifier: Apache-2.0
"""Turn DNA into one id per base with the ids of the published HyenaDNA models.

| id | 0       | 1       | 2       | 3        | 4       | 5            | 6       | 7 | 8 | 9 | 10 | 11 |
|----|---------|---------|---------|----------|---------|--------------|---------|---|---|---|----|----|
|    | `[CLS]` | `[SEP]` | `[BOS]` | `[MASK]` | `[PAD]` | `[RESERVED]` | `[UNK]` | A | C | G | T  | N  |

Source: Nguyen et al. 2023, arXiv:2306.15794, and `CharacterTokenizer` of its repository. Differences by default:
lower-case bases (soft-masked repeats) are read as bases instead of `[UNK]`, IUPAC letters become N instead of
`[UNK]`, and what was replaced is counted in a warning. `upper_case=False, ambiguous="unk"` gives the published ids.
"""

import re
from typing import Any
from warnings import warn

from tokenizers import Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers.tokenization_utils_base import BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from hyena_hf.tokenization_byte import checked_texts


__all__ = ["HyenaNucleotideTokenizer", "ReplacedNucleotideWarning"]

BASES = "ACGTN"
AMBIGUITY_LETTERS = "RYSWKMBDHVU"  # IUPAC-IUB 1984 (NC-IUB, Nucleic Acids Res. 13:3021) without N, and U
AMBIGUOUS_CHOICES = ("N", "unk")
VOCAB = {
    token: index
    for index, token in enumerate(["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *BASES])
}
SPECIAL_TOKENS = {
    "bos_token": "[BOS]",
    "eos_token": "[SEP]",
    "sep_token": "[SEP]",
    "cls_token": "[CLS]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
    "extra_special_tokens": ["[RESERVED]"],
}


class ReplacedNucleotideWarning(UserWarning):
    """Characters of the input were replaced by N or `[UNK]`; silence it with `warnings.filterwarnings`."""


class HyenaNucleotideTokenizer(TokenizersBackend):
    """One token per nucleotide; sequences of A, C, G, T and N come back unchanged.

    `add_special_tokens=True` gives `[CLS] bases [SEP]` as published, a pair `[CLS] first [SEP] second [SEP]`; batches
    are padded on the left. The text of a special token in the input (`ACG[MASK]T`) is that token, unless
    `split_special_tokens=True`.

    Whatever is no A, C, G, T or N is replaced: the IUPAC letters R Y S W K M B D H V as `ambiguous` says, and so is U,
    whose base is known but which no published model has seen (for RNA, replace U by T yourself); every other character
    (gaps, digits, spaces, line ends) by `[UNK]`. One `ReplacedNucleotideWarning` per call counts them over the whole
    input, before truncation. Length and offsets are kept: one character gives one token.

    Args:
        upper_case: Whether lower-case letters are read as their capitals. False is as published: they become `[UNK]`.
        ambiguous: What an IUPAC letter becomes, `"N"` (default) or `"unk"` (`[UNK]`, as published).
        kwargs: Arguments of `TokenizersBackend`, for example `model_max_length` (published: longest sequence + 2),
            `padding_side`, `truncation_side`, or another role for a token (`bos_token="[CLS]"`).

    Raises:
        ValueError: If `ambiguous` is no choice, or a file with other ids is loaded. On a call: an empty batch.
        TypeError: If `upper_case` is no bool. On a call: if the text is not a str or a list of str.

    Source: Nguyen et al. 2023 (HyenaDNA), arXiv:2306.15794.
    """

    model = BPE
    padding_side = "left"

    def __init__(self, upper_case: bool = True, ambiguous: str = "N", **kwargs: Any):
        if not isinstance(upper_case, bool):
            raise TypeError(f"upper_case must be a bool, got {type(upper_case).__name__} ({upper_case!r})")
        if ambiguous not in AMBIGUOUS_CHOICES:
            raise ValueError(f"ambiguous must be one of {AMBIGUOUS_CHOICES}, got {ambiguous!r}")
        kwargs.pop("merges", None)  # loading reads both from tokenizer.json, and both are fixed
        if kwargs.pop("vocab", VOCAB) != VOCAB:
            raise ValueError(
                "the vocabulary in tokenizer.json does not have the ids of HyenaDNA; this is another tokenizer's "
                "file, load it with AutoTokenizer or its own class"
            )
        self.upper_case = upper_case
        self.ambiguous = ambiguous
        # byte-pair encoding with no pairs is one token per character, without cutting a long sequence into pieces
        self._tokenizer = Tokenizer(BPE(vocab=VOCAB, merges=[], unk_token="[UNK]", fuse_unk=False))
        self._tokenizer.normalizer = _normalizer(upper_case, ambiguous)
        self._tokenizer.decoder = decoders.Fuse()
        super().__init__(upper_case=upper_case, ambiguous=ambiguous, **(SPECIAL_TOKENS | kwargs))

    def update_post_processor(self) -> None:
        """Set the published template; called by the base class."""
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, VOCAB[token]) for token in ("[CLS]", "[SEP]")],
        )

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each special token, 0 for each base.

        Args:
            token_ids_0: Ids of a sequence.
            token_ids_1: Ids of the second sequence of a pair.
            already_has_special_tokens: Whether `token_ids_0` contains them; if not, the mask is that of the sequence
                after they are added.
        """
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        second = [] if token_ids_1 is None else [0] * len(token_ids_1) + [1]
        return [1] + [0] * len(token_ids_0) + [1] + second

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Nothing: files of an installed package are not copied into checkpoints, see `hyena_hf.auto_map`."""

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        split_special_tokens = kwargs.get("split_special_tokens")
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        message = self._replacements(checked_texts(text, text_pair), split_special_tokens)
        if message:
            warn(message, ReplacedNucleotideWarning, stacklevel=3)
        return super()._encode_plus(text, text_pair, *args, **kwargs)

    def _replacements(self, texts: list[str], split_special_tokens: bool) -> str:
        """What will be replaced in the texts, in words; empty if nothing."""
        bases, letters = (
            characters + characters.lower() if self.upper_case else characters
            for characters in (BASES, AMBIGUITY_LETTERS)
        )
        others = _without("".join(texts), bases)
        if others and not split_special_tokens:
            special = re.compile("|".join(re.escape(token) for token in self.get_added_vocab()))
            others = _without("".join(special.sub("", text) for text in texts), bases)
        if not others:
            return ""
        unknown = len(_without(others, letters))
        replacement = "N" if self.ambiguous == "N" else "[UNK]"
        return (
            f"{len(others)} of {sum(map(len, texts))} characters were replaced: {len(others) - unknown} IUPAC letters "
            f"by {replacement}, {unknown} other characters by [UNK] (found: {_sample(others)})"
        )


def _normalizer(upper_case: bool, ambiguous: str) -> normalizers.Normalizer:
    letters = AMBIGUITY_LETTERS + AMBIGUITY_LETTERS.lower() if upper_case else AMBIGUITY_LETTERS
    steps = [normalizers.Replace(base.lower(), base) for base in BASES] if upper_case else []
    if ambiguous == "N":
        steps.append(normalizers.Replace(Regex(f"[{letters}]"), "N"))
    return normalizers.Sequence(steps)


def _without(text: str, characters: str) -> str:
    """The text without the given ASCII characters, other scripts as `?`: one pass in C, no look-up per base."""
    return text.encode("ascii", "replace").translate(None, characters.encode()).decode()


def _sample(characters: str, limit: int = 10) -> str:
    distinct = sorted(set(characters))
    return " ".join(repr(character) for character in distinct[:limit]) + (" ..." if len(distinct) > limit else "")
