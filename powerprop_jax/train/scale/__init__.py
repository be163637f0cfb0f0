"""Meshes, hosts, precision, and loops that are stopped and go on."""
