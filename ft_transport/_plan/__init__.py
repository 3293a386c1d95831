"""Where a state lies and where it lands, decided before the first byte moves; what a transfer leaves there.

Not here: whatever moves bytes from one process to another.
"""
