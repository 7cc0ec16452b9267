"""What the programs remember of clients, as far as the control plane has a say: it forgets.

Rules of this file: rows of `affinity` are the programs' own. A number that a Service gives up is another's one day, and
a Service that keeps its clients again begins anew; so rows of services that keep none are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ebpflb.dataplane.bpf.layouts import AFFINITY_KEY, rows_of
from ebpflb.dataplane.bpf.maps import Maps


def forget_clients(maps: Maps, keeps: Callable[[int], bool]) -> Mapping[int, int]:
    """Remove the rows of all services but those that `keeps` names; what was refused, as errno. Costs a look at every
    row, of which there are as many as the map has room for at most. Raises OSError."""
    keys, _ = maps.read("affinity")
    if not keys:
        return {}
    owners = [service for _, service, _ in AFFINITY_KEY.iter_unpack(keys)]
    idle = {service for service in set(owners) if not keeps(service)}
    rows = rows_of(keys, AFFINITY_KEY.size)
    gone = [row for row, service in zip(rows, owners, strict=True) if service in idle]
    return maps.remove("affinity", b"".join(gone)) if gone else {}
