"""A container file's steps in a scratch folder: what it copies, runs and starts, as far as that goes without an engine.

Paths below /opt, /data and /tmp are put below the scratch root, in commands and in the environment; the final stage
keeps only what it copies from the others, at the same absolute paths. What needs root or the distribution (apt-get,
useradd) is not run but looked at: packages must exist by name where apt knows any. vLLM's packages for GPUs, some
10 GB, are resolved and not installed.

With --own-wheels and --arg LLAMA_FLAGS= the llama.cpp that was built for this very processor is taken, which saves the
ten minutes of building it for all.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
_MOVED: Final = ("/opt", "/data", "/tmp")
_DISTRIBUTION: Final = ("apt-get", "rm -rf /var/lib", "useradd")
_NETWORK: Final = ("PIP_", "UV_", "SSL_CERT", "REQUESTS_CA", "CURL_CA", "HTTP", "http", "NO_PROXY", "no_proxy", "LANG")
"""Variables that say how this machine reaches package indexes: a build's network is the machine's."""
_READY_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction: `COPY`, and what stands behind it."""

    word: str
    rest: str


@dataclass(slots=True)
class Stage:
    name: str
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ContainerFile:
    arguments: Mapping[str, str]
    """Those before the first stage, with their defaults."""
    stages: tuple[Stage, ...]

    def last(self, word: str) -> str | None:
        return next((step.rest for step in reversed(self.stages[-1].steps) if step.word == word), None)


def parse(text: str) -> ContainerFile:
    """Instructions, continued lines joined and comments left out. Raises ValueError for one that is not known."""
    joined = re.sub(r"\\\n(?:\s*#[^\n]*\n)*", " ", "\n".join(_without_comments(text)) + "\n")
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.strip().partition(" ")
        word, rest = word.upper(), rest.strip()
        if word == "FROM":
            named = re.search(r"\bAS\s+(\S+)", rest, re.IGNORECASE)
            stages.append(Stage(named[1] if named else str(len(stages))))
        elif not stages and word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif word in _KNOWN and stages:
            stages[-1].steps.append(Step(word, rest))
        else:
            raise ValueError(f"{word} {rest}: not an instruction that is rehearsed")
    return ContainerFile(arguments, tuple(stages))


_KNOWN: Final = frozenset(
    {"RUN", "COPY", "ENV", "ARG", "WORKDIR", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
)


def _without_comments(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if not line.lstrip().startswith("#"))


def ignored(path: str, rules: Sequence[str]) -> bool:
    """Whether .dockerignore leaves `path` out: the last rule that fits it, or a folder above it, decides."""
    out = False
    for rule in rules:
        pattern = rule.removeprefix("!").strip("/")
        parts = path.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        deep = pattern.removeprefix("**/") if pattern.startswith("**/") else None
        fits = any(fnmatch.fnmatchcase(one, pattern) for one in above if one.count("/") == pattern.count("/"))
        if fits or (deep is not None and any(fnmatch.fnmatchcase(part, deep) for part in parts)):
            out = not rule.startswith("!")
    return out


def context(folder: Path) -> list[str]:
    """What a build is given: the tracked files that .dockerignore lets through."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (folder / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [path for path in listed.stdout.splitlines() if not ignored(path, rules) and (folder / path).is_file()]


class Rehearsal:
    def __init__(
        self, file: ContainerFile, root: Path, given: Mapping[str, str], own_wheels: Path | None = None
    ) -> None:
        """`own_wheels`: a user's cache with a llama.cpp that is built already."""
        self._file, self._root, self._given, self._own_wheels = file, root, given, own_wheels
        self._files = context(ROOT)
        self.environment: dict[str, str] = {}
        self.folder = root

    def run(self) -> None:
        """All stages, the last one's environment and folder kept. Raises CalledProcessError where a step fails."""
        others: dict[str, Path] = {}
        for stage in self._file.stages:
            self._begin()
            for step in stage.steps:
                self._take(step, others)
            if stage is not self._file.stages[-1]:
                aside = self._root.with_name(f"{self._root.name}.{stage.name}")
                self._root.rename(aside)
                others[stage.name] = aside

    def moved(self, text: str) -> str:
        """`text` with absolute paths put below the scratch root."""
        places = "|".join(re.escape(place) for place in _MOVED)
        return re.sub(rf"(?<![\w.\-/])({places})(?=[/\s\"';:)=]|$)", lambda found: f"{self._root}{found[1]}", text)

    def _begin(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        for place in _MOVED:
            (self._root / place.strip("/")).mkdir(exist_ok=True)
        kept = [name for name in os.environ if name.startswith(_NETWORK)]
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        # What came with the base image: a Python, and a home that holds nothing.
        base = Path(sys.base_prefix) / "bin"
        self.environment |= {"HOME": str(self._root / "tmp" / "home"), "TMPDIR": str(self._root / "tmp")}
        self.environment["PATH"] = f"{base}:/usr/local/bin:/usr/bin:/bin"
        (self._root / "tmp" / "home").mkdir(exist_ok=True)
        self.folder = self._root

    def _take(self, step: Step, others: Mapping[str, Path]) -> None:
        match step.word:
            case "RUN":
                self._run(step.rest)
            case "COPY":
                self._copy(step.rest, others)
            case "ENV":
                for name, value in _pairs(step.rest):
                    self.environment[name] = _filled(self.moved(value), self.environment)
            case "ARG":
                name, _, value = step.rest.partition("=")
                value = self._given.get(name, value.strip('"'))
                if value or name in self._given:
                    self.environment[name] = self.moved(value)
            case "WORKDIR":
                self.folder = Path(self.moved(step.rest))
                self.folder.mkdir(parents=True, exist_ok=True)

    def _run(self, command: str) -> None:
        parts = [part.strip() for part in re.split(r"\s&&\s", command)]
        mine = [part for part in parts if not part.startswith(_DISTRIBUTION)]
        for part in parts:
            if part.startswith("apt-get install"):
                _look_up(part)
        if not mine:
            return
        text = self.moved(" && ".join(mine)).replace("--require-hashes --python", "--dry-run --require-hashes --python")
        if self._own_wheels is not None:
            text = re.sub(r"XDG_CACHE_HOME=\S+", f"XDG_CACHE_HOME={self._own_wheels}", text)
        print(f"rehearse: RUN {' && '.join(mine)[:160]}", file=sys.stderr, flush=True)
        subprocess.run(["bash", "-ec", text], cwd=self.folder, env=self.environment, check=True)

    def _copy(self, rest: str, others: Mapping[str, Path]) -> None:
        words = shlex.split(rest)
        origin = next((word.partition("=")[2] for word in words if word.startswith("--from=")), None)
        *sources, target = [word for word in words if not word.startswith("--")]
        to = Path(self.moved(target)) if target.startswith("/") else self.folder / target
        print(f"rehearse: COPY {rest}", file=sys.stderr, flush=True)
        for source in sources:
            if origin is not None:
                shutil.copytree(others[origin] / source.strip("/"), to, symlinks=True)
                continue
            found = [path for path in self._files if path == source or path.startswith(f"{source}/")]
            if not found:
                raise FileNotFoundError(f"COPY {rest}: nothing of {source} is in the build's context")
            for path in found:
                place = to / Path(path).relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / path, place)


def serve(rehearsal: Rehearsal, file: ContainerFile) -> float:
    """Start what the image starts, on a free port, and ask its health check until it is well; the seconds it took.

    The program's own folder is made read-only meanwhile: an image's root may be.
    """
    entry, arguments = json.loads(file.last("ENTRYPOINT") or "[]"), json.loads(file.last("CMD") or "[]")
    check = json.loads((file.last("HEALTHCHECK") or "").partition("CMD ")[2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [word for word in entry if word not in ("tini", "--")]
    command += [port if word == "8080" else "127.0.0.1" if word == "0.0.0.0" else word for word in arguments]
    check = [word.replace("8080", port) for word in check]
    begun = time.monotonic()
    with _read_only(Path(rehearsal.moved("/opt"))):
        node = subprocess.Popen(command, cwd=rehearsal.folder, env=rehearsal.environment)
        try:
            while subprocess.run(check, env=rehearsal.environment, capture_output=True, check=False).returncode:
                if node.poll() is not None or time.monotonic() - begun > _READY_SECONDS:
                    raise RuntimeError(f"the image's command is not well: exit code {node.poll()}")
                time.sleep(0.5)
            return time.monotonic() - begun
        finally:
            node.send_signal(signal.SIGTERM)
            node.wait(60)


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Nobody may write below `folder`; root could all the same."""
    folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir() and not path.is_symlink()]
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o755)


def _look_up(command: str) -> None:
    names = [word for word in shlex.split(command)[2:] if not word.startswith("-")]
    if shutil.which("apt-cache") is None:
        return
    for name in names:
        done = subprocess.run(["apt-cache", "show", "--quiet=2", name], capture_output=True, text=True, check=False)
        known = subprocess.run(["apt-cache", "stats"], capture_output=True, text=True, check=False).stdout
        has_lists = "Total package names: 0" not in known
        state = "is known" if done.returncode == 0 else "is not known here" if has_lists else "cannot be looked up"
        print(f"rehearse: package {name} {state}", file=sys.stderr)


def _pairs(text: str) -> list[tuple[str, str]]:
    found = (word.partition("=") for word in shlex.split(text))
    return [(name, value) for name, _, value in found]


def _filled(value: str, environment: Mapping[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: environment.get(found[1], ""), value)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/rehearse", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="as docker's --build-arg")
    parser.add_argument("--root", type=Path, help="the scratch root; else a temporary one that is removed")
    parser.add_argument("--own-wheels", action="store_true", help="take llama.cpp from this user's cache")
    parser.add_argument("--no-serve", action="store_true", help="build only")
    asked = parser.parse_args()
    file = parse(asked.file.read_text("utf-8"))
    given = {**file.arguments, **dict(one.split("=", 1) for one in asked.arg)}
    with contextlib.ExitStack() as stack:
        root = asked.root or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rehearsal-"))) / "root"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        rehearsal = Rehearsal(file, root, given, cache if asked.own_wheels else None)
        rehearsal.run()
        size = sum(path.stat().st_size for path in (root / "opt").rglob("*") if path.is_file())
        print(f"rehearse: {size / 1e6:,.0f} MB below /opt", file=sys.stderr)
        if not asked.no_serve:
            print(f"rehearse: healthy after {serve(rehearsal, file):.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
