"""Lanes over the real thing: NIXL, as torch 2.15 has it. ``make fabric`` runs them, in an environment of its own."""
