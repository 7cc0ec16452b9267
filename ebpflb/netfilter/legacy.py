"""What ip_tables, the kernel's older engine, says of itself without a table being read.

Rules of this file: it asks about tables that are there only: to ask about another would make that one.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from pathlib import Path

from ebpflb.model import Family

_NAMES = {Family.IPV4: "ip_tables_names", Family.IPV6: "ip6_tables_names"}
_KINDS = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_LEVELS = {Family.IPV4: socket.SOL_IP, Family.IPV6: socket.IPPROTO_IPV6}
_GET_INFO = 64
# struct ipt_getinfo: name, mask of hooks, entries and underflows of five hooks, number of entries, their size
_SIZE, _NUMBER = 84, slice(76, 80)


def tables(family: Family) -> frozenset[str]:
    """The tables of a family in the network namespace that the thread is in. Raises OSError."""
    try:
        return frozenset(Path("/proc/thread-self/net", _NAMES[family]).read_text().split())
    except FileNotFoundError:
        return frozenset()


def entries(family: Family, table: str) -> int | None:
    """How many entries a table has: its rules, and two for each chain. It costs the same however many there are. None
    if there is no such table. Raises OSError."""
    if table not in tables(family):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    info = ctypes.create_string_buffer(table.encode(), _SIZE)
    length = ctypes.c_uint32(_SIZE)
    with socket.socket(_KINDS[family], socket.SOCK_RAW, socket.IPPROTO_RAW) as kernel:
        if libc.getsockopt(kernel.fileno(), _LEVELS[family], _GET_INFO, info, ctypes.byref(length)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    return int.from_bytes(info.raw[_NUMBER], sys.byteorder)
