#!/usr/bin/env bash
# requests 2.34.2: a URL whose user has no password, http://user@host, sends no Authorization header.
#
# What is done: two requests are prepared, for http://token@host/ and for http://token:@host/.
# Seen: the first has no Authorization header, the second has "Basic dG9rZW46". RFC 3986 allows a user alone; curl, httpx
# and aiohttp send both alike. `requests.utils.get_auth_from_url` unquotes the password, which is None, and takes the
# TypeError for "nobody".
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check requests==2.34.2
cat >user.py <<'PY'
import sys

import requests


def header(url: str) -> str | None:
    prepared = requests.Request("GET", url).prepare()
    return prepared.headers.get("authorization")


found = [header(f"http://{user}@localhost/") for user in ("token", "token:")]
sys.stdout.write(f"without a colon: {found[0]}, with one: {found[1]}\n")
sys.exit(0 if found == [None, "Basic dG9rZW46"] else 1)
PY
env/bin/python user.py
