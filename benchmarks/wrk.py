"""Closed-loop load by `wrk`: every connection sends its next request when it has its answer."""

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = {body}
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d %d\\n", summary.requests, summary.duration,
    errors.status + errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99), latency.max))
end
"""


@dataclass(frozen=True)
class Load:
    """What one run of `wrk` saw: answers a second, how many were not right, and latencies in seconds."""

    per_s: float
    errors: int
    p50_s: float
    p99_s: float
    longest_s: float


def available() -> bool:
    """Return whether `wrk` is installed."""
    return shutil.which("wrk") is not None


def load(url: str, request: object, *, connections: int, seconds: float) -> Load:
    """Send one JSON request again and again on so many connections. Raises `RuntimeError` when wrk fails."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        script.write_text(_SCRIPT.format(body=f"[=[{json.dumps(request)}]=]"))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(script), url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(f"wrk failed: {done.stdout}{done.stderr}")
    requests, took, errors, p50, p99, longest = (int(number) for number in found.groups())
    return Load(requests * 1e6 / took, errors, p50 / 1e6, p99 / 1e6, longest / 1e6)
