"""One folder of objects on any fsspec filesystem. Paths of an output are joined in here and nowhere else.

Used by every process but the engine's. May import nothing of batchrun but errors.
"""

from batchrun.storage.folder import Folder
from batchrun.storage.store import NotFound

__all__ = ["Folder", "NotFound"]
