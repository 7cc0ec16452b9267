"""The IPVS dataplane: virtual servers, ipsets and a fixed set of iptables rules, laid out as in kube-proxy.

Which hook does what, for a packet to a frontend:

    mangle PREROUTING   a packet from outside (neither this node nor a local pod) to a frontend of policy Local gets the
                        mark of that frontend's second virtual server, which has this node's endpoints
    nat PREROUTING/OUTPUT   the masquerade mark, by sets
    filter INPUT        source ranges, DROP, REJECT, undefined ports: before IPVS, which is at the end of LOCAL_IN
    IPVS                picks the backend: by mark if there is a virtual server of that mark, else by address and port
    nat POSTROUTING     masquerade by mark, and of a pod that is sent to itself

The node's own packets are translated in LOCAL_OUT behind nat and before filter: what must be dropped of them is dropped
in mangle OUTPUT. The addresses are bound to kube-ipvs0, so that the stack takes their packets for its own; a frontend
without a virtual server therefore ends in INPUT, where it is refused.

What this dataplane refuses to do: it never flushes; virtual servers, sets and addresses of others stay as they are.
"""
