"""XDP as an operator meets it: the modes of --xdp, what status and check say, a daemon that dies, and what is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.place import Daemon, Place, alive, place_in, until

pytestmark = [pytest.mark.root, pytest.mark.box]


def running(place: Place) -> dict[str, tuple[int, int]]:
    """(mode as the kernel numbers it, program id) by device."""
    links = json.loads(place.ip("-json", "-details", "link"))
    return {link["ifname"]: (link["xdp"]["mode"], link["xdp"]["prog"]["id"]) for link in links if "xdp" in link}


def devices(place: Place) -> list[tuple[str, str]]:
    """(device, mode) of `status`."""
    (status,) = place.ebpflb("status", "-o", "json").items
    found = status["devices"]
    assert isinstance(found, list)
    return [(each["name"], each["xdp"]) for each in found]


def restarted(place: Place, daemon: Daemon, mode: str) -> Daemon:
    daemon.end(signal.SIGKILL)
    return place.start("--xdp", mode)


NATIVE, GENERIC = 1, 2


def test_the_modes_of_xdp_in_a_daemons_lives(tmp_path: Path) -> None:
    """Each daemon is killed. The next one's program takes the place of the last one's, and nothing is left."""
    with place_in(tmp_path) as place:
        place.command("ethtool", "-K", "peer0", "gro", "on")
        untouched = place.traces()
        daemon = place.start()
        assert (running(place), devices(place)) == ({}, [("eth0", "off")])
        assert "auto takes no veth" in place.ebpflb("status").out
        assert "ethtool" not in daemon.log
        for word, mode in (("native", NATIVE), ("generic", GENERIC)):
            daemon = restarted(place, daemon, word)
            assert {name: number for name, (number, _) in running(place).items()} == {"eth0": mode}
            assert devices(place) == [("eth0", word)]
            assert place.ebpflb("status").status == 0
            checked = place.ebpflb("check", "-o", "json").items
            assert [each["detail"] for each in checked if each["requirement"] == "XDP on eth0"] == [word]
            assert daemon.log.count("ethtool -K DEVICE tx off") == 1
        kept = running(place)
        daemon.end(signal.SIGKILL)
        assert running(place) == kept
        daemon = place.start("--xdp", "generic")
        assert running(place) == kept
        (second,) = place.ebpflb("run", "--xdp", "native").err.splitlines()
        assert "another ebpflb daemon runs in this network namespace" in second
        assert running(place) == kept
        daemon = restarted(place, daemon, "off")
        assert (running(place), devices(place)) == ({}, [("eth0", "off")])
        daemon = restarted(place, daemon, "native")
        daemon.end(signal.SIGTERM)
        ours = place.objects()
        assert "would remove xdp program on eth0" in place.ebpflb("cleanup", "--dry-run").out
        assert list(running(place)) == ["eth0"]
        assert "removed xdp program on eth0" in place.ebpflb("cleanup").out
        assert running(place) == {}
        assert place.traces() == untouched
    until("programs, maps and links are gone", lambda: not alive() & ours)


def test_a_program_that_somebody_else_runs_is_kept_and_told(tmp_path: Path) -> None:
    with place_in(tmp_path) as place:
        pin = place.bpffs.parent / f"{place.name}-foreign"
        subprocess.run([sys.executable, "-c", FOREIGN, str(pin)], env=place.environment, check=True)
        try:
            place.ip("link", "set", "dev", "eth0", "xdpgeneric", "pinned", str(pin))
            kept = running(place)
            daemon = place.start("--xdp", "native")
            said = place.ebpflb("status")
            assert said.status == 0
            assert "somebody else's XDP program runs there (foreign, id" in said.out
            assert (running(place), devices(place)) == (kept, [("eth0", "off")])
            assert daemon.log.count("somebody else's XDP program") == 1
            assert ("eth0", "ingress") in place.hooks()
            daemon.end(signal.SIGTERM)
            assert "removed" in place.ebpflb("cleanup").out
            assert running(place) == kept
        finally:
            pin.unlink(missing_ok=True)


FOREIGN = """
import sys
from ebpflb.dataplane.bpf import assembly, program_calls, syscall
fd = program_calls.prog_load(6, assembly.move(0, 2) + assembly.EXIT, "foreign")
syscall.obj_pin(fd, sys.argv[1])
"""
