"""The configuration file: kube-proxy's as it is found on nodes, and ours; read, refused, written back and watched."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import yaml

from ebpflb.config import ApiServer, Bind, Config, Conntrack, Ipvs, LogFormat, LogLevel
from ebpflb.config import document as config_document
from ebpflb.config import file as config_file
from ebpflb.config.options import Options, configure
from ebpflb.errors import UserError
from ebpflb.model import DetectLocal

# What `kubeadm init --pod-network-cidr` writes into the ConfigMap kube-proxy; KUBECONFIG stands for its kubeconfig.
KUBEADM = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: KUBECONFIG
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""

# A managed cluster's: other formats of the same numbers, IPv6 default addresses, retired fields.
MANAGED = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: "::"
clientConnection:
  acceptContentTypes: ""
  burst: 10
  contentType: application/vnd.kubernetes.protobuf
  kubeconfig: KUBECONFIG
  qps: 5
clusterCIDR: ""
configSyncPeriod: 15m0s
conntrack:
  maxPerCore: 32768
  min: 131072
  tcpCloseWaitTimeout: 1h0m0s
  tcpEstablishedTimeout: 24h0m0s
enableProfiling: false
healthzBindAddress: '[::]:10256'
hostnameOverride: ""
iptables: {masqueradeAll: false, masqueradeBit: 14, minSyncPeriod: 0s, syncPeriod: 30s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: "rr", syncPeriod: 30s}
metricsBindAddress: 0.0.0.0:10249
mode: "iptables"
nodePortAddresses: null
oomScoreAdj: -998
portRange: ""
udpIdleTimeout: 250ms
"""

# A cluster of containers: a node may not change the machine's limits.
CONTAINERS = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: KUBECONFIG}
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
iptables: {minSyncPeriod: 1s}
mode: ""
"""

OURS = "apiVersion: ebpflb/v1\nkind: EbpflbConfiguration\n"
OURS_ON_A_NODE = f"{OURS}apiServers: ['https://10.0.0.1']\n"


@pytest.fixture
def kubeconfig(tmp_path: Path) -> str:
    path = tmp_path / "kubeconfig.conf"
    path.write_text("apiVersion: v1\nkind: Config\n")
    return str(path)


class File:
    """A configuration file, and what comes of it."""

    def __init__(self, path: Path, kubeconfig: str) -> None:
        self.path = path
        self._kubeconfig = kubeconfig

    def write(self, text: str) -> None:
        self.path.write_text(text.replace("KUBECONFIG", self._kubeconfig))

    def config(self, text: str, **options: Any) -> Config:
        self.write(text)
        return configure(Options(config=str(self.path), **options), hostname="node-1")

    def refusal(self, text: str, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            self.config(text, **options)
        said = str(caught.value)
        assert "\n" not in said
        prefix = f"--config {self.path}: "
        assert said.startswith(prefix)
        return said.removeprefix(prefix)


@pytest.fixture
def file(tmp_path: Path, kubeconfig: str) -> File:
    return File(tmp_path / "config.conf", kubeconfig)


# ---- As it is found on nodes ----


def test_a_kubeadm_configuration_starts_unchanged(file: File, kubeconfig: str) -> None:
    found = file.config(KUBEADM)
    assert found.api == ApiServer(kubeconfig=kubeconfig, qps=5.0, burst=10)
    assert found.manifests == ""
    assert found.node_name == "node-1"
    assert found.dataplane == "auto"
    assert found.proxy.cluster_cidrs == ("10.244.0.0/16",)
    assert found.proxy.detect_local is DetectLocal.CLUSTER_CIDR
    assert found.proxy.localhost_nodeports
    assert (found.healthz, found.metrics) == (Bind("0.0.0.0", 10256), Bind("127.0.0.1", 10249))
    assert found.conntrack == Conntrack()
    assert found.oom_score_adj == -999
    assert (found.min_sync_period, found.audit_period, found.health_timeout) == (0.01, 30.0, 60.0)
    assert found.state_dir == "/var/lib/ebpflb"
    assert found.file == str(file.path)
    assert found.warnings == ()


def test_a_managed_clusters_configuration_starts_unchanged_and_its_mode_is_told(file: File) -> None:
    """It asks for iptables, which whoever brings it along may not know."""
    found = file.config(MANAGED)
    assert found.dataplane == "iptables"
    assert (found.healthz, found.metrics) == (Bind("::", 10256), Bind("0.0.0.0", 10249))
    assert found.oom_score_adj == -998
    (_, mode) = found.warnings
    assert mode.startswith(f"--config {file.path}: mode iptables: ") and "--dataplane auto" in mode
    found = file.config(MANAGED, dataplane="auto")
    assert found.dataplane == "auto"
    assert len(found.warnings) == 1 and "pods are not told from other clients" in found.warnings[0]


def test_a_node_that_is_a_container_leaves_the_machines_limits_alone(file: File) -> None:
    found = file.config(CONTAINERS)
    assert found.conntrack is None
    assert found.proxy.cluster_cidrs == ("10.244.0.0/16", "fd00:10:244::/56")
    assert found.warnings == ()


def test_a_bind_address_of_ipv6_puts_the_servers_there(file: File) -> None:
    found = file.config(KUBEADM.replace("bindAddress: 0.0.0.0", 'bindAddress: "::"'))
    assert (found.healthz, found.metrics) == (Bind("::", 10256), Bind("::1", 10249))


def test_json_is_read_too(file: File) -> None:
    document = yaml.safe_load(KUBEADM)
    assert file.config(msgspec.json.encode(document).decode()).proxy.cluster_cidrs == ("10.244.0.0/16",)


# ---- What each field comes to ----

FIELDS: dict[str, tuple[str, str, object]] = {
    "hostnameOverride": ("hostnameOverride: ' Node-7 '", "node_name", "node-7"),
    "qps and burst": (
        "clientConnection: {kubeconfig: KUBECONFIG, qps: 50.5, burst: 100}\n#", "api.qps", 50.5
    ),
    "healthz, an address alone": ("healthzBindAddress: 127.0.0.1", "healthz", Bind("127.0.0.1", 10256)),
    "healthz, an IPv6 address alone": ("healthzBindAddress: 'fd00::1'", "healthz", Bind("fd00::1", 10256)),
    "metrics, IPv6": ("metricsBindAddress: '[::]:9999'", "metrics", Bind("::", 9999)),
    "healthz off": ("healthzBindAddress: 'off'", "healthz", None),
    "bindAddressHardFail": ("bindAddressHardFail: true", "bind_hard_fail", True),
    "masqueradeAll": ("iptables: {masqueradeAll: true}", "proxy.masquerade_all", True),
    "localhostNodePorts": ("iptables: {localhostNodePorts: false}", "proxy.localhost_nodeports", False),
    "syncPeriod is how often the kernel is read back": ("iptables: {syncPeriod: 1m30s}", "audit_period", 90.0),
    "two periods without a sync are unhealthy": ("iptables: {syncPeriod: 1m30s}", "health_timeout", 180.0),
    "a syncPeriod below a second": ("iptables: {syncPeriod: 100ms}", "audit_period", 1.0),
    "detectLocalMode": ("detectLocalMode: NodeCIDR", "proxy.detect_local", DetectLocal.NODE_CIDR),
    "detectLocal": ("detectLocal: {bridgeInterface: cni0}", "proxy.bridge_interface", "cni0"),
    "nodePortAddresses": ("nodePortAddresses: [10.1.2.3/8]", "proxy.nodeport_addresses", ("10.0.0.0/8",)),
    "nodePortAddresses primary": ("nodePortAddresses: [primary]", "proxy.nodeport_primary", True),
    "oomScoreAdj": ("oomScoreAdj: 0", "oom_score_adj", 0),
    "logging.format": ("logging: {format: json}", "log_format", LogFormat.JSON),
    "logging.verbosity": ("logging: {verbosity: 5}", "log_level", LogLevel.DEBUG),
    "conntrack": (
        "conntrack: {maxPerCore: 1000, min: 2, tcpEstablishedTimeout: 2h, tcpCloseWaitTimeout: 0s, "
        "tcpBeLiberal: true, udpTimeout: 30s, udpStreamTimeout: 2m30s}",
        "conntrack",
        Conntrack(
            max_per_core=1000, least=2, tcp_established=7200, tcp_close_wait=None, tcp_be_liberal=True, udp=30,
            udp_stream=150,
        ),
    ),
    "dataplane": ("dataplane: bpf", "dataplane", "bpf"),
    "dataplane iptables": ("dataplane: iptables", "dataplane", "iptables"),
    "dataplane ipvs": ("dataplane: ipvs", "dataplane", "ipvs"),
    "mode": ("mode: ipvs", "dataplane", "ipvs"),
    "iptablesVariant": ("iptablesVariant: legacy", "iptables_variant", "legacy"),
    "masqueradeBit": ("iptables: {masqueradeBit: 17}", "masquerade_bit", 17),
    "masqueradeBit in mode ipvs": ("mode: ipvs\niptables: {masqueradeBit: 17}", "masquerade_bit", 17),
    "masqueradeBit in mode nftables": (
        "mode: nftables\ndataplane: auto\nnftables: {masqueradeBit: 18}", "masquerade_bit", 18
    ),
    "ipvs": (
        "ipvs: {scheduler: mh, excludeCIDRs: [10.9.0.1/16], strictARP: true, tcpTimeout: 15m, tcpFinTimeout: 2m, "
        "udpTimeout: 1500ms}",
        "ipvs",
        Ipvs(
            scheduler="mh", exclude_cidrs=("10.9.0.0/16",), strict_arp=True, tcp_timeout=900, tcp_fin_timeout=120,
            udp_timeout=1,
        ),
    ),
    "minSyncPeriod of kube-proxy": ("mode: iptables\niptables: {minSyncPeriod: 2s}", "min_sync_period", 2.0),
    "minSyncPeriod of kube-proxy's other mode": ("mode: ipvs\nipvs: {minSyncPeriod: 3s}", "min_sync_period", 3.0),
    "minSyncPeriod where nobody asked for iptables": ("iptables: {minSyncPeriod: 2s}", "min_sync_period", 0.01),
    "dataplane before mode": ("dataplane: auto\nmode: nftables", "dataplane", "auto"),
    "apiServers": (
        "apiServers: ['https://10.0.0.1:6443/', 'https://[fd00::1]:6443']",
        "api.addresses",
        ("https://10.0.0.1:6443", "https://[fd00::1]:6443"),
    ),
    "bpffs": ("bpffs: /sys/fs/bpf/other/", "bpffs", "/sys/fs/bpf/other"),
    "devices": ("devices: [ens*, eth0]", "devices", ("ens*", "eth0")),
    "stateDir": ("stateDir: /run/x", "state_dir", "/run/x"),
    "nothing is remembered": ("stateDir: ''", "state_dir", ""),
    "minSyncPeriod": ("minSyncPeriod: 250ms", "min_sync_period", 0.25),
    "auditPeriod": ("auditPeriod: 2m", "audit_period", 120.0),
    "healthTimeout": ("healthTimeout: 90s", "health_timeout", 90.0),
    "serviceMetrics": ("serviceMetrics: 100", "service_metrics", 100),
    "logLevel": ("logLevel: warning", "log_level", LogLevel.WARNING),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_reaches_what_it_is_for(file: File, case: str) -> None:
    text, path, want = FIELDS[case]
    client = "" if "clientConnection" in text else "clientConnection: {kubeconfig: KUBECONFIG}\n"
    found: object = file.config(f"{OURS}{client}{text}\n")
    for name in path.split("."):
        found = getattr(found, name)
    assert found == want


def test_manifests_and_cgroup_are_directories(file: File, tmp_path: Path) -> None:
    found = file.config(f"{OURS}manifests: {tmp_path}\ncgroup: {tmp_path}\n")
    assert (found.manifests, found.cgroup, found.api) == (str(tmp_path), str(tmp_path), None)


def test_where_manifests_are_the_source_the_kernels_settings_are_left_alone(file: File, tmp_path: Path) -> None:
    found = file.config(f"{OURS}manifests: {tmp_path}\n")
    assert (found.conntrack, found.oom_score_adj, found.state_dir) == (None, None, "")
    found = file.config(f"{OURS}manifests: {tmp_path}\noomScoreAdj: -5\nconntrack: {{tcpEstablishedTimeout: 1h}}\n")
    assert found.oom_score_adj == -5
    assert found.conntrack == Conntrack(max_per_core=0, tcp_established=3600, tcp_close_wait=None)


def test_the_mode_decides_whose_part_counts_as_in_kube_proxy(file: File) -> None:
    text = KUBEADM.replace('mode: ""', "mode: nftables").replace(
        "nftables:\n  masqueradeAll: false", "nftables:\n  masqueradeAll: true"
    )
    assert file.config(text, dataplane="bpf").proxy.masquerade_all
    assert not file.config(text.replace("mode: nftables", "mode: ipvs"), dataplane="bpf").proxy.masquerade_all


# ---- What means nothing here ----


def test_what_means_nothing_here_is_named_in_one_warning(file: File) -> None:
    text = KUBEADM.replace("strictARP: false", "strictARP: true").replace('portRange: ""', "portRange: 1-2")
    text = text.replace("masqueradeBit: null\n  minSyncPeriod: 0s\n  syncPeriod: 0s\nipvs", "masqueradeBit: 17\nipvs")
    text = text.replace('networkName: ""', "networkName: x").replace("enableProfiling: false", "enableProfiling: true")
    text = text.replace("bindAddress: 0.0.0.0", "bindAddress: 10.0.0.7").replace(
        "configSyncPeriod: 0s", "configSyncPeriod: 1m"
    )
    text += "featureGates: {KubeProxyDrainingTerminatingNodes: true}\nresourceContainer: /x\n"
    (warning,) = file.config(text).warnings
    assert warning == (
        f"--config {file.path}: without meaning for ebpflb: bindAddress, "
        "featureGates.KubeProxyDrainingTerminatingNodes, enableProfiling, "
        "winkernel, configSyncPeriod, portRange, resourceContainer"
    )


OF_OTHERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "bpf marks nothing": (
        {"dataplane": "bpf"}, "iptables: {masqueradeBit: 17}\nnftables: {masqueradeBit: 18}",
        "iptables.masqueradeBit, nftables.masqueradeBit",
    ),
    "bpf has no virtual servers": (
        {"dataplane": "bpf"}, "ipvs: {strictARP: true, scheduler: lc, tcpTimeout: 1m, minSyncPeriod: 5s}",
        "ipvs.minSyncPeriod, ipvs.scheduler, ipvs.strictARP, ipvs.tcpTimeout",
    ),
    "nor has iptables": (
        {"dataplane": "iptables"}, "ipvs: {excludeCIDRs: [10.0.0.0/8], udpTimeout: 1m, tcpFinTimeout: 1m}",
        "ipvs.excludeCIDRs, ipvs.tcpFinTimeout, ipvs.udpTimeout",
    ),
    "auto may come to any": (
        {"dataplane": "auto"},
        "iptables: {masqueradeBit: 17, minSyncPeriod: 5s}\nipvs: {scheduler: lc, strictARP: true}",
        "iptables.minSyncPeriod",
    ),
    "the mode that is asked for": (
        {"dataplane": "ipvs"}, "iptables: {masqueradeBit: 17}\nipvs: {scheduler: lc, minSyncPeriod: 5s}", ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_OTHERS)
def test_what_concerns_another_dataplane_only_is_named(file: File, case: str) -> None:
    options, text, want = OF_OTHERS[case]
    found = file.config(f"{CONTAINERS.replace('iptables: {minSyncPeriod: 1s}', text)}", **options)
    assert found.warnings == ((f"--config {file.path}: without meaning for ebpflb: {want}",) if want else ())


def test_what_the_client_speaks_on_the_wire_is_nobodys_worry(file: File) -> None:
    text = KUBEADM.replace('contentType: ""', "contentType: application/vnd.kubernetes.protobuf")
    assert file.config(text).warnings == ()


# ---- What is refused ----

WRONG: dict[str, tuple[str, str, str]] = {
    "a misspelt field is named with what was meant": (
        "maxPerCore: null", "maxPerCor: 5", 'conntrack.maxPerCor: unknown field, did you mean "conntrack.maxPerCore"?'
    ),
    "a field in other case": (
        "clusterCIDR:", "clusterCidr:", 'clusterCidr: unknown field, did you mean "clusterCIDR"?'
    ),
    "a field in the wrong place": (
        'portRange: ""', "localhostNodePorts: false",
        'localhostNodePorts: unknown field, did you mean "iptables.localhostNodePorts"?',
    ),
    "a field that is no field, without a value": ('portRange: ""', "fnord: null", "fnord: unknown field; take it out"),
    "a field of the other kind": (
        'portRange: ""', "dataplane: bpf",
        "dataplane: unknown field: KubeProxyConfiguration has none of that name; "
        "write apiVersion ebpflb/v1 and kind EbpflbConfiguration",
    ),
    "the same field twice": ('portRange: ""', 'mode: ""', 'line 61, column 1: not YAML: key "mode" already set in map'),
    "text for a number": ("oomScoreAdj: null", 'oomScoreAdj: "-5"', "oomScoreAdj: expected an integer, got a string"),
    "a number for text": ('hostnameOverride: ""', "hostnameOverride: 12",
        "hostnameOverride: expected a string, got an integer"),
    "text for true or false": ("strictARP: false", "strictARP: 'no'",
        "ipvs.strictARP: expected true or false, got a string"),
    "a field for fields": ("detectLocalMode", "iptabels: {}\ndetectLocalMode",
        'iptabels: unknown field, did you mean "iptables"?'),
    "one for a list": ("nodePortAddresses: null", "nodePortAddresses: primary",
        "nodePortAddresses: expected a list, got a string"),
    "a number that is too large": ("burst: 0", "burst: 9999999999",
        "clientConnection.burst: expected a number of at most 2147483647"),
    "a number below zero": ("maxPerCore: null", "maxPerCore: -1",
        "conntrack.maxPerCore: expected a number of at least 0"),
    "a number for a duration": ("udpTimeout: 0s\ndetect", "udpTimeout: 30\ndetect",
        'conntrack.udpTimeout: expected a duration such as "30s", got a number'),
    "a duration without its unit": ("udpTimeout: 0s\ndetect", 'udpTimeout: "30"\ndetect',
        'conntrack.udpTimeout: "30" is not a duration; did you mean "30s"?'),
    "a duration in another language": ("configSyncPeriod: 0s", "configSyncPeriod: 5 minutes",
        'configSyncPeriod: "5 minutes" is not a duration; write such as "30s", "1h30m" or "250ms"'),
    "a duration below zero": ("udpTimeout: 0s\ndetect", "udpTimeout: -5s\ndetect",
        "conntrack.udpTimeout -5s: give at least 0s, which leaves the kernel's own"),
    "a later version": ("v1alpha1", "v1alpha2",
        "apiVersion kubeproxy.config.k8s.io/v1alpha2 of KubeProxyConfiguration is unknown; "
        "write kubeproxy.config.k8s.io/v1alpha1"),
    "another kind": ("kind: KubeProxyConfiguration", "kind: KubeletConfiguration",
        "kind KubeletConfiguration is not a configuration of ebpflb; write KubeProxyConfiguration or "
        "EbpflbConfiguration"),
    "no kind": ("kind: KubeProxyConfiguration\n", "",
        "kind is missing; write KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1, or EbpflbConfiguration of "
        "ebpflb/v1"),
    "two documents": ("apiVersion: kube", "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n---\n"
        "apiVersion: kube",
        "it holds 2 documents (KubeletConfiguration, KubeProxyConfiguration); "
        "leave one of kind KubeProxyConfiguration or EbpflbConfiguration in a file of its own"),
    "nftables": ('mode: ""', "mode: nftables",
        "mode nftables: ebpflb has no nftables dataplane; leave it empty, or give --dataplane auto"),
    "an unknown mode": ('mode: ""', "mode: userspace",
        "mode userspace is unknown; use --dataplane with one of auto, bpf, ipvs, iptables"),
    "a server's name": ('healthzBindAddress: ""', "healthzBindAddress: localhost:10256",
        "healthzBindAddress localhost:10256 is not an address and a port; "
        "write such as 0.0.0.0:10256 or [::]:10256, or off for no such server"),
    "port 0": ('metricsBindAddress: ""', "metricsBindAddress: 127.0.0.1:0",
        "metricsBindAddress 127.0.0.1:0: a port is a number from 1 to 65535; write off for no such server"),
    "an address for a CIDR": ("nodePortAddresses: null", "nodePortAddresses: [10.0.0.1]",
        "nodePortAddresses 10.0.0.1: a CIDR is address/bits, such as 10.0.0.1/32"),
    "primary among others": ("nodePortAddresses: null", "nodePortAddresses: [primary, 10.0.0.0/8]",
        "nodePortAddresses: `primary` stands alone; give either it or CIDRs"),
    "no address to bind to": ("bindAddress: 0.0.0.0", "bindAddress: node-1",
        "bindAddress node-1 is not an address; write such as 0.0.0.0"),
    "a score that is none": ("oomScoreAdj: null", "oomScoreAdj: -2000",
        "oomScoreAdj -2000: give a number from -1000 to 1000"),
    "a kubeconfig that is not there": ("KUBECONFIG", "/nowhere/kubeconfig.conf",
        "clientConnection.kubeconfig /nowhere/kubeconfig.conf: there is no such file"),
    "a log format": ("verbosity: 0", "format: xml", "logging.format xml is unknown; choose one of text, json"),
    "an IPv6 address without quotes": ('healthzBindAddress: ""', "healthzBindAddress: [::]:10256",
        "line 26, column 22: not YAML: did not find expected node content"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_slip_is_named_with_its_remedy(file: File, case: str) -> None:
    before, after, want = WRONG[case]
    assert before in KUBEADM
    assert file.refusal(KUBEADM.replace(before, after, 1)) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", "it is empty; write a KubeProxyConfiguration"),
        ("# nothing\n---\n", "it is empty"),
        ("- a\n- b\n", "it holds no fields"),
        ("just words", "it holds no fields"),
        ("apiVersion: v1\nkind: ConfigMap\ndata: {config.conf: 'x'}\n", "give what is in it under data, config.conf"),
        ("apiVersion: v1\nkind: ConfigMap\ndata: {1: x}\n", "it is a ConfigMap; give what is in it"),
        ("kind: KubeProxyConfiguration\n", "apiVersion is missing"),
        ("a: {b: [", "not YAML"),
        ("[" * 100_000, "cannot be parsed: it is nested too deeply"),
        (f"{OURS_ON_A_NODE}minSyncPeriod: -1s\n", "minSyncPeriod -1s: give a duration of at least 0s"),
        (f"{OURS_ON_A_NODE}auditPeriod: 100ms\n", "auditPeriod 100ms: give a duration of at least 1s"),
        (f"{OURS}xdp: fast\n", "xdp fast is unknown; choose one of auto, native, generic, off"),
        (f"{OURS_ON_A_NODE}dataplane: nftables\n", "nftables is unknown; choose one of auto, bpf, ipvs, iptables"),
        (f"{OURS_ON_A_NODE}iptablesVariant: nf\n", "iptablesVariant nf is unknown; choose one of auto, nft, legacy"),
        (f"{OURS_ON_A_NODE}iptables: {{masqueradeBit: 32}}\n", "masqueradeBit 32: a mark has the bits 0 to 31"),
        (f"{OURS_ON_A_NODE}ipvs: {{scheduler: a b}}\n", "ipvs.scheduler a b is no scheduler"),
        (f"{OURS_ON_A_NODE}algorithm: best\n", "algorithm best is unknown; choose one of random, maglev"),
        (f"{OURS_ON_A_NODE}maglevTableSize: 0\n", "maglevTableSize 0: give a number of positions from 1021"),
        (f"{OURS_ON_A_NODE}maglevTableSize: big\n", "maglevTableSize"),
        (f"{OURS}apiServers: [10.0.0.1]\n", "apiServers 10.0.0.1 is not a URL of a server"),
        (f"{OURS}manifests: /tmp\napiServers: ['https://a']\n", "manifests and apiServers are two sources"),
        (f"{OURS}manifests: /nowhere\n", "manifests /nowhere: there is no such directory"),
        (f"{OURS_ON_A_NODE}bpffs: pins\n", "bpffs pins is a relative path"),
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_said_to_be_none(file: File, text: str, want: str) -> None:
    assert want in file.refusal(text)


def test_bytes_that_are_no_text(file: File) -> None:
    file.path.write_bytes(b"apiVersion: \xff\n")
    with pytest.raises(UserError, match="line 1: not text in UTF-8"):
        configure(Options(config=str(file.path)), hostname="node-1")


def test_a_file_of_another_kind_of_size(file: File) -> None:
    assert "this is no configuration" in file.refusal("#" * (1 << 20) + "\n")


@pytest.mark.parametrize(("name", "reason"), [("absent", "there is no such file"), ("", "is a directory")])
def test_no_file_at_all(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        configure(Options(config=str(tmp_path / name)), hostname="node-1")


# ---- Options over the file ----

OVER: dict[str, tuple[dict[str, Any], str, object]] = {
    "the node's name": ({"node_name": "other"}, "node_name", "other"),
    "no name is not a name": ({"node_name": ""}, "node_name", "node-5"),
    "CIDRs": ({"cluster_cidr": ("fd00::/8",)}, "proxy.cluster_cidrs", ("fd00::/8",)),
    "no CIDRs": ({"cluster_cidr": ("",)}, "proxy.cluster_cidrs", ()),
    "a switch that is on": ({"masquerade_all": False}, "proxy.masquerade_all", False),
    "a server that is not wanted": ({"healthz_bind_address": ""}, "healthz", None),
    "a server elsewhere": ({"metrics_bind_address": "0.0.0.0"}, "metrics", Bind("0.0.0.0", 10249)),
    "the dataplane": ({"dataplane": "auto"}, "dataplane", "auto"),
    "verbosity over a level": ({"verbosity": 6}, "log_level", LogLevel.DEBUG),
    "a level": ({"log_level": "error"}, "log_level", LogLevel.ERROR),
    "the audit": ({"audit_period": 5.0}, "audit_period", 5.0),
    "servers": ({"apiserver": ("https://10.0.0.9",)}, "api.addresses", ("https://10.0.0.9",)),
    "what is remembered": ({"state_dir": ""}, "state_dir", ""),
}


@pytest.mark.parametrize("case", OVER)
def test_an_option_goes_before_the_file(file: File, case: str) -> None:
    options, path, want = OVER[case]
    found: object = file.config(
        OURS + "hostnameOverride: node-5\nclusterCIDR: 10.0.0.0/8\niptables: {masqueradeAll: true}\n"
        "dataplane: bpf\nlogLevel: warning\nauditPeriod: 1m\napiServers: ['https://a', 'https://b']\n",
        **options,
    )
    for name in path.split("."):
        found = getattr(found, name)
    assert found == want


def test_another_source_than_the_files(file: File, tmp_path: Path, kubeconfig: str) -> None:
    found = file.config(KUBEADM, manifests=str(tmp_path))
    assert (found.manifests, found.api) == (str(tmp_path), None)
    found = file.config(f"{OURS}manifests: /nowhere\n", kubeconfig=kubeconfig)
    assert found.manifests == "" and found.api == ApiServer(kubeconfig=kubeconfig)


def test_an_option_that_is_wrong_is_named_rather_than_the_field(file: File) -> None:
    file.write(KUBEADM)
    with pytest.raises(UserError, match=r"^--cluster-cidr ten: "):
        configure(Options(config=str(file.path), cluster_cidr=("ten",)), hostname="node-1")


# ---- Written back ----

WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "kubeadm's": (KUBEADM, {}),
    "a managed cluster's": (MANAGED.replace("udpIdleTimeout: 250ms", ""), {"dataplane": "bpf"}),
    "a container's": (CONTAINERS, {}),
    "one with warnings": (KUBEADM.replace("strictARP: false", "strictARP: true"), {}),
    "with every option": (
        OURS,
        {
            "node_name": "N1", "dataplane": "bpf", "bpffs": "/sys/fs/bpf/x", "devices": ("ens*,eth0",), "xdp": "off",
            "nodeport_addresses": ("primary",), "cluster_cidr": ("10.0.0.0/8", "fd00::/8"),
            "detect_local_mode": "BridgeInterface", "pod_bridge_interface": "cni0", "masquerade_all": True,
            "pod_interface_name_prefix": "veth", "localhost_nodeports": False, "healthz_bind_address": "",
            "metrics_bind_address": "[::1]:9", "apiserver": ("https://10.0.0.1:6443",), "state_dir": "",
            "service_metrics": 5, "log_format": "json", "log_level": "warning", "verbosity": 9,
            "min_sync_period": 0.0, "audit_period": 7.5, "algorithm": "maglev", "maglev_table_size": 4093,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_in_force_reads_back_as_the_same(file: File, tmp_path: Path, case: str) -> None:
    text, options = WRITTEN[case]
    if "kubeconfig" not in text:
        options = {"apiserver": ("https://10.0.0.1:6443",), **options}
    before = file.config(text, **options)
    file.path.write_text(config_file.written(before.document))
    after = configure(Options(config=str(file.path)), hostname="node-1")
    assert after == msgspec.structs.replace(before, file_digest=after.file_digest)


def test_the_document_is_of_plain_values_for_configz(file: File) -> None:
    document = file.config(KUBEADM).document
    assert msgspec.json.decode(msgspec.json.encode(document)) == document
    assert document["conntrack"] == {
        "maxPerCore": 32768, "min": 131072, "tcpEstablishedTimeout": "24h0m0s", "tcpCloseWaitTimeout": "1h0m0s",
        "tcpBeLiberal": False, "udpTimeout": "0s", "udpStreamTimeout": "0s",
    }  # fmt: skip


# ---- Documented ----


def leaves(type_: type[msgspec.Struct]) -> Iterator[str]:
    """The names of all fields that are not made of fields."""
    for field in msgspec.structs.fields(type_):
        inner = [each for each in (field.type, *get_args(field.type)) if isinstance(each, type)]
        structs = [each for each in inner if issubclass(each, msgspec.Struct)]
        if structs:
            yield from leaves(structs[0])
        else:
            yield field.encode_name


def test_every_field_is_in_the_document_on_configuration() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/configuration.md").read_text()
    whole = {"vmodule", "options", "winkernel.*"}
    below = {*leaves(config_document.LogOptions), *leaves(config_document.FileVerbosity)}
    below |= set(leaves(config_document.Winkernel))
    assert all(name in text for name in whole)
    wanted = (set(leaves(config_document.EbpflbConfiguration)) - below) | set(config_document.RETIRED)
    assert [name for name in sorted(wanted) if not re.search(rf"[`.]{name}`", text) and name != "verbosity"] == [
        "apiVersion",
        "kind",
    ]


# ---- Watched ----


def told(watch: config_file.Watch) -> bool:
    """Whether the watch has something to ask, and says that the file has changed."""
    while select.select([watch], [], [], 0)[0]:
        if watch.changed():
            return True
    return False


class Watched:
    """A file in a directory of its own, as a ConfigMap is mounted, and a watch on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "config.conf"
        self._version = 0
        self.switch("one")
        self.path.symlink_to("..data/config.conf")
        self.watch = config_file.Watch(str(self.path))

    def switch(self, text: str) -> None:
        """As the kubelet does: a new directory, and the link moved over."""
        self._version += 1
        new = self.directory / f"..v{self._version}"
        new.mkdir()
        (new / "config.conf").write_text(text)
        link = self.directory / "..tmp"
        link.symlink_to(new.name)
        os.rename(link, self.directory / "..data")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path)
    yield watched
    watched.watch.close()


def test_a_config_map_that_changes_is_noticed(mounted: Watched) -> None:
    assert not told(mounted.watch)
    mounted.switch("two")
    assert told(mounted.watch)


def test_a_config_map_that_is_written_anew_with_the_same_content_is_not(mounted: Watched) -> None:
    mounted.switch("one")
    assert not told(mounted.watch)
    mounted.switch("two")
    assert told(mounted.watch)


@pytest.mark.parametrize("how", ["in place", "moved over", "removed and made again", "behind a link elsewhere"])
def test_a_file_that_changes_is_noticed(tmp_path: Path, how: str) -> None:
    (tmp_path / "etc").mkdir()
    path = tmp_path / "etc" / "config.conf"
    target = tmp_path / "real.conf" if how == "behind a link elsewhere" else path
    target.write_text("one")
    if target != path:
        path.symlink_to(target)
    watch = config_file.Watch(str(path))
    try:
        (path.parent / "other").write_text("two")
        assert not told(watch)
        if how == "moved over":
            (path.parent / "new").write_text("two")
            os.rename(path.parent / "new", path)
        elif how == "removed and made again":
            path.unlink()
            assert not told(watch)
            path.write_text("two")
        else:
            target.write_text("two")
        assert told(watch)
    finally:
        watch.close()


def test_a_change_between_reading_and_watching_is_noticed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.conf"
    path.write_text("two")
    watch = config_file.Watch(str(path), config_file.digest(b"one"))
    try:
        assert watch.changed()
    finally:
        watch.close()
