"""Steer image generators with rewards."""
