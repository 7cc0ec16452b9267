#!/bin/sh
# Makes a fresh Debian, as root, into what the Vagrantfile calls it: provision.sh node|control-plane|worker
#
# A node is set up from the checkout as README.md says, tells the demo's story and runs the tests. The others are
# kubeadm.sh's. A second run does again what is quick, and only what is missing of the rest.
#
#   EBPFLB_CHECKOUT          where the checkout is; /vagrant
#   EBPFLB_VAGRANT_TESTS     all, quick or none; all. Quick ones show that this kernel holds what it is told
#   EBPFLB_VAGRANT_PATIENCE  how many times slower than a usual machine this one is; 1
set -eu

role=${1:-node}
checkout=${EBPFLB_CHECKOUT:-/vagrant}
tests=${EBPFLB_VAGRANT_TESTS:-all}
patience=${EBPFLB_VAGRANT_PATIENCE:-1}

say() { printf 'provision: %s\n' "$*"; }
die() { printf 'provision: %s\n' "$*" >&2; exit 1; }

case $role in node | control-plane | worker) ;; *) die "$role is no role: node, control-plane or worker" ;; esac
[ -e "$checkout/Makefile" ] || die "$checkout is no checkout of ebpflb: EBPFLB_CHECKOUT says where it is"
case $tests in all | quick | none) ;; *) die "EBPFLB_VAGRANT_TESTS=$tests: write all, quick or none" ;; esac
[ "$(id -u)" = 0 ] || die 'needs root'
cd "$checkout"

# What the README asks a bare machine to have.
bare() {
	if ! command -v make >/dev/null || ! command -v git >/dev/null || [ ! -d /etc/ssl/certs ]; then
		say 'installing make, git and ca-certificates'
		apt-get update -q
		DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends make git ca-certificates
	fi
}

node() {
	say "this is $(uname -sr), $(sed -n 's/^PRETTY_NAME="\(.*\)"$/\1/p' /etc/os-release)"
	bare
	say 'make setup'
	make setup
	say 'ebpflb check: what this kernel offers'
	.venv/bin/ebpflb check
	say 'make demo'
	make demo DEMO="--patience $patience"
	case $tests in
	all) say 'make test'; make test ;;
	quick)
		say 'some tests: of what is programmed into this kernel'
		.venv/bin/python -m pytest -p no:cacheprovider -m 'root or bpf_load' \
			tests/unit/test_rtnetlink.py tests/bpf/test_syscall.py \
			tests/unit/test_ctnetlink.py::test_an_endpoint_goes_and_its_clients_follow
		;;
	none) say 'no tests: EBPFLB_VAGRANT_TESTS=none' ;;
	esac
	say "done: $checkout/.venv/bin/ebpflb is ready"
}

case $role in
node) node ;;
*) exec deploy/vagrant/kubeadm.sh "$role" ;;
esac
