"""Figures and reports of finished runs; they need matplotlib."""
