"""`trace`: what the live tables do with a packet, step by step.

Rules of this file: the tables are read from the kernel and judged by `decide`, so the answer is the same for every
dataplane. What `decide` cannot know is added: which algorithms the dataplane has, and where a client with session
affinity went before, which is asked of it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import msgspec

from ebpflb.commands import NOT_A_SERVICE, NOT_FORWARDED, OK, Result
from ebpflb.commands.patience import require_privilege
from ebpflb.config import Config
from ebpflb.dataplane.items import backend_item, endpoint_text, service_item
from ebpflb.dataplane.limits import ALGORITHMS
from ebpflb.decide import Candidate, Decision, Outcome, Packet, decide
from ebpflb.errors import UserError
from ebpflb.model import Address, Protocol
from ebpflb.output import Format, Item, document
from ebpflb.parts import Parts, holder
from ebpflb.routes import Frontend, Scope

_FEW = 10
_NETNS = "netns:"
"""How a client begins in `dump affinity` that is no address but a network namespace."""


def parse_packet(source: str, target: str, interface: str = "") -> Packet:
    """The packet that `trace SRC DST:PORT[/PROTO]` is about. Raises UserError."""
    where, _, protocol = target.partition("/")
    host, separator, port = where.rpartition(":")
    if not separator or (":" in host and not host.startswith("[")):
        raise UserError(f"{target}: write the destination as ADDRESS:PORT[/PROTOCOL], IPv6 as [ADDRESS]:PORT")
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UserError(f"{target}: {port or 'nothing'} is not a port (1 to 65535)")
    try:
        known = Protocol[protocol.upper() or "TCP"]
    except KeyError:
        raise UserError(f"{target}: {protocol} is unknown; choose TCP, UDP or SCTP") from None
    packet = Packet(_address(source), _address(host.strip("[]")), int(port), known, interface)
    if (":" in packet.source) != (":" in packet.destination):
        raise UserError(f"{source} and {target} are not of one family; give two IPv4 or two IPv6 addresses")
    return packet


def _address(text: str) -> Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise UserError(f"{text} is not an IP address; give one such as 10.244.1.5 or fd00::5") from None
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def trace(config: Config, parts: Parts, *, packet: Packet, form: Format) -> Result:
    """What the live tables do with `packet`."""
    require_privilege(parts)
    dataplane = holder(parts.dataplanes(config), config.dataplane)
    decision = _as_can_be_done(decide(dataplane.state(), packet), dataplane.name)
    if decision.candidates and decision.route and decision.route.affinity_seconds:
        decision = with_memory(decision, packet, dataplane.tables("affinity"))
    status = {Outcome.FORWARD: OK, Outcome.NOT_SERVICE: NOT_A_SERVICE}.get(decision.verdict, NOT_FORWARDED)
    if form.structured:
        return Result(document("Trace", [_item(dataplane.name, packet, decision)], form), status)
    return Result(_text(packet, decision, most=None if form is Format.WIDE else _FEW), status)


def _as_can_be_done(decision: Decision, dataplane: str) -> Decision:
    """With a word about an algorithm that the route asks for and the dataplane does not have."""
    if decision.route is None or len(decision.candidates) < 2:
        return decision
    asked = decision.route.algorithm.label
    if asked in ALGORITHMS.get(dataplane, (asked,)):
        return decision
    step = f"{dataplane} does not do {asked}: one of them is chosen at random"
    return msgspec.structs.replace(decision, reasons=(*decision.reasons, step))


def with_memory(decision: Decision, packet: Packet, clients: Iterable[Item]) -> Decision:
    """The decision once it is known where the client went before: `clients` are the items of `dump affinity`."""
    route = decision.route
    assert route is not None
    frontend = str(Frontend(packet.destination, packet.port, packet.protocol))
    rows = [
        row
        for row in clients
        if row["service"] == service_item(route.service)
        and row.get("protocol", packet.protocol.name) == packet.protocol.name
        and row.get("frontend", frontend) == frontend
    ]
    for row in rows:
        if row["client"] != packet.source:
            continue
        kept = [
            each
            for each in decision.candidates
            if endpoint_text(each.backend.address, each.backend.port) == row["backend"]
        ]
        if kept:
            step = f"{packet.source} is remembered: it goes to {row['backend']}, as before"
        else:
            gone = row["backend"] or "where it went"
            step = f"{packet.source} is remembered, but {gone} takes no new flows: chosen anew"
        return msgspec.structs.replace(
            decision, candidates=tuple(kept) or decision.candidates, reasons=(*decision.reasons, step)
        )
    step = f"{packet.source} is not remembered: chosen anew, and remembered then"
    if decision.scope is Scope.INTERNAL and any(str(row["client"]).startswith(_NETNS) for row in rows):
        step += " (but for its sockets, remembered by their network namespace: see `ebpflb dump affinity`)"
    return msgspec.structs.replace(decision, reasons=(*decision.reasons, step))


def _item(dataplane: str, packet: Packet, decision: Decision) -> Item:
    return {
        "packet": {
            "source": packet.source,
            "destination": {
                "address": packet.destination,
                "port": packet.port,
                "protocol": packet.protocol.name,
            },
            "interface": packet.interface,
        },
        "dataplane": dataplane,
        "scope": decision.scope.name,
        "service": service_item(decision.route.service) if decision.route else None,
        "kind": decision.route.kind.label if decision.route else None,
        "verdict": decision.verdict.name,
        "steps": list(decision.reasons),
        "candidates": [
            {**backend_item(candidate.backend), "source": _source(packet, candidate)}
            for candidate in decision.candidates
        ],
    }


def _source(packet: Packet, candidate: Candidate) -> str:
    """Whom the backend sees: the client's address, or "node" for this node's own on the way out."""
    return "node" if candidate.masquerade else packet.source


def _text(packet: Packet, decision: Decision, most: int | None) -> str:
    via = f" by {packet.interface}" if packet.interface else ""
    lines = [f"{packet.source} -> {endpoint_text(packet.destination, packet.port)}/{packet.protocol.name}{via}"]
    lines += [f"  {number}. {reason}" for number, reason in enumerate(decision.reasons, 1)]
    lines.append(_conclusion(decision))
    shown = decision.candidates[:most]
    for candidate in shown:
        seen = "this node" if candidate.masquerade else packet.source
        lines.append(f"  {endpoint_text(candidate.backend.address, candidate.backend.port)}, which sees {seen}")
    if len(shown) < len(decision.candidates):
        lines.append(f"  +{len(decision.candidates) - len(shown)} more (-o wide shows all)")
    return "\n".join(lines) + "\n"


def _conclusion(decision: Decision) -> str:
    match decision.verdict:
        case Outcome.FORWARD:
            number = len(decision.candidates)
            return f"FORWARD to {'this backend' if number == 1 else f'one of these {number} backends'}:"
        case Outcome.REJECT:
            return "REJECT: the client is answered with a refusal"
        case Outcome.DROP:
            return "DROP: the client gets no answer"
        case _:
            return "NOT A SERVICE: the packet goes on as if ebpflb were not there"
