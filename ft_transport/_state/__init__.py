"""What a state dict is: nesting, leaves, the plain tensors and values that they come down to, and what shares memory.

Not here: addresses of bytes, and how anything is written on a wire.
"""
