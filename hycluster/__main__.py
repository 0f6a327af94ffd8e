"""``python -m hycluster`` is the ``hycluster`` command."""

from hycluster.cli import main

main()
