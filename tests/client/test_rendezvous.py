"""The laws of rendezvous hashing. Run: pytest tests/client/test_rendezvous.py"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from teacher_client.rendezvous import ranked

SERVERS = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique=True)
KEYS = [f"session-{number}" for number in range(4000)]


@given(key=st.text(max_size=20), servers=SERVERS, data=st.data())
def test_order_of_the_servers_is_of_no_matter(
    key: str, servers: list[str], data: st.DataObject
) -> None:
    order = ranked(key, servers)
    assert sorted(order) == sorted(servers)
    assert ranked(key, data.draw(st.permutations(servers))) == order


@given(key=st.text(max_size=20), servers=SERVERS, data=st.data())
def test_a_lost_server_changes_nothing_among_the_others(
    key: str, servers: list[str], data: st.DataObject
) -> None:
    lost = data.draw(st.sampled_from(servers))
    left = [server for server in servers if server != lost]
    assert ranked(key, left) == [server for server in ranked(key, servers) if server != lost]


def test_keys_are_balanced_and_those_of_a_lost_server_as_well() -> None:
    servers = [f"10.0.0.{number}:50051" for number in range(5)]
    first = Counter(ranked(key, servers)[0] for key in KEYS)
    # 800 each; the deviation of a fair draw is 25, and this is six of them.
    assert all(650 < first[server] < 950 for server in servers), first
    moved = Counter(
        ranked(key, servers)[1] for key in KEYS if ranked(key, servers)[0] == servers[0]
    )
    share = sum(moved.values()) / 4
    assert all(abs(moved[server] - share) < 6 * share**0.5 for server in servers[1:]), moved


def test_a_new_server_takes_its_share_and_no_key_moves_elsewhere() -> None:
    servers = [f"host-{number}:50051" for number in range(4)]
    moved = 0
    for key in KEYS:
        before, after = ranked(key, servers)[0], ranked(key, [*servers, "new:50051"])[0]
        assert after in (before, "new:50051")
        moved += after != before
    assert 650 < moved < 950


def test_all_clients_agree_in_every_process_and_version() -> None:
    servers = ["a:1", "b:2", "c:3"]
    expected = [ranked(key, servers) for key in ("", "x", "é")]
    # Written down, because clients of two versions may share a teacher.
    assert expected == [["b:2", "a:1", "c:3"], ["c:3", "b:2", "a:1"], ["a:1", "c:3", "b:2"]]
    code = (
        "from teacher_client.rendezvous import ranked\n"
        f"print([ranked(key, {servers!r}) for key in ('', 'x', 'é')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)
