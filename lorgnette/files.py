"""Files that appear with their whole content or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, in the place of one that stands there.

    Raises:
        OSError: The system refuses; what stood there still does.
    """
    final = path.resolve()
    with tempfile.NamedTemporaryFile(
        dir=final.parent, prefix=f".{final.name}.partial-", delete=False
    ) as file:
        partial = Path(file.name)
        try:
            file.write(data)
            file.flush()
            # As any new file's, where the temporary one is for its owner alone.
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o666 & ~umask)
            partial.replace(final)
        except BaseException:  # an interrupt of the user's leaves nothing behind either
            partial.unlink(missing_ok=True)
            raise
