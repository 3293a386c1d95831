"""A training job's side of a heal: from its models and optimizers to the state dict that a transport moves, and back.

It knows torch's modules and optimizers, and nothing of wires, plans or devices.
"""
