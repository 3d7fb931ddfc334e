"""Python modules run as programs, in processes forked from one that has imported torch and scipy, and nothing of ours.

A session of four cases took 4.6 s on 2 cores and takes 3.1 so. It imports pytest, its plugins, fp4bench and conftest.py itself,
and its worker is a fresh Python, as ever. What Python and OpenMP read of the environment when they start is not read again.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from contextlib import suppress

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "scipy.special"])


def run_module(name, arguments, cwd, environment, timeout):
    """As `python -m name *arguments` ends: its exit code, negative after a signal, and its stdout and stderr."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        process = FORKS.Process(target=_become, args=(name, [*map(str, arguments)], str(cwd), environment, output.name))
        process.start()
        try:
            process.join(timeout)
            assert process.exitcode is not None, f"{name} took longer than {timeout} s:\n{output.read()}"
            return process.exitcode, output.read()
        finally:
            with suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            process.close()


def _become(name, arguments, cwd, environment, output):
    os.setpgrp()  # its workers end with it
    with open(output, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    # Not what a test's own process has in addition, such as this folder.
    roots = tuple(os.path.join(prefix, "") for prefix in (sys.prefix, sys.base_prefix))
    installed = [entry for entry in sys.path if entry.startswith(roots)]
    sys.path[:] = [cwd, *environment["PYTHONPATH"].split(os.pathsep), *installed]
    sys.argv[1:] = arguments
    runpy.run_module(name, run_name="__main__", alter_sys=True)
