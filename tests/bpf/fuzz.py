"""Millions of packets through one program, and a judge of what the programs may do with any bytes at all.

Rules of this file: `Runner` does one system call a packet and nothing else, on buffers that it uses again. `Judge`
reads a frame by itself, knows which tuples the rows speak of, and allows a change only where one of them is met.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import random
import struct
from collections.abc import Callable, Iterator, Sequence

from tests.bpf.loaded import REDIRECT, SHOT, UNSPEC
from tests.packets import ETHERNET, parse, problems_of

ROOM = 2048
REFUSED = -1
_IP = (b"\x08\x00", b"\x86\xdd")
_TEST_RUN = 10
_NUMBER = {"x86_64": 321, "aarch64": 280}
_UNPACK = struct.Struct("=III").unpack_from
_PACK = struct.Struct("=II").pack_into
_INDEX = struct.Struct("=I")


class Runner:
    """One program and its buffers: put a frame into `frame`, call `run`, look at `out`. `device` is the index of the
    one that packets pass, 0 for none; `xdp` for a program of that type, which always has one."""

    def __init__(self, program: int, device: int = 0, *, xdp: bool = False) -> None:
        self._in = (ctypes.c_ubyte * ROOM)()
        self._out = (ctypes.c_ubyte * ROOM)()
        self._context = bytearray(24 if xdp else 192)
        _INDEX.pack_into(self._context, 12 if xdp else 40, device)  # ingress_ifindex; __sk_buff.ifindex
        self._ends = xdp
        context = (ctypes.c_ubyte * len(self._context)).from_buffer(self._context)
        self._attributes = ctypes.create_string_buffer(80)
        struct.pack_into(
            "=IIIIQQIIIIQ",
            self._attributes,
            0,
            program,
            0,
            0,
            ROOM,
            ctypes.addressof(self._in),
            ctypes.addressof(self._out),
            1,
            0,
            len(self._context) if device else 0,
            0,
            ctypes.addressof(context) if device else 0,
        )
        self.frame = memoryview(self._in).cast("B")
        self.out = memoryview(self._out).cast("B")
        self._pointer = ctypes.addressof(self._attributes)
        self._number = _NUMBER[platform.machine()]
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]
        self._call.restype = ctypes.c_long

    def passed(self, frame: bytes) -> tuple[int, bytes]:
        """Pass a frame; the verdict, and what it has become."""
        self.frame[: len(frame)] = frame
        verdict, length = self.run(len(frame))
        return verdict, bytes(self.out[:length])

    def run(self, length: int) -> tuple[int, int]:
        """Pass the first `length` bytes of `frame`; returns the verdict and the length of what is in `out`, or
        (REFUSED, 0) where the kernel builds no test packet, because it is too short for the header it announces."""
        _PACK(self._attributes, 8, length, ROOM)
        if self._ends:
            _INDEX.pack_into(self._context, 4, length)  # data_end
        if self._call(self._number, _TEST_RUN, self._pointer, 80) < 0:
            number = ctypes.get_errno()
            if number == errno.EINVAL and length < ETHERNET + 40 and bytes(self.frame[12:14]) in _IP:
                return REFUSED, 0
            raise OSError(number, f"test run of {bytes(self.frame[:length]).hex()}")
        verdict, _, written = _UNPACK(self._attributes, 4)
        return verdict, written


_CHECKSUM_AT: dict[int, tuple[int, ...]] = {6: (16, 17), 17: (6, 7), 132: ()}

Tuple = tuple[bytes, bytes, int, int, int]
"""Source, destination, source port, destination port, protocol; ports are -1 in a later fragment."""


def tuples_of(frame: bytes) -> Iterator[Tuple]:
    """The tuples by which a frame could be met: its own, and for an ICMP error that of the packet it quotes, turned
    round. Lenient: looks at nothing but where the fields are."""
    if len(frame) < ETHERNET + 20:
        return
    ethertype = frame[12] << 8 | frame[13]
    if ethertype == 0x0800 and frame[14] >> 4 == 4:
        source, destination, protocol = frame[26:30], frame[30:34], frame[23]
        l4 = ETHERNET + (frame[14] & 15) * 4
        later = (frame[20] & 0x1F) << 8 | frame[21]
    elif ethertype == 0x86DD and frame[14] >> 4 == 6 and len(frame) >= ETHERNET + 40:
        source, destination, protocol = frame[22:38], frame[38:54], frame[20]
        l4, later = ETHERNET + 40, 0
        while protocol in (0, 43, 60, 44) and len(frame) >= l4 + 8 and not later:
            if protocol == 44:
                later = (frame[l4 + 2] << 8 | frame[l4 + 3]) & 0xFFF8
            length = 8 if protocol == 44 else (frame[l4 + 1] + 1) * 8
            protocol, l4 = frame[l4], l4 + length
    else:
        return
    if protocol in (6, 17, 132):
        if later:
            yield source, destination, -1, -1, protocol
        elif len(frame) >= l4 + 4:
            yield source, destination, *struct.unpack_from("!HH", frame, l4), protocol
    elif protocol in (1, 58) and not later and len(frame) >= l4 + 32:
        inner = l4 + 8
        if protocol == 1:
            source, destination, quoted, behind = (
                frame[inner + 12 : inner + 16],
                frame[inner + 16 : inner + 20],
                frame[inner + 9],
                inner + 20,
            )
        else:
            source, destination, quoted, behind = (
                frame[inner + 8 : inner + 24],
                frame[inner + 24 : inner + 40],
                frame[inner + 6],
                inner + 40,
            )
        if len(frame) >= behind + 4:
            sport, dport = struct.unpack_from("!HH", frame, behind)
            yield destination, source, dport, sport, quoted


class Judge:
    """What may become of a frame. An end is (address, port, protocol); `refusing` and `dropping` are frontends too.

    `forwarding`: frontends with backends. `serving`: the backends. `own`: addresses that masquerade takes.
    """

    def __init__(
        self,
        forwarding: set[tuple[bytes, int, int]],
        refusing: set[tuple[bytes, int, int]],
        dropping: set[tuple[bytes, int, int]],
        serving: set[tuple[bytes, int, int]],
        own: set[bytes],
    ) -> None:
        self.forwarding, self.refusing, self.dropping = forwarding, refusing, dropping
        self.serving, self.own = serving, own
        self._addresses = {address for address, _, _ in forwarding}
        self._servers = {address for address, _, _ in serving}

    def may_change(self, frame: bytes, ingress: bool) -> bool:
        """Whether a row of `frontends` or `flows` can have met this frame at this hook."""
        for source, destination, sport, dport, protocol in tuples_of(frame):
            if ingress:
                if (destination, dport, protocol) in self.forwarding:
                    return True
                # A direct request whose port a Service's flow to the same backend has: it gets another one.
                if (destination, dport, protocol) in self.serving:
                    return True
                if destination in self.own and (sport < 0 or (source, sport, protocol) in self.serving):
                    return True
                if dport < 0 and destination in self._addresses:
                    return True
            else:
                if (source, sport, protocol) in self.serving or (destination, dport, protocol) in self.serving:
                    return True
                if sport < 0 and (source in self._servers or destination in self._servers):
                    return True
        return False

    def complaint(self, frame: bytes, verdict: int, out: bytes, ingress: bool) -> str:
        """What is wrong with this outcome, "" if nothing is."""
        if verdict == UNSPEC:
            if out == frame:
                return ""
            if not self.may_change(frame, ingress):
                return "changed although no row speaks of it"
            return self._changes(frame, out)
        ends = {(destination, dport, protocol) for _, destination, _, dport, protocol in tuples_of(frame)}
        if verdict == REDIRECT:
            if not ingress or not ends & self.refusing:
                return "answered although no row refuses it"
            if out[:6] != frame[6:12] or out[6:12] != frame[:6]:
                return "the answer does not go back"
            return "" if problems_of(frame) else ", ".join(problems_of(out))
        if verdict == SHOT:
            if ingress and ends & (self.refusing | self.dropping | self.forwarding):
                return ""
            # A direct flow beside a living one gets another port, which SCTP and a cut-off packet cannot be given.
            direct = ends & self.serving
            if ingress and direct and (problems_of(frame) or any(protocol == 132 for _, _, protocol in direct)):
                return ""
            if not ingress and self.may_change(frame, ingress):
                return ""
            return "dropped although no row speaks of it"
        return f"verdict {verdict}"

    @staticmethod
    def _changes(frame: bytes, out: bytes) -> str:
        """Translation touches addresses, ports and checksums; nothing else, and no sum that was right."""
        if len(frame) != len(out):
            return "another length"
        parsed = parse(frame)
        if parsed is None:
            return ""
        v4 = parsed.family == 4
        allowed = set(range(24, 34) if v4 else range(22, 54))
        if parsed.protocol in _CHECKSUM_AT:
            allowed |= {*range(parsed.l4, parsed.l4 + 4)}
            allowed |= {parsed.l4 + offset for offset in _CHECKSUM_AT[parsed.protocol]}
        else:  # ICMP: its checksum; of the quoted packet the header's checksum, addresses and ports
            inner = parsed.l4 + 8
            allowed |= {parsed.l4 + 2, parsed.l4 + 3}
            allowed |= {*range(inner + 10, inner + 24)} if v4 else {*range(inner + 8, inner + 44)}
        wrong = [at for at, (was, now) in enumerate(zip(frame, out, strict=True)) if was != now and at not in allowed]
        if wrong:
            return f"byte {wrong[0]} changed, which is no address, port or checksum"
        if not problems_of(frame) and problems_of(out):
            return "wrong " + ", ".join(problems_of(out))
        return ""


INTERESTING = (0x00, 0x01, 0x04, 0x05, 0x06, 0x11, 0x2C, 0x3A, 0x3C, 0x40, 0x45, 0x4F, 0x60, 0x7F, 0x80, 0x84, 0xFF)


def mutated(frame: memoryview, corpus: Sequence[bytes], count: int, chance: random.Random) -> Iterator[int]:
    """`count` packets, each a mutation of one in `corpus` or random bytes, written into `frame` one after the other;
    the length of each."""
    bits = chance.getrandbits
    noise = chance.randbytes(1 << 20)
    size = len(corpus)
    for _ in range(count):
        dice = bits(64)
        kind = dice & 15
        dice >>= 4
        if kind < 13:
            base = corpus[(dice & 0xFFFF) % size]
            dice >>= 16
            length = len(base)
            frame[:length] = base
            if kind < 8:  # one to three bits of the headers
                for _ in range(1 + kind % 3):
                    frame[(dice & 0x7F) % length] ^= 1 << (dice >> 7 & 7)
                    dice >>= 10
            elif kind < 10:  # one byte
                frame[(dice & 0x7F) % length] = INTERESTING[(dice >> 7 & 0xFF) % 17]
            elif kind < 12:  # cut off
                length = 15 + (dice & 0xFFF) % (length - 14)
            # else as it is
        else:
            start = (dice & 0xFFFFF) % ((1 << 20) - 256)
            length = 15 + (dice >> 20 & 0xFF) % 200
            frame[:length] = noise[start : start + length]
            if kind == 14:
                frame[12:15] = b"\x08\x00\x45"
            elif kind == 15:
                frame[12:15] = b"\x86\xdd\x60"
        yield length


def fuzz(
    runners: Sequence[tuple[bool, Runner]],
    corpus: Sequence[bytes],
    judge: Judge,
    count: int,
    seed: int,
    fail: Callable[[str], None],
) -> dict[int, int]:
    """`count` packets of `mutated`, each through a random one of `runners` (ingress or not, program). Calls `fail` with
    a description of the first wrong outcome; returns the number of each verdict."""
    verdicts = {UNSPEC: 0, SHOT: 0, REDIRECT: 0, REFUSED: 0}
    chance = random.Random(seed)
    frame = memoryview(bytearray(ROOM))
    for number, length in enumerate(mutated(frame, corpus, count, chance)):
        ingress, runner = runners[chance.getrandbits(1)]
        runner.frame[:length] = frame[:length]
        verdict, written = runner.run(length)
        if verdict == UNSPEC and written == length and runner.out[:length] == frame[:length]:
            verdicts[UNSPEC] += 1
            continue
        if verdict == REFUSED:
            verdicts[REFUSED] += 1
            continue
        before, after = bytes(frame[:length]), bytes(runner.out[:written])
        complaint = judge.complaint(before, verdict, after, ingress)
        if complaint:
            hook = "ingress" if ingress else "egress"
            fail(f"packet {number} of seed {seed} at {hook}: {complaint}\n  in  {before.hex()}\n  out {after.hex()}")
        verdicts[verdict] += 1
    return verdicts
