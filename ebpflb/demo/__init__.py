"""`ebpflb demo`: a small cluster of network namespaces on this machine, with real servers and clients, served by ebpflb.

Rules of this package: it talks to ebpflb as a person does, by its command line and its manifests, and imports nothing
of it but errors. Whatever it makes in the kernel or on disk it removes, however it ends.
"""
