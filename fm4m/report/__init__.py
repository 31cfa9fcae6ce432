"""A report of a run as one HTML file without server, network or script library: ``python -m fm4m.report RUN_DIR``.

Curves, where the time went, pictures, losses, configuration, environment and faults, read from the files that the
trainer leaves in the run's folder. Several folders give a comparison.
"""

from __future__ import annotations
