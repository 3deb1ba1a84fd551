"""How good rankings are: metrics, baselines, results, the report, and its tables."""
