"""A node's programs with rows for many Services, attached nowhere: maps and programs are gone with the process.

Rules of this file: rows are written by hand, from the layouts that the control plane checks, so that what is measured
is what programs do with rows. Services, backends and clients are numbered; a number is an address.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ebpflb.dataplane.bpf import map_calls, program_calls
from ebpflb.dataplane.bpf.artifact import Artifact
from ebpflb.dataplane.bpf.constants import BACKEND_FREE, DEVICE_REDIRECT, DEVICE_XDP, PROG_TYPE_XDP
from ebpflb.dataplane.bpf.known import known_bit
from ebpflb.dataplane.bpf.layouts import (
    BACKEND,
    FRONTEND_KEY,
    KNOWN_CELLS,
    LAYOUT,
    ROUTE,
    SOURCE_KEY,
    U32,
    U64,
)
from ebpflb.routes import BackendState, Kind, Masquerade, Verdict, packed, packed_network

TCP, UDP = 6, 17
SERVICE_PORT, BACKEND_PORT, CLIENT_PORT = 80, 8080, 40000
NODE = {4: "192.0.2.1", 6: "2001:db8::1"}
GATEWAY = {4: "192.0.2.254", 6: "2001:db8::fe"}
_SERVICES = {4: "172.16.0.0", 6: "fd00:16::"}
_BACKENDS = {4: "10.64.0.0", 6: "fd00:64::"}
_CLIENTS = {4: "11.0.0.0", 6: "2001:db8:11::"}
_STRANGERS = {4: "100.64.0.0", 6: "fd00:100::"}
LAST = 60999
"""The end of the range of ports for masquerade, as everywhere."""
FIRST = 32768


def service(number: int, family: int) -> bytes:
    """A frontend's address, as rows have it."""
    return _numbered(_SERVICES, number, family)


def backend(number: int, family: int) -> bytes:
    """A backend's."""
    return _numbered(_BACKENDS, number, family)


def client(number: int, family: int) -> bytes:
    """A client's."""
    return _numbered(_CLIENTS, number, family)


def stranger(number: int, family: int) -> bytes:
    """That of a machine which is neither."""
    return _numbered(_STRANGERS, number, family)


def _numbered(first: Mapping[int, str], number: int, family: int) -> bytes:
    start = packed(first[family])
    return start[:12] + (int.from_bytes(start[12:], "big") + number).to_bytes(4, "big")


class Device(NamedTuple):
    """The device that packets come by and leave by, and the other end of its wire."""

    number: int
    mac: bytes
    peer: int
    mtu: int = 1500


class World:
    """Programs and maps, filled for `services` Services of one protocol and family with `backends` each."""

    def __init__(
        self,
        artifact: Artifact,
        programs: Iterable[str],
        services: int,
        *,
        family: int = 4,
        protocol: int = TCP,
        backends: int = 1,
        masquerade: Masquerade = Masquerade.ALWAYS,
        device: Device,
    ) -> None:
        self.maps: dict[str, int] = {}
        self.programs: dict[str, int] = {}
        self.types: dict[str, tuple[int, int]] = {}
        larger = {"frontends": services, "names": services, "backends": services * backends + 1}
        try:
            for name, spec in artifact.maps.items():
                self.maps[name] = map_calls.map_create(
                    spec.type,
                    spec.key.size,
                    spec.value.size,
                    max(spec.max_entries, larger.get(name, 0)),
                    spec.flags,
                    name,
                )
            for name in programs:
                program = artifact.programs[name]
                attach_type = program.attach_type if program.type == PROG_TYPE_XDP else 0
                self.types[name] = program.type, attach_type
                self.programs[name] = program_calls.prog_load(
                    program.type, program.patched(self.maps), program.kernel_name, program.attach_type
                )
            self._counters = artifact.counters
            self._settings = artifact.maps["settings"].value
            self.ports(FIRST, LAST)
            self._device(device, family)
            self._services(services, family, protocol, backends, masquerade)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of everything."""
        for descriptor in (*self.programs.values(), *self.maps.values()):
            os.close(descriptor)
        self.programs, self.maps = {}, {}

    def ports(self, low: int, high: int) -> None:
        """The range from which masquerade takes its ports: one of a single port decides which it is."""
        second = 250
        values = {"netns": 1, "flow_idle": 1 << 40, "refresh": second, "layout": LAYOUT, "second": second}
        values["by_stack"] = 1 << 30  # looked at, and never due
        row = bytearray(self._settings.size)
        for name, value in (values | {"snat_low": low, "snat_high": high}).items():
            field = self._settings.field(name)
            row[field.offset : field.offset + field.size] = value.to_bytes(field.size, "little")
        map_calls.update(self.maps["settings"], U32.pack(0), bytes(row))

    def _device(self, device: Device, family: int) -> None:
        own = packed(NODE[family])
        ipv4, ipv6 = (own, bytes(16)) if family == 4 else (bytes(16), own)
        row = struct.pack("=16s16sII6sxx", ipv4, ipv6, DEVICE_XDP | DEVICE_REDIRECT, device.mtu, device.mac)
        map_calls.update(self.maps["devices"], U32.pack(device.number), row)

    def _services(self, services: int, family: int, protocol: int, backends: int, masquerade: Masquerade) -> None:
        frontend_keys, frontends, rows = bytearray(), bytearray(), bytearray()
        known = [0] * KNOWN_CELLS
        port = struct.unpack("=H", struct.pack("!H", SERVICE_PORT))[0]
        behind = struct.unpack("=H", struct.pack("!H", BACKEND_PORT))[0]
        for number in range(services):
            address, first = service(number, family), 1 + number * backends
            frontend_keys += FRONTEND_KEY.pack(address, port, protocol)
            frontends += 2 * ROUTE.pack(
                Verdict.FORWARD, masquerade, 0, 0, number + 1, first, backends, 0, 0, 0, Kind.CLUSTER_IP, 0
            )
            for other in range(backends):
                place = backend(number * backends + other, family)
                rows += BACKEND.pack(place, behind, 1, BackendState.ACTIVE, number + 1)
            bit = known_bit(address)
            known[bit // 64] |= 1 << bit % 64
        total = services * backends
        numbers = struct.pack(f"={total}I", *range(1, total + 1))
        map_calls.update(self.maps["backends"], U32.pack(0), BACKEND.pack(bytes(16), 0, 0, BACKEND_FREE, 0))
        map_calls.update_batch(self.maps["backends"], numbers, bytes(rows), total)
        map_calls.update_batch(self.maps["slots"], numbers, numbers, total)
        cells = struct.pack(f"={KNOWN_CELLS}I", *range(KNOWN_CELLS))
        map_calls.update_batch(self.maps["known"], cells, b"".join(map(U64.pack, known)), KNOWN_CELLS)
        map_calls.update_batch(self.maps["frontends"], bytes(frontend_keys), bytes(frontends), services)
        for cidr in ("10.64.0.0/24", "192.0.2.1/32", "2001:db8::1/128"):  # as a node has: its pods and itself
            network, bits = packed_network(cidr)
            map_calls.update(self.maps["sources"], SOURCE_KEY.pack(bits, network), U32.pack(2))

    def counted(self) -> dict[str, int]:
        """The counters so far."""
        _, values, count = map_calls.lookup_all(self.maps["counters"])
        cpus = len(values) // count // 8
        numbers = struct.unpack(f"={count * cpus}Q", values)
        return {name: sum(numbers[at * cpus : (at + 1) * cpus]) for at, name in enumerate(self._counters)}
