"""Tables of experiments: cells, results and figures."""
