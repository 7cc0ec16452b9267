"""`cleanup`: everything that ebpflb installed here goes, and nothing else; or what kube-proxy left behind, and nothing
else.

Rules of this file: no daemon may run meanwhile, or it would repair what is being removed: its place is held until the
end. Every dataplane is asked, whichever is configured. What is kube-proxy's a daemon has no hand in.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpflb.commands import OK, Result
from ebpflb.commands.patience import require_privilege
from ebpflb.config import Config
from ebpflb.control import listen
from ebpflb.dataplane import Dataplane
from ebpflb.errors import EbpflbError, Unsupported
from ebpflb.output import Format, Item, document
from ebpflb.parts import Parts, installed


def cleanup(config: Config, parts: Parts, *, dry_run: bool, form: Format) -> Result:
    """Remove everything of ours; with `dry_run`, only say what that would be."""
    require_privilege(parts)
    ladder = parts.dataplanes(config)
    if dry_run:
        return Result(_listed(_inventory(ladder), form, "would remove", "nothing to remove"), OK)
    with listen(parts.socket_name):
        found = _inventory(ladder)
        refusals = []
        for dataplane in ladder:
            try:
                dataplane.cleanup()
            except Unsupported:
                continue  # what cannot be had has nothing here
            except EbpflbError as error:
                refusals.append(error)  # the others need not stay for it
        if refusals:
            raise refusals[0]
    return Result(_listed(found, form, "removed", "nothing was installed"), OK)


def cleanup_kube_proxy(parts: Parts, *, dry_run: bool, form: Format) -> Result:
    """Remove what kube-proxy left behind; with `dry_run`, only say what that would be."""
    require_privilege(parts)
    found: list[Item] = [{"dataplane": "kube-proxy", "installed": line} for line in parts.kube_proxy.inventory()]
    if dry_run:
        return Result(_listed(found, form, "would remove", "kube-proxy left nothing here"), OK)
    parts.kube_proxy.cleanup()
    return Result(_listed(found, form, "removed", "kube-proxy left nothing here"), OK)


def _inventory(ladder: Sequence[Dataplane]) -> list[Item]:
    return [{"dataplane": dataplane.name, "installed": line} for dataplane in ladder for line in installed(dataplane)]


def _listed(items: list[Item], form: Format, verb: str, nothing: str) -> str:
    if form.structured:
        return document("Installed", items, form)
    return "".join(f"{verb} {item['installed']}\n" for item in items) or f"{nothing}\n"
