"""`python -m trainer.health`: exit with 0 if the last training step is recent. A health check that imports next to nothing."""

import os
import sys
import time
from pathlib import Path

_MAX_AGE_S = 60.0


def main() -> int:
    """Return 0 if the file EMASWAP_HEARTBEAT is at most EMASWAP_HEARTBEAT_MAX_AGE_S (60 by default) old, otherwise 1."""
    heartbeat = os.environ.get("EMASWAP_HEARTBEAT")
    if not heartbeat:
        print("EMASWAP_HEARTBEAT is not set: expected the file that the trainer touches at each step")
        return 1
    limit = os.environ.get("EMASWAP_HEARTBEAT_MAX_AGE_S", _MAX_AGE_S)
    try:
        max_age_s = float(limit)
    except ValueError:
        print(f"EMASWAP_HEARTBEAT_MAX_AGE_S: expected a number of seconds, got {limit!r}")
        return 1
    try:
        age_s = time.time() - Path(heartbeat).stat().st_mtime
    except FileNotFoundError:
        print("the trainer has not made a step yet")
        return 1
    except OSError as error:
        print(f"cannot read the age of {heartbeat}: {error.strerror}")
        return 1
    print(f"the last step was {age_s:.1f} s ago")
    return 0 if age_s <= max_age_s else 1


if __name__ == "__main__":
    sys.exit(main())
