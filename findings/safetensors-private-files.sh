#!/usr/bin/env bash
# safetensors 0.8.0: a file that it writes can be read by its owner alone, whatever the umask says.
#
# What is done: one array is saved with the umask 022, under which every other file of a checkpoint becomes
# rw-r--r--, first under a new name, then over a file that is rw-r--r--.
# Seen: rw------- both times; the second file is another one than was there (it is written under another name and
# renamed). So a model that root trained cannot be served by another user, and nothing says why until the server
# starts.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5
cat >mode.py <<'PY'
import os
import stat
import sys
from pathlib import Path

import numpy
from safetensors.numpy import save_file

os.umask(0o022)
new, old = Path("new.safetensors"), Path("old.safetensors")
old.write_bytes(b"")
before = old.stat()
for path in (new, old):
    save_file({"weight": numpy.zeros(1)}, path)
modes = [stat.S_IMODE(found.st_mode) for found in (before, new.stat(), old.stat())]
renamed = old.stat().st_ino != before.st_ino
sys.stdout.write("a plain file has mode {:o}, a new one {:o}, one saved over it {:o}".format(*modes))
sys.stdout.write(f" (another file: {renamed})\n")
sys.exit(0 if modes == [0o644, 0o600, 0o600] and renamed else 1)
PY
env/bin/python mode.py
