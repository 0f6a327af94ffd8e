"""How much of the input a job may lose to the quarantine."""

from __future__ import annotations

from hycluster.batch.input.corpus import ShardPlan
from hycluster.batch.job import Job
from hycluster.batch.output.record import Totals
from hycluster.errors import TooManyQuarantined
from hycluster.storage import masked


def check_quarantine(job: Job, corpus: ShardPlan, so_far: Totals) -> None:
    """Stop as soon as the limit can't be kept any more, whatever the rest brings.

    A file that can't be read is one row of the quarantine and weighs as many as its size would hold.

    Raises:
        TooManyQuarantined: says how many, how many are allowed, and where they are.
    """
    # Not before the first: whoever is told to look there must find something.
    unseen = corpus.unseen_rows if so_far.quarantined else 0
    lost, rows = so_far.quarantined + unseen, corpus.rows + unseen
    if lost <= job.max_quarantined_fraction * rows:
        return
    files = [file.path for file in corpus.files if file.unreadable]
    weighed = f" (unreadable files by their size: {len(files)}, such as {files[0]})" if unseen else ""
    raise TooManyQuarantined(
        f"max_quarantined_fraction: {lost} of {rows} rows are quarantined{weighed}, more than "
        f"{job.max_quarantined_fraction:g} of them; see {masked(job.output.path).rstrip('/')}/quarantine"
    )
