"""A small disk that runs full, for code in a process of its own."""

import os
import shutil
import subprocess
import sys

import pytest

# A real file system of 64 KiB, and a limit on the size of a file, which any user of Linux can set. Python ignores SIGXFSZ.
KINDS = ("tmpfs", "file_limit")

_PRELUDE = {
    "tmpfs": """
import os
from pathlib import Path

def fill(left):
    space = os.statvfs(".")
    Path("filler").write_bytes(b"x" * (space.f_bavail * space.f_frsize - left))

def free():
    Path("filler").unlink()
""",
    "file_limit": """
import resource
from pathlib import Path

def fill(left):
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))

def free():
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
""",
}


def run_on_a_full_disk(kind, folder, code):
    """Run `code` with the disk as its current folder. It has `Path`, `fill(left)` (then only so many bytes fit) and `free()`.

    Fails where the code does; skips with the reason where this user cannot have such a disk.
    """
    command = [sys.executable, "-W", "error", "-c", _PRELUDE[kind] + code]
    if kind == "tmpfs":
        command = [*_on_a_tmpfs(folder), *command]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def _on_a_tmpfs(folder):
    """A command before a command: it gets a mount that nobody else sees and that ends with it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("a tmpfs of a test's own needs unshare")
    script = 'mount -t tmpfs -o size=64k tmpfs "$0" && cd "$0" && exec "$@"'
    prefix = [unshare, "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-c", script, str(folder)]
    if (tried := subprocess.run([*prefix, "true"], capture_output=True, text=True)).returncode:
        pytest.skip(f"no tmpfs here: {tried.stderr.strip()}")
    return prefix
