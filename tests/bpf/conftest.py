"""Fixtures of the tests that load programs: `node` is a node's programs with the rows of a small world.

Rules of this file: programs are compiled and verified once a session; every test starts from empty maps. Nothing is
attached or pinned here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from ebpflb.dataplane.bpf import program_calls
from ebpflb.dataplane.bpf.artifact import Artifact, load_artifact
from ebpflb.dataplane.bpf.facts import has_set_retval, has_xdp_frags
from ebpflb.demo import namespaces
from tests.bpf.loaded import TEST_CHECKSUM_COMPLETE, Loaded
from tests.bpf.sock_lab import Lab as SockLab
from tests.bpf.sock_lab import sockets_laboratory
from tests.bpf.xdp_lab import Lab, laboratory


@pytest.fixture(scope="session")
def artifact() -> Artifact:
    """Our programs, compiled (from the cache if nothing has changed)."""
    return load_artifact(set_retval=has_set_retval(), xdp_frags=has_xdp_frags())


@pytest.fixture(scope="session")
def loaded_once(artifact: Artifact) -> Iterator[Loaded]:
    """The tc programs, verified once."""
    loaded = Loaded(artifact, programs=("tc_ingress", "tc_egress"))
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def hardware_sums(loaded_once: Loaded) -> bool:
    """Whether this kernel's test run can pretend that the device has summed the packet (Linux 6.16)."""
    try:
        program_calls.prog_test_run(loaded_once.programs["tc_egress"], bytes(64), flags=TEST_CHECKSUM_COMPLETE)
    except OSError as error:
        assert error.errno == errno.EINVAL
        return False
    return True


@pytest.fixture(scope="session")
def nobodys_namespace() -> Iterator[str]:
    """A network namespace without a socket: in the machine's own one somebody may have any port that is given out."""
    name = f"ebpflb-tc-{os.getpid()}"
    namespaces.create(name)
    yield name
    namespaces.delete(name)


@pytest.fixture(params=("no-sum", "hardware-sum"))
def node(
    request: pytest.FixtureRequest, loaded_once: Loaded, hardware_sums: bool, nobodys_namespace: str
) -> Iterator[Loaded]:
    """The tc programs with empty maps. Every test runs twice: with packets that nobody has summed, and with packets
    whose sum hardware has taken (CHECKSUM_COMPLETE), where the kernel checks that it is still true afterwards."""
    if request.param == "hardware-sum" and not hardware_sums:
        pytest.skip("this kernel's test run keeps no hardware sum")
    loaded_once.clear()
    loaded_once.flags = TEST_CHECKSUM_COMPLETE if request.param == "hardware-sum" else 0
    with namespaces.inside(nobodys_namespace):
        yield loaded_once


@pytest.fixture(scope="session")
def lab_once(artifact: Artifact) -> Iterator[Lab]:
    """The packet programs with XDP, and their devices."""
    with laboratory(artifact) as made:
        yield made


@pytest.fixture(params=(4, 6), ids=("v4", "v6"))
def lab(request: pytest.FixtureRequest, lab_once: Lab) -> Iterator[Lab]:
    """The packet programs with XDP, as new; every test runs in both families, and in the devices' namespace."""
    with namespaces.inside(lab_once.namespace):
        lab_once.clear(request.param)
        yield lab_once


@pytest.fixture(scope="session")
def sock_lab_once(artifact: Artifact) -> Iterator[SockLab]:
    """The socket programs, attached to a cgroup of their own."""
    with sockets_laboratory(artifact) as made:
        yield made


@pytest.fixture
def sock_lab(sock_lab_once: SockLab) -> Iterator[SockLab]:
    """The socket programs with empty maps, and settings that name the node's namespace."""
    sock_lab_once.loaded.clear()
    sock_lab_once.put_settings()
    yield sock_lab_once
    sock_lab_once.close_sockets()
