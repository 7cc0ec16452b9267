"""`cleanup`: everything that ebpflb installed here goes, and nothing else.

Rules of this file: no daemon may run meanwhile, or it would repair what is being removed: its place is held until the
end. Every dataplane is asked, whichever is configured.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpflb.commands import OK, Result
from ebpflb.commands.daemon import require_privilege
from ebpflb.config import Config
from ebpflb.control import listen
from ebpflb.dataplane import Dataplane
from ebpflb.output import Format, Item, document
from ebpflb.parts import Parts


def cleanup(config: Config, parts: Parts, *, dry_run: bool, form: Format) -> Result:
    """Remove everything of ours; with `dry_run`, only say what that would be."""
    require_privilege(parts)
    ladder = parts.dataplanes(config)
    if dry_run:
        return Result(_listed(_inventory(ladder), form, "would remove", "nothing to remove"), OK)
    with listen(parts.socket_name):
        found = _inventory(ladder)
        for dataplane in ladder:
            dataplane.cleanup()
    return Result(_listed(found, form, "removed", "nothing was installed"), OK)


def _inventory(ladder: Sequence[Dataplane]) -> list[Item]:
    return [{"dataplane": dataplane.name, "installed": line} for dataplane in ladder for line in dataplane.inventory()]


def _listed(items: list[Item], form: Format, verb: str, nothing: str) -> str:
    if form.structured:
        return document("Installed", items, form)
    return "".join(f"{verb} {item['installed']}\n" for item in items) or f"{nothing}\n"
