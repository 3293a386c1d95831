"""What torchft calls, and the only room that imports torchft.

Not here: anything that ``ft_transport.distributed`` needs, which works without torchft.
"""
