"""How much of the input a job may lose to the quarantine."""

from __future__ import annotations

import math

from hycluster.batch.input.corpus import ShardPlan
from hycluster.batch.job import Job
from hycluster.batch.output.commit import QUARANTINE
from hycluster.batch.output.record import Totals
from hycluster.errors import TooManyQuarantined
from hycluster.storage import masked


def _in_two_digits(fraction: float) -> float:
    """Rounded up."""
    step = 10.0 ** (math.floor(math.log10(fraction)) - 1)
    return min(1.0, math.ceil(fraction / step) * step)


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
    # What is lost of the rows that were looked at is what the others may be expected to lose.
    enough = _in_two_digits(max(lost / rows, so_far.quarantined / max(1, so_far.rows)))
    raise TooManyQuarantined(
        f"max_quarantined_fraction: {lost} of {rows} rows are quarantined{weighed}, more than "
        f"{job.max_quarantined_fraction:g} of them; see {masked(job.output.path).rstrip('/')}/{QUARANTINE}. To go on "
        f"without them run the same command with --set max_quarantined_fraction={enough:g}"
    )
