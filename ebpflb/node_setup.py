"""Kernel settings beside Services: what kube-proxy does to connection tracking, and to itself when memory runs out.

Rules of this file: the values are kube-proxy's, by its rules. What is as it should be is not written. Nothing here is
needed to carry Services, so what cannot be had is a Problem and never an error: the module may not be loaded, the
files may be read-only, and some settings belong to the first network namespace alone.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ebpflb.config import Config, Conntrack
from ebpflb.model import Problem

log = logging.getLogger("ebpflb.node")

# What kube-proxy caps the number of tracked connections at, if it is counted by CPUs.
_MOST_TRACKED = 1 << 20

# Entries for each bucket of the table of connections, as kube-proxy has it.
_PER_BUCKET = 4

_MAX = "nf_conntrack_max"


class Files(NamedTuple):
    """Where the kernel's settings are: of this network namespace, of the module, and of this process."""

    netfilter: Path = Path("/proc/sys/net/netfilter")
    hashsize: Path = Path("/sys/module/nf_conntrack/parameters/hashsize")
    oom_score_adj: Path = Path("/proc/self/oom_score_adj")


def set_up(config: Config, *, files: Files | None = None, cpus: int | None = None) -> tuple[Problem, ...]:
    """Make the settings that `config` asks for, and say what could not be had. `cpus` are those of the machine."""
    files, cpus = files or Files(), cpus or os.cpu_count() or 1
    found: list[Problem] = []
    if config.conntrack is not None:
        found += _set_conntrack(config.conntrack, files, cpus)
    if config.oom_score_adj is not None:
        found += _set(files.oom_score_adj, config.oom_score_adj, "oomScoreAdj")
    return tuple(found)


def most_tracked(conntrack: Conntrack, cpus: int) -> int:
    """How many connections may be tracked on a machine with so many CPUs; 0 to leave the kernel's own limit."""
    if not conntrack.max_per_core:
        return 0
    scaled = conntrack.max_per_core * cpus
    # As in kube-proxy, the cap is on what CPUs alone come to, and goes before `least` then.
    return _MOST_TRACKED if scaled > _MOST_TRACKED else max(scaled, conntrack.least)


def _set_conntrack(conntrack: Conntrack, files: Files, cpus: int) -> Iterator[Problem]:
    if not (files.netfilter / _MAX).exists():
        yield Problem(
            "conntrack",
            "its settings are left as they are: the kernel tracks no connections here; load the module nf_conntrack, "
            "or write maxPerCore: 0 and timeouts of 0s under conntrack in --config",
        )
        return
    if most := most_tracked(conntrack, cpus):
        problems = tuple(_set(files.netfilter / _MAX, most, "conntrack.maxPerCore"))
        yield from problems
        if not problems:  # the table is the whole machine's: who may not set the limit has no business with it
            yield from _set(files.hashsize, most // _PER_BUCKET, "conntrack.maxPerCore", at_least=True)
    for name, value, field in (
        ("nf_conntrack_tcp_timeout_established", conntrack.tcp_established, "tcpEstablishedTimeout"),
        ("nf_conntrack_tcp_timeout_close_wait", conntrack.tcp_close_wait, "tcpCloseWaitTimeout"),
        ("nf_conntrack_tcp_be_liberal", int(conntrack.tcp_be_liberal), "tcpBeLiberal"),
        ("nf_conntrack_udp_timeout", conntrack.udp, "udpTimeout"),
        ("nf_conntrack_udp_timeout_stream", conntrack.udp_stream, "udpStreamTimeout"),
    ):
        if value:
            yield from _set(files.netfilter / name, value, f"conntrack.{field}")


def _set(path: Path, value: int, field: str, *, at_least: bool = False) -> Iterator[Problem]:
    """Write `value`, unless it is there already. `field` is where it comes from."""
    now: int | None = None
    try:
        now = int(path.read_text())
        if now == value or (at_least and now >= value):
            return
        path.write_text(str(value))
    except (OSError, ValueError) as error:
        yield Problem(path.name, f"{_words(error, now)}; {field} asks for {value}: {_remedy(error, path)}")
    else:
        log.info("%s: %d, was %d (%s)", path, value, now, field)


def _words(error: OSError | ValueError, now: int | None) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no {error.filename}"
    if isinstance(error, OSError):
        return f"cannot be {'read' if now is None else f'set, and stays {now}'}: {error.strerror}"
    return "is no number"


def _remedy(error: OSError | ValueError, path: Path) -> str:
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM) and path.name == "oom_score_adj":
        return "give the capability CAP_SYS_RESOURCE"
    return "set it on the node"
