"""Our kernel clears what lies past the last document, and nothing else."""

import pytest
import torch
from compilers import code_for_hopper

pytest.importorskip("triton")

from flexlocal.flex import flash_tail  # noqa: E402


@pytest.mark.parametrize(
    ("sums", "n"), [([0, 17, 40], 61), ([0, 17, 61], 61), ([0], 61), ([0, 5], 700), ([0, 0, 1], 2)]
)
@pytest.mark.parametrize("tensors", [1, 3])
def test_what_is_cleared(interpreted, sums, n, tensors):
    from flexlocal.flex.flash_tail import clear

    # q's heads lie token by token, those of k and v one after the other; d is no power of 2.
    whole = [torch.randn(1, n, 6, 24).transpose(1, 2), *torch.randn(2, 1, 3, n, 24)]
    given = [x.clone() for x in whole[:tensors]]
    assert given[0].stride() == whole[0].stride()
    clear(torch.tensor(sums, dtype=torch.int32), *given)
    for found, before in zip(given, whole, strict=False):
        assert torch.equal(found[:, :, : sums[-1]], before[:, :, : sums[-1]])
        assert not found[:, :, sums[-1] :].any()


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")  # 3.9
@pytest.mark.parametrize("tensors", [1, 3])
def test_it_compiles_for_a_hopper_gpu(tensors):
    constants = {"X_H": 6, "Y_H": 3, "Z_H": 3, "D": 80, "P": 16}
    constants |= {"y": None, "z": None} if tensors == 1 else {}
    kinds = {**dict.fromkeys("xyz", "*bf16"), "sums": "*i32"}
    assert code_for_hopper(flash_tail._clear, kinds, constants)
