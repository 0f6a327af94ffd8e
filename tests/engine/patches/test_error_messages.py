from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]

TOLD = [
    "",
    "no such model",
    "<function f at 0x7f00AA> is no number",
    'Traceback:\n  File "/home/me/x.py", line 3, in f\n    g(1)\nValueError: x',
    'a\n\n \n File "a b", line 12, in <module>\nFile "c", line 1, in d',
    'File "never closed, line 1, in x; File "y", line 2, in z',
    "read /opt/venv/lib/python3.11/x.so and /usr/x, not /usr or /home/",
    "a/b/c.py /c.py /d/e.py, //f/g.h /h/i.j.k/l/m.n /o/p. /q/r.s/ é/ü/ö.ä",
    "https://example.org/a/b.html",
    "   spaces at both ends  \n",
]


@pytest.mark.parametrize("told", TOLD)
def test_the_same_is_cut_out_as_by_vllm(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import regex
    from vllm.entrypoints.serve.exception_handling import utils

    from hycluster.engine.patches.error_messages import patch_error_messages

    patch_error_messages()
    ours = utils.sanitize_message(told)
    monkeypatch.setattr(utils, "re", regex)
    assert ours == utils.sanitize_message(told)


@pytest.mark.parametrize("run", ["/a", "/", " ", "\n", ' File "', "/home/a", ".a/b", " at 0xa"])
def test_it_takes_no_longer_than_the_message_is_long(run: str) -> None:
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    from hycluster.engine.patches.error_messages import patch_error_messages

    patch_error_messages()
    begun = time.thread_time()
    for end in ("", 'File "', "x"):
        create_error_response(f"'{run * (100_000 // len(run))}{end}' is not allowed")
    assert time.thread_time() - begun < 5


def test_what_nobody_reads_is_cut_off() -> None:
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    from hycluster.engine.patches.error_messages import MOST_CHARACTERS, patch_error_messages

    patch_error_messages()
    for length, end in ((MOST_CHARACTERS, "m"), (10**7, "... (9991808 characters more)")):
        message = create_error_response("m" * length).error.message
        assert message == "m" * MOST_CHARACTERS + end.removeprefix("m")


def test_vllms_own_still_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    import regex
    from vllm.entrypoints.serve.exception_handling import utils

    monkeypatch.setattr(utils, "re", SimpleNamespace(sub=regex.sub))

    def seconds(length: int) -> float:
        took = []
        for _ in range(3):
            begun = time.thread_time()
            utils.sanitize_message("/a" * (length // 2))
            took.append(time.thread_time() - begun)
        return min(took)

    assert seconds(1000) > 4 * seconds(250)
