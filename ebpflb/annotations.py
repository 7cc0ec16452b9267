"""What a Service asks for by annotations, `ebpflb/…`: what of it is in its routes, and what is said of the rest.

Rules of this file: pure; imports `model`, `routes`, `facts`. A word that nobody knows is a Problem, and the default
holds. What is known and cannot be had on this node is a Problem, too, and stands in the route all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec

from ebpflb.facts import Facts
from ebpflb.model import Problem, Service
from ebpflb.routes import Algorithm, Forwarding

_ALGORITHMS = {algorithm.label: algorithm for algorithm in Algorithm}
_FORWARDINGS = {forwarding.name.lower(): forwarding for forwarding in Forwarding}
_KEEP = "keep"

_T = TypeVar("_T")


class Settings(msgspec.Struct, frozen=True, gc=False):
    """What all routes of a Service share."""

    affinity_seconds: int
    algorithm: Algorithm
    forwarding: Forwarding


def settings_of(service: Service, facts: Facts, problems: list[Problem]) -> Settings:
    """What holds for all routes of a Service; what is wrong with its annotations goes to `problems`."""
    default = _ALGORITHMS[facts.default_algorithm]
    if not service.annotations:
        return Settings(service.affinity_seconds, default, Forwarding.SNAT)
    _remark_on_algorithm(service, facts, problems)
    _remark_on_forwarding(service, facts, problems)
    _remark_on_drain(service, problems)
    return Settings(
        service.affinity_seconds,
        _annotated(service, "algorithm", _ALGORITHMS, default, problems),
        _annotated(service, "forwarding", _FORWARDINGS, Forwarding.SNAT, problems),
    )


def _remark_on_algorithm(service: Service, facts: Facts, problems: list[Problem]) -> None:
    """Of one that is known and cannot be had here. The route says what was asked for nevertheless, as on every node:
    what dataplanes lack is not policy."""
    asked = dict(service.annotations).get("algorithm")
    if asked not in _ALGORITHMS or not facts.algorithms or asked in facts.algorithms:
        return
    reason = (
        f"annotation ebpflb/algorithm: {asked} is none that this node's dataplane has "
        f"({', '.join(facts.algorithms)}); backends are chosen at random"
    )
    problems.append(Problem(str(service.name), reason, "AlgorithmNotSupported"))


def _remark_on_forwarding(service: Service, facts: Facts, problems: list[Problem]) -> None:
    """As of an algorithm."""
    asked = dict(service.annotations).get("forwarding")
    if facts.direct_return or _FORWARDINGS.get(asked or "") is not Forwarding.DSR:
        return
    reason = (
        f"annotation ebpflb/forwarding: {asked} is none that this node's dataplane has (snat); what it balances is "
        "carried by NAT, and replies come back through this node"
    )
    problems.append(Problem(str(service.name), reason, "ForwardingNotSupported"))


def _remark_on_drain(service: Service, problems: list[Problem]) -> None:
    """No dataplane ends a connection because a Service asks for it, and so no route speaks of it."""
    asked = dict(service.annotations).get("drain", _KEEP)
    if asked == _KEEP:
        return
    if asked != "reset" and not (asked.isascii() and asked.isdecimal()):
        problems.append(_unknown(service, "drain", (_KEEP, "reset", "a number of seconds")))
        return
    reason = (
        f"annotation ebpflb/drain: {asked} is not done: TCP connections to a backend that leaves are kept ({_KEEP})"
    )
    problems.append(Problem(str(service.name), reason, "DrainNotSupported"))


def _annotated(service: Service, key: str, values: Mapping[str, _T], default: _T, problems: list[Problem]) -> _T:
    text = dict(service.annotations).get(key)
    if text is None:
        return default
    if text not in values:
        problems.append(_unknown(service, key, values))
    return values.get(text, default)


def _unknown(service: Service, key: str, values: Iterable[str]) -> Problem:
    text, known = dict(service.annotations).get(key), ", ".join(values)
    reason = f"annotation ebpflb/{key}: {text!r} is unknown (known: {known}); default used"
    return Problem(str(service.name), reason, "UnknownAnnotationValue")
