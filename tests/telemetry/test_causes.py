"""What the log says of paths that are on one side only."""

from __future__ import annotations

import pytest

from ft_transport._telemetry.causes import NO_STATE_YET, likely_cause, naming_cause

AT_SOURCE = "the source's optimizer has no state, as before its first step"
COMPILED = "_orig_mod. on one side alone comes of torch.compile"
WRAPPED = "module. on one side alone comes of DistributedDataParallel or DataParallel"


def renamed(theirs: str, ours: str) -> str:
    return f"what the source calls {theirs} seems to be {ours} in the template"


@pytest.mark.parametrize(
    ("unexpected", "missing", "cause"),
    [
        ([], [], ""),
        (["model.head.weight"], [], ""),
        ([], ["model.head.weight"], ""),
        # An optimizer that has taken no step.
        (["optim.state.0.exp_avg", "optim.state.0.step"], [], NO_STATE_YET),
        (["model.head.weight", "optim.state.layer.0.weight.exp_avg"], [], NO_STATE_YET),
        (["user.default.optim.state.0.step"], ["user.default.optim.param_groups.0.momentum"], NO_STATE_YET),
        ([], ["optim.state.0.exp_avg"], AT_SOURCE),
        (["optim.state.0.exp_avg"], ["optim.state.0.momentum_buffer"], ""),
        (["state.step"], [], ""),
        # Wrappers.
        (["model._orig_mod.a"], ["model.a"], COMPILED),
        (["model.a"], ["model._orig_mod.a"], COMPILED),
        (["model.a"], ["model.module.a"], WRAPPED),
        (["model.module.b"], ["model.module.c"], ""),
        (["model.a", "optim.state.0.step"], ["model._orig_mod.a"], f"{COMPILED}; {NO_STATE_YET}"),
        # Another name.
        (["models.a"], ["model.a"], renamed("models", "model")),
        (["optimizer.state.0.step"], ["optim.state.0.step"], renamed("optimizer", "optim")),
        (["m.h.0.attn.w", "m.h.1.attn.w"], ["m.h.1.att.w", "m.h.0.att.w"], renamed("attn", "att")),
        (["m.0.w", "m.1.w"], ["model.net.0.w", "model.net.1.w"], renamed("m", "model.net")),
        (["model.net.a", "model.net.b"], ["model.a", "model.b"], "net. is in the source's paths alone"),
        (["a", "b"], ["model.a", "model.b"], "model. is in the template's paths alone"),
        # A leaf that happens to be called alike explains nothing.
        (["encoder.weight", "encoder.q", "encoder.k"], ["head.weight"], ""),
        (["a", "b"], ["c"], ""),
    ],
)
def test_what_is_likely(unexpected: list[str], missing: list[str], cause: str) -> None:
    assert likely_cause(unexpected, missing) == cause


def test_names_alone_say_nothing_of_state() -> None:
    assert naming_cause(["optim.state.0.step"], []) == ""
    assert naming_cause(["models.a"], ["model.a"]) == renamed("models", "model")


def test_a_renamed_model_of_many_layers() -> None:
    theirs, ours = ([f"{name}.{i}.weight" for i in range(20_000)] for name in ("models", "model"))
    assert likely_cause(theirs, ours) == likely_cause(theirs, ours[::-1]) == renamed("models", "model")
