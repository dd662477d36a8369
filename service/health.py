"""`python -m service.health`: 0 when the service in this container is ready. For health checks; imports next to nothing."""

import http.client
import os
import socket
import sys

_TIMEOUT_S = 4


class _Unix(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def connect(self) -> None:
        """Connect to the socket that has been given as the host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.host)


def _connection() -> http.client.HTTPConnection:
    """Return a connection to where the variables say that the service listens."""
    if uds := os.environ.get("EMASWAP_UDS"):
        return _Unix(uds, timeout=_TIMEOUT_S)
    host, port = os.environ.get("EMASWAP_HOST", "127.0.0.1"), os.environ.get("EMASWAP_PORT", "8000")
    # What listens on every address is asked on this machine's own.
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    try:
        return http.client.HTTPConnection(host, int(port), timeout=_TIMEOUT_S)
    except ValueError:
        raise ValueError(f"EMASWAP_PORT: expected the number of a port, got {port!r}") from None


def main() -> int:
    """Ask /readyz where EMASWAP_UDS, or EMASWAP_HOST and EMASWAP_PORT, say; 0 when it says yes."""
    try:
        connection = _connection()
    except ValueError as error:
        print(error)
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
