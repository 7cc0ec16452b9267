"""What a dataplane cannot do: the one list, which docs print and tests go by.

Rules of this file: a limit is something that `decide` says and this dataplane does not do, or that an operator could
ask of it and not get. One sentence each, for an operator. Whatever stands not here, all dataplanes do alike.
"""

from __future__ import annotations

from typing import NamedTuple


class Limit(NamedTuple):
    """`dataplane` cannot do `what`, a sentence; `code` is one word for tests to name it by."""

    dataplane: str
    code: str
    what: str


LIMITS = (
    Limit("bpf", "algorithm", "Round-robin and least-connections are not done: backends are chosen at random instead."),
    Limit(
        "bpf", "affinity-clients", "Affinity knows 65536 clients of all Services together; who stays away longest goes."
    ),
    Limit("bpf", "forwarding", "Direct server return is not done: replies come back through this node."),
    Limit("bpf", "sctp-sockets", "The node's own SCTP sockets reach no Service: the kernel has no hook for them."),
    Limit("bpf", "sctp-ports", "SCTP to a backend on another port than the Service's is dropped: its checksum stays."),
    Limit("bpf", "bound-sockets", "Source ranges take each socket of the node for its main address, also a bound one."),
    Limit("iptables", "algorithm", "Backends are chosen at random only."),
    Limit("iptables", "forwarding", "Direct server return is not done: replies come back through this node."),
    Limit("iptables", "affinity-table", "Affinity knows 100 clients of an endpoint (ip_list_tot of xt_recent)."),
    Limit("iptables", "own-datagrams", "A datagram of the node itself that is refused or dropped fails with EPERM."),
    Limit("ipvs", "forwarding", "Direct server return is not done: replies come back through this node."),
    Limit("ipvs", "loopback", "What comes from a loopback address is not carried: no node port is on 127.0.0.1."),
    Limit("ipvs", "external-ports", "External addresses are bound to the node: their other ports are refused there."),
    Limit(
        "ipvs", "affinity-shared", "Affinity is kept for each frontend by itself, not for a Service port as a whole."
    ),
    Limit("ipvs", "affinity-hash", "Affinity from outside under policy Local is by hash where targetPort is another."),
    Limit("ipvs", "own-drops", "A datagram of the node itself that is dropped fails with EPERM."),
)


ALGORITHMS = {
    "bpf": ("random", "maglev"),
    "ipvs": ("random", "maglev", "round-robin", "least-connections"),
    "iptables": ("random",),
}
"""The labels of what each does of `routes.Algorithm`; for the rest it chooses at random."""


def limited(dataplane: str, code: str) -> bool:
    """Whether `dataplane` has the limit `code`."""
    return any((limit.dataplane, limit.code) == (dataplane, code) for limit in LIMITS)
