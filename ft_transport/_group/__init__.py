"""Moves a state over a process group. Point-to-point calls and ``Work`` are in ``channel.py`` alone."""
