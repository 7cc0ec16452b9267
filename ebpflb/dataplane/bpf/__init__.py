"""The BPF dataplane: socket and tc programs that read pinned maps, and the control plane that writes them.

Who does what: `constants`, `flatten`, `ids`, `layouts`, `tables`, `locality`, `reading`, `records` and `ledger` are
pure: what the rows say, and what to write when routes change. `syscall` is bpf(2) and nothing else, `map_calls` and
`program_calls` are its commands; `compile` is a child process and the only importer of bcc; `artifact` caches what it
makes; `programs` and `devices` load, pin and attach; `facts` asks the kernel about itself; `maps` reads and writes
rows, `writer` does so in the order that keeps traffic right, `inspect` shows them; `sockets` tells connected UDP
sockets that their backend has gone; `dataplane` puts it all together.
"""
