"""Methods of sparse training, each a function that returns a Topology."""
