"""`python -m service.health`: 0 when the service in this container is ready. For health checks; imports next to nothing."""

import http.client
import os
import sys


def main() -> int:
    """Ask /readyz on the port that EMASWAP_PORT names; 0 when it says yes."""
    port = os.environ.get("EMASWAP_PORT", "8000")
    try:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=4)
    except ValueError:
        print(f"EMASWAP_PORT: expected the number of a port, got {port!r}")
        return 1
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        print(answer.read().decode(errors="backslashreplace"))
        return 0 if answer.status == http.client.OK else 1
    except (OSError, http.client.HTTPException) as error:
        print(f"the service does not answer: {error}")
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
