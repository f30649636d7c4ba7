"""Filling the holes of tables and images with a trained model."""
