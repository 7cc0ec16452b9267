"""The BPF dataplane: socket, tc and XDP programs that read pinned maps, and the control plane that writes them.

Who does what, from the kernel up; `dataplane` puts it all together.

    kernel     `syscall` is bpf(2) and nothing else, `map_calls` and `program_calls` are its commands; `facts` asks the
               kernel about itself, where need be by programs of a few lines (`assembly`); `ports` are those that are
               free for masquerade
    programs   `compile` is a child process and the only importer of bcc; it gets its sources from `flatten` and its
               numbers from `constants`, and `artifact` keeps what it makes. `programs` loads and attaches that, `pins`
               is where it lives on, and `others` are those whom it succeeds
    devices    `edges` and `xdp_choice` say which run what. `devices` has it so: by `tcx` or by `clsact` filters (`tc`),
               and by `xdp`, with `xdp_links`, `xdp_pins` and `xdp_features`; `device_rows` are its maps. `xdp_survey`
               is for commands
    rows       pure. `layouts` are their bytes; `tables`, `locality`, `owned`, `known` and `table_parts` with `maglev`
               say what each means; `reading` understands all of them together
    account    pure. `ledger` says what to write when routes change, by the `holdings`, whose parts are `records`,
               `ids` and `set_rows`
    writing    `maps` reads and writes rows, `looking` reads them all, `pen` counts what became of each. `writer` says
               what a sync or an audit looks at, by `image` where nothing has changed; `steps` writes it in the order
               that keeps traffic right, with `addresses`, `whereabouts` and `affinity_rows`
    showing    `inspect` for `dump`, with `fields` and `remembered`; `fill` for `status` and metrics
    change     `succeeding` and `retiring` for those who carried Services before, or will; `sockets` tells connected UDP
               sockets that their backend has gone
"""
