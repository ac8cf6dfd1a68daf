"""See a plan before running it: who sends what to whom, and how long that would take on given links.

`python -m mimo_ext plan` is the command; nothing here needs a process group, more than one process or a device.
"""

from .edge import Edge, EdgeError, parse_layout
from .links import Links, Phase, Transfer, time_of
from .traffic import Traffic, leader_broadcast, planned

__all__ = [
    "Edge",
    "EdgeError",
    "Links",
    "Phase",
    "Traffic",
    "Transfer",
    "leader_broadcast",
    "parse_layout",
    "planned",
    "time_of",
]
