"""How even the packer keeps ranks, on the lengths of a run's own data. Nothing is computed but plans."""
