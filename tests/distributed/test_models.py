"""Models over sharded sequences, under DDP and FSDP2, against one process."""

import pytest
import sharded_models


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "sequence", "full"), [("DDP", 2, True), ("FSDP2", 2, True), ("FSDP2", 4, False)]
)
def test_ranks_that_share_a_sequence_train_as_one_process(four, way, sequence, full):
    four.run(sharded_models.check_training, way, sequence, full)
