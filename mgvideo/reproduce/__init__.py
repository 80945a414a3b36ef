"""Tables of experiments: their cells, results and figures."""
