"""iptables as both of its dataplanes use it: rules as text, and the commands that save and restore them.

Rules of this package: `ruleset` is pure; `iptables` runs the commands. Nothing here knows a route.
"""
