"""Everything particular to the Metis chip: backends, numerics, the Voyager pipeline YAML."""
