"""safetensors 0.8.0: a file that it writes can be read by its owner alone, whatever the umask says.

What is done: one tensor is saved with the umask 022, under which every other file of a checkpoint
becomes rw-r--r--. Seen: rw------- (the file is written under another name by `tempfile` rules and
renamed), so a model that root trained cannot be served by another user, and nothing says why
until the server starts.
Exits with 0 while that is so, with 1 when it changes.
Run: python findings/safetensors-private-files.py
"""

import os
import stat
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

os.umask(0o022)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    mode = stat.S_IMODE(path.stat().st_mode)
sys.stdout.write(f"model.safetensors has mode {mode:o}\n")
sys.exit(mode != 0o600)
