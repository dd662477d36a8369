"""Whether an error says that something is short or out of reach just now, and nothing about the version that was loaded."""

from emaswap import Missing, NotAFile
from service.serving.failure import out_of_memory

_MAX_CAUSES = 10
# A path that leads nowhere is no shortage: it does not come back by waiting.
_LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)


def is_shortage(error: BaseException) -> bool:
    """Return whether memory, device memory, handles, disk space or a permission was short, at the root of an error."""
    if out_of_memory(error):
        return True
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if cause is None or isinstance(cause, (Missing, NotAFile)):
            return False
        if isinstance(cause, OSError) and not isinstance(cause, _LASTING):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
