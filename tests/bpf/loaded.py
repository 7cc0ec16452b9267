"""Our programs in the kernel with maps of their own, attached nowhere: rows go in by hand, packets by test run.

Rules of this file: rows are written from the layouts that the C code has, not by the control plane's planner, so that a
packet test says what the programs do with rows and nothing else (rows that no planner would write included). Maps and
programs are anonymous: they are gone with the process, whatever happens.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import struct
from collections.abc import Iterable, Mapping

from ebpflb.dataplane.bpf import map_calls, program_calls
from ebpflb.dataplane.bpf.artifact import Artifact, Layout, source_directory
from ebpflb.dataplane.bpf.constants import (
    BACKEND_FREE,
    DEVICE_BACK,
    DEVICE_PEER,
    DEVICE_POD,
    DEVICE_REDIRECT,
    DEVICE_XDP,
    PROG_TYPE_XDP,
)
from ebpflb.dataplane.bpf.facts import has_xdp_frags
from ebpflb.model import Protocol
from ebpflb.routes import BackendState, Masquerade, Scope, Verdict, packed, packed_network, unpacked
from tests.packets import MAC_NODE, address

UNSPEC = 0xFFFFFFFF
"""TC_ACT_UNSPEC: on to the next filter, then to the stack."""
SHOT = 2
REDIRECT = 7

HOOK_INGRESS, HOOK_EGRESS = 0, 1
DNAT, SNAT, UNSNAT, UNDNAT = range(4)
CLOSING, UNALLOCATED, MASQUERADED, DIRECT, WHOLE, SHORT = 1, 2, 4, 8, 16, 32

LAYOUT = 2
SECOND = 10_000
"""Jiffies, as far as rows of tests say: ten seconds at the least, so that a machine that stands still for some is no
time that passes."""

XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX, XDP_REDIRECT = range(5)
TABLE_SIZES = (0, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
TABLE_PART = 1024


def counter_names() -> tuple[str, ...]:
    """`enum counter` of bpf/maps.h, in its order."""
    text = (source_directory() / "maps.h").read_text()
    body = re.sub(r"/\*.*?\*/", "", text[text.index("enum counter {") :].partition("}")[0], flags=re.DOTALL)
    names = re.findall(r"\b[A-Z][A-Z0-9_]+\b", body)
    return tuple(names[: names.index("COUNTERS")])


COUNTERS = counter_names()

SIZES = {
    "frontends": 65536, "slots": 4096, "backends": 4096, "flows": 8192, "sockets": 1024, "names": 16, "owned": 1024,
    "tables": 1024, "members": 4096, "affinity": 1024, "devices": 64, "vlans": 64,
}  # fmt: skip
"""Smaller maps than a node's: quick to make and to empty."""

EMPTIED = (
    "frontends", "flows", "fragments", "sockets", "sources", "ranges", "devices", "names", "traffic", "owned",
    "tables", "members", "affinity", "vlans",
)  # fmt: skip

TEST_CHECKSUM_COMPLETE = 1 << 2
"""BPF_F_TEST_SKB_CHECKSUM_COMPLETE: hardware has summed the packet; the kernel fails the run (EBADMSG) if the sum is
no longer the packet's afterwards."""

PROTOCOLS = {"tcp": Protocol.TCP, "udp": Protocol.UDP, "sctp": Protocol.SCTP}


@dataclasses.dataclass(frozen=True, slots=True)
class To:
    """One scope's row: a verdict and where to. `backends` are (role, port), `draining` more that only keep what they
    have; `ranges` are CIDRs, () for everybody; `affinity` is in seconds. `table` is the code of a table's size, whose
    places go round the active backends. `broken` is "free" for slots that name a free backend, "absent" for one beyond
    the table, "members" for affinity without its rows, "table" for a table that is not there, "" otherwise."""

    backends: tuple[tuple[str, int], ...] = ()
    verdict: Verdict = Verdict.FORWARD
    masquerade: Masquerade = Masquerade.NEVER
    ranges: tuple[str, ...] = ()
    broken: str = ""
    draining: tuple[tuple[str, int], ...] = ()
    affinity: int = 0
    table: int = 0


REJECT = To(verdict=Verdict.REJECT)
DROP = To(verdict=Verdict.DROP)


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """The device that a test packet passes: its masquerade addresses by role ("" for none), and whether a pod is
    behind it. For XDP also whether our program runs there, whether others may send by it, its MTU and MAC; for the way
    around the stack whether its other end is in another namespace (`peer`); `back` where what goes back by it has to be
    redirected."""

    masquerade: str = ""
    pod: bool = False
    xdp: bool = False
    redirect: bool = False
    mtu: int = 1500
    mac: str = MAC_NODE
    peer: bool = False
    back: bool = False

    @property
    def flags(self) -> int:
        bits = DEVICE_POD * self.pod | DEVICE_XDP * self.xdp | DEVICE_REDIRECT * self.redirect
        return bits | DEVICE_PEER * self.peer | DEVICE_BACK * self.back


POD_DEVICE = Device(pod=True)
UPLINK = Device(masquerade="uplink")


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """What became of a packet."""

    verdict: int
    frame: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class FlowRow:
    """One row of `flows`, addresses in text."""

    source: str
    sport: int
    destination: str
    dport: int
    protocol: int
    hook: int
    address: str
    port: int
    other_port: int
    action: int
    flags: int
    backend: int
    seen: int
    beyond: str = "::"
    beyond_port: int = 0
    client_port: int = 0


def known_place(packed_address: bytes) -> tuple[int, int]:
    """The cell and the bit by which programs know that there may be rows of an address; as bpf/lookup.h says it."""
    low, high = struct.unpack("<2Q", packed_address)
    sum = (low * 0xD6E8FEB86659FD93 + high * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    spread = ((sum ^ sum >> 32) * 0x94D049BB133111EB) & (1 << 64) - 1
    return spread >> 50, spread >> 44 & 63


class Packer:
    """Rows as bytes by a layout; every field that is not named is zero, and an unknown name is an error."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def pack(self, **values: int | bytes) -> bytes:
        """`u16` fields called port are given in host order and stored in network order."""
        row = bytearray(self.layout.size)
        for name, value in values.items():
            field = self.layout.field(name)
            if isinstance(value, bytes):
                data = value.ljust(field.bytes, b"\0")
            elif "port" in name and field.size == 2 and not name.startswith("snat"):
                data = struct.pack("!H", value)
            else:
                data = value.to_bytes(field.size, "little")
            row[field.offset : field.offset + field.bytes] = data
        return bytes(row)

    def get(self, row: bytes, name: str) -> int:
        """The inverse for one plain field."""
        field = self.layout.field(name)
        data = row[field.offset : field.offset + field.size]
        return int.from_bytes(data, "big" if "port" in name and field.size == 2 else "little")

    def raw(self, row: bytes, name: str) -> bytes:
        """A field's bytes."""
        field = self.layout.field(name)
        return row[field.offset : field.offset + field.bytes]


class Loaded:
    """The programs and their maps. `put_*` write rows, `ingress` and `egress` pass one packet. `shared` are maps of
    another one's that these programs use, too."""

    def __init__(
        self,
        artifact: Artifact,
        sizes: Mapping[str, int] = SIZES,
        programs: Iterable[str] = (),
        shared: Mapping[str, int] | None = None,
    ) -> None:
        self.artifact = artifact
        self.maps: dict[str, int] = {}
        self.programs: dict[str, int] = {}
        self._device: tuple[Device, int] | None = None
        self._known: dict[int, int] = {}
        self._counted: dict[str, int] = {}
        self.flags = 0
        try:
            for name, spec in artifact.maps.items():
                if shared and name in shared:
                    self.maps[name] = os.dup(shared[name])
                    continue
                self.maps[name] = map_calls.map_create(
                    spec.type, spec.key.size, spec.value.size, sizes.get(name, spec.max_entries), spec.flags, name
                )
            for name in programs or artifact.programs:
                program = artifact.programs[name]
                frags = program_calls.F_XDP_HAS_FRAGS if program.type == PROG_TYPE_XDP and has_xdp_frags() else 0
                self.programs[name] = program_calls.prog_load(
                    program.type, program.patched(self.maps), program.kernel_name, program.attach_type, flags=frags
                )
        except BaseException:
            self.close()
            raise
        self._packers = {name: Packer(layout) for name, layout in artifact.layouts.items() if layout.fields}
        self._route = Packer(_nested(artifact, "frontend", "scope"))
        self._reset_ids()

    def close(self) -> None:
        """Let go of everything."""
        for fd in (*self.programs.values(), *self.maps.values()):
            os.close(fd)
        self.programs, self.maps = {}, {}

    def packer(self, map_name: str, key: bool = False) -> Packer:
        """The packer of a map's values (or keys)."""
        spec = self.artifact.maps[map_name]
        return Packer(spec.key if key else spec.value)

    # ---- rows

    def _reset_ids(self) -> None:
        self._next_backend = 1
        self._next_slot = 1
        self._next_service = 1
        self._next_ranges = 1
        self._backends: dict[tuple[str, int, int, int], int] = {}

    def forget(self, *names: str) -> None:
        """Remove all rows of these maps."""
        for name in names:
            fd = self.maps[name]
            keys, _, count = map_calls.lookup_all(fd)
            map_calls.delete_batch(fd, keys, count)

    def clear(self) -> None:
        """As new: no rows, no flows, counters at zero as `counters` sees them; settings of `put_settings`."""
        self.forget(*EMPTIED)
        self.forget_known()
        free = self.packer("backends").pack(state=BACKEND_FREE)
        for index in range(self._next_backend):
            map_calls.update(self.maps["backends"], struct.pack("=I", index), free)
        self._reset_ids()
        self._device = None
        self.put_settings()
        self._counted = self._read_counters()

    def put_settings(self, **values: int | bytes) -> None:
        """The node's row; by default: another netns, a long idle time, ports 32768 to 60999."""
        row: dict[str, int | bytes] = {
            "netns": 1,
            "flow_idle": 1 << 40,
            "refresh": 1,
            "layout": LAYOUT,
            "second": SECOND,
            "snat_low": 32768,
            "snat_high": 60999,
        }
        row |= values
        map_calls.update(self.maps["settings"], struct.pack("=I", 0), self.packer("settings").pack(**row))

    def drop_settings(self) -> None:
        """An array's row cannot be deleted; what a fresh map holds is zeros."""
        map_calls.update(self.maps["settings"], struct.pack("=I", 0), bytes(self.artifact.maps["settings"].value.size))

    def put_device(self, device: Device, family: int, ifindex: int = 1) -> None:
        """The device that the next packets pass; test runs happen on the loopback device, which has index 1. Its
        address is of one family, or of both where that is 0."""
        if ifindex == 1 and self._device == (device, family):
            return
        row: dict[str, int | bytes] = {
            "flags": device.flags,
            "mtu": device.mtu,
            "mac": bytes.fromhex(device.mac.replace(":", "")),
        }
        for each in (4, 6):
            if device.masquerade and family in (0, each):
                row[f"ipv{each}"] = packed(address(device.masquerade, each))
        map_calls.update(self.maps["devices"], struct.pack("=I", ifindex), self.packer("devices").pack(**row))
        if ifindex == 1:
            self._device = (device, family)

    def drop_device(self, ifindex: int) -> None:
        """A device without a row."""
        map_calls.delete(self.maps["devices"], struct.pack("=I", ifindex))

    def put_source(self, cidr: str, flags: int) -> None:
        """What an address is: bits SOURCE_…."""
        network, bits = packed_network(cidr)
        key = self.packer("sources", key=True).pack(prefix=bits, address=network)
        map_calls.update(self.maps["sources"], key, struct.pack("=I", flags))

    def put_known(self, packed_address: bytes) -> None:
        """There may be rows of this address."""
        cell, bit = known_place(packed_address)
        self._known[cell] = self._known.get(cell, 0) | 1 << bit
        map_calls.update(self.maps["known"], struct.pack("=I", cell), struct.pack("=Q", self._known[cell]))

    def forget_known(self) -> None:
        """As if there were rows of no address."""
        for cell in self._known:
            map_calls.update(self.maps["known"], struct.pack("=I", cell), bytes(8))
        self._known = {}

    def put_owned(self, role: str, family: int) -> None:
        """A cluster IP, whose ports without a frontend are refused."""
        key = packed(address(role, family))
        self.put_known(key)
        row = self.packer("owned").pack(namespace=b"default", name=role.encode())
        map_calls.update(self.maps["owned"], key, row)

    def put_vlan(self, under: int, id: int, device: int) -> None:
        """Frames with this tag that enter by `under` belong to `device`."""
        key = self.packer("vlans", key=True).pack(device=under, id=id)
        map_calls.update(self.maps["vlans"], key, struct.pack("=I", device))

    def put_backend(self, text: str, port: int, service: int, state: int = BackendState.ACTIVE) -> int:
        """A backend row; returns its id: the same one for the same backend of a Service."""
        known = self._backends.get((text, port, service, state))
        if known is not None:
            return known
        number = self._next_backend
        self._next_backend += 1
        self.set_backend(number, text, port, service, state)
        self._backends[text, port, service, state] = number
        return number

    def set_backend(self, number: int, text: str, port: int, service: int, state: int = BackendState.ACTIVE) -> None:
        """A backend row with a given id."""
        row = self.packer("backends").pack(address=packed(text), port=port, weight=1, state=state, service=service)
        map_calls.update(self.maps["backends"], struct.pack("=I", number), row)

    def put_frontend(
        self,
        role: str,
        port: int,
        protocol: str,
        family: int,
        internal: To,
        external: To | None = None,
        service: int | None = None,
    ) -> int:
        """A frontend with a route for each scope (one for both by default); returns the Service's id, which is a new
        one unless it is given."""
        if service is None:
            service = self._next_service
            self._next_service += 1
        rows = [b"", b""]
        first = self._route_row(internal, service, family)
        rows[Scope.INTERNAL] = first
        rows[Scope.EXTERNAL] = first if external is None else self._route_row(external, service, family)
        self.put_known(packed(address(role, family)))
        key = self.packer("frontends", key=True).pack(
            address=packed(address(role, family)), port=port, protocol=int(PROTOCOLS[protocol])
        )
        map_calls.update(self.maps["frontends"], key, b"".join(rows))
        return service

    def _route_row(self, to: To, service: int, family: int) -> bytes:
        ids = [self.put_backend(address(role, family), port, service) for role, port in to.backends]
        if to.broken == "free":
            ids = [self.put_backend("0.0.0.0", 0, 0, BACKEND_FREE)]
        elif to.broken == "absent":
            ids = [0x7FFFFFFF]
        late = [
            self.put_backend(address(role, family), port, service, BackendState.DRAINING) for role, port in to.draining
        ]
        start = self._next_slot
        self._next_slot += len(ids) + len(late)
        for number, backend in enumerate(ids + late):
            map_calls.update(self.maps["slots"], struct.pack("=I", start + number), struct.pack("=I", backend))
        if to.affinity and to.broken != "members":
            for number, backend in enumerate(ids):
                key = struct.pack("=II", start, backend)
                map_calls.update(self.maps["members"], key, struct.pack("=I", number))
        if to.table and to.broken != "table":
            self.put_table(start, to.table, len(ids))
        allowed = 0
        cidrs = [cidr for cidr in to.ranges if (":" in cidr) == (family == 6)]
        if to.ranges:
            allowed = self._next_ranges
            self._next_ranges += 1
        for cidr in cidrs:
            network, bits = packed_network(cidr)
            key = self.packer("ranges", key=True).pack(prefix=32 + bits, ranges=allowed, address=network)
            map_calls.update(self.maps["ranges"], key, struct.pack("=I", 1))
        return self._route.pack(
            verdict=int(to.verdict),
            masquerade=int(to.masquerade),
            service=service,
            slots=start,
            count=len(ids),
            draining=len(late),
            affinity=to.affinity,
            ranges=allowed,
            table=to.table,
        )

    def put_table(self, start: int, code: int, count: int) -> None:
        """The table of the slots at `start`: place i is position i mod `count`."""
        places = TABLE_SIZES[code]
        content = [place % count for place in range(places)]
        content += [0] * (-places % TABLE_PART)
        for part in range(len(content) // TABLE_PART):
            piece = content[part * TABLE_PART : (part + 1) * TABLE_PART]
            key = struct.pack("=II", start, part)
            map_calls.update(self.maps["tables"], key, struct.pack(f"={TABLE_PART}H", *piece))

    # ---- reading back

    def _read_counters(self) -> dict[str, int]:
        _, values, count = map_calls.lookup_all(self.maps["counters"])
        assert count == len(COUNTERS), "bpf/maps.h has counted other counters"
        cpus = len(values) // count // 8
        numbers = struct.unpack(f"={count * cpus}Q", values)
        return {name: sum(numbers[index * cpus : (index + 1) * cpus]) for index, name in enumerate(COUNTERS)}

    def counters(self) -> dict[str, int]:
        """What has been counted since `clear`, without zeros."""
        now = self._read_counters()
        changed = {name: now[name] - self._counted.get(name, 0) for name in now}
        return {name: value for name, value in changed.items() if value}

    def flows(self) -> list[FlowRow]:
        """All rows of `flows`, sorted by hook and action."""
        keys, values, count = map_calls.lookup_all(self.maps["flows"])
        key, value = self.packer("flows", key=True), self.packer("flows")
        rows = []
        for number in range(count):
            k = keys[number * key.layout.size : (number + 1) * key.layout.size]
            v = values[number * value.layout.size : (number + 1) * value.layout.size]
            rows.append(
                FlowRow(
                    unpacked(key.raw(k, "source")),
                    key.get(k, "source_port"),
                    unpacked(key.raw(k, "destination")),
                    key.get(k, "destination_port"),
                    key.get(k, "protocol"),
                    key.get(k, "hook"),
                    unpacked(value.raw(v, "address")),
                    value.get(v, "port"),
                    value.get(v, "other_port"),
                    value.get(v, "action"),
                    value.get(v, "flags"),
                    value.get(v, "backend"),
                    value.get(v, "seen"),
                    unpacked(value.raw(v, "beyond")),
                    value.get(v, "beyond_port"),
                    value.get(v, "client_port"),
                )
            )
        return sorted(rows, key=lambda row: (row.action, row.source, row.sport))

    def clients(self) -> dict[tuple[bytes, int, int], tuple[int, int, int]]:
        """The rows of `affinity`: {(client, service, kind): (backend, position, seen)}."""
        keys, values, count = map_calls.lookup_all(self.maps["affinity"])
        found = {}
        for at in range(count):
            client, service, kind = struct.unpack_from("=16sIB", keys, 24 * at)
            found[client, service, kind] = struct.unpack_from("=IIQ", values, 16 * at)
        return found

    def age_clients(self, seconds: float) -> None:
        """Every client's last new connection was so much longer ago."""
        keys, values, count = map_calls.lookup_all(self.maps["affinity"])
        for at in range(count):
            backend, position, seen = struct.unpack_from("=IIQ", values, 16 * at)
            row = struct.pack("=IIQ", backend, position, seen - int(seconds * SECOND))
            map_calls.update(self.maps["affinity"], keys[24 * at : 24 * (at + 1)], row)

    # ---- packets

    def run(self, program: str, frame: bytes, context: bytes = b"") -> Ran:
        """One packet through one program, by the flags of `self.flags`."""
        try:
            result = program_calls.prog_test_run(self.programs[program], frame, context, flags=self.flags)
        except OSError as error:
            if error.errno == errno.EBADMSG:
                raise AssertionError("hardware's sum of the packet is no longer the packet's") from None
            raise
        return Ran(result.verdict, result.data)

    def ingress(self, frame: bytes, family: int = 4, device: Device = UPLINK) -> Ran:
        """A packet that enters by `device`."""
        self.put_device(device, family)
        return self.run("tc_ingress", frame)

    def egress(self, frame: bytes, family: int = 4, device: Device = UPLINK) -> Ran:
        """A packet that leaves by `device`."""
        self.put_device(device, family)
        return self.run("tc_egress", frame)


def _nested(artifact: Artifact, type_name: str, field_name: str) -> Layout:
    """The layout of a struct inside a row."""
    field = artifact.layouts[type_name].field(field_name)
    return Layout(field.type, field.size, field.fields)


def gso_context(segments: int, size: int) -> bytes:
    """A `struct __sk_buff` that marks the packet as one of `segments` segments of `size` bytes."""
    context = bytearray(192)
    struct.pack_into("=I", context, 164, segments)
    struct.pack_into("=I", context, 176, size)
    return bytes(context)
