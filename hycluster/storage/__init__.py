"""Where files are kept: a path or a URI becomes a ``Folder``, which knows what its file system can do.

``folder.py`` is what every file system can (it can be read); ``disk.py`` and ``bucket.py`` are the two that can be
written so that nothing is written twice and what was written is still there after a power cut.
"""

from hycluster.storage.folder import Folder, WritableFolder, leftover_of
from hycluster.storage.locate import locate
from hycluster.storage.masking import masked, masked_line

__all__ = ["Folder", "WritableFolder", "leftover_of", "locate", "masked", "masked_line"]
