"""A kernel for the IPVS dataplane that lives in memory: virtual servers, ipsets, kube-ipvs0, iptables.

Rules of this file: it keeps what the real one keeps and refuses what that refuses, so that what is tested on it is true
of what it stands for (tests/vm/test_ipvs.py asks both the same). Failures are asked for, not random.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence

from ebpflb.dataplane.ipvs import messages
from ebpflb.dataplane.ipvs.chains import TABLES
from ebpflb.dataplane.ipvs.messages import Operation, SetHeader
from ebpflb.dataplane.ipvs.names import SET_NAMES, Set, SetType
from ebpflb.dataplane.ipvs.options import IpvsOptions
from ebpflb.dataplane.ipvs.reading import Destination
from ebpflb.dataplane.ipvs.table import EntryValue, Server, Settings
from ebpflb.model import Address
from ebpflb.netfilter.ruleset import Ruleset

_BUILT_IN = {
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class FakeKernel:
    """`log` has a line for each kind of write, in their order; `refuse` maps commands of IPVS, or names of ipsets, to
    the errno that they get; `busy` says how many connections a destination has."""

    def __init__(self, node_addresses: tuple[Address, ...] = ("127.0.0.1", "192.168.0.2")) -> None:
        self.node_addresses = node_addresses
        self.held: dict[Server, Settings] = {}
        self.places: dict[Server, dict[bytes, Destination]] = {}
        self.sets: dict[str, SetHeader] = {}
        self.contents: dict[str, dict[bytes, EntryValue]] = {}
        self.bound: set[bytes] = set()
        self.device = False
        self.options: IpvsOptions | None = None
        self.log: list[str] = []
        self.refuse: dict[int | str, int] = {}
        self.busy: dict[bytes, int] = {}

    # ---- IPVS

    def is_loaded(self) -> bool:
        return True

    def servers(self) -> dict[Server, Settings]:
        return dict(self.held)

    def destinations(self, servers: Iterable[Server]) -> dict[Server, dict[bytes, Destination]]:
        return {
            server: {
                key: each._replace(active=self.busy.get(key, 0)) for key, each in self.places.get(server, {}).items()
            }
            for server in servers
        }

    def apply(self, operations: Sequence[Operation]) -> dict[int, OSError]:
        refused = {}
        for index, operation in enumerate(operations):
            error = self._apply(operation)
            if error:
                refused[index] = refusal(error)
        return refused

    def _apply(self, each: Operation) -> int:
        if each.command in self.refuse:
            return self.refuse[each.command]
        server = each.server
        self.log.append(f"ipvs {each.command} {server}")
        if each.command in (messages.NEW_SERVICE, messages.SET_SERVICE):
            assert each.settings is not None
            self.held[server] = each.settings
            self.places.setdefault(server, {})
        elif each.command == messages.DEL_SERVICE:
            self.held.pop(server, None)
            self.places.pop(server, None)
        elif server not in self.held:
            return errno.ESRCH
        elif each.command == messages.DEL_DEST:
            self.places[server].pop(each.place, None)
        else:
            self.places[server][each.place] = Destination(0 if each.leaving else each.weight, each.leaving)
        return 0

    def set_timeouts(self, options: IpvsOptions) -> None:
        self.options = options

    # ---- ipsets

    def headers(self) -> dict[str, SetHeader]:
        return {name: each._replace(entries=len(self.contents[name])) for name, each in self.sets.items()}

    def create(self, each: Set, version: int) -> None:
        name = each.named(version)
        family = 0 if each.type is SetType.PORT else version
        self.sets[name] = SetHeader(name, each.type.value, family, each.with_comment, each.with_mark, 0, 1 << 20)
        self.contents[name] = {}

    def destroy(self, name: str) -> None:
        self.sets.pop(name, None)
        self.contents.pop(name, None)

    def entries(self, each: Set, version: int) -> dict[bytes, EntryValue]:
        return dict(self.contents.get(each.named(version), {}))

    def change(
        self, each: Set, version: int, entries: Mapping[bytes, EntryValue], *, add: bool
    ) -> dict[bytes, OSError]:
        name = each.named(version)
        if name in self.refuse:
            return {key: refusal(self.refuse[name]) for key in entries}
        if name not in self.contents:
            return {key: refusal(errno.ENOENT) for key in entries}
        self.log.append(f"ipset {'add' if add else 'del'} {name}")
        for key, value in entries.items():
            if add:
                self.contents[name][key] = value
            else:
                self.contents[name].pop(key, None)
        return {}

    # ---- The device

    def has_device(self) -> bool:
        return self.device

    def create_device(self) -> None:
        self.device = True

    def remove_device(self) -> None:
        self.device = False
        self.bound.clear()

    def addresses(self) -> tuple[set[bytes], tuple[Address, ...]]:
        return set(self.bound), self.node_addresses

    def bind(self, addresses: Sequence[bytes], *, add: bool) -> dict[bytes, OSError]:
        if not self.device:
            raise refusal(errno.ENODEV)
        self.log.append(f"address {'add' if add else 'del'}")
        if add:
            self.bound.update(addresses)
        else:
            self.bound.difference_update(addresses)
        return {}


class FakeTables:
    """iptables of one family: enough of restore for what `netfilter.ruleset.restore_input` writes."""

    def __init__(self) -> None:
        self.chains: Ruleset = {table: {name: () for name in _BUILT_IN[table]} for table in TABLES}
        self.writes = 0

    def read(self) -> Ruleset:
        return {table: dict(chains) for table, chains in self.chains.items()}

    def write(self, lines: Iterable[str]) -> None:
        self.writes += 1
        table: dict[str, tuple[str, ...]] = {}
        for line in lines:
            words = line.rstrip("\n")
            if words.startswith("*"):
                table = self.chains[words[1:]]
            elif words.startswith(":"):
                table[words[1:].split(" ")[0]] = ()
            elif words.startswith("-X "):
                del table[words[3:]]
            elif words.startswith("-A "):
                chain = words.split(" ")[1]
                table[chain] = (*table[chain], words)
            elif words.startswith("-I "):
                _, chain, at, rest = words.split(" ", 3)
                rules = list(table[chain])
                rules.insert(int(at) - 1, f"-A {chain} {rest}")
                table[chain] = tuple(rules)
            elif words.startswith("-D "):
                chain, rule = words.split(" ")[1], f"-A {words[3:]}"
                rules = list(table[chain])
                rules.remove(rule)
                table[chain] = tuple(rules)
            else:
                assert words == "COMMIT", words


def with_sets(kernel: FakeKernel) -> FakeKernel:
    """All sets of ours, and the device."""
    for each, version in SET_NAMES.values():
        kernel.create(each, version)
    kernel.create_device()
    return kernel
