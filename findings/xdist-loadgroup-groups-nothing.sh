#!/usr/bin/env bash
# pytest-xdist 3.8.0 with pytest 9.2: `--dist loadgroup` keeps no group together, and says nothing.
#
# What is done: eight tests of one file bear the mark xdist_group("engine"), and run in two workers with
# --dist loadgroup. The documentation promises one worker for a group; a suite that starts an engine a group
# (of vLLM, say, which takes a core and gigabytes) then starts it in every worker.
# Seen: both workers run tests of the group; pytest ends with 0 and without a warning. With pytest 8.4.2
# instead, the same tests all run in one worker.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >test_group.py <<'PY'
import os
import time

import pytest


@pytest.mark.xdist_group("engine")
@pytest.mark.parametrize("number", range(8))
def test_of_the_group(number):
    time.sleep(0.3)
    with open("workers.txt", "a") as workers:
        workers.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
PY
workers_of() { # pytest's version -> how many workers ran tests of the one group
    python3 -m venv "env-$1"
    "env-$1/bin/pip" install -q --disable-pip-version-check "pytest==$1" pytest-xdist==3.8.0 2>/dev/null
    rm -f workers.txt
    "env-$1/bin/python" -m pytest -q -W error -n 2 --dist loadgroup test_group.py >&2
    sort -u workers.txt | wc -l
}
new=$(workers_of 9.2.0)
old=$(workers_of 8.4.2)
echo "workers that ran the group: pytest 9.2.0 $new, pytest 8.4.2 $old"
[ "$new" = 2 ] && [ "$old" = 1 ]
