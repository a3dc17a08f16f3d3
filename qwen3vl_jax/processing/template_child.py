"""Render one chat template in a process of its own, with a bound on memory and time.

Run by `templates.py` as a script: a JSON request on stdin, a JSON answer on stdout. A template may
allocate gigabytes in one expression, which no check inside the same process could stop.
"""

import json
import math
import resource
import sys
from pathlib import Path

PAGE_BYTES = resource.getpagesize()


def limit_resources(memory_bytes: int, cpu_s: int) -> None:
    """From now on at most `memory_bytes` more address space and `cpu_s` more CPU seconds."""
    statm = Path("/proc/self/statm")
    used_bytes = int(statm.read_text().split()[0]) * PAGE_BYTES if statm.exists() else 4 << 30
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_s = math.ceil(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used_s + cpu_s, used_s + cpu_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        total_bytes = used_bytes + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (total_bytes, total_bytes))


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_resources(request["memory_bytes"], request["cpu_s"])
    try:
        text = render_jinja_template(**request["arguments"])[0][0]
        answer = {"text": text} if len(text) <= request["max_characters"] else {"long": True}
    except MemoryError:
        answer = {"memory": True}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)[:300]}
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
