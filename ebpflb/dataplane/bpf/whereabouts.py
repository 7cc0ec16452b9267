"""Writes what tells local clients from others, and what holds for the node as a whole.

Rules of this file: `locality` says which rows, this says when: only what differs from what is held.
"""

from __future__ import annotations

from ebpflb.dataplane import NODE
from ebpflb.dataplane.bpf.layouts import entries
from ebpflb.dataplane.bpf.locality import ONLY, NodeFacts, pack_settings, pack_sources
from ebpflb.dataplane.bpf.pen import Pen, Tally
from ebpflb.dataplane.bpf.reading import RawTables
from ebpflb.diff import diff
from ebpflb.routes import Locality


class Whereabouts:
    """The maps `sources` and `settings`. `facts` go into the settings."""

    def __init__(self, pen: Pen, facts: NodeFacts) -> None:
        self._pen = pen
        self._facts = facts
        self._sources: dict[bytes, bytes] = {}
        self._settings = b""
        self._locality: Locality | None = None

    def adopt(self, raw: RawTables) -> None:
        """Take over what was read."""
        self._sources, self._settings, self._locality = dict(entries("sources", *raw.sources)), raw.settings, None

    def shows(self, raw: RawTables) -> bool:
        """Whether what was read is what was written, all of it."""
        return (
            self._locality is not None
            and raw.settings == self._settings
            and dict(entries("sources", *raw.sources)) == self._sources
        )

    def write(self, locality: Locality, tally: Tally) -> None:
        """Make the maps hold `locality`."""
        if locality == self._locality:
            return
        self._locality = None
        whole = True
        delta = diff(pack_sources(locality), self._sources)
        put = self._pen.put("sources", delta.put, tally)
        removed = self._pen.remove("sources", delta.removed, tally)
        self._sources.update({key: row for key, row in delta.put.items() if key not in put})
        for key in delta.removed:
            if key not in removed:
                self._sources.pop(key, None)
        for error in (*put.values(), *removed.values()):
            whole = False
            tally.refuse(NODE, f"an address of the node or its pods: {self._pen.words('sources', error)}")
        settings = pack_settings(self._facts, locality)
        if settings != self._settings:
            errors = self._pen.put("settings", {ONLY: settings}, tally)
            if errors:
                whole = False
                tally.refuse(NODE, f"the settings: {self._pen.words('settings', errors[ONLY])}")
            else:
                self._settings = settings
        if whole:
            self._locality = locality
