"""Decoding with a cache: token for token the whole text's output."""

import decoded
from hypothesis import given, settings
from strategies import EXAMPLES


@settings(max_examples=EXAMPLES)
@given(decoded.stories())
def test_every_token_has_the_output_of_the_whole_text(story):
    decoded.tell(story, story.cache(), backend="eager")
