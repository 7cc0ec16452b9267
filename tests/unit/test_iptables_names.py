"""Chains have the names that kube-proxy gives them; the expected ones are from clusters and kube-proxy's own tests."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpflb.dataplane.iptables import names


@pytest.mark.parametrize(
    ("service_port", "protocol", "expected"),
    [
        ("default/kubernetes:https", "tcp", "NPX46M4PTMTKRN6Y"),
        ("kube-system/kube-dns:dns", "udp", "TCOU7JCQXEZGVUNU"),
        ("kube-system/kube-dns:dns-tcp", "tcp", "ERIFXISQEP7F7OF4"),
        ("ns1/svc1:p80", "tcp", "XPGD46QRK7WJZT7O"),
    ],
)
def test_a_service_ports_chains_are_kube_proxys(service_port: str, protocol: str, expected: str) -> None:
    assert names.port_hash(service_port, protocol) == expected


@pytest.mark.parametrize(
    ("service_port", "protocol", "endpoint", "expected"),
    [
        ("ns1/svc1:p80", "tcp", "10.180.0.1:80", "KUBE-SEP-SXIVWICOYRO3J4NJ"),
        ("ns4/svc4:p80", "tcp", "10.180.0.5:80", "KUBE-SEP-C6EBXVWJJZMIWKLZ"),
    ],
)
def test_an_endpoints_chain_is_kube_proxys(service_port: str, protocol: str, endpoint: str, expected: str) -> None:
    assert names.endpoint_chain(service_port, protocol, endpoint) == expected


@given(st.text())
def test_the_hash_is_base_32(text: str) -> None:
    """Invariant: it is what the standard library would make of it."""
    assert names.hashed(text) == base64.b32encode(hashlib.sha256(text.encode()).digest())[:16].decode()


@pytest.mark.parametrize(
    ("table", "chain"),
    [
        ("nat", "KUBE-SVC-NPX46M4PTMTKRN6Y"),
        ("nat", "KUBE-SEP-SXIVWICOYRO3J4NJ"),
        ("nat", "KUBE-FW-NPX46M4PTMTKRN6Y"),
        ("filter", "KUBE-FW-NPX46M4PTMTKRN6Y"),
        ("filter", "KUBE-CIP-REJECT"),
        ("filter", "EBPFLB-LOCALITY"),
        ("mangle", "KUBE-PROXY-CANARY"),
    ],
)
def test_our_chains_are_known_by_their_names(table: str, chain: str) -> None:
    assert names.is_ours(table, chain)


@pytest.mark.parametrize(
    ("table", "chain"),
    [
        ("filter", "KUBE-FIREWALL"),  # kubelet's
        ("mangle", "KUBE-IPTABLES-HINT"),
        ("mangle", "KUBE-KUBELET-CANARY"),
        ("nat", "KUBE-MARK-DROP"),
        ("filter", "KUBE-SVC-NPX46M4PTMTKRN6Y"),  # in another table than ours
        ("filter", "KUBE-ROUTER-INPUT"),
        ("nat", "PREROUTING"),
        ("raw", "KUBE-SERVICES"),
        ("filter", "EBPFLB-IPVS"),
    ],
)
def test_other_peoples_chains_are_left_alone(table: str, chain: str) -> None:
    assert not names.is_ours(table, chain)


def test_names_fit_into_the_kernel() -> None:
    """XT_EXTENSION_MAXNAMELEN is 29 with its end, and a list of `recent` has the name of its chain."""
    assert all(len(each + names.hashed("x")) <= 28 for each in (names.SVC, names.SEP, names.CIP, names.EXT, names.FW))
