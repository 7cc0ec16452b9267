"""What the kernel holds in plain values, for `dump`.

Rules of this file: it reads and never writes; the shapes of items are those of the other dataplanes. Connections are
told by the kernel in a file only (/proc/net/ip_vs_conn): netlink has no word for them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ebpflb.dataplane.ipvs import reading
from ebpflb.dataplane.ipvs.messages import SetHeader
from ebpflb.dataplane.ipvs.names import SET_NAMES, Mark, Set
from ebpflb.dataplane.ipvs.reading import Held
from ebpflb.dataplane.ipvs.table import Server, cidr_of, frontend_of, placed, server_of, unpacked
from ebpflb.dataplane.items import Item, backend_item, endpoint_text, service_item, service_items, source_items
from ebpflb.errors import ApplyError, UserError
from ebpflb.model import Address
from ebpflb.routes import Frontend, RouteTable, Scope, ServicePortName, address_order

__all__ = ["Inspector", "SetHeader"]

WHATS = ("services", "backends", "flows", "affinity", "maglev", "sources", "counters", "raw", "fill")

NET = Path("/proc/thread-self/net")

_MAGLEV = "mh"


class Connection(NamedTuple):
    """A line of ip_vs_conn: the client, the address that it connected to, its destination. A template (affinity) has
    client port 0; one of a virtual server of a mark has that mark as its address."""

    protocol: str
    client: tuple[Address, int]
    frontend: tuple[Address, int]
    backend: tuple[Address, int]
    state: str
    seconds_left: int

    @property
    def is_template(self) -> bool:
        return self.client[1] == 0


class Inspector:
    """`held` reads all that is ours, `headers` the ipsets; `net` is where the kernel lists connections."""

    def __init__(
        self, held: Callable[[], Held], headers: Callable[[], dict[str, SetHeader]], mark: Mark, net: Path = NET
    ) -> None:
        self._held = held
        self._headers = headers
        self._mark = mark
        self._net = net

    def tables(self, what: str) -> list[Item]:
        """The items of `dump what`. Raises UserError for a WHAT that there is not, ApplyError if it cannot be read."""
        known = {
            "services": self._services,
            "backends": self._backends,
            "flows": self._flows,
            "affinity": self._affinity,
            "maglev": self._maglev,
            "sources": self._sources,
            "counters": self._counters,
            "raw": self._raw,
        }
        if what == "fill":
            return self._fill()
        if what not in known:
            raise UserError(f"dump {what}: the ipvs dataplane has none; choose routes, {', '.join(known)}")
        return known[what]()

    def _services(self) -> list[Item]:
        return service_items(reading.routes(self._held()))

    def _backends(self) -> list[Item]:
        found = {
            (route.service, backend) for route in reading.routes(self._held()).values() for backend in route.backends
        }
        return [
            {"service": service_item(service), **backend_item(backend)}
            for service, backend in sorted(
                found, key=lambda each: (each[0], address_order(each[1].address), each[1].port, each[1].state)
            )
        ]

    def _flows(self) -> list[Item]:
        """IPVS' connections."""
        names = _names(reading.routes(self._held()))
        items: list[Item] = []
        for each in self._connections():
            if each.is_template:
                continue
            items.append(
                {
                    "protocol": each.protocol,
                    "client": endpoint_text(*each.client),
                    "frontend": endpoint_text(*each.frontend),
                    "backend": endpoint_text(*each.backend),
                    "source": None,
                    "service": names.get(f"{endpoint_text(*each.frontend)}/{each.protocol}"),
                    "state": each.state.lower(),
                    "secondsLeft": each.seconds_left,
                }
            )
        return sorted(items, key=lambda item: (str(item["frontend"]), str(item["client"]), str(item["protocol"])))

    def _affinity(self) -> list[Item]:
        """The templates of persistence: which client goes where, and for how long still."""
        held = self._held()
        table = reading.routes(held)
        names = _names(table)
        marks = _marks(held)
        items: list[Item] = []
        for each in self._connections():
            if not each.is_template:
                continue
            frontend = f"{endpoint_text(*each.frontend)}/{each.protocol}"
            if each.protocol == "IP":
                number = int(ipaddress.ip_address(each.frontend[0])) >> (96 if ":" in each.frontend[0] else 0)
                frontend = marks.get(number, f"{number:#x}")
            items.append(
                {
                    "service": names.get(frontend),
                    "frontend": frontend,
                    "client": each.client[0],
                    "backend": endpoint_text(*each.backend) if each.backend[1] else each.backend[0],
                    "secondsLeft": each.seconds_left,
                }
            )
        return sorted(items, key=lambda item: (str(item["frontend"]), str(item["client"])))

    def _maglev(self) -> list[Item]:
        """One item per virtual server of the scheduler `mh`, whoever asked for it. How large its table is, and how much
        of it each destination has, the kernel tells nobody."""
        held = self._held()
        items: list[Item] = []
        for server, (frontend, service) in sorted(_served(held).items(), key=lambda each: (each[1][::-1], each[0])):
            settings = held.servers.get(server)
            if settings is None or settings.scheduler != _MAGLEV:
                continue
            found = [
                (*placed(key), each.weight)
                for key, each in held.destinations.get(server, {}).items()
                if each.weight and not each.leaving
            ]
            found.sort(key=lambda each: (address_order(each[0]), each[1]))
            items.append(
                {
                    "service": service_item(service),
                    "protocol": frontend.protocol.name,
                    "size": None,
                    "backends": [
                        {"address": address, "port": port, "weight": weight, "share": None}
                        for address, port, weight in found
                    ],
                    "id": str(server),
                    "frontend": str(frontend),
                }
            )
        return items

    def _sources(self) -> list[Item]:
        return source_items(reading.routes(self._held()))

    def _counters(self) -> list[Item]:
        """IPVS' own, since it was loaded."""
        lines = self._read("ip_vs_stats").splitlines()
        names = ("connections", "packets_in", "packets_out", "bytes_in", "bytes_out")
        numbers = lines[2].split() if len(lines) > 2 else []
        return [{"counter": name, "value": int(value, 16)} for name, value in zip(names, numbers, strict=False)]

    def _raw(self) -> list[Item]:
        """Virtual servers with their destinations, entries of sets, addresses, chains."""
        held = self._held()
        items: list[Item] = []
        for server, settings in sorted(held.servers.items()):
            item: Item = {"virtualServer": str(server), "scheduler": settings.scheduler}
            items.append({**item, "flags": settings.flags, "timeout": settings.timeout})
            for key, has in sorted(held.destinations.get(server, {}).items()):
                items.append(
                    {"virtualServer": str(server), "destination": endpoint_text(*placed(key)), **has._asdict()}
                )
        for name, pair in sorted(SET_NAMES.items()):
            for key, value in sorted(held.entries.get(pair, {}).items()):
                items.append({"ipset": name, "entry": entry_text(pair[0].type.value, pair[1], key), "value": value})
        items += [{"device": "kube-ipvs0", "address": unpacked(each)} for each in sorted(held.addresses)]
        for version, ruleset in sorted(held.rulesets.items()):
            for table, chains in sorted(ruleset.items()):
                for chain, rules in sorted(chains.items()):
                    if chain.startswith(("KUBE-", "EBPFLB-")):
                        items += [{"family": f"IPv{version}", "table": table, "rule": rule} for rule in rules]
        return items

    def _fill(self) -> list[Item]:
        """How full each set is, and the table of connections that conntrack tracks."""
        headers = self._headers()
        items: list[Item] = [
            {"name": name, "entries": headers[name].entries, "max": headers[name].maximum}
            for name in sorted(SET_NAMES)
            if name in headers
        ]
        tracked = Path("/proc/sys/net/netfilter")
        try:
            numbers = [int((tracked / f"nf_conntrack_{each}").read_text()) for each in ("count", "max")]
        except FileNotFoundError:
            return items  # nobody tracks connections yet
        return [*items, {"name": "conntrack", "entries": numbers[0], "max": numbers[1]}]

    def _connections(self) -> Iterator[Connection]:
        for line in self._read("ip_vs_conn").splitlines()[1:]:
            found = connection_of(line)
            if found is not None:
                yield found

    def _read(self, name: str) -> str:
        try:
            return (self._net / name).read_text()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise ApplyError(name, "", error.errno or 0, f"{self._net / name}: {error.strerror}") from error


def connection_of(line: str) -> Connection | None:
    """A line of ip_vs_conn: `TCP 0A000001 C350 0A600001 0050 0A010002 1F90 ESTABLISHED 899`, addresses of IPv6 in
    brackets; None for another."""
    words = line.split()
    if len(words) < 9:
        return None
    protocol, *ends, state, left = words[:9]
    try:
        places = [(_address(ends[at]), int(ends[at + 1], 16)) for at in (0, 2, 4)]
        return Connection(protocol, places[0], places[1], places[2], state, int(left))
    except ValueError:
        return None


def _address(text: str) -> Address:
    if text.startswith("["):
        return str(ipaddress.IPv6Address(text[1:-1]))
    return str(ipaddress.IPv4Address(int(text, 16)))


def entry_text(type: str, version: int, key: bytes) -> str:
    """An entry of an ipset as the tool ipset writes it."""
    width = 16 if version == 6 else 4
    if type == "bitmap:port":
        return str(int.from_bytes(key, "big"))
    if type == "hash:ip":
        return unpacked(key)
    frontend = frontend_of(key[: width + 3])
    head = f"{frontend.address},{frontend.protocol.name.lower()}:{frontend.port}"
    rest = key[width + 3 :]
    if not rest:
        return head
    return f"{head},{cidr_of(rest) if type == 'hash:ip,port,net' else unpacked(rest)}"


def _names(table: RouteTable) -> dict[str, Item]:
    return {
        str(frontend): service_item(route.service)
        for (frontend, scope), route in table.items()
        if scope is Scope.INTERNAL
    }


def _served(held: Held) -> dict[Server, tuple[Frontend, ServicePortName]]:
    """Whose each virtual server is: of a frontend, the one of its own address or what stands in for that, and the one
    of its mark."""
    found: dict[Server, tuple[Frontend, ServicePortName]] = {}
    for version in (4, 6):
        marks = held.entries.get((Set.MARKS, version), {})
        for frontend, key, said in reading.frontends(held, version):
            own = Server(version, said.parked) if said.parked else server_of(frontend)
            found[own] = frontend, said.service
            mark = marks.get(key)
            if isinstance(mark, int):
                found[Server(version, mark)] = frontend, said.service
    return found


def _marks(held: Held) -> dict[int, str]:
    """Frontends by the mark of their virtual server."""
    found: dict[int, str] = {}
    for (each, _), entries in held.entries.items():
        if each.with_mark:
            found.update({mark: str(frontend_of(key)) for key, mark in entries.items() if isinstance(mark, int)})
    return found
