"""Kills real runs at random moments, and checks all that was promised."""
