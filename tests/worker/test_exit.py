"""The worker's process ends with what its run came to, whatever its native libraries do on the way out."""

import subprocess
import sys

import pytest

CRASH = """
import atexit, ctypes, os, sys
import rlhf_worker.__main__ as module

def main():
    print("told", end="")
    atexit.register(print, " and closed", end="", flush=False)
    ctypes.CDLL(None)["__cxa_atexit"](ctypes.c_void_p(1), None, None)  # C's own end is to call what is no function
    {end}

module.main = main
module.process()
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("return 0", 0),
        ("return 3", 3),
        ("sys.exit(2)", 2),
        ("sys.exit('words')", 1),
        ("raise ValueError('of nobody')", 1),
    ],
)
def test_a_crash_of_a_library_at_the_very_end_changes_nothing(end: str, code: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CRASH.format(end=end)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (code, "told and closed"), ended.stderr
    assert ("of nobody" in ended.stderr) == ("of nobody" in end)


def test_without_it_the_crash_would_be_the_end() -> None:
    code = CRASH.format(end="return 0").replace("module.process()", "sys.exit(main())")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode < 0


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["run", "/no/such.yaml"], 64), (["no-such"], 2)])
def test_the_command_that_pods_run_ends_so(arguments: list[str], code: int) -> None:
    crash = "import ctypes, runpy; ctypes.CDLL(None)['__cxa_atexit'](ctypes.c_void_p(1), None, None)"
    command = [sys.executable, "-c", f"{crash}; runpy.run_module('rlhf_worker', run_name='__main__')", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == code, ended.stderr
