"""Benchmarks: `python -m bench` (root), or `make bench`.

Rules of this package: everything runs in network namespaces, a cgroup and bpf file systems of its own, which are gone
afterwards. What is gated is a ratio measured side by side in one run, variants interleaved; absolute times are for
orientation. Every benchmark checks that what it measured was right: a program that drops is fast.
"""
