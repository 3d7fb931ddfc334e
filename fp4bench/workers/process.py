"""A child process that answers requests, one at a time. Knows nothing of what is asked.

The parent holds a `Worker`. The child imports a factory by name, calls it for a handler, and answers each request with what the
handler returns or raises. The child leads a session of its own: Ctrl-C reaches the parent alone, and when the worker ends or
the parent dies the whole group is killed, so that nothing it started outlives it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any

START_SECONDS = 120.0  # an import of torch on a cold disk takes half a minute
CLOSE_SECONDS = 5.0  # for a child that is asked to end
WAIT_SECONDS = 0.5  # between two calls of on_wait
TAIL_LINES = 20
TAIL_BYTES = 8192

_END = b""  # instead of a request

# The parent's path, not the current folder: a checkout there may hold another version of the package.
_BOOT = "import sys; sys.path[:] = {path!r}; from fp4bench.workers.process import serve; serve({connection}, {lifeline})"


class WorkerError(Exception):
    """No answer came. The message is one sentence; `output` is the end of what the process printed meanwhile."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class CaseFailed(WorkerError):  # noqa: N818 - it says what happened
    """The handler raised, or returned what cannot be pickled.

    type_name, traceback: of the exception, as text. fatal: its process is no longer usable; the next request gets another.
    """

    def __init__(self, type_name: str, message: str, traceback: str, fatal: bool, output: str = "") -> None:
        super().__init__(f"{type_name}: {message}" if message else type_name, output)
        self.type_name = type_name
        self.traceback = traceback
        self.fatal = fatal


class StartFailed(WorkerError):  # noqa: N818 - it says what happened
    """The factory could not be imported or raised: no request can be answered. `traceback` is its text."""

    def __init__(self, message: str, traceback: str, output: str = "") -> None:
        super().__init__(message, output)
        self.traceback = traceback


class WorkerDied(WorkerError):  # noqa: N818 - it says what happened
    """The process ended before it answered. `ending`: its exit code or signal, in words."""

    def __init__(self, message: str, ending: str, output: str = "") -> None:
        super().__init__(message, output)
        self.ending = ending


class WorkerHung(WorkerError):  # noqa: N818 - it says what happened
    """No answer in time; the process was killed. `output` ends with where it hung, if Python could still say it."""


# The parent's side


class Worker:
    """A child process by its factory, "package.module:callable", which takes `args` and returns the handler: request -> reply.

    It starts at once and is not waited for. After it died or hung, the next request starts another. `environment` is added to
    the parent's. A handler may have `usable() -> bool`, asked after each failure, and may raise exceptions with `fatal = True`:
    then its process ends, and the next request starts another. A context manager; raises ValueError for a malformed factory.
    """

    def __init__(
        self,
        factory: str,
        *args: Any,
        environment: Mapping[str, str] | None = None,
        start_timeout: float = START_SECONDS,
    ) -> None:
        module, _, name = factory.partition(":")
        if not module or not name:
            raise ValueError(f"the factory {factory!r} is not of the form package.module:callable")
        self.starts = 0  # processes so far
        self._what = pickle.dumps((factory, args))
        self._environment = dict(environment or {})
        self._start_timeout = start_timeout
        self._child: _Child | None = None
        self._start()

    @property
    def pid(self) -> int | None:
        """The process that answers; None between two."""
        return self._child.process.pid if self._child else None

    def ask(self, request: Any, timeout_seconds: float, on_wait: Callable[[], None] | None = None) -> Any:
        """The handler's reply. `on_wait` is called every half second until it comes.

        The timeout is that of the answer; the start has its own. Raises CaseFailed, StartFailed, WorkerDied or WorkerHung.
        Where the wait itself is interrupted (Ctrl-C, an error in `on_wait`) the process is killed: its late answer must not be
        taken for that of the next request.
        """
        message = pickle.dumps(request)
        try:
            child = self._started(on_wait or _do_nothing)
            child.forget_output()
            kind, value = child.ask(message, timeout_seconds, on_wait or _do_nothing)
        except BaseException:
            self._kill()
            raise
        if kind == "reply":
            return value
        failure = CaseFailed(**value, output=child.output())
        if failure.fatal:
            self._kill()
        raise failure

    def restart(self) -> None:
        """End the process and start a fresh one, not waited for."""
        self.close()
        self._start()

    def close(self) -> None:
        """Let the process end, within five seconds; then kill it and all that it started. May be repeated."""
        if self._child:
            self._child.ask_to_end()
        self._kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error:
            self._kill()  # Ctrl-C does not wait for what may be in the middle of a case
        self.close()

    def _start(self) -> _Child:
        self._child = _Child(self._what, self._environment)
        self.starts += 1
        return self._child

    def _started(self, on_wait: Callable[[], None]) -> _Child:
        """A process that waits for a request. One that died since its last answer is replaced: this request did not kill it."""
        if self._child and self._child.ready and self._child.has_ended():
            self._kill()
        child = self._child or self._start()
        if not child.ready:
            child.await_start(self._start_timeout, on_wait)
        return child

    def _kill(self) -> None:
        if self._child:
            self._child.end()
            self._child = None


class _Child:
    """One process, from its start to its end."""

    def __init__(self, what: bytes, environment: Mapping[str, str]) -> None:
        self.ready = False  # to be asked
        self._expired = False  # killed because it took too long
        # When no longer to wait for the end of what was killed: something it started may hold the connection open.
        self._given_up = float("inf")
        self._log = _appended_file()
        self._last_output = ""
        self._lifeline: int | None
        lifeline, self._lifeline = os.pipe()
        self._connection, theirs = Pipe()
        path = [entry or os.getcwd() for entry in sys.path]
        boot = _BOOT.format(path=path, connection=theirs.fileno(), lifeline=lifeline)
        try:
            with tempfile.TemporaryFile() as stdin:
                stdin.write(what)
                stdin.seek(0)
                self.process = subprocess.Popen(
                    [sys.executable, "-u", "-c", boot],
                    stdin=stdin,
                    stdout=self._log,
                    stderr=self._log,
                    env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(path)},
                    pass_fds=(theirs.fileno(), lifeline),
                    start_new_session=True,
                )
        except BaseException:
            self._close_files()
            raise
        finally:
            os.close(lifeline)
            theirs.close()

    def await_start(self, seconds: float, on_wait: Callable[[], None]) -> None:
        """Wait until it can be asked. Raises StartFailed, WorkerDied or WorkerHung."""
        kind, failure = self._exchange(None, seconds, on_wait, "while it started")
        if kind == "unstartable":
            message = f"the worker process could not start: {failure['type_name']}: {failure['message']}"
            raise StartFailed(message, failure["traceback"], self.output())
        self.ready = True

    def ask(self, message: bytes, seconds: float, on_wait: Callable[[], None]) -> tuple[str, Any]:
        """("reply", its value) or ("failure", facts of CaseFailed). Raises WorkerDied or WorkerHung."""
        return self._exchange(message, seconds, on_wait, "before it answered")

    def _exchange(self, message: bytes | None, seconds: float, on_wait: Callable[[], None], when: str) -> tuple[str, Any]:
        answer = None
        with self._deadline(seconds):
            # A broken connection is an end of the process; an error in on_wait is not, and goes up.
            with contextlib.suppress(OSError):
                if message is not None:
                    self._connection.send_bytes(message)
            while not (told := self._connection.poll(WAIT_SECONDS)) and time.monotonic() < self._given_up:
                on_wait()
            if told:
                with contextlib.suppress(OSError, EOFError):
                    answer = self._connection.recv_bytes()
        if answer is None or self._expired:  # the signals of the latter may have cut short what a late answer tells of
            raise self._ended(seconds, when)
        try:
            kind, value = pickle.loads(answer)
        except Exception as error:
            return "failure", _described(error) | {"fatal": False}
        return kind, value

    @contextlib.contextmanager
    def _deadline(self, seconds: float) -> Iterator[None]:
        """Kills the process after so many seconds, which ends any wait for it: for its answer, or for it to take a request."""
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _expire(self) -> None:
        self._expired = True
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)  # it prints where it hangs
        time.sleep(0.2)
        self._signal_group()
        self._given_up = time.monotonic() + CLOSE_SECONDS

    def _ended(self, seconds: float, when: str) -> WorkerError:
        ending = self.end()
        if self._expired:
            verb = "start" if not self.ready else "answer"
            return WorkerHung(f"the worker process did not {verb} within {seconds:g} s and was killed", self.output())
        return WorkerDied(f"the worker process {ending} {when}", ending, self.output())

    def has_ended(self) -> bool:
        """Whether the connection says more than it was asked, which is its end."""
        return self._connection.poll(0)

    def ask_to_end(self) -> None:
        """Returns when the process let its connection go, or after five seconds."""
        if not self.ready:
            return
        until = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(OSError, EOFError):
            self._connection.send_bytes(_END)
            while self._connection.poll(max(0.0, until - time.monotonic())):
                self._connection.recv_bytes()

    def end(self) -> str:
        """Kill what is left of the process and all that it started; how it ended, in words. May be repeated."""
        if self.process.returncode is None:  # until then its number is nobody else's
            self._signal_group()
        try:
            code = self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return "does not end even by SIGKILL, as one that waits for a broken driver,"
        finally:
            self._close_files()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def output(self) -> str:
        """The last lines of what it printed to stdout and stderr since `forget_output`."""
        if self._log.closed:
            return self._last_output
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES))
        return "\n".join(tail.decode(errors="replace").splitlines()[-TAIL_LINES:])

    def forget_output(self) -> None:
        """What follows in the log belongs to the next request; a provider that prints much does not fill the disk."""
        os.ftruncate(self._log.fileno(), 0)

    def _signal_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter is how macOS says the former
            os.killpg(self.process.pid, signal.SIGKILL)

    def _close_files(self) -> None:
        self._last_output = self.output()
        self._log.close()
        self._connection.close()
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None


def _appended_file() -> Any:
    """A temporary file without a name. Each write goes to its end, also after it was cut."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as the process
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
    return file


def _do_nothing() -> None:
    pass


# The child's side


def serve(connection: int, lifeline: int) -> None:
    """Answer requests until the parent ends the connection. Both arguments are file descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what becomes of a run
    _die_with_parent(lifeline)
    # Where it crashed or hangs; these also speak where C code holds the interpreter.
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    channel = Connection(connection)
    # A parent that is gone is not an error: its lifeline ends this process.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            handler = _make_handler()
        except BaseException as error:
            channel.send(("unstartable", _described(error)))
            return
        channel.send(("ready", None))
        while (message := channel.recv_bytes()) != _END:
            channel.send_bytes(_answer(handler, message))


def _die_with_parent(lifeline: int) -> None:
    """Kill this process and its group once the parent's end of the pipe is closed, however the parent ended.

    The kernel does so by itself on Linux, also where C code holds the interpreter. (PR_SET_PDEATHSIG follows the thread that
    started the child, which may end before the parent.) Elsewhere, and where the parent was gone before, a thread does.
    """
    group = os.getpid()
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -group)
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

    def wait() -> None:
        os.read(lifeline, 1)
        os.killpg(group, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _make_handler() -> Callable[[Any], Any]:
    factory, args = pickle.load(sys.stdin.buffer)
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)(*args)


def _answer(handler: Callable[[Any], Any], message: bytes) -> bytes:
    """The reply to a pickled request, pickled. Also of a handler that calls sys.exit, and of a reply that cannot be pickled."""
    try:
        return pickle.dumps(("reply", handler(pickle.loads(message))))
    except BaseException as error:
        fatal = bool(getattr(error, "fatal", False)) or not _usable(handler)
        return pickle.dumps(("failure", _described(error) | {"fatal": fatal}))


def _usable(handler: Callable[[Any], Any]) -> bool:
    try:
        usable = getattr(handler, "usable", None)
        return usable is None or bool(usable())
    except Exception:
        return False


def _described(error: BaseException) -> dict[str, Any]:
    """An exception as text: its type, the first line of its message, and its traceback, which has all lines."""
    try:
        message = str(error).strip().partition("\n")[0]
    except Exception:
        message = "its message cannot be shown"
    return {"type_name": type(error).__name__, "message": message, "traceback": "".join(traceback.format_exception(error))}
