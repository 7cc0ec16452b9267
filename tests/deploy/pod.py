"""A container of a pod's specification as a process on this machine, as a container runtime would start it.

Rules of this file: what a runtime does and the daemon can notice is done here, by the specification's own words: root
file system, mounts with their propagation, capabilities, environment, read-only /proc/sys and a cgroup namespace unless
privileged. What the specification calls the host is a Host: a directory of a cluster's own, its network namespace and
its cgroup. Mounts are made in a mount namespace that ends with the container, but for what the specification lets reach
the host.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ebpflb.demo import namespaces
from ebpflb.demo.cluster import Cluster, Node
from ebpflb.demo.daemon import environment
from tests.cli.place import until
from tests.conftest import CHECKOUT
from tests.deploy.base import Object

# What a runtime mounts before the volumes; `$root` is the container's root. The node's process ids are visible.
_BEFORE = """
mount -t proc proc $root/proc
mount -t sysfs {sysfs} sysfs $root/sys
mount -t tmpfs -o mode=755 tmpfs $root/dev
for device in null zero full random urandom; do : >$root/dev/$device; mount --bind /dev/$device $root/dev/$device; done
"""
_PROPAGATION = {"None": "rprivate", "HostToContainer": "rslave", "Bidirectional": "rshared"}
# What a container that is not privileged may not write.
_PROTECTED = ("bus", "fs", "irq", "sys", "sysrq-trigger")


class Root(NamedTuple):
    """What a container's root file system is made from, with the image's environment. `also` are directories of this
    machine that are there as well, at their own places."""

    directory: Path
    environment: Mapping[str, str]
    also: tuple[Path, ...] = ()


def machine_root(program: Path) -> Root:
    """This machine's own root file system, with the checkout; `program` is the ebpflb that is in its PATH."""
    path = f"{program.parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    variables = {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(CHECKOUT)}
    return Root(Path("/"), variables, (CHECKOUT,))


class Host:
    """The node of a pod: where its paths are (`directory`), with the pod's own files beside (`volumes`)."""

    def __init__(self, cluster: Cluster, node: Node, directory: Path) -> None:
        self.cluster = cluster
        self.node = node
        self.directory = directory / "host"
        self.volumes = directory / "volumes"
        self.containers: list[Container] = []
        self._work = directory / "work"

    def make(self, *, bpffs: bool) -> None:
        """With a BPF file system mounted, or without. Mounts propagate from here, as systemd makes it on nodes."""
        for path in (self.directory, self._work):
            path.mkdir(parents=True)
            _run("mount", "--bind", str(path), str(path))
        _run("mount", "--make-private", str(self._work))
        _run("mount", "--make-shared", str(self.directory))
        for name in ("sys/fs/bpf", "sys/fs/cgroup", "lib/modules", "run"):
            (self.directory / name).mkdir(parents=True)
        assert self.node.cgroup is not None
        _run("mount", "--bind", str(self.node.cgroup), str(self.directory / "sys/fs/cgroup"))
        if bpffs:
            namespaces.mount_bpffs(self.directory / "sys/fs/bpf")

    def remove(self) -> None:
        """End the containers, and remove everything that they left, as nobody does on a node."""
        for container in self.containers:
            if container.process.poll() is None:
                container.process.kill()
                container.process.wait()
        pins = self.directory / "sys/fs/bpf"
        assert self.node.cgroup is not None
        options = ("--bpffs", str(pins / "ebpflb"), "--cgroup", str(self.node.cgroup))
        done = self.cluster.run(self.node, [sys.executable, "-m", "ebpflb", "cleanup", *options], env=environment())
        assert done.returncode == 0, done.stderr
        for path in sorted(_mounted_below(self.directory.parent), reverse=True):
            _run("umount", str(path))
        shutil.rmtree(self.directory.parent)

    def work(self, name: str) -> Path:
        """An empty directory whose mounts are nobody else's."""
        path = self._work / name
        path.mkdir(exist_ok=True)
        return path

    def source(self, volume: Object, files: Mapping[str, Path]) -> Path:
        """What is mounted for a volume: `files` are the directories of those that the API server would fill."""
        if "hostPath" in volume:
            path = self.directory / str(volume["hostPath"]["path"]).lstrip("/")
            kind = str(volume["hostPath"].get("type", ""))
            if kind == "DirectoryOrCreate":
                path.mkdir(parents=True, exist_ok=True)
            elif kind == "FileOrCreate":
                path.touch()
            assert path.is_dir() or kind.startswith("File"), path
            return path
        if "emptyDir" in volume:
            path = self.volumes / str(volume["name"])
            path.mkdir(parents=True, exist_ok=True)
            return path
        return files[volume["name"]]


class Container:
    """One container of `pod`, started when this is made. `files` are directories for volumes that are no paths of the
    host, `token` that of its service account; `extra` are further arguments."""

    def __init__(
        self, host: Host, pod: Object, name: str, root: Root, *,
        files: Mapping[str, Path], token: Path | None = None, extra: Sequence[str] = (),
    ) -> None:  # fmt: skip
        (self._spec,) = (each for each in (*pod["initContainers"], *pod["containers"]) if each["name"] == name)
        assert pod["hostNetwork"] and pod["hostPID"], "nothing else is made here"
        self._host = host
        self._root = root
        self._context: Object = self._spec["securityContext"]
        self._privileged: bool = self._context.get("privileged", False)
        self._variables = {**root.environment, **self._own_variables()}
        self._entry = [*self._as_itself(), *self._command(), *extra]
        self.log = host.cluster.logs / f"{host.directory.parent.name}-{name}-{len(host.containers)}.log"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = [(host.source(volumes[m["name"]], files), m) for m in self._spec["volumeMounts"]]
        if token is not None:
            place = "/var/run/secrets/kubernetes.io/serviceaccount"
            mounts.append((token, {"mountPath": place, "readOnly": True}))
        script = self._script(host.work(name), mounts)
        argv = ["unshare", "--mount", "--propagation", "unchanged"]
        argv += [] if self._privileged else ["--cgroup"]
        with self.log.open("ab") as log:
            self.process = host.cluster.spawn(host.node, [*argv, "sh", "-euc", script], stdout=log, stderr=log, env={})
        host.containers.append(self)

    @property
    def started(self) -> bool:
        """Whether it has become its command; before that it is not yet where the command will be."""
        return Path(os.readlink(f"/proc/{self.process.pid}/exe")).name.startswith("python")

    def execute(self, *words: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """As `kubectl exec` does."""
        until(f"{words} can be run in it", lambda: self.process.poll() is not None or self.started)
        assert self.process.poll() is None, self.words()
        argv = ["nsenter", f"--target={self.process.pid}", "--mount", "--net", "--cgroup", "--root", "--wdns=/"]
        argv += [*self._as_itself(), *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=seconds, env={}, check=False)

    def words(self) -> str:
        """All that it said."""
        return self.log.read_text(errors="replace")

    # ---- What the specification says ----

    def _own_variables(self) -> dict[str, str]:
        fields = {"spec.nodeName": self._host.node.name}
        return {each["name"]: fields[each["valueFrom"]["fieldRef"]["fieldPath"]] for each in self._spec["env"]}

    def _command(self) -> list[str]:
        words = [*self._spec["command"], *self._spec["args"]]
        for name, value in self._variables.items():
            words = [word.replace(f"$({name})", value) for word in words]
        return words

    def _as_itself(self) -> list[str]:
        """The command that becomes the next one with the container's environment and capabilities."""
        variables = [f"{name}={value}" for name, value in self._variables.items()]
        entry = ["/usr/bin/env", "-i", *variables]
        if not self._privileged:
            added = [f"+{name.lower()}" for name in self._context["capabilities"]["add"]]
            assert self._context["capabilities"]["drop"] == ["ALL"]
            entry += ["/usr/bin/setpriv", f"--bounding-set={','.join(['-all', *added])}", "--inh-caps=-all"]
        return entry

    def _script(self, work: Path, mounts: Sequence[tuple[Path, Object]]) -> str:
        targets = [(source, self._inside(mount["mountPath"]), mount) for source, mount in mounts]
        lines = [
            f"work={shlex.quote(str(work))}; root=$work/root",
            "mount -t tmpfs tmpfs $work",
            "mkdir $root $work/upper $work/work",
            f"layers=lowerdir={self._root.directory},upperdir=$work/upper,workdir=$work/work",
            "mount -t overlay -o $layers overlay $root",
            *(f"mkdir -p $root{target}" for source, target, _ in targets if source.is_dir()),
            *(f"mkdir -p $root{target.parent}; : >>$root{target}" for source, target, _ in targets if source.is_file()),
        ]
        # A volume hides what is below its place, such as a checkout in /tmp: there it is put on top.
        hidden = [each for each in self._root.also if any(each.is_relative_to(target) for _, target, _ in targets)]
        for directory in self._root.also:
            if directory not in hidden:
                lines += _bound(directory)
        if self._context.get("readOnlyRootFilesystem"):
            lines.append("mount -o remount,ro $root")
        lines.append(_BEFORE.format(sysfs="" if self._privileged else "-o ro"))
        if not self._privileged:
            lines.append(f"for name in {' '.join(_PROTECTED)}; do path=$root/proc/$name; [ -e $path ] || continue")
            lines.append("mount --bind $path $path; mount -o remount,bind,ro $path; done")
        for source, target, mount in sorted(targets, key=lambda each: len(each[1].parts)):
            lines.append(f"mount --rbind {shlex.quote(str(source))} $root{target}")
            lines.append(f"mount --make-{_PROPAGATION[mount.get('mountPropagation', 'None')]} $root{target}")
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro $root{target}")
        for directory in hidden:
            lines += _bound(directory)
        lines.append(f"cd $root; exec /usr/sbin/chroot . {shlex.join(self._entry)}")
        return "\n".join(lines)

    def _inside(self, path: str) -> Path:
        """Where `path` leads in the root file system, as seen from its root: its links are its own."""
        found = Path("/")
        for part in Path(path).parts[1:]:
            found /= part
            actual = self._root.directory / found.relative_to("/")
            if actual.is_symlink():
                found = Path(os.path.normpath(found.parent / os.readlink(actual)))
        return found


def _bound(directory: Path) -> list[str]:
    """A directory of this machine at its own place in the root file system."""
    place = shlex.quote(str(directory))
    return [f"mkdir -p $root{place}", f"mount --bind {place} $root{place}"]


def _mounted_below(directory: Path) -> list[Path]:
    points = (Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines())
    return [point for point in points if point.is_relative_to(directory)]


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, text=True)
