"""Token ids are those of OpenAI's published vocabulary, which can be worked out by hand up to id 511:

the bytes 33..126, 161..172, 174..255 in this order, then the rest; the same 256 again as ends of words. So "a" (97) is
97 - 33 = 64 inside a word and 256 + 64 = 320 at its end. From 512 on, each id is a line of the merge table.
"""

import gzip
import hashlib

import pytest
import torch

import clip
from clip.tokenizer import EOT, MERGES, SOS, alphabet, decode, encode, merge, vocabulary


def test_letters_have_their_place_in_the_byte_order():
    assert [encode(letter) for letter in "abz"] == [[320], [321], [345]]            # 256 + byte - 33
    assert encode("!") == [256]                                                     # the first of all shown bytes
    assert encode("7") == [256 + ord("7") - 33]


def test_a_sign_without_merges_is_its_utf8_bytes():
    # U+10FFFF is F4 8F BF BF. 94 bytes from 33 on, 12 from 161 on, then those from 174 on:
    # F4 -> 94 + 12 + 0xF4 - 174 = 176, BF -> 94 + 12 + 0xBF - 174 = 123. The others follow at 188: 33 from 0 on,
    # then those from 127 on: 8F -> 188 + 33 + 0x8F - 127 = 237.
    assert encode("\U0010ffff") == [176, 237, 123, 256 + 123]


def test_first_merges_have_the_first_ids_after_the_bytes():
    lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    assert len(lines) == 49408 - 512 - 2
    assert lines[:3] == ["i n", "t h", "a n"]
    ids, merges = vocabulary()
    assert (ids["in"], ids["th"], ids["an"]) == (512, 513, 514)
    assert merges[ids["i"], ids["n"]] == 512
    assert len(ids) == 49408 and (ids["<|startoftext|>"], ids["<|endoftext|>"]) == (SOS, EOT) == (49406, 49407)


def test_the_merge_table_is_openais():
    content = MERGES.read_bytes()
    assert hashlib.sha256(content).hexdigest() == "5f6c91a3727038ae46523c18c13e3275d6713eea9fd2ccfeb5139351419ee21f"
    assert hashlib.sha256(gzip.decompress(content)).hexdigest() == \
        "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"       # as clip/README.md says


@pytest.mark.parametrize("word, pair, result", [
    ([1, 2, 3, 1, 2], (1, 2), [9, 3, 9]),
    ([1, 1, 1], (1, 1), [9, 1]),                               # from the left
    ([1, 2, 2], (1, 2), [9, 2]),
    ([2, 1], (1, 2), [2, 1]),
])
def test_merging_by_hand(word, pair, result):
    assert merge(word, pair, 9) == result


def test_the_alphabet_gives_each_byte_a_sign_of_its_own_that_is_no_space():
    assert sorted(alphabet()) == list(range(256))
    assert len(set(alphabet().values())) == 256
    assert not any(sign.isspace() for sign in alphabet().values())


@pytest.mark.parametrize("text, ids", [          # as OpenAI's tokenizer gives them, and as published with CLIP
    ("a photo of a", [320, 1125, 539, 320]),
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("a diagram", [320, 22697]),
    ("hello world!", [3306, 1002, 256]),
])
def test_published_ids(text, ids):
    assert clip.tokenize(text)[0, : len(ids) + 2].tolist() == [SOS, *ids, EOT]


def test_tokens_are_zero_padded_int64_rows():
    tokens = clip.tokenize(["a", "a b"], context_length=5)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[SOS, 320, EOT, 0, 0], [SOS, 320, 321, EOT, 0]]
    assert clip.tokenize("").tolist() == [[SOS, EOT] + [0] * 75]
    assert clip.tokenize([]).shape == (0, 77)


def test_the_longest_text_that_fits_and_the_first_that_does_not():
    assert clip.tokenize("a " * 75)[0].tolist() == [SOS] + [320] * 75 + [EOT]
    with pytest.raises(ValueError, match="'a a a.* 78 tokens .* 77 fit"):
        clip.tokenize("a " * 76)


@pytest.mark.parametrize("length, shown", [(200, "x" * 200 + "'"), (201, "x" * 200 + "...'")])
def test_a_text_that_is_too_long_is_shown_up_to_200_signs(length, shown):
    with pytest.raises(ValueError) as error:
        clip.tokenize("x" * length, context_length=3)
    assert str(error.value).startswith(f"'{shown} has ")


def test_truncation_keeps_the_end_token():
    assert clip.tokenize("a b c d", context_length=4, truncate=True).tolist() == [[SOS, 320, 321, EOT]]
    assert clip.tokenize("word " * 20000, truncate=True)[0, -1] == EOT


@pytest.mark.parametrize("one, other", [
    ("A Photo", "a photo"),                                    # case
    ("a  photo\t\n of ", " a photo of"),                       # spaces
    ("a\u3000b\xa0c", "a b c"),                                # spaces of other widths
    ("cats &amp; dogs", "cats & dogs"),                        # HTML
    ("cats &amp;amp; dogs", "cats & dogs"),                    # HTML in HTML
    ("a < b &amp;amp; c", "a < b & c"),                        # which ftfy leaves alone where there is a <
    ("caf&eacute;", "café"),
    ("cafÃ©", "café"),                                         # UTF-8 once read as Latin-1
    ("cafe\u0301", "café"),                                    # a combining accent
    ("“quoted”", '"quoted"'),                                  # ftfy makes quotes straight
    ("ＡＢ１", "ab1"),                                         # and full-width signs narrow
])
def test_texts_that_mean_the_same_have_the_same_ids(one, other):
    assert encode(one) == encode(other)


def test_html_is_resolved_twice_and_not_more():
    # of &amp;amp;amp; beside a <, one &amp; is left: the signs &, amp and ;
    assert encode("< &amp;amp;amp;") == encode("<") + encode("&") + encode("amp") + encode(";")


@pytest.mark.parametrize("ending", ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"])
def test_the_ending_of_a_contraction_is_a_word(ending):
    assert encode("we" + ending) == encode("we") + encode(ending) and len(encode(ending)) == 1
    assert encode(ending + "x") == encode(ending) + encode("x")


def test_the_long_s_is_an_s_in_a_contraction():
    # U+017F: OpenAI's pattern ignores case, and this is a form of s. So the apostrophe, 39 - 33 = 6, ends no word
    assert encode("it'\u017f")[:2] == [*encode("it"), 6]


def test_words_are_cut_at_endings_digits_and_signs():
    assert encode("it's") == encode("it") + encode("'s")
    assert encode("1984") == [i for digit in "1984" for i in encode(digit)]
    assert encode("tree_frog") == encode("tree") + encode("_") + encode("frog")
    assert len(encode("_")) == 1


def test_special_tokens_in_a_text_are_read_as_such():
    assert encode("<|startoftext|>a<|EndOfText|>") == [SOS, 320, EOT]


@pytest.mark.parametrize("text", [
    "a photo of a forest, seen from above", "the quick brown fox jumps over the lazy dog", "annual crop land",
    "naïve café", "日本語", "👩‍👩‍👧 🎉", "zażółć gęślą jaźń",
])
def test_decoding_gives_the_text_back(text):
    assert decode(encode(text)).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("ids, text", [
    ([], ""), ([320], "a"), ([64, 320], "aa"), ([320, 320], "a a"),            # 64 is "a" within a word, 320 at its end
    ([176], "\ufffd"), ([SOS], "<|startoftext|>"),                             # F4 alone is no UTF-8
])
def test_decoding_by_hand(ids, text):
    assert decode(ids) == text


def test_encoding_again_what_was_decoded_changes_nothing():
    ascii_text = "".join(map(chr, range(33, 127)))
    assert encode(decode(encode(ascii_text))) == encode(ascii_text)


def test_broken_and_strange_text_is_encoded_too():
    for text in ("\x00", "\u200b", "\ud800", "\ufeff", "e\u0301\u0302\u0303\u0304", "&#xD800;", "a" * 2000):
        assert all(0 <= i < SOS for i in encode(text))
