"""Runs cases of the Autobahn test suite against a WebSocket server, and prints a JSON object for each.

`python -m tests.system.autobahn URL AT_ONCE PATTERN…`, where a pattern is a case's number or one such as ``9.*``. A
process of its own, since the runner has been seen to abort when the interpreter ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence

from kosoku import FailureError, run_fuzzingclient


async def _run(url: str, at_once: int, patterns: Sequence[str]) -> None:
    try:
        results = await run_fuzzingclient(url, patterns, concurrency=at_once)
    except FailureError as failure:
        results = failure.results
    for result in results:
        verdict = {
            "case": result.case_id,
            "behavior": result.behavior.value,
            "close": result.behavior_close.value,
            "milliseconds": result.duration,
            "what": f"{result.result} {result.result_close}",
        }
        print(json.dumps(verdict))


if __name__ == "__main__":
    asyncio.run(_run(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
    sys.stdout.flush()
    os._exit(0)
