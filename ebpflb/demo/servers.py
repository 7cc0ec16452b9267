"""The demo's real servers: nginx, MariaDB and dnsmasq, each from a directory of its own with nothing of the machine's
configuration.

Rules of this file: a server is what to write, what to run and how a client knows that it serves; it runs in the
foreground, as root of its pod, and logs to `log` in its directory. It is ready when a client has been served, and no
sooner.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from subprocess import TimeoutExpired

import msgspec

from ebpflb.demo.cluster import Cluster, Pod
from ebpflb.errors import EbpflbError, UserError

# Program, and the Debian package that has it.
NEEDED = {
    "nginx": "nginx",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "mariadb": "mariadb-client-core",
    "dnsmasq": "dnsmasq-base",
    "dig": "bind9-dnsutils",
    "curl": "curl",
    "unshare": "util-linux",
}

SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"

DATABASE = "shop"
DATABASE_USER = "demo"
DOMAIN = "cluster.local"


class Server(msgspec.Struct, frozen=True):
    """A server as a command line, and a client's command that succeeds once it serves."""

    argv: tuple[str, ...]
    probe: tuple[str, ...]


def check_installed() -> None:
    """Raises UserError naming the packages that lack."""
    lacking = sorted({package for program, package in NEEDED.items() if shutil.which(program) is None})
    if lacking:
        raise UserError(f"the demo's servers and clients are not all installed: apt-get install {' '.join(lacking)}")


def nginx(directory: Path, pod: Pod) -> Server:
    """nginx at port 80 of both families: `/` names the pod, `/source` the client's address as the server sees it."""
    directory.mkdir()
    (directory / "index.html").write_text(f"{pod.name}\n")
    temporary = "".join(
        f"    {kind}_temp_path {directory}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"""daemon off;
master_process off;
pid {directory}/pid;
error_log {directory}/log;
events {{ worker_connections 512; }}
http {{
    access_log off;
{temporary}    default_type text/plain;
    server {{
        listen 80;
        listen [::]:80;
        root {directory};
        location = /source {{ return 200 "$remote_addr\\n"; }}
    }}
}}
"""
    )
    argv = ("nginx", "-c", str(directory / "nginx.conf"), "-e", str(directory / "log"))
    return Server(argv, ("curl", "--silent", "--fail", f"http://{pod.addresses.ipv4}/"))


def prepare_mariadb(directory: Path) -> tuple[str, ...]:
    """The command that fills a new data directory; some seconds, most of them waiting."""
    directory.mkdir()
    (directory / "init.sql").write_text(
        f"CREATE DATABASE IF NOT EXISTS {DATABASE};\n"
        f"CREATE USER IF NOT EXISTS '{DATABASE_USER}'@'%';\n"
        f"GRANT ALL ON {DATABASE}.* TO '{DATABASE_USER}'@'%';\n"
    )
    return (
        *("mariadb-install-db", "--no-defaults", "--user=root", "--skip-test-db"),
        *("--auth-root-authentication-method=normal", f"--datadir={directory / 'data'}", *_small(directory)),
    )


def mariadb(directory: Path, pod: Pod) -> Server:
    """MariaDB at port 3306, on what `prepare_mariadb` made."""
    address = pod.addresses.ipv4
    argv = (
        *("mariadbd", "--no-defaults", "--user=root", f"--datadir={directory / 'data'}", *_small(directory)),
        *(f"--bind-address={address}", "--port=3306", "--skip-name-resolve", f"--init-file={directory / 'init.sql'}"),
        *(f"--socket={directory / 'socket'}", f"--pid-file={directory / 'pid'}"),
    )
    return Server(argv, sql_client(address, 3306, "SELECT 1"))


def _small(directory: Path) -> tuple[str, ...]:
    return (
        *("--innodb-buffer-pool-size=8M", "--innodb-log-file-size=4M", "--innodb-flush-method=fsync"),
        *("--innodb-use-native-aio=0", "--key-buffer-size=1M", "--aria-pagecache-buffer-size=1M"),
        *("--performance-schema=OFF", "--skip-log-bin", f"--tmpdir={directory}"),
    )


def sql_client(address: str, port: int, *statements: str) -> tuple[str, ...]:
    """A command line of the MariaDB client."""
    connection = (f"--host={address}", f"--port={port}", f"--user={DATABASE_USER}", "--protocol=tcp")
    return ("mariadb", "--no-defaults", *connection, "--connect-timeout=5", DATABASE, "-e", "; ".join(statements))


def dnsmasq(directory: Path, pod: Pod, records: Mapping[str, Iterable[str]]) -> Server:
    """A DNS server that knows these names (with all their addresses) and nothing else."""
    directory.mkdir()
    # A hosts file, since a `host-record` holds one address a family.
    hosts = "".join(f"{address} {name}\n" for name, addresses in records.items() for address in addresses)
    (directory / "hosts").write_text(hosts)
    (directory / "dnsmasq.conf").write_text(
        f"""no-resolv
no-poll
no-hosts
addn-hosts={directory}/hosts
local=/{DOMAIN}/
listen-address={pod.addresses.ipv4}
bind-interfaces
user=root
group=root
pid-file={directory}/pid
log-facility={directory}/log
"""
    )
    argv = ("dnsmasq", "--keep-in-foreground", f"--conf-file={directory / 'dnsmasq.conf'}")
    name = next(iter(records))
    return Server(argv, ("dig", f"@{pod.addresses.ipv4}", name, "+short", "+time=1", "+tries=1"))


def in_pod_view(directory: Path, argv: Sequence[str]) -> tuple[str, ...]:
    """The same command with the /etc/resolv.conf and nsswitch.conf that kubelet would give a pod; `directory` holds
    them. Seen by that command alone."""
    script = (
        'mount --bind "$1/resolv.conf" "$(readlink -f /etc/resolv.conf)" && '
        'mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf && shift && exec "$@"'
    )
    return ("unshare", "--mount", "sh", "-c", script, "pod", str(directory), *argv)


def write_pod_view(directory: Path, nameserver: str) -> None:
    """What `in_pod_view` shows."""
    directory.mkdir()
    (directory / "resolv.conf").write_text(
        f"nameserver {nameserver}\nsearch default.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}\noptions ndots:5\n"
    )
    (directory / "nsswitch.conf").write_text("hosts: files dns\n")


def start(cluster: Cluster, pod: Pod, server: Server, log: Path) -> Callable[[float], None]:
    """Start a server in its pod; returns a function that waits until it serves, for at most so many seconds, and
    raises EbpflbError with the server's last words otherwise."""
    with log.open("ab") as file:
        process = cluster.spawn(pod, server.argv, stdout=file, stderr=file)

    def wait(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                probe = cluster.run(pod, server.probe, timeout=seconds)
            except TimeoutExpired as error:
                raise EbpflbError(f"{server.argv[0]} in pod {pod.name} takes questions and answers none") from error
            if probe.returncode == 0 and probe.stdout.strip():
                return
            if process.poll() is not None or time.monotonic() > deadline:
                words = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
                raise EbpflbError(f"{server.argv[0]} does not serve in pod {pod.name}: {probe.stderr.strip()}\n{words}")
            time.sleep(0.02)  # the interval at which it is asked, not how long it may take

    return wait
