"""The two ways to code a file: for the least bytes, or for quick unpacking."""

from typing import Literal

Profile = Literal["small", "fast"]
