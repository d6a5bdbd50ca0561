#!/usr/bin/env bash
# math-verify 0.9.0 with sympy 1.14.0 calls answers equal that are not.
#
# What is done: pairs of answers, each in $...$, are parsed and verified, with the time limits off (with them on,
# parse raises ValueError off the main thread).
# Seen: every pair below is equal. 50 % equals 50 (and 1/2 as well); a pair or open interval equals the set; units
# are dropped; decimals are rounded to six places whatever their size; letters outside of \text are factors; a date is
# a difference, a time a quotient, the base of a number is dropped, numbers beside one another are added.
# Expected: that none is.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check math-verify==0.9.0 sympy==1.14.0
cat >equal.py <<'PY'
import sys

from math_verify import LatexExtractionConfig, parse, verify

PAIRS = [
    (r"50\%", "50"),
    (r"\{1,2\}", "(1,2)"),
    (r"5\text{ cm}", r"5\text{ m}"),
    ("0.0000001", "0.0000002"),
    ("east", "seat"),
    ("2025-01-02", "2022"),
    ("12:30", r"\frac{2}{5}"),
    ("101_2", "101"),
    ("2 3", "5"),
    ("1,1,2", "1,2"),
]


def read(text):
    return parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None)


verdicts = [verify(read(a), read(b), timeout_seconds=None) for a, b in PAIRS]
for (a, b), verdict in zip(PAIRS, verdicts):
    sys.stdout.write(f"{a} = {b}: {verdict}\n")
sys.exit(0 if all(verdicts) else 1)
PY
env/bin/python equal.py
