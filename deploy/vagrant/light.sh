#!/bin/sh
# `make vm`: provisions one node in a machine that shows another's files (tests/vm/machine.py), most of them read only.
#
# Here, as in such a machine, the checkout is given a layer that what is written goes to, and that nobody else sees: the
# checkout itself stays as it is. Then as with Vagrant. An emulated machine is some fifteen times slower.
set -eu

if [ "${1:-}" != inside ]; then
	exec unshare --mount --propagation private "$0" inside
fi
checkout=$(cd "$(dirname "$0")/../.." && pwd)
layer=$(mktemp -d)
mkdir "$layer/upper" "$layer/work"
mount -t overlay overlay -o "lowerdir=$checkout,upperdir=$layer/upper,workdir=$layer/work" "$checkout"
export EBPFLB_CHECKOUT="$checkout" EBPFLB_VAGRANT_TESTS="${EBPFLB_VAGRANT_TESTS:-quick}"
export EBPFLB_VAGRANT_PATIENCE="${EBPFLB_VAGRANT_PATIENCE:-30}"
# The directory that this shell is in is still the lower one.
cd "$checkout"
exec sh deploy/vagrant/provision.sh node
