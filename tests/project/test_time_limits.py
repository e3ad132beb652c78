"""A test that hangs is failed with its stack, however it hangs, and the others are run."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LIMIT = 2

IN_PYTHON = """
import pytest, threading

def waits_for_ever():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def test_hangs():
    thread = threading.Thread(target=waits_for_ever)
    thread.start()
    thread.join()

@pytest.mark.slow
def test_may_be_slow(request):
    assert request.node.get_closest_marker("timeout").args[0] > 600
"""

IN_C = """
import ctypes

def waits_in_c():
    library = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

def test_hangs():
    waits_in_c()

def test_after_it():
    pass
"""


def outcomes(folder: Path, source: str) -> list[str]:
    """What pytest says of a file of tests under these limits: by itself, and with a worker. In at most a minute."""
    (folder / "test_file.py").write_text(source)
    command = [
        sys.executable, "-m", "pytest", "-p", "time_limits", "-p", "no:cacheprovider", "--rootdir", str(folder),
        "--timeout", str(LIMIT), "-o", "markers=slow: takes long", "-q", "test_file.py",
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(TESTS), "PATH": "", "SPECDEC_EXIT_SECONDS": "1"}
    running = [
        subprocess.Popen(
            [*command, *options],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for options in ((), ("-n", "1"))
    ]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert all(process.returncode != 0 for process in running)
    return said


def test_a_wait_in_python_fails_the_test_and_the_next_one_runs(tmp_path: Path) -> None:
    """The thread it waits for stays behind, and does not keep the process."""
    for said in outcomes(tmp_path, IN_PYTHON):
        assert "1 failed, 1 passed" in said
        assert f"Timeout (>{LIMIT}.0s) from pytest-timeout" in said
        assert "waits_for_ever" in said
        assert "test_hangs" in said


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of glibc")
def test_a_wait_in_c_ends_the_process_with_its_stack(tmp_path: Path) -> None:
    alone, with_a_worker = outcomes(tmp_path, IN_C)
    for said in (alone, with_a_worker):
        assert "in waits_in_c" in said
        assert "in test_hangs" in said
    assert "crashed while running 'test_file.py::test_hangs'" in with_a_worker
    assert "1 failed, 1 passed" in with_a_worker


def test_every_test_of_the_suite_has_a_limit(pytestconfig: pytest.Config) -> None:
    settings = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert 0 < settings["timeout"] <= 300
    assert pytestconfig.pluginmanager.has_plugin("timeout")
    assert pytestconfig.pluginmanager.has_plugin("time_limits")
