"""Manifests by the file: a directory that stands for the cluster's API.

Rules of this file: a file is replaced by rename, so that whoever watches sees it whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

Manifest: TypeAlias = dict[str, object]


def node(name: str, addresses: Iterable[str], zone: str, pod_cidrs: Iterable[str]) -> Manifest:
    """A Node."""
    labels = {"kubernetes.io/hostname": name, **({"topology.kubernetes.io/zone": zone} if zone else {})}
    cidrs = list(pod_cidrs)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
    }


class Manifests:
    """A directory of manifests. Each file holds what one `write` gave it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, file: str, *objects: Mapping[str, object]) -> Path:
        """Put these objects, and only these, into `file` (a name without its ending)."""
        text = "---\n".join(json.dumps(item, indent=1) + "\n" for item in objects)
        return self.write_text(f"{file}.yaml", text)  # JSON is YAML, and many documents may share a file

    def write_text(self, file: str, text: str) -> Path:
        """Put this text into `file`."""
        path = self.directory / file
        fresh = self.directory / f".{file}.new"
        fresh.write_text(text)
        os.replace(fresh, path)
        return path

    def remove(self, file: str) -> None:
        """Remove what `write` put there; removing what is not there is no error."""
        (self.directory / f"{file}.yaml").unlink(missing_ok=True)
