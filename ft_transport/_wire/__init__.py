"""How a state is cut into messages and written: layout, fingerprints, frames, manifests as bytes, read without trust.

Not here: whose memory the bytes come from or land in, and what carries them.
"""
