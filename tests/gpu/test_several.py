"""Sharded calls between GPUs, by NCCL."""

import pytest
import sharded
import sharded_models
import torch
from placed import case_of
from ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs here"),
]

CALLS = {
    "causal": case_of("grouped queries", n=700),
    "both ways, rotary": case_of("rotary, exact both ways", n=700),
    "documents, sinks, bias": case_of("bias over rows", n=700, documents=2, sink_heads=2),
    "mask": case_of("mask", n=700),
    "xpos": case_of("xpos", n=700),
}


@pytest.fixture(scope="module")
def two():
    with Ranks(2, "cuda") as ranks:
        yield ranks


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_gpus(two, name, dropout):
    lengths = [389, 311]
    two.run(
        sharded.check, CALLS[name], lengths, lengths, True, torch.float32, 2e-5, "cuda", dropout
    )


def test_halo_of_the_whole_shard(two):
    lengths = [40, 660]
    two.run(sharded.check, CALLS["causal"], lengths, lengths, False, torch.float32, 2e-5, "cuda")


@pytest.mark.parametrize("name", ["heads", "mask"])
def test_shards_that_do_not_fit_are_refused_on_every_rank(two, name):
    assert all(type(error) is ValueError for error in two.errors(sharded.misfits, name))


@pytest.mark.parametrize("way", sharded_models.WAYS)
def test_ranks_that_share_a_sequence_train_as_one_process(two, way):
    two.run(sharded_models.check_training, way, 2, True, "cuda")
