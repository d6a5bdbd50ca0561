"""One token per character: the id layout and the Hugging Face tokenizer that both models share.

Ids: 3 special tokens, then the symbols in each of the three spellings, then the prompt-only
symbols, then reserved tokens up to VOCABULARY_SIZE.
"""

from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.playground.task import PROMPT_ONLY_SYMBOLS, SPELLINGS, SYMBOLS

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
EOS_ID = SPECIAL_TOKENS.index(EOS)
VOCABULARY_SIZE = 64
_CHARACTERS = "".join(SPELLINGS) + PROMPT_ONLY_SYMBOLS
_IDS = {character: len(SPECIAL_TOKENS) + i for i, character in enumerate(_CHARACTERS)}

SPELLING_IDS = np.array([[_IDS[c] for c in spelling] for spelling in SPELLINGS])
"""[3, num symbols]: the token id of each spelling of each symbol."""

ID_SYMBOLS = np.full(VOCABULARY_SIZE, -1)
"""[VOCABULARY_SIZE]: the symbol that each id spells, -1 for ids that spell none."""
ID_SYMBOLS[SPELLING_IDS] = np.arange(len(SYMBOLS))


def ascii_ids(text: str) -> list[int]:
    """Token ids of a text in the vocabulary's characters, without special tokens."""
    return [_IDS[character] for character in text]


def save_tokenizer(path: Path) -> None:
    """Write the tokenizer files to a directory; no special token is added when encoding."""
    num_reserved = VOCABULARY_SIZE - len(SPECIAL_TOKENS) - len(_CHARACTERS)
    reserved = [f"<|reserved_{i}|>" for i in range(num_reserved)]
    tokens = [*SPECIAL_TOKENS, *_CHARACTERS, *reserved]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=reserved[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=reserved[-1],
        additional_special_tokens=reserved[:-1],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.save_pretrained(path)
