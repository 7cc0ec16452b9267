"""ebpflb: an eBPF-accelerated Service load balancer for Kubernetes."""

__version__ = "0.1.0"
