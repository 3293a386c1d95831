"""The kinds of leaf, each of which takes one sort of value apart into plain tensors and puts it together again.

Not here: where the bytes of these tensors lie and land.
"""
