"""Rootless sandboxes for one ordinary user on Linux. Either side; imports nothing.

The version stands here and nowhere else. Importing this package costs nothing: the launch path imports it too.
"""

__version__ = "0.1.0"
