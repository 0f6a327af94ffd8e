"""The usage ledger: who has had how many tokens of which model. See ``docs/ledger.md``.

A process that answers requests writes a line for each into a file of its own before the answer's last byte leaves
(``account.py``, ``journal.py``). Files that are cut become Parquet in the ledger's folder, each piece once, by whoever
comes by (``books.py``, ``keeper.py``). ``usage.py`` adds up.
"""
