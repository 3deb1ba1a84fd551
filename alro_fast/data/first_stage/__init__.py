"""RecRanker's first stage: a retriever's lists with hints for sampled users."""
