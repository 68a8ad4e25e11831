"""Sudden death: commands that are killed at random instants, started again, and compared with ones that nobody
disturbed.
"""
