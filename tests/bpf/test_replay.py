"""The benchmark's packet that is as good as new: what it leaves in the kernel."""

from __future__ import annotations

import os

import pytest

from bench.replay import Packet, Replay
from ebpflb.dataplane.bpf import map_calls, program_calls, syscall
from ebpflb.dataplane.bpf.assembly import EXIT, assemble, move
from ebpflb.dataplane.bpf.constants import PROG_TYPE_XDP
from ebpflb.errors import EbpflbError

pytestmark = [pytest.mark.root, pytest.mark.bpf_load]

XDP_PASS = 2
PROGRAM_ARRAY = 3


@pytest.mark.parametrize("fails", [False, True])
def test_an_array_of_programs_is_empty_before_its_last_descriptor_goes(fails: bool) -> None:
    """Else the kernel empties it in the background, and may lose it for good while somebody lists maps."""
    syscall.raise_memlock_limit()
    program = program_calls.prog_load(PROG_TYPE_XDP, assemble(move(0, XDP_PASS), EXIT), "test_empty")
    # A packet that is shorter than what is written into it.
    replay = Replay(program, PROG_TYPE_XDP, Packet(bytes(64), ((0, 8),) if not fails else ((56, 8),)))
    descriptors = [map_calls.map_by_id(each) for each in program_calls.prog_info(replay.program).map_ids]
    (array,) = (fd for fd in descriptors if map_calls.map_info(fd).type == PROGRAM_ARRAY)
    assert map_calls.lookup(array, bytes(4), 4) is not None
    if fails:
        replay.packet = replay.packet._replace(frame=bytes(32))
        with pytest.raises(EbpflbError, match="shorter"):
            replay.run(1)
    else:
        assert replay.run(1)[0].verdict == XDP_PASS
    replay.close()
    assert map_calls.lookup(array, bytes(4), 4) is None
    for fd in (*descriptors, program):
        os.close(fd)
