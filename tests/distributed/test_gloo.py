"""Sharded calls between processes, by gloo on the CPU."""

import placed
import pytest
import sharded
import torch
from features import windows_of
from hypothesis import HealthCheck, given, settings


@pytest.fixture(params=["three", "four"])
def several(request):
    return request.getfixturevalue(request.param)


def drawn(ranks, examples):
    """That many calls, the same on each run."""
    found = []

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(sharded.calls(ranks, ranks))
    def collect(case):
        found.append(case)

    collect()
    return found


def test_two_processes(two):
    two.run(sharded.check_all, drawn(2, 6), True, torch.float64, 1e-12)


@pytest.mark.slow
def test_two_processes_in_one_call(two):
    two.run(sharded.check_all, drawn(2, 20), False, torch.float32, 1e-6)


@pytest.mark.slow
def test_three_and_four_processes(several):
    several.run(sharded.check_all, drawn(several.count, 30), True, torch.float32, 1e-6)


@pytest.mark.slow
def test_dropout_drops_the_weights_of_one_call(several):
    cases = drawn(several.count, 10)
    several.run(sharded.check_all, cases, True, torch.float64, 1e-12, "cpu", 0.4)


MISFITS = {
    "heads": "q's leading sizes must be the same on all ranks of group, got (2, 4) on rank 0",
    "head size": "head size must be the same on all ranks of group, got 8 on rank 0 and 6 on rank",
    "dtype": "dtype of q, k and v must be the same on all ranks of group, got torch.float32 on ra",
    "window": "window must be the same on all ranks of group, got window_5_back_1_forward_1 on r",
    "mask": r"(rank 1 of group cannot take part: ValueError: )?mask must have the shape (batch, 7)",
    "a kind": "(rank 1 of group cannot take part: TypeError: )?q must be a tensor, got type str",
    "one mask": "mask's batch must be the same on all ranks of group, got None on rank 0 and (2,)",
    "gradients": "whether k or v requires a gradient must be the same on all ranks of group, got ",
    "backend": "(rank 1 of group cannot take part: ValueError: )?backend 'flex' cannot run this",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISFITS)
def test_shards_that_do_not_fit_are_refused_on_every_rank(two, name):
    errors = two.errors(sharded.misfits, name)
    optional, _, rest = MISFITS[name].rpartition(")?")
    for rank, error in enumerate(errors):
        wanted = rest
        if optional and rank == 0:  # it is told of the other's error, which that one raises itself
            wanted = optional.removeprefix("(") + rest
        assert str(error).startswith(wanted), error
        kind = TypeError if name == "a kind" and rank else ValueError
        assert type(error) is kind
    two.run(sharded.works)


def small(**more):
    sizes = {"lead": (2, 6), "kv_heads": 2, "d": 8, "d_v": 6, "window": windows_of(5)}
    return lambda n: placed.case_of(**{**sizes, "n": n, **more})


HALOS = {
    # a call of n tokens, lengths as n has them, and by rank how many keys it receives and how many
    # of its own others receive, for all of which a gradient comes back
    "causal": (small(), (1, 1, 1), [(0, 5), (5, 5), (5, 0)]),
    "both ways": (small(window=windows_of(5, causal=False)), (1, 1, 1), [(5, 5), (10, 10), (5, 5)]),
    "a key mask": (small(mask_batch=2), (1, 1, 1), [(0, 5), (5, 5), (5, 0)]),
    "documents": (small(documents=2), (1, 1, 1), [(0, 9), (9, 9), (9, 0)]),
    "one row of documents": (small(documents=0), (1, 1, 1), [(0, 9), (9, 9), (9, 0)]),
    "nothing on one": (small(), (1, 0, 2), [(0, 5), (0, 0), (5, 0)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HALOS)
def test_traffic_is_that_of_the_formula_at_any_length(three, name):
    case, shares, receives = HALOS[name]
    for n in (60, 600):
        lengths = [n // 3 * share for share in shares]
        three.run(sharded.check_traffic, case(n), lengths, receives)


@pytest.mark.slow
def test_a_halo_comes_from_several_ranks(three):
    sliding = small(window=windows_of(5, exact=True))
    three.run(sharded.check_traffic, sliding(42), [20, 2, 20], [(0, 8), (5, 2), (5, 0)])


@pytest.mark.slow
def test_cutting_and_joining(several):
    several.run(sharded.check_sequences, 14)


@pytest.mark.slow
def test_layer_checkpointing_and_seed(two):
    two.run(sharded.check_layer)


@pytest.mark.slow
def test_inside_a_compiler(two):
    two.run(sharded.check_compiled, "aot_eager")


@pytest.mark.slow
def test_inside_a_compiler_where_ranks_agree(two):
    two.run(sharded.check_agreeing_compiled)
