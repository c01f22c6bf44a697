# SPDX-License-Identifier: Apache-2.0
"""What the byte and nucleotide tokenizers promise: `python -m pytest tests/test_tokenization.py`."""

import copy
import json
import pickle
import random
import time
import warnings

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.tokenization_byte import HyenaByteTokenizer
from hyena_hf.tokenization_nucleotide import HyenaNucleotideTokenizer, ReplacedNucleotideWarning


AWKWARD_TEXTS = [
    "",
    " ",
    "  two  spaces , and .  ",
    "tab\tnewline\r\n\n",
    "".join(map(chr, range(256))),
    "naïve Ελληνικά 漢字 עברית",
    "👩‍👩‍👧‍👦 e\u0301 \u200b\ufeff\ufffd\U0010ffff",
    "a document with <|eos|> and <|pad|><|bos|> and </s> in it",
]
CORPUS = ["def convolve(filter, signal):\n    return filter * signal\n", "the long convolution of the signal 👍 "] * 20


def random_text(seed: int, length: int = 400) -> str:
    """Characters of every UTF-8 width, surrogates left out."""
    generator = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(length))


def random_dna(seed: int, length: int, letters: str = "ACGTN") -> str:
    return "".join(random.Random(seed).choices(letters, k=length))


@pytest.fixture(scope="module")
def trained() -> HyenaByteTokenizer:
    return HyenaByteTokenizer.train_bpe(CORPUS, vocab_size=280)


@pytest.fixture(params=["plain", "trained"])
def byte_tokenizer(request) -> HyenaByteTokenizer:
    return HyenaByteTokenizer() if request.param == "plain" else copy.deepcopy(request.getfixturevalue("trained"))


@pytest.fixture
def nucleotides() -> HyenaNucleotideTokenizer:
    return HyenaNucleotideTokenizer()


def bases(tokenizer: HyenaNucleotideTokenizer, text: str, **kwargs) -> str:
    """Tokens of a text without the template, [UNK] as ?."""
    ids = tokenizer(text, add_special_tokens=False, **kwargs).input_ids
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("[UNK]", "?")


class TestBytes:
    def test_ids_are_the_utf8_bytes(self):
        tokenizer = HyenaByteTokenizer()
        for text in [*AWKWARD_TEXTS, *map(random_text, range(20))]:
            assert tokenizer(text).input_ids == list(text.encode())

    def test_every_text_comes_back(self, byte_tokenizer):
        for text in [*AWKWARD_TEXTS, *map(random_text, range(20))]:
            ids = byte_tokenizer(text).input_ids
            assert byte_tokenizer.decode(ids) == text
            assert byte_tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_the_256_bytes_come_first_and_the_special_tokens_next(self, byte_tokenizer):
        special = (
            byte_tokenizer.pad_token_id,
            byte_tokenizer.bos_token_id,
            byte_tokenizer.eos_token_id,
            byte_tokenizer.mask_token_id,
        )
        assert special == (256, 257, 258, 259)
        assert set(byte_tokenizer.all_special_ids) == set(special)
        assert byte_tokenizer.unk_token_id is None
        assert byte_tokenizer.decode(list(range(128))) == "".join(map(chr, range(128)))
        assert sorted(byte_tokenizer.get_vocab().values()) == list(range(len(byte_tokenizer)))

    def test_typed_special_tokens_are_bytes_unless_asked_otherwise(self, byte_tokenizer):
        assert byte_tokenizer.eos_token_id not in byte_tokenizer("a<|eos|>").input_ids
        assert byte_tokenizer("a<|eos|>", split_special_tokens=False).input_ids == [97, 258]
        assert byte_tokenizer.eos_token_id not in byte_tokenizer("a<|eos|>").input_ids
        assert HyenaByteTokenizer(split_special_tokens=False)("a<|eos|>").input_ids == [97, 258]

    def test_a_cut_character_decodes_to_the_replacement_character(self):
        assert HyenaByteTokenizer().decode([*b"ab", *"é".encode()[:1]]) == "ab\ufffd"

    def test_bytes_that_are_no_utf8_are_ids_already(self):
        data = bytes(range(256))
        assert HyenaByteTokenizer().decode(list(data)) == data.decode(errors="replace")

    def test_bos_and_eos_are_added_on_request_only(self, tmp_path):
        assert HyenaByteTokenizer()("a").input_ids == [97]
        tokenizer = HyenaByteTokenizer(add_bos_token=True, add_eos_token=True)
        tokenizer.save_pretrained(tmp_path)
        loaded = HyenaByteTokenizer.from_pretrained(tmp_path)
        for each in (tokenizer, loaded):
            assert each("a").input_ids == [257, 97, 258]
            assert each("a", add_special_tokens=False).input_ids == [97]
            assert (each.add_bos_token, each.add_eos_token) == (True, True)

    def test_batches_are_padded_on_the_left(self, byte_tokenizer):
        batch = byte_tokenizer(["q", "qxz"], padding=True, return_tensors="pt")
        assert torch.equal(batch["input_ids"], torch.tensor([[256, 256, 113], [113, 120, 122]]))
        assert torch.equal(batch["attention_mask"], torch.tensor([[0, 0, 1], [1, 1, 1]]))
        assert set(batch) == {"input_ids", "attention_mask"}

    def test_offsets_point_at_the_characters(self):
        batch = HyenaByteTokenizer()("aé", return_offsets_mapping=True, truncation=True, max_length=3)
        assert batch.offset_mapping == [(0, 1), (1, 2), (1, 2)]

    def test_another_eos_token_gets_the_next_id(self):
        tokenizer = HyenaByteTokenizer(eos_token="<|end|>")
        assert (tokenizer.eos_token_id, len(tokenizer)) == (260, 261)


class TestTrainedMerges:
    def test_trained_merges_shorten_the_text(self, trained):
        assert len(trained) == 280
        assert len(trained(CORPUS[0]).input_ids) < 0.8 * len(CORPUS[0].encode())

    def test_training_twice_gives_the_same_ids(self, trained):
        again = HyenaByteTokenizer.train_bpe(iter(CORPUS), vocab_size=280)
        assert again.get_vocab() == trained.get_vocab()
        assert HyenaByteTokenizer().train_new_from_iterator([CORPUS], 280).get_vocab() == trained.get_vocab()

    def test_special_tokens_in_the_corpus_are_not_learned_as_such(self):
        tokenizer = HyenaByteTokenizer.train_bpe(["x<|eos|>y <|eos|>"] * 50, vocab_size=264)
        assert tokenizer.eos_token_id not in tokenizer("<|eos|>").input_ids

    def test_a_corpus_with_too_few_pairs_warns_and_names_both_sizes(self):
        with pytest.warns(UserWarning, match=r"vocab_size 5000 .* 26\d only"):
            tokenizer = HyenaByteTokenizer.train_bpe(["abab", "abab"], vocab_size=5000)
        assert len(tokenizer) < 270

    @pytest.mark.parametrize("texts", [[], [""], iter([]), [[], [""]]])
    def test_an_empty_corpus_is_refused(self, texts):
        with pytest.raises(ValueError, match="0 characters"):
            HyenaByteTokenizer.train_bpe(texts, vocab_size=300)

    @pytest.mark.parametrize("vocab_size", [0, 259, 260])
    def test_a_vocabulary_without_room_for_a_merge_is_refused(self, vocab_size):
        with pytest.raises(ValueError, match=rf"vocab_size \({vocab_size}\) must be above 260.*at least 261"):
            HyenaByteTokenizer.train_bpe(CORPUS, vocab_size=vocab_size)

    @pytest.mark.parametrize(
        ("texts", "vocab_size"), [("one text", 300), (["a", 1], 300), ([b"a"], 300), (["a"], 3e2)]
    )
    def test_a_corpus_that_is_no_text_is_refused(self, texts, vocab_size):
        with pytest.raises(TypeError, match="got"):
            HyenaByteTokenizer.train_bpe(texts, vocab_size=vocab_size)

    def test_renaming_special_tokens_while_training_is_refused(self):
        with pytest.raises(TypeError, match="new_special_tokens cannot be given"):
            HyenaByteTokenizer().train_new_from_iterator(CORPUS, 300, new_special_tokens=["<x>"])


class TestNucleotides:
    def test_ids_are_those_of_published_hyenadna(self, nucleotides):
        names = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *"ACGTN"]
        assert nucleotides.convert_tokens_to_ids(names) == list(range(12))
        assert len(nucleotides) == nucleotides.vocab_size == 12
        roles = ("bos_token", "eos_token", "sep_token", "cls_token", "pad_token", "mask_token", "unk_token")
        tokens = ["[BOS]", "[SEP]", "[SEP]", "[CLS]", "[PAD]", "[MASK]", "[UNK]"]
        assert [getattr(nucleotides, role) for role in roles] == tokens
        assert set(nucleotides.all_special_ids) == set(range(7))

    def test_every_sequence_of_acgtn_comes_back(self, nucleotides):
        for seed in range(30):
            text = random_dna(seed, length=seed * 37)
            ids = nucleotides(text).input_ids
            assert nucleotides.decode(ids, skip_special_tokens=True) == text
            assert nucleotides.decode(ids) == f"[CLS]{text}[SEP]"

    def test_special_tokens_stand_around_a_sequence_as_published(self, nucleotides):
        batch = nucleotides("ACGTN", return_special_tokens_mask=True)
        assert batch.input_ids == [0, 7, 8, 9, 10, 11, 1]
        assert batch.special_tokens_mask == [1, 0, 0, 0, 0, 0, 1]
        assert set(batch) == {"input_ids", "attention_mask", "special_tokens_mask"}
        assert nucleotides("ACGTN", add_special_tokens=False).input_ids == [7, 8, 9, 10, 11]
        assert nucleotides("A", "C").input_ids == [0, 7, 1, 8, 1]

    def test_special_tokens_mask_agrees_before_and_after_the_template(self, nucleotides):
        ids = nucleotides("ACG", "T").input_ids
        mask = nucleotides.get_special_tokens_mask(ids, already_has_special_tokens=True)
        assert mask == nucleotides.get_special_tokens_mask([7, 8, 9], [10]) == [1, 0, 0, 0, 1, 0, 1]
        assert nucleotides.get_special_tokens_mask([7]) == [1, 0, 1]

    def test_batches_are_padded_on_the_left_and_truncated_with_the_template(self, nucleotides):
        batch = nucleotides(["A", "ACGTACGT"], padding=True, truncation=True, max_length=6, return_tensors="pt")
        assert batch["input_ids"].tolist() == [[4, 4, 4, 0, 7, 1], [0, 7, 8, 9, 10, 1]]
        assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]

    def test_offsets_point_at_the_characters_even_where_they_were_replaced(self, nucleotides):
        with pytest.warns(ReplacedNucleotideWarning):
            batch = nucleotides("aR-é[MASK]T", add_special_tokens=False, return_offsets_mapping=True)
        assert batch.input_ids == [7, 11, 6, 6, 3, 10]
        assert batch.offset_mapping == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 10), (10, 11)]

    def test_lower_case_bases_are_bases_by_default(self, nucleotides):
        assert bases(nucleotides, "acgtnACGTN") == "ACGTNACGTN"

    def test_lower_case_is_unknown_as_published_on_request(self):
        with pytest.warns(ReplacedNucleotideWarning, match="^6 of 11 .* 0 IUPAC letters by N, 6 other"):
            assert bases(HyenaNucleotideTokenizer(upper_case=False), "acgtnrACGTN") == "??????ACGTN"

    @pytest.mark.parametrize(("ambiguous", "expected"), [("N", "N"), ("unk", "?")])
    def test_iupac_letters_become_n_or_unknown_as_the_option_says(self, ambiguous, expected):
        tokenizer = HyenaNucleotideTokenizer(ambiguous=ambiguous)
        with pytest.warns(ReplacedNucleotideWarning, match="^22 of 24 .* 22 IUPAC letters"):
            assert bases(tokenizer, "ARYSWKMBDHVUryswkmbdhvuC") == "A" + expected * 22 + "C"

    def test_everything_else_is_unknown(self, nucleotides):
        with pytest.warns(ReplacedNucleotideWarning, match=r"^10 of 12 .* 0 IUPAC letters by N, 10 other"):
            assert bases(nucleotides, "A-*. \n7Xxé\u017fC") == "A" + "?" * 10 + "C"

    def test_one_warning_counts_a_whole_call(self, nucleotides):
        with pytest.warns(ReplacedNucleotideWarning) as caught:
            nucleotides(["ACGR"] * 1000 + ["AC-"], text_pair=["Y"] * 1001, truncation=True, max_length=4)
        assert len(caught) == 1
        assert str(caught[0].message).startswith(
            "2002 of 5004 characters were replaced: 2001 IUPAC letters by N, 1 other"
        )
        assert caught[0].filename == __file__

    def test_encode_and_tokenize_count_like_a_call(self, nucleotides):
        for encode in (nucleotides, nucleotides.encode, nucleotides.tokenize):
            with pytest.warns(ReplacedNucleotideWarning, match="^1 of 8 ") as caught:
                encode("A[MASK]R")
            assert caught[0].filename == __file__

    def test_nothing_replaced_gives_no_warning(self, nucleotides):
        nucleotides([random_dna(0, 1000, "ACGTNacgtn"), "", "AC[MASK]G[CLS]"])
        nucleotides([["AC", "GT"]], is_split_into_words=True)

    def test_typed_special_tokens_are_tokens_unless_split(self, nucleotides):
        assert nucleotides("A[MASK]C", add_special_tokens=False).input_ids == [7, 3, 8]
        with pytest.warns(ReplacedNucleotideWarning, match="^5 of 8 .* 3 IUPAC letters by N, 2 other"):
            assert bases(nucleotides, "A[MASK]C", split_special_tokens=True) == "A?NANN?C"
        with pytest.warns(ReplacedNucleotideWarning, match="^5 of 6 .* 3 IUPAC"):
            assert bases(nucleotides, "[mask]") == "?NANN?"

    def test_unknown_options_are_refused_with_the_choices(self):
        with pytest.raises(ValueError, match=r"ambiguous must be one of \('N', 'unk'\), got 'n'"):
            HyenaNucleotideTokenizer(ambiguous="n")
        with pytest.raises(TypeError, match="upper_case must be a bool, got str"):
            HyenaNucleotideTokenizer(upper_case="no")


@pytest.fixture(params=["bytes", "trained", "nucleotides", "nucleotides as published"])
def tokenizer(request):
    return {
        "bytes": HyenaByteTokenizer,
        "trained": lambda: copy.deepcopy(request.getfixturevalue("trained")),
        "nucleotides": HyenaNucleotideTokenizer,
        "nucleotides as published": lambda: HyenaNucleotideTokenizer(False, "unk", model_max_length=1026),
    }[request.param]()


def answers(tokenizer) -> tuple:
    """Everything that saving or copying could lose."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = tokenizer(["ACGTNacgtnRU-[MASK]<|eos|>é", "convolution of the signal"], padding=True).input_ids
    settings = (
        tokenizer.padding_side,
        tokenizer.model_max_length,
        tokenizer.special_tokens_map,
        tokenizer.get_vocab(),
    )
    return ids, settings, [str(warning.message) for warning in caught], tokenizer.decode(ids)


class TestBothTokenizers:
    def test_saving_and_loading_keeps_every_answer(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        assert answers(type(tokenizer).from_pretrained(tmp_path)) == answers(tokenizer)

    @pytest.mark.parametrize("with_config", [True, False])
    def test_auto_tokenizer_finds_the_saved_class(self, tokenizer, tmp_path, with_config):
        for tokenizer_class in (HyenaNucleotideTokenizer, HyenaByteTokenizer):
            AutoTokenizer.register(HyenaConfig, tokenizer_class=tokenizer_class, exist_ok=True)
        tokenizer.save_pretrained(tmp_path)
        if with_config:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": "hyena"}))
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert type(loaded) is type(tokenizer)
        assert answers(loaded) == answers(tokenizer)

    def test_copies_and_pickles_answer_alike(self, tokenizer):
        expected = answers(tokenizer)
        assert answers(copy.deepcopy(tokenizer)) == expected
        assert answers(pickle.loads(pickle.dumps(tokenizer))) == expected

    def test_the_saved_file_serves_the_tokenizers_library_alone(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        text = "ACGTNacgtnRU- signal"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReplacedNucleotideWarning)
            assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == tokenizer(text).input_ids

    @pytest.mark.parametrize(
        ("saved", "loaded", "message"),
        [
            (HyenaByteTokenizer, HyenaNucleotideTokenizer, "does not have the ids of HyenaDNA"),
            (HyenaNucleotideTokenizer, HyenaByteTokenizer, "gives byte 0 the id None"),
        ],
    )
    def test_the_file_of_another_tokenizer_is_refused(self, tmp_path, saved, loaded, message):
        saved().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            loaded.from_pretrained(tmp_path)

    @pytest.mark.parametrize("text", [3, b"ACGT", {"A": 1}, ["A", 3], ["A", None], [b"A"], [["A"], [3]]])
    def test_input_that_is_no_text_is_refused_by_its_type(self, tokenizer, text):
        with pytest.raises(TypeError, match=r"expected a str or a list of str, got (int|bytes|dict|NoneType)"):
            tokenizer(text)

    def test_input_without_an_encoding_is_refused(self, tokenizer):
        with pytest.raises(UnicodeEncodeError, match="position 1: surrogates not allowed"):
            tokenizer("A\ud800")
        with pytest.raises(ValueError, match="0 texts"):
            tokenizer([])

    @pytest.mark.filterwarnings("ignore::hyena_hf.tokenization_nucleotide.ReplacedNucleotideWarning")
    def test_time_grows_with_the_length_not_with_its_square(self, tokenizer):
        def seconds(length: int) -> float:
            text = random_dna(0, length, "ACGTacgtN")
            start = time.process_time()
            tokenizer(text)
            return time.process_time() - start

        seconds(1000)
        assert min(seconds(200_000) for _ in range(2)) < 40 * min(seconds(20_000) for _ in range(3))  # square: 100
