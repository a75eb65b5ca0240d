"""Read by every interpreter that starts with this folder on its path: puts the stand-ins in."""

from cpu_stand_ins import install

install()
