"""The same pairs give the same trajectory, whatever the packing, the sharding and the number of ranks."""
