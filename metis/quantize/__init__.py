"""From a float graph to int8: folding, ranges, placement, grids, QDQ."""
