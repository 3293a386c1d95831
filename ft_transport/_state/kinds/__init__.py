"""The kinds of leaf, each of which takes one sort of value apart into plain tensors and puts it together again.

Not here: where the bytes of these tensors lie and land.
"""

from ft_transport._state.kinds.base import register_kind
from ft_transport._state.kinds.distributed import DTensorKind, ShardedTensorKind
from ft_transport._state.kinds.layouts import NestedTensor, SparseTensor
from ft_transport._state.kinds.python import GeneratorKind, NumpyArray, ObjectKind
from ft_transport._state.kinds.quantized import QuantizedTensor
from ft_transport._state.kinds.strided import LazyTensor, MetaTensor, PythonTensor, UninitializedTensor
from ft_transport._state.kinds.wrapper import WrapperSubclass

# The newest kind that claims a leaf has it: so what claims little comes late, and in no other order than this one,
# whichever of the files is imported first. A user's kinds are newer than all of these.
for _kind in (
    ObjectKind(),
    GeneratorKind(),
    NumpyArray(),
    UninitializedTensor(),
    PythonTensor(),
    LazyTensor(),
    QuantizedTensor(),
    NestedTensor(),
    SparseTensor(),
    MetaTensor(),
    WrapperSubclass(),
    DTensorKind(),
    ShardedTensorKind(),
):
    register_kind(_kind)
