"""CLIP's byte-pair encoding, id for id that of OpenAI.

text -> clean -> words -> UTF-8 bytes -> the best-ranked pair merged again and again -> token ids

The order of the vocabulary: 256 bytes, the same bytes at the end of a word, one token for each merge, [SOS],
[EOT]. So only the table of merges is stored; README.md says where it comes from.
"""

if __name__ == "__main__":
    raise SystemExit("clip/tokenizer.py is no command: python train.py reads it")

import gzip
import html
from functools import cache, lru_cache
from pathlib import Path

import ftfy
import regex
import torch

MERGES = Path(__file__).with_name("bpe_merges.txt.gz")
SOS = 49406
EOT = 49407
SPECIAL = ("<|startoftext|>", "<|endoftext|>")           # OpenAI reads these two in a text as [SOS] and [EOT]
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>"    # one of them, or
                     r"|'s|'t|'re|'ve|'m|'ll|'d"             # the ending of an English contraction, or
                     r"|\p{L}+|\p{N}"                        # letters in a row, or one digit, or
                     # other signs in a row, the underscore among them
                     r"|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@cache
def alphabet():
    """The character that stands for each byte in the merge table, in the order of the first 256 ids."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # why not themselves: spaces and control signs would break the lines of the table
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@cache
def vocabulary():
    """All tokens in the order of their ids, {token: id}, and the merges, {(left id, right id): merged id}."""
    # why all lines at once: 49,000 lists of two words cost 0.2 s
    words = gzip.decompress(MERGES.read_bytes()).decode().split()
    pairs = list(zip(words[::2], words[1::2]))
    letters = list(alphabet().values())

    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [left + right for left, right in pairs]
    tokens += SPECIAL
    ids = {token: i for i, token in enumerate(tokens)}
    return ids, {(ids[left], ids[right]): ids[left + right] for left, right in pairs}


def clean(text):
    """Broken Unicode repaired, HTML entities resolved (twice, as OpenAI does), single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


@lru_cache(maxsize=2**16)
def encode_word(word):
    """One word -> its token ids. Of the pairs in it, the one that is first in the table is merged first."""
    ids, merges = vocabulary()
    if word in SPECIAL:
        return (ids[word],)

    *start, last = [alphabet()[byte] for byte in word.encode()]
    tokens = [ids[letter] for letter in start] + [ids[last + "</w>"]]
    while pairs := [pair for pair in zip(tokens, tokens[1:]) if pair in merges]:
        first = min(pairs, key=merges.get)
        tokens = merge(tokens, first, merges[first])
    return tuple(tokens)


def merge(tokens, pair, merged):
    """Replaces each occurrence of the pair, from the left: ([1, 2, 3, 1, 2], (1, 2), 9) -> [9, 3, 9]."""
    result = []
    for i in tokens:
        if result and (result[-1], i) == pair:
            result[-1] = merged
        else:
            result.append(i)
    return result


def encode(text):
    """A text of any length -> its token ids, without [SOS] and [EOT]."""
    return [i for word in WORD.findall(clean(text)) for i in encode_word(word)]


def decode(ids):
    """Token ids -> text with a space after each word; bytes that are no UTF-8 become U+FFFD."""
    tokens = list(vocabulary()[0])
    byte_of = {character: byte for byte, character in alphabet().items()}
    words = "".join(tokens[i] for i in ids).split("</w>")
    return " ".join(bytes(byte_of[a] for a in word).decode(errors="replace") for word in words).strip()


def tokenize(texts, context_length=77, truncate=False):
    """A text, or a list of texts -> token ids (n, context_length) int64: [SOS], the text, [EOT], then zeros.

    Raises ValueError for a text of more tokens than fit; with `truncate` it is cut, and its last token is
    [EOT].
    """
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        ids = [SOS, *encode(text)]
        if len(ids) >= context_length and not truncate:
            shown = text if len(text) <= 200 else text[:200] + "..."
            raise ValueError(f"{shown!r} has {len(ids) + 1} tokens with [SOS] and [EOT], {context_length} "
                             "fit: shorten it, or pass truncate=True")
        ids = ids[: context_length - 1] + [EOT]
        row[: len(ids)] = torch.tensor(ids)
    return tokens
