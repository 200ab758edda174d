"""The tokenizer of the pocket model: CLIP's, with a token for each word of the world's captions."""

import json

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dreambooth.pocket import render

MAX_TOKENS = 48
CAPTION_TERMS = ("photo", "of", "a", "an", "with", "and", "on", "in", "the", "at")


def _merge(pieces, pair):
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _build_merges(lexicon):
    """BPE merges that turn each word of `lexicon` into one token, letter by letter."""
    merges = []
    for word in lexicon:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges[-1])
    return merges


def build_tokenizer(folder):
    """Write a byte-level CLIP tokenizer to `folder` and return it.

    Its tokens are 256 bytes, 256 bytes that end a word, and one for each word of the captions and
    for each of its prefixes. Any other word falls into shorter pieces, down to letters.
    """
    nouns = [place.split()[-1] for place in render.PLACES]
    parts = dict.fromkeys(part for parts in render.PARTS.values() for part in parts)
    lexicon = [*CAPTION_TERMS, *nouns, *render.CLASSES, *render.COLOURS, *parts]
    merges = _build_merges(lexicon)
    characters = list(bytes_to_unicode().values())  # one for each byte
    tokens = characters + [c + "</w>" for c in characters]
    tokens += dict.fromkeys(a + b for a, b in merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab_file = folder / "vocab.json"
    merges_file = folder / "merges.txt"
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file.write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8"
    )
    merges_file.write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
    )
    tokenizer = CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=MAX_TOKENS)
    for word in lexicon:
        assert len(tokenizer(word).input_ids) == 3, f"{word!r} is not one token"
    return tokenizer
