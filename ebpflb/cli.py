"""How the commands are typed: options in, output and exit statuses out.

Rules of this file: wires, no logic; a command's work is a function in `commands`, imported when it is called, so that
`--help` is quick. Every error is one line on stderr that says what is wrong and what to do; a traceback is never shown,
it goes to the debug log.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ebpflb import __version__, cli_options
from ebpflb.commands import Result
from ebpflb.errors import EbpflbError, UserError

if TYPE_CHECKING:
    from ebpflb.config import Config
    from ebpflb.output import Format
    from ebpflb.parts import Parts

USAGE_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None, parts: Parts | None = None) -> int:
    """Run one command; returns its exit status. `parts` replaces the real world."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        said = root.main(args=words, prog_name="ebpflb", standalone_mode=False, obj=parts)
        text, status = (said.text, said.status) if isinstance(said, Result) else ("", said or 0)
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`ebpflb dump | head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "ebpflb"
        return _fail(f"{error.format_message().rstrip('.')} (see `{where} --help`)", USAGE_ERROR)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except EbpflbError as error:
        logging.getLogger("ebpflb").debug("failed", exc_info=True)
        return _fail(str(error), error.exit_status)
    except Exception as error:
        logging.getLogger("ebpflb").debug("failed unexpectedly", exc_info=True)
        return _fail(
            f"unexpected {type(error).__name__}: {error}; this is a fault of ebpflb, please report it "
            "with what --log-level debug shows",
            1,
        )
    return int(status)


def _fail(message: str, status: int) -> int:
    print(f"ebpflb: {' '.join(message.split())}", file=sys.stderr)
    return status


class _Commands(click.Group):
    """Commands in the order in which a newcomer needs them, not in that of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", prog_name="ebpflb")
def root() -> None:
    """Carries the Services of a Kubernetes node with BPF, in kube-proxy's place.

    `run` is the daemon. The other commands show what the kernel holds, with or without a daemon.
    """


@root.command()
@cli_options.daemon
@click.option("--once", is_flag=True, help="One complete sync, then exit; programs and rules stay.")
@cli_options.switch("--cleanup", "clean", "kube-proxy's spelling of `ebpflb cleanup`.", default=False)
@cli_options.switch(
    "--init-only", "init_only", "Only set the node up (conntrack settings, BPF file system), then exit.", default=False
)
@click.option("--write-config-to", metavar="FILE", help="Only write the configuration in force to FILE, then exit.")
@click.pass_obj
def run(
    parts: Parts | None, /, once: bool, clean: bool, init_only: bool, write_config_to: str | None, **typed: Any
) -> Result:
    """The daemon, in the foreground; logs to stderr.

    Exit status: 0 on SIGTERM or SIGINT, 2 for a wrong option, 3 if nothing on this node can carry services. With
    --once: 0 synced, 1 something was refused, by the kernel or in what the source says.
    """
    from ebpflb.commands.cleanup import cleanup
    from ebpflb.commands.daemon import run_daemon
    from ebpflb.commands.setting_up import set_up_only, write_config
    from ebpflb.output import Format

    world = _parts(parts)
    config = _config(world, typed, need_source=not (clean or init_only or write_config_to), stays=True)
    if write_config_to:
        return write_config(config, write_config_to)
    if init_only:
        return set_up_only(config, world)
    if clean:
        return cleanup(config, world, dry_run=False, form=Format.TABLE)
    return run_daemon(config, world, once=once)


@root.command()
@click.argument("what", default="routes", metavar="[WHAT]")
@cli_options.looking
@cli_options.service
@cli_options.output
@click.pass_obj
def dump(parts: Parts | None, /, what: str, service: str | None, output: str, **typed: Any) -> Result:
    """What the kernel holds now, read back; changes nothing.

    WHAT: routes (default), services, backends, flows, counters, traffic (with --service-metrics), raw (every map, every
    field); affinity (which client goes where, and for how long still), sources (who counts as this node, who as a pod,
    and who may use which load balancer), maglev (each backend's share of its Service's table; of ipvs, which backends
    the scheduler mh has: their shares the kernel does not tell; nothing of iptables, which has no such tables). Exit
    status: 0, 4 if nothing is programmed.
    """
    from ebpflb.commands.look import WHATS
    from ebpflb.commands.look import dump as act

    if what not in WHATS:
        raise UserError(f"dump {what}: choose one of {', '.join(WHATS)}")
    world = _parts(parts)
    return act(_config(world, typed), world, what=what, service=_service(service), form=_format(output))


@root.command()
@cli_options.routes
@cli_options.service
@cli_options.output
@click.pass_obj
def plan(parts: Parts | None, /, service: str | None, output: str, **typed: Any) -> Result:
    """What a sync would change, as additions, changes and removals; changes nothing.

    What is wrong with what the source says goes to stderr. Exit status: 0 nothing to do, 5 there are changes.
    """
    return _compare(parts, "Change", service, output, typed)


@root.command()
@cli_options.routes
@cli_options.service
@cli_options.output
@click.pass_obj
def verify(parts: Parts | None, /, service: str | None, output: str, **typed: Any) -> Result:
    """The source (manifests or the API server) against the kernel: every entry that differs, by name.

    What is wrong with what the source says goes to stderr. Exit status: 0 all agree, 5 drift.
    """
    return _compare(parts, "Difference", service, output, typed)


def _compare(parts: Parts | None, kind: str, service: str | None, output: str, typed: dict[str, Any]) -> Result:
    from ebpflb.commands.look import compare

    world = _parts(parts)
    config = _config(world, typed, need_source=True)
    return compare(config, world, kind=kind, service=_service(service), form=_format(output))


@root.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST:PORT[/PROTO]")
@click.option("--interface", default="", metavar="NAME", help="The interface by which the packet enters this node.")
@cli_options.looking
@cli_options.output
@click.pass_obj
def trace(parts: Parts | None, /, source: str, target: str, interface: str, output: str, **typed: Any) -> Result:
    """Step by step, what the live tables do with a packet from SRC to DST.

    PROTO is TCP (default), UDP or SCTP; an IPv6 destination is written [ADDRESS]:PORT. Exit status: 0 forwarded, 6
    rejected or dropped, 7 not a service, 4 if nothing is programmed.
    """
    from ebpflb.commands.trace import parse_packet
    from ebpflb.commands.trace import trace as act

    world = _parts(parts)
    packet = parse_packet(source, target, interface)
    return act(_config(world, typed), world, packet=packet, form=_format(output))


@root.command()
@cli_options.status
@cli_options.output
@click.pass_obj
def status(parts: Parts | None, /, wait: float, output: str, **typed: Any) -> Result:
    """Is it working? Asks the daemon of this network namespace.

    Exit status: 0 healthy, 1 not (or no daemon).
    """
    from ebpflb.commands.status import show_status

    if not 0 <= wait < float("inf"):
        raise UserError(f"--wait {wait:g}: give seconds, at least 0")
    return show_status(_parts(parts), wait=wait, form=_format(output))


@root.command()
@cli_options.checking
@cli_options.output
@click.pass_obj
def check(parts: Parts | None, /, output: str, **typed: Any) -> Result:
    """What this kernel offers, and which dataplane would carry services here.

    Exit status: 0, 3 if none can, or not the one that --dataplane asks for.
    """
    from ebpflb.commands.look import check as act

    world = _parts(parts)
    return act(_config(world, typed), world, form=_format(output))


@root.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--kube-proxy", is_flag=True, help="What kube-proxy left behind instead.")
@cli_options.looking
@cli_options.output
@click.pass_obj
def cleanup(parts: Parts | None, /, dry_run: bool, kube_proxy: bool, output: str, **typed: Any) -> Result:
    """Removes everything that ebpflb ever installed here, and nothing else."""
    from ebpflb.commands.cleanup import cleanup as act
    from ebpflb.commands.cleanup import cleanup_kube_proxy

    world = _parts(parts)
    config = _config(world, typed)
    if kube_proxy:
        return cleanup_kube_proxy(world, dry_run=dry_run, form=_format(output))
    return act(config, world, dry_run=dry_run, form=_format(output))


@root.command()
@click.option("--keep", is_flag=True, help="Leave the cluster standing, with instructions on how to look around.")
@click.option("--clean", is_flag=True, help="Only remove a cluster that was kept.")
@click.option(
    "--patience",
    type=click.FloatRange(1, 1000),
    default=1,
    metavar="TIMES",
    help="This machine is so many times slower than a usual one: promise that much less.",
)
def demo(keep: bool, clean: bool, patience: float) -> int:
    """A small cluster of network namespaces on this machine, served by ebpflb; leaves nothing behind."""
    from ebpflb.demo import run_demo

    return run_demo(keep, clean, patience)


# ---- Between click and the commands ----


def _parts(parts: Parts | None) -> Parts:
    if parts is not None:
        return parts
    from ebpflb.wiring import real_parts

    return real_parts()


def _config(parts: Parts, typed: dict[str, Any], need_source: bool = False, *, stays: bool = False) -> Config:
    """`stays`: it is a daemon's, whose log tells what happens; who only looks is told what is wrong."""
    from ebpflb import log
    from ebpflb.config import SERVICE_ACCOUNT_TOKEN, LogLevel
    from ebpflb.config.options import Options, configure

    config = configure(
        Options(**typed),
        hostname=parts.hostname(),
        need_source=need_source,
        in_cluster=os.path.exists(SERVICE_ACCOUNT_TOKEN),
    )
    quiet = not stays and config.log_level is LogLevel.INFO and not typed.get("log_level")
    log.set_up(config.log_format, LogLevel.WARNING if quiet else config.log_level)
    return config


def _service(text: str | None) -> Any:
    from ebpflb.model import ServiceName

    if text is None:
        return None
    namespace, _, name = text.partition("/")
    if not namespace or not name or "/" in name:
        raise UserError(f"--service {text}: write NAMESPACE/NAME")
    return ServiceName(namespace, name)


def _format(text: str) -> Format:
    from ebpflb.output import Format

    return Format(text)
