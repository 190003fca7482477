"""Storage: the only writer to ReductStore; frames with their labels, and model versions."""
