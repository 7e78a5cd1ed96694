from hive_vision.conversation import IMAGE_TOKEN, EncodedConversation


def test_a_conversation_that_cannot_be_used_is_empty() -> None:
    encoded = EncodedConversation(problem="no answer to learn from")
    assert (encoded.input_ids, encoded.learned) == ((), ())


def test_images_are_llavas_mark() -> None:
    """Which is what data sets and lmms-eval write."""
    assert IMAGE_TOKEN == "<image>"
