"""Labels of the layer's steps: where they are asked for, and never in a compiled graph."""

import pytest
import torch

from flexlocal import LocalAttention
from flexlocal.regions import labelled, region


def test_no_region_in_a_compiled_graph():
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    layer = torch.compile(LocalAttention(4, dim=4, dropout=0.0), fullgraph=True, backend=look)
    q = torch.randn(1, 1, 8, 4)
    with labelled():
        layer(q, q, q)
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("softmax" in target for target in called)
    assert not any("record_function" in target for target in called)
    layer(q, q, q)
    assert len(graphs) == 1  # whether labels are wanted is none of the graph's business


def labels_of(profiler):
    return [event.name for event in profiler.events() if event.name.startswith("flexlocal::")]


def test_regions_are_labelled_where_that_is_asked_for():
    layer = LocalAttention(4, dim=4, dropout=0.0, backend="eager")
    q, mask = torch.randn(1, 1, 8, 4), torch.ones(1, 8, dtype=torch.bool)
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
