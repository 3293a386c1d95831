"""What comes out, and what autograd is told of it."""

from __future__ import annotations

import torch
from helpers import noise

from ft_transport._plan.rebuild import mark_changed
from plan.landing import land


def test_mark_changed_bumps_the_version_of_what_has_one() -> None:
    plain = torch.zeros(2)
    with torch.inference_mode():
        inference = torch.zeros(2)
    version = plain._version
    mark_changed([plain, inference])
    assert plain._version == version + 1


def test_landing_itself_does_not_tell_autograd() -> None:
    weight, strided = torch.nn.Parameter(torch.zeros(3)), torch.zeros(4, 3).t()
    versions = weight._version, strided._version
    _, _, landing = land([noise(3, 1), noise((3, 4), 2)], [weight, strided])
    assert (weight._version, strided._version) == versions
    assert {id(tensor) for tensor in landing.written()} == {id(weight), id(strided)}
