"""How two ranks meet over TCP: connections, dialling, listening, the handshake. The only room with sockets.

Not here: what a state is, and what is said once both are let in.
"""
