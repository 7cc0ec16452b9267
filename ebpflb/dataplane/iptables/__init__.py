"""The iptables dataplane: kube-proxy's chains, and beside them what it takes to read them back as routes.

`names` has the chains' names, `layout` says which chain holds what for one service port, `rules` writes rules,
`reading` understands them; these are pure. The others save, restore and watch.
"""
