"""iptables as a tool: which of its variants to use, and save and restore of tables, in either family.

Rules of this file: it runs commands and reads their answers; what the rules mean is others' business. Nothing is ever
flushed that the caller does not name: restore is always `--noflush --counters`. What writes waits for the xtables lock;
what reads needs none, since the kernel gives a whole table at a time, and does not wait for who has it. What a command
refuses is an ApplyError with its own words; a command that is not there is Unsupported.

The variant `nft` (1.8.9, 1.8.11) takes time quadratic in the number of chains: to save 110,000 of them two minutes and
then it crashes, to restore them in one transaction four minutes. So beyond a thousand chains its tables are read chain
by chain (the names come from the kernel; `-S CHAIN` is an input line of restore as any other), and who writes many
chains should write `CHAINS_AT_ONCE` in a transaction. The variant `legacy` copies the whole table for each transaction:
few are best.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import IO, TypeVar

from ebpflb.errors import ApplyError, Unsupported
from ebpflb.model import Family
from ebpflb.netfilter import legacy, nftables
from ebpflb.netfilter.commands import Variant, binary, missing_commands, plain_variant, required, version_of
from ebpflb.netfilter.ruleset import Rules, SavedChain, saved_chains

__all__ = ["Iptables", "LockHeldError", "Variant", "detect", "missing_commands"]

TABLES = ("filter", "nat", "mangle")

WAIT_SECONDS = 5
"""How long a command waits for the xtables lock; who holds it longer is named, and the caller tries again."""

CHAINS_AT_ONCE = 500
"""How many chains a transaction of the variant nft should have at most."""

OLDEST = (1, 6, 2)
"""The first version whose restore waits for the lock."""

RANDOM_FULLY = (1, 6, 2)
"""The first version whose MASQUERADE knows --random-fully."""

_MANY = 1000
_READ_AT_ONCE = 200
_LOCK = "/run/xtables.lock"
_NO_LOCK = "/dev/null"
# kubelet makes the first for just this purpose (1.24); the second is older and of its own.
_HINTS = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")
_CAP_NET_ADMIN = 12
_CAPABILITY = "it needs root and the capability CAP_NET_ADMIN"
_COUNTED = re.compile(r"(-A .*?) -c (\d+) (\d+)(.*)")
_NOISE = ("Try `", "# Warning:", "Perhaps iptables or your kernel")


T = TypeVar("T")


class LockHeldError(ApplyError):
    """Another program kept the xtables lock for longer than `WAIT_SECONDS`. It is worth trying again."""


class Iptables:
    """The commands of one family and variant, run in the network namespace that the thread is in."""

    def __init__(self, family: Family, variant: Variant, *, lock: str = "") -> None:
        """`lock`: another file than the machine's xtables lock, for a namespace of one's own. Raises Unsupported if a
        command is missing."""
        self._environment = {**os.environ, "LC_ALL": "C"}  # in English: some of what commands say is looked at
        self._for_reading = {**self._environment, "XTABLES_LOCKFILE": _NO_LOCK}
        if lock:
            self._environment["XTABLES_LOCKFILE"] = lock
        self.family = family
        self.variant = variant
        self._list, self._save, self._restore = (
            required(family, variant, suffix) for suffix in ("", "-save", "-restore")
        )

    @property
    def version(self) -> tuple[int, ...]:
        """Raises Unsupported."""
        return version_of(self._list).numbers

    def save(self, tables: Sequence[str] = TABLES) -> Iterator[SavedChain]:
        """The chains of `tables`, as they come; a table that is not there has none, and is not made by looking.
        Raises ApplyError."""
        if self.variant is Variant.NFT:
            chains = [chain for chain in _nft_chains(self.family) if chain.table in tables]
            if len(chains) > _MANY:
                yield from self._save_by_chain(chains)
                return
            present = [table for table in tables if any(chain.table == table for chain in chains)]
        else:
            present = [table for table in tables if table in _legacy_tables(self.family)]
        for table in present:
            with self._reading([self._save, "-t", table]) as lines:
                try:
                    yield from saved_chains(_readable(table, lines))
                except ValueError as error:
                    raise ApplyError(table, "", 0, f"{self._save}: {error}") from error

    def _save_by_chain(self, chains: Sequence[nftables.NftChain]) -> Iterator[SavedChain]:
        ordered = sorted(chains, key=lambda chain: TABLES.index(chain.table) if chain.table in TABLES else len(TABLES))
        expected = iter(ordered)
        current: nftables.NftChain | None = None
        policy, rules = "-", list[str]()
        with self._reading([self._restore, *self._waiting, "--noflush"], _listing(ordered)) as lines:
            for raw in lines:
                line = raw.rstrip("\n")
                if line.startswith("-A "):
                    rules.append(line)
                    continue
                if line[:3] not in ("-N ", "-P "):
                    continue
                if current is not None:
                    yield SavedChain(current.table, current.name, policy, tuple(rules))
                _, name, *rest = line.split(" ")
                current = next(expected, None)
                if current is None or current.name != name:
                    raise ApplyError("", name, 0, f"{self._restore} lists another chain than it was asked for: {name}")
                policy, rules = rest[0] if rest else "-", []
        if current is not None:
            yield SavedChain(current.table, current.name, policy, tuple(rules))
        if next(expected, None) is not None:
            raise ApplyError("", "", 0, f"{self._restore} lists fewer chains than it was asked for")

    def has_chain(self, table: str, chain: str) -> bool:
        """Whether there is such a chain; it costs what `rules` does. Raises ApplyError."""
        if self.variant is Variant.NFT:
            return _asked(lambda: nftables.has_chain(self.family, table, chain))
        return self.rules(table, chain) is not None

    def entries(self, table: str) -> int | None:
        """How many entries a table of variant legacy has: its rules, and two for each chain; None if there is no such
        table. It costs next to nothing. Raises ApplyError."""
        return _asked(lambda: legacy.entries(self.family, table))

    def rules(self, table: str, chain: str) -> Rules | None:
        """The rules of one chain; None if there is no such chain. With variant nft it costs next to nothing, with
        legacy it reads the table. Raises ApplyError."""
        found = self._listed(table, chain, "-S")
        return None if found is None else tuple(line for line in found if line.startswith("-A "))

    def counted(self, table: str, chains: Iterable[str]) -> list[tuple[int, int, str]]:
        """(packets, bytes, rule) of each rule of `chains`, which must be there. Raises ApplyError."""
        listing = [f"*{table}\n", *(f"-v -S {chain}\n" for chain in chains), "COMMIT\n"]
        found = []
        with self._reading([self._restore, *self._waiting, "--noflush"], listing) as lines:
            for line in lines:
                match = _COUNTED.fullmatch(line.rstrip("\n"))
                if match:
                    found.append((int(match[2]), int(match[3]), match[1] + match[4]))
        return found

    def restore(self, lines: Iterable[str]) -> None:
        """Feed `lines`, with their ends, to restore: tables, each one a transaction, of which what came before a
        failing one has been done. Raises ApplyError."""
        argv = [self._restore, *self._waiting, "--noflush", "--counters"]
        said = _memory()
        try:
            with subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=said, stderr=said, env=self._environment
            ) as process:
                assert process.stdin is not None
                try:
                    for part in _joined(lines):
                        process.stdin.write(part)
                    process.stdin.close()
                except BrokenPipeError:
                    pass  # it says why on its standard error
                except BaseException:
                    process.kill()
                    raise
            if process.returncode:
                raise _refusal(argv, process.returncode, _said(said))
        except OSError as error:
            raise ApplyError("", "", error.errno or 0, f"{self._restore} cannot be run: {error.strerror}") from error
        finally:
            os.close(said)

    @property
    def _waiting(self) -> tuple[str, str]:
        return ("-w", str(WAIT_SECONDS))

    def _listed(self, table: str, chain: str, *how: str) -> list[str] | None:
        """What iptables lists of a chain; None if there is none such."""
        if self.variant is Variant.NFT:  # which has a misleading word for a chain that is not there
            present = _asked(lambda: nftables.has_chain(self.family, table, chain))
        else:
            present = table in _legacy_tables(self.family)
        if not present:
            return None
        argv = [self._list, *self._waiting, "-t", table, *how, chain]
        try:
            done = subprocess.run(argv, capture_output=True, check=False, env=self._for_reading)
        except OSError as error:
            raise ApplyError(table, chain, error.errno or 0, f"{argv[0]} cannot be run: {error.strerror}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace")
            if "No chain/target/match by that name" in said:
                return None
            raise _refusal(argv, done.returncode, said)
        return done.stdout.decode(errors="replace").splitlines()

    @contextmanager
    def _reading(self, argv: list[str], given: Iterable[str] = ()) -> Iterator[IO[str]]:
        """The lines that a command prints, as they come. Raises ApplyError if it fails in the end."""
        said, told = _memory(), _memory()
        try:
            for part in _joined(given):
                os.write(told, part)
            os.lseek(told, 0, os.SEEK_SET)
            with subprocess.Popen(
                argv,
                stdin=told,
                stdout=subprocess.PIPE,
                stderr=said,
                env=self._for_reading,
                text=True,
                errors="replace",
            ) as process:
                assert process.stdout is not None
                try:
                    yield process.stdout
                except BaseException:
                    process.kill()
                    raise
            if process.returncode:
                raise _refusal(argv, process.returncode, _said(said))
        except OSError as error:
            raise ApplyError("", "", error.errno or 0, f"{argv[0]} cannot be run: {error.strerror}") from error
        finally:
            os.close(said)
            os.close(told)


# ---- Which variant


def detect(families: Sequence[Family] = tuple(Family)) -> Variant:
    """The variant that this node's rules are in: kubelet's hint, else the one that has more rules, else what plain
    `iptables` is. Raises Unsupported if there is no iptables, ApplyError if the kernel refuses to tell."""
    present = [variant for variant in Variant if binary(Family.IPV4, variant, "-restore")]
    if not present:
        raise Unsupported("no iptables-restore is installed: apt install iptables")
    if len(present) == 1:
        return present[0]
    for hint in _HINTS:
        for variant in present:
            if any(_has_chain(family, variant, "mangle", hint) for family in families):
                return variant
    sizes = {variant: sum(_rule_count(family, variant) for family in families) for variant in present}
    most = max(present, key=lambda variant: sizes[variant])
    if sizes[most]:
        return most
    return plain_variant() or present[0]


def _has_chain(family: Family, variant: Variant, table: str, chain: str) -> bool:
    return not missing_commands(family, variant) and Iptables(family, variant).has_chain(table, chain)


def _rule_count(family: Family, variant: Variant) -> int:
    """About how many rules there are."""
    if variant is Variant.NFT:
        return sum(chain.uses for chain in _nft_chains(family) if chain.table in TABLES)
    tables = [table for table in TABLES if table in _legacy_tables(family)]
    if not tables or missing_commands(family, variant):
        return 0
    return sum(len(chain.rules) for chain in Iptables(family, variant).save(tables))


def _nft_chains(family: Family) -> list[nftables.NftChain]:
    return _asked(lambda: nftables.chains(family))


def _legacy_tables(family: Family) -> frozenset[str]:
    return _asked(lambda: legacy.tables(family))


def _asked(question: Callable[[], T]) -> T:
    """The kernel's answer. Raises ApplyError."""
    try:
        return question()
    except OSError as error:
        remedy = f": {_CAPABILITY}" if error.errno == errno.EPERM else ""
        words = f"the kernel cannot be asked: {error.strerror}{remedy}"
        raise ApplyError("iptables", "", error.errno or 0, words) from error


# ---- What a command says


def _refusal(argv: Sequence[str], status: int, said: str) -> ApplyError:
    """A failed command as an error with its own words."""
    tool = os.path.basename(argv[0])
    words = " ".join(
        line.strip().removeprefix(f"{tool}: ")
        for line in said.splitlines()
        if line.strip() and not line.startswith(_NOISE)
    )
    if "xtables lock" in words:
        return LockHeldError(
            "xtables lock",
            "",
            errno.EAGAIN,
            f"{tool}: {_lock_holder()} has held the xtables lock for {WAIT_SECONDS} s; try again when it has let go",
        )
    if not _may_administrate():
        return ApplyError("", "", errno.EPERM, f"{tool}: {words}: {_CAPABILITY}")
    if status < 0:
        words = f"ended by signal {-status}. {words}".strip()
    return ApplyError("", "", 0, f"{tool}: {words or f'exit status {status}'}")


def _may_administrate() -> bool:
    """Whether this process may change rules at all: the commands have many words for it that it may not."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    return True


def _readable(table: str, lines: Iterable[str]) -> Iterator[str]:
    """The lines, unless they say that the table cannot be told in iptables' terms: then nothing else of it comes."""
    for line in lines:
        if line.startswith("# Table `") and "is incompatible" in line:
            words = f"table {table} has rules that iptables does not know, made by nft: move these to another table"
            raise ApplyError(table, "", 0, words)
        yield line


def _lock_holder() -> str:
    """Who holds the xtables lock, in words."""
    try:
        inode = os.stat(os.environ.get("XTABLES_LOCKFILE", _LOCK)).st_ino  # the variable is iptables' own
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if "->" not in words and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
                name = Path("/proc", words[4], "comm").read_text().strip()
                return f"{name} (pid {words[4]})"
    except (OSError, IndexError):
        pass  # it may be in another PID namespace, or have let go
    return "another program"


def _listing(chains: Iterable[nftables.NftChain]) -> Iterator[str]:
    """Restore's input that makes it print `chains`, as many at a time as it can look up quickly."""
    for table, members in groupby(chains, key=lambda chain: chain.table):
        names = [chain.name for chain in members]
        for at in range(0, len(names), _READ_AT_ONCE):
            yield f"*{table}\n"
            yield from (f"-S {name}\n" for name in names[at : at + _READ_AT_ONCE])
            yield "COMMIT\n"


def _joined(lines: Iterable[str], most: int = 1 << 16) -> Iterator[bytes]:
    """Lines in pieces of about `most` characters."""
    part: list[str] = []
    size = 0
    for line in lines:
        part.append(line)
        size += len(line)
        if size >= most:
            yield "".join(part).encode()
            part, size = [], 0
    if part:
        yield "".join(part).encode()


def _memory() -> int:
    """A file without a name, for what a process says or is told."""
    return os.memfd_create("iptables")


def _said(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        return file.read().decode(errors="replace")
