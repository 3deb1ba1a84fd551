"""How good rankings are: metrics, baselines, results, plots and the report."""
