"""Fixtures of the tests that write rules: `place` is a network namespace of its own, for either variant of iptables."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from ebpflb.dataplane.iptables.dataplane import IptablesDataplane
from ebpflb.demo import namespaces
from ebpflb.model import Family
from ebpflb.netfilter.ruleset import Ruleset, ruleset_of

COMMANDS = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}


class Place:
    """A network namespace, which this thread is in."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def dataplane(self) -> IptablesDataplane:
        """A started one, as of a daemon that has just begun."""
        dataplane = IptablesDataplane(variant=self.variant)
        dataplane.start()
        return dataplane

    def iptables(self, *arguments: str, family: Family = Family.IPV4) -> str:
        """Run iptables."""
        return self.run(f"{COMMANDS[family]}-{self.variant}", *arguments)

    def restore(self, text: str, family: Family = Family.IPV4) -> None:
        """Feed iptables-restore, keeping what is there."""
        self.run(f"{COMMANDS[family]}-{self.variant}-restore", "--noflush", given=text)

    def saved(self, family: Family = Family.IPV4) -> Ruleset:
        """All chains, by another program than the one under test where these are many."""
        return ruleset_of(self.run(f"{COMMANDS[family]}-{self.variant}-save").splitlines())

    def everything(self) -> dict[Family, Ruleset]:
        """All chains of both families, without tables that have only empty built-in chains: to look makes some."""
        found = {}
        for family in Family:
            ruleset = self.saved(family)
            found[family] = {
                table: chains
                for table, chains in ruleset.items()
                if any(chains.values()) or any(chain.upper() != chain or "-" in chain for chain in chains)
            }
        return found

    def handles(self) -> dict[str, list[str]]:
        """The kernel's numbers of nat's rules by chain, which a rule that is written anew does not keep."""
        assert self.variant == "nft"
        found: dict[str, list[str]] = {}
        chain = ""
        for line in self.run("nft", "-a", "list", "table", "ip", "nat").splitlines():
            words = line.split()
            if words[:1] == ["chain"]:
                chain = words[1]
            elif " # handle " in line and chain:
                found.setdefault(chain, []).append(words[-1])
        return found

    @staticmethod
    def run(*argv: str, given: str = "") -> str:
        """Run a command; what it says."""
        done = subprocess.run(argv, input=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="module", autouse=True)
def a_lock_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """These namespaces share no xtables lock with this machine or with other tests, whoever holds that for how long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTABLES_LOCKFILE", str(tmp_path_factory.mktemp("netfilter") / "xtables.lock"))
        yield


@pytest.fixture(params=("nft", "legacy"))
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """An empty namespace whose loopback is up."""
    with entered(request.param) as found:
        yield found


class entered:  # noqa: N801  # reads as what it is: `with entered("nft") as place`
    """An empty namespace within the block."""

    _count = 0

    def __init__(self, variant: str) -> None:
        entered._count += 1
        self._name = f"ebpflb-rules-{os.getpid()}-{entered._count}"
        self._variant = variant

    def __enter__(self) -> Place:
        namespaces.create(self._name)
        self._inside = namespaces.inside(self._name)
        self._inside.__enter__()
        return Place(self._variant)

    def __exit__(self, *_: object) -> None:
        self._inside.__exit__(None, None, None)
        namespaces.delete(self._name)
