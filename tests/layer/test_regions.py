"""Labels of the layer's steps: where they are asked for, and never in a compiled graph."""

import pytest
import torch

from flexlocal import LocalAttention
from flexlocal.regions import labelled, region


@pytest.mark.parametrize("shown", [False, True], ids=["one operator", "all tiles"])
def test_no_region_in_a_compiled_graph(shown):
    """Documents with shared_qk are no call of the eager path's operator: the graph shows it."""
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    attend = LocalAttention(4, dim=4, dropout=0.0, shared_qk=shown)
    layer = torch.compile(attend, fullgraph=True, backend=look)
    q, documents = torch.randn(1, 1, 8, 4), torch.arange(8) // 3 if shown else None
    with labelled():
        layer(q, q, q, documents=documents)
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert any(("softmax" if shown else "attend_in_tiles") in target for target in called)
    assert not any("record_function" in target for target in called)
    layer(q, q, q, documents=documents)
    assert len(graphs) == 1  # whether labels are wanted is none of the graph's business


def labels_of(profiler):
    return [event.name for event in profiler.events() if event.name.startswith("flexlocal::")]


def test_regions_are_labelled_where_that_is_asked_for():
    layer = LocalAttention(4, dim=4, dropout=0.0, backend="eager")
    q, mask = torch.randn(1, 1, 8, 4), torch.arange(8)[None] < 7
    with torch.profiler.profile() as without:
        layer(q, q, q, mask=mask)
    assert labels_of(without) == []
    with torch.profiler.profile() as profiler:
        with labelled(), pytest.raises(KeyError), region("outer"):
            layer(q, q, q, mask=mask)
            raise KeyError
        with region("later"):
            pass
    steps = ("outer", "key mask", "rotary", "attention")
    assert labels_of(profiler) == [f"flexlocal::{step}" for step in steps]
