"""XDP as an operator meets it: the modes of --xdp, what status and check say, a daemon that dies, and what is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
        for word, mode, said in (("native", NATIVE, "native"), ("generic", GENERIC, "generic: --xdp generic")):
            daemon = restarted(place, daemon, word)
            assert {name: number for name, (number, _) in running(place).items()} == {"eth0": mode}
            assert devices(place) == [("eth0", word)]
            assert place.ebpflb("status").status == 0
            checked = place.ebpflb("check", "-o", "json").items
            assert [each["detail"] for each in checked if each["requirement"] == "XDP on eth0"] == [said]
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
    with place_in(tmp_path) as place, foreign_program(place) as pin:
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


@contextmanager
def foreign_program(place: Place) -> Iterator[Path]:
    """Where somebody else's XDP program is pinned."""
    pin = place.bpffs.parent / f"{place.name}-foreign"
    subprocess.run([sys.executable, "-c", FOREIGN, str(pin)], env=place.environment, check=True)
    try:
        yield pin
    finally:
        pin.unlink(missing_ok=True)


def checked(place: Place, *options: str) -> list[tuple[object, object]]:
    """(requirement, what is found, detail) of `check` about XDP."""
    rows = place.ebpflb("check", "-o", "json", *options).items
    return [(each["found"], each["detail"]) for each in rows if str(each["requirement"]).startswith("XDP on ")]


def test_check_says_beside_a_daemon_what_status_says(tmp_path: Path) -> None:
    """Of a device that the daemon was refused, for a reason that nobody knows beforehand (here a program on a device
    that lies on it), and of one that sends nothing."""
    with place_in(tmp_path) as place, foreign_program(place) as pin:
        place.ip("link", "add", "eth1", "type", "veth", "peer", "name", "peer1")
        place.ip("address", "add", "198.51.100.1/24", "dev", "eth1")
        place.ip("link", "add", "mv1", "link", "eth1", "type", "macvlan")
        place.ip("link", "set", "dev", "mv1", "xdpgeneric", "pinned", str(pin))
        foretold = checked(place, "--xdp", "native")
        assert foretold[:2] == [(True, "native: would be tried")] * 2
        daemon = place.start("--xdp", "native")
        (status,) = place.ebpflb("status", "-o", "json").items
        told = status["devices"]
        assert isinstance(told, list)
        assert [(each["name"], each["xdp"], each["problem"]) for each in told] == [
            ("eth0", "native", True),
            ("eth1", "off", True),
            ("mv1", "off", False),
        ]
        assert "gro on" in told[0]["reason"] and told[1]["reason"], told
        said = [(False, f"{each['xdp']}: {each['reason']}") for each in told]
        assert checked(place) == checked(place, "--xdp", "native") == said
        # What was not tried is still to be tried; what runs goes on until it is.
        assert checked(place, "--xdp", "generic") == [said[0], (True, "generic: would be tried"), said[2]]
        daemon.end(signal.SIGTERM)
        assert checked(place, "--xdp", "native") == [said[0], *foretold[1:]]


def test_a_device_that_is_named_and_never_runs_xdp_is_a_problem_in_status(tmp_path: Path) -> None:
    """Under `auto` nobody has asked for it."""
    with place_in(tmp_path) as place:
        place.ip(
            "link", "add", "vx0", "type", "vxlan", "id", "7", "dstport", "4789", "remote", "192.168.0.9", "dev", "eth0"
        )
        daemon = place.start("--devices", "vx0")
        reason = "an overlay: its frames come inside another device's"
        problem = f"XDP is not at work: {reason}; tc carries its packets"
        said = place.ebpflb("status").out
        assert reason in said and problem not in said
        daemon.end(signal.SIGKILL)
        place.start("--devices", "vx0", "--xdp", "native")
        assert problem in place.ebpflb("status").out
        assert checked(place) == checked(place, "--devices", "vx0") == [(False, f"off: {reason}")]


FOREIGN = """
import sys
from ebpflb.dataplane.bpf import assembly, program_calls, syscall
fd = program_calls.prog_load(6, assembly.move(0, 2) + assembly.EXIT, "foreign")
syscall.obj_pin(fd, sys.argv[1])
"""
