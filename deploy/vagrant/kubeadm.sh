#!/bin/sh
# One machine of a kubeadm cluster without kube-proxy, whose Services are ebpflb's: kubeadm.sh control-plane|worker
#
# provision.sh calls it. Machine N has the address NETWORK.(10 + N), and its pods are 10.244.N.0/24: a bridge, and a route
# to each other machine. The control plane is N = 0; it builds the image, and hands it to the workers.
set -eu

role=$1
number=$EBPFLB_VAGRANT_NUMBER
workers=$EBPFLB_VAGRANT_WORKERS
network=$EBPFLB_VAGRANT_NETWORK
version=$EBPFLB_VAGRANT_KUBERNETES  # 1.35 is the last whose kubelet runs with the containerd of Debian 13

address=$network.$((10 + number))
control_plane=$network.10
# These machines are reached from their host only, and hold nothing.
token=ebpflb.0123456789abcdef
share=/var/lib/ebpflb-share
patience=$((30 * 60))

say() { printf 'provision: %s\n' "$*"; }
die() { printf 'provision: %s\n' "$*" >&2; exit 1; }

# until_true WHAT COMMAND…: tries again for as long as the slowest download takes.
until_true() {
	what=$1
	shift
	waited=0
	until "$@"; do
		[ "$waited" -lt "$patience" ] || die "waited $((patience / 60)) minutes for $what"
		[ $((waited % 60)) -gt 0 ] || say "waiting for $what"
		sleep 5
		waited=$((waited + 5))
	done
}

install_packages() {
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q
	apt-get install -q -y --no-install-recommends ca-certificates curl
	mkdir -p /etc/apt/keyrings
	packages=https://pkgs.k8s.io/core:/stable:/v$version/deb
	curl -fsS --retry 5 -o /etc/apt/keyrings/kubernetes.asc "$packages/Release.key"
	printf 'deb [signed-by=/etc/apt/keyrings/kubernetes.asc] %s/ /\n' "$packages" >/etc/apt/sources.list.d/kubernetes.list
	apt-get update -q
	apt-get install -q -y --no-install-recommends containerd kubeadm kubelet kubectl nftables
}

set_up_kubelet() {
	swapoff -a
	sed -i '/\sswap\s/s/^[^#]/#&/' /etc/fstab
	printf 'overlay\nbr_netfilter\n' >/etc/modules-load.d/kubernetes.conf
	modprobe -a overlay br_netfilter
	printf 'net.ipv4.ip_forward = 1\n' >/etc/sysctl.d/90-kubernetes.conf
	sysctl -q -p /etc/sysctl.d/90-kubernetes.conf
	# The machine's first address is the same on all of them.
	printf 'KUBELET_EXTRA_ARGS=--node-ip=%s\n' "$address" >/etc/default/kubelet
	containerd config default |
		sed -e 's/SystemdCgroup = false/SystemdCgroup = true/' -e 's|bin_dir = ".*"|bin_dir = "/opt/cni/bin"|' \
			>/etc/containerd/config.toml
	systemctl restart containerd
}

# Pods: a bridge of this machine, and the way to those of the others.
set_up_pod_network() {
	mkdir -p /etc/cni/net.d
	cat >/etc/cni/net.d/10-pods.conflist <<-EOF
	{
	  "cniVersion": "1.0.0", "name": "pods", "plugins": [{
	    "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
	    "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.$number.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}
	  }]
	}
	EOF
	{
		printf '#!/bin/sh\nset -eu\n'
		other=0
		while [ "$other" -le "$workers" ]; do
			[ "$other" = "$number" ] || printf 'ip route replace 10.244.%s.0/24 via %s.%s\n' "$other" "$network" $((10 + other))
			other=$((other + 1))
		done
		cat <<-EOF
		nft -f - <<'RULES'
		table ip pods
		delete table ip pods
		table ip pods {
		  chain postrouting {
		    type nat hook postrouting priority srcnat;
		    ip saddr 10.244.$number.0/24 ip daddr != { 10.244.0.0/16, $network.0/24 } masquerade
		  }
		}
		RULES
		EOF
	} >/usr/local/sbin/pod-network
	chmod 755 /usr/local/sbin/pod-network
	cat >/etc/systemd/system/pod-network.service <<-EOF
	[Unit]
	Description=Routes to the pods of the other machines
	After=network-online.target
	Wants=network-online.target
	[Service]
	Type=oneshot
	ExecStart=/usr/local/sbin/pod-network
	[Install]
	WantedBy=multi-user.target
	EOF
	systemctl daemon-reload
	systemctl enable -q --now pod-network.service
}

take_image() { ctr --namespace k8s.io images import "$1"; }

# The API server by the cluster IP of its Service: nobody but ebpflb makes that work here.
service_answers() { curl -fsk --max-time 5 -o /dev/null https://10.96.0.1/version; }

control_plane() {
	apt-get install -q -y --no-install-recommends buildah debootstrap python3
	mkdir -p "$share"
	[ -e "$share/ebpflb.tar" ] || deploy/build-image --output "$share/ebpflb.tar"
	take_image "$share/ebpflb.tar"
	if [ ! -e /etc/kubernetes/admin.conf ]; then
		kubeadm init --skip-phases=addon/kube-proxy --apiserver-advertise-address="$address" \
			--kubernetes-version="stable-$version" --token="$token" --token-ttl=0
	fi
	mkdir -p /root/.kube /home/vagrant/.kube
	cp /etc/kubernetes/admin.conf /root/.kube/config
	cp /etc/kubernetes/admin.conf /home/vagrant/.kube/config
	chown -R vagrant: /home/vagrant/.kube

	say 'ebpflb in place of kube-proxy'
	base=$(mktemp -d)
	cp deploy/base/* "$base"
	sed -i "s|server: .*|server: https://$control_plane:6443|" "$base/kubeconfig.conf"
	kubectl apply -k "$base"
	rm -r "$base"
	systemctl is-active -q ebpflb-share ||
		systemd-run -q --unit ebpflb-share python3 -m http.server --bind "$address" --directory "$share" 8000
	until_true 'the API server behind its Service' service_answers
	kubectl -n kube-system rollout status daemonset/ebpflb --timeout=10m
}

worker() {
	until_true "the control plane's image" curl -fsS --max-time 600 -o /var/tmp/ebpflb.tar "http://$control_plane:8000/ebpflb.tar"
	take_image /var/tmp/ebpflb.tar
	rm /var/tmp/ebpflb.tar
	if [ ! -e /etc/kubernetes/kubelet.conf ]; then
		kubeadm join "$control_plane:6443" --token="$token" --discovery-token-unsafe-skip-ca-verification
	fi
	until_true 'the API server behind its Service' service_answers
}

install_packages
set_up_kubelet
set_up_pod_network
case $role in
control-plane) control_plane ;;
worker) worker ;;
esac
say "done: $(hostname) is a machine of a cluster without kube-proxy; on the control plane: kubectl get nodes,pods -A"
