"""The BPF dataplane: socket and tc programs that read pinned maps, and the control plane that writes them.

Who does what: `constants`, `flatten`, `tables` and `ids` are pure; `syscall` is bpf(2) and nothing else; `compile` is a
child process and the only importer of bcc; `artifact` caches what it makes; `programs` and `devices` load, pin and
attach; `facts` asks the kernel about itself; `maps` and `inspect` read and write rows.
"""
