"""The version, as headers of emitted packages and the distribution's metadata state it."""

from typing import Final

VERSION: Final = "0.1.0"
