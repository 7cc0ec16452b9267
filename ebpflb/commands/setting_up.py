"""`run --init-only` and `run --write-config-to`: what a node and its configuration come to, without a daemon.

Rules of this file: order and words only. Services are left alone: nothing is loaded.
"""

from __future__ import annotations

import logging

from ebpflb.commands import OK, Result
from ebpflb.commands.patience import require_privilege
from ebpflb.config import Config
from ebpflb.config import file as config_file
from ebpflb.errors import Unsupported, UserError
from ebpflb.parts import Parts, candidates, choose

log = logging.getLogger("ebpflb.daemon")


def write_config(config: Config, path: str) -> Result:
    """Write the configuration in force, as a file that `--config` reads; "-" prints it. Raises UserError."""
    text = config_file.written(config.document)
    for warning in config.warnings:
        log.warning("%s", warning)
    if path == "-":
        return Result(text, OK)
    try:
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"--write-config-to {path}: {error.strerror}; give a file that can be written") from None
    log.info("wrote the configuration to %s", path)
    return Result(status=OK)


def set_up_only(config: Config, parts: Parts) -> Result:
    """What takes all privileges, and a daemon would do first: the node is made ready for the dataplane that a daemon
    will choose, and the kernel's settings are made. What could not be had is told, and is no reason to fail: the daemon
    carries Services without it, or says that it cannot."""
    require_privilege(parts)
    for warning in config.warnings:
        log.warning("%s", warning)
    ladder = parts.dataplanes(config)
    for dataplane in candidates(ladder, config.dataplane):
        try:
            # Also one that this container lacks something for: the daemon's may have it.
            parts.prepare(config, dataplane)
        except Unsupported as error:
            log.info("dataplane %s: %s", dataplane.name, error)
    try:
        chosen = choose(ladder, config.dataplane, lambda each: parts.prepare(config, each))
    except Unsupported as error:
        log.warning("%s", error)
        problems = []
    else:
        log.info("dataplane %s can carry services here", chosen.dataplane.name)
        problems = list(parts.settings_of(config, chosen.dataplane))
    for subject, reason, _ in (*problems, *parts.set_up_node(config)):
        log.warning("node: %s: %s", subject, reason)
    log.info("the node is set up")
    return Result(status=OK)
