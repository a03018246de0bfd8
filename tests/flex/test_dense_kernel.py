"""Our kernel of Triton's compiles for a Hopper GPU, without one."""

import pytest
from compilers import code_for_hopper

pytest.importorskip("triton")

from flexlocal.flex.dense_kernel import prepare  # noqa: E402

FP32, NUMBERS = ("q_turns", "k_turns"), ("q", "k", "v", "q_out", "k_out", "v_out")
OF_SCORES = ("table", "bias", "scores")
CONSTANTS = {
    "H": 6, "KV": 3, "MASK_H": 6, "D": 80, "TRAINS": True, "BACK": False, "TOKENS": 32,
    "TABLE_ROW": 1024, "LOW": -(2.0**24), "BIAS_H": 3, "W": 33, "BEHIND": 1, "SPAN": 66,
    "ALIGNED": 8,
}  # fmt: skip
BACK = {**dict.fromkeys(("documents", *OF_SCORES)), "TRAINS": False, "BACK": True}


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")  # 3.9
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, BACK], ids=["forward", "back"])
def test_it_compiles(dtype, changes):
    constants = {**CONSTANTS, **changes}
    kinds = {**dict.fromkeys(FP32, "*fp32"), **dict.fromkeys(NUMBERS + OF_SCORES, f"*{dtype}")}
    kinds |= {"mask": "*i1", "documents": "*i32"}
    assert code_for_hopper(prepare, kinds, constants)
