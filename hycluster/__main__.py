"""``python -m hycluster`` and the ``hycluster`` command.

Standard library only: the one module of the command that runs where nothing but the client is installed.
"""

import sys
from typing import NoReturn

ENGINES = "'hycluster[cpu]' or 'hycluster[gpu]'"


def main() -> None:
    """Run the command line; what is not installed is named with the extra that brings it."""
    try:
        from hycluster.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "hycluster").partition(".")[0] == "hycluster":
            raise
        _missing(f"the hycluster command needs more than the client (no {error.name!r} here)", "'hycluster[serve]'")
    except KeyboardInterrupt:
        # Nothing has begun.
        sys.exit(130)
    try:
        run()
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        _missing("this needs vLLM, which is not installed", ENGINES)


def _missing(what: str, extra: str) -> NoReturn:
    print(f"error: {what}: pip install {extra}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
