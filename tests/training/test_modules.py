"""A module's state without calling it is what torch's own is, always; a load is torch's own load."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import difference, snapshot
from torch import nn

from ft_transport._training.memory import same_memory
from ft_transport._training.modules import ModuleState, without_compiled
from training.modules import MODULES, OWN, PLAIN, WithExtra, plain, randomized

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.*_norm` is deprecated:FutureWarning", "ignore:.*torch.jit.script"
)


def load(module: nn.Module, state: Any) -> None:
    ModuleState(module).prepare(state)()


def of_others(name: str, seed: int = 2) -> Any:
    """The state of another such module, in memory of its own."""
    return copy.deepcopy(randomized(MODULES[name](), seed).state_dict())


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return "none"


def assert_is_torchs(state: ModuleState, module: nn.Module) -> None:
    """Twice: what is made, and what is kept."""
    for _ in range(2):
        got, expected = state.state_dict(), module.state_dict()
        for each in (got, expected):
            if hasattr(each, "_metadata"):  # looked up by name; in which order it was made means nothing
                each._metadata = OrderedDict(sorted(each._metadata.items()))
        assert difference(got, expected) == ""
        assert list(got) == list(expected)
        for key, value in expected.items():
            if isinstance(value, torch.Tensor) and not key.endswith("packed") and key.rpartition(".")[2] not in MADE:
                assert same_memory(got[key], value), key


MADE = ("added", "stamp")  # by a hook, anew each time


@pytest.mark.parametrize("name", MODULES)
def test_state_is_what_torch_gives(name: str) -> None:
    module = randomized(MODULES[name](), 1)
    assert_is_torchs(ModuleState(module), module)


@pytest.mark.parametrize("name", PLAIN)
def test_leaves_are_the_same_objects_each_time(name: str) -> None:
    state = ModuleState(PLAIN[name]())
    one, other = state.state_dict(), state.state_dict()
    assert one is not other
    assert all(one[key] is other[key] for key in one)


@pytest.mark.parametrize("name", MODULES)
def test_load_is_what_torchs_own_is(name: str) -> None:
    ours, torchs = randomized(MODULES[name](), 1), randomized(MODULES[name](), 1)
    given = of_others(name)
    before = snapshot(list(given.values()))
    load(ours, given)
    torchs.load_state_dict(copy.deepcopy(given))
    assert difference(nn.Module.state_dict(ours), nn.Module.state_dict(torchs)) == ""
    assert difference(ours.state_dict(), given) == ""
    assert snapshot(list(given.values())) == before


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_there_is_not_written_again(name: str) -> None:
    module = PLAIN[name]()
    versions = [
        tensor._version for tensor in nn.Module.state_dict(module, keep_vars=True).values() if is_tensor(tensor)
    ]
    state = ModuleState(module)
    state.prepare(state.state_dict())()
    now = [tensor._version for tensor in nn.Module.state_dict(module, keep_vars=True).values() if is_tensor(tensor)]
    assert now == versions


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def test_views_made_anew_of_what_is_there_are_not_written_either() -> None:
    module = plain()
    versions = [param._version for param in module.parameters()]
    load(module, {key: value.view_as(value) for key, value in module.state_dict().items()})
    assert [param._version for param in module.parameters()] == versions


def test_only_what_differs_is_written() -> None:
    module = plain()
    given = dict(module.state_dict())
    given["2.0.bias"] = torch.full((5,), 7.0)
    versions = {name: param._version for name, param in module.named_parameters()}
    load(module, given)
    assert {n for n, param in module.named_parameters() if param._version != versions[n]} == {"2.0.bias"}
    assert module[2][0].bias.eq(7).all()


def test_overlapping_but_other_memory_is_written() -> None:
    """The same address with other strides is not the same tensor."""
    module = nn.Linear(3, 3, bias=False)
    expected = module.weight.detach().t().clone()
    load(module, {"weight": module.weight.detach().t().clone().t().t()})
    assert torch.equal(module.weight, expected)


def test_gradients_and_parameters_stay_what_they_are() -> None:
    module = plain()
    module[2][0].bias.grad = torch.ones(5)
    params = list(module.parameters())
    load(module, of_others("plain"))
    assert all(one is other for one, other in zip(module.parameters(), params, strict=True))
    assert module[2][0].bias.grad.eq(1).all()
    assert [param.requires_grad for param in params] == [False, True, True, True, True, True, True]


def test_values_are_cast_as_torch_casts_them() -> None:
    module = plain().double()
    given = of_others("plain")
    load(module, given)
    assert module[0].weight.dtype is torch.float64
    assert torch.equal(module[0].weight, given["0.weight"].double())


# ------------------------------------------------------------------------------------ what changes


def _new_data(module: Any) -> None:
    module[2][0].weight.data = torch.ones(5, 6)


def _same_place_other_shape(module: Any) -> None:
    module[0].weight.data = module[0].weight.data.view(4, 6)


def _same_place_other_dtype(module: Any) -> None:
    module[1].running_mean.data = module[1].running_mean.data.view(torch.int32)


def _resized(module: Any) -> None:
    module[1].running_mean.resize_(1000).fill_(2)


def _set(module: Any) -> None:
    module[1].running_mean.set_(torch.arange(6.0))


def _assigned(module: Any) -> None:
    module.load_state_dict(of_others("plain"), assign=True)


def _param_replaced(module: Any) -> None:
    module[2][0].weight = nn.Parameter(torch.ones(5, 6))


def _buffer_replaced(module: Any) -> None:
    module[1].running_var = torch.full((6,), 3.0)


def _param_gone(module: Any) -> None:
    del module[2][0].bias


def _param_none(module: Any) -> None:
    module[2][0].bias = None


def _param_added(module: Any) -> None:
    module[2].register_parameter("scale", nn.Parameter(torch.ones(2)))


def _renamed(module: Any) -> None:
    module[2][0].register_parameter("gain", module[2][0]._parameters.pop("bias"))


def _from_parameter_to_buffer(module: Any) -> None:
    bias = module[2][0]._parameters.pop("bias")
    module[2][0].register_buffer("bias", bias)


def _module_added(module: Any) -> None:
    module.append(nn.Linear(2, 2))


def _module_replaced(module: Any) -> None:
    module[2][1] = nn.LayerNorm(5)


def _module_gone(module: Any) -> None:
    del module[2]


def _not_persistent(module: Any) -> None:
    module[1]._non_persistent_buffers_set.add("running_mean")


def _tied(module: Any) -> None:
    module[2][1].weight = module[2][0].bias


def _hooked(module: Any) -> None:
    module[2].register_state_dict_post_hook(lambda m, state, prefix, md: state.update({prefix + "more": 1}))


def _hooked_before(module: Any) -> None:
    module[2].register_state_dict_pre_hook(lambda m, prefix, keep_vars: m[0].bias.data.fill_(4))


def _on_instance(module: Any) -> None:
    module[2].state_dict = lambda destination, prefix, keep_vars: destination.update({prefix + "x": 1}) or destination


def _other_class(module: Any) -> None:
    module[2].__class__ = type("Other", (nn.Sequential,), {"get_extra_state": lambda self: 5})


def _other_type_of_tensor(module: Any) -> None:
    module[1].running_mean = torch.eye(3).to_sparse()


def _to_other_dtype(module: Any) -> None:
    module.to(torch.bfloat16)


def _to_empty(module: Any) -> None:
    module.to_empty(device="cpu")


CHANGES = [
    _new_data,
    _same_place_other_shape,
    _same_place_other_dtype,
    _resized,
    _set,
    _assigned,
    _param_replaced,
    _buffer_replaced,
    _param_gone,
    _param_none,
    _param_added,
    _renamed,
    _from_parameter_to_buffer,
    _module_added,
    _module_replaced,
    _module_gone,
    _not_persistent,
    _tied,
    _hooked,
    _hooked_before,
    _on_instance,
    _other_class,
    _to_other_dtype,
    _to_empty,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.removeprefix("_"))
def test_state_is_never_stale(change: Callable[[Any], None]) -> None:
    module = randomized(plain(), 1)
    state = ModuleState(module)
    state.state_dict()
    change(module)
    assert_is_torchs(state, module)


def test_leaves_of_other_kinds_are_never_stale() -> None:
    module = plain()
    state = ModuleState(module)
    module[1].running_mean = torch.eye(3).to_sparse()
    assert state.state_dict()["1.running_mean"].layout is torch.sparse_coo
    module[1].running_mean = torch.eye(4).to_sparse()
    assert state.state_dict()["1.running_mean"].shape == (4, 4)
    module.to("meta")
    assert state.state_dict()["0.weight"].is_meta


def test_modules_without_memory_have_leaves_without_memory() -> None:
    with torch.device("meta"):
        module = plain()
    state = ModuleState(module)
    assert (
        difference(
            {key: (value.device, value.shape) for key, value in state.state_dict().items()},
            {key: (value.device, value.shape) for key, value in module.state_dict().items()},
        )
        == ""
    )
    with pytest.warns(UserWarning, match="is a no-op"):  # torch's own load
        state.prepare(of_others("plain"))()


# ---------------------------------------------------------------------------------------- compiled


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def partly_compiled(module: Any) -> nn.Module:
    module[2] = torch.compile(module[2], backend="eager")
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*PLAIN, "hooked", "OverriddenChild", "parametrized"])
@pytest.mark.parametrize("ours", [True, False], ids=["compiled here", "compiled there"])
def test_compiled_modules_have_the_keys_of_others(name: str, ours: bool) -> None:
    one, other = randomized(MODULES[name](), 1), randomized(MODULES[name](), 2)
    here, there = (compiled(one), other) if ours else (one, compiled(other))
    state = ModuleState(there).state_dict()
    assert difference(state, other.state_dict()) == ""
    load(here, copy.deepcopy(state))
    assert difference(one.state_dict(), other.state_dict()) == ""


def test_a_part_may_be_compiled() -> None:
    one, other = partly_compiled(randomized(plain(), 1)), randomized(plain(), 2)
    assert list(ModuleState(one).state_dict()) == list(other.state_dict())
    load(one, copy.deepcopy(other.state_dict()))
    assert difference(ModuleState(one).state_dict(), other.state_dict()) == ""


@pytest.mark.parametrize("wrap", [compiled, partly_compiled])
def test_a_state_with_the_keys_of_a_compiled_module_is_taken(wrap: Callable[[nn.Module], nn.Module]) -> None:
    here, there = randomized(plain(), 1), randomized(plain(), 2)
    given = copy.deepcopy(wrap(there).state_dict())
    assert any("_orig_mod." in key for key in given)
    load(here, given)
    assert all(torch.equal(value, given[key]) for key, value in wrap(here).state_dict().items())


def test_errors_of_compiled_modules_are_torchs() -> None:
    module = compiled(plain())
    given = dict(module.state_dict())
    given["_orig_mod.other"] = given.pop("_orig_mod.0.weight")
    ours = error_of(lambda: load(module, given))
    assert ours == error_of(lambda: module.load_state_dict(given))
    assert "_orig_mod.0.weight" in ours


def test_only_whole_names_are_taken_away() -> None:
    assert without_compiled("_orig_mod.a._orig_mod.b") == "a.b"
    assert without_compiled("my_orig_mod.a") == "my_orig_mod.a"
    assert without_compiled("a._orig_mod.") == "a."


# ------------------------------------------------------------------------------------------ errors


def _missing(state: Any) -> None:
    del state["0.weight"]


def _unexpected(state: Any) -> None:
    state["9.weight"] = torch.zeros(3)


def _renamed_key(state: Any) -> None:
    state["2.0.wait"] = state.pop("2.0.weight")


def _other_shape(state: Any) -> None:
    state["2.0.weight"] = torch.zeros(5, 7)


def _all_at_once(state: Any) -> None:
    _missing(state)
    _unexpected(state)
    _other_shape(state)


def _no_tensor(state: Any) -> None:
    state["2.0.weight"] = "text"


def _unexpected_extra(state: Any) -> None:
    state["0._extra_state"] = 5


@pytest.mark.parametrize(
    "spoil",
    [_missing, _unexpected, _renamed_key, _other_shape, _all_at_once, _no_tensor, _unexpected_extra],
    ids=lambda spoil: spoil.__name__.removeprefix("_"),
)
def test_errors_are_torchs_and_nothing_is_loaded(spoil: Callable[[Any], None]) -> None:
    module = randomized(plain(), 1)
    given = of_others("plain")
    spoil(given)
    before = snapshot(module.state_dict())
    ours = error_of(lambda: ModuleState(module).prepare(given))
    assert snapshot(module.state_dict()) == before
    assert ours == error_of(lambda: module.load_state_dict(given))
    assert ours.startswith("RuntimeError: Error(s) in loading state_dict for Sequential:")


def test_extra_state_is_not_set_where_the_rest_is_refused() -> None:
    module = nn.Sequential(WithExtra(), nn.Linear(2, 2))
    given = dict(copy.deepcopy(module.state_dict()))
    del given["1.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        load(module, given)
    assert module[0].sets == 0
    assert "set_extra_state" not in vars(module[0])
    load(module, copy.deepcopy(module.state_dict()))
    assert module[0].sets == 1


@pytest.mark.parametrize("given", [None, 5, [1]])
def test_what_is_no_mapping_is_refused_as_torch_does(given: Any) -> None:
    module = plain()
    assert error_of(lambda: load(module, given)) == error_of(lambda: module.load_state_dict(given))


def test_a_state_of_before_num_batches_tracked_is_taken() -> None:
    """BatchNorm knows older states: other keys are not always an error."""
    module, torchs = randomized(plain(), 1), randomized(plain(), 1)
    given: Any = of_others("plain")
    del given["1.num_batches_tracked"]
    old = OrderedDict(given)
    load(module, old)
    torchs.load_state_dict(old)
    assert difference(module.state_dict(), torchs.state_dict()) == ""


def test_a_scalar_of_one_element_is_taken_as_torch_does() -> None:
    module = nn.ParameterList([torch.zeros(())])
    load(module, {"0": torch.tensor([3.0])})
    assert module[0].item() == 3


@pytest.mark.parametrize("name", ["set_alone", "get_alone"])
def test_extra_state_that_goes_one_way_is_torchs_to_judge(name: str) -> None:
    kind = {
        "set_alone": type("Module", (nn.Linear,), {"set_extra_state": lambda self, state: None}),
        "get_alone": type("Module", (nn.Linear,), {"get_extra_state": lambda self: 5}),
    }[name]
    module = kind(2, 2)
    given = copy.deepcopy(module.state_dict())
    assert error_of(lambda: load(module, given)) == error_of(lambda: module.load_state_dict(given)) != "none"


def test_swapped_parameters_are_loaded_by_torch() -> None:
    module = randomized(plain(), 1)
    state = ModuleState(module)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        given = of_others("plain")
        state.prepare(given)()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert difference(module.state_dict(), given) == ""
    assert_is_torchs(state, module)


def test_own_functions_and_hooks_are_called_and_no_others() -> None:
    called: list[str] = []
    module = randomized(plain(), 1)
    for each in module.modules():
        each.register_forward_pre_hook(lambda *args: called.append("forward"))
    state = ModuleState(module)
    state.prepare(state.state_dict())()
    assert called == []
    module[2].register_state_dict_pre_hook(lambda m, prefix, keep_vars: called.append(prefix))
    module[2].register_load_state_dict_post_hook(lambda m, keys: called.append("loaded"))
    state.prepare(state.state_dict())()
    assert called == ["2.", "loaded"]


@pytest.mark.parametrize("name", OWN)
def test_those_that_say_it_themselves_are_asked_each_time(name: str) -> None:
    module = randomized(OWN[name](), 1)
    state = ModuleState(module)
    state.state_dict()
    assert_is_torchs(state, randomized(module, 3))


def packing() -> nn.Module:
    """Saves and loads under another key, by functions of the instance alone."""
    module: Any = nn.Linear(2, 2, bias=False)

    def save(destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}packed"] = module.weight.detach() * 10

    def load(state: dict[str, Any], prefix: str, *args: Any) -> None:
        with torch.no_grad():
            module.weight.copy_(state[f"{prefix}packed"] / 10)

    module._save_to_state_dict, module._load_from_state_dict = save, load
    return nn.Sequential(module)


def test_functions_of_an_instance_count_as_its_classs_do() -> None:
    source, destination = packing(), packing()
    state = ModuleState(source).state_dict()
    assert list(state) == ["0.packed"]
    ModuleState(destination).prepare(state)()
    assert difference(destination.state_dict(), source.state_dict()) == ""


def test_what_cannot_be_written_to_is_refused_as_torch_does_and_nothing_is_loaded() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("scale", torch.ones(1).expand(4))
    state = {**ModuleState(module).state_dict(), "scale": torch.arange(4.0), "weight": torch.zeros(2, 2)}
    before = snapshot(module)
    with pytest.raises(RuntimeError, match="scale"):
        ModuleState(module).prepare(state)()
    assert snapshot(module) == before
