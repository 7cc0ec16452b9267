"""Options to Config: what is accepted, what it comes to, and the one line that a wrong one is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ebpflb.config import (
    ALGORITHMS,
    DATAPLANES,
    GREATEST_TABLE,
    LEAST_TABLE,
    ApiServer,
    Bind,
    Config,
    Conntrack,
    Ipvs,
    LogFormat,
    LogLevel,
)
from ebpflb.config.durations import Duration
from ebpflb.config.options import Options, configure
from ebpflb.dataplane.bpf.maglev import SIZES
from ebpflb.dataplane.limits import ALGORITHMS as HAD
from ebpflb.errors import UserError
from ebpflb.model import DetectLocal
from ebpflb.routes import Algorithm


def config(need_source: bool = False, hostname: str = "node-1", **options: Any) -> Config:
    return configure(Options(**options), hostname=hostname, need_source=need_source)


def refusal(need_source: bool = False, hostname: str = "node-1", **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        config(need_source, hostname, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults() -> None:
    found = config()
    assert found.node_name == "node-1"
    assert found.dataplane == "auto"
    assert found.bpffs == "/sys/fs/bpf/ebpflb"
    assert found.cgroup == ""
    assert found.log_format is LogFormat.TEXT
    assert found.log_level is LogLevel.INFO
    assert found.proxy.detect_local is DetectLocal.CLUSTER_CIDR
    assert found.proxy.nodeport_addresses == ()
    assert found.proxy.localhost_nodeports


def test_manifests_are_a_directory(tmp_path: Path) -> None:
    assert config(need_source=True, manifests=str(tmp_path)).manifests == str(tmp_path)


def test_a_relative_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon may be asked about it from elsewhere."""
    (tmp_path / "manifests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert config(need_source=True, manifests="manifests").manifests == str(tmp_path / "manifests")


def test_no_source_says_which_option_to_give() -> None:
    assert "--manifests DIR" in refusal(need_source=True)


def test_in_a_pod_its_service_account_is_the_source() -> None:
    found = configure(Options(), hostname="node-1", in_cluster=True)
    assert found.api == ApiServer()
    assert (found.manifests, found.state_dir) == ("", "/var/lib/ebpflb")


def test_a_kubeconfig_is_a_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("")
    monkeypatch.chdir(tmp_path)
    assert config(need_source=True, kubeconfig="config").api == ApiServer(kubeconfig=str(tmp_path / "config"))
    assert refusal(need_source=True, kubeconfig="other") == f"--kubeconfig {tmp_path}/other: there is no such file"
    assert "is a directory" in refusal(need_source=True, kubeconfig=str(tmp_path))


def test_a_command_that_reads_no_source_minds_no_kubeconfig() -> None:
    assert config(kubeconfig="/nowhere/at/all").api is None


def test_api_servers_are_tried_in_the_given_order_each_once() -> None:
    urls = ("https://10.0.0.2:6443/", "https://10.0.0.1:6443", "https://10.0.0.2:6443", "http://[::1]:8001/prefix")
    found = config(need_source=True, apiserver=urls).api
    assert found is not None
    assert found.addresses == ("https://10.0.0.2:6443", "https://10.0.0.1:6443", "http://[::1]:8001/prefix")


@pytest.mark.parametrize(
    "url",
    ["10.0.0.1", "10.0.0.1:6443", "ftp://10.0.0.1", "https://", "https://a:99999", "https://a:0", "https://u:p@a",
     "https://a?x=1", "https://a b", "https://[fd00::1", ""],
)  # fmt: skip
def test_a_wrong_url_is_answered_with_a_right_one(url: str) -> None:
    text = refusal(need_source=True, apiserver=(url,))
    assert text.startswith(f"--apiserver {url}")
    assert text.endswith("write such as https://10.0.0.1:6443")


@pytest.mark.parametrize("other", [{"kubeconfig": "/x"}, {"apiserver": ("https://a",)}])
def test_there_is_one_source(tmp_path: Path, other: dict[str, Any]) -> None:
    text = refusal(need_source=True, manifests=str(tmp_path), **other)
    assert text == f"--manifests and --{next(iter(other))} are two sources of Services: give one of them"


def test_manifests_leave_the_kernels_settings_alone(tmp_path: Path) -> None:
    found = config(need_source=True, manifests=str(tmp_path))
    assert (found.conntrack, found.oom_score_adj, found.state_dir) == (None, None, "")


def test_a_cluster_has_kube_proxys_settings() -> None:
    found = config(need_source=True, apiserver=("https://10.0.0.1",))
    assert (found.conntrack, found.oom_score_adj) == (Conntrack(), -999)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("0.0.0.0:10256", Bind("0.0.0.0", 10256)),
        ("127.0.0.1", Bind("127.0.0.1", 10256)),
        ("[::]:1", Bind("::", 1)),
        ("[FD00:0::1]:65535", Bind("fd00::1", 65535)),
        ("fd00::1", Bind("fd00::1", 10256)),
        ("", None),
    ],
)
def test_servers_are_where_they_are_put(text: str, want: Bind | None) -> None:
    assert config(healthz_bind_address=text).healthz == want


@pytest.mark.parametrize(
    "text", ["localhost:10256", ":10256", "10256", "0.0.0.0:x", "0.0.0.0:0", "0.0.0.0:65536", "fd00::1:70000:9:9:9:9:9",
             "[fe80::1%eth0]:1", "0.0.0.0:", "[::]", "1.2.3.4:5:6", "0.0.0.0:+5"]
)  # fmt: skip
def test_where_no_server_can_be(text: str) -> None:
    said = refusal(healthz_bind_address=text)
    assert said.startswith(f"--healthz-bind-address {text}")
    assert 'or "" for no such server' in said or 'write "" for no such server' in said


def test_a_missing_directory_is_named() -> None:
    assert refusal(need_source=True, manifests="/nowhere/at/all").startswith("--manifests /nowhere/at/all: there is no")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "web.yaml"
    path.write_text("")
    assert "is not a directory" in refusal(need_source=True, manifests=str(path))


def test_a_wrong_cgroup_is_named() -> None:
    assert "--cgroup /nowhere" in refusal(cgroup="/nowhere")


@pytest.mark.parametrize(
    ("hostname", "given", "name"),
    [("Node-1.Example", None, "node-1.example"), ("x", " Worker-A ", "worker-a"), ("x", "w", "w")],
)
def test_node_names_are_trimmed_and_lowered_as_by_the_kubelet(hostname: str, given: str | None, name: str) -> None:
    assert config(hostname=hostname, node_name=given).node_name == name


def test_an_empty_node_name_is_refused() -> None:
    assert "--node-name" in refusal(node_name="  ")


@pytest.mark.parametrize("word", ["auto", "native", "generic", "off"])
def test_modes_of_xdp(word: str) -> None:
    assert config(xdp=word).xdp == word
    assert config().xdp == "auto"


@pytest.mark.parametrize("name", ["bpf", "ipvs", "iptables"])
def test_a_dataplane_is_asked_for_by_name(name: str) -> None:
    assert config(dataplane=name).dataplane == name


@pytest.mark.parametrize("mode", ["ipvs", "iptables"])
def test_kube_proxys_modes_are_dataplanes(mode: str) -> None:
    assert config(proxy_mode=mode).dataplane == mode
    assert config(proxy_mode=mode, dataplane=mode).dataplane == mode
    assert config(proxy_mode=mode).warnings == config().warnings


@pytest.mark.parametrize("variant", ["auto", "nft", "legacy"])
def test_the_variant_of_iptables(variant: str) -> None:
    assert config(iptables_variant=variant).iptables_variant == variant


def test_what_shapes_rules_and_virtual_servers() -> None:
    found = config(
        masquerade_bit=17,
        ipvs_scheduler="wlc",
        ipvs_exclude_cidrs=("10.9.0.1/16,fd00::/8",),
        ipvs_strict_arp=True,
        ipvs_tcp_timeout=Duration.of(900),
        ipvs_tcpfin_timeout=Duration.of(120),
        ipvs_udp_timeout=Duration.of(300),
    )
    assert found.masquerade_bit == 17
    assert found.ipvs == Ipvs(
        scheduler="wlc",
        exclude_cidrs=("10.9.0.0/16", "fd00::/8"),
        strict_arp=True,
        tcp_timeout=900,
        tcp_fin_timeout=120,
        udp_timeout=300,
    )
    assert (config().masquerade_bit, config().ipvs, config().iptables_variant) == (14, Ipvs(), "auto")


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        ({"iptables_variant": "ebtables"}, "--iptables-variant ebtables is unknown; choose one of auto, nft, legacy"),
        ({"masquerade_bit": 32}, "--iptables-masquerade-bit 32: a mark has the bits 0 to 31"),
        ({"ipvs_scheduler": "round robin"}, "--ipvs-scheduler round robin is no scheduler"),
        ({"ipvs_scheduler": "a_name_of_sixteen"}, "--ipvs-scheduler a_name_of_sixteen is no scheduler"),
        ({"ipvs_exclude_cidrs": ("10.9.0.1",)}, "--ipvs-exclude-cidrs 10.9.0.1: a CIDR is address/bits"),
        ({"ipvs_udp_timeout": Duration(-1)}, "--ipvs-udp-timeout -1ns: give at least 0s"),
        ({"maglev_table_size": 1020}, "--maglev-table-size 1020: give a number of positions from 1021 to 131071"),
        ({"maglev_table_size": 131072}, "--maglev-table-size 131072: give a number of positions from 1021"),
        ({"algorithm": "mh"}, "--algorithm mh is unknown; choose one of random, maglev, round-robin, least-conn"),
    ],
)
def test_what_no_kernel_could_do(options: dict[str, Any], begins: str) -> None:
    assert refusal(**options).startswith(begins)


def test_how_backends_are_chosen() -> None:
    found = config(algorithm="maglev", maglev_table_size=16384)
    assert (found.proxy.default_algorithm, found.maglev_table_size) == ("maglev", 16384)
    assert (config().proxy.default_algorithm, config().maglev_table_size) == ("random", 131071)
    assert config().maglev_table_size == max(SIZES.values()) == GREATEST_TABLE
    assert config(maglev_table_size=LEAST_TABLE).maglev_table_size == min(SIZES.values())


def test_algorithms_go_by_the_names_that_annotations_have() -> None:
    labels = {algorithm.label for algorithm in Algorithm}
    assert set(ALGORITHMS) == labels
    assert {name: set(had) <= labels for name, had in HAD.items()} == dict.fromkeys(DATAPLANES, True)


@pytest.mark.parametrize(
    "options",
    [
        {"xdp": "off"},
        {"xdp": "auto"},
        {"dataplane": "auto"},
        {"dataplane": "bpf"},
        {"healthz_bind_address": "", "metrics_bind_address": ""},
        {"healthz_bind_address": "0.0.0.0:10256", "metrics_bind_address": "127.0.0.1:10249"},
    ],
)
def test_neutral_values_are_accepted(options: dict[str, Any]) -> None:
    config(**options)


def test_nftables_is_refused_clearly() -> None:
    assert "no nftables dataplane" in refusal(proxy_mode="nftables")


@pytest.mark.parametrize(
    "options",
    [{"dataplane": "xdp"}, {"proxy_mode": "userspace"}, {"xdp": "fast"}, {"log_format": "xml"}, {"log_level": "loud"}],
)
def test_unknown_words_are_answered_with_the_known_ones(options: dict[str, Any]) -> None:
    text = refusal(**options)
    assert str(next(iter(options.values()))) in text
    assert "choose" in text or "use" in text


def test_two_words_for_the_dataplane_must_agree() -> None:
    assert "disagree" in refusal(dataplane="bpf", proxy_mode="ipvs")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (("10.0.0.0/8,192.168.0.0/16",), ("10.0.0.0/8", "192.168.0.0/16")),
        (("10.0.0.0/8", "fd00::/8"), ("10.0.0.0/8", "fd00::/8")),
        (("10.1.2.3/8", " 10.0.0.0/8 ", ""), ("10.0.0.0/8",)),
        (("FD00:0::1/64",), ("fd00::/64",)),
        (("10.0.0.1/32",), ("10.0.0.1/32",)),
    ],
)
def test_cidrs_are_split_masked_and_written_canonically(given: tuple[str, ...], found: tuple[str, ...]) -> None:
    assert config(cluster_cidr=given).proxy.cluster_cidrs == found
    assert config(nodeport_addresses=given).proxy.nodeport_addresses == found


@pytest.mark.parametrize("text", ["10.0.0.0", "10.0.0.0/33", "ten/8", "10.0.0.256/24", "fd00::/129", "fd00::1"])
def test_a_wrong_cidr_is_named_with_its_option(text: str) -> None:
    assert refusal(cluster_cidr=(text,)).startswith(f"--cluster-cidr {text}")
    assert refusal(nodeport_addresses=(text,)).startswith(f"--nodeport-addresses {text}")


def test_an_address_without_bits_is_answered_with_the_cidr_meant() -> None:
    assert "10.0.0.1/32" in refusal(cluster_cidr=("10.0.0.1",))
    assert "fd00::1/128" in refusal(cluster_cidr=("fd00::1",))


def test_primary_is_a_word_of_its_own() -> None:
    found = config(nodeport_addresses=("primary",)).proxy
    assert found.nodeport_primary
    assert found.nodeport_addresses == ()
    assert "stands alone" in refusal(nodeport_addresses=("primary,10.0.0.0/8",))


@pytest.mark.parametrize(
    ("mode", "companion"),
    [
        ("ClusterCIDR", {"cluster_cidr": ("10.0.0.0/8",)}),
        ("BridgeInterface", {"pod_bridge_interface": "cni0"}),
        ("InterfaceNamePrefix", {"pod_interface_name_prefix": "veth"}),
        ("NodeCIDR", {}),
    ],
)
def test_detect_local_modes_need_their_companions(mode: str, companion: dict[str, Any]) -> None:
    assert config(detect_local_mode=mode, **companion).warnings == ()
    if companion:
        (warning,) = config(detect_local_mode=mode).warnings
        assert mode in warning


def test_an_unknown_detect_local_mode_is_answered_with_the_known_ones() -> None:
    assert "BridgeInterface" in refusal(detect_local_mode="clustercidr")


@pytest.mark.parametrize("name", ["a-name-that-is-too-long", "brückenbrücke-0", "with space", "with/slash"])
def test_interfaces_have_names(name: str) -> None:
    assert name in refusal(pod_bridge_interface=name)


def test_devices_are_names_or_patterns() -> None:
    assert config(devices=("eth0,ens*", "eth0")).devices == ("ens*", "eth0")
    assert "--devices /dev/eth0" in refusal(devices=("/dev/eth0",))


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({"verbosity": 2}, LogLevel.INFO),
        ({"verbosity": 5}, LogLevel.DEBUG),
        ({"verbosity": 5, "log_level": "error"}, LogLevel.ERROR),
        ({"log_level": "warning"}, LogLevel.WARNING),
    ],
)
def test_log_levels(options: dict[str, Any], level: LogLevel) -> None:
    assert config(**options).log_level is level


@pytest.mark.parametrize(
    "options",
    [
        {"audit_period": 0.5},
        {"audit_period": float("nan")},
        {"min_sync_period": -1.0},
        {"min_sync_period": float("inf")},
    ],
)
def test_periods_are_sane(options: dict[str, Any]) -> None:
    assert "give seconds" in refusal(**options)


def test_an_empty_bpffs_is_refused() -> None:
    assert "--bpffs is empty" in refusal(bpffs="")


@pytest.mark.parametrize("path", ["pins", "./pins", "sys/fs/bpf/ebpflb"])
def test_a_relative_bpffs_is_refused(path: str) -> None:
    assert refusal(bpffs=path).startswith(f"--bpffs {path} is a relative path; give a directory in a BPF file system")


def test_bpffs_in_its_shortest_form() -> None:
    assert config(bpffs="/sys/fs/bpf/../bpf/x/").bpffs == "/sys/fs/bpf/x"
