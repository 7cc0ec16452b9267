"""Names of the iptables dataplane's chains: kube-proxy's, with kube-proxy's hashes, and a few of our own.

Rules of this file: pure; every name of a chain stands here, once.
"""

from __future__ import annotations
