"""`ebpflb demo`: a small cluster of network namespaces on this machine, with real servers and clients.

Rules of this package: it talks to ebpflb as a person does, by its command line and its manifests, and imports nothing
of it but errors. Whatever it makes in the kernel or on disk it removes, however it ends.
"""

from __future__ import annotations


def run_demo(keep: bool = False, clean: bool = False, patience: float = 1.0) -> int:
    """Tell the story and return the exit status: 0 if every step was as promised.

    `keep` leaves the cluster standing; `clean` only removes one that was kept. `patience` multiplies every time that is
    promised or waited for. Raises UserError if it cannot begin.
    """
    from ebpflb.demo.ends import remove_kept, tell

    return remove_kept() if clean else tell(keep, patience)
