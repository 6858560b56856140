"""Says in words why a folder cannot be written."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lowbit.parsing import check_unicode

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors ends what the system said


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns errors of a full disk, or a folder that cannot be written, into a clear ValueError."""
    check_unicode(str(folder), "the path of the folder to write")
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error):
            raise ValueError(
                f"the disk that holds {folder} is full: free some space and run the same command "
                "again; finished blocks are kept"
            ) from error
        place, reason = str(folder), str(error)
        if isinstance(error, OSError) and error.strerror:
            place = str(error.filename2 or error.filename or folder)
            reason = error.strerror
        elif number := OS_ERROR.search(reason):
            reason = os.strerror(int(number[1]))
        hint = ": remove what is there, or choose another OUT" if _is_in_the_way(error) else ""
        if isinstance(error, OSError) and error.errno in REFUSED:
            hint = ": choose another place, or change the permissions of this one"
        raise ValueError(f"{place} cannot be written ({reason}){hint}") from error


def _is_in_the_way(error: BaseException) -> bool:
    """Whether there is a folder where a file is to be, or the other way round."""
    return isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError)
