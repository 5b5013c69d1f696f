"""Measurement: interleaved processes (`turns.py`), and statistics over runs (`stats.py`)."""
