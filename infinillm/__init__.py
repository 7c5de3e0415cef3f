"""infinillm: language models served from one pool of K/V memory that all workers share."""

__version__ = "0.1.0"
