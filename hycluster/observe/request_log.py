"""A line in the log for each request that has ended, where the settings ask for it (``logs.requests``)."""

from __future__ import annotations

import logging

from hycluster.logs import REQUESTS
from hycluster.observe.timelines import Recorder
from hycluster.settings.observe import Logs
from hycluster.timeline import Timeline

logger = logging.getLogger(REQUESTS)

# Lines of requests that came to no engine, as of a flood that is refused: at most so many in so long.
MOST_REFUSED, REFUSED_EVERY_S = 10, 1.0


def log_requests(recorder: Recorder, logs: Logs) -> None:
    """Have a recorder's requests written, if these settings want it."""
    if logs.requests:
        logger.setLevel(logging.INFO)
        recorder.ended.append(RequestLines())


class RequestLines:
    """Writes them."""

    def __init__(self) -> None:
        self._since_s = 0.0
        self._refused = self._left_out = 0

    def __call__(self, timeline: Timeline) -> None:
        if not timeline.tracks and not self._may_write(timeline.began_s):
            return
        fields = {
            "request_id": timeline.id,
            "model": timeline.model,
            "operation": timeline.operation,
            "status": timeline.status,
            "duration_s": round(timeline.duration_s, 3),
            "ttft_s": None if (ttft_s := timeline.ttft_s) is None else round(ttft_s, 3),
            "prompt_tokens": timeline.prompt_tokens,
            "cached_tokens": sum(track.cached_tokens for track in timeline.tracks),
            "output_tokens": timeline.output_tokens,
            "replicas": ",".join(dict.fromkeys(track.replica for track in timeline.tracks if track.replica)),
        }
        if timeline.error:
            fields["error"] = timeline.error
        if timeline.sampled:
            fields["trace_id"] = f"{timeline.trace_id:032x}"
        logger.info(
            "%s %s %s %.3f s, %d tokens in, %d out",
            timeline.operation, timeline.model, timeline.status, timeline.duration_s, timeline.prompt_tokens,
            timeline.output_tokens, extra=fields,
        )  # fmt: skip

    def _may_write(self, now_s: float) -> bool:
        if now_s - self._since_s >= REFUSED_EVERY_S:
            if self._left_out:
                logger.info("%d more requests that came to no engine", self._left_out)
            self._since_s, self._refused, self._left_out = now_s, 0, 0
        self._refused += 1
        self._left_out += self._refused > MOST_REFUSED
        return self._refused <= MOST_REFUSED
