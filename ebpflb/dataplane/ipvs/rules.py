"""The iptables rules of IPVS mode, in exactly the text in which `iptables-save` prints them.

Rules of this file: pure. The rules name sets, never a frontend: they depend on the family, the masquerade bit and the
locality alone, and a Service that comes or goes changes none of them. Names, comments and order are those of
kube-proxy's ipvs mode as far as it has them. A set of policy Local is asked before its twin.
"""

from __future__ import annotations

from ebpflb.dataplane.ipvs.names import LOCALITY, OURS, Mark, Set
from ebpflb.netfilter.ruleset import Chains, Ruleset
from ebpflb.routes import Locality

_NAME_LIMIT = 15  # of an interface
_PREFIX = "-m comment --comment prefix"
_TRANSPORTS = ("tcp", "udp", "sctp")
_LOOPBACK = {4: "127.0.0.0/8", 6: "::1/128"}

GUESTS: dict[str, dict[str, tuple[str, ...]]] = {
    "mangle": {
        "PREROUTING": ('-m comment --comment "ebpflb: others than this node and its pods" -j EBPFLB-MARKS',),
        "OUTPUT": (
            '-m conntrack --ctstate NEW -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL',
        ),
        "POSTROUTING": ('-m comment --comment "ebpflb: marks of virtual servers end here" -j EBPFLB-UNMARK',),
    },
    "nat": {
        "PREROUTING": ('-m comment --comment "kubernetes service portals" -j KUBE-SERVICES',),
        "OUTPUT": ('-m comment --comment "kubernetes service portals" -j KUBE-SERVICES',),
        "POSTROUTING": ('-m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',),
    },
    "filter": {
        "INPUT": (
            '-m conntrack --ctstate NEW -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL',
            '-m conntrack --ctstate NEW -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-FILTER',
            '-m comment --comment "kubernetes health check rules" -j KUBE-NODE-PORT',
        ),
        "FORWARD": ('-m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',),
    },
}
"""Our rules at the head of chains of others, by table and chain, without their `-A CHAIN`."""

SHARED = {
    "mangle": frozenset[str](),
    "nat": frozenset(("KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "EBPFLB-NOT-POD")),
    "filter": frozenset(("KUBE-FORWARD", "KUBE-PROXY-FIREWALL", LOCALITY)),
}
"""Chains that the iptables dataplane has too, by table: they are this one's while EBPFLB-IPVS is there."""


def matches_of(locality: Locality, version: int) -> tuple[str, ...]:
    """What tells a local pod in one family, as arguments of a rule."""
    found = [f"-s {cidr}" for cidr in locality.pod_cidrs if (":" in cidr) == (version == 6)]
    if locality.pod_interface:
        found.append(f"-i {_interface(locality.pod_interface)}")
    return tuple(found)


def _interface(name: str) -> str:
    """A prefix as long as a name can be is a name: there is no room for a wildcard, nor for a longer one."""
    if not name.endswith("*"):
        return name
    return name[:-1] if len(name) > _NAME_LIMIT else f"{name[:-1]}+"


def ruleset(locality: Locality, version: int, mark: Mark, *, random_fully: bool = True) -> Ruleset:
    """All chains of ours in one family."""
    pods = matches_of(locality, version)
    return {
        "mangle": _mangle(pods, version, mark),
        "nat": _nat(pods, version, mark, random_fully),
        "filter": _filter(pods, version, mark, _locality(locality, pods)),
    }


def _locality(locality: Locality, pods: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The locality, told; nothing jumps there."""
    prefix = locality.pod_interface.endswith("*")
    return _chain(LOCALITY, *(f"{pod} {_PREFIX}" if prefix and pod.startswith("-i") else pod for pod in pods))


def guests() -> Ruleset:
    """The rules in built-in chains, in the text of iptables-save."""
    return {
        table: {chain: tuple(f"-A {chain} {rule}" for rule in rules) for chain, rules in chains.items()}
        for table, chains in GUESTS.items()
    }


def _match(each: Set, version: int, how: str = "dst,dst") -> str:
    return f"-m set --match-set {each.named(version)} {how}"


def _chain(name: str, *rules: str) -> tuple[str, tuple[str, ...]]:
    return name, tuple(f"-A {name} {rule}" for rule in rules)


def _source_ranges(version: int) -> tuple[str, tuple[str, ...]]:
    return _chain(
        "KUBE-SOURCE-RANGES-FIREWALL",
        f"{_match(Set.SOURCE_CIDR, version, 'dst,dst,src')} -j RETURN",
        f"{_match(Set.SOURCE_IP, version, 'dst,dst,src')} -j RETURN",
        "-j DROP",
    )


def _mangle(pods: tuple[str, ...], version: int, mark: Mark) -> Chains:
    return dict(
        (
            _chain(
                "EBPFLB-MARKS",
                f"-m set ! --match-set {Set.MARKS.named(version)} dst,dst -j RETURN",
                *(f"{pod} -j RETURN" for pod in pods),
                "-m addrtype --src-type LOCAL -j RETURN",
                f"-j SET --map-set {Set.MARKS.named(version)} dst,dst --map-mark",
            ),
            # Routing has been done: a mark that goes here changes no way.
            _chain("EBPFLB-UNMARK", f"-m mark --mark {mark.range} -j MARK --set-xmark 0x0/0xffffffff"),
            # The node's own packets are translated before they come to filter OUTPUT.
            _chain(
                "KUBE-PROXY-FIREWALL",
                f"{_match(Set.LOAD_BALANCER_FW, version)} -j KUBE-SOURCE-RANGES-FIREWALL",
                f"{_match(Set.DROP, version)} -j DROP",
            ),
            _source_ranges(version),
        )
    )


def _nat(pods: tuple[str, ...], version: int, mark: Mark, random_fully: bool) -> Chains:
    def comment(text: str) -> str:
        return f'-m comment --comment "{text}"'

    portal = comment("Kubernetes service lb portal")
    cluster = comment("Kubernetes service cluster ip + port for masquerade purpose")
    external = comment("Kubernetes service external ip + port for masquerade and filter purpose")
    external_local = comment("Kubernetes service external ip + port with externalTrafficPolicy=local")
    masquerade = "-j MASQUERADE --random-fully" if random_fully else "-j MASQUERADE"
    return dict(
        (
            _chain(
                "KUBE-SERVICES",
                f"-s {_LOOPBACK[version]} -j RETURN",
                f"{portal} {_match(Set.LOAD_BALANCER, version)} -j KUBE-LOAD-BALANCER",
                # The stack gives a packet to an address of kube-ipvs0 this very address as its source.
                f"{_match(Set.CLUSTER_IP, version)} {_match(Set.IPVS_IPS, version, 'src')} -j KUBE-MARK-MASQ",
                f"{_match(Set.MASQUERADE_NONE, version)} -j ACCEPT",
                f"{_match(Set.MASQUERADE_ALL, version)} -j KUBE-MARK-MASQ",
                f"{cluster} {_match(Set.CLUSTER_IP, version)} -j EBPFLB-NOT-POD",
                f"{external} {_match(Set.EXTERNAL_IP, version)} -j KUBE-MARK-MASQ",
                f"{external_local} {_match(Set.EXTERNAL_IP_LOCAL, version)} -j EBPFLB-NODE",
                f"{_match(Set.NODE_IPS, version, 'dst')} -j KUBE-NODE-PORT",
                # No later rule (a host port of a container, say) may translate what is IPVS' to translate.
                f"{_match(Set.FRONTENDS, version)} -j ACCEPT",
            ),
            _chain(
                "KUBE-LOAD-BALANCER",
                f"{_match(Set.LOAD_BALANCER_LOCAL, version)} -g EBPFLB-NODE",
                "-j KUBE-MARK-MASQ",
            ),
            _chain(
                "KUBE-NODE-PORT",
                *(
                    rule
                    for protocol, plain, kept, how in (
                        ("tcp", Set.NODE_PORT_TCP, Set.NODE_PORT_LOCAL_TCP, "dst"),
                        ("udp", Set.NODE_PORT_UDP, Set.NODE_PORT_LOCAL_UDP, "dst"),
                        ("sctp", Set.NODE_PORT_SCTP, Set.NODE_PORT_LOCAL_SCTP, "dst,dst"),
                    )
                    for rule in (
                        f"-p {protocol} {_match(kept, version, how)} -g EBPFLB-NODE",
                        f"-p {protocol} {_match(plain, version, how)} -j KUBE-MARK-MASQ",
                    )
                ),
            ),
            # Of the clients of policy Local only the node itself is masqueraded: its address is not that of a pod.
            _chain(
                "EBPFLB-NODE",
                *(f"{pod} -j RETURN" for pod in pods),
                "-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ",
            ),
            _chain("EBPFLB-NOT-POD", *(f"{pod} -j RETURN" for pod in pods), "-j KUBE-MARK-MASQ"),
            _chain("KUBE-MARK-MASQ", f"-j MARK --set-xmark {mark.masquerade}/{mark.masquerade}"),
            _chain(
                "KUBE-POSTROUTING",
                comment("Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose")
                + f" {_match(Set.LOOP_BACK, version, 'dst,dst,src')} -j MASQUERADE",
                f"-m mark ! --mark {mark.masquerade}/{mark.masquerade} -j RETURN",
                f"-j MARK --set-xmark {mark.masquerade}/0x0",
                f"{comment('kubernetes service traffic requiring SNAT')} {masquerade}",
            ),
        )
    )


def _filter(pods: tuple[str, ...], version: int, mark: Mark, locality: tuple[str, tuple[str, ...]]) -> Chains:
    # What the node sends itself by way of IPVS comes here at a backend's address: it is no frontend's packet any more.
    translated = "-m ipvs --ipvs -j RETURN"
    unreachable = "icmp6-port-unreachable" if version == 6 else "icmp-port-unreachable"
    # An ICMP error can be lost on a socket within connect(), and cost a second: TCP is answered by a reset.
    answers = ("-j REJECT --reject-with tcp-reset", *[f"-j REJECT --reject-with {unreachable}"] * 2)
    refused, undefined = (
        tuple(f"-p {protocol} {match} {answer}" for protocol, answer in zip(_TRANSPORTS, answers, strict=True))
        for match in (_match(Set.REJECT, version), _match(Set.IPVS_IPS, version, "dst"))
    )
    return dict(
        (
            locality,
            _chain(OURS),
            _chain(
                "KUBE-PROXY-FIREWALL",
                translated,
                f"{_match(Set.LOAD_BALANCER_FW, version)} -j KUBE-SOURCE-RANGES-FIREWALL",
            ),
            _source_ranges(version),
            _chain(
                "KUBE-IPVS-FILTER",
                translated,
                f"{_match(Set.DROP, version)} -j DROP",
                *refused,
                f"{_match(Set.DROP_EXTERNAL, version)} -j EBPFLB-EXTERNAL",
                f"{_match(Set.FRONTENDS, version)} -j RETURN",
                f"-p tcp {_match(Set.HEALTH, version, 'dst')} -j RETURN",
                *undefined,
            ),
            _chain(
                "EBPFLB-EXTERNAL",
                *(f"{pod} -j RETURN" for pod in pods),
                "-m addrtype --src-type LOCAL -j RETURN",
                "-j DROP",
            ),
            _chain(
                "KUBE-NODE-PORT",
                '-p tcp -m comment --comment "Kubernetes health check node port"'
                f" {_match(Set.HEALTH, version, 'dst')} -j ACCEPT",
            ),
            _chain(
                "KUBE-FORWARD",
                '-m comment --comment "kubernetes forwarding rules"'
                f" -m mark --mark {mark.masquerade}/{mark.masquerade} -j ACCEPT",
                '-m comment --comment "kubernetes forwarding conntrack rule"'
                " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            ),
        )
    )


# ---- Whose rules they are, and what they say


def is_ours(found: Ruleset) -> bool:
    """Whether the KUBE-* chains are this dataplane's."""
    return OURS in found.get("filter", {})


def pod_cidrs(rules: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The CIDRs and the interface ("" for none) that chain EBPFLB-LOCALITY tells."""
    cidrs = []
    interface = ""
    for rule in rules:
        words = rule.split(" ")
        if words[2:3] == ["-s"]:
            cidrs.append(words[3])
        elif words[2:3] == ["-i"]:
            interface = words[3].removesuffix("+") + ("*" if words[-1] == "prefix" else "")
    return tuple(cidrs), interface
