"""Models built on packed MXFP4 weights."""
