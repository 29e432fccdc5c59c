"""Contribution decomposition (CODEC) of vision models, from one laptop to a GPU cluster.

Importing this package imports nothing heavy; import the package you need, for example
``from codec_dist.attribution import Attributor``.
"""

__version__ = "0.1.0"
