"""Skeletons and the fragments they share: attention variants become tile programs."""
