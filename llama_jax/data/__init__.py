"""Turn records into blocks of tokens: records -> examples -> order -> packing -> batches."""
