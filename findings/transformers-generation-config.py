"""transformers 5.19: a model whose generation config it loads with a warning it refuses to save.

What is done: a model's generation_config.json has a `temperature` and no `do_sample`, as those of
many published models; the model is loaded, as one would to train it, and saved. Seen: loading
says that the flag "may be ignored"; save_pretrained raises ValueError and leaves a folder with
config.json alone. Whoever trained for days meets it at the end, with the weights unsaved.
Exits with 0 while that is so, with 1 when it changes.
Run: python findings/transformers-generation-config.py
"""

import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
with tempfile.TemporaryDirectory() as name:
    folder = Path(name) / "model"
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**SMALL, **heads)).save_pretrained(folder)
    config = folder / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temperature": 0.6}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    saved = Path(name) / "saved"
    try:
        model.save_pretrained(saved)
    except ValueError as error:
        left = sorted(path.name for path in saved.iterdir())
        sys.stdout.write(f"refused, leaving {left}: {str(error).splitlines()[0]}\n")
        sys.exit(left != ["config.json"])
sys.exit(1)
