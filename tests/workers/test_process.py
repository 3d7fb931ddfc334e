"""Real processes that exit, hang, crash and talk too much. The handlers below are what the children serve."""

import contextlib
import ctypes
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp4bench.workers.process import CaseFailed, StartFailed, Worker, WorkerDied, WorkerHung

# Children import the handlers by the name of this file, whatever pytest calls the module.
HERE = Path(__file__).parent
SOON = 2.0
LONG = 20.0


# In the child


class SpentError(RuntimeError):
    fatal = True


class FussyError(Exception):
    """Cannot be pickled, and has no message."""

    def __init__(self):
        self.held = lambda: None

    def __str__(self):
        raise ValueError("no message")


class Unloadable:
    """Can be pickled, and not unpickled."""

    def __reduce__(self):
        return int, ("nothing",)


class Handler:
    def __init__(self, offset=0):
        self.offset, self.broken = offset, False

    def __call__(self, request):
        name, *args = request
        return getattr(self, name)(*args)

    def usable(self):
        return not self.broken

    def add(self, x):
        return x + self.offset

    def pid(self):
        return os.getpid()

    def environment(self, name):
        return os.environ.get(name)

    def fail(self):
        raise ValueError("bad shape\nand more of it")

    def fail_for_good(self):
        raise SpentError("context lost")

    def break_and_fail(self):
        self.broken = True
        raise ValueError("illegal access")

    def fail_fussily(self):
        raise FussyError

    def leave(self):
        sys.exit("enough")

    def exit(self, code):
        print("about to leave")
        os._exit(code)

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def crash(self):
        ctypes.string_at(0)

    def sleep(self, seconds):
        time.sleep(seconds)
        return "late"

    def block(self):
        """Blocks in C while it holds the interpreter: no thread and no Python signal handler of this process runs."""
        end, _ = os.pipe()
        libc = ctypes.PyDLL(None)
        while True:
            libc.read(end, ctypes.create_string_buffer(1), 1)

    def leave_a_holder(self, seconds):
        """Start a process that no signal of ours reaches and that holds the connection open; then hang."""
        if os.fork() == 0:
            os.setsid()
            time.sleep(seconds)
            os._exit(0)
        time.sleep(LONG)

    def stop_reading(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def talk(self, size):
        os.write(1, b"x" * size)
        print("to stdout\nlast words", file=sys.stdout)
        os.write(2, b"to stderr\n")
        return "done"

    def lock(self):
        return contextlib.suppress, lambda: None  # a function in a function cannot be pickled

    def unloadable(self):
        return Unloadable()

    def spawn(self):
        return subprocess.Popen(["sleep", "60"]).pid


def refuse():
    raise RuntimeError("no such device")


def leave_at_once():
    os._exit(7)


def never_ready():
    time.sleep(60)


# In the parent


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture
def worker():
    with Worker("test_process:Handler") as worker:
        yield worker


def running(pid):
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone_within(pid, seconds):
    until = time.monotonic() + seconds
    while running(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not running(pid)


def test_answers_come_one_by_one_from_one_process():
    with Worker("test_process:Handler", 5, environment={"FP4BENCH_TEST": "yes"}) as worker:
        assert [worker.ask(("add", x), LONG) for x in range(3)] == [5, 6, 7]
        assert worker.ask(("environment", "FP4BENCH_TEST"), LONG) == "yes"
        assert worker.ask(("pid",), LONG) == worker.pid
        assert worker.starts == 1


@pytest.mark.parametrize("factory", ["test_process", "test_process:", ":Handler"])
def test_a_malformed_factory_is_refused_at_once(factory):
    with pytest.raises(ValueError, match=r"not of the form package\.module:callable"):
        Worker(factory)


def test_an_exception_is_that_requests_and_the_process_lives_on(worker):
    pid = worker.ask(("pid",), LONG)
    with pytest.raises(CaseFailed) as caught:
        worker.ask(("fail",), LONG)
    failed = caught.value
    assert (str(failed), failed.type_name, failed.fatal) == ("ValueError: bad shape", "ValueError", False)
    assert "in fail\n" in failed.traceback
    assert "and more of it" in failed.traceback
    assert worker.ask(("pid",), LONG) == pid


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leave", "SystemExit: enough"),
        ("fail_fussily", "FussyError: its message cannot be shown"),
        ("lock", "Can't (get|pickle) local object"),
        ("unloadable", "ValueError: invalid literal"),
        ("no_such_thing", "AttributeError"),
    ],
)
def test_whatever_comes_instead_of_an_answer_is_that_requests_failure(name, message, worker):
    with pytest.raises(CaseFailed, match=message):
        worker.ask((name,), LONG)
    assert worker.ask(("add", 1), LONG) == 1
    assert worker.starts == 1


@pytest.mark.parametrize("name", ["fail_for_good", "break_and_fail"])
def test_a_process_that_is_not_usable_is_left(name, worker):
    pid = worker.ask(("pid",), LONG)
    with pytest.raises(CaseFailed) as caught:
        worker.ask((name,), LONG)
    assert caught.value.fatal
    assert not running(pid)
    assert worker.ask(("add", 1), LONG) == 1
    assert worker.starts == 2


@pytest.mark.parametrize(
    ("request_", "ending"),
    [
        (("exit", 3), "ended with exit code 3"),
        (("exit", 0), "ended with exit code 0"),
        (("kill",), "was killed by SIGKILL"),
        (("crash",), "was killed by SIGSEGV"),
    ],
)
def test_a_process_that_ends_in_a_request_is_replaced(request_, ending, worker):
    with pytest.raises(WorkerDied) as caught:
        worker.ask(request_, LONG)
    assert str(caught.value) == f"the worker process {ending} before it answered"
    assert caught.value.ending == ending
    if request_[0] == "exit":
        assert caught.value.output == "about to leave"
    if request_[0] == "crash":
        assert "in crash" in caught.value.output
    assert worker.pid is None
    assert worker.ask(("add", 1), LONG) == 1
    assert worker.starts == 2


def test_a_process_killed_from_outside_in_a_request(worker):
    pid = worker.ask(("pid",), LONG)
    with pytest.raises(WorkerDied, match="was killed by SIGKILL"):
        worker.ask(("sleep", 60), LONG, on_wait=lambda: os.kill(pid, signal.SIGKILL))


def test_a_process_killed_between_requests_is_no_requests_fault(worker):
    os.kill(worker.ask(("pid",), LONG), signal.SIGKILL)
    time.sleep(0.05)
    assert worker.ask(("add", 1), LONG) == 1
    assert worker.starts == 2


@pytest.mark.parametrize("request_", [("sleep", 60), ("block",), ("stop_reading",)], ids=lambda request: request[0])
def test_a_process_that_hangs_is_killed_and_says_where(request_, worker):
    pid = worker.ask(("pid",), LONG)
    start = time.monotonic()
    with pytest.raises(WorkerHung, match=r"^the worker process did not answer within 0\.3 s and was killed$") as caught:
        worker.ask(request_, 0.3)
    assert time.monotonic() - start < 0.3 + SOON
    assert not running(pid)
    if request_[0] != "stop_reading":
        assert f"in {request_[0]}" in caught.value.output
    assert worker.ask(("add", 1), LONG) == 1


def test_an_answer_that_the_kill_itself_brought_about_does_not_count(worker):
    # time.sleep goes on after a signal, a C call returns early: its answer would come within the last moments.
    with pytest.raises(WorkerHung):
        worker.ask(("sleep", 0.4), 0.3)


def test_a_request_that_is_never_read_is_a_hang_too(worker):
    pid = worker.ask(("pid",), LONG)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerHung):
        worker.ask(("add", b"x" * 10_000_000), 0.3)
    assert not running(pid)


def test_much_output_is_no_deadlock_and_no_answer(worker):
    assert worker.ask(("talk", 5_000_000), LONG) == "done"


def test_the_end_of_the_output_is_quoted_and_only_of_the_last_request(worker):
    worker.ask(("talk", 100_000), LONG)
    with pytest.raises(WorkerDied) as caught:
        worker.ask(("exit", 1), LONG)
    assert caught.value.output == "about to leave"
    worker.restart()
    with pytest.raises(CaseFailed) as failed:
        worker.ask(("no_such_thing",), LONG)
    assert failed.value.output == ""


def test_it_is_told_while_it_waits(worker):
    worker.ask(("add", 1), LONG)
    waits = []
    worker.ask(("sleep", 1.2), LONG, on_wait=lambda: waits.append(time.monotonic()))
    assert len(waits) == 2


def test_an_interrupted_wait_leaves_no_late_answer(worker):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.ask(("sleep", 0.7), LONG, on_wait=interrupt)
    assert worker.ask(("add", 1), LONG) == 1


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        ("no_such_module:make", StartFailed, "could not start: ModuleNotFoundError: No module named 'no_such_module'"),
        ("test_process:no_such_name", StartFailed, "could not start: AttributeError"),
        ("test_process:refuse", StartFailed, "could not start: RuntimeError: no such device"),
        ("test_process:leave_at_once", WorkerDied, "ended with exit code 7 while it started"),
        ("test_process:never_ready", WorkerHung, r"did not start within 1 s and was killed"),
    ],
)
def test_a_start_that_fails_is_told_at_the_first_request(factory, error, message):
    with Worker(factory, start_timeout=1 if factory.endswith("never_ready") else LONG) as worker:
        with pytest.raises(error, match=message) as caught:
            worker.ask(("add", 1), LONG)
        if error is StartFailed:
            assert "Traceback" in caught.value.traceback


def test_arguments_that_cannot_be_unpickled_are_a_failed_start():
    with Worker("test_process:Handler", Unloadable()) as worker, pytest.raises(StartFailed, match="invalid literal"):
        worker.ask(("add", 1), LONG)


def test_a_request_that_cannot_be_pickled_is_the_callers_error(worker):
    with pytest.raises((pickle.PicklingError, AttributeError)):
        worker.ask(lambda: None, LONG)
    assert worker.ask(("add", 1), LONG) == 1
    assert worker.starts == 1


def test_restart_and_close(worker):
    first = worker.ask(("pid",), LONG)
    worker.restart()
    second = worker.ask(("pid",), LONG)
    assert second != first
    assert not running(first)
    worker.close()
    worker.close()
    assert worker.pid is None
    assert not running(second)


def test_what_a_process_started_ends_with_it(worker):
    grandchild = worker.ask(("spawn",), LONG)
    assert running(grandchild)
    worker.close()
    assert gone_within(grandchild, SOON)


def test_close_kills_what_does_not_end(worker, monkeypatch):
    monkeypatch.setattr("fp4bench.workers.process.CLOSE_SECONDS", 0.3)
    pid = worker.ask(("pid",), LONG)
    os.kill(pid, signal.SIGSTOP)
    worker.close()
    assert not running(pid)


def test_the_child_ignores_ctrl_c(worker):
    pid = worker.ask(("pid",), LONG)
    os.kill(pid, signal.SIGINT)
    assert worker.ask(("pid",), LONG) == pid


PARENT = """
import sys, time
from fp4bench.workers.process import Worker
with Worker("test_process:Handler") as worker:
    print(worker.ask(("pid",), 20), worker.ask(("spawn",), 20), flush=True)
    try:
        worker.ask(({request!r},) if {request!r} == "block" else ({request!r}, 60), 60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise
"""


def parent_of_a_busy_child(request):
    """A parent process in a group of its own, and its children's ids; the first is in the middle of a request."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(request=request)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    children = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.2)
    assert all(map(running, children))
    return parent, children


@pytest.mark.parametrize("request_", ["sleep", "block"])
def test_a_child_dies_with_a_parent_that_is_killed(request_):
    parent, children = parent_of_a_busy_child(request_)
    with parent:
        parent.kill()
        assert all(gone_within(pid, SOON) for pid in children)


def test_ctrl_c_in_the_group_ends_parent_and_child():
    parent, children = parent_of_a_busy_child("sleep")
    with parent:
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.stdout.read() == "interrupted\n"
        assert parent.wait(LONG) != 0
        assert all(gone_within(pid, SOON) for pid in children)


def test_a_wait_ends_though_something_out_of_reach_holds_the_connection(monkeypatch):
    monkeypatch.setattr("fp4bench.workers.process.CLOSE_SECONDS", 0.5)
    with Worker("test_process:Handler") as worker:
        worker.ask(("pid",), LONG)
        started = time.monotonic()
        with pytest.raises(WorkerHung):
            worker.ask(("leave_a_holder", 6), 0.3)
        assert time.monotonic() - started < 4
