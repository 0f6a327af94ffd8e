"""In the Python path of a test's cluster: Ray's workers that will import vLLM are forked from one that has.

Python runs this at its start. See ``fork_server.py``.
"""

import os
import sys

if (
    len(sys.orig_argv) > 1
    and sys.orig_argv[1].endswith("/default_worker.py")
    # What hycluster gives its engines, ingress processes and batch executors (``hycluster/logs.py``).
    and os.environ.get("VLLM_CONFIGURE_LOGGING") == "0"
):
    import runpy
    from pathlib import Path

    runpy.run_path(str(Path(__file__).with_name("fork_server.py")))["hand_over"]()
