"""What decoding keeps with a model between calls (`decoding/generate.py`), which training drops to have the memory to itself.

It lies apart from what is known of a model (`info.py`), since it must not be copied or saved with it.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

KEPT: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Model -> what is kept, which must not refer to the model."""
