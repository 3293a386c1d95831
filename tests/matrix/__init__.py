"""The versions of Python, torch and torchft that this package is tested with, cell by cell: ``python -m tests.matrix``.

Each cell has the built wheel in a virtual environment of its own, with the newest of everything else; there the unit
part of the suite runs, and heals under real Managers. Several gigabytes for each torch: outside of CI.
"""
