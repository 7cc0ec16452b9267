"""From one path to the other: XDP goes and returns under load, the daemon dies, and nobody notices.

Rules of this file: a restart is of node1's daemon alone. Whoever has a connection keeps it, with its backend and its
port there; no packet may be lost where the mode stays the same.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator

import pytest

from tests.box.box import SLO, Box
from tests.box.expect import TRIES
from tests.box.modes import XDP_OFF, Mode
from tests.box.paths import carried, new_flows_are
from tests.box.servers import pattern
from tests.box.traffic import Stream
from tests.pace import PACE

# Daemons are restarted and commands run, some dozens a test: that takes its time where the machine has none.
pytestmark = [pytest.mark.box, pytest.mark.timeout(300)]


def restarts(box: Box, *modes: Mode) -> Iterator[Mode]:
    """Restart node1's daemon in each of these modes."""
    for mode in modes:
        box.switch("node1", mode)
        yield mode


@pytest.fixture
def back_again(xdp: Box) -> Iterator[Box]:
    """The box, with node1 in the box's own mode again afterwards."""
    yield xdp
    if xdp.modes["node1"] is not xdp.mode or not xdp.daemon_runs("node1"):
        if xdp.daemon_runs("node1"):
            xdp.switch("node1", xdp.mode)
        else:
            xdp.modes["node1"] = xdp.mode
            xdp.cluster.start_daemons(["node1"])


def test_connections_go_on_on_the_other_path(back_again: Box, family: str) -> None:
    """The daemon is started with `--xdp off` under load, and with XDP again: whoever has a connection keeps it, with
    its backend and its port there; whoever comes is served, by the path that there is."""
    box = back_again
    web = box.service("b1", "c1", kinds=["NodePort"])
    to = web.node_port("node1", family)
    place = box.place("outside")
    open_ones = [box.clients.converse(place, to, protocol) for protocol in ("TCP", "UDP") for _ in range(5)]
    try:
        before = [conversation.ask() for conversation in open_ones]
        for mode in restarts(box, XDP_OFF, box.mode, XDP_OFF, box.mode):
            assert [conversation.ask() for conversation in open_ones] == before, mode.name
            with carried(box) as seen:
                box.expect("outside", to=to).reaches("b1", "c1").sees_source("node1")
                box.check()
            assert (seen[0].xdp, seen[0].tc) == new_flows_are(mode, 4 * TRIES)
            open_ones += [box.clients.converse(place, to, protocol) for protocol in ("TCP", "UDP")]
            before += [conversation.ask() for conversation in open_ones[-2:]]
    finally:
        for conversation in open_ones:
            conversation.close()


def test_a_transfer_under_way_goes_on_on_the_other_path(back_again: Box, family: str) -> None:
    box = back_again
    web = box.service("b1", kinds=["NodePort"])
    size = 64 << 20
    found: list[str | BaseException] = []
    with box.clients.converse(
        box.place("outside"), web.node_port("node1", family), "TCP", patience=10 * PACE
    ) as conversation:

        def fetch() -> None:
            try:
                found.append(hashlib.sha256(conversation.fetch(size)).hexdigest())
            except OSError as error:
                found.append(error)

        with carried(box) as seen:
            thread = threading.Thread(target=fetch, daemon=True)
            thread.start()
            for _ in restarts(box, XDP_OFF, box.mode):
                pass
            thread.join(60 * PACE)
    assert found == [hashlib.sha256(pattern(size)).hexdigest()]
    assert seen[0].sent > 0


def test_a_restart_in_the_same_mode_loses_no_packet(back_again: Box, family: str) -> None:
    """The programs of the one daemon are replaced by those of the next in one step."""
    box = back_again
    web = box.service("b1", kinds=["NodePort"])
    with Stream(box, "outside", web.node_port("node1", family)) as stream, carried(box) as seen:
        began = stream.sent
        for _ in restarts(box, box.mode, box.mode):
            stream.wait_for(100)
        ended = stream.sent
        deadline = time.monotonic() + SLO
        while any(number < ended for number in stream.lost) and time.monotonic() < deadline:
            time.sleep(0.01)  # some are still on their way, and not counted yet
    assert stream.lost == []
    assert stream.servers == {"b1"}
    # Now and then one to each neighbour is the stack's.
    assert seen[0].tc == 0 and seen[0].sent >= 2 * (ended - began - 50)


def test_killing_the_daemon_changes_nothing(back_again: Box, family: str) -> None:
    """No packet is lost; XDP goes on as it was, also for who comes new; a restart writes nothing."""
    box = back_again
    web = box.service("b1", kinds=["NodePort"])
    to = web.node_port("node1", family)
    with Stream(box, "outside", to) as stream:
        stream.wait_for(100)
        daemon = box.cluster.nodes["node1"].daemon
        assert daemon is not None
        daemon.kill()
        stream.wait_for(100)
        with carried(box) as seen:
            box.expect("outside", to=to).reaches("b1").sees_source("node1")
            box.check()
        assert (seen[0].xdp, seen[0].tc) == (2 * TRIES, 0)
        box.cluster.start_daemon("node1", *box.mode.options).wait_ready(30 * PACE)
        stream.wait_for(100)
    assert stream.lost == []
    line = [line for line in box.cluster.log("node1").read_text().splitlines() if "sync:" in line][-1]
    assert " 0 rows written, 0 removed, 0 failed" in line
