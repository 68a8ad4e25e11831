__version__ = "0.1.0"

from .threads import share_cores

share_cores()  # before any module imports torch
