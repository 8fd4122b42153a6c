"""records -> examples -> order -> packing -> batches, one way."""
