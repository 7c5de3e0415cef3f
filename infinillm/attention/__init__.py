"""The mathematics of splitting attention: parts that merge, and the blocks of one device."""
