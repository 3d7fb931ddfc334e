import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from full_disk import KINDS, run_on_a_full_disk

from fp4bench.evidence.journal import KEPT_DAYS, Journal, JournalError, forget_old, read, resumable

HEADER = {"key": {"machine": "NVIDIA-H200", "models": ["llama3.1-8b"]}, "version": "0.1.0"}
ENTRIES = [{"record": {"case_id": f"case-{number}"}, "seconds": [1e-6, 2e-6]} for number in range(3)]


@pytest.fixture
def journal(tmp_path):
    with Journal.create(tmp_path / "journal", HEADER) as journal:
        yield journal


def cut_off(folder, entries=ENTRIES, header=HEADER):
    """The path of a journal whose run is gone."""
    with Journal.create(folder, header) as journal:
        for entry in entries:
            journal.append(entry)
    return journal.path


def test_what_was_appended_is_read(journal):
    for entry in ENTRIES:
        journal.append(entry)
        assert read(journal.path)[1][-1] == entry
    assert read(journal.path) == (HEADER, ENTRIES)


def test_a_name_tells_when_and_who_and_is_never_taken_twice(tmp_path):
    with (
        Journal.create(tmp_path, HEADER) as one,
        Journal.create(tmp_path, HEADER) as two,
        Journal.create(tmp_path, HEADER) as three,
    ):
        stem, _, pid = one.path.stem.partition("-")
        assert (len(stem), stem[8], pid) == (15, "T", str(os.getpid()))
        assert len({one.path, two.path, three.path}) == 3


def test_a_line_is_on_the_disk_before_append_returns(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from fp4bench.evidence.journal import Journal
journal = Journal.create(Path({str(tmp_path)!r}), {HEADER!r})
for entry in {ENTRIES!r}:
    journal.append(entry)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    )
    assert killed.returncode == -signal.SIGKILL
    path = resumable(tmp_path, HEADER)
    assert read(path) == (HEADER, ENTRIES)


@pytest.mark.parametrize("entry", [{"x": float("nan")}, {"x": [float("inf")]}, {"x": {1, 2}}])
def test_what_json_does_not_know_is_refused_and_leaves_nothing(entry, journal):
    journal.append(ENTRIES[0])
    with pytest.raises(ValueError, match="JSON without NaN"):
        journal.append(entry)
    journal.append(ENTRIES[1])
    assert read(journal.path)[1] == ENTRIES[:2]


@pytest.mark.parametrize("header", [{}, {"key": None}, {"key": "a"}])
def test_a_header_needs_a_key(header, tmp_path):
    with pytest.raises(ValueError, match="needs a `key`"):
        Journal.create(tmp_path / "journal", header)
    with pytest.raises(ValueError, match="needs a `key`"):
        resumable(tmp_path, header)
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("cut", [b"{", b'{"record": {"case', b'{"whole": 1}', b"\0\0\0", b"\xff\xfe"])
def test_a_last_line_that_was_cut_off_is_left_out_and_written_over(cut, tmp_path):
    path = cut_off(tmp_path)
    path.write_bytes(path.read_bytes() + cut)
    assert read(path) == (HEADER, ENTRIES)
    with Journal.reopen(path) as journal:
        journal.append({"x": 1})
    assert read(path) == (HEADER, [*ENTRIES, {"x": 1}])


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff", b"null", b"\0\0"])
def test_a_damaged_line_is_an_error_that_names_it(damage, tmp_path):
    path = cut_off(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(JournalError, match=r"^line 3 of the journal .* is damaged"):
        read(path)
    with pytest.raises(JournalError, match="line 3"):
        resumable(tmp_path, HEADER)


@pytest.mark.parametrize("content", [b"", b'{"key": {'])
def test_a_file_without_a_whole_header_is_no_journal(content, tmp_path):
    path = tmp_path / "20261121T000000-1.jsonl"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="has no header"):
        read(path)
    assert resumable(tmp_path, HEADER) is None


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(JournalError, match=r"cannot read the journal .*none"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(JournalError, match=r"cannot write the journal .*none"):
        Journal.reopen(tmp_path / "none.jsonl")
    assert resumable(tmp_path / "nowhere", HEADER) is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match="cannot write the journal"):
        Journal.create(tmp_path / "file" / "journal", HEADER)


def test_only_a_run_of_the_same_key_is_gone_on_with(tmp_path):
    path = cut_off(tmp_path)
    assert resumable(tmp_path, HEADER | {"version": "0.2.0"}) == path
    assert resumable(tmp_path, {"key": {"machine": "NVIDIA-H200", "models": ("llama3.1-8b",)}}) == path
    assert resumable(tmp_path, {"key": {"machine": "NVIDIA-B200", "models": ["llama3.1-8b"]}}) is None


def test_the_newest_run_that_finished_a_case_is_gone_on_with(tmp_path):
    for day, entries in ((1, ENTRIES), (2, ENTRIES[:1]), (3, [])):
        cut_off(tmp_path, entries).rename(tmp_path / f"2026110{day}T000000-1.jsonl")
    assert resumable(tmp_path, HEADER) == tmp_path / "20261102T000000-1.jsonl"


def test_the_journal_of_a_living_run_is_left_to_it(tmp_path):
    with Journal.create(tmp_path, HEADER) as journal:
        journal.append(ENTRIES[0])
        assert resumable(tmp_path, HEADER) is None
        with pytest.raises(JournalError, match="belongs to a run that has not ended"):
            Journal.reopen(journal.path)
        journal.append(ENTRIES[1])
    assert resumable(tmp_path, HEADER) == journal.path
    with Journal.reopen(journal.path):
        assert resumable(tmp_path, HEADER) is None


def test_a_living_run_of_another_process_holds_its_journal(tmp_path):
    code = f"""
from pathlib import Path
from fp4bench.evidence.journal import Journal
journal = Journal.create(Path({str(tmp_path)!r}), {HEADER!r})
journal.append({{"x": 1}})
print("open", flush=True)
input()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes) as other:
        assert other.stdout.readline() == "open\n"
        assert resumable(tmp_path, HEADER) is None
        other.kill()
    assert resumable(tmp_path, HEADER) == next(tmp_path.iterdir())


def test_a_stored_run_leaves_no_journal(journal):
    journal.append(ENTRIES[0])
    journal.discard()
    assert list(journal.path.parent.iterdir()) == []
    journal.discard()
    with pytest.raises(JournalError, match="is closed"):
        journal.append(ENTRIES[1])


def test_a_line_is_compact_json(journal):
    journal.append({"a": [1, 2], "b": "line\nbreak"})
    assert journal.path.read_text().splitlines()[1] == '{"a":[1,2],"b":"line\\nbreak"}'
    assert json.loads(journal.path.read_text().splitlines()[0]) == HEADER


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_loses_no_finished_case(kind, tmp_path):
    code = f"""
from fp4bench.evidence.journal import Journal, JournalError, read
journal = Journal.create(Path("."), {HEADER!r})
fill(left=20_000)
written = []
try:
    while len(written) < 100:
        entry = {{"number": len(written), "text": "x" * 3000}}
        journal.append(entry)
        written.append(entry)
except JournalError as error:
    text = str(error)
assert 3 < len(written) < 20, written
assert text.startswith(f"cannot write the journal {{journal.path}} ("), text
assert text.endswith("free space there or mend it, then go on with --resume"), text
assert journal.path.read_bytes().endswith(b"\\n")
assert read(journal.path)[1] == written
free()
journal.append({{"more": 1}})
assert read(journal.path)[1] == [*written, {{"more": 1}}]
"""
    run_on_a_full_disk(kind, tmp_path, code)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full_from_the_start(kind, tmp_path):
    code = f"""
from fp4bench.evidence.journal import Journal, JournalError
fill(left=0)
try:
    Journal.create(Path("."), {HEADER!r})
except JournalError as error:
    assert "cannot write the journal" in str(error), error
else:
    raise AssertionError("it was written")
assert not list(Path(".").glob("*.jsonl"))
"""
    run_on_a_full_disk(kind, tmp_path, code)


def test_a_half_line_that_could_not_be_cut_does_not_spoil_the_next(journal, monkeypatch):
    journal.append(ENTRIES[0])
    descriptor_write = os.write

    def write_half(descriptor, data):
        if len(data) > 20:
            return descriptor_write(descriptor, data[:20])
        raise OSError(28, "No space left on device")

    def cannot(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", write_half)
        broken.setattr(os, "ftruncate", cannot)
        with pytest.raises(JournalError, match="No space left on device"):
            journal.append({"text": "x" * 40})
    assert Path(journal.path).read_bytes()[-1:] != b"\n"
    assert read(journal.path)[1] == ENTRIES[:1]
    journal.append(ENTRIES[1])
    assert read(journal.path)[1] == ENTRIES[:2]


def test_a_run_that_nobody_resumed_is_forgotten(tmp_path, journal):
    folder = journal.path.parent
    now = time.time()
    old, new = cut_off(folder), cut_off(folder)
    for path in (old, journal.path):  # the latter's run is alive
        os.utime(path, (now - (KEPT_DAYS + 1) * 86400,) * 2)
    os.utime(new, (now - (KEPT_DAYS - 1) * 86400,) * 2)
    (folder / "notes.txt").touch()
    assert forget_old(folder, now) == [old]
    assert {path.name for path in folder.iterdir()} == {journal.path.name, new.name, "notes.txt"}
    assert forget_old(folder / "nowhere", now) == []
