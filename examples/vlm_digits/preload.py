"""Everything that a rank of a comparison imports, for the server that its process is forked from."""

from .launch import quiet

quiet()

from . import check, data, reference, trainer  # noqa: E402, F401
