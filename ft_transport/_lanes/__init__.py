"""Moves a state over lanes, TCP connections of its own: the protocol, and who offers, fetches and passes on.

Not here: sockets, which are in ``_net``.
"""
