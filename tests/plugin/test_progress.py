"""The progress line: its words with a made-up reporter and clock, and a real session on a terminal."""

import os
import pty
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from project import CASES, FEW, Project

from fp4bench.plugin.progress import Progress


class Terminal:
    """A reporter, and the manager of captured output beside it."""

    def __init__(self, isatty):
        self.isatty, self.shown, self.captured = isatty, [], True

    def write_line(self, line):
        assert not self.captured
        self.shown.append(line)

    def rewrite(self, line, erase):
        assert erase
        self.shown.append(line)

    def ensure_newline(self):
        pass

    @contextmanager
    def global_and_fixture_disabled(self):
        self.captured = False
        yield
        self.captured = True


@pytest.fixture
def clock():
    return SimpleNamespace(now=0.0)


def progress(clock, total=10, resumed=0, isatty=True, verbose=0):
    terminal = Terminal(isatty)
    plugins = SimpleNamespace(getplugin=lambda name: terminal)
    config = SimpleNamespace(pluginmanager=plugins, option=SimpleNamespace(verbose=verbose))
    return Progress(config, total, resumed, now=lambda: clock.now), terminal


def test_the_line_says_cases_time_left_clock_and_power(clock):
    line, terminal = progress(clock)
    line.show()
    clock.now = 5.0
    line.advance({"sm_mhz": 1754.6, "power_w": 431.2})
    clock.now = 6.0
    line.show()
    assert terminal.shown == [
        "fp4bench: 0 of 10 cases",
        "fp4bench: 1 of 10 cases, 45 s left, SM 1755 MHz, 431 W",
        "fp4bench: 1 of 10 cases, 54 s left, SM 1755 MHz, 431 W",
    ]


def test_long_times_are_minutes(clock):
    line, terminal = progress(clock)
    clock.now = 60.0
    line.advance({"sm_mhz": None, "power_w": None})
    assert terminal.shown == ["fp4bench: 1 of 10 cases, 9 min left"]


def test_a_failed_case_counts_and_the_last_one_leaves_no_time(clock):
    line, terminal = progress(clock, total=2)
    clock.now = 3.0
    line.advance(None)
    line.advance(None)
    assert terminal.shown == ["fp4bench: 1 of 2 cases, 3 s left", "fp4bench: 2 of 2 cases"]


def test_resumed_cases_say_nothing_of_the_time_left(clock):
    line, terminal = progress(clock, resumed=2)
    line.advance(None)
    line.advance(None)
    clock.now = 8.0
    line.advance(None)
    assert terminal.shown[1:] == ["fp4bench: 2 of 10 cases", "fp4bench: 3 of 10 cases, 56 s left"]


def test_what_is_being_done_stays_until_the_end(clock):
    line, terminal = progress(clock, total=1)
    line.advance(None)
    line.show(doing="measuring 1 again in a fresh process")
    line.show()
    line.end()
    assert terminal.shown[1:] == ["fp4bench: 1 of 1 cases, measuring 1 again in a fresh process"] * 2 + [""]


def test_a_log_gets_a_line_a_minute(clock):
    line, terminal = progress(clock, isatty=False)
    for second in range(0, 150, 10):
        clock.now = float(second)
        line.show()
    line.end()
    assert terminal.shown == ["fp4bench: 0 of 10 cases"] * 2
    assert not line.live


@pytest.mark.parametrize("verbose", [-1, 1])
@pytest.mark.parametrize("isatty", [True, False])
def test_nothing_is_shown_under_q_and_v(clock, verbose, isatty):
    line, terminal = progress(clock, isatty=isatty, verbose=verbose)
    clock.now = 100.0
    line.advance(None)
    line.end()
    assert terminal.shown == []


def test_without_a_terminal_reporter_nothing_is_shown(clock):
    config = SimpleNamespace(pluginmanager=SimpleNamespace(getplugin=lambda name: None), option=SimpleNamespace(verbose=0))
    Progress(config, 1, now=lambda: clock.now).advance(None)


def test_a_terminal_sees_the_line_and_a_failed_test_did_not_capture_it(tmp_path):
    project = Project.create(tmp_path / "project")
    ours, theirs = pty.openpty()
    environment = project.environment(faults={CASES[1]: "complain"}) | {"TERM": "xterm"}
    process = subprocess.Popen(
        project.command("perf", *FEW), cwd=project.path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    text = read_all(ours)
    assert process.wait(60) == 1
    for done in range(1, 5):
        assert f"fp4bench: {done} of 4 cases" in text
    assert "Captured" not in text
    assert "short test summary" in text


def read_all(descriptor):
    """What comes through a terminal until nobody has it open any more."""
    parts = []
    while True:
        try:
            part = os.read(descriptor, 1 << 16)
        except OSError:  # how Linux says that
            part = b""
        if not part:
            os.close(descriptor)
            return b"".join(parts).decode()
        parts.append(part)
